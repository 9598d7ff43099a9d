"""When things go wrong: limits, full queues, clients that leave, broken steps, the end."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic, perf_counter, sleep
from typing import Any

import httpx
import openai
import pytest
from serve_case import STRAWBERRY, Running, data_url, events, image_file, mini, running

from earlyfusion.cli import main
from earlyfusion.engine.engine import Engine
from earlyfusion.errors import SettingError
from earlyfusion.serve.driver import Driver, QueueFullError
from earlyfusion.serve.options import ServeOptions
from earlyfusion.serve.run import listener_of

LONG: dict[str, Any] = {"modalities": ["image"], "max_images": 8, "seed": 0}
KEY = "a-secret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(
        max_queue=4,
        max_body_bytes=200_000,
        max_images=3,
        max_image_side=300,
        keepalive=0.05,
        lenient=True,
    ) as server:
        yield server


def hold(server: Running, monkeypatch: pytest.MonkeyPatch) -> Event:
    """Let the engine make no step until the event is set."""
    go, driver = Event(), server.service.driver
    step = driver._step

    def wait(engine: Any) -> None:
        go.wait(30)
        step(engine)

    monkeypatch.setattr(driver, "_step", wait)
    return go


@pytest.fixture
def held(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    go = hold(server, monkeypatch)
    yield go
    go.set()
    server.wait_until_idle()


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- bodies ---


def test_large_bodies_are_refused(server: Running) -> None:
    content = [{"type": "text", "text": "a" * 300_000}]
    reply = server.chat([{"role": "user", "content": content}])
    assert reply.status_code == 413 and error_of(reply)["code"] == "body_too_large"

    def endless() -> Iterator[bytes]:
        yield b'{"messages": "'
        for _ in range(30):
            yield b"a" * 10_000

    headers = {"content-type": "application/json"}
    with httpx.Client() as client:  # chunked: no length is announced
        reply = client.post(f"{server.url}/v1/chat/completions", content=endless(), headers=headers)
        assert reply.status_code == 413
        files = {"image": ("a.png", os.urandom(300_000))}
        reply = client.post(f"{server.url}/v1/images/edits", data={"prompt": "a"}, files=files)
        assert reply.status_code == 413
    assert server.get("/health").status_code == 200


def test_texts_far_beyond_the_context_are_refused_before_they_are_encoded(
    server: Running,
) -> None:
    words = "1" * 150_000  # of the 200,000 bytes that a body of this server may have
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": words}]},
        "/v1/completions": {"prompt": words},
        "/v1/images/generations": {"prompt": "Draw a cat.", "negative_prompt": words},
        "/tokenize": {"prompt": words},
    }
    for path, body in bodies.items():
        reply = server.post(path, body)
        assert reply.status_code == 400
        assert re.search("at least 9,375 tokens, limit 1,024|150,000", error_of(reply)["message"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations"])
def test_long_prompts_are_not_read_on_the_event_loop(
    server: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, called = server.service.run_in_worker, 0

    async def noted(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called += 1
        return await work(*arguments, **options)

    monkeypatch.setattr(server.service, "run_in_worker", noted)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Draw a cat."}]}
    body = {"prompt": "Draw a cat."} if "images" in path else body | {"modalities": ["image"]}
    for negative, expected in (("Draw a dog.", 0), ("Draw a dog. " * 50, 1)):
        reply = server.post(path, body | {"guidance_text": 3, "negative_prompt": negative})
        assert reply.status_code in (200, 400) and called == expected


_POST = b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health?",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ",
        _POST + b"1\r\n{\r\n0\r\nX: ",
    ],
    ids=["line", "header", "behind the body"],
)
def test_endless_heads_are_refused(server: Running, start: bytes) -> None:
    if start.startswith(_POST):
        pytest.importorskip("httptools")  # with the other parser uvicorn closes without a reply
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(start)
        sent, answer = 0, b""
        while b" 400 " not in answer:
            sent += client.send(b"x" * 4096)
            assert sent < 10_000_000
            client.settimeout(0.05)
            with suppress(TimeoutError):
                answer += client.recv(65_536)
        assert sent > 20_000


def test_clients_that_send_no_request_are_closed(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = pytest.importorskip("earlyfusion.serve.http")
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.05)
    host, port = server.url.removeprefix("http://").split(":")
    complete = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for start in (b"", b"GET /health HTTP/1.1\r\nHost:", complete + b"GET /health"):
        with socket.create_connection((host, int(port)), timeout=4) as client:
            client.sendall(start)
            answer = b""
            while piece := client.recv(65_536):  # until the server closes
                answer += piece
            assert answer.count(b" 200 OK") == (start.startswith(complete))


def test_heads_that_arrive_at_once_are_limited_too(server: Running) -> None:
    pytest.importorskip("httptools")
    assert server.get("/health", **{"x-long": "x" * 20_000}).status_code == 200
    reply = server.get("/health", **{"x-long": "x" * 40_000})
    assert reply.status_code == 400 and "32,768 bytes, the limit" in error_of(reply)["message"]
    assert server.get("/health", **{f"x-{i}": "x" * 400 for i in range(100)}).status_code == 400
    assert server.get("/health?" + "x" * 40_000).status_code == 400


def _raw(server: Running, data: bytes) -> bytes:
    """What the server answers to these bytes, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(data)
        while piece := client.recv(65_536):
            answer += piece
    return answer


def test_a_request_that_is_not_http_gets_a_json_error(server: Running) -> None:
    pytest.importorskip("httptools")
    head, _, body = _raw(server, b"hello\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


_OFFER = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAI\r\n"
    b"upgrade: websocket\r\nContent-Length: 33\r\n\r\n"
)


def test_an_offer_of_another_protocol_is_ignored(server: Running) -> None:
    # As Java's HTTP client sends it. The parser would drop the body.
    request = _OFFER + b'{"prompt": "Hi", "max_tokens": 1}'
    begin = _OFFER.index(b"\r\nUpgrade")
    cuts = [0, len(_OFFER), len(_OFFER) - 1, len(_OFFER) + 5, *range(begin, begin + 13)]
    cuts.append(_OFFER.index(b"ade: websocket"))
    host, port = server.url.removeprefix("http://").split(":")
    for cut in cuts:
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in filter(None, (request[:cut], request[cut:])):
                client.sendall(piece)
                sleep(0.02)  # so that the server reads it alone
            assert client.recv(65_536).startswith(b"HTTP/1.1 200 "), cut


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/files"])
def test_a_client_that_leaves_amid_its_body_is_no_failure(
    server: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind = "application/json" if path == "/v1/completions" else "multipart/form-data; boundary=a"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with caplog.at_level("INFO", "earlyfusion.serve"):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: 100\r\n\r\n--a\r\n".encode())
        end = monotonic() + 30
        while not (records := [r for r in caplog.records if getattr(r, "path", "") == path]):
            assert monotonic() < end
            sleep(0.01)
    assert [getattr(record, "status", 0) for record in records] == [499]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "line 1, column 1"),
        (b'{\n"prompt": "a", }', "line 2, column"),
        (b'{"messages": NaN}', "NaN is not JSON: use a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"\xff"', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "over 4,300 digits"),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "the field seed came twice: send it once"),
        (b'{"metadata": {"a": "1", "a": "1"}}', "the field a came twice"),
        (b'{"prompt": "a", "x": [-1e400]}', "the number -1e400 is too large"),
    ],
)
def test_damaged_json(server: Running, body: bytes, words: str) -> None:
    headers = {"content-type": "application/json"}
    with httpx.Client() as client:
        reply = client.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert reply.status_code == 400 and error_of(reply)["code"] == "invalid_json"
    assert words in error_of(reply)["message"]


def test_many_values_are_refused_before_they_are_parsed(server: Running) -> None:
    body = b"[" + b"," * 150_001  # no JSON: parsing it would say so
    headers = {"content-type": "application/json"}
    with httpx.Client() as client:
        reply = client.post(f"{server.url}/v1/completions", content=body, headers=headers)
        texts = json.dumps({"prompt": "," * 100_000})
        fits = client.post(f"{server.url}/tokenize", content=texts, headers=headers)
    assert reply.status_code == 400 and "over 150,000 commas" in error_of(reply)["message"]
    assert fits.status_code == 200


@pytest.mark.parametrize("path", ["/v1/files", "/v1/images/edits", "/v1/images/variations"])
def test_damaged_forms(server: Running, path: str) -> None:
    with httpx.Client() as client:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        reply = client.post(server.url + path, content=b"--x\r\nTrue--x--\r\n", headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("the form is malformed")


def _form(*fields: tuple[str, bytes]) -> bytes:
    """A form whose fields have no filenames."""
    head = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    return b"".join(head % (name.encode(), value) for name, value in fields) + b"--x--\r\n"


def test_forms_whose_image_is_no_file_or_that_are_too_large() -> None:
    image = STRAWBERRY.read_bytes()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with running() as server, httpx.Client() as client:
        for path, field in {
            "/v1/files": "file",
            "/v1/images/edits": "image",
            "/v1/images/variations": "image[]",
        }.items():
            bodies = {
                f"the field {field} has no filename": _form((field, image)),
                "the form has over 100 fields or files": _form(*[("user", b"a")] * 101),
                "a field of the form has over 1,048,576 bytes": _form((field, bytes(1_048_577))),
            }
            for words, body in bodies.items():
                reply = client.post(server.url + path, content=body, headers=headers)
                assert reply.status_code == 400
                assert error_of(reply)["message"].startswith(words)


def test_a_file_in_the_place_of_a_text_or_of_another_is_refused(server: Running) -> None:
    image, words = ("a.png", STRAWBERRY.read_bytes()), ("prompt.txt", b"Draw it again.")
    cases: list[tuple[str, dict[str, Any], list[Any], str]] = [
        ("/v1/images/edits", {}, [("image", image), ("prompt", words)], "prompt is a file"),
        ("/v1/images/edits", {"prompt": "a"}, [("images", image)], "images is a file"),
        ("/v1/files", {}, [("file", image), ("file", image)], "one image, and 2 came"),
        ("/v1/files", {"purpose": ["vision", "vision"]}, [("file", image)], "purpose came twice"),
        ("/v1/files", {}, [("file", image), ("purpose", words)], "purpose is a file"),
        ("/v1/files", {}, [("purpose", (None, b"vision"))], "one image, and 0 came"),
    ]
    with httpx.Client(timeout=60) as client:
        for path, fields, files, sentence in cases:
            reply = client.post(server.url + path, data=fields, files=files)
            assert reply.status_code == 400 and sentence in error_of(reply)["message"]


def test_other_types_and_routes(server: Running) -> None:
    with httpx.Client() as client:
        url = f"{server.url}/v1/chat/completions"
        assert client.post(url, content="{}").status_code == 415
        assert client.post(f"{server.url}/v1/images/variations", json={}).status_code == 415
        response = client.get(url)
        assert response.status_code == 405 and response.headers["allow"] == "POST"
        compressed = {"content-type": "application/json", "content-encoding": "gzip"}
        reply = client.post(url, content=b"\x1f\x8b", headers=compressed)
        assert reply.status_code == 415 and "'gzip' is not read" in error_of(reply)["message"]
        reply = client.head(f"{server.url}/health")
        assert reply.status_code == 200 and not reply.content
        reply = client.post(f"{server.url}/v1/embeddings", json={})
    assert reply.status_code == 404 and error_of(reply)["code"] == "unknown_route"
    reply = server.get("/v1/files/file-x/content?sig=\u00e9")
    assert reply.status_code == 404


def test_a_trailing_slash_in_the_path_is_ignored(server: Running) -> None:
    for path in ("/v1/models", "/health", "/v1/models/mini"):
        assert server.get(path + "/").json().keys() == server.get(path).json().keys()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert server.post("/v1/chat/completions/", body).status_code == 200
    assert error_of(server.get("/health//"))["code"] == "unknown_route"


def test_a_model_whose_name_ends_with_a_slash() -> None:
    with running(name="mine/") as server:
        assert server.get("/v1/models/mine/").json()["id"] == "mine/"
        assert server.get("/v1/models/").json()["data"][0]["id"] == "mine/"
        assert server.chat("Hi", model="mine/", max_tokens=1).status_code == 200
        assert error_of(server.get("/v1/models/mine"))["code"] == "model_not_found"


def test_all_methods_of_a_path_are_allowed(server: Running) -> None:
    with httpx.Client() as client:
        refused = client.put(f"{server.url}/v1/files/file-x")
        assert refused.status_code == 405 and refused.headers["allow"] == "DELETE, GET, HEAD"
        assert client.post(server.url).headers["allow"] == "GET, HEAD"


def test_streams_in_http_1_0_end_with_the_connection(server: Running) -> None:
    fields = {"stream": True, "max_tokens": 3, "modalities": ["text"], "seed": 0}
    chat = {"messages": [{"role": "user", "content": "Hi"}]} | fields
    for method, path, body in (
        ("POST", "/v1/chat/completions", json.dumps(chat).encode()),
        ("GET", "/v1/models", b""),
        ("HEAD", "/v1/models", b""),
    ):
        lines = [f"{method} {path} HTTP/1.0", "Host: localhost", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", "", ""]
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall("\r\n".join(lines).encode() + body)
            answer = b""
            while piece := client.recv(65_536):
                answer += piece
        head, _, reply = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head and b"transfer-encoding" not in head.lower()
        if method == "POST":
            assert [event for _, event in events(reply.decode())][-1] == "[DONE]"
            assert reply.startswith(b"data: ") and reply.count(b"\n\n") >= 3
        else:
            assert bool(reply) == (method == "GET")


def test_images_have_limits(server: Running) -> None:
    large = "data:image/png;base64," + base64.b64encode(image_file(301, 10)).decode()
    part = {"type": "image_url", "image_url": {"url": large}}
    reply = server.chat([{"role": "user", "content": [part]}])
    assert error_of(reply)["code"] == "image_too_large"
    part = {"type": "image_url", "image_url": {"url": data_url()}}
    reply = server.chat([{"role": "user", "content": [part] * 4}])
    assert error_of(reply)["code"] == "too_many_images"
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    reply = server.chat([{"role": "user", "content": [part]}])
    assert error_of(reply)["code"] == "image_url_refused"
    assert "--allow-image-urls" in error_of(reply)["message"]


def test_lenient_servers_list_what_they_ignored(server: Running) -> None:
    reply = server.chat("Name a fruit.", max_tokens=2, zzzz=1, tools=[{}])
    assert reply.status_code == 200
    assert sorted(reply.headers["x-ignored-fields"].split(", ")) == ["tools", "zzzz"]
    assert "x-ignored-fields" not in server.chat("Name a fruit.", max_tokens=2).headers
    reply = server.chat("Name a fruit.", max_tokens=2, 한=1)
    assert reply.status_code == 200 and reply.headers["x-ignored-fields"] == "\\ud55c"


# --- a full queue, and clients that leave ---


def test_a_full_queue_says_when_to_ask_again(
    server: Running, held: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, limit = server.service.driver, 5
    assert driver.limit == driver.engine.most_running + 4
    monkeypatch.setattr(type(driver), "limit", limit)  # fewer than run at once

    def ask(number: int) -> httpx.Response:
        return server.chat("Name a fruit.", max_tokens=4, modalities=["text"], seed=number)

    with ThreadPoolExecutor(limit) as pool:
        requests = [pool.submit(ask, number) for number in range(limit)]
        while driver.waiting < limit:
            sleep(0.01)
        times, waits = list[float](), set[str]()
        for _ in range(5):
            since = perf_counter()
            refused = ask(0)
            times.append(perf_counter() - since)
            assert refused.status_code == 429 and error_of(refused)["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            waits.add(refused.headers["retry-after-ms"])
        assert len(waits) > 1  # or they would all come back at once
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.completions.create(model="mini", prompt="a")
        held.set()
        replies = [one.result() for one in requests]
    assert {reply.status_code for reply in replies} == {200}  # no accepted request is lost
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1
    too_many = server.post("/v1/completions", {"prompt": ["a"] * (limit + 1)})
    assert too_many.status_code == 400 and "ask for fewer" in error_of(too_many)["message"]


def test_the_sdk_retries_after_retry_after(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = server.service.driver
    check, refused = driver.check_room, list[float]()

    def full_twice(count: int = 1, warming: bool = False) -> None:
        if len(refused) < 2:
            refused.append(monotonic())
            raise QueueFullError(1, 0.3)
        check(count, warming)

    monkeypatch.setattr(driver, "check_room", full_twice)
    fields = {"model": "mini", "prompt": "Hi", "max_tokens": 1}
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="ask again in 1 s"):
            client.completions.create(**fields)
    with openai.OpenAI(base_url=url, api_key="none", max_retries=1) as client:
        client.completions.create(**fields)
    assert len(refused) == 2 and monotonic() - refused[1] >= 0.3  # as in Retry-After-Ms


def test_a_full_server_reads_no_body(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(server.service.driver), "limit", 0)
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/images/edits HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as client:
        # Of the body only a part is sent, and that of a foreign type.
        client.sendall(f"{head}Content-Type: text/plain\r\n\r\n".encode() + b"a" * 1000)
        answer = b""
        while b'"queue_full"' not in answer:
            more = client.recv(65_536)
            assert more
            answer += more
        assert answer.startswith(b"HTTP/1.1 429 ")
        # The connection is still good once the rest has come.
        client.sendall(b"a" * 99_000 + f"GET /ready HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")
    assert server.get("/v1/models").status_code == 200  # takes no room
    assert server.post("/tokenize", {"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_within_a_step(
    server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled() -> float:
        page = server.get("/metrics").text
        [line] = [line for line in page.splitlines() if "requests_cancelled_total{" in line]
        return float(line.split()[-1])

    def until(condition: Callable[[], bool]) -> None:
        end = monotonic() + 30
        while not condition():
            assert monotonic() < end
            sleep(0.005)

    driver, go, made, before = server.service.driver, Event(), 0, cancelled()
    assert isinstance(driver, Driver)
    step = driver._step

    def held_after_three(engine: Engine) -> None:
        nonlocal made
        if made == 3:
            go.wait(60)
        step(engine)
        made += 1

    monkeypatch.setattr(driver, "_step", held_after_three)
    body = {"messages": [{"role": "user", "content": "Draw a cat."}], "stream": stream, **LONG}
    text = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    try:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + text)
            until(lambda: made == 3)
            assert driver._num_admitted == 1
        until(lambda: driver._num_admitted == 0)  # the server has noticed it
    finally:
        go.set()
    server.wait_until_idle()
    assert made <= 5 and not driver.engine.used_blocks and cancelled() == before + 1
    assert server.chat("Name a fruit.", max_tokens=2).status_code == 200


@pytest.mark.slow
def test_a_thousand_disconnected_clients_leak_nothing(server: Running) -> None:
    url, driver = f"{server.url}/v1/chat/completions", server.service.driver
    body = {"messages": [{"role": "user", "content": "Draw a cat."}], "stream": True, **LONG}
    threads = threading.active_count()
    with httpx.Client(timeout=60) as client:
        for _ in range(1000):
            with client.stream("POST", url, json=body) as reply:
                assert reply.status_code == 200
    server.wait_until_idle()
    assert not driver._jobs and not driver._inbox and driver._num_admitted == 0
    assert not driver.engine.busy and threading.active_count() <= threads + 2
    assert server.chat("Name a fruit.", max_tokens=2).status_code == 200


def test_silent_streams_get_comments(server: Running, held: Event) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 2}
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply,
    ):
        lines = reply.iter_lines()
        comment = next(line for line in lines if line.startswith(":"))
        held.set()
        rest = list(lines)
    assert comment == ": keepalive" and rest[-2] == "data: [DONE]"


def test_a_bad_request_does_not_affect_concurrent_ones(server: Running) -> None:
    expected = mini().generate("Draw a cat.", "image", seed=1).message.images[0].codes
    # The last one fails in the engine, in the middle of a step.
    inside = {"allowed_words": ["a"], "bad_words": ["a"], "modalities": ["text"]}
    bad: list[dict[str, Any]] = [
        {"temperature": -1},
        {"messages": [{"role": "user", "content": "a " * 3000}]},
        {"seed": 2**64},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"stop": [""]},
        inside,
    ]

    def ask(fields: dict[str, Any]) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Draw a cat."}], **fields}
        # httpx refuses half characters, JSON does not.
        with httpx.Client(timeout=60) as client:
            return client.post(
                f"{server.url}/v1/chat/completions",
                content=json.dumps(body).encode(),
                headers={"content-type": "application/json"},
            )

    with ThreadPoolExecutor(8) as pool:
        good = pool.submit(ask, {"seed": 1, "modalities": ["image"]})
        statuses = [reply.status_code for reply in pool.map(ask, bad)]
    assert set(statuses) == {400}
    files = server.service.files
    url = good.result().json()["choices"][0]["message"]["images"][0]["image_url"]["url"]
    generated = files.generated(base64.b64decode(url.partition(",")[2]))
    assert generated is not None and (generated.codes == expected).all()


def test_a_broken_step_ends_its_requests_and_no_others(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.service.driver.engine
    step, broken = engine.step, [True]

    def fail() -> None:
        if broken:
            broken.pop()
            raise MemoryError("secret")
        step()

    monkeypatch.setattr(engine, "step", fail)
    reply = server.chat("Name a fruit.", max_tokens=2)
    assert reply.status_code == 503 and error_of(reply)["code"] == "engine_failed"
    assert reply.headers["retry-after"] == "1" and "secret" not in reply.text
    broken.append(True)
    streamed = events(server.chat("Name a fruit.", max_tokens=2, stream=True).text)
    assert streamed[-1][1]["error"]["code"] == "engine_failed"
    broken.append(True)
    body = {"input": "Name a fruit.", "stream": True}
    names = [event for event, _ in events(server.post("/v1/responses", body).text)]
    assert names[-2:] == ["error", "response.failed"]
    monkeypatch.undo()
    assert server.chat("Name a fruit.", max_tokens=2).status_code == 200
    assert server.get("/health").status_code == 200


def test_an_engine_that_keeps_failing_is_replaced(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = server.service.driver.engine

    def fail() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(broken, "step", fail)
    statuses = [server.chat("Name a fruit.", max_tokens=2).status_code for _ in range(4)]
    assert statuses == [503, 503, 503, 200]
    assert server.service.driver.engine is not broken
    assert server.get("/health").status_code == 200


def test_an_unexpected_error_is_a_500_without_internals(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.service, "check_model", fail)
    reply = server.chat("Hi")
    assert reply.status_code == 500 and error_of(reply)["type"] == "server_error"
    assert "secret" not in reply.text and reply.headers["x-request-id"]


def test_health_follows_the_heartbeat_of_the_engine(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.get("/health").json()["status"] == "ok"
    assert server.get("/ready").json() == {"ready": True}
    monkeypatch.setattr(server.service.driver, "failures", 3)
    assert "last steps failed" in server.get("/health").json()["reason"]
    monkeypatch.undo()
    monkeypatch.setattr("earlyfusion.serve.driver.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("earlyfusion.serve.app.STALE_SECONDS", 1.0)
    assert server.chat("Hi", max_tokens=2).status_code == 200
    sleep(1.2)
    assert server.get("/health").status_code == 200  # an idle engine is not stuck
    go = hold(server, monkeypatch)
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(server.chat, "Hi", max_tokens=2)
        end = monotonic() + 20
        while (health := server.get("/health")).status_code == 200:
            assert monotonic() < end
            sleep(0.05)
        assert "has made no step for" in health.json()["reason"]
        assert health.status_code == 503 and health.json()["engine_silent_seconds"] >= 1
        go.set()
        assert reply.result().status_code == server.get("/health").status_code == 200


def test_replies_do_not_wait_for_acknowledgements() -> None:
    with (
        closing(listener_of(ServeOptions(port=0))) as listener,
        closing(socket.create_connection(listener.getsockname())),
        closing(listener.accept()[0]) as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_metrics_count(server: Running) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = value("earlyfusion:images_done_total"), value("earlyfusion:request_success_total")
    server.chat("Draw a cat.", modalities=["image"])
    assert value("earlyfusion:images_done_total") == before[0] + 1
    assert value("earlyfusion:request_success_total") == before[1] + 1
    assert value("earlyfusion:num_requests_running") == 0
    assert value("earlyfusion:generation_tokens_total") > 66
    assert value('earlyfusion:http_errors_total{status="400"}') >= 0


def test_a_new_server_has_counted_nothing() -> None:
    with running() as server:
        lines = server.get("/metrics").text.splitlines()
    counted = [line for line in lines if "_total{" in line or "_count{" in line]
    assert counted and all(line.endswith(" 0.0") for line in counted)


def test_request_ids_come_back(server: Running) -> None:
    assert server.get("/v1/models", **{"x-request-id": "mine-1"}).headers["x-request-id"] == (
        "mine-1"
    )
    odd = server.get("/v1/models", **{"x-request-id": "no good {}"}).headers["x-request-id"]
    assert odd.startswith("req_")


def test_openapi_is_the_same_each_time_and_defines_what_it_refers_to(server: Running) -> None:
    first, second = (server.get("/openapi.json") for _ in range(2))
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', first.text))
    assert "ChatMessage" in named and named <= set(first.json()["components"]["schemas"])
    assert second.text == first.text


def test_openapi_describes_the_bodies(server: Running) -> None:
    described = server.get("/openapi.json").json()
    chat = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert "image_delivery" in chat["application/json"]["schema"]["properties"]
    assert "ChatMessage" in described["components"]["schemas"]


def test_slow_image_servers_delay_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    go = Event()

    def fetch_image(url: str, seconds: float) -> bytes:
        assert go.wait(60) and seconds <= 30
        return STRAWBERRY.read_bytes()

    monkeypatch.setattr("earlyfusion.serve.prompts.fetch_image", fetch_image)

    def ask(address: str) -> int:
        part = {"type": "image_url", "image_url": {"url": address}}
        return server.chat([{"role": "user", "content": [part]}], max_tokens=2).status_code

    with running(allow_image_urls=True) as server, ThreadPoolExecutor() as pool:
        slow = [pool.submit(ask, "http://slow.example/a.png") for _ in range(4)]
        other = pool.submit(ask, data_url())
        try:
            assert other.result(timeout=20) == 200
            assert not any(each.done() for each in slow)
        finally:
            go.set()
        assert [each.result(timeout=60) for each in slow] == [200] * 4


# --- who may ask ---


def test_only_this_machine_without_keys(server: Running) -> None:
    assert server.get("/v1/models", host="evil.example").status_code == 403
    assert server.get("/v1/models", host="localhost:1").status_code == 200
    assert "access-control-allow-origin" not in server.get("/v1/models", origin="http://a").headers


def test_web_pages_of_other_servers_send_no_forms(server: Running) -> None:
    def upload(server: Running, origin: str) -> int:
        files = {"file": ("a.png", STRAWBERRY.read_bytes())}
        headers = {"origin": origin}
        return httpx.post(f"{server.url}/v1/files", files=files, headers=headers).status_code

    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        assert upload(server, origin) == 403
    assert upload(server, server.url) == 200
    with running(cors_origins=("http://page.example",)) as friendly:
        assert upload(friendly, "http://page.example") == 200
        assert upload(friendly, "http://evil.example") == 403
    with running(cors_origins=("*",)) as open_to_all:
        assert upload(open_to_all, "http://evil.example") == 200
    with running(public_url="https://pictures.example") as public:
        assert upload(public, "https://pictures.example") == 200


def test_keys_cors_and_deadlines() -> None:
    with running(
        api_keys=("another-key", KEY), cors_origins=("http://page.example",), timeout=0.02
    ) as server:
        for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": KEY}):
            reply = server.get("/v1/models", **wrong)
            assert reply.status_code == 401 and error_of(reply)["type"] == "authentication_error"
        right = {"authorization": f"Bearer {KEY}"}
        assert server.get("/v1/models", **right).status_code == 200
        assert server.get("/metrics").status_code == 401
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        body = {"prompt": "Draw a cat.", "response_format": "url", "n": 1}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        file = {"file": ("a.png", STRAWBERRY.read_bytes())}
        with httpx.Client() as client:
            number = client.post(f"{server.url}/v1/files", files=file, headers=right).json()["id"]
        # A signed address needs no key: a page shows the image by it.
        signed = server.service.files.url(number, "")
        assert server.get(signed).status_code == 200
        assert server.get(signed[:-1] + "-").status_code == 401
        preflight = {"origin": "http://page.example", "access-control-request-method": "POST"}
        preflight["access-control-request-headers"] = (
            "authorization, x-stainless-lang"  # of OpenAI's
        )
        with httpx.Client() as client:
            answer = client.options(f"{server.url}/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://page.example"
        late = server.post("/v1/images/generations", body | {"n": 10}, **right)
        assert late.status_code == 504 and error_of(late)["code"] == "timeout"
        server.wait_until_idle()


# --- the end ---


def test_a_stopping_server_finishes_running_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(drain_seconds=30) as ending:
        driver, held = ending.service.driver, hold(ending, monkeypatch)
        replies: list[httpx.Response] = []
        asking = Thread(target=lambda: replies.append(ending.chat("Name a fruit.", max_tokens=4)))
        asking.start()
        while not driver.waiting:
            sleep(0.01)
        driver.draining = True
        assert ending.get("/ready").status_code == 503
        reply = ending.chat("Hi")
        assert reply.status_code == 503 and error_of(reply)["code"] == "not_ready"
        held.set()
    asking.join(timeout=30)
    assert replies[0].status_code == 200


def test_a_taken_port_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from earlyfusion.serve.options import ServeOptions
    from earlyfusion.serve.run import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = rf"cannot listen on 127\.0\.0\.1 port {port} \(Address already in use\): choose"
        with pytest.raises(SettingError, match=words):
            serve(mini(), ServeOptions(port=port))
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "there is no API key" in capsys.readouterr().err


def test_the_command_serves_and_finishes_its_replies_on_sigterm() -> None:
    process = _started()
    assert process.stdout is not None
    url = process.stdout.readline().split()[4]
    body = {"messages": [{"role": "user", "content": "Draw a cat."}], "stream": True, **LONG}
    body["max_images"] = 3

    def status_of_another() -> int:
        fields = {"prompt": "Name a fruit.", "max_tokens": 1}
        try:
            reply = httpx.post(f"{url}/completions", json=fields, timeout=60)
        except httpx.TransportError:  # the server no longer listens
            return 503
        return reply.status_code

    try:
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{url}/chat/completions", json=body) as reply,
        ):
            lines = reply.iter_lines()
            first = next(lines)
            assert status_of_another() == reply.status_code == 200
            process.send_signal(signal.SIGTERM)
            end = monotonic() + 30
            while status_of_another() != 503:
                assert monotonic() < end
            rest = list(lines)
        _, logged = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    *deltas, last, done = [event for _, event in events("\n".join([first, *rest]))]
    assert done == "[DONE]" and last["choices"][0]["finish_reason"] in ("stop", "length")
    images = [one for event in deltas for one in event["choices"][0]["delta"].get("images", ())]
    assert len(images) == 3
    assert '"path": "/v1/chat/completions", "status": 200' in logged and "a cat" not in logged


def _started(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "earlyfusion", "serve", "--port", "0", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_while_the_model_loads() -> None:
    process = _started()
    end = monotonic() + 60
    while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
        assert monotonic() < end
        sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout, logged = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, "")
    assert logged == "stopped before the server was ready\n"


def test_sigterm_amid_the_imports() -> None:
    code = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder)
sys.argv = ["earlyfusion", "serve", "--port", "0"]
runpy.run_module("earlyfusion", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


@pytest.mark.parametrize("signals", [2, 3])
def test_a_second_signal_cancels_running_requests(signals: int) -> None:
    process = _started()
    assert process.stdout is not None
    url = process.stdout.readline().split()[4]
    body = {"messages": [{"role": "user", "content": "Draw a red apple."}], "n": 4, "seed": 1}
    ends: list[str] = []

    def ask(stream: bool) -> None:
        fields = body | {"stream": stream, "modalities": ["image"]}
        with httpx.Client(timeout=60) as client, suppress(httpx.HTTPError):
            ends.append(client.post(f"{url}/chat/completions", json=fields).text)

    threads = [Thread(target=ask, args=(number % 2 == 0,)) for number in range(24)]
    for thread in threads:
        thread.start()
    with httpx.Client(timeout=60) as client:
        metrics = url.removesuffix("/v1") + "/metrics"
        while 'requests_running{model_name="mini"} 0.0' in client.get(metrics).text:
            sleep(0.01)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        sleep(0.05)
    _, logged = process.communicate(timeout=60)
    for thread in threads:
        thread.join()
    assert process.returncode in ((0,) if signals == 2 else (0, 130))
    assert "Traceback" not in logged
    if signals == 2:
        assert any("not_ready" in end for end in ends)
