"""Meta's recorded numbers on merged and re-sharded copies of the same checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_reference import TEXT_CASES, Recorded
from test_transformer import assert_near, feed, sequences

from earlyfusion.checkpoints.convert import convert
from earlyfusion.checkpoints.detect import load
from earlyfusion.model.kv_cache import KVCache

CPU = torch.device("cpu")

# A model, and the layouts that its copy goes through; a number counts Meta's shards.
ROUTES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "one_to_2": ("tiny_1", (2,)),
    "one_to_4": ("tiny_1", (4,)),
    "one_to_4_to_2_to_1": ("tiny_1", (4, 2, 1)),
    "one_to_hf_in_3_files": ("tiny_1", ("hf",)),
    "two_to_hf": ("tiny_mp2_swin_gqa", ("hf",)),
    "two_to_hf_to_2": ("tiny_mp2_swin_gqa", ("hf", 2)),
}


class Copied(Recorded):
    """The records of a golden checkpoint, and a copy of its weights in another layout."""

    def __init__(self, golden: Path, name: str, folder: Path) -> None:
        super().__init__(golden, name, CPU)
        loaded = load(folder, dtype=torch.float32)
        self.transformer, self.processor = loaded.transformer, loaded.processor
        with np.load(golden / "expected" / f"{name}.fp32.npz") as file:
            self.expected = dict(file)


class Copy(NamedTuple):
    route: str
    recorded: Copied


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=ROUTES)
def copy(request: Any, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    name, stops = ROUTES[request.param]
    folder = golden / "models" / name
    for number, stop in enumerate(stops):
        target = tmp_path_factory.mktemp(request.param) / str(number)
        if stop == "hf":
            convert(folder, target, "hf", shards=3 if name == "tiny_1" else None)
        else:
            convert(folder, target, "meta", shards=stop)
            assert len(list(target.glob("consolidated*.pth"))) == stop
        folder = target
    return Copy(request.param, Copied(golden, name, folder))


def test_prefill_then_steps(copy: Copy) -> None:
    model, expected = copy.recorded.transformer, copy.recorded.expected
    rows = sequences(expected, CPU)
    cache = KVCache(model.config, len(rows), 32)
    slots, lengths = torch.arange(4), torch.zeros(4, dtype=torch.long)
    assert_near(feed(model, cache, slots, lengths, rows), expected["prefill_logits"], torch.float32)
    lengths += torch.tensor([len(row) for row in rows])
    for ids, logits in zip(expected["forced_ids"], expected["step_logits"], strict=True):
        step = feed(model, cache, slots, lengths, list(torch.from_numpy(ids)[:, None]))
        assert_near(step, logits, torch.float32)
        lengths += 1


def test_two_chunks(copy: Copy) -> None:
    model, expected = copy.recorded.transformer, copy.recorded.expected
    rows = [sequences(expected, CPU)[i] for i in (0, 1, 3)]
    first = torch.from_numpy(expected["chunk_first_lens"])
    cache, slots = KVCache(model.config, 3, 32), torch.arange(3)
    heads = [row[:n] for row, n in zip(rows, first, strict=True)]
    tails = [row[n:] for row, n in zip(rows, first, strict=True)]
    feed(model, cache, slots, torch.zeros(3, dtype=torch.long), heads)
    logits = feed(model, cache, slots, first, tails)
    assert_near(logits, expected["chunk2_logits"], torch.float32)


def test_token_by_token(copy: Copy) -> None:
    model, expected = copy.recorded.transformer, copy.recorded.expected
    cache = KVCache(model.config, 1, 13)
    logits = [
        feed(model, cache, torch.tensor([0]), torch.tensor([i]), [token])
        for i, token in enumerate(sequences(expected, CPU)[1].split(1))
    ]
    assert_near(torch.cat(logits), expected["seq1_token_by_token_logits"], torch.float32)


def test_greedy_text(copy: Copy) -> None:
    for case in TEXT_CASES:
        for prompt, expected in copy.recorded.rows(case):
            actual = copy.recorded.generate(case, prompt, 9999)
            stops = copy.recorded.make_request(case, prompt).stops
            ended = [at for at, token in enumerate(expected) if token in stops]
            assert actual == (expected[: ended[0] + 1] if ended else expected), case


# The weights are those of the original to the bit, as test_convert.py shows: the first rows tell.
@pytest.mark.parametrize("count", [100, pytest.param(1026, marks=pytest.mark.slow)])
def test_a_guided_image(copy: Copy, count: int) -> None:
    [(prompt, expected)] = copy.recorded.rows("image_greedy")
    actual = copy.recorded.generate("image_greedy", prompt, count)
    vocabulary = copy.recorded.processor.vocabulary
    assert actual == [vocabulary.begin_image, *expected, vocabulary.end_image][:count]


# Mixed replies were recorded of this model alone. The first codes of the image tell here too.
@pytest.mark.parametrize(
    "copy", [route for route, (name, _) in ROUTES.items() if name == "tiny_1"], indirect=True
)
@pytest.mark.parametrize("codes", [20, pytest.param(None, marks=pytest.mark.slow)])
def test_a_mixed_reply(copy: Copy, codes: int | None) -> None:
    [(prompt, expected)] = copy.recorded.rows("mixed_greedy")
    begins = expected.index(copy.recorded.processor.vocabulary.begin_image)
    count = len(expected) if codes is None else begins + 1 + codes
    assert 0 < begins < count <= len(expected)
    assert copy.recorded.generate("mixed_greedy", prompt, count) == expected[:count]
