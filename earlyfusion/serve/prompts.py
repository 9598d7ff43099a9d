"""Wire messages to `Message`s: images found, read and put where they belong.

An image that this server generated comes back with its codes. Any turn may hold it as a file, a
data URL, an address of this server or an id; an assistant's turn also in `images` or `parts` of a
reply, or as markdown in the text. Runs in a worker thread, as it decodes images and fetches others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from earlyfusion.content import Image, Message, Role, Segment, Text
from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.fetch import MAX_SECONDS, fetched
from earlyfusion.serve.image_io import ImageLimits, decoded, unpacked
from earlyfusion.serve.protocol import (
    ChatMessage,
    ContentPart,
    EditImage,
    FilePart,
    ImagePart,
    ImageUrl,
    InputImage,
    InputImageCall,
    InputItem,
    InputMessage,
    InputText,
    ItemReference,
    TextPart,
    Wire,
)
from earlyfusion.serve.store import Files

# A text of many "![" would take quadratic time if the words in the brackets could hold another "[".
_MARKDOWN = re.compile(r"!\[[^\[\]\n]*\]\(([^()\s]+)\)")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def foreign_addresses(body: Any) -> Iterator[str]:
    """The http addresses of images anywhere in a body or a part of it."""
    if isinstance(body, list):
        for each in body:
            yield from foreign_addresses(each)
    elif isinstance(body, ImageUrl | InputImage | EditImage):
        address = body.url if isinstance(body, ImageUrl) else body.image_url
        if address is not None and address[:4].lower() == "http":
            yield address
    elif isinstance(body, Wire):
        for _, value in body:
            yield from foreign_addresses(value)


class PromptReader:
    """Reads the messages of one request; `limits` counts its images."""

    def __init__(self, files: Files, limits: ImageLimits, allow_urls: bool) -> None:
        self._files, self._limits, self._allow_urls = files, limits, allow_urls
        self._seconds = MAX_SECONDS  # that are left for fetching

    def chat(self, messages: Sequence[ChatMessage]) -> list[Message]:
        """The turns of /v1/chat/completions."""
        return [self._chat_turn(message) for message in messages]

    def items(
        self, items: str | Sequence[InputItem], referenced: Mapping[str, Segment]
    ) -> list[Message]:
        """The turns of /v1/responses; adjacent items of the assistant are one turn. `referenced`
        are the items that references name, by their ids."""
        if isinstance(items, str):
            return [Message("user", items)]
        turns: list[Message] = []
        called: list[bool] = []  # of each turn: whether all of it are images of calls
        for item in items:
            if isinstance(item, ItemReference):
                turn = Message("assistant", self._counted(referenced[item.id]))
            else:
                turn = self._item(item)
            is_call = not isinstance(item, InputMessage) and bool(turn.images)
            if turns and turns[-1].role == turn.role == "assistant":
                turn = Message("assistant", [*turns.pop().parts, *turn.parts])
                is_call = called.pop() and is_call
            turns.append(turn)
            called.append(is_call)
        return _with_called_images(turns, called)

    def edit_image(self, image: EditImage) -> Image:
        """An image that a JSON body of /v1/images/edits names."""
        return self._named(image.image_url, image.file_id)

    def file(self, data: bytes) -> Image:
        """The image of a file, with its codes if this server generated it."""
        generated = self._files.generated(data)
        if generated is not None:
            self._limits.count()
            return generated
        sent = self._limits.read(data)
        # Another program may have written the same pixels in another way.
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
            return Message(role, list(self._reply_of(message)))
        content = message.content or ""
        if isinstance(content, str):
            return Message(role, content)
        return Message(role, [self._part(part) for part in content])

    def _reply_of(self, message: ChatMessage) -> Iterator[Segment]:
        """The segments of an assistant's turn, in the order of `parts`. Without `parts`, images
        in markdown stay where they are, and `images` follow the text."""
        images = message.images or []
        if message.parts:
            for part in message.parts:
                if isinstance(part, TextPart):
                    yield Text(part.text)
                elif 0 <= part.index < len(images):
                    yield self._named(images[part.index].image_url.url, None)
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
        read = [segment for piece in pieces for segment in self._said(piece)]
        yield from read
        # With image_delivery "both", the images are in the text and in `images`.
        if not any(isinstance(segment, Image) for segment in read):
            yield from (self._named(image.image_url.url, None) for image in images)

    def _said(self, part: ContentPart) -> list[Segment]:
        if isinstance(part, TextPart):
            return self._markdown(part.text)
        if isinstance(part, FilePart):
            return [self._named(None, part.file.file_id)]
        return [self._named(part.image_url.url, None)]

    def _markdown(self, text: str) -> list[Segment]:
        """A text with the images of its data URLs and of this server's addresses; other addresses
        stay text. Removes the blank lines that this server puts around an image."""
        segments: list[Segment] = []
        start = 0
        for found in _MARKDOWN.finditer(text):
            image = self._known(found[1])
            if image is not None:
                segments += _stripped(text[start : found.start()])
                segments.append(image)
                start = found.end()
        return [*segments, *_stripped(text[start:])] if segments else [Text(text)]

    def _known(self, address: str) -> Image | None:
        if address.startswith("data:image/"):
            return self._named(address, None)
        file = self._files.at(address)
        if file is None:
            # As text it would only look like an image to people.
            if self._files.is_stale(address):
                raise _stale()
            return None
        self._limits.count()
        return file.image

    def _part(self, part: ContentPart) -> Segment:
        if isinstance(part, TextPart):
            return Text(part.text)
        if isinstance(part, ImagePart):
            return self._named(part.image_url.url, None)
        return self._named(None, part.file.file_id)

    def _named(self, address: str | None, file_id: str | None) -> Image:
        """The image at an address, or of an uploaded or generated file."""
        if (address is None) == (file_id is None):
            raise ApiError(400, "an image has image_url or file_id: give one of them")
        if file_id is not None:
            self._limits.count()
            return self._files.get(file_id).image
        assert address is not None
        if address[:5].lower() == "data:":
            return self.file(unpacked(address))
        file = self._files.at(address)
        if file is not None:
            self._limits.count()
            return file.image
        if not self._allow_urls:
            raise self._refused(address)
        began = monotonic()
        data = fetched(address, seconds=self._seconds)
        self._seconds -= monotonic() - began
        return self._limits.read(data)

    def _refused(self, address: str) -> ApiError:
        """Why a server that fetches no images has none at an address."""
        if self._files.is_stale(address):
            return _stale()
        if not address.lower().startswith(("http://", "https://")):
            return ApiError(
                400,
                f"image_url={address[:20]!r} is not an address: send a data URL, which begins with "
                "data:image/png;base64, or another image type",
                code="invalid_image",
            )
        return ApiError(
            400,
            "images at foreign addresses are not fetched by this server: send a data URL, "
            "upload to /v1/files, or start the server with --allow-image-urls",
            code="image_url_refused",
        )

    def _counted(self, segment: Segment) -> Segment:
        if isinstance(segment, Image):
            self._limits.count()
        return segment

    def _item(self, item: InputMessage | InputImageCall) -> Message:
        if isinstance(item, InputImageCall):
            return Message("assistant", self._image_of_call(item))
        return self._input_message(item)

    def _image_of_call(self, item: InputImageCall) -> Image:
        if item.result:
            return self.file(decoded(item.result))
        self._limits.count()
        return self._files.get(f"file-{item.id.removeprefix('ig_')}").image

    def _input_message(self, item: InputMessage) -> Message:
        if isinstance(item.content, str):
            return Message(_ROLES[item.role], item.content)
        return Message(_ROLES[item.role], [self._input_part(part) for part in item.content])

    def _input_part(self, part: InputText | InputImage) -> Segment:
        if isinstance(part, InputText):
            return Text(part.text)
        return self._named(part.image_url, part.file_id)


def _with_called_images(turns: list[Message], called: Sequence[bool]) -> list[Message]:
    """The turns; images of calls that stand before the first or behind the last turn of the user,
    where no reply does, are in that turn, before its text. OpenAI's examples edit images so."""
    if len(turns) > 1 and called[-1] and turns[-2].role == "user":
        turns = [*turns[:-2], Message("user", [*turns[-1].parts, *turns[-2].parts])]
    if len(turns) > 1 and called[0] and turns[1].role == "user":
        turns = [Message("user", [*turns[0].parts, *turns[1].parts]), *turns[2:]]
    return turns


def _stale() -> ApiError:
    return ApiError(
        400,
        "the address of an image is of another server, or of this one before it was started "
        "again: send the image itself, or leave it out",
        code="image_url_refused",
    )


def _stripped(text: str) -> list[Segment]:
    return [Text(text.strip())] if text.strip() else []
