"""The server's parts without a server: strict fields, image URLs, stores, the trimmer."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast, get_type_hints
from unittest.mock import MagicMock

import numpy as np
import PIL.Image
import pytest
from serve_case import image_file, mini

from earlyfusion.content import Image, Message, Text
from earlyfusion.engine.cache import BLOCK_SIZE
from earlyfusion.errors import ContextError, OutOfMemoryError, SettingError
from earlyfusion.generation.request import (
    Event,
    Finished,
    ImageDone,
    ImageStarted,
    Request,
    TextDelta,
)
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.serve import fetch, logs
from earlyfusion.serve.driver import Batch, EngineFailedError, NotReadyError, QueueFullError
from earlyfusion.serve.errors import ApiError, as_api_error
from earlyfusion.serve.fetch import check_url
from earlyfusion.serve.image_io import ImageLimits, decode_data_url
from earlyfusion.serve.metrics import Metrics
from earlyfusion.serve.options import ServeOptions
from earlyfusion.serve.process import _Child
from earlyfusion.serve.prompts import PromptReader
from earlyfusion.serve.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EditRequest,
    GenerationRequest,
    ImageSampling,
    ResponseRequest,
    StrictModel,
    TextSampling,
    TokenizeRequest,
    read,
)
from earlyfusion.serve.replies import EventStream, Trimmer, json_text, sse, to_json
from earlyfusion.serve.spawn import cache_share
from earlyfusion.serve.store import MAX_CONVERSATIONS, Conversation, Conversations, Files

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
DRAW: dict[str, Any] = {"prompt": "Draw a cat."}
REQUEST = Request([0], "text", SamplingParams(), max_images=0, max_tokens=1)


def refused(kind: type[StrictModel], body: Any, lenient: bool = False) -> ApiError:
    with pytest.raises(ApiError) as error:
        read(kind, body, lenient)
    assert error.value.status == 400
    return error.value


# --- strict fields ---


@pytest.mark.parametrize(
    ("kind", "body", "param", "sentence"),
    [
        (ChatRequest, {}, "messages", "messages is missing"),
        (ChatRequest, CHAT | {"temprature": 1}, "temprature", "did you mean temperature?"),
        (ChatRequest, CHAT | {"zzzz": 1}, "zzzz", "unknown on this route: leave it out"),
        (ChatRequest, CHAT | {"tools": {}}, "tools", "this model calls no tools"),
        (ChatRequest, CHAT | {"tool_choice": "required"}, "tool_choice", "calls no tools"),
        (CompletionRequest, {"prompt": "a", "tools": [{}]}, "tools", "this model calls no tools"),
        (ChatRequest, CHAT | {"frequency_penalty": 0.5}, "frequency_penalty", "only 0"),
        (ChatRequest, CHAT | {"logit_bias": {"5": 1}}, "logit_bias", "use bad_words"),
        (ChatRequest, CHAT | {"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        (ChatRequest, CHAT | {"response_format": {"type": "regex"}}, None, "pattern is missing"),
        (
            ChatRequest,
            CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (ChatRequest, CHAT | {"structured_outputs": {}}, None, "use response_format"),
        (
            ResponseRequest,
            {"input": "a", "text": {"format": {"type": "json_schema", "schema": 5}}},
            "text.format.schema",
            "schema=5",
        ),
        (
            ResponseRequest,
            {"input": "a", "tools": [{"type": "function", "name": "f", "parameters": {}}]},
            "tools[0].type",
            "tools[0].type='function' is not possible: this model calls no tools but",
        ),
        (
            ResponseRequest,
            {"input": "a", "tool_choice": {"type": "function", "name": "f"}},
            None,
            "calls no tools but image_generation",
        ),
        (ChatRequest, CHAT | {"reasoning_effort": "low"}, None, "does not reason"),
        (CompletionRequest, {"prompt": "a", "ignore_eos": True}, "ignore_eos", "only false"),
        (CompletionRequest, {"prompt": "a", "min_tokens": 5}, "min_tokens", "only 0"),
        (ChatRequest, CHAT | {"modalities": ["text", "audio"]}, "modalities[1]", "'audio'"),
        (ChatRequest, CHAT | {"modalities": []}, "modalities", "modalities is empty"),
        (ChatRequest, CHAT | {"n": 0}, "n", "n=0 is not possible"),
        (ChatRequest, CHAT | {"n": 11}, "n", "less than or equal to 10"),
        (ChatRequest, CHAT | {"n": "2"}, "n", "n='2' is not possible"),
        (ChatRequest, CHAT | {"stream": 1}, "stream", "stream=1 is not possible"),
        (ChatRequest, CHAT | {"temperature": "hot"}, "temperature", "'hot'"),
        (ChatRequest, CHAT | {"store": True}, "store", "nothing is stored"),
        (ChatRequest, CHAT | {"size": "64x64"}, "size", "/v1/images/generations"),
        (ChatRequest, CHAT | {"negative_prompt": ["x"]}, "negative_prompt", "not possible"),
        (ChatRequest, CHAT | {"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        (ChatRequest, CHAT | {"partial_images": 1}, "partial_images", "needs stream: true"),
        (ChatRequest, CHAT | {"partial_images": 4}, "partial_images", "less than or equal to 3"),
        (ChatRequest, CHAT | {"max_tokens": 1, "max_completion_tokens": 1}, None, "the same"),
        (ChatRequest, CHAT | {"stop": [1]}, "stop[0]", "stop[0]=1"),
        (ChatRequest, {"messages": []}, "messages", "give at least one item"),
        (ChatRequest, {"messages": ["Hi"]}, "messages[0]", "send an object"),
        (ChatRequest, CHAT | {"metadata": "a"}, "metadata", "send an object"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
            "messages[0].content[0].image_url",
            "send an object",
        ),
        (TokenizeRequest, {"prompt": "a", "add_special_tokens": True}, None, "only false"),
        (CompletionRequest, {"prompt": ["a"] * 10_001}, "prompt", "over 10,000 items, the limit"),
        (
            ChatRequest,
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "tool_calls is not empty: leave it out",
        ),
        (ChatRequest, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]",
            "has the type 'audio'",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
            "unknown on this route",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
            "is missing",
        ),
        (GenerationRequest, DRAW | {"quality": "hd"}, "quality", "only auto"),
        (GenerationRequest, DRAW | {"background": "transparent"}, "background", "opaque"),
        (GenerationRequest, DRAW | {"style": "vivid"}, "style", "say it in the prompt"),
        (GenerationRequest, DRAW | {"max_tokens": 5}, "max_tokens", "unknown on this route"),
        (GenerationRequest, DRAW | {"stream": True, "response_format": "url"}, None, "b64_json"),
        (GenerationRequest, DRAW | {"output_format": "gif"}, "output_format", "'gif'"),
        (
            GenerationRequest,
            DRAW | {"output_compression": 5},
            "output_compression",
            "needs output_format: webp or jpeg",
        ),
        (ChatRequest, CHAT | {"output_compression": 0}, "output_compression", "webp or jpeg"),
        (
            ResponseRequest,
            {"input": "a", "tools": [{"type": "image_generation", "output_compression": 99}]},
            "tools[0]",
            "needs output_format: webp or jpeg",
        ),
        (
            CompletionRequest,
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "stream_options",
            "needs stream: true",
        ),
        (EditRequest, DRAW | {"mask": "a file"}, "mask", "cannot be masked"),
        (CompletionRequest, {"prompt": [1, 2]}, "prompt[0]", "not possible"),
        (CompletionRequest, {"prompt": "a", "echo": True}, "echo", "only false"),
        (CompletionRequest, {"prompt": "a", "suffix": "b"}, "suffix", "forward only"),
        (ResponseRequest, {"input": "a", "truncation": "auto"}, "truncation", "only disabled"),
        (ResponseRequest, {"input": "a", "tools": [{"type": "web_search"}]}, None, "web_search"),
        (ResponseRequest, {"input": "a", "tool_choice": "required"}, "tool_choice", "give tools"),
        (ResponseRequest, {"input": "a", "background": True}, "background", "use stream"),
        (ResponseRequest, {"input": [{"type": "computer_call"}]}, "input[0]", "computer_call"),
        (ResponseRequest, {"input": "a", "include": ["x"]}, "include[0]", "logprobs"),
        (ChatRequest, [], None, "not a JSON object"),
        (ChatRequest, "text", None, "not a JSON object"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    kind: type[StrictModel], body: Any, param: str | None, sentence: str
) -> None:
    error = refused(kind, body)
    assert sentence in error.message
    if param is not None:
        assert error.param == param


def test_values_that_change_nothing_are_accepted() -> None:
    body = CHAT | {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "store": False,
        "user": "u",
        "metadata": {"a": "b"},
        "temperature": None,
        "functions": None,
        "reasoning_effort": "none",
        "ignore_eos": False,
        "min_tokens": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    }
    plain, ignored = read(ChatRequest, body)
    assert (plain.user, ignored) == ("u", [])
    read(ResponseRequest, {"input": "a", "reasoning": {"effort": "none"}})
    # False is no 0, and 0 is not False.
    assert refused(ChatRequest, CHAT | {"frequency_penalty": False}).param == "frequency_penalty"
    assert refused(ChatRequest, CHAT | {"store": 0}).param == "store"


def test_nulls_are_fields_that_are_not_set_at_any_depth() -> None:
    call = {"type": "image_url", "image_url": {"url": "data:", "detail": None}, "index": None}
    message = {"role": "assistant", "content": [call], "reasoning_content": None}
    read(ChatRequest, {"messages": [*CHAT["messages"], message], "size": None})
    tool = {"type": "image_generation", "partial_images": None, "input_image_mask": None}
    body = {"input": [{"role": "user", "content": "a", "type": None}], "tools": [tool]}
    assert read(ResponseRequest, body)[0].tools[0].partial_images == 0
    error = refused(ChatRequest, {"messages": [{"role": "user", "contents": "a"}]})
    assert error.param == "messages[0].contents"
    assert refused(ChatRequest, {"messages": [{"role": None}]}).param == "messages[0].role"
    plain = {"input": "a"}
    for reasoning in ({"effort": "none", "summary": None}, {"effort": None, "summary": None}):
        assert read(ResponseRequest, plain | {"reasoning": reasoning}) == read(
            ResponseRequest, plain
        )
    cache = {"prompt_cache_options": {"mode": "implicit", "ttl": None}}
    assert read(ChatRequest, CHAT | cache) == read(ChatRequest, CHAT)
    thinks = {"reasoning": {"effort": "low", "summary": None}}
    assert refused(ResponseRequest, plain | thinks).param == "reasoning"


def test_offered_tools_are_left_alone_and_named() -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "search"}}], "functions": [{}]}
    for choice in ("auto", "none"):
        choices = {"tool_choice": choice, "function_call": choice}
        plain, ignored = read(ChatRequest, CHAT | tools | choices)
        assert plain == read(ChatRequest, CHAT)[0] and ignored == ["tools", "functions"]
    assert "use auto or none" in refused(ChatRequest, CHAT | {"function_call": {}}).message


def test_marks_for_a_cache_are_accepted() -> None:
    mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    content = [{"type": "text", "text": "a"} | mark, image | mark]
    read(ChatRequest, {"messages": [{"role": "user", "content": content}]})
    content = [{"type": "input_text", "text": "a"} | mark, {"type": "input_image"} | mark]
    read(ResponseRequest, {"input": [{"role": "user", "content": content}]})


def test_bodies_of_very_many_mistakes_are_refused_at_once() -> None:
    many = 500_000
    bodies: list[tuple[type[StrictModel], dict[str, Any]]] = [
        (ChatRequest, CHAT | {"modalities": [1] * many}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 9000}] * (many // 9000)}),
        (ResponseRequest, {"input": "Hi", "include": [""] * many}),
        (CompletionRequest, {"prompt": "Hi"} | {f"x{number}": 0 for number in range(many)}),
        (DetokenizeRequest, {"tokens": ["a"] * many}),
    ]
    for kind, body in bodies:
        began = monotonic()
        error = refused(kind, body)
        assert monotonic() - began < 1
        assert "over 50,000 values" in error.message or error.param == "tokens[0]"


def test_lenient_ignores_what_is_unknown_and_says_so() -> None:
    content = [{"type": "text", "text": "a", "cache_control": {}}]
    body = {"messages": [{"role": "user", "content": content}], "zzzz": 1, "tools": [{}]}
    plain, ignored = read(ChatRequest, body, lenient=True)
    assert sorted(ignored) == ["messages[0].content[0].cache_control", "tools", "zzzz"]
    assert isinstance(plain.messages[0].content, list)
    # A wrong value of a known field is still wrong.
    assert "n=0" in refused(ChatRequest, CHAT | {"n": 0, "zzzz": 1}, lenient=True).message


def test_forms_have_their_numbers_as_text() -> None:
    body = {"prompt": "a", "n": "2", "image_top_p": "0.5", "stream": "true", "seed": "3"}
    plain, _ = read(EditRequest, body, text=True)
    assert (plain.n, plain.image_top_p, plain.stream, plain.seed) == (2, 0.5, True, 3)


# --- image URLs ---

REFUSED = [
    "http://127.0.0.1/",
    "http://127.0.0.1:80/",
    "http://127.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://10.0.0.1/",
    "http://10.255.255.255/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.0.1/",
    "http://192.168.255.255/",
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.0.1/",
    "http://100.64.0.1/",
    "http://192.0.0.1/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://224.0.0.1/",
    "http://239.255.255.255/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::127.0.0.1]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a00:1::1]/",
    "http://[2001::1]/",
    "file:///etc/passwd",
    "ftp://example.org/a.png",
    "gopher://127.0.0.1/",
    "//example.org/a.png",
    "example.org/a.png",
    "http:///a.png",
    "http://",
    "http://user@example.org/",
    "http://example.org@127.0.0.1/",
    "http://example.org:22/",
    "https://example.org:80/",
    "http://example.org:99999/",
    "http://example.org\\@127.0.0.1/",
    "http://127.0.0.1\\.example.org/",
    "http://exa mple.org/",
    "http://example.org/\r\nHost: x",
    "http://ex\u0430mple.org/",
    "http://\u2460\u2461.org/",
    "http://%31%32%37.0.0.1/",
    "http://[::1",
    "http://internal.invalid/",
]


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_lead_inside_are_refused(address: str) -> None:
    with pytest.raises(ApiError, match="is not fetched, as") as error:
        check_url(address)
    assert (error.value.status, error.value.code) == (400, "image_url_refused")


def test_there_are_sixty_of_them() -> None:
    assert len(set(REFUSED)) >= 60


def test_a_name_is_resolved_once_and_all_its_addresses_count() -> None:
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    _, target = check_url("https://example.org/a.png", lambda host, port: next(answers))
    assert target == "93.184.216.34" and next(answers) == ["127.0.0.1"]
    for second in ("127.0.0.1", "::1", "fe80::1%eth0", "nonsense"):
        with pytest.raises(ApiError, match="not on the public internet"):
            check_url("http://example.org/", lambda host, port, two=second: ["93.184.216.34", two])


def test_redirects_are_checked_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        recorded.append(host)
        return ["127.0.0.1"] if host == "inside.example" else ["93.184.216.34"]

    turns = {"a.example": "http://inside.example/x", "b.example": "/again"}
    monkeypatch.setattr(fetch, "_get", lambda parts, target, end: turns[parts.hostname])
    with pytest.raises(ApiError, match="not on the public internet"):
        fetch.fetch_image("http://a.example/", resolve)
    with pytest.raises(ApiError, match="redirects more than 3 times"):
        fetch.fetch_image("http://b.example/", resolve)
    assert recorded == ["a.example", "inside.example", *["b.example"] * 4]


@pytest.mark.parametrize(
    ("head", "piece", "limits", "words"),
    [
        ("Content-Length: 100000000", 65_536, {"MAX_BYTES": 1_000_000}, "over 1,000,000 bytes"),
        ("Connection: close", 65_536, {"MAX_BYTES": 1_000_000}, "over 1,000,000 bytes"),
        ("Connection: close", 1, {"SECONDS": 0.3}, "cannot be reached in time"),  # dribbles
        (None, 1, {"SECONDS": 0.3}, "cannot be reached in time"),  # an endless head
    ],
)
def test_what_is_fetched_is_limited_in_size_and_time(
    head: str | None,
    piece: int,
    limits: dict[str, float],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(fetch, name, limit)
    sent, ended = 0, threading.Event()

    def answer(listener: socket.socket) -> None:
        nonlocal sent
        start = b"HTTP/1.1 200 OK\r\n" + (b"X: " if head is None else f"{head}\r\n\r\n".encode())
        with listener.accept()[0] as client, suppress(OSError):
            client.sendall(start)
            end = monotonic() + 8
            while monotonic() < end and not ended.wait(0 if piece > 1 else 0.02):
                client.sendall(b"a" * piece)
                sent += piece

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(fetch, "_PORTS", {"http": port})
        # This machine's address would be refused.
        monkeypatch.setattr(fetch, "_is_public_address", lambda address: True)
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        since = monotonic()
        try:
            with pytest.raises(ApiError, match=words):
                fetch.fetch_image(f"http://127.0.0.1:{port}/a.png")
            assert monotonic() - since < 5
        finally:
            ended.set()
            thread.join(10)
    assert 0 < sent < 20_000_000  # far less than is offered, with what the sockets hold


# --- images ---


def limits(**options: Any) -> ImageLimits:
    return ImageLimits(ServeOptions(**options))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_five_formats_are_read(form: str) -> None:
    image = limits().read(image_file(40, 30, form))
    assert image.pil is not None and image.pil.size == (40, 30)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has no bytes"),
        (b"text", "in no format that is read here"),
        (image_file(form="TIFF"), "send PNG, JPEG, WEBP, GIF or BMP"),
        (b"%PDF-1.7", "in no format"),
        (b"BM", "damaged or cut short: send the whole file"),
        (image_file(form="JPEG")[:-2], "damaged or cut short: send the whole file"),
    ],
)
def test_other_files_are_refused_with_a_fixed_text(data: bytes, words: str) -> None:
    with pytest.raises(ApiError) as error:
        limits().read(data)
    assert error.value.code == "invalid_image" and "0x" not in error.value.message
    assert words in error.value.message


def test_sizes_are_checked_before_a_pixel_is_decoded() -> None:
    large = image_file(100, 50)[:60]  # the header alone
    for options in ({"max_image_side": 99}, {"max_image_pixels": 4999}):
        with pytest.raises(ApiError, match=r"100 x 50 pixels, the limit is") as error:
            limits(**options).read(large)
        assert error.value.code == "image_too_large"
    together = limits(max_total_pixels=2000)
    together.read(image_file())
    with pytest.raises(ApiError, match="over 2,000 pixels together"):
        together.read(image_file())
    few = limits(max_images=1)
    few.read(image_file())
    with pytest.raises(ApiError, match="over 1 images, the limit"):
        few.read(image_file())


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    file = BytesIO()
    PIL.Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert data.endswith(b"\xff\xd9")
    scan = data[data.rindex(b"\xff\xda") : -2]
    limits = ImageLimits(ServeOptions())
    # Behind the end some cameras put a film, which may hold anything.
    for good in (data, data[:-2] + 50 * scan + data[-2:], data + 200 * scan):
        assert limits.read(good).pil is not None
    with pytest.raises(ApiError, match="over 100 scans, the limit"):
        limits.read(data[:-2] + 200 * scan + data[-2:])


def test_data_urls_are_of_images_in_base64() -> None:
    assert decode_data_url("data:image/png;base64,YQ==") == b"a"
    assert decode_data_url("data:image/png;base64,YQ\n==\r\n") == b"a"
    assert decode_data_url("DATA:image/PNG;name=a.png;Base64,YQ==") == b"a"
    for wrong in ("data:image/png,abc", "data:text/html;base64,YQ==", "data:image/png;base64,a"):
        with pytest.raises(ApiError):
            decode_data_url(wrong)


# --- stores ---


def test_long_texts_are_searched_for_images_in_linear_time() -> None:
    reader = PromptReader(Files(100), ImageLimits(ServeOptions()), allow_urls=False)
    for piece in ("![", "![](", "![](a", "![a](data:image/"):
        message = ChatMessage(role="assistant", content=piece * 50_000)
        began = monotonic()
        reader.chat([message])
        assert monotonic() - began < 1


def test_files_are_bounded_and_signed() -> None:
    import numpy as np

    files = Files(max_bytes=3000)
    stored = [
        files.add(bytes([i]) * 500, "image/png", Image(codes=np.zeros((8, 8), int)), "a", "b")
        for i in range(5)
    ]
    with pytest.raises(ApiError, match="send the image itself"):
        files.get(stored[0].id)
    last = stored[-1]
    assert files.get(last.id) is last and files.generated(last.data) is last.image
    assert files.generated(stored[0].data) is None
    address = files.url(last.id, "http://here/v1/x")
    assert files.by_url(address) is last
    assert files.by_url(address.replace("http://here", "https://elsewhere:9")) is last
    half = address[:-1] + "\ud800"  # of a character, as JSON can hold it
    for other in (half, address[:-1] + "?", "http://a/b.png", "nonsense", "http://[", address[:20]):
        assert files.by_url(other) is None
    other_server = Files(100)  # has another secret
    assert other_server.by_url(address) is None and other_server.is_stale(address)
    assert not files.is_stale(address) and not files.is_stale("http://a/b.png?sig=a")
    upload = files.add(last.data, "image/png", last.image, "the same bytes", "vision")
    files.delete(upload.id)
    assert files.generated(last.data) is last.image
    files.delete(last.id)
    with pytest.raises(ApiError):
        files.by_url(address)
    assert files.generated(last.data) is None


def test_conversations_are_bounded() -> None:
    conversations = Conversations()
    for number in range(MAX_CONVERSATIONS + 1):
        conversations.add(Conversation({"id": str(number)}, [Message("user", "Hi")]))
    with pytest.raises(ApiError) as error:
        conversations.get("0", "previous_response_id")
    assert (error.value.status, error.value.param) == (400, "previous_response_id")
    assert conversations.get("1").turns[0].parts == [Text("Hi")]
    conversations.delete("1")
    with pytest.raises(ApiError) as error:
        conversations.get("1")
    assert error.value.status == 404


def test_items_are_kept_as_long_as_their_conversation() -> None:
    conversations = Conversations()
    for number in range(MAX_CONVERSATIONS + 1):
        response = {"id": str(number), "output": [{"id": f"a{number}"}, {"id": f"b{number}"}]}
        turn = Message("assistant", ["begun", "first", "second"])
        conversations.add(Conversation(response, [Message("user", "Hi"), turn]))
    assert conversations.item("a1") == Text("first") and conversations.item("b1") == Text("second")
    conversations.delete("2")
    for gone in ("a0", "b0", "a2", "b2", "c"):
        with pytest.raises(ApiError, match="there is no item") as error:
            conversations.item(gone)
        assert error.value.status == 400


# --- from the engine to the replies ---


def test_a_step_of_many_replies_lets_others_in_between() -> None:
    from earlyfusion.serve import driver as module
    from earlyfusion.serve.driver import Batch, Driver

    async def run() -> None:
        driver = Driver(mini(), max_queue=100)
        driver._loop, driver.ready = asyncio.get_running_loop(), True
        several = 2 * module.REPLIES_AT_ONCE + 1
        jobs = [module._Job(REQUEST, 0, Batch(driver, 1)) for _ in range(several)]
        for job in jobs:
            job.batch._num_unfinished = 1
        driver._receive_updates([module._JobUpdate(job, [TextDelta("a")]) for job in jobs])
        woken = [sum(job.batch.can_continue for job in jobs)]
        # The next step's updates arrive while the last ones are not delivered yet.
        broken = RuntimeError()
        driver._receive_updates([module._JobUpdate(job, [TextDelta("b")], broken) for job in jobs])
        while woken[-1] < several:
            await asyncio.sleep(0)
            woken.append(sum(job.batch.can_continue for job in jobs))
        assert woken[:3] == [several // 2, 2 * (several // 2), several]
        for _ in range(3):
            await asyncio.sleep(0)
        for job in jobs:
            assert [event for _, event in job.batch._pending] == [TextDelta("a"), TextDelta("b")]
            assert job.batch._error is broken

    asyncio.run(run())


def test_a_reply_that_is_left_while_others_are_dropped_is_cancelled() -> None:
    """The event loop cancels a batch between two looks of the engine's thread at it."""
    from earlyfusion.serve.driver import Driver

    looks, cancelled = iter([False, True, True, True]), []

    class Batch:
        @property
        def cancelled(self) -> bool:
            return next(looks)

    handle = SimpleNamespace(cancel=lambda: cancelled.append(True))
    driver = Driver(mini(), max_queue=1)
    driver._jobs = [SimpleNamespace(batch=Batch(), handle=handle)]  # type: ignore[list-item]
    while driver._jobs:
        driver._drop_cancelled()
    assert cancelled == [True]


def test_waits_of_a_reply_share_a_timer() -> None:
    from earlyfusion.serve.driver import Batch, Driver, _Job, _JobUpdate

    async def run() -> None:
        batch = Batch(Driver(mini(), max_queue=100), 1)
        batch._num_unfinished, job = 1, _Job(REQUEST, 0, batch)
        loop, events = asyncio.get_running_loop(), batch.events(idle_seconds=600)
        timers = set()
        for number in range(3):  # events before the timer fires, each time
            loop.call_soon(batch.receive, _JobUpdate(job, [TextDelta(str(number))]))
            assert await anext(events) == (0, TextDelta(str(number)))
            timers.add(batch._timer)
        assert len(timers) == 1
        events = batch.events(idle_seconds=0.01)  # before that timer fires
        assert await anext(events) is None and await anext(events) is None
        batch.receive(_JobUpdate(job, error=RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            await anext(events)

    asyncio.run(run())


def test_a_wait_follows_one_of_under_a_millisecond() -> None:
    """For these uvloop has no timers but calls at once."""
    uvloop = pytest.importorskip("uvloop")
    from earlyfusion.serve.driver import Batch, Driver, _Job, _JobUpdate

    async def run() -> None:
        batch = Batch(Driver(mini(), max_queue=100), 1)
        batch._num_unfinished, job = 1, _Job(REQUEST, 0, batch)
        loop, events = asyncio.get_running_loop(), batch.events(idle_seconds=0.0001)
        for number in range(10):
            loop.call_soon(batch.receive, _JobUpdate(job, [TextDelta(str(number))]))
            while (event := await anext(events)) is None:
                pass
            assert event == (0, TextDelta(str(number)))

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()


def test_a_mistake_in_the_figures_costs_no_reply() -> None:
    from earlyfusion.serve import driver as module
    from earlyfusion.serve.driver import Driver

    async def run() -> None:
        driver = Driver(mini(), max_queue=100)
        driver._loop, driver.ready = asyncio.get_running_loop(), True

        def observe(batch: Batch, index: int, event: Event) -> None:
            raise KeyError(index)

        driver.set_callbacks(observe, lambda batch: None)
        jobs = [module._Job(REQUEST, 0, Batch(driver, 1)) for _ in range(20)]
        for job in jobs:
            job.batch._num_unfinished = 1
        with suppress(KeyError):
            driver._receive_updates([module._JobUpdate(job, [TextDelta("a")]) for job in jobs])
        for _ in range(5):
            await asyncio.sleep(0)
        assert all(job.batch.can_continue for job in jobs)

    asyncio.run(run())


def test_a_late_reply_is_no_client_that_left() -> None:
    from earlyfusion.serve.driver import Driver, RequestTimeoutError

    async def run() -> None:
        driver, left = Driver(mini(), max_queue=100), list[Batch]()
        driver.ready = True
        driver.set_callbacks(lambda batch, index, event: None, left.append)
        for timeout, expected in ((0.001, 0), (None, 1)):
            batch = driver.admit(1)
            batch._num_unfinished = 1
            if timeout is not None:
                with pytest.raises(RequestTimeoutError):
                    await batch.collect(timeout)
            batch.close()
            assert len(left) == expected

    asyncio.run(run())


def test_when_to_ask_again_follows_the_oldest_request() -> None:
    from earlyfusion.serve.driver import Driver

    driver = Driver(mini(), max_queue=0)
    driver.ready = True

    async def run() -> list[float]:
        seconds = []
        first = driver.admit(driver.limit)
        for age in (0, 20, 500):
            first.admitted_at = monotonic() - age
            with pytest.raises(QueueFullError) as waits:
                driver.check_room()
            seconds.append(waits.value.seconds)
        first.close()
        return seconds

    waits = zip(asyncio.run(run()), (1, 20, 40), strict=True)
    assert all(0.5 * mean <= seconds <= 1.5 * mean for seconds, mean in waits)
    driver.check_room()


# --- the rest ---


def test_deltas_have_no_blanks_at_the_ends() -> None:
    trimmer = Trimmer()
    assert [trimmer.push(delta) for delta in (" ", "\n a", " ", "b ", "")] == [
        "",
        "a",
        "",
        " b",
        "",
    ]
    begun = Trimmer(keep_leading=True)
    assert begun.push(" ") + begun.push("pear ") == " pear"


def test_a_client_that_reads_nothing_gives_its_room_back() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    class Room:
        can_continue, closed = False, False

        def close(self) -> None:
            self.closed = True

    room = Room()
    stream = EventStream(chunks(), cast(Batch, room), seconds=0.01)
    asyncio.run(asyncio.wait_for(stream({}, never, never), 10))
    assert room.closed


def test_half_characters_become_escapes() -> None:
    assert to_json({"a": "\ud800é"}) == '{"a":"\\ud800é"}'.encode()


def test_an_event_is_one_line_for_every_client() -> None:
    data = {"a": "é\x85b\u2028c\u2029d\ne"}
    [line, empty] = sse(data).decode().splitlines()  # as httpx reads lines
    assert json.loads(line.removeprefix("data: ")) == data and not empty


@pytest.mark.parametrize("text", ["", 'a "b"\n\\', "é🍎\u2028\x7f\x00", "\ud800é"])
def test_a_text_is_escaped_as_in_a_whole_object(text: str) -> None:
    assert json_text(text) == to_json(text)


class NoConnection:
    def send(self, message: Any) -> None:
        raise AssertionError


def test_events_of_short_steps_go_together() -> None:
    request = mini().request("Name a fruit.", "text", seed=1, bad_words=["z"])
    expected = mini().generate("Name a fruit.", "text", seed=1, bad_words=["z"])

    def messages(waited: float) -> list[list[Event]]:
        child = _Child(cast(Connection, NoConnection()), mini().engine)
        child._commands.append((0, request))
        batches = [list[Event]()]
        assert not child._take_commands()
        while child._handles:
            child._all_sent_at = monotonic() - waited
            assert not child._step()
            batches += [
                [*update.events]
                for n in child._due()
                if (update := child._take_update(n)) is not None
            ]
        assert not child._without_update
        return [events for events in batches if events]

    def text(events: list[Event]) -> str:
        return "".join(event.text for event in events if isinstance(event, TextDelta))

    each, together = messages(waited=10), messages(waited=-10)
    assert len(each) > len(together) == 2  # the first, and the others with the last
    assert len(together[-1]) == 2 and isinstance(together[-1][-1], Finished)
    for batches in (each, together):
        assert "".join(map(text, batches)).strip() == expected.text


def test_the_engines_process_ends_a_cancelled_request_before_its_next_step() -> None:
    engine = mini().engine
    child = _Child(cast(Connection, NoConnection()), engine)
    child._commands.append((0, mini().request("Draw a cat.", "image", seed=1)))
    assert not child._take_commands() and not child._step() and engine.used_blocks
    child._commands.append((0, None))
    assert not child._take_commands()
    assert not child._handles and not engine.busy and not engine.used_blocks


def test_errors_have_a_status_a_remedy_and_no_inside() -> None:
    cases = [
        (QueueFullError(44, 3), 429, "queue_full", "ask again in 3 s"),
        (NotReadyError(), 503, "not_ready", "ask again"),
        (NotReadyError("no engine"), 503, "not_ready", "no engine"),
        (EngineFailedError("x"), 503, "engine_failed", "ask it again"),
        (ContextError("prompt is 9 tokens"), 400, "context_length_exceeded", "9 tokens"),
        (SettingError("top_p=2 is not possible"), 400, "invalid_value", "top_p=2"),
        (RuntimeError("secret at 0x7f"), 500, "internal", "its log says why"),
    ]
    for error, status, code, words in cases:
        api_error = as_api_error(error)
        assert (api_error.status, api_error.code) == (status, code) and words in api_error.message
        assert "0x7f" not in str(api_error.body)
    assert as_api_error(SettingError("top_p=2 is not possible")).param == "top_p"
    full = as_api_error(QueueFullError(4, 2.5))
    assert full.headers == {"Retry-After": "3", "Retry-After-Ms": "2500"}
    short = as_api_error(OutOfMemoryError("no memory for 4 requests"))
    assert (short.status, short.code) == (503, "out_of_memory")
    assert short.headers["Retry-After"] == "1"


def test_options_are_checked() -> None:
    with pytest.raises(SettingError, match="file_bytes=0 is not possible: use 1 or more"):
        ServeOptions(file_bytes=0)
    with pytest.raises(SettingError, match="there is no API key"):
        ServeOptions(host="0.0.0.0")
    assert ServeOptions(host="0.0.0.0", api_keys=("a-long-key",)).host == "0.0.0.0"
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        assert ServeOptions(host=host).host == host
    for origin in ("*", "null", "http://page.example:81", "chrome-extension://abc"):
        assert ServeOptions(cors_origins=(origin,)).cors_origins == (origin,)
    for origin in ("http://page.example/", "page.example", "", "http://a b"):
        with pytest.raises(SettingError, match="is not an origin: give a scheme and a host"):
            ServeOptions(cors_origins=(origin,))
    assert ServeOptions(public_url="https://a.example/x/").public_url
    for address in ("a.example", "//a.example", "http://", "ftp://a"):
        with pytest.raises(SettingError, match="is not an address: begin it with http://"):
            ServeOptions(public_url=address)
    impossible = {"port": 70_000}, {"max_queue": -1}, {"api_keys": ("short",)}, {"step_timeout": 0}
    for wrong in impossible:
        with pytest.raises(SettingError):
            ServeOptions(**wrong)


def test_the_log_has_all_that_is_said() -> None:
    """Every field that the server gives to a record is in the line."""
    extra = set()
    for file in Path(logs.__file__).parent.glob("*.py"):
        for words in re.findall(r"extra=\{(.*?)\}", file.read_text(encoding="utf-8"), re.DOTALL):
            extra |= set(re.findall(r'"(\w+)":', words))
    record = logging.makeLogRecord(dict.fromkeys(extra, 1) | {"msg": "a"})
    assert len(extra) > 5 and extra <= set(json.loads(logs.JsonLines().format(record)))


def test_sampling_fields_of_requests_are_those_of_the_model() -> None:
    params = get_type_hints(SamplingParams)
    declared = TextSampling.model_fields | ImageSampling.model_fields
    fields = {name: field.annotation for name, field in declared.items()}
    # Some routes take these in OpenAI's form, or not at all: they are declared there.
    elsewhere = {"max_tokens", "logprobs", "json_schema", "regex", "grammar", "logits_processors"}
    # These have a type of JSON.
    differing = {"stop", "bad_words", "allowed_words"}
    assert set(fields) == set(params) - elsewhere
    assert all(fields[name] == params[name] for name in set(fields) - differing)


def test_engines_of_one_machine_share_the_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    size = mini().engine.cache_size
    context = -(-mini().config.max_position_embeddings // BLOCK_SIZE) * size.block_bytes
    free = 4 * 40 * context  # a quarter of it holds 40 contexts
    monkeypatch.setattr("earlyfusion.engine.cache.free_bytes", lambda device: free)
    monkeypatch.setattr("earlyfusion.devices.free_bytes", lambda device: free)
    assert [cache_share(mini(), n) // context for n in (1, 2, 10, 20)] == [40, 20, 4, 3]


def test_the_time_of_an_image_begins_with_the_image_of_its_own_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = Metrics(MagicMock(preemptions=0), "mini")
    batch = Batch(MagicMock(), 2)
    batch.requests = [cast(Request, SimpleNamespace(adapter=""))] * 2
    done = ImageDone(0, np.zeros((2, 2), np.int64))
    for second, choice, event in (
        (1, 0, ImageStarted(0)),
        (4, 1, ImageStarted(0)),
        (5, 0, done),
        (7, 1, done),
    ):
        monkeypatch.setattr("earlyfusion.serve.metrics.monotonic", lambda now=second: now)
        metrics.observe(batch, choice, event)
    total = "earlyfusion:image_seconds_sum"
    [line] = [line for line in metrics.text().decode().splitlines() if line.startswith(total)]
    assert line.endswith(" 7.0")  # 4 s and 3 s


def test_metrics_that_vllm_has_too_have_its_names_and_types() -> None:
    driver = MagicMock(preemptions=0)
    metrics = Metrics(driver, "mini")
    theirs = {
        "num_requests_running": "gauge",
        "num_requests_waiting": "gauge",
        "kv_cache_usage_perc": "gauge",
        "num_preemptions_total": "counter",
        "prompt_tokens_total": "counter",
        "generation_tokens_total": "counter",
        "prefix_cache_queries_total": "counter",
        "prefix_cache_hits_total": "counter",
        "request_success_total": "counter",
        "time_to_first_token_seconds": "histogram",
        "e2e_request_latency_seconds": "histogram",
    }
    ours = dict(re.findall(r"^# TYPE earlyfusion:(\w+) (\w+)$", metrics.text().decode(), re.M))
    assert {name: ours.get(name) for name in theirs} == theirs
    for driver.preemptions, total in ((2, 2), (3, 3), (1, 3), (2, 4)):  # the third is of a restart
        line = f'\nearlyfusion:num_preemptions_total{{model_name="mini"}} {total}.0\n'
        assert line in metrics.text().decode()
