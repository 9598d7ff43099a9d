"""Several engines behind one server."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic, sleep
from typing import Any

import pytest
from serve_case import Running, answer, mini, pixels, running

from earlyfusion.cli import main
from earlyfusion.errors import SettingError
from earlyfusion.serve.driver import Driver, NotReadyError, QueueFullError
from earlyfusion.serve.process import RemoteEngine
from earlyfusion.serve.replicas import Replicas
from earlyfusion.serve.spawn import LoadPlan, start

DRAWING: dict[str, Any] = {"modalities": ["image"], "max_images": 8, "seed": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    plans = [LoadPlan("mini", dtype="fp32", replica=n, replicas=2) for n in range(2)]
    children = [start(plan) for plan in plans]
    remotes = [
        RemoteEngine(partial(start, plan), 60, child)
        for plan, child in zip(plans, children, strict=True)
    ]
    try:
        with running(remotes, max_queue=9) as server:
            yield server
    finally:
        for remote in remotes:
            remote.close()


def drivers_of(server: Running) -> list[Driver]:
    assert isinstance(server.service.driver, Replicas)
    return list(server.service.driver.drivers)


def pids(server: Running) -> list[int]:
    return [driver.remote.pid for driver in drivers_of(server) if driver.remote is not None]


def until(condition: Any) -> None:
    end = monotonic() + 60
    while not condition():
        assert monotonic() < end
        sleep(0.01)


def test_requests_spread_and_replies_are_those_of_generate(server: Running) -> None:
    with ThreadPoolExecutor(8) as pool:
        image_futures = [pool.submit(server.chat, "Draw a cat.", **DRAWING) for _ in range(4)]
        until(lambda: server.service.driver.running == 4)
        assert [driver.running for driver in drivers_of(server)] == [2, 2]
        text_futures = [
            pool.submit(server.chat, "Name a fruit.", modalities=["text"], seed=seed)
            for seed in range(4)
        ]
        texts = [one.result().json()["choices"][0]["message"]["content"] for one in text_futures]
        images = [one.result().json()["choices"][0]["message"]["images"] for one in image_futures]
    assert texts == [answer("Name a fruit.", "text", seed).text for seed in range(4)]
    first = mini().generate("Draw a cat.", "image", seed=0, max_images=8).images[0]
    assert all(pixels(one[0]["image_url"]["url"]).tobytes() == first.tobytes() for one in images)
    page = server.get("/metrics").text
    assert 'earlyfusion:engines_ready{model_name="mini"} 2.0' in page


def test_stored_responses_serve_any_engine(server: Running) -> None:
    body = {"input": "Draw a cat.", "tools": [{"type": "image_generation"}], "seed": 0}
    first = server.post("/v1/responses", body | {"tool_choice": "required"}).json()
    item = first["output"][0]
    file = f"file-{item['id'].removeprefix('ig_')}"
    assert server.get(f"/v1/files/{file}").status_code == 200
    follow = {"previous_response_id": first["id"], "input": "What is this?", "seed": 1}
    with ThreadPoolExecutor(8) as pool:  # at once, so that both engines are asked
        futures = [pool.submit(server.post, "/v1/responses", follow) for _ in range(4)]
        texts = [one.result().json()["output"][0]["content"][0]["text"] for one in futures]
    assert len(set(texts)) == 1


def test_an_engine_that_is_lost_is_started_alone(server: Running) -> None:
    before = pids(server)
    with ThreadPoolExecutor(8) as pool:
        image_futures = [pool.submit(server.chat, "Draw a cat.", **DRAWING) for _ in range(4)]
        until(lambda: server.service.driver.running == 4)
        os.kill(before[0], signal.SIGKILL)
        statuses = sorted(one.result().status_code for one in image_futures)
    assert statuses == [200, 200, 503, 503]
    reply = server.chat("Name a fruit.", modalities=["text"], seed=0)  # by the other one
    assert reply.status_code == 200 and server.get("/health").status_code == 200
    until(lambda: server.service.driver.engines_ready == 2)
    after = pids(server)
    assert after[0] != before[0] and after[1] == before[1]
    assert server.service.driver.restarts == 1 and server.service.driver.waiting == 0


def test_a_server_is_stuck_when_all_its_engines_are(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> list[float]:
        name = r'^earlyfusion:engine_silent_seconds{engine="\d",model_name="mini"} (.*)$'
        return [float(value) for value in re.findall(name, server.get("/metrics").text, re.M)]

    monkeypatch.setattr("earlyfusion.serve.driver.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("earlyfusion.serve.app.STALE_SECONDS", 1.0)
    monkeypatch.setattr("earlyfusion.serve.replicas.STALE_SECONDS", 1.0)
    first, second = pids(server)
    with ThreadPoolExecutor() as pool:
        try:
            drawing = pool.submit(server.chat, "Draw a cat.", **DRAWING)
            until(lambda: drivers_of(server)[0].running == 1)
            os.kill(first, signal.SIGSTOP)
            until(lambda: silent()[0] > 1.5)
            assert silent()[1] < 1 and server.get("/health").status_code == 200
            # The stuck engine has less work than the other one would get.
            batches = [server.service.driver.admit(1) for _ in range(3)]
            assert [driver.waiting for driver in drivers_of(server)] == [0, 3]
            for batch in batches:
                batch.close()
            os.kill(second, signal.SIGSTOP)
            naming = pool.submit(server.chat, "Name a fruit.", max_tokens=2)
            until(lambda: server.get("/health").status_code == 503)
            assert "has made no step for" in server.get("/health").json()["reason"]
        finally:
            os.kill(first, signal.SIGCONT)
            os.kill(second, signal.SIGCONT)
        assert drawing.result().status_code == naming.result().status_code == 200
    assert server.get("/health").status_code == 200


def test_the_room_of_the_queue_is_shared(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers, replicas = drivers_of(server), server.service.driver
    assert isinstance(replicas, Replicas) and [one.max_queue for one in drivers] == [5, 5]
    monkeypatch.setattr(Driver, "limit", 2)
    batches = [replicas.admit(1) for _ in range(4)]
    assert [driver.waiting for driver in drivers] == [2, 2]
    for ask in (replicas.admit, replicas.check_room):
        with pytest.raises(QueueFullError, match="4 requests"):
            ask(1)
    batches.pop().close()
    replicas.check_room()
    replicas.admit(1).close()
    with pytest.raises(QueueFullError):
        replicas.admit(2)  # the choices of one request go to one engine
    for batch in batches:
        batch.close()
    for driver in drivers:
        monkeypatch.setattr(driver, "ready", False)
    with pytest.raises(NotReadyError):
        replicas.admit(1)
    with pytest.raises(NotReadyError):
        replicas.check_room()
    assert server.get("/ready").status_code == 503


def test_wrong_numbers_are_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("0", "1000"):
        assert main(["serve", "--port", "0", "--replicas", number]) == 2
        assert f"replicas={number} is not possible" in capsys.readouterr().err
    assert main(["serve", "--port", "0", "--replicas", "2", "--model", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("EARLYFUSION_COPY_WEIGHTS", "0")  # set by the replicas' processes
    with pytest.raises(SettingError, match="need a GPU each"):
        LoadPlan(device="cuda", replicas=2).load()


def test_without_ray_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["serve", "--port", "0", "--replicas", "2", "--ray"]) == 2
    assert "pip install 'earlyfusion[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_engines_on_ray_give_the_same_replies_and_are_started_again() -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from earlyfusion.serve.on_ray import starter

    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    with pytest.raises(SettingError, match="replicas=3 need a CPU each"):
        starter(3)
    begin, plan = starter(2), LoadPlan("mini", dtype="fp32")
    children = [begin(plan) for _ in range(2)]
    remotes = [RemoteEngine(partial(begin, plan), 60, child) for child in children]
    try:
        with running(remotes) as server, ThreadPoolExecutor(8) as pool:
            image_futures = [pool.submit(server.chat, "Draw a cat.", **DRAWING) for _ in range(4)]
            until(lambda: [driver.running for driver in drivers_of(server)] == [2, 2])
            children[0][0].kill()
            assert sorted(one.result().status_code for one in image_futures) == [200, 200, 503, 503]
            until(lambda: server.service.driver.engines_ready == 2)
            text_futures = [
                pool.submit(server.chat, "Name a fruit.", modalities=["text"], seed=seed)
                for seed in range(4)
            ]
            texts = [
                one.result().json()["choices"][0]["message"]["content"] for one in text_futures
            ]
        assert texts == [answer("Name a fruit.", "text", seed).text for seed in range(4)]
    finally:
        for remote in remotes:
            remote.close()
        ray.shutdown()
