"""What the processes of test_tensor_parallel.py run: one random model, shared by all of them.

`tensor_parallel_case.py FOLDER PROCESSES CASE ...` runs cases one after another, each in so many
processes, as `torchrun` starts them but for the time that it takes, and writes how each ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import CONFIG, tiny_processor

from earlyfusion import Chameleon
from earlyfusion.config import ModelConfig
from earlyfusion.engine.blocks import BLOCK_SIZE
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.peers import Peers
from earlyfusion.engine.static import bursts, graphs
from earlyfusion.engine.tensor_parallel import follow, split
from earlyfusion.errors import SettingError, WeightsError
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

SWIN = replace(CONFIG, swin_norm=True, hidden_size=48, num_attention_heads=6)
ODD = replace(
    CONFIG,
    num_key_value_heads=1,
    intermediate_size=70,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)


# Of one process of two, which has half of the heads.
BLOCK = BLOCK_SIZE * PagedCache.token_bytes(CONFIG, torch.float32) // 2


def random_model(config: ModelConfig, processor: Processor) -> Transformer:
    """Weights whose heads and norms all differ, and whose images come often."""
    transformer = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    transformer.init_weights(generator)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        transformer.lm_head.weight.mul_(20)
        transformer.lm_head.weight[processor.vocabulary.begin_image].mul_(2)
    return transformer


def make_request(processor: Processor, seed: int, output: Any, **more: Any) -> Request:
    return tiny.make_request(
        processor, seed, output, max_tokens=20 if output == "text" else 80, **more
    )


def requests(processor: Processor) -> list[Request]:
    """Texts, images and both, of one to three branches, greedy or not, two in windows."""
    greedy = {"temperature": 0, "image_temperature": 0}
    return [
        make_request(processor, 0, "text", **greedy),
        make_request(processor, 1, "image", with_image=True),
        make_request(processor, 2, "interleaved"),
        make_request(processor, 3, "text", with_image=True, top_p=0.8, repetition_penalty=1.3),
        make_request(processor, 4, "image", guidance_image=1, jacobi=8, **greedy),
        make_request(processor, 6, "image", jacobi=8),
        make_request(processor, 5, "image", with_image=True),
    ]


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Tokens of all requests, run together; one joins late, and of many the last is cancelled."""
    handles: list[Handle] = []
    engine.step()  # nothing is asked yet
    for number, one in enumerate(requests):
        handles.append(engine.add(one))
        if number == 2:
            engine.step()
    while len(handles) > 1 and len(handles[-1].tokens) < 20:
        engine.step()
    if len(handles) > 1:
        handles[-1].cancel()
    while engine.busy:
        engine.step()
    return [handle.tokens for handle in handles]


@dataclass
class Case:
    """A model shared by all processes; the first answers requests, and may break on the way.

    With `spoils` a request fails before the others are asked,
    as tokens of its prompt have no finite state. With `captured` the steps are called as if they
    were captured on a CUDA device.
    """

    config: ModelConfig = CONFIG
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    breaks: Callable[[Engine, Path], None] | None = None
    spoils: bool = False
    captured: bool = False

    def run(self, out: Path) -> None:
        rank_folder = out / os.environ["RANK"]
        rank_folder.mkdir(parents=True)
        processor = tiny_processor(rank_folder)
        peers = Peers(torch.device("cpu"))
        part = split(self.model(processor), peers)
        if self.captured:
            act_captured(peers, 2 + 2 * self.config.num_hidden_layers)
        (rank_folder / "held.json").write_text(json.dumps(held_bytes(part)))
        (rank_folder / "pid").write_text(str(os.getpid()))
        if not peers.leads:
            follow(part, peers)
            return
        engine = Engine(part, processor, **self.options)
        asked = self.asked(processor)
        if self.captured:
            engine.warm_up()
            num_graphs = len(engine.runner.bursts._graphs.shapes)
            (out / "warm.json").write_text(json.dumps(num_graphs))
        if self.spoils:
            spoil(engine, part, asked[0])
        if self.breaks is not None:
            engine.add(asked[1])
            engine.step()
            self.breaks(engine, out)
            asked = asked[:1]
        (out / "tokens.json").write_text(json.dumps(answers(engine, asked)))
        (out / "preemptions.json").write_text(json.dumps(engine.preemptions))
        bursts = engine.runner.bursts
        (out / "shapes.json").write_text(json.dumps(len(bursts._graphs.shapes) if bursts else 0))

    def asked(self, processor: Processor) -> list[Request]:
        """Static steps have no windows."""
        made_requests = requests(processor)
        if not self.options.get("static"):
            return made_requests
        return [replace(one, sampling=replace(one.sampling, jacobi=None)) for one in made_requests]

    def model(self, processor: Processor) -> Transformer:
        """The whole model, as one process runs it."""
        return random_model(self.config, processor).to(self.dtype)


def held_bytes(part: Transformer) -> dict[str, int]:
    """Bytes that each parameter keeps in this process's memory."""
    return {name: p.untyped_storage().nbytes() for name, p in part.named_parameters()}


def spoil(engine: Engine, part: Transformer, request: Request) -> None:
    """Ask for a reply to a prompt that ends with tokens whose states are not finite."""
    token = engine.processor.vocabulary.pad
    with torch.no_grad():
        part.model.embed_tokens.weight[token] = torch.nan
    try:
        list(engine.add(replace(request, ids=[*request.ids, *[token] * 90])))
    except WeightsError:
        return
    raise AssertionError("a token was sampled from a state that is not finite")


def act_captured(peers: Peers, collectives: int) -> None:
    """Calls in the place of graphs: as many before the first use, and replays that are not heard
    of."""

    def capture(run: Any, idle: Any, stream: Any, pool: Any) -> tuple[Any, Any]:
        for _ in range(graphs.WARM_UP + 1):
            idle()
            run()

        def replay() -> None:
            peers.begin(peers.collectives_left + collectives)
            run()

        return replay, None

    bursts.BUCKETS = (1, 2, 3, 6, 12)  # fewer to capture
    graphs.capture = capture
    graphs.Graphs.captures = property(lambda _: True)  # type: ignore[assignment]


# ---- what breaks


def in_sampling(engine: Engine, out: Path) -> None:
    """Behind the last sum: the others have done their part, and go on."""
    sampler: Any = engine.runner.sampler
    sample = sampler.sample
    sampler.sample = lambda *_: 1 / 0
    with suppress(ZeroDivisionError):
        engine.step()
    sampler.sample = sample


def between(engine: Engine, out: Path) -> None:
    raise ZeroDivisionError("between two steps")


def inside(act: Callable[[], object]) -> Callable[[Engine, Path], None]:
    """Act between two sums of a step."""

    def breaks(engine: Engine, out: Path) -> None:
        backend: Any = engine.runner.backend
        layers = backend.layers
        gate_up = layers[-1].gate_up

        def acting(x: torch.Tensor) -> torch.Tensor:
            act()
            return gate_up(x)

        layers[-1] = layers[-1]._replace(gate_up=acting)
        engine.step()

    return breaks


def caught(engine: Engine, out: Path) -> None:
    """The error comes as it is; what is asked after it hears that the others have gone."""
    with suppress(ZeroDivisionError):
        inside(lambda: 1 / 0)(engine, out)


def own_signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def peer_dies(engine: Engine, out: Path) -> None:
    os.kill(int((out / "1" / "pid").read_text()), signal.SIGKILL)
    while True:
        engine.step()


# ---- a user's script


@dataclass
class Script:
    """Behind `load` there is the first process only."""

    model: Path
    dtype: str = "float32"

    def run(self, out: Path) -> None:
        count = int(os.environ["WORLD_SIZE"])
        model = Chameleon.load(self.model, "cpu", self.dtype, tensor_parallel=count)
        (out / "held.json").write_text(json.dumps(held_bytes(model.transformer)))
        greedy = SamplingParams(temperature=0, max_tokens=8)
        replies = model.generate_batch(["a pear", "an apple"], "text", greedy)
        (out / "replies.json").write_text(json.dumps([reply.text for reply in replies]))
        refused = []
        first, second = model.engine, Engine(model.transformer, model.processor)
        model.engine = second
        assert model.generate("a pear", "text", greedy).text == replies[0].text
        model.engine = first
        for call in (
            lambda: model.generate("a pear", "text", greedy),
            lambda: model.transformer(torch.tensor([[0]])),
            lambda: Chameleon.load(self.model, "cpu", tensor_parallel=count),
        ):
            try:
                call()
            except SettingError as error:
                refused.append(str(error))
        (out / "refused.json").write_text(json.dumps(refused))


GOLDEN = Path(__file__).parent / "golden" / "models" / "tiny_mp2_swin_gqa"
CASES: dict[str, Case | Script] = {
    "tiny": Case(CONFIG, {"chunk": 5, "cache_bytes": 18 * BLOCK}, spoils=True),
    "swin": Case(SWIN),
    "odd": Case(ODD),
    "static": Case(CONFIG, {"static": True, "chunk": 5, "cache_bytes": 18 * BLOCK}, spoils=True),
    "static swin": Case(SWIN, {"static": True}, captured=True),
    "static odd": Case(ODD, {"static": True}),
    "half": Case(CONFIG, {"cache_dtype": "int8"}, torch.bfloat16),
    "draw": Case(breaks=in_sampling),
    "between": Case(breaks=between),
    "inside": Case(breaks=inside(lambda: 1 / 0)),
    "caught": Case(breaks=caught),
    "interrupted": Case(breaks=inside(own_signal(signal.SIGINT))),
    "killed": Case(breaks=inside(own_signal(signal.SIGKILL))),
    "peer killed": Case(breaks=peer_dies),
    "script": Script(GOLDEN),
    "int8": Script(GOLDEN, "int8"),
}


# ---- processes


def started(name: str, out: Path, count: int) -> list[int]:
    """Fork the processes of a case; their numbers, in the parent, which alone comes back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = [os.fork()]
    while numbers[-1] and len(numbers) < count:
        numbers.append(os.fork())
    if numbers[-1]:
        return numbers
    rank = len(numbers) - 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    with (out / f"said-{rank}.txt").open("w") as said:
        os.dup2(said.fileno(), 2)
    CASES[name].run(out)
    sys.exit(0)


def ended(numbers: Sequence[int], seconds: float) -> list[int | str]:
    """How each process ended: its exit code, or minus its signal; those that hang are killed."""
    codes: dict[int, int | str] = {}
    deadline = time.monotonic() + seconds
    while left := [number for number in numbers if number not in codes]:
        for number in left:
            if time.monotonic() > deadline:
                os.kill(number, signal.SIGKILL)
                codes[number] = "hung"
            done, status = os.waitpid(number, os.WNOHANG)
            if done and number not in codes:
                codes[number] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[number] for number in numbers]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        codes = ended(started(name, folder, int(sys.argv[2])), 240)
        (folder / "ended.json").write_text(json.dumps(codes))
