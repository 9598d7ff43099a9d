"""`generate` with pictures: modes, the project's grammar as a logits processor, and guidance.

Rules and formulas are those of `earlyfusion.generation`; searching and sampling are transformers'.
Shapes: B rows, T tokens, V vocabulary, F fields of the grammar's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from earlyfusion.checkpoints import lumina
from earlyfusion.errors import ContextError, PromptError, SettingError
from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import SLOT, Grammar
from earlyfusion.generation.settings import Output
from earlyfusion.vocabulary import ImageLayout, Vocabulary

Mode = Literal["text-only", "image-only", "interleaved-text-image", "free"]
_OUTPUTS: dict[str, Output] = {
    "text-only": "text",
    "image-only": "image",
    "interleaved-text-image": "interleaved",
}
# What transformers' any-to-any pipeline calls them.
_PIPELINE_MODES = {"text": None, "image": "image-only"}


@dataclass(frozen=True)
class _Plan:
    """One call of `generate` with a grammar."""

    output: Output
    images: int
    room: int
    text_weight: float
    image_weight: float

    @property
    def guided(self) -> bool:
        return (self.text_weight, self.image_weight) != (1.0, 1.0)


class MultimodalGeneration:
    """`generate` of the transformers face, laid over transformers' own."""

    config: Any
    generation_config: Any
    model: Any
    image_logits: bool

    @property
    def vocabulary(self) -> Vocabulary:
        """All ids by kind; `CheckpointError` where neither config nor folder tells them."""
        vocabulary: Vocabulary = self.model.vocabulary
        return vocabulary

    @property
    def picture_tokens(self) -> int:
        """Tokens of one drawn picture, its marks included."""
        return self._layout.num_tokens

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        *,
        multimodal_generation_mode: Mode | None = None,
        generation_mode: str | None = None,
        guidance_text: float = 1.0,
        guidance_image: float = 1.0,
        max_images: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`; the mode says what may come.

        None: as transformers' own class, any token but an image's. "text-only": text until it ends.
        "image-only": one picture. "interleaved-text-image": text and at most `max_images` whole
        pictures. "free": any token at all. `guidance_text` and `guidance_image` are the weights of
        Meta's three-branch guidance for pictures; 1 is off. In the three modes with rules the
        result's prompt part holds the pictures' own tokens in place of placeholders.
        """
        mode = self._mode(multimodal_generation_mode, generation_mode, generation_config)
        more = {"generation_config": generation_config, "logits_processor": logits_processor}
        parent: Any = super()
        if mode not in _OUTPUTS:
            if (guidance_text, guidance_image) != (1.0, 1.0):
                raise SettingError(
                    f"guidance_text={guidance_text} and guidance_image={guidance_image} need a "
                    "mode that draws: set multimodal_generation_mode to 'image-only' or "
                    "'interleaved-text-image'"
                )
            kwargs.setdefault("image_logits", mode == "free")
            return parent.generate(inputs, **more, **kwargs)
        ids_BT = self._ids(inputs, kwargs)
        plan = self._plan(mode, ids_BT, guidance_text, guidance_image, max_images, kwargs)
        more["logits_processor"] = self._processors(plan, ids_BT, kwargs, logits_processor)
        return parent.generate(ids_BT, **more, **self._lengths(plan, generation_config, kwargs))

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching of texts, without image tokens as `generate` is."""
        parent: Any = super()
        before, self.image_logits = self.image_logits, False
        try:
            return parent.generate_batch(*args, **kwargs)
        finally:
            self.image_logits = before

    def _mode(self, mode: str | None, alias: str | None, config: Any) -> str | None:
        if alias is not None and mode is None:
            if alias not in _PIPELINE_MODES:
                raise SettingError(f"generation_mode={alias!r} is unknown: use 'text' or 'image'")
            mode = _PIPELINE_MODES[alias]
        for source in (config, self.generation_config):
            mode = mode or getattr(source, "multimodal_generation_mode", None)
        if mode is not None and mode not in get_args(Mode):
            names = ", ".join(repr(name) for name in get_args(Mode))
            raise SettingError(f"multimodal_generation_mode={mode!r} is unknown: use {names}")
        return mode

    def _ids(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The prompt's ids, with the pictures' own tokens for the placeholders."""
        ids_BT = kwargs.pop("input_ids", inputs)
        if ids_BT is None:
            raise PromptError("a multimodal_generation_mode needs a prompt: pass input_ids")
        pixels = kwargs.pop("pixel_values", None)
        kwargs.pop("mm_token_type_ids", None)
        return ids_BT if pixels is None else self.model.fill_image_tokens(ids_BT, pixels)

    def _plan(
        self,
        mode: str,
        ids_BT: Tensor,
        text: float,
        image: float,
        max_images: int | None,
        kwargs: Mapping[str, Any],
    ) -> _Plan:
        output, tokens = _OUTPUTS[mode], self._layout.num_tokens
        left = self.config.max_position_embeddings - ids_BT.shape[1]
        room = kwargs.get("max_new_tokens")
        if room is None and kwargs.get("max_length") is not None:
            room = kwargs["max_length"] - ids_BT.shape[1]
        if room is None:
            room = tokens if output == "image" else left
        if room > left or room < 1:
            raise ContextError(
                f"a prompt of {ids_BT.shape[1]} tokens and {room} new ones do not fit into the "
                f"context of {self.config.max_position_embeddings}: shorten the prompt or set "
                "max_new_tokens"
            )
        most = 1 if output == "image" else room // tokens
        images = most if max_images is None else max_images
        if output == "image" and (images < 1 or room < tokens):
            raise SettingError(
                f"max_new_tokens={room} and max_images={images} leave no room for a picture of "
                f"{tokens} tokens: raise them, or shorten the prompt"
            )
        return _Plan(output, images, room, text, image)

    def _processors(
        self, plan: _Plan, ids_BT: Tensor, kwargs: Mapping[str, Any], own: Any
    ) -> LogitsProcessorList:
        if plan.guided and (kwargs.get("num_beams") or self.generation_config.num_beams or 1) > 1:
            raise SettingError("guidance does not work with beams: set num_beams=1")
        vocabulary = self.vocabulary
        grammar = Grammar(
            vocabulary, self._layout, self._stops(kwargs), self.config.vocab_size, ids_BT.device
        )
        guide = _Guide(self, plan, kwargs.get("attention_mask")) if plan.guided else None
        grammatical = GrammarLogits(grammar, plan, ids_BT.shape[1], guide)
        return LogitsProcessorList([*(own or []), grammatical])

    def _lengths(
        self, plan: _Plan, generation_config: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of transformers' own `generate`: its length and its ends."""
        settings = generation_config or self.generation_config
        kwargs.pop("max_length", None)
        if settings.eos_token_id is None:
            kwargs.setdefault("eos_token_id", self.vocabulary.eos)
        if settings.pad_token_id is None:
            kwargs.setdefault("pad_token_id", self.vocabulary.pad)
        return kwargs | {"max_new_tokens": plan.room, "image_logits": True}

    def _stops(self, kwargs: Mapping[str, Any]) -> list[int]:
        given = kwargs.get("eos_token_id", self.generation_config.eos_token_id)
        return [] if given is None else [given] if isinstance(given, int) else list(given)

    @property
    def _layout(self) -> ImageLayout:
        grid = self.model.shape.vq_config.grid
        if getattr(self.config, lumina.MARK, None) == lumina.KIND:
            return lumina.layout(grid)
        return ImageLayout(grid, grid)


class GrammarLogits(LogitsProcessor):
    """Lets through what the grammar allows after the tokens drawn so far.

    It keeps the state of the rows it saw last, and follows rows that beams reorder or repeat.
    """

    def __init__(
        self, grammar: Grammar, plan: _Plan, prompt_tokens: int, guide: _Guide | None = None
    ) -> None:
        self._grammar, self._plan, self._prompt_tokens = grammar, plan, prompt_tokens
        self._guide = guide
        self._new_BT: Tensor | None = None
        self._state_BF: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        state_BF = self._state(input_ids[:, self._prompt_tokens :])
        if self._guide is not None:
            in_image_B = self._grammar.in_image(state_BF)
            starts_B = state_BF[:, SLOT] == 1
            scores = self._guide(input_ids, scores, in_image_B.tolist(), starts_B.tolist())
        return scores.masked_fill(~self._grammar.mask(state_BF), -torch.inf)

    def _state(self, new_BT: Tensor) -> Tensor:
        parents_B = self._parents(new_BT)
        if parents_B is None or self._state_BF is None:
            state_BF = self._replayed(new_BT)
        else:
            state_BF = self._grammar.advance(self._state_BF[parents_B], new_BT[:, -1])
        self._new_BT, self._state_BF = new_BT, state_BF
        return state_BF

    def _parents(self, new_BT: Tensor) -> Tensor | None:
        """For each row a row of the last call that it continues by one token; None unless all."""
        old_BT = self._new_BT
        if old_BT is None or new_BT.shape[1] != old_BT.shape[1] + 1:
            return None
        same_BB = (new_BT[:, None, :-1] == old_BT[None]).all(-1)
        return same_BB.int().argmax(1) if bool(same_BB.any(1).all()) else None

    def _replayed(self, new_BT: Tensor) -> Tensor:
        count = len(new_BT)
        state_BF = self._grammar.start(
            [self._plan.output] * count, [self._plan.images] * count, [self._plan.room] * count
        )
        for token_B in new_BT.unbind(1):
            state_BF = self._grammar.advance(state_BF, token_B)
        return state_BF


class _Guide:
    """The further branches of guided rows: opened where a picture begins, dropped at its end."""

    def __init__(self, owner: Any, plan: _Plan, attention_mask: Tensor | None) -> None:
        self._owner, self._plan, self._mask_BT = owner, plan, attention_mask
        self._branches: dict[int, dict[guidance.Branch, _Branch]] = {}

    def __call__(
        self, ids_BT: Tensor, scores_BV: Tensor, in_image: Sequence[bool], starts: Sequence[bool]
    ) -> Tensor:
        rows = list(scores_BV.unbind(0))
        for row, (inside, first) in enumerate(zip(in_image, starts, strict=True)):
            if not inside:
                self._branches.pop(row, None)
                continue
            logits: dict[guidance.Branch, Tensor] = {"full": rows[row]}
            if first:
                logits |= self._open(row, self._history(ids_BT, row))
            else:
                token = [int(ids_BT[row, -1])]
                logits |= {n: b.read(token) for n, b in self._branches[row].items()}
            rows[row] = guidance.mix(logits, self._plan.text_weight, self._plan.image_weight)
        return torch.stack(rows)

    def _open(self, row: int, history: list[int]) -> dict[guidance.Branch, Tensor]:
        vocabulary = self._owner.vocabulary
        text, image = self._plan.text_weight, self._plan.image_weight
        has_images = guidance.has_images(history, vocabulary)
        names = guidance.needed(text, image, has_images)[1:]
        self._branches[row] = {name: _Branch(self._owner) for name in names}
        return {
            name: branch.read(guidance.prompt(name, history, vocabulary, self._owner._layout))
            for name, branch in self._branches[row].items()
        }

    def _history(self, ids_BT: Tensor, row: int) -> list[int]:
        """A row without its padding."""
        ids_T = ids_BT[row]
        if self._mask_BT is None:
            return [int(token) for token in ids_T]
        prompts, prompt_tokens = self._mask_BT.shape
        # transformers repeats a prompt for each of its return sequences.
        mask_T = self._mask_BT[row // max(1, len(ids_BT) // prompts)].bool().to(ids_T.device)
        kept = torch.cat((ids_T[:prompt_tokens][mask_T], ids_T[prompt_tokens:]))
        return [int(token) for token in kept]


class _Branch:
    """One condition of one row: a cache, and the logits after the tokens read."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._cache = owner, DynamicCache(config=owner.config)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Logits [V] in fp32 of the token after these."""
        ids_BT = torch.tensor([list(tokens)], device=self._owner.device)
        outputs = self._owner(
            input_ids=ids_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return outputs.logits[0, -1].float()
