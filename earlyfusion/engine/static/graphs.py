"""Static steps ready to run: graphs on a CUDA device, plain calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from earlyfusion.engine.static.layers import StaticLayers


class Kind(NamedTuple):
    """The kind of a step. Each kind has a graph of its own: with `only_codes` all rows are in
    images, so it reads only the codes' part of the head; with `greedy` it does not sort logits."""

    only_codes: bool
    greedy: bool


class Shape(NamedTuple):
    """What a graph is captured for: the number of rows, their kind, and the adapter whose weights
    are used, "" for the model's own."""

    rows: int
    kind: Kind
    adapter: str = ""


class Graphs:
    """The steps of one model by their shape.

    Processes that share the model capture the same shapes in the same order, since a capture and
    the calls before it contain collectives.
    """

    def __init__(self, device: torch.device, layers: StaticLayers) -> None:
        self._device, self._peers = device, layers.peers
        self._collectives_per_step = layers.collectives
        self._steps: dict[Shape, Callable[[], None]] = {}
        self._stream: Any = None
        self._pool: Any = None

    @property
    def shapes(self) -> set[Shape]:
        """The shapes that are ready."""
        return set(self._steps)

    @property
    def captures(self) -> bool:
        """Whether steps are captured before they run."""
        return self._device.type == "cuda"

    def collectives(self, shape: Shape, steps: int) -> int:
        """The number of collectives of `steps` steps, and of the capture if the shape has none."""
        new = self.captures and shape not in self._steps
        return self._collectives_per_step * (steps + (WARM_UP + 1 if new else 0))

    def wait(self) -> None:
        """If several processes share the model, wait until the captured steps that were started are
        done; ConnectionError if they do not end."""
        if self._peers is None or self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._peers.wait(event.query)

    def captured_step(
        self, shape: Shape, run: Callable[[], None], idle: Callable[[], None]
    ) -> Callable[[], None]:
        """The step `run`. `idle` makes all rows idle before each warm-up call."""
        if shape not in self._steps:
            self._steps[shape] = self._capture(run, idle) if self.captures else run
        return self._steps[shape]

    def _capture(self, run: Callable[[], None], idle: Callable[[], None]) -> Callable[[], None]:
        if self._stream is None and self._device.type == "cuda":
            # One stream for all, as libraries keep a workspace per stream.
            self._stream = torch.cuda.Stream(self._device)
        replay, self._pool = capture(run, idle, self._stream, self._pool)
        peers, collectives = self._peers, self._collectives_per_step
        if peers is None:
            return replay

        def replay_and_count() -> None:
            peers.replay(collectives)
            replay()

        return replay_and_count


WARM_UP = 3
"""Warm-up calls before a capture: Triton compiles, and libraries take their workspaces."""


def capture(
    run: Callable[[], None], idle: Callable[[], None], stream: Any, pool: Any
) -> tuple[Callable[[], None], Any]:
    """`run` as a CUDA graph, and its memory pool, which can be shared by graphs that never run at
    the same time."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            idle()
            run()
    current.wait_stream(stream)
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    # "thread_local", as other threads, also NCCL's, may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        run()
    return graph.replay, graph.pool()
