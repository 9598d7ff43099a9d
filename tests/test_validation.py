"""Held-out documents while fine-tuning: which, their loss, the best weights, the early end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import jsonl, pairs, tiny_model
from test_finetune import finetune, two_processes

from earlyfusion.checkpoints import detect
from earlyfusion.data.corpus import Corpus, CorpusConfig, open_corpus
from earlyfusion.data.held_out import ValidationConfig, held_out_documents, held_out_numbers
from earlyfusion.errors import DataError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.attention import CausalAttend
from earlyfusion.processor import TokenSequence
from earlyfusion.recipes.finetune import config as recipe
from earlyfusion.recipes.run import override
from earlyfusion.train import checkpoint
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.validation import Validation, best_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs and six texts."""
    path = pairs(tmp_path_factory.mktemp("data"), 12)
    rows = [json.dumps({"text": f"Words of row {n}."}) for n in range(6)]
    path.write_text(path.read_text() + "\n".join(rows) + "\n")
    return path


def opened(model: Path, data: Path, tmp_path: Path, balance: bool, **watched: object) -> Corpus:
    loaded = detect.load(model)
    config = CorpusConfig(data=(str(data),), balance=balance)
    image_tokenizer = ImageTokenizer(loaded.vqgan, 16)
    validation = ValidationConfig(**watched)  # type: ignore[arg-type]
    return open_corpus(config, loaded.processor, image_tokenizer, 100, tmp_path, 5, validation)


@pytest.mark.parametrize("balance", [True, False])
def test_a_share_is_held_out_and_never_trained_on(
    model: Path, data: Path, tmp_path: Path, balance: bool
) -> None:
    corpus = opened(model, data, tmp_path, balance, validation=0.25)
    held = {tuple(document.ids) for document in held_out_documents(corpus.held_out)}
    seen = {tuple(corpus.stream(number).ids) for number in range(300)}
    every = {tuple(corpus.documents[0].pieces(n)[0].ids) for n in range(18)}
    assert len(held) == round(0.25 * 18) and not held & seen and held | seen == every
    assert corpus.fingerprint != opened(model, data, tmp_path, balance).fingerprint


def test_what_is_held_out_follows_from_the_seed_and_is_never_all() -> None:
    assert len(held_out_numbers(1, 0.5, 0, 0)) == 0
    assert len(held_out_numbers(2, 0.01, 0, 0)) == 1 and len(held_out_numbers(3, 0.99, 0, 0)) == 2
    one, other = (held_out_numbers(100, 0.2, seed, 0) for seed in (0, 1))
    assert len(one) == 20 and sorted(set(one)) == one.tolist()
    assert (one == held_out_numbers(100, 0.2, 0, 0)).all() and not (one == other).all()


def by_hand(folder: Path, documents: list[TokenSequence]) -> float:
    """The mean loss of the answers, one document at a time."""
    transformer = detect.load(folder).transformer.float()
    nats = []
    for document in documents:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            logits = transformer(ids[:, :-1], None, [CausalAttend()] * 2)[0]
        losses = -logits.log_softmax(-1)[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
        nats += [float(x) for x, w in zip(losses, document.loss_mask[1:], strict=True) if w]
    return float(np.mean(nats))


@pytest.mark.parametrize("micro", [[], ["rows=2", "micro_rows=2"]])
def test_the_loss_is_that_of_the_held_out_answers(
    model: Path, data: Path, tmp_path: Path, micro: list[str]
) -> None:
    finetune(model, data, tmp_path / "out", "validation=0.3", "seed=5", "validate_every=4", *micro)
    corpus = opened(model, data, tmp_path, True, validation=0.3)
    right = by_hand(tmp_path / "out" / "model", held_out_documents(corpus.held_out))
    last = read_metrics(tmp_path / "out")[-1]
    assert last["validation_loss"] == pytest.approx(right, abs=1e-4)
    assert last["validation_text_nats"] > 0 and last["validation_image_nats"] > 0


def test_the_training_does_not_notice_the_checks(model: Path, data: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other.jsonl", [{"text": f"Other words {n}."} for n in range(3)])
    finetune(model, data, tmp_path / "plain", "dropout=0.3")
    finetune(model, data, tmp_path / "seen", "dropout=0.3", f"validation_data={other}")
    rows = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("plain", "seen")]
    assert rows[0] == rows[1]
    checked = [r["step"] for r in read_metrics(tmp_path / "seen") if "validation_loss" in r]
    assert checked == [1, 3]


def test_the_best_weights_are_kept_and_the_run_ends_early(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate far too high: the loss rises after the first steps."""
    out, spoiled = tmp_path / "out", ["validation=0.3", "validate_every=1", "patience=2"]
    spoiled += ["steps=50", "lr=0.3", "warmup_steps=2", "seed=1", "decay=constant"]
    finetune(model, data, out, *spoiled)
    rows = read_metrics(out)
    losses = [row["validation_loss"] for row in rows]
    best = int(np.argmin(losses)) + 1
    assert len(rows) == best + 2 < 50 and checkpoint.steps(out)[-1] == best + 2
    assert checkpoint.steps(best_folder(out)) == [best]
    kept = checkpoint.load(best_folder(out), only="model")[0]["model"]
    saved = detect.load(out / "model").transformer.state_dict()
    newest = checkpoint.load(out, only="model")[0]["model"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(kept[name], saved[name]) and not torch.equal(newest[name], saved[name])
    stderr = capsys.readouterr().err
    assert f"the model has the weights of step {best}," in stderr and "the run ends, as" in stderr
    finetune(model, data, out, *spoiled)  # it has ended: nothing more is learnt
    assert len(read_metrics(out)) == len(rows)


def test_a_run_that_was_stopped_goes_on_with_its_best(
    model: Path, data: Path, tmp_path: Path
) -> None:
    fields = ["validation=0.3", "validate_every=1", "steps=8", "lr=0.1", "lora=2"]
    finetune(model, data, tmp_path / "whole", *fields)
    finetune(model, data, tmp_path / "part", *fields, "stop_after=3")
    (tmp_path / "part" / "best" / "step-00000099").mkdir()  # of a time that did not come to be
    finetune(model, data, tmp_path / "part", *fields)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "part")]
    assert [r["validation_loss"] for r in rows[0]] == [r["validation_loss"] for r in rows[1]]
    states = [checkpoint.load_state(tmp_path / name)["validation"] for name in ("whole", "part")]
    kept = [checkpoint.steps(best_folder(tmp_path / name)) for name in ("whole", "part")]
    assert states[0] == states[1] and kept[0] == kept[1] == [states[0]["step"]]


def test_patience_counts_checks_in_a_row() -> None:
    watch = Validation(dict, ValidationConfig(validation=0.1, patience=2), every=5)
    told = [
        (watch.record(5 * n, loss), watch.ends_run) for n, loss in enumerate([3.0, 2, 2, 1, 4, 1])
    ]
    assert told == [(True, False)] * 2 + [(False, False), (True, False), (False, False)] + [
        (False, True)
    ]
    assert [done for done in range(1, 13) if watch.is_due(done, 12)] == [5, 10, 12]
    second = Validation(dict, ValidationConfig(validation=0.1, patience=2), every=5)
    second.load_state(json.loads(json.dumps(watch.state())))
    assert second.ends_run and second.best_loss == 1 and second.best_step == 15
    assert not Validation(dict, ValidationConfig(validation=0.1), 5).ends_run
    assert math.isinf(Validation(dict, ValidationConfig(validation=0.1), 5).best_loss)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["validation=1"], "not a share"),
        (["validation=-0.1"], "not a share"),
        (["validation=0.1", "validation_data=x.jsonl"], "not both"),
        (["patience=3"], "need documents"),
        (["validate_every=3"], "need documents"),
        (["validation=0.1", "patience=-1"], "patience=-1"),
    ],
)
def test_what_is_impossible_is_refused(changes: list[str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        override(recipe, changes)


def test_held_out_rows_that_cannot_be_used_are_reported(
    model: Path, data: Path, tmp_path: Path
) -> None:
    broken = jsonl(tmp_path / "broken.jsonl", ["{", "{"])
    with pytest.raises(DataError, match="none of 2 held-out rows can be used"):
        finetune(model, data, tmp_path / "out", f"validation_data={broken}")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(model: Path, data: Path, tmp_path: Path) -> None:
    same = ["rows=2", "micro_rows=1", "device=cpu", "dropout=0", "validation=0.3"]
    finetune(model, data, tmp_path / "one", *same)
    two_processes(tmp_path, [[str(model), str(data), "two", *same]])
    results = [
        [r["validation_loss"] for r in read_metrics(tmp_path / name) if "validation_loss" in r]
        for name in ("one", "two")
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-5) and len(results[0]) == 2
    weights = [
        detect.load(tmp_path / name / "model").transformer.lm_head.weight for name in ("one", "two")
    ]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)
