"""Tokens from the hidden states of a step: guidance, grammar, penalty, truncation, sampling.

The head is used in two parts, one for codes and one for text: each row is multiplied only with the
part that it may sample from. Requests with equal settings are sampled together. Each has random
numbers of its own, so its tokens are the same as when it is sampled alone.
"""

# Shapes: B tokens to sample (several per handle with drafts), R rows of hidden states, V columns of
# a head (or ids of the whole vocabulary), D model width.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from earlyfusion.engine.backends.interface import Backend
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.scheduler import Step
from earlyfusion.errors import EarlyFusionError
from earlyfusion.generation import guidance, jacobi
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.sampler import (
    Sampler,
    SamplingTensors,
    can_sample,
    penalise,
    pick,
    warp,
)
from earlyfusion.generation.settings import ModalitySettings
from earlyfusion.generation.steering import Steering
from earlyfusion.kernels.cpu_step import Choice

INVALID_TOKEN = -1
"""Stands for a token whose logits are not finite."""


class SamplingGroup(NamedTuple):
    """Requests with equal values of these are sampled together."""

    in_image: bool
    greedy: bool
    in_windows: bool


class Head:
    """A part of the output head: the logits of some ids, as columns in ascending order of ids."""

    def __init__(self, backend: Backend, ids: Iterable[int], device: torch.device) -> None:
        self.ids = sorted(ids)
        self.ids_V = torch.tensor(self.ids, device=device)
        self.logits = backend.product(self.ids_V)
        self.column_of = {token: column for column, token in enumerate(self.ids)}


class TokenSampler:
    """Samples for all requests of one model."""

    def __init__(self, backend: Backend, grammar: Grammar, device: torch.device) -> None:
        self._backend, self._device = backend, device
        self.image_head = Head(backend, grammar.code_ids, device)
        self._grammars = {grammar}
        self._allowed_text: dict[tuple[Grammar, bool], Tensor] = {}
        self._blocked_by_steering: dict[Handle, Tensor] = {}  # columns, in this step only
        self._settings_cache: dict[
            SamplingGroup, tuple[list[ModalitySettings], SamplingTensors]
        ] = {}
        self._load_text_head(grammar.text_ids)

    @torch.no_grad()
    def allow(self, grammar: Grammar) -> None:
        """Extend the text head to all ids that this grammar allows."""
        if grammar not in self._grammars:
            self._grammars.add(grammar)
            if not grammar.text_ids <= self._text_ids:
                self._load_text_head(self._text_ids | grammar.text_ids)

    def _load_text_head(self, ids: frozenset[int]) -> None:
        self._text_ids = ids
        self.text_head = Head(self._backend, ids, self._device)
        # These refer to columns of the old head.
        self._blocked_by_grammar: dict[tuple[Grammar, bool], Tensor] = {}
        self._seen: WeakKeyDictionary[Handle, _SeenColumns] = WeakKeyDictionary()
        self._none_seen_V = _SeenColumns(self.text_head, self._device).marks_V

    def sample(self, x_RD: Tensor, step: Step, handles: Sequence[Handle]) -> list[list[int]]:
        """The tokens of each handle, one per position. A handle whose steering fails gets an
        `error` and no tokens."""
        sampled: dict[Handle, list[int]] = {}
        remaining: list[Handle] = []
        self._blocked_by_steering = {}
        for handle in handles:
            steering = handle.steering
            if steering is not None and not steering.only_forbids:
                sampled[handle] = self._sample_steered(x_RD, step, handle)
            elif steering is None or self._block_columns(handle, steering):
                remaining.append(handle)
            else:
                sampled[handle] = []
        if self._backend.sample is not None:
            compiled = [handle for handle in remaining if handle.window is None]
            remaining = [handle for handle in remaining if handle.window is not None]
            if compiled:
                sampled |= self._sample_compiled(self._backend.sample, x_RD, step, compiled)
        if remaining:
            sampled |= self._sample_grouped(x_RD, step, remaining)
        return [sampled[handle] for handle in handles]

    def _block_columns(self, handle: Handle, steering: Steering) -> bool:
        """Block the columns of the text head that steering forbids to a request in this step. If
        none is left, sets the handle's error and returns False."""
        try:
            allowed_V = steering.allowed(handle.branches[0].tokens, self._allowed_for(handle))
        except EarlyFusionError as error:
            handle.error = error
            return False
        self._blocked_by_steering[handle] = ~allowed_V[self.text_head.ids_V]
        return True

    # ---- one request at a time, as in the reference loop

    def _sample_steered(self, x_RD: Tensor, step: Step, handle: Handle) -> list[int]:
        """One token from the whole vocabulary; none if the steering fails."""
        steering, grammar = handle.steering, handle.grammar_state.grammar
        assert steering is not None
        ids, branches = handle.branches[0].tokens, handle.branches
        rows_RV = self._backend.vocab_logits(x_RD[[step.row_of[branch] for branch in branches]])
        logits_V = full_V = rows_RV[0]
        if len(branches) > 1:
            _, image_only_V, unconditional_V = (
                rows_RV[branches.index(b)] for b in handle.conditions
            )
            logits_V = guidance.combine(full_V, image_only_V, unconditional_V, *handle.guidance)
        state_1F = torch.tensor([handle.grammar_state.row], device=self._device)
        allowed_1V = grammar.mask(state_1F)
        if not can_sample(logits_V.masked_fill(~allowed_1V, -torch.inf)).all():
            return [INVALID_TOKEN]
        try:
            changed_V = steering.change(ids, logits_V, allowed_1V[0])
        except EarlyFusionError as error:
            handle.error = error
            return []
        seen_1V = torch.zeros_like(allowed_1V)
        seen_1V[0, ids] = True
        uniform_1 = torch.tensor(handle.uniforms, dtype=torch.float64).to(self._device)
        in_image_1 = grammar.in_image(state_1F)
        sampler = Sampler([handle.request.sampling], self._device)
        [token] = sampler.sample(
            changed_V[None], allowed_1V, seen_1V, in_image_1, uniform_1
        ).tolist()
        handle.logprob = steering.logprob(full_V, token)
        return [token]

    # ---- in compiled code: all but windows of codes

    def _sample_compiled(
        self,
        sample: Callable[[Sequence[Choice]], list[int]],
        x_RD: Tensor,
        step: Step,
        handles: Sequence[Handle],
    ) -> dict[Handle, list[int]]:
        rows: dict[bool, _LogitRows] = {}
        for in_image, head in ((False, self.text_head), (True, self.image_head)):
            members = [h for h in handles if h.grammar_state.in_image is in_image]
            if members:
                rows[in_image] = _LogitRows(head, x_RD, step, members)
        # The choices hold raw addresses of logits in `rows`: keep it alive until after the
        # sampling.
        choices = [self._choices(handle, rows[handle.grammar_state.in_image]) for handle in handles]
        columns = iter(sample(list(chain.from_iterable(choices))))
        sampled: dict[Handle, list[int]] = {}
        for handle in handles:
            ids = rows[handle.grammar_state.in_image].ids
            sampled[handle] = [
                ids[column] if column >= 0 else INVALID_TOKEN
                for column in islice(columns, handle.positions)
            ]
        return sampled

    def _choices(self, handle: Handle, rows: _LogitRows) -> list[Choice]:
        settings, in_image = handle.settings, handle.grammar_state.in_image
        # Text drafts are copied from the history, so they add no seen tokens.
        seen_V = None if in_image else self._seen_columns(handle)
        text, image = handle.guidance
        return [
            Choice(
                *rows.addresses(handle, position),
                blocked=None if in_image else self._blocked_for(handle).data_ptr(),
                seen=None if seen_V is None else seen_V.data_ptr(),
                columns=rows.columns,
                top_k=int(settings.top_k),
                text=text,
                image=image,
                temperature=settings.temperature,
                top_p=settings.top_p,
                min_p=settings.min_p,
                penalty=settings.penalty,
                uniform=uniform,
            )
            for position, uniform in enumerate(handle.uniforms)
        ]

    # ---- groups, in torch

    def _sample_grouped(
        self, x_RD: Tensor, step: Step, handles: Sequence[Handle]
    ) -> dict[Handle, list[int]]:
        groups: dict[SamplingGroup, list[Handle]] = {}
        for handle in handles:
            groups.setdefault(_group_of(handle), []).append(handle)
        sampled = [
            self._sample_group(x_RD, step, group, members) for group, members in groups.items()
        ]
        # The host waits for the device here, once per step.
        tokens = iter((sampled[0] if len(sampled) == 1 else torch.cat(sampled)).tolist())
        # The tokens are in the order of the groups, not of `handles`.
        in_order = chain.from_iterable(groups.values())
        return {handle: list(islice(tokens, handle.positions)) for handle in in_order}

    def _sample_group(
        self, x_RD: Tensor, step: Step, group: SamplingGroup, handles: list[Handle]
    ) -> Tensor:
        """Tokens [B] of a group; those of one handle are adjacent."""
        head = self.image_head if group.in_image else self.text_head
        logits_BV = self._guided_logits(x_RD, step, handles, head)
        if not group.in_image:
            logits_BV = self._mask_text(logits_BV, group, handles)
        can_sample_B = can_sample(logits_BV)
        logits_BV = torch.where(can_sample_B[:, None], logits_BV, 0)
        tokens_B = self._sample_tokens(logits_BV, group, handles, head)
        return torch.where(can_sample_B, tokens_B, INVALID_TOKEN)

    def _guided_logits(self, x_RD: Tensor, step: Step, handles: list[Handle], head: Head) -> Tensor:
        """Guided logits [B, V] in fp32: one row per position of each handle."""
        # Per token to sample, the rows of the three conditions: full, image-only, unconditional.
        condition_rows = [
            tuple(step.row_of[branch] + position for branch in handle.conditions)
            for handle in handles
            for position in range(handle.positions)
        ]
        rows = list(dict.fromkeys(chain.from_iterable(condition_rows)))
        logits_RV = head.logits(_select_rows(x_RD, rows)).float()
        # One row per token to sample: no request has a second branch, so nothing is combined.
        if len(rows) == len(condition_rows):
            return logits_RV
        index_of = {row: number for number, row in enumerate(rows)}
        full, image_only, unconditional = (
            logits_RV[[index_of[row] for row in rows_of_condition]]
            for rows_of_condition in zip(*condition_rows, strict=True)
        )
        weights = [handle.guidance for handle in handles for _ in range(handle.positions)]
        weights_2B = torch.tensor([*zip(*weights, strict=True)], dtype=torch.float32)
        text_B1, image_B1 = weights_2B.to(self._device)[..., None]
        return guidance.combine(full, image_only, unconditional, text_B1, image_B1)

    def _mask_text(self, logits_BV: Tensor, group: SamplingGroup, handles: list[Handle]) -> Tensor:
        rules = {
            (handle.grammar_state.grammar, handle.grammar_state.may_begin_image)
            for handle in handles
        }
        by_position = _repeat_per_position(handles)
        if len(rules) == 1 and self._blocked_by_steering.keys().isdisjoint(handles):
            blocked = self._blocked_for(handles[0])  # the same for all
        else:
            blocked = torch.stack([self._blocked_for(handle) for handle in by_position])
        logits_BV = logits_BV.masked_fill(blocked, -torch.inf)
        # Text drafts are copied from the history, so they add no seen tokens.
        seen = [self._seen_columns(handle) for handle in by_position]
        if all(seen_V is None for seen_V in seen):
            return logits_BV
        seen_BV = torch.stack([self._none_seen_V if seen_V is None else seen_V for seen_V in seen])
        return penalise(logits_BV, seen_BV, self._settings_per_position(group, handles).penalty_B)

    def _sample_tokens(
        self, logits_BV: Tensor, group: SamplingGroup, handles: list[Handle], head: Head
    ) -> Tensor:
        if group.greedy:
            # Neither temperature nor truncation changes which logit is the largest.
            return head.ids_V[logits_BV.argmax(-1)]
        settings = self._settings_per_position(group, handles)
        if any(handle.settings.truncates for handle in handles):
            logits_BV = warp(logits_BV, settings)
        else:
            logits_BV = logits_BV / settings.temperature_B.to(logits_BV.dtype)[:, None]
        if group.in_windows:
            windows = [handle.window for handle in handles if handle.window is not None]
            columns = [[head.column_of[token] for token in window.drafts] for window in windows]
            return head.ids_V[jacobi.sample(windows, columns, logits_BV)]
        uniforms = [uniform for handle in handles for uniform in handle.uniforms]
        uniform_B = torch.tensor(uniforms, dtype=torch.float64)
        return head.ids_V[pick(logits_BV, uniform_B.to(self._device))]

    def _settings_per_position(
        self, group: SamplingGroup, handles: list[Handle]
    ) -> SamplingTensors:
        """The settings of these handles as tensors, with a row per position."""
        settings = self._settings_per_handle(group, handles)
        rows = [n for n, handle in enumerate(handles) for _ in range(handle.positions)]
        if len(rows) == len(handles):
            return settings
        return settings.select(torch.tensor(rows).to(self._device))

    def _settings_per_handle(self, group: SamplingGroup, handles: list[Handle]) -> SamplingTensors:
        """The settings of these handles as tensors, with a row per handle; cached until they
        change."""
        rows = [handle.settings for handle in handles]
        cached = self._settings_cache.get(group)
        if cached is None or cached[0] != rows:
            cached = self._settings_cache[group] = rows, SamplingTensors.of(rows, self._device)
        return cached[1]

    # ---- columns of the text head

    def _blocked_for(self, handle: Handle) -> Tensor:
        """The columns that the grammar or the request's steering forbids."""
        if handle in self._blocked_by_steering:
            return self._blocked_by_steering[handle]
        key = handle.grammar_state.grammar, handle.grammar_state.may_begin_image
        if key not in self._blocked_by_grammar:
            self._blocked_by_grammar[key] = ~self._allowed_for(handle)[self.text_head.ids_V]
        return self._blocked_by_grammar[key]

    def _allowed_for(self, handle: Handle) -> Tensor:
        """Text ids that the grammar allows, as a mask over the whole vocabulary."""
        grammar_state = handle.grammar_state
        # In text, `may_begin_image` is the only part of the grammar's state that changes the mask.
        key = grammar_state.grammar, grammar_state.may_begin_image
        if key not in self._allowed_text:
            state_1F = torch.tensor([grammar_state.row], device=self._device)
            self._allowed_text[key] = grammar_state.grammar.mask(state_1F)[0]
        return self._allowed_text[key]

    def _seen_columns(self, handle: Handle) -> Tensor | None:
        """Columns whose tokens are in the request's history; None without a penalty."""
        if handle.settings.penalty == 1:
            return None
        seen = self._seen.get(handle)
        if seen is None:
            seen = self._seen[handle] = _SeenColumns(self.text_head, self._device)
        seen.mark(handle.branches[0].tokens)
        return seen.marks_V


class _SeenColumns:
    """Marks the columns of a head whose tokens are in a request's history."""

    def __init__(self, head: Head, device: torch.device) -> None:
        self.marks_V = torch.zeros(len(head.ids), dtype=torch.bool, device=device)
        # On a CPU a numpy view of the same memory, which writes an entry in a twentieth of the
        # time.
        self._marks = self.marks_V.numpy() if device.type == "cpu" else self.marks_V
        self._column_of, self._marked = head.column_of, 0

    def mark(self, history: Sequence[int]) -> None:
        """Mark the tokens added since the last call."""
        new_tokens, self._marked = history[self._marked :], len(history)
        columns = [self._column_of[token] for token in new_tokens if token in self._column_of]
        if len(columns) == 1:
            self._marks[columns[0]] = True
        elif columns:
            self._marks[columns] = True


class _LogitRows:
    """fp32 logits of one head, for all branches of handles without a window."""

    def __init__(self, head: Head, x_RD: Tensor, step: Step, handles: Sequence[Handle]) -> None:
        rows = [
            step.row_of[branch] + position
            for handle in handles
            for branch in handle.branches
            for position in range(handle.positions)
        ]
        self.ids = head.ids
        self._index_of = {row: number for number, row in enumerate(rows)}
        self._row_of = step.row_of
        self._logits_RV = head.logits(_select_rows(x_RD, rows)).float()
        self.columns = self._logits_RV.shape[1]

    def addresses(self, handle: Handle, position: int) -> tuple[int, int, int]:
        """The memory addresses of the rows of the three conditions."""
        start, row_bytes = self._logits_RV.data_ptr(), 4 * self._logits_RV.stride(0)
        full, image_only, unconditional = (
            start + row_bytes * self._index_of[self._row_of[branch] + position]
            for branch in handle.conditions
        )
        return full, image_only, unconditional


def _repeat_per_position(handles: Sequence[Handle]) -> list[Handle]:
    """Each handle, repeated once per position that it samples."""
    return [handle for handle in handles for _ in range(handle.positions)]


def _select_rows(x_RD: Tensor, rows: list[int]) -> Tensor:
    """These rows; not a copy if they are all rows in order."""
    if rows == list(range(x_RD.shape[0])):  # `len` of a tensor is slow
        return x_RD
    return x_RD.index_select(0, torch.tensor(rows).to(x_RD.device))


def _group_of(handle: Handle) -> SamplingGroup:
    greedy = handle.settings.temperature == 0
    return SamplingGroup(handle.grammar_state.in_image, greedy, handle.window is not None)
