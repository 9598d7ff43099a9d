"""Fine-tuning of the 7B by low-rank adapters, on one GPU or several.

    earlyfusion train lora_7b data=rows.jsonl model=MODEL
    torchrun --nproc-per-node 2 -m earlyfusion train lora_7b data=shards model=MODEL
    earlyfusion train lora_7b --plan

Rank 16 with alpha 32 on every linear layer of the blocks, at 2e-4 with cosine decay, as is usual at
this size; 16 rows of 4,096 tokens a step. The adapters are merged at the end. Machine, run time:
18 GiB of one GPU by `--plan`, as the frozen products stay in bf16 and only the input of each block
is kept for the backward pass (`checkpointing=selective` is faster and takes 29). The score to look
at is the loss of answers in `metrics.jsonl`; the run itself has not been made here, but `lora=16`
on `mini` has (docs/train.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.parallel import ParallelConfig
from earlyfusion.recipes import finetune_7b
from earlyfusion.recipes.finetune import main

__all__ = ["config", "main"]

config = replace(
    finetune_7b.config,
    lora=16,
    alpha=32.0,
    rows=16,
    run=replace(
        finetune_7b.config.run,
        out=Path("runs/lora_7b"),
        steps=1000,
        parallel=ParallelConfig(checkpointing="full"),
    ),
    optim=replace(finetune_7b.config.optim, lr=2e-4, weight_decay=0.0),
)
