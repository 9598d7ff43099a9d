"""The third stage of `mini`: more of all tasks, above all requests for images.

    earlyfusion train mini_drawings data=DIR/emoji \\
        image_tokenizer=runs/mini_image_tokenizer start=runs/mini_answers

It teaches image generation. A third of the documents are a request without a style and the thing's
first image in the data, so that the model sees these images often enough to generate them. The rest
are pairs in all styles, questions and lists. Before its final run, the shipped weights had two
shorter runs of this recipe at a constant rate (`decay=hold`). These, and machine, run time and
scores, are in the model card (earlyfusion/pretrained/mini/README.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.data.packing import RoleWeights
from earlyfusion.mini import answers as mini_answers
from earlyfusion.mini.transformer import DocumentsConfig, main
from earlyfusion.train.trainer import RunConfig

__all__ = ["config", "main"]

TASKS = {
    "caption": 14.0,
    "draw": 20.0,
    "caption_style": 3.0,
    "keyword": 2.0,
    "yesno_name": 5.0,
    "yesno_kind": 3.0,
    "category": 8.0,
    "common": 10.0,
    "odd": 4.0,
    "which": 5.0,
    "same_thing": 3.0,
    "colour": 4.0,
    "style_name": 2.0,
    "list_draw": 12.0,
    "list_name": 4.0,
    "restyle": 4.0,
    "chat_draw_ask": 3.0,
    "chat_caption_follow": 3.0,
}

config = replace(
    mini_answers.config,
    start=Path("runs/mini_answers"),
    rows=2,
    run=RunConfig(out=Path("runs/mini_drawings"), steps=4800, precision="bf16"),
    optim=replace(mini_answers.config.optim, lr=1e-3, warmup_steps=50, final_ratio=0.01),
    documents=DocumentsConfig(
        dialogues=150_000,
        tasks=TASKS,
        seed=400,
        pairs=0.1,
        usual=0.36,
        studies=0.34,
        unchanged=0.5,
        bare=0.1,
    ),
    weights=RoleWeights(prompt_image=0.03, answer_text=4.0, end=1.0),
)
