"""C++ files of this folder, built for this processor when they are first needed.

Libraries are cached in `~/.cache/earlyfusion` (or under XDG_CACHE_HOME); a change of the source,
its headers, the compiler or the processor builds a new one. Without a compiler (`$CXX`, `g++` or
`clang++`), or with EARLYFUSION_NATIVE=0, torch's own operators do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_INCLUDE = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-w")


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ file, built if needed; None if it cannot be built."""
    if os.environ.get("EARLYFUSION_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None  # RuntimeError: neither XDG_CACHE_HOME nor a home folder


def _built(source: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    texts = [path.read_bytes() for path in sources(source)]
    key = (*texts, version.stdout, _processor(), " ".join(_FLAGS).encode())
    name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "earlyfusion"
    target = folder / f"{source.stem}-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            # Renamed once complete: another process may build or load the same library.
            library = Path(work) / target.name
            command = [compiler, *_FLAGS, str(source), "-o", str(library)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            library.rename(target)
    return target


def sources(source: Path) -> list[Path]:
    """A C++ file and the headers that it includes from its folder, directly or through others."""
    files = [source]
    for path in files:  # grows during the loop
        names = (name.decode() for name in _INCLUDE.findall(path.read_bytes()))
        headers = (source.with_name(name) for name in names)
        files += [header for header in dict.fromkeys(headers) if header not in files]
    return files


def _processor() -> bytes:
    """What `-march=native` depends on: several machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith("flags")), "").encode()
    except OSError:
        return platform.processor().encode()
