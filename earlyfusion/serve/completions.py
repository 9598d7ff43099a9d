"""/v1/completions: one text or more, each answered as a user's turn."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from time import time
from typing import Any

from earlyfusion.generation.request import Event, Finished, TextDelta, TokenDrawn, Usage
from earlyfusion.serve.protocol import CompletionRequest
from earlyfusion.serve.replies import DONE, KEEPALIVE, Trimmer, chat_usage, logprob_entry, sse
from earlyfusion.serve.service import GenerationSpec, Prepared, Service


def spec_of(body: CompletionRequest) -> GenerationSpec:
    """The settings of a body, without its prompt."""
    sampling = body.sampling()
    if body.max_tokens is not None:
        sampling["max_tokens"] = body.max_tokens
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    return GenerationSpec("text", sampling, body.seed, body.n, model=body.model)


def prompts_of(body: CompletionRequest) -> list[str]:
    """The prompts of a body; each is answered by `n` choices."""
    return [body.prompt] if isinstance(body.prompt, str) else body.prompt


class CompletionReply:
    """The reply to one body, in full or as a stream."""

    def __init__(self, service: Service, body: CompletionRequest, prepared: Prepared) -> None:
        self._service, self._body, self._prepared = service, body, prepared
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time())

    async def full(self) -> dict[str, Any]:
        """The whole reply as one object."""
        replies = await self._prepared.batch.collect(self._service.options.timeout)
        choices = [self._full_choice(i, events) for i, events in enumerate(replies)]
        ends = (e for events in replies for e in events if isinstance(e, Finished))
        usages = dict(enumerate(end.usage for end in ends))
        return self._envelope(choices) | {"usage": self._usage(usages)}

    async def stream(self) -> AsyncIterator[bytes]:
        """The reply as server-sent events, then [DONE]."""
        options = self._service.options
        choices = [_Choice(self._service) for _ in self._prepared.batch.requests]
        usages: dict[int, Usage] = {}
        async for numbered in self._prepared.batch.events(options.keepalive, options.timeout):
            if numbered is None:
                yield KEEPALIVE
                continue
            index, event = numbered
            text = choices[index].text(event)
            end = event if isinstance(event, Finished) else None
            if end is not None:
                usages[index] = end.usage
            if text or end is not None:
                yield sse(self._envelope([self._choice(index, text, choices[index], end)]))
        stream_options = self._body.stream_options
        if stream_options is not None and stream_options.include_usage:
            yield sse(self._envelope([]) | {"usage": self._usage(usages)})
        yield DONE

    def _full_choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        choice = _Choice(self._service)
        text, end = "".join(choice.text(event) for event in events), events[-1]
        return self._choice(index, text, choice, end if isinstance(end, Finished) else None)

    def _choice(
        self, index: int, text: str, choice: _Choice, end: Finished | None
    ) -> dict[str, Any]:
        logprobs = choice.take_logprobs() if self._body.logprobs is not None else None
        choice_json: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs}
        choice_json["finish_reason"] = end and end.reason
        return choice_json if end is None else choice_json | {"seed": end.seed}

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._body.model or self._service.name,
            "choices": choices,
        }

    def _usage(self, usages: Mapping[int, Usage]) -> dict[str, Any]:
        """The usage of all choices, which are given by their indices."""
        return chat_usage(
            self._prepared.prompt_tokens,
            self._prepared.prompt_image_tokens,
            [usages[index] for index in sorted(usages)],
            prompts=len(usages) // self._body.n,
        )


class _Choice:
    """The text and log-probabilities of one choice. Offsets count the characters of its text."""

    def __init__(self, service: Service) -> None:
        self._model, self._trimmer = service.model, Trimmer()
        self._entries: list[dict[str, Any]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def text(self, event: Event) -> str:
        """The text that an event adds."""
        if isinstance(event, TokenDrawn):
            entry = logprob_entry(self._model, event.logprob)
            self._entries += [] if entry is None else [entry]
        return self._trimmer.push(event.text) if isinstance(event, TextDelta) else ""

    def take_logprobs(self) -> dict[str, Any]:
        """The log-probabilities since the last call, as the four lists of this API."""
        entries, self._entries = self._entries, []
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            # A token may be a part of a character. Whitespace at the start is not in the text.
            decoded = self._decoder.decode(bytes(entry["bytes"]))
            self._offset += len(decoded if self._offset else decoded.lstrip())
        tops = [{top["token"]: top["logprob"] for top in e["top_logprobs"]} for e in entries]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
