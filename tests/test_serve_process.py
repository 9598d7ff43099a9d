"""The engine in a process of its own: the same replies, and a server that outlives it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, cast

import httpx
import idle_child
import pytest
from serve_case import Running, answer, data_url, events, mini, pixels, running

from earlyfusion.api import Chameleon
from earlyfusion.cli import main
from earlyfusion.content import Message
from earlyfusion.engine.cache import CacheSize
from earlyfusion.errors import CheckpointError
from earlyfusion.serve.process import Child, EngineInfo, RemoteEngine
from earlyfusion.serve.spawn import LoadPlan, start
from earlyfusion.vocabulary import Vocabulary

IMAGES_ONLY: dict[str, Any] = {"modalities": ["image"], "max_images": 8, "seed": 0}


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
    reply = server.post("/v1/images/generations", {"prompt": "Draw a red apple.", "seed": 3})
    assert pixels(reply.json()["data"][0]["b64_json"]) == expected.images[0]
    with ThreadPoolExecutor(8) as pool:
        requests = [
            pool.submit(server.chat, "Name a fruit.", modalities=["text"], seed=seed)
            for seed in range(8)
        ]
        texts = [text_of(one.result()) for one in requests]
    assert texts == [answer("Name a fruit.", "text", seed).text for seed in range(8)]
    streamed = events(server.chat("Name a fruit.", modalities=["text"], seed=5, stream=True).text)
    deltas = [event["choices"][0]["delta"].get("content", "") for _, event in streamed[:-1]]
    assert "".join(deltas) == texts[5]


def test_images_are_decoded_in_a_process_that_may_end(server: Running) -> None:
    expected = [answer("Draw a red apple.", "image", seed).images[0] for seed in (3, 4, 5)]
    body, decoder = {"prompt": "Draw a red apple."}, server.service.decoder

    def generate_image(seed: int) -> Any:
        reply = server.post("/v1/images/generations", body | {"seed": seed})
        return pixels(reply.json()["data"][0]["b64_json"])

    def wait_for_process() -> list[BaseProcess]:
        end = monotonic() + 60
        while not decoder.has_process:
            assert monotonic() < end
            sleep(0.02)
        return [child for child in active_children() if child.name != "engine"]

    assert generate_image(3) == expected[0]  # which starts the process
    [first] = wait_for_process()
    assert generate_image(4) == expected[1]
    first.kill()
    first.join()
    assert generate_image(5) == expected[2]  # by a thread, or by the next process
    data = server.post("/v1/images/generations", body | {"seed": 3}).json()["data"][0]["b64_json"]
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    turns = [{"role": "user", "content": [part]}]
    tokens = server.post("/tokenize", {"messages": turns}).json()["tokens"]
    codes = answer("Draw a red apple.", "image", 3).segments
    assert tokens == list(mini().request([Message("user", codes)], "text", max_tokens=1).ids)
    [second] = wait_for_process()
    assert second.pid != first.pid


@pytest.mark.parametrize(("threads", "left"), [(8, 2), (2, 1)])
def test_images_are_decoded_on_a_quarter_of_the_cores(threads: int, left: int) -> None:
    code = (
        "import socket, torch\n"
        "from earlyfusion.serve import decoder\n"
        "ours, theirs = socket.socketpair()\n"
        "ours.close()\n"  # the server has ended, and so does the decoder
        f"torch.set_num_threads({threads})\n"
        "decoder._run(theirs, None)\n"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (f"{left}\n", 0), done.stderr


def test_images_are_read_in_the_servers_process(server: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url()}}
    words = [part, {"type": "text", "text": "What is this?"}]
    reply = server.chat([{"role": "user", "content": words}], modalities=["text"], seed=0)
    with_codes = mini().generate([pixels(data_url()), "What is this?"], "text", seed=0)
    assert text_of(reply) == with_codes.text


def test_mistakes_are_reported_before_a_stream_begins(server: Running) -> None:
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
        monkeypatch.setattr(remote, "step_timeout", 1.0)
    with ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(server.chat, "Draw a cat.", **IMAGES_ONLY) for _ in range(3)]
        stream = pool.submit(server.chat, "Draw a cat.", stream=True, **IMAGES_ONLY)
        while server.service.driver.running < 4:
            sleep(0.005)
        os.kill(before, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        for failed in (one.result() for one in requests):
            assert failed.status_code == 503 and "retry-after" in failed.headers
            assert failed.json()["error"]["code"] == "engine_failed"
        last = events(stream.result().text)[-1][1]
        assert last["error"]["code"] == "engine_failed"
    response = server.chat("Hi")  # the new one is still loading
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    monkeypatch.undo()
    wait_until_ready(server)
    assert remote.pid != before
    reply = server.chat("Name a fruit.", modalities=["text"], seed=1)
    assert text_of(reply) == answer("Name a fruit.", "text", 1).text
    assert server.get("/health").status_code == 200
    page = server.get("/metrics").text.splitlines()
    [restarts] = [line for line in page if line.startswith("earlyfusion:engine_restarts{")]
    assert float(restarts.split()[-1]) >= 1
    assert server.service.driver.waiting == server.service.driver.running == 0


def test_requests_wait_for_room_in_the_socket_to_the_engine(server: Running) -> None:
    remote = remote_of(server)
    large = {"type": "json_schema", "json_schema": {"schema": {"description": "a" * 90_000}}}
    body: dict[str, Any] = {"response_format": large, "modalities": ["text"], "max_tokens": 2}
    with ThreadPoolExecutor(8) as pool:
        os.kill(remote.pid, signal.SIGSTOP)
        try:
            requests = [pool.submit(server.chat, "Hi", **body) for _ in range(8)]
            sleep(2)  # until the socket is full
        finally:
            os.kill(remote.pid, signal.SIGCONT)
        assert [one.result().status_code for one in requests] == [200] * len(requests)
    assert os.get_blocking(remote.fileno())


def test_an_idle_engine_that_is_lost_is_noticed(server: Running) -> None:
    before = remote_of(server).pid
    os.kill(before, signal.SIGKILL)
    end = monotonic() + 30
    while remote_of(server).pid == before:
        assert monotonic() < end
        sleep(0.05)
    wait_until_ready(server)
    assert server.chat("Hi", max_tokens=2).status_code == 200


def test_an_engine_that_was_started_again_is_healthy_at_once(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earlyfusion.serve.app.STALE_SECONDS", 0.3)  # which starting takes
    os.kill(remote_of(server).pid, signal.SIGKILL)
    while server.service.driver.ready:
        sleep(0.001)
    while not server.service.driver.ready:
        sleep(0.001)
    assert server.get("/health").status_code == 200


def test_broken_files_and_files_of_another_model_are_reported(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, remote = server.service.driver, remote_of(server)
    other = copy.copy(server.service.model)
    other.processor = copy.copy(other.processor)
    other.processor.vocabulary = Vocabulary(other.processor.vocabulary.names | {"new": 9999})
    hellos: dict[str, Any] = {
        "does not start again": CheckpointError("model.safetensors is cut short"),
        "files are not those": replace(remote.info, model=other),
    }
    before = remote.pid
    for words, hello in hellos.items():  # the second at an attempt that the driver makes by itself
        monkeypatch.setattr(remote, "_spawn", partial(idle, pickle.dumps(hello)))
        if remote.pid == before and not driver.start_error:
            os.kill(before, signal.SIGKILL)
        end = monotonic() + 30
        while words not in driver.start_error:
            assert monotonic() < end
            sleep(0.01)
        health = server.get("/health")
        assert health.status_code == 503 and words in health.json()["reason"]
        assert server.get("/ready").status_code == 503
        response = server.chat("Hi")
        assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"
        assert words in response.json()["error"]["message"] and "retry-after" in response.headers
        assert driver.restarts < 20
    monkeypatch.undo()
    wait_until_ready(server)
    assert server.get("/health").status_code == 200 and not driver.start_error
    reply = server.chat("Name a fruit.", modalities=["text"], seed=1)
    assert text_of(reply) == answer("Name a fruit.", "text", 1).text


def idle(hello: bytes) -> Child:
    """A child that says hello and waits."""
    context = get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=idle_child.run, args=(child_end, hello), daemon=True)
    process.start()
    child_end.close()
    return process, parent_end


class Held(NamedTuple):
    """What a process holds."""

    threads: int
    files: int
    bytes: int

    @classmethod
    def by(cls, pid: int) -> Held:
        with open(f"/proc/{pid}/statm") as file:
            pages = int(file.read().split()[1])
        counts = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("task", "fd"))
        return cls(*counts, pages * resource.getpagesize())


def leave(server: Running, number: int) -> None:
    """Ask, and leave: at once, with the first token, while the reply is made, or in an image."""
    url = f"{server.url}/v1/chat/completions"
    prompt = f"Draw {number} cats." if number % 2 else "Tell me of fruit."
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], **IMAGES_ONLY}
    body["max_images"] = 2
    with httpx.Client(timeout=60) as client:
        if number % 4 == 0:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url, json=body, timeout=0.01)
            return
        with client.stream("POST", url, json=body | {"stream": True}) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            for _ in range(number % 4 - 1):
                next(lines)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_disconnected_clients_leak_nothing(count: int) -> None:
    # A small cache is full of old prefixes before the count begins, and takes no more memory.
    plan = LoadPlan("mini", dtype="fp32", cache_bytes=27_000_000)
    remote = RemoteEngine(partial(start, plan), step_timeout=60)
    with running(remote) as server, ThreadPoolExecutor(4) as pool:
        driver, pids = server.service.driver, (os.getpid(), remote.pid)

        def held_after(count: int) -> list[Held]:
            list(pool.map(partial(leave, server), range(count)))
            server.wait_until_idle()
            end = monotonic() + 30
            # An idle child's last message is read within a second, and the driver's thread may not
            # have seen yet that the last client has left.
            while remote.used_blocks or driver._inbox or driver._jobs:
                assert monotonic() < end
                sleep(0.05)
            assert not driver._jobs and not driver._inbox and not driver._undelivered
            assert driver._num_admitted == 0 and not driver._batches and not remote._handles
            return [Held.by(pid) for pid in pids]

        rounds = [held_after(max(60, count // 2))]
        # Memory grows until both processes have seen their largest crowd, at no fixed round; a leak
        # grows in every round, or at last when it has filled what was free within the process.
        while len(rounds) < 3 or any(
            new.bytes > 1.005 * old.bytes for old, new in zip(rounds[-3], rounds[-1], strict=True)
        ):
            assert len(rounds) < 12, rounds
            rounds.append(held_after(count))
        for old, new in zip(rounds[0], rounds[-1], strict=True):
            assert new.threads <= old.threads and new.files <= old.files + 2
        assert server.chat("Name a fruit.", max_tokens=2).status_code == 200


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads Linux's /proc")
def test_twenty_restarts_leave_no_file_open() -> None:
    info = EngineInfo(mini(), 100, CacheSize(1, 32), 4)
    spawn = partial(idle, pickle.dumps(replace(info, model=cast(Chameleon, None))))
    RemoteEngine(spawn, step_timeout=60).close()  # opens what Python's own helper needs
    files = Held.by(os.getpid()).files
    remote = RemoteEngine(spawn, step_timeout=60)
    for _ in range(20):
        remote.close()
        assert remote.start() == remote.info
    assert remote.alive and Held.by(os.getpid()).files <= files + 3  # of one child
    remote.close()
    remote.close()
    del remote
    assert Held.by(os.getpid()).files == files


def test_the_childs_log_is_json(capfd: pytest.CaptureFixture[str]) -> None:
    process, connection = start(LoadPlan("mini", dtype="fp32"))
    assert isinstance(connection.recv(), EngineInfo)
    connection.send((0, "no request"))
    connection.send(("nothing",))  # ends the loop
    process.join(30)
    assert process.exitcode == 1
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["level"], line["process"]) for line in lines] == [("error", "engine")]
    assert "ValueError" in lines[0]["error"]


def test_bad_weights_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError):
        RemoteEngine(partial(start, LoadPlan(str(tmp_path))), step_timeout=60)
    assert main(["serve", "--port", "0", "--model", str(tmp_path)]) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr and str(tmp_path) in stderr
