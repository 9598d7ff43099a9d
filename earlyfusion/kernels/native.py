"""Compiled parts: a C++ file beside its module, built for this processor when it is first needed.

The library lies in `~/.cache/earlyfusion` (or under XDG_CACHE_HOME): one for each source, compiler
and processor. Without a compiler (`$CXX`, `g++` or `clang++`), or with EARLYFUSION_NATIVE=0, there
is none, and torch's own operators do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-w")


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ file, built where it is not there yet; None where it cannot be had."""
    if os.environ.get("EARLYFUSION_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(source: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    parts = (source.read_bytes(), version.stdout, _processor(), " ".join(_FLAGS).encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "earlyfusion"
    target = folder / f"{source.stem}-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / target.name
            command = [compiler, *_FLAGS, str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            made.rename(target)
    return target


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith("flags")), "").encode()
    except OSError:
        return platform.processor().encode()
