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
        """transformers' `generate`, in a mode that says what may be generated.

        None: any token but an image's, as in transformers' own class. "text-only": text until it
        ends. "image-only": one image. "interleaved-text-image": text and at most `max_images`
        whole images. "free": any token. `guidance_text` and `guidance_image` are the weights of
        Meta's three-branch guidance for images; 1 is off. In "text-only", "image-only" and
        "interleaved-text-image" the prompt is returned with its images' own tokens in place of
        placeholders.
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
        fewest = _fewest_new(kwargs, configs, ids_BT.shape[1])
        limits = self._limits_of(
            mode, max_tokens, fewest, guidance_text, guidance_image, max_images
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
        """As in transformers; the other branch of its own guidance has the same logits."""
        more = kwargs | {"model_kwargs": model_kwargs, "logits_processor": logits_processor}
        parent: Any = super()
        processors = parent._get_logits_processor(*args, **more)
        image_logits = (model_kwargs or {}).get("image_logits")
        for processor in processors:
            is_own = not any(processor is given for given in logits_processor or ())
            if is_own and isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(processor.model, image_logits=image_logits)
        return processors

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; an assistant model of another class has no image logits to choose."""
        if assistant_model is not None and not isinstance(assistant_model, MultimodalGeneration):
            model_kwargs = {k: v for k, v in model_kwargs.items() if k != "image_logits"}
        more = kwargs | {"model_kwargs": model_kwargs, "assistant_model": assistant_model}
        parent: Any = super()
        return parent._get_candidate_generator(*args, **more)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching; as in plain `generate`, without image tokens."""
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
        fewest: int,
        text: float,
        image: float,
        max_images: int | None,
    ) -> _Limits:
        output, tokens = _OUTPUTS[mode], self.tokens_per_image
        most = 1 if output == "image" else max_tokens // tokens
        images = most if max_images is None else max_images
        if output == "image" and (images < 1 or max_tokens < tokens):
            raise SettingError(
                f"max_new_tokens={max_tokens} and max_images={images} leave no room for an image "
                f"of {tokens} tokens: raise them, or shorten the prompt"
            )
        if output == "image" and fewest > tokens and max_tokens > tokens:
            raise SettingError(
                f"at least {fewest} new tokens are more than an image, which has {tokens}: leave "
                "min_new_tokens and min_length out"
            )
        return _Limits(output, images, max_tokens, text, image)

    def _check_allowed(
        self, limits: _Limits, kwargs: Mapping[str, Any], configs: Sequence[Any]
    ) -> None:
        """Raise `SettingError` if an image could not begin or go on."""
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
        """The number of new tokens: as requested, else one image or the whole context. Limits of
        a generation config are meant for replies with text: pipelines set one of 256 tokens."""
        limit = self.config.max_position_embeddings
        left, max_tokens = limit - prompt_tokens, _most_new(kwargs, prompt_tokens)
        if max_tokens is None and output != "image":
            most = (_most_new(vars(config), prompt_tokens) for config in configs)
            max_tokens = next((min(number, left) for number in most if number is not None), None)
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
                f"context of {limit}: shorten the prompt or set max_new_tokens"
            )
        return int(max_tokens)

    def _processors(
        self,
        limits: _Limits,
        ids_BT: Tensor,
        kwargs: Mapping[str, Any],
        configs: Sequence[Any],
        given: Any,
    ) -> LogitsProcessorList:
        beams = kwargs.get("num_beams") or next((c.num_beams for c in configs if c.num_beams), 1)
        if limits.guided and beams > 1:
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
        return LogitsProcessorList([*(given or []), grammar_processor])

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
        known = (c.eos_token_id for c in configs if c.eos_token_id is not None)
        given = kwargs.get("eos_token_id", next(known, None))
        return [] if given is None else torch.as_tensor(given).flatten().tolist()


def _most_new(settings: Mapping[str, Any], prompt_tokens: int) -> int | None:
    """The most new tokens that these settings of transformers allow; None without a limit."""
    if settings.get("max_new_tokens") is not None:
        return int(settings["max_new_tokens"])
    if settings.get("max_length") is not None:
        return int(settings["max_length"]) - prompt_tokens
    return None


def _fewest_new(settings: Mapping[str, Any], configs: Sequence[Any], prompt_tokens: int) -> int:
    """The fewest new tokens that these settings of transformers ask for."""
    both = (
        settings.get(name) or next((v for c in configs if (v := getattr(c, name))), 0)
        for name in ("min_new_tokens", "min_length")
    )
    new, length = both
    return int(max(new, length - prompt_tokens))


def _setting(name: str, kwargs: Mapping[str, Any], configs: Sequence[Any], default: Any) -> Any:
    """A setting of transformers: of the call, or else of the first config that has it."""
    values = (kwargs.get(name), *(getattr(config, name) for config in configs))
    return next((value for value in values if value is not None), default)


def _is_assisted(kwargs: Mapping[str, Any], configs: Sequence[Any]) -> bool:
    lookups = (
        kwargs.get("prompt_lookup_num_tokens"),
        *(c.prompt_lookup_num_tokens for c in configs),
    )
    return kwargs.get("assistant_model") is not None or any(lookups)


def _check_unguided(text: float, image: float) -> None:
    if (text, image) != (1.0, 1.0):
        raise SettingError(
            f"guidance_text={text} and guidance_image={image} need a mode with images: set "
            "multimodal_generation_mode to 'image-only' or 'interleaved-text-image'"
        )


class GrammarLogits(LogitsProcessor):
    """Forbids the tokens that the grammar does not allow after those generated so far. A token that
    the grammar forces comes even if other processors forbid it. Keeps the rows' states of the last
    call. Beams may reorder and repeat rows, and other searches go back, so each row looks for the
    one that it continues, for which the host waits. Between `begin` with `rows_stay` and the next
    `begin`, rows never move."""

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
        """Forget the rows of the last call."""
        self._rows_stay = rows_stay
        self._stuck: Tensor | None = None  # whether a row had no possible token
        self._new_BT: Tensor | None = None
        self._state_BF: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        state_BF = self._state(input_ids[:, self._prompt_tokens :])
        if self._guidance is not None:
            in_image_B = self._grammar.in_image(state_BF)
            starts_B = state_BF[:, SLOT] == 1  # the last token began an image
            in_image, starts = torch.stack(
                (in_image_B, starts_B)
            ).tolist()  # one wait for the device
            scores = self._guidance(input_ids, scores, in_image, starts)
        return self._masked(scores, state_BF)

    def check(self) -> None:
        """Raise `SettingError` if other processors left a row without a possible token."""
        if self._stuck is not None and bool(self._stuck):  # one wait for all tokens
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
        """The states of all rows before their last token; None if they are not known."""
        if self._state_BF is None:
            return None
        if self._rows_stay:
            return self._state_BF
        parents_B = self._parents(new_BT)
        return None if parents_B is None else self._state_BF[parents_B]

    def _parents(self, new_BT: Tensor) -> Tensor | None:
        """The row of the last call that each row continues by one token; None unless
        all have one."""
        old_BT = self._new_BT
        if old_BT is None or new_BT.shape[1] != old_BT.shape[1] + 1:
            return None
        same_BB = (new_BT[:, None, :-1] == old_BT[None]).all(-1)
        return same_BB.int().argmax(1) if bool(same_BB.any(1).all()) else None

    def _replay(self, new_BT: Tensor) -> Tensor:
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
    """The other conditions of guided rows: prefilled when an image begins, dropped at its end."""

    def __init__(self, owner: Any, limits: _Limits, attention_mask: Tensor | None) -> None:
        self._owner, self._limits, self._mask_BT = owner, limits, attention_mask
        self._branches: dict[int, dict[guidance.Condition, _Branch]] = {}

    def __call__(
        self, ids_BT: Tensor, scores_BV: Tensor, in_image: Sequence[bool], starts: Sequence[bool]
    ) -> Tensor:
        rows = list(scores_BV.unbind(0))
        for row, (inside, first) in enumerate(zip(in_image, starts, strict=True)):
            if not inside:  # guidance only affects images
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
        """A row without its padding."""
        ids_T = ids_BT[row]
        if self._mask_BT is None:
            return list(ids_T.tolist())
        prompts, prompt_tokens = self._mask_BT.shape
        # transformers repeats a prompt for each return sequence.
        mask_T = self._mask_BT[row // max(1, len(ids_BT) // prompts)].bool().to(ids_T.device)
        without_padding = torch.cat((ids_T[:prompt_tokens][mask_T], ids_T[prompt_tokens:]))
        return list(without_padding.tolist())


class _Branch:
    """One condition of one row, with its own cache."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._cache = owner, DynamicCache(config=owner.config)

    def read(self, ids_1T: Tensor) -> Tensor:
        """Logits [V] in fp32 for the token after these."""
        outputs = self._owner(
            input_ids=ids_1T,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return outputs.logits[0, -1].float()
