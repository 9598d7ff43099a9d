from __future__ import annotations

from pathlib import Path

import pytest
import torch

from earlyfusion.devices import resolve_device
from earlyfusion.errors import SettingError

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests compute: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    try:
        resolve_device(config.getoption("--device"))
    except SettingError as error:
        raise pytest.UsageError(f"--device: {error}") from None


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where a test computes: the CPU, or what `--device` names."""
    # Convolutions on a GPU round fp32 to 10 bits unless told otherwise; fp32 is to mean fp32 here.
    torch.backends.cudnn.allow_tf32 = False
    return resolve_device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files recorded from Meta's original code on tiny random checkpoints."""
    return Path(__file__).parent / "golden"
