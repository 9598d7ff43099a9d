"""Adapters by name: beside each other in one engine, and as models of a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from corpora import tiny_model
from serve_case import Running, mini, pixels, running
from tiny import make_request
from torch import nn

from earlyfusion import Chameleon
from earlyfusion.checkpoints.adapter import LowRank, save_adapter
from earlyfusion.cli import main
from earlyfusion.engine import runner
from earlyfusion.engine.backends import cpu
from earlyfusion.engine.backends import torch as torch_backend
from earlyfusion.engine.backends.adapters import MultiAdapter
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.static.bursts import Bursts
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.generation.reference import generate_tokens
from earlyfusion.generation.request import Request
from earlyfusion.model.transformer import Transformer
from earlyfusion.serve.process import RemoteEngine
from earlyfusion.serve.spawn import LoadPlan, start

NAMES = ("", "one", "two")


def adapter(folder: Path, model: Transformer, seed: int, only: str = "proj", rank: int = 3) -> Path:
    """Random adapters of the layers of a model that have `only` in their names."""
    source = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(
            torch.randn(rank, layer.in_features, generator=source) / layer.in_features**0.5,
            torch.randn(layer.out_features, rank, generator=source) / rank**0.5,
            0.3,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and only in name
    }
    save_adapter(folder, layers, "base")
    return folder


# --- in one engine ---------------------------------------------------------------------------


@pytest.fixture(params=["compiled", "torch", "fused in place", "static"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled step, where there is a compiler, and without; then also with parameters
    that become views of fused ones, and in static steps, as on a GPU."""
    monkeypatch.setattr(runner, "uses_bursts", lambda _: request.param == "static")
    if request.param != "compiled":
        monkeypatch.setattr(cpu, "available", lambda: False)
        in_place = request.param in ("fused in place", "static")
        monkeypatch.setattr(torch_backend, "fits_second_copy", lambda _: not in_place)
    elif not cpu.available():
        pytest.skip("no C++ compiler here")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, model = tmp_path_factory.mktemp("adapters"), Chameleon.load(base, "cpu").transformer
    return {
        "one": adapter(place / "one", model, 1),
        "two": adapter(place / "two", model, 2, "v_proj"),  # other layers are the model's own
    }


def mixed(model: Chameleon) -> list[Request]:
    """Requests of which three each differ in the adapter only: they begin alike."""
    one = model.processor
    requests = [
        make_request(one, 0, "text", max_tokens=40),
        make_request(one, 1, "image"),
        make_request(one, 5, "image", with_image=True, jacobi=3, negative_prompt="a pear"),
        make_request(
            one, 2, "text", with_image=True, max_tokens=40, temperature=0, prompt_lookup=4
        ),
    ]
    return [replace(each, adapter=name) for each in requests for name in NAMES]


def run(engine: Engine, requests: Sequence[Request], apart: int = 0) -> list[list[int]]:
    """The tokens of each; one joins every `apart` steps."""
    handles: list[Handle] = []
    for each in requests:
        handles.append(engine.add(each))
        for _ in range(apart):
            engine.step()
    while engine.busy:
        engine.step()
    return [handle.tokens for handle in handles]


@pytest.fixture(scope="module")
def expected(base: Path, folders: dict[str, Path], device: torch.device) -> list[list[int]]:
    """What the reference loop generates with the merged models."""
    alone = {n: Chameleon.load(base, str(device), "fp32", adapter=folders.get(n)) for n in NAMES}
    tokens = [
        list(generate_tokens(alone[one.adapter].transformer, alone[""].processor, one))
        for one in mixed(alone[""])
    ]
    assert len({tuple(row) for row in tokens}) == len(tokens)
    return tokens


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_requests_side_by_side_get_the_replies_of_the_merged_models(
    base: Path,
    folders: dict[str, Path],
    expected: list[list[int]],
    dtype: str,
    device: torch.device,
) -> None:
    model = Chameleon.load(base, str(device), dtype, adapters=folders)
    requests = mixed(model)
    if dtype == "int8":  # rounded weights are compared with engines of their own
        alone = {n: Chameleon.load(base, str(device), dtype, adapter=folders.get(n)) for n in NAMES}
        expected = [run(alone[r.adapter].engine, [replace(r, adapter="")])[0] for r in requests]
    assert run(model.engine, requests) == expected
    # Again in another order, one after the other: now the cache holds prefixes of all of them.
    assert run(model.engine, requests[::-1], 1000 if dtype == "fp32" else 3) == expected[::-1]


def test_one_burst_samples_for_several_adapters(
    base: Path,
    folders: dict[str, Path],
    expected: list[list[int]],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each group by the weights of its own adapter, several tokens at a time."""
    monkeypatch.setattr(runner, "uses_bursts", lambda _: True)
    model, bursts = (
        Chameleon.load(base, str(device), "fp32", adapters=folders),
        set[tuple[int, int]](),
    )
    sample = Bursts.sample

    def recorded(self: Bursts, handles: Sequence[Handle], steps: int) -> list[list[int]]:
        tokens = sample(self, handles, steps)
        bursts.add((len({handle.request.adapter for handle in handles}), max(map(len, tokens))))
        return tokens

    monkeypatch.setattr(Bursts, "sample", recorded)
    requests = mixed(model)[:6]  # of the two kinds that have no drafts
    assert run(model.engine, requests) == expected[:6]
    assert {(3, 8), (3, 16)} <= bursts


def test_a_hook_on_one_of_them_is_called(base: Path, folders: dict[str, Path]) -> None:
    model, calls = Chameleon.load(base, "cpu", adapters=folders), list[int]()
    requests = mixed(model)[:3]
    expected = run(model.engine, requests)
    layer = model.adapters["one"].model.layers[0]
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert run(model.engine, requests) == expected and calls


def test_only_changed_layers_take_memory(base: Path, folders: dict[str, Path]) -> None:
    model = Chameleon.load(base, "cpu", adapters=folders)
    base_pointers = {tensor.data_ptr() for tensor in model.transformer.parameters()}
    new = {
        name: [
            n
            for n, p in model.adapters[name].named_parameters()
            if p.data_ptr() not in base_pointers
        ]
        for name in folders
    }
    layers = len(model.transformer.model.layers)
    assert len(new["one"]) == 7 * layers and len(new["two"]) == layers
    assert all("v_proj" in name for name in new["two"])
    assert isinstance(model.engine.runner.backend, MultiAdapter)


def test_generate_takes_the_name(base: Path, folders: dict[str, Path]) -> None:
    model = Chameleon.load(base, "cpu", adapters=folders)
    merged = Chameleon.load(base, "cpu", adapter=folders["one"])
    settings: dict[str, Any] = {"output": "text", "seed": 3, "max_tokens": 20}
    expected = merged.generate("What is this?", **settings)
    assert model.generate("What is this?", adapter="one", **settings).text == expected.text
    [batched] = model.generate_batch(["What is this?"], adapter="one", **settings)
    streamed = model.collect(model.stream("What is this?", adapter="one", **settings))
    assert batched.text == streamed.text == expected.text
    assert model.generate("What is this?", **settings).text != expected.text
    with pytest.raises(SettingError, match="adapter='three' is unknown: use one of one, two"):
        model.generate("Hi", adapter="three")
    with pytest.raises(SettingError, match="loaded without adapters"):
        merged.generate("Hi", adapter="one")
    with pytest.raises(SettingError, match="cannot be moved"):
        model.to("cpu")


def test_what_cannot_be_loaded_is_one_sentence(
    base: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, name: str = "x") -> Chameleon:
        return Chameleon.load(base, "cpu", adapters={name: folder})

    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
    other = adapter(tmp_path / "mini", Chameleon.load("mini", "cpu").transformer, 0)
    with pytest.raises(CheckpointError, match="is an adapter of another model"):
        load(other)
    head = adapter(tmp_path / "head", Chameleon.load(base, "cpu").transformer, 0, "lm_head")
    with pytest.raises(CheckpointError, match="adapts the head"):
        load(head)
    with pytest.raises(SettingError, match="has no name"):
        load(folders["one"], "")
    monkeypatch.setattr("earlyfusion.api.free_bytes", lambda device: 1000)
    with pytest.raises(SettingError, match="needs the layers once more"):
        load(folders["one"])


def test_an_adapter_is_not_rounded_to_the_files_dtype(tmp_path: Path) -> None:
    # mini's file is in fp16, and "auto" is float32 for it on a CPU.
    folder = adapter(tmp_path / "one", mini().transformer, 3)
    explicit = Chameleon.load("mini", "cpu", "float32", adapter=folder).transformer.state_dict()
    named = Chameleon.load("mini", "cpu", adapters={"one": folder}).adapters["one"]
    alone = Chameleon.load("mini", "cpu", adapter=folder).transformer
    for weights in (named.state_dict(), alone.state_dict()):
        assert all(torch.equal(weights[name], value) for name, value in explicit.items())


# --- as models of a server -------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of mini."""
    return adapter(tmp_path_factory.mktemp("mini") / "drawn", mini().transformer, 3)


@pytest.fixture(scope="module")
def merged(mini_adapter: Path) -> Chameleon:
    return Chameleon.load("mini", adapter=mini_adapter)


@pytest.fixture(scope="module", params=["one process", "two processes"])
def server(request: pytest.FixtureRequest, mini_adapter: Path) -> Iterator[Running]:
    """With the engine in this process, and in one of its own."""
    folders = {"drawn": str(mini_adapter)}
    if request.param == "one process":
        with running(model=Chameleon.load("mini", adapters=folders)) as server:
            yield server
        return
    plan = LoadPlan("mini", dtype="fp32", adapters=folders)
    remote = RemoteEngine(partial(start, plan), step_timeout=60)
    try:
        with running(remote) as server:
            yield server
    finally:
        remote.close()


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_the_model_field_chooses_on_every_route(server: Running, merged: Chameleon) -> None:
    fields: dict[str, Any] = {"modalities": ["text"], "max_tokens": 12}
    with ThreadPoolExecutor(8) as pool:  # base and adapter side by side
        names = ["drawn", "mini"] * 4
        replies = [
            pool.submit(server.chat, "Name a fruit.", seed=seed, model=name, **fields)
            for seed, name in enumerate(names)
        ]
        texts = [text_of(reply.result()) for reply in replies]
    page = server.get("/metrics").text
    for name in ("drawn", "mini"):
        assert f'e2e_request_latency_seconds_count{{model_name="{name}"}}' in page
    models = {"drawn": merged, "mini": mini()}
    expected = [
        models[name].generate("Name a fruit.", "text", seed=seed, max_tokens=12).text
        for seed, name in enumerate(names)
    ]
    assert texts == expected and replies[0].result().json()["model"] == "drawn"

    body: dict[str, Any] = {"model": "drawn", "seed": 0, "temperature": 1}
    first = merged.generate("Name a fruit.", "text", seed=0, temperature=1, max_tokens=12).text
    limit = {"max_tokens": 12}
    completed = server.post("/v1/completions", body | limit | {"prompt": "Name a fruit."}).json()
    assert completed["choices"][0]["text"] == first and completed["model"] == "drawn"
    limit = {"max_output_tokens": 12}
    responded = server.post("/v1/responses", body | limit | {"input": "Name a fruit."}).json()
    assert responded["output"][0]["content"][0]["text"] == first and responded["model"] == "drawn"
    follow_up = {"previous_response_id": responded["id"], "model": "mini", "input": "And now?"}
    assert server.post("/v1/responses", follow_up).json()["model"] == "mini"
    image_reply = server.post(
        "/v1/images/generations", {"model": "drawn", "seed": 0, "prompt": "Draw a cat."}
    ).json()["data"][0]["b64_json"]
    [expected_image] = merged.generate("Draw a cat.", "image", seed=0).images
    assert pixels(image_reply).tobytes() == expected_image.tobytes()
    assert server.post("/tokenize", {"model": "drawn", "prompt": "Hi"}).status_code == 200


def test_models_are_listed_with_their_base(server: Running) -> None:
    data = server.get("/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in data] == [("mini", None), ("drawn", "mini")]
    assert server.get("/v1/models/drawn").json() == data[1]
    missing = server.chat("Hi", model="other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert "use 'mini', 'drawn'" in missing.json()["error"]["message"]
    tool = {"type": "image_generation", "model": "drawn"}
    reply = server.post("/v1/responses", {"input": "Hi", "tools": [tool]})
    assert reply.status_code == 400 and "leave it out" in reply.text
    tool["model"] = "mini"
    body = {"input": "Hi", "tools": [tool], "max_output_tokens": 2}
    assert server.post("/v1/responses", body).status_code == 200


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["short"], "give a name"),
        (["=x"], "give a name"),
        (["a=x", "a=y"], "another one are both named 'a'"),
        (["a=nowhere"], "nowhere"),
        (["other=OTHER"], "is an adapter of another model"),
        (["mini=DRAWN"], "both named 'mini'"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    given: list[str],
    words: str,
    base: Path,
    folders: dict[str, Path],
    mini_adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"OTHER": str(folders["one"]), "DRAWN": str(mini_adapter)}
    options = []
    for text in given:
        name, _, folder = text.partition("=")
        options += ["--adapter", f"{name}={places.get(folder, folder)}" if folder else text]
    assert main(["serve", "--port", "0", *options]) == 2
    stderr = capsys.readouterr().err
    assert words in stderr and "Traceback" not in stderr
