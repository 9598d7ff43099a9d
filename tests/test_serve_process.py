"""The engine in a process of its own: the same replies, and a server that outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from serve_case import Running, answer, data_url, events, mini, pixels, running

from earlyfusion.cli import main
from earlyfusion.errors import CheckpointError
from earlyfusion.serve.process import RemoteEngine
from earlyfusion.serve.spawn import LoadPlan, start

DRAWING: dict[str, Any] = {"modalities": ["image"], "max_images": 8, "seed": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    remote = RemoteEngine(partial(start, LoadPlan("mini", dtype="fp32")), step_timeout=60)
    try:
        with running(remote) as server:
            yield server
    finally:
        remote.close()


def remote_of(server: Running) -> RemoteEngine:
    remote = server.service.driver.remote
    assert remote is not None
    return remote


def wait_until_ready(server: Running) -> None:
    end = monotonic() + 60
    while server.get("/ready").status_code != 200:
        assert monotonic() < end
        sleep(0.05)


def text_of(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def test_replies_are_those_of_generate(server: Running) -> None:
    expected = answer("Draw a red apple.", "image", 3)
    drawn = server.post("/v1/images/generations", {"prompt": "Draw a red apple.", "seed": 3})
    assert pixels(drawn.json()["data"][0]["b64_json"]) == expected.images[0]
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(server.chat, "Name a fruit.", modalities=["text"], seed=seed)
            for seed in range(8)
        ]
        texts = [text_of(one.result()) for one in asked]
    assert texts == [answer("Name a fruit.", "text", seed).text for seed in range(8)]
    streamed = events(server.chat("Name a fruit.", modalities=["text"], seed=5, stream=True).text)
    deltas = [event["choices"][0]["delta"].get("content", "") for _, event in streamed[:-1]]
    assert "".join(deltas) == texts[5]


def test_pictures_are_read_in_the_servers_process(server: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url()}}
    words = [part, {"type": "text", "text": "What is this?"}]
    said = server.chat([{"role": "user", "content": words}], modalities=["text"], seed=0)
    with_codes = mini().generate([pixels(data_url()), "What is this?"], "text", seed=0)
    assert text_of(said) == with_codes.text


def test_mistakes_are_told_before_a_stream_begins(server: Running) -> None:
    reply = server.chat("a " * 3000, stream=True)
    assert reply.status_code == 400
    inside = {"allowed_words": ["a"], "bad_words": ["a"], "modalities": ["text"]}
    assert server.chat("Hi", **inside).status_code == 400
    assert server.chat("Hi", max_tokens=2).status_code == 200


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_engine_that_is_lost_is_started_again(
    server: Running, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, before = remote_of(server), remote_of(server).pid
    if how == "stopped":
        monkeypatch.setattr(remote, "_step_timeout", 1.0)
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(server.chat, "Draw a cat.", **DRAWING) for _ in range(3)]
        stream = pool.submit(server.chat, "Draw a cat.", stream=True, **DRAWING)
        while server.service.driver.running < 4:
            sleep(0.005)
        os.kill(before, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        for reply in (one.result() for one in whole):
            assert reply.status_code == 503 and "retry-after" in reply.headers
            assert reply.json()["error"]["code"] == "engine_failed"
        last = events(stream.result().text)[-1][1]
        assert last["error"]["code"] == "engine_failed"
    refused = server.chat("Hi")  # the new one is still loading
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    monkeypatch.undo()
    wait_until_ready(server)
    assert remote.pid != before
    said = server.chat("Name a fruit.", modalities=["text"], seed=1)
    assert text_of(said) == answer("Name a fruit.", "text", 1).text
    assert server.get("/health").status_code == 200
    page = server.get("/metrics").text.splitlines()
    [restarts] = [line for line in page if line.startswith("earlyfusion:engine_restarts{")]
    assert float(restarts.split()[-1]) >= 1
    assert server.service.driver.waiting == server.service.driver.running == 0


def test_an_idle_engine_that_is_lost_is_noticed(server: Running) -> None:
    before = remote_of(server).pid
    os.kill(before, signal.SIGKILL)
    end = monotonic() + 30
    while remote_of(server).pid == before:
        assert monotonic() < end
        sleep(0.05)
    wait_until_ready(server)
    assert server.chat("Hi", max_tokens=2).status_code == 200


def test_clients_that_leave_free_the_engine(server: Running) -> None:
    remote = remote_of(server)
    body = {"messages": [{"role": "user", "content": "Draw a cat."}], "stream": True, **DRAWING}
    files = len(os.listdir(f"/proc/{os.getpid()}/fd"))
    with httpx.Client(timeout=60) as client:
        for _ in range(20):
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
                assert reply.status_code == 200
    server.wait_until_idle()
    assert not remote.busy and len(os.listdir(f"/proc/{os.getpid()}/fd")) <= files + 4


def test_bad_weights_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError):
        RemoteEngine(partial(start, LoadPlan(str(tmp_path))), step_timeout=60)
    assert main(["serve", "--port", "0", "--model", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and str(tmp_path) in told
