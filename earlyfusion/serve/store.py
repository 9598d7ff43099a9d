"""The server's stores, in memory and of limited size: images with codes, and conversations.

An image that the model generated keeps its codes, so that a later prompt has exactly these codes
and nothing is encoded again. It is found by its id, its signed address, the bytes of its file, or
its pixels. If a store is full, the oldest entries go first.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from threading import Lock
from time import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import PIL.Image

from earlyfusion.content import Image, Message, Segment
from earlyfusion.serve.errors import ApiError

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
_PATH = re.compile(r"^(?:/[^/]+)*?/v1/files/(file-[A-Za-z0-9_-]{16})/content$")
MAX_CONVERSATIONS = 1000
_CONVERSATION_BYTES = 64_000_000


def random_id() -> str:
    """A random id of 16 characters that cannot be guessed."""
    return secrets.token_urlsafe(12)


@dataclass(frozen=True, eq=False)
class StoredFile:
    """An image's file. `image` has codes if the model generated it, or pixels if a client sent it.
    `pixel_digest` identifies generated pixels; it is b"" for an image that a client sent."""

    id: str
    data: bytes
    media_type: str
    name: str
    purpose: str
    created: int
    image: Image
    pixel_digest: bytes = b""

    @property
    def as_json(self) -> dict[str, Any]:
        """A file object of OpenAI's API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }

    @property
    def num_bytes(self) -> int:
        """The memory of the file and of the image's pixels and codes."""
        return len(self.data) + _image_bytes(self.image)


class Files:
    """Images that take at most `max_bytes` together. Safe in any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._secret = secrets.token_bytes(32)
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        # By digests of the bytes and of generated pixels: a client may upload a generated image.
        self._by_digest: dict[bytes, dict[str, None]] = {}
        self._bytes = 0
        self._lock = Lock()

    def add(
        self,
        data: bytes,
        media_type: str,
        image: Image,
        name: str,
        purpose: str,
        file_id: str | None = None,
        pixel_digest: bytes = b"",
    ) -> StoredFile:
        """Store an image under `file_id`, or under a new id that cannot be guessed. `pixel_digest`
        is that of `digest_pixels`, for an image that the model generated."""
        file_id = file_id or f"file-{random_id()}"
        now = int(time())
        file = StoredFile(file_id, data, media_type, name, purpose, now, image, pixel_digest)
        with self._lock:
            self._files[file_id] = file
            for digest in _digests(file):
                self._by_digest.setdefault(digest, {})[file_id] = None
            self._bytes += file.num_bytes
            while self._bytes > self.max_bytes and len(self._files) > 1:
                self._forget(next(iter(self._files)))
        return file

    def get(self, file_id: str) -> StoredFile:
        """The file of this id. Raises `ApiError` with status 404."""
        with self._lock:
            if file_id in self._files:
                self._files.move_to_end(file_id)
                return self._files[file_id]
        raise ApiError(
            404,
            f"there is no file {file_id[:40]!r} here any more: send the image itself",
            code="file_not_found",
        )

    def delete(self, file_id: str) -> None:
        """Drop a file. Raises `ApiError` with status 404."""
        self.get(file_id)
        with self._lock:
            self._forget(file_id)

    def generated(self, data: bytes) -> Image | None:
        """The generated image, with its codes, whose file has these bytes, if any."""
        return self._generated_by_digest(_digest(data))

    def generated_by_pixels(self, image: Image) -> Image | None:
        """The generated image, with its codes, that has the same pixels, if any."""
        return None if image.pil is None else self._generated_by_digest(digest_pixels(image.pil))

    def _generated_by_digest(self, digest: bytes) -> Image | None:
        with self._lock:
            images = (self._files[file_id].image for file_id in self._by_digest.get(digest, ()))
            return next((image for image in images if image.codes is not None), None)

    def url(self, file_id: str, base_url: str) -> str:
        """The signed URL of a file, which works without an API key."""
        return f"{base_url}/v1/files/{file_id}/content?sig={self._signature(file_id)}"

    def is_signed(self, file_id: str, signature: str) -> bool:
        """Whether a signature is that of the file's URL on this server."""
        signature_bytes = signature.encode("utf-8", "replace")  # JSON may hold a lone surrogate
        return hmac.compare_digest(self._signature(file_id).encode(), signature_bytes)

    def by_url(self, url: str) -> StoredFile | None:
        """The file at a signed URL of this server, under any host name; None for any other URL.
        Raises `ApiError` if the file has been dropped."""
        file_id, signature = _id_and_signature(url)
        return self.get(file_id) if file_id and self.is_signed(file_id, signature) else None

    def is_stale(self, url: str) -> bool:
        """Whether a URL looks like this server's, but was signed by another server, or by this one
        before its last start."""
        file_id, signature = _id_and_signature(url)
        return bool(file_id and signature) and not self.is_signed(file_id, signature)

    def _signature(self, file_id: str) -> str:
        return hmac.new(self._secret, file_id.encode(), sha256).hexdigest()[:24]

    def _forget(self, file_id: str) -> None:
        file = self._files.pop(file_id, None)
        if file is not None:
            self._bytes -= file.num_bytes
            for digest in _digests(file):
                del self._by_digest[digest][file_id]
                if not self._by_digest[digest]:
                    del self._by_digest[digest]


@dataclass(frozen=True)
class Conversation:
    """A reply of /v1/responses as it was sent, and all turns up to and including it."""

    response: dict[str, Any]
    turns: Sequence[Message]


class Conversations:
    """The last replies of /v1/responses, for `previous_response_id`."""

    def __init__(self) -> None:
        self._conversations: OrderedDict[str, tuple[Conversation, int]] = OrderedDict()
        self._response_of: dict[str, str] = {}  # ids of items -> ids of their responses
        self._bytes = 0

    def add(self, conversation: Conversation) -> None:
        """Keep a conversation under its response's id; the oldest are dropped beyond the limits."""
        # Pixels are large, and prompts do not need them.
        turns = [_without_pixels(turn) for turn in conversation.turns]
        size = sum(map(_turn_bytes, turns)) + len(str(conversation.response))
        response_id = conversation.response["id"]
        self._conversations[response_id] = replace(conversation, turns=turns), size
        self._response_of.update(dict.fromkeys(_item_ids(conversation), response_id))
        self._bytes += size
        while len(self._conversations) > MAX_CONVERSATIONS or (
            self._bytes > _CONVERSATION_BYTES and len(self._conversations) > 1
        ):
            self._forget(next(iter(self._conversations)))

    def get(self, response_id: str, param: str | None = None) -> Conversation:
        """The conversation up to a response. Raises `ApiError`: status 404, or 400 if a request
        names it in `param`."""
        if response_id in self._conversations:
            self._conversations.move_to_end(response_id)
            return self._conversations[response_id][0]
        raise ApiError(
            400 if param else 404,
            f"there is no response {response_id[:60]!r} here any more: send the whole conversation",
            param=param,
            code="response_not_found",
        )

    def delete(self, response_id: str) -> None:
        """Drop a response. Raises `ApiError` with status 404."""
        self.get(response_id)
        self._forget(response_id)

    def item(self, item_id: str) -> Segment:
        """The text or image of an item of a reply. Raises `ApiError` with status 400."""
        response_id = self._response_of.get(item_id)
        if response_id is None:
            raise ApiError(
                400,
                f"there is no item {item_id[:60]!r} here any more: send the item itself",
                param="input",
                code="item_not_found",
            )
        conversation = self.get(response_id)
        ids = _item_ids(conversation)
        # The reply is the last turn; it may follow text and images that it continues.
        return conversation.turns[-1].parts[ids.index(item_id) - len(ids)]

    def _forget(self, response_id: str) -> None:
        conversation, size = self._conversations.pop(response_id)
        self._bytes -= size
        for item_id in _item_ids(conversation):
            del self._response_of[item_id]


def _item_ids(conversation: Conversation) -> list[str]:
    return [item["id"] for item in conversation.response.get("output", ())]


def _without_pixels(turn: Message) -> Message:
    """The turn with only the codes of images that have codes."""
    parts = [
        Image(codes=part.codes) if isinstance(part, Image) and part.codes is not None else part
        for part in turn.parts
    ]
    return Message(turn.role, parts)


def _turn_bytes(turn: Message) -> int:
    return sum(
        _image_bytes(part) if isinstance(part, Image) else len(part.text) for part in turn.parts
    )


def _image_bytes(image: Image) -> int:
    pixels = 0 if image.pil is None else image.pil.width * image.pil.height * 3
    return pixels + (0 if image.codes is None else image.codes.nbytes)


def _id_and_signature(url: str) -> tuple[str, str]:
    """The file id and the signature in the URL of a file; empty for any other URL."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    match = _PATH.match(parts.path)
    return ("", "") if match is None else (match[1], parse_qs(parts.query).get("sig", [""])[0])


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def digest_pixels(pil: PIL.Image.Image) -> bytes:
    """A digest of 16 bytes of an image's size and RGB pixels."""
    return _digest(repr(pil.size).encode() + pil.convert("RGB").tobytes())


def _digests(file: StoredFile) -> list[bytes]:
    return [_digest(file.data), *([file.pixel_digest] if file.pixel_digest else [])]
