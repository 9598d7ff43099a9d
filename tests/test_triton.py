"""Triton's kernels without a GPU: equal to their definitions, compiled for A100 and H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(*options: str, **environment: str) -> str:
    """The tests of triton_case.py in a process of their own; what they printed."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-n0"]
    done = subprocess.run(
        [*command, str(TESTS / "triton_case.py"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_equal_their_definitions_in_the_interpreter() -> None:
    run("-k", "not compile", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_equal_their_definitions_over_many_shapes() -> None:
    run("-k", "not compile", TRITON_INTERPRET="1", EXAMPLES="200")


@pytest.mark.gpu
def test_kernels_equal_their_definitions_on_a_gpu() -> None:
    run("-k", "not compile", EXAMPLES="100")


def test_kernels_compile_and_fit_the_cards() -> None:
    """The output lists shared memory of a program and registers of a thread."""
    told = run("-k", "compile")
    assert told.count("registers") == 2 * (6 * 3 + 9 + 2) + 2 * 4
    print(told)
