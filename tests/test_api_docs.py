"""The blocks of docs/api.md run, one after the other, and say what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL.Image
import pytest

import earlyfusion
from earlyfusion import errors
from earlyfusion.generation import request

DOCUMENT = Path(__file__).parent.parent / "docs" / "api.md"


def test_events_and_errors_are_public_and_on_the_page() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    results = [cls for cls in vars(errors).values() if isinstance(cls, type)]
    names = {cls.__name__ for cls in results if issubclass(cls, ValueError)}
    names |= {event.__name__ for event in get_args(request.Event)} | {"Event", "Usage"}
    assert names <= {*earlyfusion.__all__} and len(names) == 18
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python") >= 12
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/api.md, block {number + 1}", "exec"), said)
        if "print(model)" in block:
            shown = block.rpartition("# ")[2].split(",")[0]
            assert capsys.readouterr().out.startswith(shown)
        if "first =" in block:
            pairs = zip(said["first"].images, said["again"].images, strict=True)
            assert all(np.array_equal(one, other) for one, other in pairs)
            assert [reply.seed for reply in said["replies"]] == [7, 3]
        if "allowed_words" in block:
            assert not {"apple", "strawberry"} & {*said["reply"].text.split()}
        if "scores[0]" in block:
            assert said["best"] in said["answers"]
            assert all(score.logprob < 0 for score in said["scores"])
        if "logprobs=2" in block:
            assert [len(entry.top) for entry in said["reply"].logprobs][:1] == [2]
        if "event.pil.save" in block:
            images = sorted(tmp_path.glob("fruit-*.png"))
            with PIL.Image.open(images[0]) as image:
                assert len(images) == 2 and image.size == (64, 64)
        if "codes =" in block:
            assert said["codes"].shape == (1, 8, 8)
    replies = [
        m.generate("Name a fruit.", "text", seed=1).text for m in (said["model"], said["same"])
    ]
    assert replies[0] == replies[1]
    assert (tmp_path / "my-model" / "NOTICE.md").is_file()
