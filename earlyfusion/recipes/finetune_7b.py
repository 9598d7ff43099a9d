"""Fine-tuning of all weights of the 7B as in the paper (arXiv 2405.09818, section 3.1).

    torchrun --nproc-per-node 8 -m earlyfusion train finetune_7b data=shards model=MODEL
    earlyfusion train finetune_7b --plan

128 rows of 4,096 tokens a step, AdamW at 1e-5 with cosine decay, weight decay 0.1, dropout 0.05,
z-loss, prompts masked from the loss, modalities in balance. Choose `steps` by your data: 64 steps
are 33 M tokens; the paper's data is 1.1 G tokens, or 2,100 steps. Machine, run time: 107 GB of
weights, gradients and moments over all GPUs, see `--plan`. The scores to expect are those of the
paper's section 4; the run itself has not been made here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.parallel import ParallelConfig
from earlyfusion.recipes import finetune
from earlyfusion.recipes.finetune import main
from earlyfusion.train.watch import WatchConfig

__all__ = ["config", "main"]

config = replace(
    finetune.config,
    model="facebook/chameleon-7b",
    rows=128,
    micro_rows=1,
    length=4096,
    run=replace(
        finetune.config.run,
        out=Path("runs/finetune_7b"),
        steps=2000,
        precision="bf16",
        save_beside=True,
        peak_tflops=989.0,
        parallel=ParallelConfig(checkpointing="selective"),
        watch=WatchConfig(spike=1.5),
    ),
)
