"""The snippets of docs/transformers.md run, one after the other, on a small checkpoint."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.model.vqgan import VQGAN

DOCUMENT = Path(__file__).parent.parent / "docs" / "transformers.md"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def installed(block: str) -> bool:
    """Whether all that a block imports is here: quantising and fine-tuning are extras."""
    names = re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE)
    needed = {"bitsandbytes", "accelerate"} if "BitsAndBytesConfig" in block else set()
    return all(find_spec(name) for name in {*names, *needed})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny_processor(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    save_hf(tmp_path / "model", tiny_transformer(processor), VQGAN(CONFIG.vq_config), text, ends)
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {"folder": str(tmp_path / "model")}
    blocks = [b for b in snippets() if "register()" not in b and installed(b)]
    assert len(blocks) >= 8
    for block in blocks:
        exec(block, said)
    assert (tmp_path / "apple.png").is_file()
    assert said["pictures"][0].size == (16, 16)
    assert torch.isfinite(said["loss"])
    assert said["fresh"].get_image_tokens(torch.zeros(1, 3, 16, 16)).shape == (1, 64)
