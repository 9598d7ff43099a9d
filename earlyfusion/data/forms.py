"""The forms of rows, recognised by their keys.

| form | keys |
| --- | --- |
| messages | `messages` of role and content (a text or typed parts), `images` or `image`: TRL's |
| prompt | `prompt` and `completion`, each a text or messages: TRL's too |
| conversations | `conversations` of `from` and `value`, with `<image>` markers: LLaVA's |
| interleaved | `texts` and `images` of equal length, None where the other has an entry: OBELICS' |
| pair | an image (`image`, `jpg`, `file_name` …) and a caption (`caption`, `text`, `txt` …) |
| text | `text` |

A row becomes an `Example`, which only names its images: they are read later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from earlyfusion.content import PLACEHOLDER, Role, Text
from earlyfusion.errors import DataError


class ImageRef(NamedTuple):
    """An image that is not decoded yet: the bytes of its file, or the file's name."""

    source: bytes | str


Part: TypeAlias = Text | ImageRef
Turn: TypeAlias = tuple[Role, list[Part]]
TEXT, IMAGE, BOTH = range(3)  # what answers hold


@dataclass
class Example:
    """Turns that alternate from the user's to the assistant's, or a single one of the assistant's:
    a plain document, in which nothing is a prompt."""

    form: str
    turns: list[Turn]

    @property
    def answer_kind(self) -> int:
        """What the assistant's turns hold: TEXT, IMAGE or BOTH."""
        parts = [part for role, turn in self.turns if role == "assistant" for part in turn]
        images = sum(isinstance(part, ImageRef) for part in parts)
        return BOTH if 0 < images < len(parts) else IMAGE if images else TEXT


_ROLES: dict[str, Role | None] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": None,  # joined to the user's turn
}
_IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
_CAPTION_KEYS = ("caption", "text", "txt", "captions")


def example_of(row: Mapping[str, Any], image_first: bool, plain_pairs: bool = False) -> Example:
    """Read a row. A pair becomes a prompt and its answer, or with `plain_pairs` a plain document.
    Raises `DataError` with the reason if the row has no known form, or breaks its rules."""
    form = form_of(row)
    if form == "pair":
        return _pair(row, image_first, plain_pairs)
    turns = _READERS[form](row)
    if not turns or turns[-1][0] != "assistant":
        raise DataError("the last turn is not the assistant's: add its answer")
    if len(turns) > 1 and turns[0][0] != "user":
        raise DataError("the first turn is the assistant's: begin with the user's")
    return Example(form, turns)


def image_refs_of(row: Mapping[str, Any]) -> list[ImageRef]:
    """The images of a row of any form, or of images only; `DataError` if it has none."""
    column = next((key for key in ("images", *_IMAGE_KEYS) if row.get(key) is not None), None)
    if column is not None:
        value = row[column]
        refs = [_image_ref(v) for v in (value if isinstance(value, list) else [value]) if v]
    else:
        turns = example_of(row, image_first=True).turns
        refs = [part for _, parts in turns for part in parts if isinstance(part, ImageRef)]
    if not refs:
        raise DataError("the row has no image: leave it out")
    return refs


def form_of(row: Mapping[str, Any]) -> str:
    """The name of a row's form, from its keys; `DataError` if it has none."""
    # Files mix forms: a column that is null in this row counts as missing.
    keys_of_row = {key for key, value in row.items() if value is not None}
    for form, keys in _KEYS.items():
        if keys_of_row.issuperset(keys):
            return form
    # Before plain text, as "text" may also be the key of a caption.
    if keys_of_row.intersection(_IMAGE_KEYS) and keys_of_row.intersection(_CAPTION_KEYS):
        return "pair"
    if "text" in keys_of_row:
        return "text"
    names = ", ".join(sorted(map(str, row))[:8]) or "none"
    raise DataError(f"the row's keys ({names}) are of no known form: see docs/data.md for the six")


# The order matters: rows of messages often have a text or an image column as well.
_KEYS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "conversations": ("conversations",),
    "interleaved": ("texts", "images"),
}


def _pair(row: Mapping[str, Any], image_first: bool, plain: bool) -> Example:
    """An image and its caption: a prompt and its answer, or if `plain` a plain document."""
    image = _image_ref(next(row[key] for key in _IMAGE_KEYS if row.get(key) is not None))
    caption = next(row[key] for key in _CAPTION_KEYS if row.get(key) is not None)
    # Of several captions of one image, as in COCO, take the first.
    if isinstance(caption, list) and caption:
        caption = caption[0]
    parts = [image, *_checked_parts([Text(_as_text(caption, "the caption"))])]
    first, second = parts if image_first else parts[::-1]
    if plain:
        return Example("pair", [("assistant", [first, second])])
    return Example("pair", [("user", [first]), ("assistant", [second])])


def _messages(row: Mapping[str, Any]) -> list[Turn]:
    return _build_turns(_as_list(row["messages"], "messages"), _image_refs(row))


def _prompt(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of `prompt` and `completion`; either may be a text or a list of messages."""
    roles = {"prompt": "user", "completion": "assistant"}
    messages = [
        message
        for key, role in roles.items()
        for message in (
            row[key] if isinstance(row[key], list) else [{"role": role, "content": row[key]}]
        )
    ]
    return _build_turns(messages, _image_refs(row))


def _conversations(row: Mapping[str, Any]) -> list[Turn]:
    return _build_turns(_as_list(row["conversations"], "conversations"), _image_refs(row))


def _interleaved(row: Mapping[str, Any]) -> list[Turn]:
    """A plain document of texts and images in order."""
    texts, images = _as_list(row["texts"], "texts"), _as_list(row["images"], "images")
    if len(texts) != len(images):
        raise DataError(f"there are {len(texts)} texts but {len(images)} images: pad with null")
    parts: list[Part] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise DataError(f"entry {number} has a text and an image: give null for one of them")
        parts += [] if text is None else [Text(_as_text(text, f"text {number}"))]
        parts += [] if image is None else [_image_ref(image)]
    return [("assistant", _checked_parts(parts))]


def _plain_text(row: Mapping[str, Any]) -> list[Turn]:
    return [("assistant", _checked_parts([Text(_as_text(row["text"], "the text"))]))]


_READERS: dict[str, Callable[[Mapping[str, Any]], list[Turn]]] = {
    "messages": _messages,
    "prompt": _prompt,
    "conversations": _conversations,
    "interleaved": _interleaved,
    "text": _plain_text,
}


def _build_turns(messages: Sequence[Any], images: Sequence[ImageRef]) -> list[Turn]:
    """Turns with their images in the places of their markers. Without markers, all images come
    first in the first turn, which must be the user's. Consecutive turns of one role are joined by a
    newline; a system's text counts as the user's."""
    # Markers take the images in order, over all turns.
    remaining = iter(images)
    roles_and_parts = [
        (_role(message), _parts(_content(message), remaining)) for message in messages
    ]
    unmarked = list(remaining)
    num_marked = len(images) - len(unmarked)
    if unmarked and (num_marked or not roles_and_parts):
        raise DataError(
            f"{num_marked} images are marked but {len(images)} given: mark each, or none"
        )
    turns: list[Turn] = []
    for role, parts in roles_and_parts:
        if turns and turns[-1][0] == role:
            turns[-1][1].extend([Text("\n"), *parts])
        else:
            turns.append((role, parts))
    if unmarked and turns[0][0] == "user":
        turns[0][1][:0] = unmarked
    elif unmarked:
        raise DataError("no turn takes the images: mark them, or begin with the user's turn")
    for _, parts in turns:
        _checked_parts(parts)
    return turns


def _role(message: Any) -> Role:
    if not isinstance(message, Mapping):
        raise DataError("a message is not an object of role and content: write it as one")
    name = message.get("role", message.get("from"))
    if name not in _ROLES:
        raise DataError(f"the role {str(name)[:40]!r} is unknown: use user, assistant or system")
    return _ROLES[name] or "user"


def _content(message: Mapping[str, Any]) -> Any:
    return message.get("content", message.get("value"))


def _parts(content: Any, images: Iterator[ImageRef]) -> list[Part]:
    if isinstance(content, str):
        return list(_split_at_markers(content, images))
    parts: list[Part] = []
    for item in _as_list(content, "a message's content"):
        parts += _part(item, images)
    return parts


def _split_at_markers(text: str, images: Iterator[ImageRef]) -> Iterator[Part]:
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            yield _next_image(images)
        # LLaVA puts a marker on a separate line.
        piece = piece.strip("\n") if PLACEHOLDER in text else piece
        if piece:
            yield Text(piece)


def _part(item: Any, images: Iterator[ImageRef]) -> list[Part]:
    """The parts of one item of a message's content; a marker takes the next of `images`."""
    if isinstance(item, str):
        return list(_split_at_markers(item, images))
    part_type = item.get("type") if isinstance(item, Mapping) else None
    if part_type == "text":
        # Typed parts have no markers: a text that spells one is plain text.
        text = _as_text(item.get("text"), "a text part")
        return [Text(text)] if text else []
    if part_type in ("image", "image_url"):
        keys = ("image", "image_url", "url", "path")
        # A part without an image is a marker.
        image = next((item[key] for key in keys if item.get(key)), None)
        return [_next_image(images) if image is None else _image_ref(image)]
    raise DataError(f"a part of type {str(part_type)[:40]!r} is unknown: use text or image")


def _next_image(images: Iterator[ImageRef]) -> ImageRef:
    image = next(images, None)
    if image is None:
        raise DataError("more images are marked than given: give one for each marker")
    return image


def _image_refs(row: Mapping[str, Any]) -> list[ImageRef]:
    images = row.get("images")
    if images is None:
        images = row.get("image")
    if images is None:
        return []
    return [_image_ref(item) for item in (images if isinstance(images, list) else [images])]


def _image_ref(value: Any) -> ImageRef:
    """An image given as bytes, a name, or a dict as `datasets` and chat protocols write it."""
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("bytes", "path", "url") if value.get(k)), None)
    if isinstance(value, bytes | str) and value:
        return ImageRef(value)
    raise DataError("an image is neither a file name nor bytes: give one of them")


def _as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is of type {type(value).__name__}: write it as a string")
    return value


def _as_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is of type {type(value).__name__}: write it as a list")
    return value


def _checked_parts(parts: list[Part]) -> list[Part]:
    """The same parts; `DataError` if none has an image or a visible character."""
    if not any(isinstance(part, ImageRef) or part.text.strip() for part in parts):
        raise DataError("a turn is empty: give it a text or an image")
    return parts
