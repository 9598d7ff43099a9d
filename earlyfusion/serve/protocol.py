"""Request bodies: OpenAI's fields and this server's additions, checked strictly.

Every field is applied, refused with its name, limit and remedy, or listed here as accepted without
effect (`user`, `metadata`, `detail` and the like). OpenAI's fields that this server does not have
are accepted with values that change nothing (`neutral`), as some clients always send them;
`why_not` is the error for any other value. `unused` are lists that a model may ignore, such as
tools: they are dropped, and a header of the reply names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from earlyfusion.serve.errors import ApiError

Format: TypeAlias = Literal["png", "webp", "jpeg"]
Modality: TypeAlias = Literal["text", "image"]
MAX_CHOICES = 10
MAX_ITEMS = 10_000  # of a list: checking a longer one would block the event loop
MAX_VALUES = 50_000  # of a body: pydantic's error about one value takes a kilobyte
MAX_CHARACTERS = 100_000  # of a text to tokenize, during which no other thread runs


class StrictModel(BaseModel):
    """A JSON object without unknown fields, and without conversions between types. The module's
    docstring explains the class variables; `max_values` limits the values of a whole body."""

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    why_not: ClassVar[Mapping[str, str]] = {}
    unused: ClassVar[Sequence[str]] = ()
    max_values: ClassVar[int] = MAX_VALUES

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A field that is null counts as not set, whatever its name."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def _text_or_list_tag(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<list>"


_TextOrList = Discriminator(_text_or_list_tag)
_Strings = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_ITEMS), Tag("<list>")],
    _TextOrList,
]


def _check_compression(output_format: Format, compression: int) -> None:
    if output_format == "png" and compression != 100:
        raise ValueError("output_compression needs output_format: webp or jpeg")


class Sampling(StrictModel):
    """Fields of `SamplingParams`, which checks their values. A route that generates text has those
    of `TextSampling`, one that generates images those of `ImageSampling`."""

    seed: int | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that are set, without the seed."""
        kinds = (kind for kind in (TextSampling, ImageSampling) if isinstance(self, kind))
        names = {name for kind in kinds for name in kind.model_fields} - {"seed"}
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class ImageSampling(Sampling):
    image_temperature: float | None = None
    image_top_p: float | None = None
    image_top_k: int | None = None
    guidance_text: float | None = None
    guidance_image: float | None = None
    jacobi: int | None = None
    negative_prompt: str | None = None


# --- Constraints on the text of a reply ---


class PlainText(StrictModel):
    type: Literal["text"]


class AnyObject(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]

    def fields(self) -> dict[str, Any]:
        return {"json_schema": {"type": "object"}}


class Schema(StrictModel):
    """`name`, `description` and `strict` have no effect: a reply always fits its schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    def fields(self) -> dict[str, Any]:
        return {"json_schema": self.schema_}


class NamedSchema(StrictModel):
    """A schema in a chat's `response_format`."""

    type: Literal["json_schema"]
    json_schema: Schema

    def fields(self) -> dict[str, Any]:
        return self.json_schema.fields()


class FlatSchema(Schema):
    """A schema in the `text.format` of /v1/responses."""

    type: Literal["json_schema"]


class Pattern(StrictModel):
    type: Literal["regex"]
    pattern: str

    def fields(self) -> dict[str, Any]:
        return {"regex": self.pattern}


class LarkGrammar(StrictModel):
    type: Literal["grammar"]
    grammar: str

    def fields(self) -> dict[str, Any]:
        return {"grammar": self.grammar}


def _discriminator(key: str) -> Any:
    """A discriminator by the field `key`. Its tags are in <>, unlike names of fields (see
    `_path`)."""

    def tag(value: Any) -> str:
        tag_value = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return f"<{tag_value}>"

    return Discriminator(tag, custom_error_type="unknown_type", custom_error_message="is unknown")


ChatFormat = Annotated[
    Annotated[PlainText, Tag("<text>")]
    | Annotated[AnyObject, Tag("<json_object>")]
    | Annotated[NamedSchema, Tag("<json_schema>")]
    | Annotated[Pattern, Tag("<regex>")]
    | Annotated[LarkGrammar, Tag("<grammar>")],
    _discriminator("type"),
]
ResponseFormat = Annotated[
    Annotated[PlainText, Tag("<text>")]
    | Annotated[AnyObject, Tag("<json_object>")]
    | Annotated[FlatSchema, Tag("<json_schema>")]
    | Annotated[Pattern, Tag("<regex>")]
    | Annotated[LarkGrammar, Tag("<grammar>")],
    _discriminator("type"),
]
TextConstraint: TypeAlias = AnyObject | NamedSchema | FlatSchema | Pattern | LarkGrammar


class TextSampling(Sampling):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    prompt_lookup: int | None = None
    max_images: int | None = None
    stop: _Strings | None = None
    bad_words: list[str] | None = None
    allowed_words: list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | self._constraint_fields()

    def _text_format(self) -> PlainText | TextConstraint | None:
        """The field that constrains the text, if any."""
        return None

    def _constraint_fields(self) -> dict[str, Any]:
        constraint = self._text_format()
        if constraint is None or isinstance(constraint, PlainText):
            return {}
        return constraint.fields()


class IgnoredFields(StrictModel):
    """Fields of every route that generates; they are accepted without effect."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# --- Chat completions ---


class ImageUrl(StrictModel):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(StrictModel):
    """A part of a message. `prompt_cache_breakpoint` has no effect: shared prefixes are found
    without it."""

    prompt_cache_breakpoint: dict[str, Any] | None = None


class TextPart(Part):
    type: Literal["text"]
    text: str


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageUrl
    index: int | None = None


class FileId(StrictModel):
    file_id: str


class FilePart(Part):
    type: Literal["file"]
    file: FileId


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[FilePart, Tag("<file>")],
    _discriminator("type"),
]
Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ContentPart], Field(max_length=MAX_ITEMS), Tag("<list>")],
    _TextOrList,
]


class ImageRef(StrictModel):
    type: Literal["image_ref"]
    index: int


OrderedPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImageRef, Tag("<image_ref>")],
    _discriminator("type"),
]


class ChatMessage(StrictModel):
    """A turn. `images` and `parts` are those of an earlier reply, as this server and OpenRouter
    send them; the other fields of OpenAI's assistant turns must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    images: list[ImagePart] | None = None
    parts: list[OrderedPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


_NO_TOOLS = "this model calls no tools: leave it out"
_NO_CHOICE = "this model calls no tools: use auto or none, or leave it out"
_CHAT_NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
}
_CHAT_WHY_NOT = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_CHOICE,
    "functions": _NO_TOOLS,
    "function_call": _NO_CHOICE,
    "frequency_penalty": "only 0 is possible: use repetition_penalty",
    "presence_penalty": "only 0 is possible: use repetition_penalty",
    "logit_bias": "only {} is possible: use bad_words or allowed_words",
    "ignore_eos": "only false is possible: a reply ends where the model ends it",
    "min_tokens": "only 0 is possible: a reply ends where the model ends it",
    "structured_outputs": "use response_format, with the type json_schema, regex or grammar",
    "reasoning_effort": "this model does not reason: use none, or leave it out",
    "audio": "this model has text and images only: leave it out",
    "verbosity": "only medium is possible: say in the prompt how long the reply should be",
    "prompt_cache_retention": "only in_memory is possible: prefixes stay while there is room",
    "prompt_cache_options": 'only {"mode": "implicit"} is possible: prefixes that prompts share '
    "are found by themselves, and stay while there is room",
    "prediction": "predicted texts are not used: leave it out, or use prompt_lookup",
    "web_search_options": "this model cannot search: leave it out",
    "moderation": "nothing is moderated: leave it out",
    "service_tier": "only auto and default are possible: requests run in order of arrival",
    "store": "nothing is stored: use false, or /v1/responses",
    "size": "size is a field of /v1/images/generations: leave it out here",
}


class ChatRequest(TextSampling, ImageSampling, IgnoredFields):
    """/v1/chat/completions."""

    neutral = _CHAT_NEUTRAL
    why_not = _CHAT_WHY_NOT
    # Open WebUI always sends some. With tool_choice "auto", the default, a model need not call any,
    # and this one never does.
    unused = ("tools", "functions")

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_ITEMS)]
    model: str | None = None
    modalities: Annotated[list[Modality], Field(min_length=1)] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ChatFormat | None = None
    image_delivery: Literal["images", "markdown", "both"] | None = None
    output_format: Format = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true")
        _check_compression(self.output_format, self.output_compression)
        return self

    def _text_format(self) -> PlainText | TextConstraint | None:
        return self.response_format


# --- Completions ---


class CompletionRequest(TextSampling, IgnoredFields):
    """/v1/completions: each prompt is a user's turn, which is answered with text."""

    neutral = _CHAT_NEUTRAL | {"suffix": ("",), "echo": (False,), "best_of": (1,)}
    why_not = _CHAT_WHY_NOT | {
        "suffix": "the model writes forward only: leave it out",
        "echo": "only false is possible: put the prompt before the text yourself",
        "best_of": "only 1 is possible: use n, and choose",
        **dict.fromkeys(
            set(ImageSampling.model_fields) - {"seed"},
            "this route generates text only: use /v1/chat/completions, or leave it out",
        ),
    }

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[Annotated[list[str], Field(min_length=1, max_length=MAX_ITEMS)], Tag("<list>")],
        _TextOrList,
    ]
    model: str | None = None
    max_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_images: Literal[0] | None = None
    response_format: ChatFormat | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def _text_format(self) -> PlainText | TextConstraint | None:
        return self.response_format


# --- Images ---


class ImageOptions(ImageSampling, IgnoredFields):
    """The fields that generations, edits and variations share."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "quality": ("auto",),
        "background": ("auto", "opaque"),
        "moderation": ("auto", "low"),
        "input_fidelity": ("low",),
    }
    why_not: ClassVar[Mapping[str, str]] = {
        "quality": "only auto is possible: the model has one quality",
        "background": "only auto and opaque are possible: images are not transparent",
        "style": "the model knows no styles by name: say it in the prompt",
        "mask": "a part of an image cannot be masked: say in the prompt what to change",
        "markup": "an image cannot be marked: say in the prompt what to change",
        "input_fidelity": "only low is possible: an image is read as its codes",
        "moderation": "only auto and low are possible: nothing is moderated",
        "complexity": "the model has one style: leave it out",
        "frame_count": "images do not move: leave it out",
        "frame_duration_ms": "images do not move: leave it out",
        "svg": "images are png, webp or jpeg: leave it out",
        **dict.fromkeys(
            set(TextSampling.model_fields) - {"seed"},
            "this route generates no text: leave it out",
        ),
        **{
            name: f"this route generates no text: use image_{name}, or leave it out"
            for name in ("temperature", "top_p", "top_k")
        },
    }

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    size: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Format = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0

    @model_validator(mode="after")
    def _check_stream(self) -> ImageOptions:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: only b64_json is possible in a stream")
        _check_compression(self.output_format, self.output_compression)
        return self


class GenerationRequest(ImageOptions):
    """/v1/images/generations."""

    prompt: str

    @model_validator(mode="after")
    def _check_guidance(self) -> GenerationRequest:
        if self.guidance_image not in (None, 1):
            raise ValueError(
                "guidance_image needs an image in the prompt: leave it out, or use /v1/images/edits"
            )
        return self


class EditRequest(ImageOptions):
    """/v1/images/edits. A JSON body has its images in `images`, a form has them as files."""

    prompt: str
    images: list[EditImage] | None = None


class EditImage(StrictModel):
    image_url: str | None = None
    file_id: str | None = None


class VariationRequest(ImageOptions):
    """/v1/images/variations. `prompt`, an addition to OpenAI's fields, is the text that follows the
    image."""

    prompt: str = "Draw the same thing again."


# --- Responses ---


class InputText(Part):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputImage(Part):
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


_InputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputText, Tag("<output_text>")]
    | Annotated[InputText, Tag("<text>")]
    | Annotated[InputImage, Tag("<input_image>")],
    _discriminator("type"),
]
_InputContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[_InputPart], Field(max_length=MAX_ITEMS), Tag("<list>")],
    _TextOrList,
]


class ItemReference(StrictModel):
    """An item of an earlier reply, by its id."""

    type: Literal["item_reference"]
    id: str


class InputMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: _InputContent
    type: Literal["message"] = "message"
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None


class InputImageCall(StrictModel):
    """An image of an earlier reply: by its id, or by its pixels."""

    type: Literal["image_generation_call"]
    id: str
    result: str | None = None
    status: str | None = None
    action: str | None = None
    background: str | None = None
    output_format: str | None = None
    quality: str | None = None
    revised_prompt: str | None = None
    size: str | None = None
    error: None = None
    svg_usage: None = None


def _item_type(value: Any) -> str:
    item_type = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{item_type or 'message'}>"


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputImageCall, Tag("<image_generation_call>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    Discriminator(_item_type, custom_error_type="unknown_type", custom_error_message="is unknown"),
]


def _check_tool_type(value: Any) -> Any:
    if isinstance(value, str) and value != "image_generation":
        why = "this model calls no tools but image_generation: leave it out"
        raise PydanticCustomError("other_tool", why)
    return value


_ImageToolType = Annotated[Literal["image_generation"], BeforeValidator(_check_tool_type)]


class ImageTool(StrictModel):
    """The tool that allows images in a reply."""

    type: _ImageToolType
    model: str | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    size: str | None = None
    output_format: Format = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    action: Literal["auto"] | None = None
    input_fidelity: Literal["low"] | None = None

    @model_validator(mode="after")
    def _check_output(self) -> ImageTool:
        _check_compression(self.output_format, self.output_compression)
        return self


class ToolName(StrictModel):
    type: _ImageToolType


class TextFormat(StrictModel):
    format: ResponseFormat | None = None
    verbosity: Literal["medium"] | None = None


class PlainStreamOptions(StrictModel):
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(TextSampling, ImageSampling, IgnoredFields):
    """/v1/responses. The reply may hold images if `tools` has image_generation."""

    neutral = _CHAT_NEUTRAL | {
        "truncation": ("disabled",),
        "background": (False,),
        "include": ([],),
        "context_management": ([],),
        "reasoning": ({}, {"effort": "none"}),
    }
    why_not = _CHAT_WHY_NOT | {
        "truncation": "only disabled is possible: shorten the input yourself",
        "background": "only false is possible: use stream",
        "reasoning": "this model does not reason: leave it out, or ask for the effort none",
        "background_options": "nothing runs in the background: use stream",
        "context_management": "only [] is possible: shorten the input yourself",
        "conversation": "it is not offered: use previous_response_id",
        "prompt": "prompts are not stored here: send the text as input",
        "max_tool_calls": "it is not offered: use max_images",
        "image": "use the fields of the tool image_generation",
        "access_programs": "there are none here: leave it out",
        "include": 'only "message.output_text.logprobs" can be included: leave others out',
    }

    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[InputItem], Field(max_length=MAX_ITEMS), Tag("<list>")],
        _TextOrList,
    ]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    max_output_tokens: int | None = None
    stream: bool = False
    stream_options: PlainStreamOptions | None = None
    tools: Annotated[list[ImageTool], Field(max_length=1)] = []
    tool_choice: Annotated[
        Annotated[Literal["auto", "none", "required"], Tag("<text>")]
        | Annotated[ToolName, Tag("<list>")],
        _TextOrList,
    ] = "auto"
    text: TextFormat | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ResponseRequest:
        if self.tool_choice not in ("auto", "none") and not self.tools:
            raise ValueError(
                'tool_choice asks for a tool: give tools [{"type": "image_generation"}]'
            )
        return self

    def _text_format(self) -> PlainText | TextConstraint | None:
        return None if self.text is None else self.text.format


# --- Tokens ---


class TokenizeRequest(StrictModel):
    """/tokenize: the tokens of a text, or of the whole prompt made of messages."""

    neutral = {"add_special_tokens": (False,), "add_generation_prompt": (True,)}  # of vLLM
    why_not = {
        "add_special_tokens": "only false is possible: the prompt of messages has them all",
        "add_generation_prompt": "only true is possible: end the messages with the user's",
    }

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MAX_ITEMS)] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_prompt(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(StrictModel):
    """/detokenize."""

    max_values = 1_000_010

    model: str | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1_000_000, fail_fast=True)
    ]


EditRequest.model_rebuild()

AnyRequest = TypeVar("AnyRequest", bound=StrictModel)


def read(
    model: type[AnyRequest], data: Any, lenient: bool = False, text: bool = False
) -> tuple[AnyRequest, list[str]]:
    """The request in a JSON value, and the paths of dropped fields: those in `unused`, and with
    `lenient` unknown ones. With `text`, numbers are given as text, as in a form. Raises `ApiError`
    with status 400."""
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object: send one", code="invalid_json")
    _check_size(data, model.max_values)
    fields = {name: value for name, value in data.items() if not _is_neutral(model, name, value)}
    ignored = [name for name in model.unused if isinstance(fields.get(name), list)]
    for name in ignored:
        del fields[name]
    while True:
        try:
            return model.model_validate(fields, strict=not text), ignored
        except ValidationError as error:
            wrong = [_with_name(e, fields) for e in error.errors(include_url=False)]
            unknown = [e["loc"] for e in wrong if e["type"] == "extra_forbidden"]
            # Check the rest again without the unknown fields: its errors still count.
            if not (lenient and unknown):
                raise _to_api_error(model, wrong[0], data) from None
            for path in unknown:
                ignored.append(_remove(fields, path))


def _check_size(data: Any, limit: int) -> None:
    """Raise `ApiError` for JSON with more than `limit` values, at any depth."""
    count, containers = 0, [data]
    while containers:
        container = containers.pop()
        values = container.values() if isinstance(container, dict) else container
        count += len(values)
        if count > limit:
            raise ApiError(
                400,
                f"the body has over {limit:,} values, the limit: "
                "send fewer fields or shorter lists",
                code="invalid_value",
            )
        containers += [value for value in values if isinstance(value, dict | list)]


def _is_neutral(model: type[StrictModel], name: str, value: Any) -> bool:
    """Whether a field that the model does not have has a value that changes nothing."""
    if value is None:
        return True
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if inner is not None}
    # 0 == False in Python, but not in JSON.
    neutral = [
        v for v in model.neutral.get(name, ()) if isinstance(v, bool) == isinstance(value, bool)
    ]
    return name not in model.model_fields and value in neutral


def _with_name(error: ErrorDetails, data: Any) -> ErrorDetails:
    """The error, with the path of the field. pydantic cannot read a name with a lone surrogate and
    reports the object that holds it. No field has such a name, so the field is unknown."""
    value = data
    for step in error["loc"]:
        value = _enter(value, step)
    if error["type"] == "string_unicode" and isinstance(value, dict):
        return {**error, "type": "extra_forbidden", "loc": (*error["loc"], error["input"])}
    return error


def _to_api_error(model: type[StrictModel], first: ErrorDetails, data: Any) -> ApiError:
    path, code = _path(data, first["loc"]), "invalid_value"
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        code, message = "unknown_field", _unknown_field(model, first["loc"], path)
    elif first["type"] == "missing":
        message = f"{path} is missing: give it"
    elif first["type"] == "unknown_type":
        message = f"{path} has the type {_display(first['input'])}, which is unknown on this route"
    elif first["type"] in ("dict_type", "model_type", "model_attributes_type"):
        message = f"{path}={_display(first['input'])} is not possible: send an object"
    elif first["type"] == "too_short":  # the minimum is always 1
        message = f"{path} is empty: give at least one item"
    elif first["type"] == "too_long":
        limit = first["ctx"]["max_length"]
        if limit:
            plural = "s" if limit > 1 else ""
            message = f"{path} has over {limit:,} item{plural}, the limit: leave some out"
        else:
            message = f"{path} is not empty: leave it out"
    elif first["type"] == "string_too_long":
        count, limit = len(first["input"]), first["ctx"]["max_length"]
        message = f"{path} has {count:,} characters, limit {limit:,}: send less at a time"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        named = message.split()[0].rstrip(":")
        field = named if named in model.model_fields else None
    else:
        shown = _display(first["input"])
        message = f"{path}={shown} is not possible: {_lower_first(first['msg'])}"
    return ApiError(400, message, param=path or field, code=code)


def _unknown_field(model: type[StrictModel], loc: tuple[int | str, ...], path: str) -> str:
    name = str(loc[-1])
    if len(loc) == 1 and name in model.why_not:
        return f"{path}: {model.why_not[name]}"
    known = list(model.model_fields) if len(loc) == 1 else []
    near = get_close_matches(name, known, 1)
    remedy = f"did you mean {near[0]}?" if near else "leave it out"
    return f"the field {path} is unknown on this route: {remedy}"


def _path(data: Any, loc: tuple[int | str, ...]) -> str:
    """A path such as messages[0].content, without the tags of unions, which are in <>."""
    path, value = "", data
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<") or (isinstance(value, dict) and step in value):
            name = step[:60] if step.isidentifier() else repr(step[:60])
            path += f".{name}" if path else name
        value = _enter(value, step)
    return path


def _enter(value: Any, step: int | str) -> Any:
    """The item or field of a value that a step of a path names; the value itself if the step is the
    tag of a union, or missing."""
    if isinstance(step, int):
        return value[step] if isinstance(value, list) and step < len(value) else value
    return value[step] if isinstance(value, dict) and step in value else value


def _remove(data: Any, loc: tuple[int | str, ...]) -> str:
    """Delete a field. Returns its path."""
    value = data
    for step in loc[:-1]:
        value = _enter(value, step)
    path = _path(data, loc)
    del value[loc[-1]]
    return path


def _display(value: Any) -> str:
    """A value as errors show it: short, and only the type of an object."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        value = value["type"]
    if isinstance(value, int) and abs(value) >= 2**128:
        return "<a huge number>"
    if isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= 40 else text[:40] + "…"
    return f"<{type(value).__name__}>"


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]
