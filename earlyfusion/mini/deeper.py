"""The last stages of `mini`: ten layers instead of six, and images whose codes are partly replaced.

    earlyfusion train mini_deeper data=DIR/emoji \\
        image_tokenizer=runs/mini_image_tokenizer start=runs/mini_drawings

After the first stages the model knows the training images by their exact codes. Here each image has
five variants, a fifth of the codes of images in prompts is replaced, and a quarter of the images in
answers begins with the codes of another image, so that the model has to follow the request. Half of
the requests are in free wordings. `pretrain_mini` runs this recipe several times with other shares
of the sources and other learning rates (`STAGES` in pretrain.py; why is in docs/ablations.md). The
defaults are those of the run "last", but for `start_share`. Machine, run time and scores are in the
model card, earlyfusion/pretrained/mini/README.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.config import PRESETS
from earlyfusion.data.packing import RoleWeights
from earlyfusion.mini import packed_chat as mini_packed_chat
from earlyfusion.mini.packed_transformer import VariantsConfig, main
from earlyfusion.train.device_rows import CodeNoiseConfig

__all__ = ["config", "main"]

_base = mini_packed_chat.config

config = replace(
    _base,
    start=Path("runs/mini_drawings"),
    image_tokenizer=Path("runs/mini_image_tokenizer"),
    model=PRESETS["mini"],
    rows=2,
    prompts=(),
    run=replace(_base.run, out=Path("runs/mini_deeper"), steps=4744, save_every=300),
    optim=replace(_base.optim, kind="adamw", lr=7e-4, warmup_steps=50),
    mixture=replace(
        _base.mixture,
        documents=150_000,
        dialogues=0.28,
        pairs=0.3,
        requests=0.19,
        studies=0.2,
        bare=0.01,
        scenes=0.0,
        unknown=0.02,
        varied=False,
        seed=16,
    ),
    ways=VariantsConfig(plain=3, recoloured=2),
    cut=CodeNoiseConfig(
        replace=0.05, replace_prompts=0.2, near=0.8, changed_answers=0.0, swapped_answers=0.25
    ),
    weights=RoleWeights(prompt_image=0.0, answer_text=4.0, end=1.0),
)
