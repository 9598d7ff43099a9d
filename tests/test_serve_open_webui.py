"""A stream as Open WebUI 0.12.4 reads it (its utils/middleware.py), replayed without it.

It reads line by line and skips what does not begin with "data:", so also the names of events and
comments. Images in `delta.images` become attachments, which it stores and does not send again.
`delta.content` is put together, shown as markdown, and sent back as the text of the assistant's
turn; only the user's turns get their images back, as data URLs.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from serve_case import Running, answer, mini, pixels, running

from earlyfusion import Image, Message

FRUITS = "Show me two different fruits."
DATA_URL = re.compile(r"data:image/\w+;base64")
MARKDOWN = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@dataclass
class Shown:
    """What a user of Open WebUI sees of a reply."""

    content: str = ""
    attachments: list[bytes] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    usage: dict[str, Any] | None = None

    def read(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        self.errors += [chunk["error"]] if "error" in chunk else []
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", [])[:1]:
            self._read_delta(choice["delta"])

    def _read_delta(self, delta: dict[str, Any]) -> None:
        for image in delta.get("images") or []:
            url = image["image_url"]["url"] if image.get("type") == "image_url" else ""
            if DATA_URL.match(url):
                self.attachments.append(base64.b64decode(url.split(",")[1]))
        content = delta.get("content")
        self.content += content if isinstance(content, str) else ""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(api_keys=("open-webui-key",)) as server:
        yield server


def replayed(server: Running, messages: list[dict[str, Any]], **fields: Any) -> Shown:
    shown = Shown()
    body = {"model": "mini", "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": "Bearer open-webui-key"}
    with (
        httpx.Client(timeout=60, headers=headers) as client,
        client.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json=body | {"messages": messages, "seed": 0} | fields,
        ) as reply,
    ):
        assert reply.status_code == 200
        for line in reply.iter_lines():
            shown.read(line)
    assert shown.errors == []
    return shown


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def tokens(server: Running, messages: list[dict[str, Any]]) -> Any:
    headers = {"Authorization": "Bearer open-webui-key"}
    return server.post("/tokenize", {"messages": messages}, **headers).json()["tokens"]


@pytest.mark.parametrize("partial_images", [0, 2])
def test_images_are_attached_whole_and_once(server: Running, partial_images: int) -> None:
    reply = answer(FRUITS, "auto", 0)
    shown = replayed(server, [turn("user", FRUITS)], partial_images=partial_images)
    images = [pixels(data).tobytes() for data in shown.attachments]
    assert images == [image.tobytes() for image in reply.images] and len(images) == 2
    assert shown.content == reply.text
    assert shown.usage is not None
    assert shown.usage["completion_tokens"] == reply.usage.completion_tokens


def test_an_attached_image_that_the_user_sends_again_keeps_its_codes(server: Running) -> None:
    shown = replayed(server, [turn("user", FRUITS)])
    url = "data:image/png;base64," + base64.b64encode(shown.attachments[1]).decode()
    parts = [
        {"type": "text", "text": "Draw it again."},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    first = answer(FRUITS, "auto", 0)
    ids = tokens(
        server, [turn("user", FRUITS), turn("assistant", shown.content), turn("user", parts)]
    )
    generated = first.message.images[1]
    turns = [
        Message("user", FRUITS),
        Message("assistant", shown.content),
        Message("user", ["Draw it again.", generated]),
    ]
    assert isinstance(generated, Image) and ids == list(mini().request(turns, "text", seed=0).ids)


def test_markdown_shows_images_in_order_and_brings_them_back(server: Running) -> None:
    reply = answer(FRUITS, "auto", 0)
    shown = replayed(server, [turn("user", FRUITS)], image_delivery="markdown")
    assert shown.attachments == [], "an image would be shown twice"
    pieces = MARKDOWN.split(shown.content)
    texts, addresses = [piece.strip() for piece in pieces[::2] if piece.strip()], pieces[1::2]
    assert texts == reply.text.split("\n") and len(addresses) == 2
    assert all(len(address) < 200 for address in addresses), "the history stays small"
    for address, image in zip(addresses, reply.images, strict=True):
        response = httpx.get(address)  # as the browser does, which has no key
        assert response.status_code == 200 and pixels(response.content).tobytes() == image.tobytes()
    request_text = "Draw the first one again."
    ids = tokens(
        server, [turn("user", FRUITS), turn("assistant", shown.content), turn("user", request_text)]
    )
    turns = [Message("user", FRUITS), reply.message, Message("user", request_text)]
    assert ids == list(mini().request(turns, "text", seed=0).ids)


def test_what_open_webui_sends_is_answered_in_markdown_where_the_server_says_so() -> None:
    """It offers its own tools with every request, and cannot be told to send `image_delivery`."""
    tool = {"type": "function", "function": {"name": "search_notes", "parameters": {}}}
    with running(image_delivery="markdown") as server:
        body = {"model": "mini", "tools": [tool], "seed": 0}
        reply = server.chat(FRUITS, **body)
        message = reply.json()["choices"][0]["message"]
        assert "images" not in message and len(MARKDOWN.findall(message["content"])) == 2
        assert reply.headers["x-ignored-fields"] == "tools"
        response = server.chat(FRUITS, image_delivery="images", **body).json()
        assert len(response["choices"][0]["message"]["images"]) == 2
        refused = server.chat(FRUITS, tool_choice="required", **body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"
