"""C++ files of this folder, built for this processor when they are first needed.

Libraries are cached in `~/.cache/earlyfusion` (or under XDG_CACHE_HOME); a change of the source,
its headers, the compiler or the processor builds a new one. Without a compiler (`$CXX`, `g++` or
`clang++`), or with EARLYFUSION_NATIVE=0, torch's own operators do the work; so they do if a library
cannot be built or loaded, with a warning.
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
import warnings
from pathlib import Path

_INCLUDE = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-w")


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ file, built if needed; None without a compiler or if that fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.environ.get("EARLYFUSION_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{source.name} cannot be built or loaded, so torch's own operators do its work, more "
            f"slowly: {_reason(error)} (EARLYFUSION_NATIVE=0 chooses torch's without a warning)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return f"{error.cmd[0]} failed: {first.strip() or f'exit code {error.returncode}'}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {error.timeout:.0f} s"
    return str(error)


def _built(source: Path, compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    texts = [path.read_bytes() for path in sources(source)]
    key = (*texts, version.stdout, _processor(), " ".join(_FLAGS).encode())
    name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"{source.stem}-{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            # Renamed once complete: another process may build or load the same library.
            library = Path(work) / target.name
            command = [compiler, *_FLAGS, str(source), "-o", str(library)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            library.rename(target)
    return target


def _cache_folder() -> Path:
    """Raises RuntimeError if there is no folder to write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "earlyfusion"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise RuntimeError(f"{error}; XDG_CACHE_HOME names a folder that can be written") from None
    return folder


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
