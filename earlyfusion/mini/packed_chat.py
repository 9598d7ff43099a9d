"""The last stage of the larger `mini`: chats, lists and questions about several images.

    earlyfusion train mini_packed_chat data=DIR/emoji device=cuda minutes=1 \\
        image_tokenizer=runs/mini_named_image_tokenizer start=runs/mini_packed_transformer

It trains the tasks that are rare in `mini_packed_transformer`, at a lower learning rate, with the
image codes of that run and fewer input codes replaced. A stage of `pretrain_mini`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.mini import packed_transformer as mini_packed_transformer
from earlyfusion.mini.drawings import TASKS
from earlyfusion.mini.emoji.mixture import MixtureConfig
from earlyfusion.mini.packed_transformer import main
from earlyfusion.train.device_rows import CodeNoiseConfig

__all__ = ["config", "main"]

_base = mini_packed_transformer.config

config = replace(
    _base,
    start=Path("runs/mini_packed_transformer"),
    run=replace(_base.run, out=Path("runs/mini_packed_chat"), steps=1000),
    optim=replace(_base.optim, lr=5e-4, muon_lr=0.005, warmup_steps=20, decay="linear"),
    mixture=MixtureConfig(
        documents=40_000,
        dialogues=0.6,
        pairs=0.14,
        requests=0.14,
        studies=0.1,
        bare=0.02,
        scenes=0.06,
        unknown=0.02,
        wordings=0.5,
        varied=True,
        tasks=dict(TASKS),
        seed=1,
    ),
    cut=CodeNoiseConfig(replace=0.03, changed_answers=0.1),
)
