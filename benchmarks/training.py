"""Training tokens a second beside transformers' Trainer, on the same shape and batch: a table.

    python benchmarks/training.py --shape mini --threads 2 --rounds 3

Random weights and random text tokens, rows of one document, every token a target, bf16 over fp32
weights, AdamW, clipping. Trainer trains transformers' own class; ours is `LanguageTask` in the loop
of train/trainer.py. They take turns, a few steps each; the table gives medians of all steps but the
first of a turn, and operations (train/plan.py) over those that a bf16 product of 512 x 512 matrices
reaches in the same run. Needs `pip install "earlyfusion[finetune]"`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from contenders import stock_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from earlyfusion.bench.harness import OURS, heading, line, medians, take_turns
from earlyfusion.bench.shapes import SHAPES
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import ANSWER_TEXT, TokenSequence
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.monitor import matmul_peak, read_metrics
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import flops_per_token
from earlyfusion.train.trainer import RunConfig, train

RATE = 1e-4


def row(number: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(2000, 4000, (length,), generator=generator).tolist()


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def stock_steps(model: Any, rows: int, length: int, steps: int, out: str) -> list[float]:
    data = [{"input_ids": (ids := row(n, length)), "labels": ids} for n in range(rows * steps)]
    arguments = TrainingArguments(
        out,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=RATE,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock = Clock()
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clock])
    trainer.train()
    return [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]


def own_steps(model: Transformer, rows: int, length: int, steps: int, out: str) -> list[float]:
    def document(number: int) -> TokenSequence:
        ids = row(number, length + 1)
        return TokenSequence(ids=ids, role=[ANSWER_TEXT] * len(ids))

    packer = Packer(document, RoleWeights(), rows, length, pad=1)
    optim = OptimConfig(lr=RATE, warmup_steps=1, decay="constant")
    run = RunConfig(Path(out), steps, device="cpu", precision="bf16", log_every=1, save_every=10**6)
    train(LanguageTask(model, packer), run, optim)
    per_second = [r["per_second"] for r in read_metrics(Path(out))]
    return [rows * length / rate for rate in per_second[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("mini", "110m", "1b"), default="mini")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = SHAPES[options.shape]
    ours = Transformer(config)
    ours.init_weights(torch.Generator().manual_seed(0))
    theirs = stock_of(config, ours).float()

    def steps(measure: Callable[..., list[float]], model: Any) -> list[float]:
        with tempfile.TemporaryDirectory() as out:
            return measure(model, options.rows, options.length, options.steps, out)

    contenders = {
        "transformers' Trainer": partial(steps, stock_steps, theirs),
        OURS: partial(steps, own_steps, ours),
    }
    turns = take_turns(contenders, options.rounds, warmup=0)
    times = medians({what: chain.from_iterable(found) for what, found in turns.items()})
    peak = matmul_peak(torch.device("cpu"), torch.bfloat16)
    flops = flops_per_token(config, options.length)
    print(f"{options.shape}, {options.rows} x {options.length} tokens, {options.threads} threads\n")
    print(heading("what", "tokens a second", "of the matmul peak"))
    for what, seconds in times.items():
        rate = options.rows * options.length / seconds
        print(line(what, f"{rate:,.0f}", f"{100 * rate * flops / peak:.0f} %"))


if __name__ == "__main__":
    main()
