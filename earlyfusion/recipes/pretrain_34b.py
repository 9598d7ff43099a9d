"""Pre-training of the 34B as in the paper (arXiv 2405.09818, sections 2.2 and 2.3).

    torchrun --nnodes 384 --nproc-per-node 8 ... -m earlyfusion train pretrain_34b \\
        tokenizer=MODEL data=shards/first added=shards/better

As `pretrain_7b`, with 3,072 rows a step, norms after the branches instead of before them, and no
dropout: the paper found that such norms and dropout do not go together. Machine, run time: the
paper took 4,282,407 hours of an A100, on 3,072 of them; `earlyfusion train pretrain_34b --plan`
prints those of other machines. The scores to expect are those of the paper's section 4; the run
itself has not been made here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.config import PRESETS
from earlyfusion.parallel import ParallelConfig
from earlyfusion.recipes import pretrain_7b
from earlyfusion.recipes.pretrain_7b import main

__all__ = ["config", "main"]

config = replace(
    pretrain_7b.config,
    model=PRESETS["chameleon-34b"],
    rows=3072,
    dropout=0.0,
    run=replace(
        pretrain_7b.config.run,
        out=Path("runs/pretrain_34b"),
        steps=731_150,
        parallel=ParallelConfig(tensor=8, shard=8, checkpointing="selective"),
    ),
)
