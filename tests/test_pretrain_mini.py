"""The whole of mini by one command: its stages, and what a killed run does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earlyfusion import Chameleon
from earlyfusion.config import PRESETS
from earlyfusion.content import Image
from earlyfusion.errors import DataError, SettingError
from earlyfusion.mini import deeper as mini_deeper
from earlyfusion.mini import drawings as mini_drawings
from earlyfusion.mini import packed_transformer as mini_packed_transformer
from earlyfusion.mini import pretrain as pretrain_mini
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.packed_transformer import embed_codewords
from earlyfusion.mini.pretrain import (
    STAGES,
    TIMED_STAGES,
    TimeBudget,
    config,
    stage_config,
    timed_config,
)
from earlyfusion.mini.stage import first_model, load_image_tokenizer, text_tokenizer
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.recipes.run import override, run
from earlyfusion.train import checkpoint
from earlyfusion.train.monitor import read_metrics

DATA = Path(__file__).parent / "data"
SMALL = [
    f"data={DATA}",
    "scale=0.0005",
    "resolution=16",
    "hidden_size=32",
    "intermediate_size=64",
    "num_attention_heads=2",
    "num_hidden_layers=2",
    "length=400",
]


def test_the_stages_are_the_recipes_in_their_order() -> None:
    result = {name: stage_config(config, name) for name in STAGES}
    assert result["drawings"].documents == mini_drawings.config.documents
    assert result["drawings"].optim == mini_drawings.config.optim
    pairs, usual = result["pairs"], result["usual"]
    assert (pairs.run.stop_after, pairs.optim.decay, pairs.rows) == (2750, "hold", 2)
    assert (usual.run.stop_after, usual.optim.decay, usual.rows) == (1500, "hold", 1)
    assert [m.run.out.name for m in result.values()] == list(STAGES)
    assert [m.model.num_hidden_layers for m in list(result.values())[1:]] == [6] * 5 + [10] * 8
    last = replace(result["last"], run=mini_deeper.config.run, length=2048)
    folders = {"image_tokenizer": mini_deeper.config.image_tokenizer, "data": last.data}
    start = mini_deeper.config.start
    assert replace(last, start=start, start_share=0.0, **folders) == mini_deeper.config
    assert last.start_share == 0.5 and not any(
        result[name].start_share for name in ("lists_first", "balanced")
    )
    swapped = result["swapped"]
    assert (swapped.cut.swapped_answers, swapped.mixture.varied) == (0.5, True)
    assert (swapped.run.steps, swapped.run.stop_after) == (6000, 1800)
    first = result["lists_first"]
    assert (first.cut.swapped_answers, first.codeword_embeddings) == (0.0, True)
    starts = [m.start for name, m in result.items() if name != "image_tokenizer"]
    before = [m.run.out for m in list(result.values())[1:-1]]
    assert starts == [None, *before[:-1], before[-1] / "model"]


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [*SMALL, f"out={tmp_path}"]
    save = checkpoint.Saver.save

    def killed(saver: checkpoint.Saver, step: int, *rest: Any) -> None:
        save(saver, step, *rest)
        if (tmp_path / "answers" / "step-00000001").is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run("pretrain_mini", fields)
    stdout = capsys.readouterr().out
    assert (
        "stage 3 of 14, answers: earlyfusion train mini_answers" in stdout and "pairs" not in stdout
    )
    assert checkpoint.steps(tmp_path / "answers") == [1]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "transformer").rglob("*") if p.is_file()}
    run("pretrain_mini", fields)
    stdout = capsys.readouterr().out
    assert stdout.count(": done, in") == 2 and "stage 14 of 14, chats:" in stdout
    assert "rows=2 pairs=0.55 usual=0 studies=0.25 decay=hold" in stdout
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert [row["step"] for row in read_metrics(tmp_path / "answers")] == [0, 1]
    model = Chameleon.load(str(tmp_path / "chats" / "model"))
    assert model.config.num_hidden_layers == 2
    balanced, last, chats = (
        checkpoint.weights(tmp_path / name) for name in ("balanced", "last", "chats")
    )
    for name, value in model.transformer.state_dict().items():
        mean = (balanced[name].float() + last[name].float() + chats[name].float()) / 3
        torch.testing.assert_close(value, mean, atol=1e-5, rtol=2e-3)
    for one, other in ((balanced, last), (last, chats)):
        assert (one["lm_head.weight"] - other["lm_head.weight"]).abs().max() > 1e-4
    assert len(model.generate("Draw a cat.", output="image", seed=0).images) == 1
    run("pretrain_mini", fields)
    assert capsys.readouterr().out.count(": done, in") == 14


TIMED = [*SMALL[:1], "scale=0.0005", *SMALL[2:], "vocab_size=1500", "device=cpu", "minutes=0.02"]


def test_a_chain_with_minutes_is_killed_goes_on_and_ends_in_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [*TIMED, f"out={tmp_path}"]
    save = checkpoint.Saver.save

    def killed(saver: checkpoint.Saver, *rest: Any) -> None:
        save(saver, *rest)
        if any((tmp_path / "transformer").glob("step-*")):  # how many steps, the clock decides
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run("pretrain_mini", fields)
    given = (tmp_path / "transformer" / "minutes.json").read_text()
    stdout = capsys.readouterr().out
    assert "stage 2 of 4, decoder: earlyfusion train mini_named_image_tokenizer trainable" in stdout
    assert not (tmp_path / "transformer" / "model").exists()
    codes = tmp_path / "transformer" / "codes.npy"
    assert np.load(codes).shape[1] == 3 + 3
    cut = codes.stat().st_mtime_ns
    run("pretrain_mini", fields)
    stdout = capsys.readouterr().out
    assert stdout.count(": done, in") == 2 and "stage 4 of 4, chat:" in stdout
    assert (tmp_path / "transformer" / "minutes.json").read_text() == given
    assert codes.stat().st_mtime_ns == cut
    model = Chameleon.load(str(tmp_path / "chat" / "model"))
    data = EmojiData(DATA)
    image = Image.of(data.image(data.rows[0]["id"]))
    assert model.generate([image, "What is this?"], output="text").images == []
    reply = model.generate("Draw a cat.", output="image", seed=0)
    assert [i.size for i in reply.images] == [(16, 16)]
    full, alone = (checkpoint.weights(tmp_path / n) for n in ("decoder", "image_tokenizer"))
    assert full.keys() == alone.keys()
    assert torch.equal(full["quantize.embedding.weight"], alone["quantize.embedding.weight"])
    run("pretrain_mini", fields)
    assert capsys.readouterr().out.count(": done, in") == 4


class AtOnce:
    """A process that does its work when it is started."""

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self._target, self._args = target, args

    def start(self) -> None:
        self._target(*self._args)


def test_documents_are_made_ahead_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [*TIMED, f"out={tmp_path}", "scale=0.001"]
    full, names = override(config, fields), list(TIMED_STAGES)
    assert pretrain_mini.prepare_ahead(full, names) is None  # one worker
    context = type("Context", (), {"Process": AtOnce})
    monkeypatch.setattr(pretrain_mini, "get_context", lambda _: context)
    monkeypatch.setattr(pretrain_mini, "_workers", lambda _: 2)
    with monkeypatch.context() as patch:  # its workers would take seconds
        patch.setattr(
            pretrain_mini,
            "timed_config",
            lambda *given: override(timed_config(*given), ["mixture.workers=1"]),
        )
        assert pretrain_mini.prepare_ahead(full, names) is not None
    for name in ("transformer", "chat"):
        stage = timed_config(full, name, None)
        result = mini_packed_transformer.prepare(replace(stage, data=tmp_path / "not needed"))
        assert len(result.starts) > 30 and (tmp_path / name / "tokenizer.json").is_file()
        prepared = mini_packed_transformer.prepare(
            override(stage, [f"out={tmp_path / 'own'}", "workers=1"])
        )
        assert all(map(np.array_equal, prepared.columns, result.columns))
        (tmp_path / "own" / "tokenizer.json").unlink()
    first, second = (tmp_path / n / "tokenizer.json" for n in ("transformer", "chat"))
    assert first.read_text() == second.read_text()
    assert pretrain_mini.prepare_ahead(full, names) is None  # all is there


def test_minutes_are_shared_out_over_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(pretrain_mini.time, "monotonic", lambda: now[0])
    full = override(config, ["minutes=10", f"out={tmp_path}", f"data={DATA}", "device=cpu"])
    assert full.stages == tuple(TIMED_STAGES)
    budget = TimeBudget(full, list(TIMED_STAGES))
    kept = [sum(s.setup_seconds for s in list(TIMED_STAGES.values())[n:]) / 60 for n in range(4)]
    assert kept[0] > kept[1] > kept[3] > 0
    first = pytest.approx((9.2 - kept[0]) * 0.3, abs=1e-4)
    assert budget.minutes("image_tokenizer") == first
    now[0] = 300.0
    assert budget.minutes("image_tokenizer") == first  # once and for all
    assert budget.minutes("decoder") == pytest.approx((4.2 - kept[1]) * 0.08 / 0.7, abs=1e-4)
    now[0] = 60 * 8.9  # 0.3 minutes are left, of which at most a fifth is kept
    assert budget.minutes("transformer") == pytest.approx(0.3 * 0.8 * 0.5 / 0.62, abs=1e-4)
    now[0] = 1e6
    assert budget.minutes("chat") == 0.001
    result = timed_config(full, "transformer", budget)
    assert (result.rows, result.run.precision, result.run.compile) == (2, "fp32", False)
    assert result.image_tokenizer == tmp_path / "decoder" and result.prompts == ()
    assert result.model == mini_packed_transformer.config.model
    monkeypatch.setattr(pretrain_mini, "resolve_device", lambda _: torch.device("cuda"))
    result = timed_config(full, "transformer", budget)
    assert (result.rows, result.run.precision, result.run.compile) == (32, "bf16", True)
    assert (result.ways.plain, result.optim.kind, result.mixture.documents) == (10, "muon", 80_000)
    changed = override(full, ["changes=transformer.muon_lr=0.03,chat.rows=8"])
    assert timed_config(changed, "transformer", budget).optim.muon_lr == 0.03
    assert [timed_config(changed, n, budget).rows for n in ("transformer", "chat")] == [32, 8]
    small = override(full, ["max_position_embeddings=2048"])
    assert timed_config(small, "transformer", budget).model == small.model
    assert timed_config(small, "image_tokenizer", budget).model == PRESETS["mini"].vq_config


def test_the_larger_mini_fits_forty_megabytes_and_the_longest_document() -> None:
    shape = mini_packed_transformer.config.model
    with torch.device("meta"):
        parts = (Transformer(shape), VQGAN(shape.vq_config))
    weights = sum(p.numel() for part in parts for p in part.parameters())
    assert 18e6 < weights and 2 * weights < 39e6
    assert mini_packed_transformer.config.length <= shape.max_position_embeddings


def test_image_tokens_begin_with_the_distances_of_their_codewords() -> None:
    mini = Chameleon.load("mini", device="cpu")
    vocabulary, vqgan = mini.processor.vocabulary, mini.image_tokenizer.vqgan
    model = Transformer(replace(PRESETS["mini"], num_hidden_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    before = model.model.embed_tokens.weight.detach().clone()
    embed_codewords(model, vqgan, vocabulary, seed=0)
    after = model.model.embed_tokens.weight.detach().clone()
    image_tokens = torch.from_numpy(vocabulary.code_to_token)
    others = torch.ones(len(after), dtype=torch.bool)
    others[image_tokens] = False
    assert torch.equal(after[others], before[others])
    assert after[image_tokens].std() == pytest.approx(before.std().item(), rel=0.02)
    codewords = vqgan.quantize.embedding.weight.detach().float()

    def likeness(embeddings: torch.Tensor) -> float:
        pairs = torch.stack([torch.pdist(codewords), torch.pdist(embeddings)])
        return torch.corrcoef(pairs)[0, 1].item()

    assert likeness(after[image_tokens]) > 0.9 and abs(likeness(before[image_tokens])) < 0.1
    model.model.embed_tokens.weight.data.copy_(before)
    embed_codewords(model, vqgan, vocabulary, seed=0, add=True)
    sums = model.model.embed_tokens.weight.detach() - before
    torch.testing.assert_close(sums[image_tokens], after[image_tokens], atol=1e-6, rtol=1e-4)
    assert not sums[others].any()


def test_a_stage_begins_with_a_model_by_name_or_folder(tmp_path: Path) -> None:
    model, shape = Chameleon.load("mini", device="cpu"), PRESETS["mini"]
    for name in ("mini", str(model.folder)):
        fields = [f"start={name}", f"image_tokenizer={name}", f"out={tmp_path}", "device=cpu"]
        result = replace(override(mini_packed_transformer.config, fields), model=shape)
        weights = first_model(result, shape.vocab_size).state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in model.transformer.state_dict().items())
        codec = load_image_tokenizer(result.image_tokenizer, shape).state_dict()
        ours = model.image_tokenizer.vqgan.state_dict()
        assert codec.keys() == ours.keys() and all(
            torch.equal(v, codec[k]) for k, v in ours.items()
        )
        tokenizer = text_tokenizer(result, ()).read_bytes()
        assert tokenizer == (model.folder / "tokenizer.json").read_bytes()
    with pytest.raises(
        SettingError, match="encodes images of 64 pixels, and this recipe is for 128"
    ):
        load_image_tokenizer(Path("mini"), mini_packed_transformer.config.model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["stages=answers,drawing"], "names 'drawing': choose of image_tokenizer"),
        (["stages="], "choose of image_tokenizer"),
        (["minutes=-1"], "minutes=-1 must be 0"),
        (["minutes=5", "stages=answers"], "names 'answers': choose of image_tokenizer, decoder"),
        (["changes=chat.rows=8"], "needs minutes="),
        (["minutes=5", "changes=chats.rows=8"], "changes=chats.rows=8 must be STAGE.FIELD=VALUE"),
        (["icons=x"], "icons=x needs minutes="),
        (["workers=-1"], "workers=-1 must be 0 or more"),
        (["scale=0"], "scale=0 must be over 0"),
        (["scale=2"], "scale=2 must be over 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes: list[str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        override(config, changes)


def test_a_share_of_the_start_needs_a_start() -> None:
    with pytest.raises(SettingError, match=r"start_share=0\.5 needs start="):
        override(mini_packed_transformer.config, ["start_share=0.5"])
    with pytest.raises(SettingError, match=r"start_share=1\.5 must be a share from 0 to 1"):
        override(mini_deeper.config, ["start_share=1.5"])


def test_a_stage_without_those_before_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data"):
        run("pretrain_mini", [f"data={tmp_path / 'none'}", f"out={tmp_path}"])
    with pytest.raises((SettingError, DataError, ValueError), match="image_tokenizer"):
        run("pretrain_mini", [*SMALL, f"out={tmp_path}", "stages=answers"])
