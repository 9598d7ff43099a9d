"""Turns the messages of a request into `Message`s: finds, reads and places their images.

An image that this server generated keeps its codes. Any turn may hold it as a file, a data URL, a
URL of this server or an id; an assistant's turn also in `images` or `parts` of an earlier reply, or
as markdown in the text. Runs in a worker thread, as it decodes and fetches images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from earlyfusion.content import Image, Message, Role, Segment, Text
from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.fetch import MAX_SECONDS, fetch_image
from earlyfusion.serve.image_io import ImageLimits, decode_base64, decode_data_url
from earlyfusion.serve.protocol import (
    ChatMessage,
    ContentPart,
    EditImage,
    ImagePart,
    ImageUrl,
    InputImage,
    InputImageCall,
    InputItem,
    InputMessage,
    InputText,
    ItemReference,
    StrictModel,
    TextPart,
)
from earlyfusion.serve.store import Files

# The brackets hold no other bracket, or a text of many "![" would take quadratic time.
_MARKDOWN = re.compile(r"!\[[^\[\]\n]*\]\(([^()\s]+)\)")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def http_urls(body: Any) -> Iterator[str]:
    """The http URLs of images anywhere in a body or a part of it."""
    if isinstance(body, list):
        for item in body:
            yield from http_urls(item)
    elif isinstance(body, ImageUrl | InputImage | EditImage):
        url = body.url if isinstance(body, ImageUrl) else body.image_url
        if url is not None and url[:4].lower() == "http":
            yield url
    elif isinstance(body, StrictModel):
        for _, value in body:
            yield from http_urls(value)


class PromptReader:
    """Reads the messages of one HTTP request. `limits` checks its images, `allow_urls` permits
    fetching them from other servers. All methods raise `ApiError`."""

    def __init__(self, files: Files, limits: ImageLimits, allow_urls: bool) -> None:
        self._files, self._limits, self._allow_urls = files, limits, allow_urls
        self._seconds_left = MAX_SECONDS  # for fetching images

    def chat(self, messages: Sequence[ChatMessage]) -> list[Message]:
        """The turns of /v1/chat/completions."""
        return [self._chat_turn(message) for message in messages]

    def items(
        self, items: str | Sequence[InputItem], referenced: Mapping[str, Segment]
    ) -> list[Message]:
        """The turns of /v1/responses; adjacent items of the assistant are one turn. `referenced`
        has the segments of referenced items, by their ids."""
        if isinstance(items, str):
            return [Message("user", items)]
        turns: list[Message] = []
        only_calls: list[bool] = []  # per turn: whether it consists of image_generation_calls
        for item in items:
            turn = self._item_turn(item, referenced)
            is_call = not isinstance(item, InputMessage) and bool(turn.images)
            if turns and turns[-1].role == turn.role == "assistant":
                turn = Message("assistant", [*turns.pop().parts, *turn.parts])
                is_call = only_calls.pop() and is_call
            turns.append(turn)
            only_calls.append(is_call)
        return _move_called_images(turns, only_calls)

    def edit_image(self, image: EditImage) -> Image:
        """An image in a JSON body of /v1/images/edits."""
        return self._image(image.image_url, image.file_id)

    def file(self, data: bytes) -> Image:
        """The image of a file, with its codes if this server generated it."""
        generated = self._files.generated(data)
        if generated is not None:
            self._limits.count()
            return generated
        sent = self._limits.read(data)
        # Another program may have saved the same pixels again.
        return self._files.generated_by_pixels(sent) or sent

    def _chat_turn(self, message: ChatMessage) -> Message:
        role = _ROLES[message.role]
        if message.role != "assistant" and (message.images or message.parts):
            raise ApiError(
                400,
                f"images and parts belong to an assistant's message, not to a {message.role}'s: "
                "put images into content",
                param="messages",
            )
        if role == "assistant":
            return Message(role, list(self._assistant_segments(message)))
        content = message.content or ""
        if isinstance(content, str):
            return Message(role, content)
        return Message(role, [self._part(part) for part in content])

    def _assistant_segments(self, message: ChatMessage) -> Iterator[Segment]:
        """The segments of an assistant's turn, in the order of `parts`. Without `parts`, images
        in markdown stay where they are, and `images` follow the text."""
        images = message.images or []
        if message.parts:
            for part in message.parts:
                if isinstance(part, TextPart):
                    yield Text(part.text)
                elif 0 <= part.index < len(images):
                    yield self._image(images[part.index].image_url.url, None)
                else:
                    raise ApiError(
                        400,
                        f"parts name image {part.index}, and images has {len(images)}: send both "
                        "as they came",
                        param="messages",
                    )
            return
        content = message.content or ""
        pieces = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        segments: list[Segment] = []
        for piece in pieces:
            if isinstance(piece, TextPart):
                segments += self._markdown(piece.text)
            else:
                segments.append(self._part(piece))
        yield from segments
        # With image_delivery "both", the images are in the text and in `images`.
        if not any(isinstance(segment, Image) for segment in segments):
            yield from (self._image(image.image_url.url, None) for image in images)

    def _markdown(self, text: str) -> list[Segment]:
        """The segments of a text, in which markdown images with data URLs or URLs of this server
        become images; those with other URLs stay text. Removes the empty lines that this server
        puts around an image."""
        segments: list[Segment] = []
        start = 0
        for match in _MARKDOWN.finditer(text):
            image = self._markdown_image(match[1])
            if image is not None:
                segments += _stripped(text[start : match.start()])
                segments.append(image)
                start = match.end()
        return [*segments, *_stripped(text[start:])] if segments else [Text(text)]

    def _markdown_image(self, url: str) -> Image | None:
        if url.startswith("data:image/"):
            return self._image(url, None)
        file = self._files.by_url(url)
        if file is None:
            # People would see an image where the model would only read a URL.
            if self._files.is_stale(url):
                raise _stale_url()
            return None
        self._limits.count()
        return file.image

    def _part(self, part: ContentPart) -> Segment:
        if isinstance(part, TextPart):
            return Text(part.text)
        if isinstance(part, ImagePart):
            return self._image(part.image_url.url, None)
        return self._image(None, part.file.file_id)

    def _image(self, url: str | None, file_id: str | None) -> Image:
        """The image at a URL, or of an uploaded or generated file."""
        if (url is None) == (file_id is None):
            raise ApiError(400, "an image has image_url or file_id: give one of them")
        if file_id is not None:
            self._limits.count()
            return self._files.get(file_id).image
        assert url is not None
        if url[:5].lower() == "data:":
            return self.file(decode_data_url(url))
        file = self._files.by_url(url)
        if file is not None:
            self._limits.count()
            return file.image
        if not self._allow_urls:
            raise self._refused_url(url)
        start = monotonic()
        data = fetch_image(url, seconds=self._seconds_left)
        self._seconds_left -= monotonic() - start
        return self._limits.read(data)

    def _refused_url(self, url: str) -> ApiError:
        """The error for a URL on a server that fetches no images."""
        if self._files.is_stale(url):
            return _stale_url()
        if not url.lower().startswith(("http://", "https://")):
            return ApiError(
                400,
                f"image_url={url[:20]!r} is not an address: send a data URL, which begins with "
                "data:image/png;base64, or another image type",
                code="invalid_image",
            )
        return ApiError(
            400,
            "images at foreign addresses are not fetched by this server: send a data URL, "
            "upload to /v1/files, or start the server with --allow-image-urls",
            code="image_url_refused",
        )

    def _item_turn(self, item: InputItem, referenced: Mapping[str, Segment]) -> Message:
        if isinstance(item, ItemReference):
            segment = referenced[item.id]
            if isinstance(segment, Image):
                self._limits.count()
            return Message("assistant", segment)
        if isinstance(item, InputImageCall):
            return Message("assistant", self._image_of_call(item))
        if isinstance(item.content, str):
            return Message(_ROLES[item.role], item.content)
        return Message(_ROLES[item.role], [self._input_part(part) for part in item.content])

    def _image_of_call(self, item: InputImageCall) -> Image:
        if item.result:
            return self.file(decode_base64(item.result))
        self._limits.count()
        return self._files.get(f"file-{item.id.removeprefix('ig_')}").image

    def _input_part(self, part: InputText | InputImage) -> Segment:
        if isinstance(part, InputText):
            return Text(part.text)
        return self._image(part.image_url, part.file_id)


def _move_called_images(turns: list[Message], only_calls: Sequence[bool]) -> list[Message]:
    """The turns, of which the first and the last become a part of the user's turn beside them if
    they consist of image_generation_calls: their images come before its text. This is how OpenAI's
    examples edit images."""
    if len(turns) > 1 and only_calls[-1] and turns[-2].role == "user":
        turns = [*turns[:-2], Message("user", [*turns[-1].parts, *turns[-2].parts])]
    if len(turns) > 1 and only_calls[0] and turns[1].role == "user":
        turns = [Message("user", [*turns[0].parts, *turns[1].parts]), *turns[2:]]
    return turns


def _stale_url() -> ApiError:
    return ApiError(
        400,
        "the address of an image is of another server, or of this one before it was started "
        "again: send the image itself, or leave it out",
        code="image_url_refused",
    )


def _stripped(text: str) -> list[Segment]:
    """A text without whitespace around it, if any is left."""
    return [Text(text.strip())] if text.strip() else []
