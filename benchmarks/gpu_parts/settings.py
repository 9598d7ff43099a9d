"""What all parts of gpu.py share: the sizes of a run, its models, and the limits of the device."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from earlyfusion import Chameleon
from earlyfusion.bench.limits import Limits, measure_limits
from earlyfusion.bench.parts import Skipped
from earlyfusion.bench.shapes import random_model


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. `batch_context` is the length of the prompts of many at once."""

    work: Path
    rehearses: bool = False
    device_name: str = "cuda"
    shape: str = "7b"
    contexts: Sequence[int] = (32, 1057)
    batches: Sequence[int] = (8, 64)
    batch_context: int = 512
    tokens: int = 32
    rounds: int = 3

    @property
    def device(self) -> torch.device:
        """The device; a part that finds none is skipped."""
        if self.device_name == "cuda" and not torch.cuda.is_available():
            raise Skipped("torch sees no CUDA device: use a machine with one, or --rehearse")
        return torch.device(self.device_name)

    def limits(self) -> Limits:
        """Those that the part `limits` has measured; measured now where it has not run."""
        file = self.work / "limits.json"
        if not file.is_file():
            found = measure_limits(self.device, small=self.rehearses)
            file.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return Limits(**json.loads(file.read_text(encoding="utf-8")))

    @property
    def plain(self) -> str:
        """The dtype of weights that are not packed."""
        return "float32" if self.rehearses else "bfloat16"

    def model(self, dtype: str, shape: str | None = None) -> Chameleon:
        """Random weights on the device."""
        folder = Path(tempfile.mkdtemp(dir=self.work))  # the tokenizer is read again later
        return random_model(shape or self.shape, self.device, dtype, folder)


def rehearsal(work: Path) -> Settings:
    """The same on a CPU, so small that all parts together take seconds."""
    return Settings(
        work,
        rehearses=True,
        device_name="cpu",
        shape="tiny",
        contexts=(8, 40),
        batches=(2, 3),
        batch_context=16,
        tokens=3,
        rounds=1,
    )


def need(*packages: str) -> None:
    """Skip this part, in a sentence, where a package is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed")


def free() -> None:
    """Give memory of the device back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gigabytes(device: torch.device) -> float:
    """The most memory of the device that tensors of this process have taken; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
