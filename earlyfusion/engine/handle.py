"""One request on its way through the engine: its place in the grammar, its branches, its events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from earlyfusion.engine.runner import Ask
from earlyfusion.engine.scheduler import Branch, Entry
from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import Grammar, Walk
from earlyfusion.generation.jacobi import Window
from earlyfusion.generation.narrator import Narrator
from earlyfusion.generation.request import Event, Finished, Request
from earlyfusion.generation.sampler import generator
from earlyfusion.generation.steering import TokenLogprob, steering
from earlyfusion.processor import Processor

_UNIFORMS = 64  # drawn at once; the numbers are those of one call each


class Handle:
    """A request that the engine holds. Iterating gives its events as they come, and drives the
    engine while there are none; `cancel` gives its place back at any time."""

    def __init__(
        self,
        request: Request,
        processor: Processor,
        grammar: Grammar,
        priority: int,
        wait: Callable[[Handle], None],
        leave: Callable[[Handle], None],
    ) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.events: deque[Event] = deque()
        self.finished = False
        self.error: BaseException | None = None
        self.seen_V: Tensor | None = None
        self.grammar = grammar
        self._vocabulary, self._layout = processor.vocabulary, request.layout or processor.layout
        self._steering = steering(processor, request)
        self._asked: Ask | None = None
        self._walk = Walk(grammar, request.output, request.images, request.room)
        self._narrator = Narrator(processor, request)
        self._uniforms = _uniforms(request)
        self._weights = weights(request)
        self._window: Window | None = None
        self._branches: dict[guidance.Branch, Branch] = {"full": Branch(list(request.ids))}
        self.entry = Entry(list(self._branches.values()), priority)
        self._wait, self._leave = wait, leave
        self._forced()

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
        """End the request where it is; it gives no further events. Safe to call at any time."""
        self._leave(self)

    def ask(self) -> Ask:
        """What the next token is drawn from."""
        self._asked = Ask(
            self._mixed_branches(),
            self._weights,
            self.grammar,
            self._walk.state,
            self._walk.in_image,
            self._walk.may_begin,
            self.request.sampling,
            next(self._uniforms),
            self.seen_V,
            self._window_here(),
            self._steering,
        )
        return self._asked

    def take(self, tokens: Sequence[int]) -> list[Branch]:
        """Read what was drawn, and the tokens that must follow; the branches that end with it."""
        before = self.entry.branches
        if self._asked is not None and self._asked.error is not None:
            self.error, self.finished = self._asked.error, True
            return []
        if self._window is not None:
            tokens = self._settled(self._window, tokens)
        for token in tokens:
            self._accept(token, None if self._asked is None else self._asked.logprob)
        self._forced()
        if not self._walk.in_image:
            self._window = None
        return [branch for branch in before if branch not in self.entry.branches]

    def _window_here(self) -> Window | None:
        size, seed = self.request.sampling.jacobi, self.request.sampling.seed
        if not size or not self._walk.codes_left:
            return None
        if self._window is None:
            self._window = Window(size, seed or 0, len(self.tokens))
        return self._window

    def _settled(self, window: Window, tokens: Sequence[int]) -> list[int]:
        """The final ones of these. All but the last are in the slots already: they were drafts."""
        final = window.settle(tokens, self._walk.codes_left)
        self.entry.drafts = window.drafts
        for branch in self.entry.branches:
            branch.read += len(final) - 1
        for _ in final[1:]:
            next(self._uniforms)
        return final

    def _forced(self) -> None:
        """Where only one token may come its logits do not matter; its uniform number is spent."""
        while not self.finished and (token := self._walk.forced) is not None:
            next(self._uniforms)
            self._accept(token)
        if self._walk.done:
            self._finish()

    def _accept(self, token: int, logprob: TokenLogprob | None = None) -> None:
        self.tokens.append(token)
        self.events.extend(self._narrator.push(token, logprob))
        self._walk.advance(token)
        if self._narrator.ended or self._walk.done:
            self._finish()
            return
        for branch in self._branches.values():
            branch.tokens.append(token)
        if token == self._vocabulary.begin_image:
            self._open_branches()
        elif len(self._branches) > 1 and not self._walk.in_image:
            self._keep("full")

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self.events.extend(self._narrator.finish())

    def _open_branches(self) -> None:
        history = self._branches["full"].tokens
        has_images = guidance.has_images(history, self._vocabulary)
        self._window = None
        self._keep("full")
        for name in guidance.needed(*self._weights, has_images)[1:]:
            prompt = guidance.prompt(name, history, self._vocabulary, self._layout)
            self._branches[name] = Branch(prompt)
        self.entry.branches = list(self._branches.values())

    def _keep(self, name: guidance.Branch) -> None:
        self._branches = {name: self._branches[name]}
        self.entry.branches = list(self._branches.values())

    def _mixed_branches(self) -> tuple[Branch, Branch, Branch]:
        full = self._branches["full"]
        if len(self._branches) == 1:
            return full, full, full
        unconditional = self._branches.get("unconditional")
        image_only = self._branches.get("image_only", unconditional)
        assert image_only is not None
        return full, image_only, unconditional or image_only


def most_branches(request: Request) -> int:
    """How many branches this request may need at once."""
    if request.images == 0 or request.output == "text":
        return 1
    return max(len(guidance.needed(*weights(request), has)) for has in (False, True))


def weights(request: Request) -> tuple[float, float]:
    """The two weights of guidance, text and image."""
    text, image = request.sampling.guidance_text, request.sampling.guidance_image
    if text is None or image is None:
        raise TypeError("a request takes resolved SamplingParams: call .resolved(defaults) first")
    return text, image


def _uniforms(request: Request) -> Iterator[float]:
    if request.sampling.seed is None:
        raise TypeError("a request needs a seed: the caller draws one where the user gave none")
    source = generator(request.sampling.seed)
    while True:
        yield from torch.rand(_UNIFORMS, dtype=torch.float64, generator=source).tolist()
