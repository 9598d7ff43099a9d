"""One request on its way through the engine: its branches, its state in the grammar, its events."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch

from earlyfusion.engine.blocks import Branch
from earlyfusion.generation import guidance
from earlyfusion.generation.event_builder import EventBuilder, GrammarState
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.jacobi import Window
from earlyfusion.generation.lookup import Lookup
from earlyfusion.generation.request import Event, Finished, Request, TokenLogprob
from earlyfusion.generation.settings import (
    ModalitySettings,
    guidance_weights,
    image_settings,
    seed_of,
    text_settings,
)
from earlyfusion.generation.steering import Steering
from earlyfusion.processor import Processor

_UNIFORMS = 64  # generated in one call, which gives the same numbers as 64 calls
_NUMBERS = count()


class Handle:
    """A request in the engine. Iterating over it gives its events, and runs steps of the engine
    while there are none. The scheduler sees it as an `Entry`.

    `branches` are in the order full, image-only, unconditional; a condition with factor 0 has no
    branch. `drafts` are the speculative tokens that the next step verifies. `positions` is the
    number of tokens that the step samples: one after the last token, and one after each draft.
    Sampling with `steering` sets `logprob`, or the `error` that ends the request.
    """

    def __init__(
        self,
        request: Request,
        processor: Processor,
        grammar: Grammar,
        priority: int,
        wait: Callable[[Handle], None],
        on_cancel: Callable[[Handle], None],
    ) -> None:
        self.request, self.priority, self.number = request, priority, next(_NUMBERS)
        self.tokens: list[int] = []
        self.events: deque[Event] = deque()
        self.finished = False
        self.error: BaseException | None = None
        self.logprob: TokenLogprob | None = None
        self.grammar_state = GrammarState(
            grammar, request.output, request.max_images, request.max_tokens
        )
        self.branches = [Branch(list(request.ids), adapter=request.adapter)]
        self.window: Window | None = None
        steered = bool(request.sampling.steered)
        self._steering = Steering(processor, request) if steered else None
        self.guidance, self._seed = guidance_weights(request.sampling), seed_of(request.sampling)
        self._text_settings = text_settings(request.sampling)
        self._image_settings = image_settings(request.sampling)
        self._processor, self._layout = processor, request.layout or processor.layout
        self._event_builder = EventBuilder(processor, request, self.grammar_state)
        self._uniforms = _Uniforms(self._seed)
        lookup = request.sampling.prompt_lookup
        self._lookup = Lookup(lookup) if lookup else None
        self.drafts: Sequence[int] = ()
        self._wait, self._on_cancel = wait, on_cancel
        self._plan_sampling()

    def __iter__(self) -> Iterator[Event]:
        try:
            while True:
                while self.events:
                    event = self.events.popleft()
                    yield event
                    if isinstance(event, Finished):
                        return
                self._wait(self)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request; no further events come. Any thread may call it at any time."""
        self._on_cancel(self)

    @property
    def steering(self) -> Steering | None:
        """Changes to the logits of the next token; None if there are none."""
        needed = self._steering is not None and not (
            self.grammar_state.in_image and self._steering.only_forbids
        )
        return self._steering if needed else None

    @property
    def uniforms(self) -> list[float]:
        """The random numbers in [0, 1) with which the next tokens are sampled, one per position."""
        return self._uniforms.of(len(self.tokens), self.positions)

    def next_uniforms(self, count: int) -> list[float]:
        """The random numbers of the next `count` tokens."""
        return self._uniforms.of(len(self.tokens), count)

    @property
    def settings(self) -> ModalitySettings:
        return self._image_settings if self.grammar_state.in_image else self._text_settings

    @property
    def both_settings(self) -> tuple[ModalitySettings, ModalitySettings]:
        """The settings of text and of codes."""
        return self._text_settings, self._image_settings

    @property
    def needs_only_logits(self) -> bool:
        """Whether the next token is sampled from its logits alone, without drafts or steering."""
        guesses = self._lookup is not None and not self.grammar_state.in_image
        return self.steering is None and not self.drafts and self.window is None and not guesses

    @property
    def changes_at_image(self) -> tuple[bool, bool]:
        """Whether the way tokens are sampled changes when an image begins, and when it ends."""
        steered, jacobi = self._steering is not None, bool(self.request.sampling.jacobi)
        at_begin = steered or jacobi or max_branches(self.request) > 1
        at_end = steered or self._lookup is not None or len(self.branches) > 1
        return at_begin, at_end

    @property
    def conditions(self) -> tuple[Branch, Branch, Branch]:
        """The branches of the three conditions of guidance: full, image-only, unconditional. A
        condition without a branch gets another one's: it has equal tokens, or factor 0."""
        full, *others = self.branches
        return (full, others[0], others[-1]) if others else (full, full, full)

    def accept(self, tokens: Sequence[int]) -> list[Branch]:
        """Append sampled tokens, and those that the grammar forces after them. Returns the branches
        that ended, whose blocks can be released."""
        if self.error is not None:
            self.finished = True
            return []
        before = self.branches
        if self.window is not None or self.drafts:
            tokens = self._verified(tokens)
        # All but the last of these tokens were drafts, so their keys and values are in the blocks
        # already.
        for branch in before:
            branch.num_computed += len(tokens) - 1
        for token in tokens:
            if not self.finished:
                self._append(token, self.logprob)
        # A stop string may have ended the reply before the last of these tokens.
        for branch in before:
            branch.num_computed = min(branch.num_computed, len(branch.tokens))
        self._plan_sampling()
        return [] if self.branches is before else [b for b in before if b not in self.branches]

    def _verified(self, tokens: Sequence[int]) -> list[int]:
        """The sampled tokens that are final: all up to and including the first one that differs
        from its draft, as only these follow final tokens."""
        if self.window is not None:
            return self.window.accept(tokens, self.grammar_state.codes_left)
        for index, (token, draft) in enumerate(zip(tokens, self.drafts, strict=False)):
            if token != draft:
                return list(tokens[: index + 1])
        return list(tokens)

    def _plan_sampling(self) -> None:
        """Append forced tokens up to the next one that must be sampled, and plan its sampling."""
        # A forced token needs no logits, but uses up a random number, as in the reference loop.
        while not self.finished and (token := self.grammar_state.forced) is not None:
            self._append(token)
        if self.grammar_state.done:
            self._finish()
        jacobi = self.request.sampling.jacobi
        if not self.grammar_state.in_image:
            self.window = None
        elif jacobi and self.window is None:
            self.window = Window(jacobi, self._seed, len(self.tokens))
        if self.window is not None:
            self.drafts = self.window.drafts
        else:
            self.drafts = () if self._lookup is None else self._guess(self._lookup)
        self.positions, self.reserve = 1 + len(self.drafts), self.grammar_state.codes_left

    def _guess(self, lookup: Lookup) -> list[int]:
        """Guesses of the next text tokens, none of which changes the grammar's mask."""
        if self.finished or self.grammar_state.in_image:
            return []
        guesses, grammar_state = lookup.guess(self.branches[0].tokens), self.grammar_state
        limit = grammar_state.text_left - 1
        plain = itertools.takewhile(grammar_state.grammar.plain_ids.__contains__, guesses[:limit])
        return list(plain)

    def _append(self, token: int, logprob: TokenLogprob | None = None) -> None:
        self.tokens.append(token)
        self.events += self._event_builder.push(token, logprob)
        self.grammar_state.advance(token)
        # A token that ends the reply is not appended to the branches: the model never reads it.
        if self._event_builder.ended or self.grammar_state.done:
            self._finish()
            return
        for branch in self.branches:
            branch.tokens.append(token)
        if token == self._processor.vocabulary.begin_image:
            self._open_branches()
        elif len(self.branches) > 1 and not self.grammar_state.in_image:
            self.branches = self.branches[:1]

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self.events += self._event_builder.finish(self.branches[0].num_cached or 0)

    def _open_branches(self) -> None:
        full, history = self.branches[0], self.branches[0].tokens
        vocabulary = self._processor.vocabulary
        has_images = guidance.has_images(history, vocabulary)
        negative = guidance.negative_prompt_ids(self._processor, self.request.sampling)
        prompts = (
            guidance.condition_prompt(condition, history, vocabulary, self._layout, negative)
            for condition in guidance.needed_conditions(*self.guidance, has_images)[1:]
        )
        self.branches = [full, *(Branch(ids, adapter=full.adapter) for ids in prompts)]
        self.window = None


def max_branches(request: Request) -> int:
    """The maximum number of branches of a request at any time: over 1 only for guided images."""
    if request.max_images == 0 or request.output == "text":
        return 1
    weights = guidance_weights(request.sampling)
    return max(
        len(guidance.needed_conditions(*weights, has_images)) for has_images in (False, True)
    )


class _Uniforms:
    """The random numbers of a request in [0, 1), one per token of its reply."""

    def __init__(self, seed: int) -> None:
        # On the CPU, as in `generation/sampler.py`.
        self._source = torch.Generator().manual_seed(seed)
        self._numbers: list[float] = []

    def of(self, start: int, count: int) -> list[float]:
        while len(self._numbers) < start + count:
            more = torch.rand(_UNIFORMS, dtype=torch.float64, generator=self._source)
            self._numbers += more.tolist()
        return self._numbers[start : start + count]
