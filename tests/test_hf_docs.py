"""The snippets of docs/hf.md run, one after the other, on a small checkpoint."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN

DOCUMENT = Path(__file__).parent.parent / "docs" / "hf.md"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def installed(block: str) -> bool:
    """Whether all that a block imports is here: quantising and fine-tuning are extras."""
    names = re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE)
    needed = {"bitsandbytes", "accelerate"} if "BitsAndBytesConfig" in block else set()
    return all(find_spec(name) for name in {*names, *needed})


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"hidden_act": "gelu", "rope_scaling": YARN}, marks=pytest.mark.slow)],
    ids=["plain", "gelu and yarn"],
)
def test_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    processor = tiny_processor(tmp_path)
    config = replace(CONFIG, **changes)
    transformer = Transformer(config)
    transformer.load_state_dict(tiny_transformer(processor).state_dict())
    text = (tmp_path / "tokenizer.json").read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    save_hf(tmp_path / "model", transformer, VQGAN(CONFIG.vq_config), text, ends)
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {"folder": str(tmp_path / "model")}
    blocks = [b for b in snippets() if "register()" not in b and installed(b)]
    assert len(blocks) >= 8
    for block in blocks:
        exec(block, said)
    assert (tmp_path / "apple.png").is_file()
    assert said["generated"][0].size == (16, 16)
    assert torch.isfinite(said["loss"])
    result = said["model"].config
    assert result.hidden_act == config.hidden_act
    assert result.rope_parameters["rope_type"] == config.rope_type
    expected = said["model"](**said["inputs"]).logits
    torch.testing.assert_close(said["logits"], expected, atol=1e-4, rtol=1e-4)
    assert said["fresh"].get_image_tokens(torch.zeros(1, 3, 16, 16)).shape == (1, 64)
