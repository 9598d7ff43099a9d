from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests compute: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {name} is unknown: use cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device {name}: torch finds no GPU on this machine: leave --device out"
        )


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where a test computes: the CPU, or what `--device` names."""
    found = torch.device(pytestconfig.getoption("--device"))
    # Convolutions on a GPU round fp32 to 10 bits unless told otherwise; fp32 is to mean fp32 here.
    torch.backends.cudnn.allow_tf32 = False
    return found


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files recorded from Meta's original code on tiny random checkpoints."""
    return Path(__file__).parent / "golden"
