"""A checkpoint that is open but not read, and an output folder that appears whole or not at all.

A conversion takes one `Stored` tensor after the other from a `Source`, so that its memory does not
grow with the model.
"""

from __future__ import annotations

import glob
import os
import pickle
import platform
import shutil
import signal
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.image_tokenizer import Mode
from earlyfusion.vocabulary import ImageLayout

Step = Callable[[int], None]

_SHOWN_KEYS = 10
_SHOWN_TENSORS = 3
# A mapped file is mapped anew after so many bytes: pages that were read leave the memory.
_KEPT_PAGES = 2**26


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what it is, and how to have it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """A tensor that is in memory already."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.detach)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def to(self, dtype: torch.dtype | None) -> Stored:
        if dtype in (None, self.dtype):
            return self
        return self.then(lambda tensor: tensor.to(dtype))

    def then(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The tensor after `change`, which is tried on its shape now."""
        after = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Stored(after.dtype, tuple(after.shape), lambda: change(self.read()))


@dataclass
class Source:
    """An open checkpoint under the names of this package; `vq` is empty where it has no VQ-GAN."""

    folder: Path
    config: ModelConfig
    tensors: dict[str, Stored]
    vq: dict[str, Stored]
    tokenizer: Path
    layout: ImageLayout
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    kind: str = "chameleon"
    resize_mode: Mode = "crop"
    bits: int | None = None
    is_part: bool = False

    def checked(self, wanted: Mapping[str, Tensor], vq_wanted: Mapping[str, Tensor]) -> Source:
        """Itself, if its names and shapes are those of the modules."""
        check_names(_shapes(wanted), {k: s.shape for k, s in self.tensors.items()}, self.folder)
        check_names(_shapes(vq_wanted), {k: s.shape for k, s in self.vq.items()}, self.folder)
        return self


class FiniteCheck:
    """Counts, in tensors as they are read, the values that are NaN or infinite."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def watch(self, tensors: Mapping[str, Stored], prefix: str = "") -> dict[str, Stored]:
        """The same tensors; each reading of one is looked through. `prefix` goes before names."""
        return {name: self._watched(prefix + name, stored) for name, stored in tensors.items()}

    def _watched(self, name: str, stored: Stored) -> Stored:
        def read() -> Tensor:
            tensor = stored.read()
            if not bool(torch.isfinite(tensor).all()):
                self._counts[name] = int((~torch.isfinite(tensor)).sum())
            return tensor

        return Stored(stored.dtype, stored.shape, read)

    @property
    def found(self) -> str:
        """The first tensors with such values and how many, as words; "" where there are none."""
        if not self._counts:
            return ""
        shown = [f"{n:,} in {name}" for name, n in [*self._counts.items()][:_SHOWN_TENSORS]]
        more = len(self._counts) - len(shown)
        rest = [f"the others in {more} more tensor{'s' * (more > 1)}"] if more else []
        total = sum(self._counts.values())
        values = "1 value is" if total == 1 else f"{total:,} values are"
        return f"{values} NaN or infinite ({', '.join([*shown, *rest])})"


class MappedFile:
    """A file of tensors by name, mapped into memory a part at a time."""

    def __init__(self, open_file: Callable[[], Callable[[str], Tensor]]) -> None:
        self._open, self._get, self._seen = open_file, open_file(), 0

    def stored(self, name: str) -> Stored:
        tensor = self._get(name)
        return Stored(tensor.dtype, tuple(tensor.shape), lambda: self.read(name))

    def read(self, name: str) -> Tensor:
        if self._seen > _KEPT_PAGES:
            self._get, self._seen = self._open(), 0
        tensor = self._get(name)
        self._seen += tensor.nbytes
        return tensor


def check_names(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """`CheckpointError` lists keys and shapes that do not match."""
    both = wanted.keys() & found.keys()
    problems = {
        ("lacks", ""): wanted.keys() - found.keys(),
        ("has", "unknown "): found.keys() - wanted.keys(),
        ("has wrong shapes for", ""): {name for name in both if wanted[name] != found[name]},
    }
    said = [f"{what} {_listed(keys, kind)}" for (what, kind), keys in problems.items() if keys]
    if said:
        raise CheckpointError(f"{source} does not fit its config: it {'; it '.join(said)}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into; it takes the place of `folder` at the end, or goes away on failure.

    SIGTERM is a failure too. Killed, it leaves a hidden folder beside `folder`, which nothing takes
    for a model, and which the next call for the same `folder` removes and names on stderr.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.earlyfusion-{_machine()}."
    _remove_leftovers(folder, prefix)
    with _ended_by_sigterm():
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        handle = os.open(partial, os.O_RDONLY)
        try:
            _lock(handle)
            yield partial
            partial.chmod(0o755)
            _sync(partial)
            _put_in_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


def _machine() -> str:
    """This machine in a name: another's processes and locks cannot be seen from here."""
    return blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _lock(handle: int) -> bool:
    """Lock an open folder until its process closes it or is gone; False where that cannot be."""
    if sys.platform == "win32":
        return False
    import fcntl

    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what runs that were killed left of `folder`: named as ours, and locked by nobody."""
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        # What stood there before is all that is left where its successor was not put in place.
        if left.suffix == ".old" and not folder.exists():
            continue
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(left)
                    print(f"removed {left}, left by a run that was killed", file=sys.stderr)
            finally:
                os.close(handle)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit`, so that every `finally` runs; where nobody else handles it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the cleaning up short
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def torch_load(path: Path) -> dict[str, Any]:
    """The dict of a file that torch wrote; only tensors and plain values are unpickled."""
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings(action="ignore"):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError):
        raise CheckpointError(
            f"{path} is missing, damaged, or holds more than tensors: download it again"
        ) from None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _listed(keys: Collection[str], kind: str) -> str:
    shown = ", ".join(sorted(keys)[:_SHOWN_KEYS])
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"{len(keys)} {kind}keys: {shown}{more}" if len(keys) > 1 else f"the {kind}key {shown}"


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    # A folder cannot be renamed onto a full one: the old one steps aside for a moment.
    old = partial.with_name(f"{partial.name}.old")
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
