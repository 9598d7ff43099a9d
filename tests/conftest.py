from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files recorded from Meta's original code on tiny random checkpoints."""
    return Path(__file__).parent / "golden"
