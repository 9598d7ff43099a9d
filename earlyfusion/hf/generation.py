"""`generate` with images: its modes, the grammar as a logits processor, and guidance. Grammar and
guidance are those of `earlyfusion.generation`; search and sampling are transformers'."""

# Shapes: B rows, T tokens, V vocabulary, F fields of the grammar's state.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from earlyfusion.checkpoints import lumina
from earlyfusion.errors import ContextError, PromptError, SettingError
from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import SLOT, Grammar
from earlyfusion.generation.settings import Output, SamplingParams
from earlyfusion.vocabulary import ImageLayout, Vocabulary

Mode = Literal["text-only", "image-only", "interleaved-text-image", "free"]
_OUTPUTS: dict[str, Output] = {
    "text-only": "text",
    "image-only": "image",
    "interleaved-text-image": "interleaved",
}
# The modes' names in transformers' any-to-any pipeline.
_PIPELINE_MODES = {"text": None, "image": "image-only"}


@dataclass(frozen=True)
class _Limits:
    """The limits of one call of `generate`: at most `images` images and `max_tokens` new tokens."""

    output: Output
    images: int
    max_tokens: int
    text_weight: float
    image_weight: float

    @property
    def guided(self) -> bool:
        return (self.text_weight, self.image_weight) != (1.0, 1.0)


class MultimodalGeneration:
    """`generate` of the model classes, on top of transformers' own."""

    config: Any
    generation_config: Any
    model: Any
    image_logits: bool

    @property
    def vocabulary(self) -> Vocabulary:
        """All token ids; `CheckpointError` if neither config nor folder names them."""
        vocabulary: Vocabulary = self.model.vocabulary
        return vocabulary

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one generated image, with begin and end."""
        return self.image_layout.num_tokens

    @property
    def image_layout(self) -> ImageLayout:
        """How a generated image is spelled in tokens."""
        grid = self.model.shape.vq_config.grid
        if getattr(self.config, lumina.CONFIG_KEY, None) == lumina.FAMILY:
            return lumina.layout(grid)
        return ImageLayout(grid, grid)

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
        """transformers' `generate`, with a mode that limits which tokens may be generated.

        None: all but image tokens, as in transformers' class. "text-only": text. "image-only": one
        image. "interleaved-text-image": text and at most `max_images` whole images. "free": all
        tokens. `guidance_text` and `guidance_image` are the weights of Meta's three-branch guidance
        for images (1: off). In "text-only", "image-only" and "interleaved-text-image" the returned
        ids contain the tokens of the prompt's images instead of placeholders.
        """
        SamplingParams(  # raises for an impossible value
            guidance_text=guidance_text, guidance_image=guidance_image, max_images=max_images
        )
        mode = self._mode(multimodal_generation_mode, generation_mode, generation_config)
        more = {"generation_config": generation_config, "logits_processor": logits_processor}
        parent: Any = super()
        if mode not in _OUTPUTS:
            _check_unguided(guidance_text, guidance_image)
            kwargs.setdefault("image_logits", mode == "free")
            return parent.generate(inputs, **more, **kwargs)
        ids_BT = self._prompt_ids(inputs, kwargs)
        configs = [c for c in (generation_config, self.generation_config) if c is not None]
        max_tokens = self._new_tokens(_OUTPUTS[mode], ids_BT.shape[1], kwargs, configs)
        min_tokens = _min_new_tokens(kwargs, configs, ids_BT.shape[1])
        limits = self._limits_of(
            mode, max_tokens, min_tokens, guidance_text, guidance_image, max_images
        )
        self._check_allowed(limits, kwargs, configs)
        more["logits_processor"] = self._processors(
            limits, ids_BT, kwargs, configs, logits_processor
        )
        return parent.generate(ids_BT, **more, **self._generate_kwargs(limits, configs, kwargs))

    def _sample(self, input_ids: Tensor, logits_processor: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop of greedy search and sampling, in which rows do not move."""
        grammar_processors = [p for p in logits_processor if isinstance(p, GrammarLogits)]
        parent: Any = super()
        # An assistant model samples with the processors of the model that it assists.
        for processor in grammar_processors:
            processor.begin(rows_stay=True)
        try:
            sampled = parent._sample(input_ids, logits_processor, *args, **kwargs)
            for processor in grammar_processors:
                processor.check()
            return sampled
        finally:
            for processor in grammar_processors:
                processor.begin(rows_stay=False)

    def _get_logits_processor(
        self, *args: Any, model_kwargs: Any = None, logits_processor: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers. The unconditional branch of its own guidance gets the same
        `image_logits`."""
        more = kwargs | {"model_kwargs": model_kwargs, "logits_processor": logits_processor}
        parent: Any = super()
        processors = parent._get_logits_processor(*args, **more)
        image_logits = (model_kwargs or {}).get("image_logits")
        for processor in processors:
            from_user = any(processor is other for other in logits_processor or ())
            if not from_user and isinstance(
                processor, UnbatchedClassifierFreeGuidanceLogitsProcessor
            ):
                processor.model = partial(processor.model, image_logits=image_logits)
        return processors

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers. Assistant models of other classes do not know `image_logits`."""
        if assistant_model is not None and not isinstance(assistant_model, MultimodalGeneration):
            model_kwargs = {k: v for k, v in model_kwargs.items() if k != "image_logits"}
        more = kwargs | {"model_kwargs": model_kwargs, "assistant_model": assistant_model}
        parent: Any = super()
        return parent._get_candidate_generator(*args, **more)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching. As in plain `generate`, without image tokens."""
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

    def _prompt_ids(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The prompt's ids, with the images' own tokens for the placeholders."""
        ids_BT = kwargs.pop("input_ids", inputs)
        if ids_BT is None:
            raise PromptError("a multimodal_generation_mode needs a prompt: pass input_ids")
        pixels, encoded = kwargs.pop("pixel_values", None), kwargs.pop("mm_encoder_outputs", None)
        kwargs.pop("mm_token_type_ids", None)
        if pixels is not None and encoded is not None:
            raise PromptError("give the images once: as pixel_values or as mm_encoder_outputs")
        if pixels is not None:
            return self.model.fill_image_tokens(ids_BT, pixels)
        filled: Tensor = self.model.fill_encoded(ids_BT, encoded)
        return filled

    def _limits_of(
        self,
        mode: str,
        max_tokens: int,
        min_tokens: int,
        guidance_text: float,
        guidance_image: float,
        max_images: int | None,
    ) -> _Limits:
        output, tokens = _OUTPUTS[mode], self.tokens_per_image
        default_images = 1 if output == "image" else max_tokens // tokens
        images = default_images if max_images is None else max_images
        if output == "image" and (images < 1 or max_tokens < tokens):
            raise SettingError(
                f"max_new_tokens={max_tokens} and max_images={images} leave no room for an image "
                f"of {tokens} tokens: raise them, or shorten the prompt"
            )
        if output == "image" and min_tokens > tokens and max_tokens > tokens:
            raise SettingError(
                f"at least {min_tokens} new tokens are more than an image, which has {tokens}: "
                "leave min_new_tokens and min_length out"
            )
        return _Limits(output, images, max_tokens, guidance_text, guidance_image)

    def _check_allowed(
        self, limits: _Limits, kwargs: Mapping[str, Any], configs: Sequence[Any]
    ) -> None:
        """Raise `SettingError` if an image cannot begin or continue without forbidden tokens."""
        always = {
            *_setting("suppress_tokens", kwargs, configs, ()),
            *(w[0] for w in _setting("bad_words_ids", kwargs, configs, ()) if len(w) == 1),
        }
        first = always.union(_setting("begin_suppress_tokens", kwargs, configs, ()))
        vocabulary = self.vocabulary
        if limits.output == "image" and vocabulary.begin_image in first:
            raise SettingError(
                f"suppress_tokens and bad_words_ids forbid token {vocabulary.begin_image}, which "
                "begins an image: leave it out, or set multimodal_generation_mode='text-only'"
            )
        begins = limits.images > 0 and vocabulary.begin_image not in always
        if (
            begins
            and limits.output != "text"
            and always.issuperset(vocabulary.image_tokens.tolist())
        ):
            raise SettingError(
                "suppress_tokens and bad_words_ids forbid all tokens of an image: leave some out, "
                "or set multimodal_generation_mode='text-only'"
            )

    def _new_tokens(
        self,
        output: Output,
        prompt_tokens: int,
        kwargs: Mapping[str, Any],
        configs: Sequence[Any],
    ) -> int:
        """The limit of new tokens: as requested, else one image or the rest of the context. Output
        "image" ignores limits in a generation config, which are meant for text: pipelines set one
        of 256 tokens."""
        context = self.config.max_position_embeddings
        left, max_tokens = context - prompt_tokens, _max_new_tokens(kwargs, prompt_tokens)
        if max_tokens is None and output != "image":
            limits = (_max_new_tokens(vars(config), prompt_tokens) for config in configs)
            max_tokens = next((min(limit, left) for limit in limits if limit is not None), None)
        if max_tokens is None:
            max_tokens = self.tokens_per_image if output == "image" else left
        if max_tokens < 1:
            raise SettingError(
                f"a prompt of {prompt_tokens} tokens leaves no room for a new one: raise "
                "max_length, or max_new_tokens to at least 1"
            )
        if max_tokens > left:
            raise ContextError(
                f"a prompt of {prompt_tokens} tokens and {max_tokens} new ones do not fit into the "
                f"context of {context}: shorten the prompt or set max_new_tokens"
            )
        return int(max_tokens)

    def _processors(
        self,
        limits: _Limits,
        ids_BT: Tensor,
        kwargs: Mapping[str, Any],
        configs: Sequence[Any],
        user_processors: Any,
    ) -> LogitsProcessorList:
        if limits.guided and _nonzero_setting("num_beams", kwargs, configs, 1) > 1:
            raise SettingError("guidance does not work with beams: set num_beams=1")
        if limits.guided and _is_assisted(kwargs, configs):
            raise SettingError(
                "guidance does not work with assisted generation: leave assistant_model and "
                "prompt_lookup_num_tokens out"
            )
        vocabulary = self.vocabulary
        grammar = Grammar(
            vocabulary,
            self.image_layout,
            self._stop_ids(kwargs, configs),
            self.config.vocab_size,
            ids_BT.device,
        )
        mask_BT = kwargs.get("attention_mask")
        branches = _Guidance(self, limits, mask_BT) if limits.guided else None
        grammar_processor = GrammarLogits(grammar, limits, ids_BT.shape[1], branches)
        return LogitsProcessorList([*(user_processors or []), grammar_processor])

    def _generate_kwargs(
        self, limits: _Limits, configs: Sequence[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of transformers' `generate`, with the length and the ids that end a row."""
        kwargs.pop("max_length", None)
        # Without an end token a reply would only end at its maximum length.
        for name, default in (("eos_token_id", "eos"), ("pad_token_id", "pad")):
            known = [i for c in configs if (i := getattr(c, name)) is not None]
            if getattr(configs[0], name) is None:
                kwargs.setdefault(name, known[0] if known else getattr(self.vocabulary, default))
        return kwargs | {"max_new_tokens": limits.max_tokens, "image_logits": True}

    def _stop_ids(self, kwargs: Mapping[str, Any], configs: Sequence[Any]) -> list[int]:
        in_configs = (c.eos_token_id for c in configs if c.eos_token_id is not None)
        ids = kwargs.get("eos_token_id", next(in_configs, None))
        return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def _max_new_tokens(settings: Mapping[str, Any], prompt_tokens: int) -> int | None:
    """The limit of new tokens in these settings of transformers; None without a limit."""
    if settings.get("max_new_tokens") is not None:
        return int(settings["max_new_tokens"])
    if settings.get("max_length") is not None:
        return int(settings["max_length"]) - prompt_tokens
    return None


def _min_new_tokens(kwargs: Mapping[str, Any], configs: Sequence[Any], prompt_tokens: int) -> int:
    """The minimum number of new tokens in the settings of transformers."""
    min_new_tokens = _nonzero_setting("min_new_tokens", kwargs, configs, 0)
    min_length = _nonzero_setting("min_length", kwargs, configs, 0)
    return int(max(min_new_tokens, min_length - prompt_tokens))


def _is_assisted(kwargs: Mapping[str, Any], configs: Sequence[Any]) -> bool:
    lookup = _nonzero_setting("prompt_lookup_num_tokens", kwargs, configs, 0)
    return kwargs.get("assistant_model") is not None or bool(lookup)


def _setting(name: str, kwargs: Mapping[str, Any], configs: Sequence[Any], default: Any) -> Any:
    """A setting of transformers: from the call's arguments, or the first config that sets it."""
    values = _setting_values(name, kwargs, configs)
    return next((value for value in values if value is not None), default)


def _nonzero_setting(
    name: str, kwargs: Mapping[str, Any], configs: Sequence[Any], default: int
) -> Any:
    """As `_setting`, for numbers of which 0 means that it is not set."""
    return next((value for value in _setting_values(name, kwargs, configs) if value), default)


def _setting_values(name: str, kwargs: Mapping[str, Any], configs: Sequence[Any]) -> list[Any]:
    return [kwargs.get(name), *(getattr(config, name) for config in configs)]


def _check_unguided(text: float, image: float) -> None:
    if (text, image) != (1.0, 1.0):
        raise SettingError(
            f"guidance_text={text} and guidance_image={image} need a mode with images: set "
            "multimodal_generation_mode to 'image-only' or 'interleaved-text-image'"
        )


class GrammarLogits(LogitsProcessor):
    """Forbids the tokens that the grammar does not allow next. A token that the grammar forces is
    generated even if other processors forbid it.

    Keeps the state of each row after the last call. Beam search may reorder and repeat rows, and
    assisted generation goes back, so each row is matched with the row of the last call that it
    continues, for which the host waits. After `begin(rows_stay=True)` rows must keep their order,
    and nothing is matched.
    """

    def __init__(
        self,
        grammar: Grammar,
        limits: _Limits,
        prompt_tokens: int,
        branches: _Guidance | None = None,
    ) -> None:
        self._grammar, self._limits, self._prompt_tokens = grammar, limits, prompt_tokens
        self._guidance = branches
        self.begin(rows_stay=False)

    def begin(self, rows_stay: bool) -> None:
        """Forget the states of the last call."""
        self._rows_stay = rows_stay
        self._stuck: Tensor | None = None  # whether any row was left without a possible token
        self._new_BT: Tensor | None = None
        self._state_BF: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        state_BF = self._state(input_ids[:, self._prompt_tokens :])
        if self._guidance is not None:
            in_image_B = self._grammar.in_image(state_BF)
            starts_B = state_BF[:, SLOT] == 1  # the last token began an image
            # One tensor, so that the host waits for the device once.
            in_image, starts = torch.stack((in_image_B, starts_B)).tolist()
            scores = self._guidance(input_ids, scores, in_image, starts)
        return self._masked(scores, state_BF)

    def check(self) -> None:
        """Raise `SettingError` if other processors left a row without a possible token."""
        if self._stuck is not None and bool(self._stuck):  # the only wait, for all tokens
            raise SettingError(
                "suppress_tokens, bad_words_ids, prefix_allowed_tokens_fn or a logits_processor "
                f"left no token that {self._limits.output} output may hold: allow at least one"
            )

    def _masked(self, scores_BV: Tensor, state_BF: Tensor) -> Tensor:
        allowed_BV = self._grammar.mask(state_BF)
        scores_BV = scores_BV.masked_fill(~allowed_BV, -torch.inf)
        none_left_B = scores_BV.isneginf().all(-1)
        forced_B = (allowed_BV.sum(-1) == 1) | self._grammar.done(state_BF)
        stuck = (none_left_B & ~forced_B).any()
        self._stuck = stuck if self._stuck is None else self._stuck | stuck
        return scores_BV.masked_fill((none_left_B & forced_B)[:, None] & allowed_BV, 0.0)

    def _state(self, new_BT: Tensor) -> Tensor:
        before_BF = self._states_before(new_BT)
        if before_BF is None:
            state_BF = self._replay(new_BT)
        else:
            state_BF = self._grammar.advance(before_BF, new_BT[:, -1])
        self._new_BT, self._state_BF = new_BT, state_BF
        return state_BF

    def _states_before(self, new_BT: Tensor) -> Tensor | None:
        """The states of all rows before their last token; None if they must be computed again."""
        if self._state_BF is None:
            return None
        if self._rows_stay:
            return self._state_BF
        parents_B = self._parents(new_BT)
        return None if parents_B is None else self._state_BF[parents_B]

    def _parents(self, new_BT: Tensor) -> Tensor | None:
        """For each row, the row of the last call that it continues by one token; None if any
        row continues none."""
        old_BT = self._new_BT
        if old_BT is None or new_BT.shape[1] != old_BT.shape[1] + 1:
            return None
        same_BB = (new_BT[:, None, :-1] == old_BT[None]).all(-1)
        return same_BB.int().argmax(1) if bool(same_BB.any(1).all()) else None

    def _replay(self, new_BT: Tensor) -> Tensor:
        """The states after all new tokens, computed from the start."""
        count = len(new_BT)
        state_BF = self._grammar.start(
            [self._limits.output] * count,
            [self._limits.images] * count,
            [self._limits.max_tokens] * count,
        )
        for token_B in new_BT.unbind(1):
            state_BF = self._grammar.advance(state_BF, token_B)
        return state_BF


class _Guidance:
    """Guides images: computes the logits of the other conditions, whose prompts are read when an
    image begins and whose caches are dropped when it ends."""

    def __init__(self, owner: Any, limits: _Limits, attention_mask: Tensor | None) -> None:
        self._owner, self._limits, self._mask_BT = owner, limits, attention_mask
        self._branches: dict[int, dict[guidance.Condition, _Branch]] = {}

    def __call__(
        self, ids_BT: Tensor, scores_BV: Tensor, in_image: Sequence[bool], starts: Sequence[bool]
    ) -> Tensor:
        rows = list(scores_BV.unbind(0))
        for row, (inside, first) in enumerate(zip(in_image, starts, strict=True)):
            if not inside:
                self._branches.pop(row, None)
                continue
            logits: dict[guidance.Condition, Tensor] = {"full": rows[row]}
            if first:
                logits |= self._open(row, self._history(ids_BT, row), ids_BT.device)
            else:
                last_1T = ids_BT[row, None, -1:]
                logits |= {n: b.read(last_1T) for n, b in self._branches[row].items()}
            rows[row] = guidance.combine_needed(
                logits, self._limits.text_weight, self._limits.image_weight
            )
        return torch.stack(rows)

    def _open(
        self, row: int, history: list[int], device: torch.device
    ) -> dict[guidance.Condition, Tensor]:
        vocabulary = self._owner.vocabulary
        text, image = self._limits.text_weight, self._limits.image_weight
        has_images = guidance.has_images(history, vocabulary)
        names = guidance.needed_conditions(text, image, has_images)[1:]  # "full" is the row itself
        self._branches[row] = {name: _Branch(self._owner) for name in names}
        prompts = {
            name: guidance.condition_prompt(name, history, vocabulary, self._owner.image_layout)
            for name in names
        }
        return {
            name: branch.read(torch.tensor([list(prompts[name])], device=device))
            for name, branch in self._branches[row].items()
        }

    def _history(self, ids_BT: Tensor, row: int) -> list[int]:
        """The ids of a row, without padding."""
        ids_T = ids_BT[row]
        if self._mask_BT is None:
            return list(ids_T.tolist())
        prompts, prompt_tokens = self._mask_BT.shape
        # transformers repeats a prompt for each return sequence.
        mask_T = self._mask_BT[row // max(1, len(ids_BT) // prompts)].bool().to(ids_T.device)
        without_padding = torch.cat((ids_T[:prompt_tokens][mask_T], ids_T[prompt_tokens:]))
        return list(without_padding.tolist())


class _Branch:
    """A condition of one row and its cache."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._cache = owner, DynamicCache(config=owner.config)

    def read(self, ids_1T: Tensor) -> Tensor:
        """Append these tokens to the cache; the logits [V] of the next token, in fp32."""
        outputs = self._owner(
            input_ids=ids_1T,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return outputs.logits[0, -1].float()
