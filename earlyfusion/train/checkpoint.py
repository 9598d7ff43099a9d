"""Checkpoints of a run: atomic folders `step-00001000`, of which the newest complete one counts.

A checkpoint is written under a temporary name, flushed to disk and renamed, so a run that is killed
at any moment leaves a whole checkpoint or none. A single process writes `tensors.pt`. Several
processes write a shard each (torch.distributed.checkpoint) under `shards/`, and its CRC-32 into a
file beside it. Any number of processes can read either. Frozen weights are left out if the run can
check that it gets the same ones again (`fingerprint`). Nothing in a checkpoint can run code:
tensors are read with `weights_only=True`, and the index of the shards may hold only the classes
that it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from earlyfusion import parallel
from earlyfusion.errors import CheckpointError
from earlyfusion.files import flush_to_disk, replace_folder

_PREFIX, _PARTIAL, _CRC = "step-", ".partial-", ".crc32"
TENSORS, STATE, SHARDS = "tensors.pt", "state.json", "shards"
AVERAGE = "average"
"""Key of the averaged weights, by the names that they have in the model."""


class Saver:
    """Writes the checkpoints of a run and keeps the newest `keep`. Each of several processes has a
    saver and calls the same methods. With `in_background` the training goes on while a checkpoint
    is written; it counts once `poll` or `finish` has found it complete."""

    def __init__(self, run: Path, keep: int, in_background: bool) -> None:
        self._run, self._keep, self._in_background = run, keep, in_background
        self._is_distributed = dist.is_initialized()
        self._is_first = not self._is_distributed or dist.get_rank() == 0
        # The checkpoint that is being written: the future of its tensors, its step and state.
        self._pending: tuple[Future[Any], int, dict[str, Any]] | None = None
        # Its own group: its messages must not mix with those of the steps computed meanwhile.
        self._group = dist.new_group(backend="gloo") if self._is_distributed else None
        self._pool = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, after the one before it is complete. `tensors` are nested
        dicts; `state` must fit into JSON. Raises `OSError` if the disk is full."""
        self.finish()
        if self._is_first:
            _make_partial(self._run, step)
        self._barrier()
        partial = _partial_folder(self._run, step)
        future = (
            self._write_shards(partial, tensors)
            if self._is_distributed
            else self._write_file(partial, tensors)
        )
        self._pending = (future, step, state)
        if not self._in_background:
            self.finish()

    def poll(self) -> None:
        """Commit the checkpoint in the background if it is fully written; does not wait for it."""
        if self._pending is not None and self._pending[0].done():
            self._commit_pending()

    def finish(self) -> None:
        """Wait until all processes have written and committed everything."""
        if self._pending is not None:
            self._commit_pending()
        self._barrier()

    def _commit_pending(self) -> None:
        assert self._pending is not None
        future, step, state = self._pending
        self._pending = None
        with _raise_root_cause():
            future.result()
        if self._is_first:
            _commit(self._run, step, state, self._keep)

    def _barrier(self) -> None:
        if self._is_distributed:
            dist.barrier(group=self._group)

    def _write_file(self, partial: Path, tensors: dict[str, Any]) -> Future[Any]:
        if self._in_background:
            return self._pool.submit(_write, partial, _copy_to_cpu(tensors))
        _write(partial, tensors)
        return _finished_future()

    def _write_shards(self, partial: Path, tensors: dict[str, Any]) -> Future[Any]:
        """Write this process's shards; the future is done once they are on disk."""
        from torch.distributed.checkpoint.state_dict_saver import async_save, save

        flat, writer = dict(_flatten(tensors)), _writer(partial / SHARDS)
        if self._in_background:
            future = async_save(flat, storage_writer=writer, process_group=self._group)
            return cast(Future[Any], future)
        with _raise_root_cause():
            save(flat, storage_writer=writer, process_group=self._group)
        return _finished_future()


def _finished_future() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future


def _step_folder(run: Path, step: int) -> Path:
    """The folder of a complete checkpoint."""
    return run / f"{_PREFIX}{step:08d}"


def _partial_folder(run: Path, step: int) -> Path:
    """The folder in which a checkpoint is written, before it is complete."""
    return run / f"{_PARTIAL}{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, in ascending order."""
    names = (p.name.removeprefix(_PREFIX) for p in run.glob(f"{_PREFIX}*") if p.is_dir())
    return sorted(int(n) for n in names if n.isdigit())


def newest_undamaged(run: Path) -> tuple[int, list[str]]:
    """The step of the newest undamaged checkpoint (0 if there are no checkpoints), and a sentence
    to print for each newer one, which is renamed to `damaged-step-...`. Raises `CheckpointError` if
    all are damaged."""
    sentences: list[str] = []
    saved_steps = steps(run)
    for step in reversed(saved_steps):
        if _is_undamaged(_step_folder(run, step)):
            for damaged in (_step_folder(run, later) for later in saved_steps if later > step):
                aside = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(damaged, aside)
                sentences.append(
                    f"{damaged} is damaged and was renamed to {aside.name}: the run continues from "
                    f"step {step:,}"
                )
            return step, sentences
    if saved_steps:
        raise CheckpointError(
            f"every checkpoint in {run} is damaged: restore one, or give another out folder"
        )
    return 0, sentences


def has_ended(run: Path) -> bool:
    """Whether the run ended before its last step: by its minutes, or by its validation."""
    return bool(steps(run)) and bool(load_state(run).get("ended"))


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which will be written again."""
    for later in steps(run):
        if later > step:
            _remove(run, later)


def _is_undamaged(folder: Path) -> bool:
    """Whether state and tensors can be read: compares all bytes with their CRC-32."""
    try:
        if not isinstance(_read_state(folder), dict):
            return False
        if (folder / SHARDS).is_dir():
            return _has_all_shards(folder / SHARDS)
        # torch.save writes a zip file, which holds a CRC-32 of each tensor.
        with zipfile.ZipFile(folder / TENSORS) as file:
            return file.testzip() is None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, CheckpointError):
        return False


def _has_all_shards(folder: Path) -> bool:
    """Whether every shard that the index lists exists, is long enough and has its CRC-32."""
    entries = (_reader(folder).read_metadata().storage_data or {}).values()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    if any(sizes.get(e.relative_path, -1) < e.offset + e.length for e in entries):
        return False
    # Checkpoints of older versions have no such files: only lengths can be checked.
    with ThreadPoolExecutor(8) as pool:
        return all(pool.map(_matches_crc32, folder.glob(f"*{_CRC}")))


def _matches_crc32(crc_file: Path) -> bool:
    return crc_file.read_text(encoding="ascii") == _crc32(crc_file.with_suffix(""))


def _crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _writer(folder: Path) -> Any:
    """A writer of shards (`torch.distributed.checkpoint`) into this folder."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Writer(FileSystemWriter):
        """Stores the CRC-32 of each file before the other processes hear that it is written."""

        def write_data(self, plan: Any, planner: Any) -> Any:
            results = super().write_data(plan, planner)  # a future of torch's own class
            for name in {result.storage_data.relative_path for result in results.value()}:
                crc_file = folder / f"{name}{_CRC}"
                crc_file.write_text(_crc32(folder / name), encoding="ascii")
                flush_to_disk(crc_file)
            return results

    return Writer(folder)


def load(
    run: Path, step: int | None = None, only: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors, joined from their shards, and the state of the checkpoint of `step`, by default
    of the newest one.

    `only` is a key such as "model": from shards, nothing else is read. If the state has
    `began_with` (a `fingerprint`), "model" lacks the frozen weights. Raises `CheckpointError` if
    there is no such checkpoint, or it is damaged.
    """
    folder, state = _find(run, step)
    if (folder / SHARDS).is_dir():
        return _read_shards(folder / SHARDS, f"{only}/" if only else ""), state
    return _read_tensors(folder / TENSORS), state


def weights(run: Path) -> dict[str, Tensor]:
    """The newest weights of a run; the averaged ones if the run keeps a moving average."""
    tensors, _ = load(run, only="model")
    averaged: dict[str, Tensor] = tensors.get(AVERAGE, {})
    return {**tensors["model"], **averaged}


def load_state(run: Path, step: int | None = None) -> dict[str, Any]:
    """The state that `load` returns, without reading tensors."""
    return _find(run, step)[1]


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's frozen weights; "" if none is frozen, or the model is on the meta device.

    It covers names and shapes, and of each column the sum of its fp32 bit patterns, which is fast
    and the same on every device.
    """
    names, digest = frozen_names(model), hashlib.sha256()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    if not tensors or any(tensor.is_meta for tensor in tensors.values()):
        return ""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        for rows in torch.atleast_1d(tensor).split(64):  # these fit into a CPU's cache
            bits = rows.detach().float().view(torch.int32)
            digest.update(bits.sum(0, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], run: Path) -> None:
    """Fill a model with the "model" that `load` returns, from which frozen weights may be missing.
    Raises `CheckpointError` for a model of another shape."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError:  # a tensor has another shape
        missing, unexpected = [], ["shape"]
    if unexpected or not frozen_names(model).issuperset(missing):
        raise CheckpointError(
            f"{run} holds a model of another shape: give the same shape or another out folder"
        )


def load_into(tensors: dict[str, Any], run: Path, step: int | None = None) -> dict[str, Any]:
    """Fill `tensors` in place, which may be shards of a process; returns the state. Raises
    `CheckpointError` if one is missing or has another shape."""
    folder, state = _find(run, step)
    flat = dict(_flatten(tensors))
    if not (folder / SHARDS).is_dir():
        saved = dict(_flatten(_read_tensors(folder / TENSORS)))
        _check_shapes(flat, {name: tuple(value.shape) for name, value in saved.items()}, run)
        for name, value in flat.items():
            parallel.copy_shard(value, saved[name])
        return state
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    reader = _reader(folder / SHARDS)
    entries = reader.read_metadata().state_dict_metadata
    _check_shapes(flat, {name: tuple(entry.size) for name, entry in entries.items()}, run)
    load_shards(flat, storage_reader=reader)
    return state


def _find(run: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """Folder and state of the checkpoint of a step; None: the newest."""
    saved_steps = steps(run)
    if not saved_steps or (step is not None and step not in saved_steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"{run} holds {which}: train it first")
    folder = _step_folder(run, step or saved_steps[-1])
    try:
        return folder, _read_state(folder)
    except (OSError, ValueError):
        raise _damaged(folder) from None


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        tensors: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise _damaged(path.parent) from None
    return tensors


def _damaged(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is damaged: remove it, so that the checkpoint before it counts"
    )


def _make_partial(run: Path, step: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    # From a run that was killed while writing.
    for leftover in run.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _partial_folder(run, step).mkdir()


def _write(partial: Path, tensors: dict[str, Any]) -> None:
    with _raise_root_cause(), (partial / TENSORS).open("wb") as file:
        torch.save(tensors, file)
    flush_to_disk(partial / TENSORS)


@contextmanager
def _raise_root_cause() -> Iterator[None]:
    """If the block raises an error of torch that was caused by an `OSError` or by a signal's
    exception, raise that cause instead."""
    try:
        yield
    except BaseException as error:
        cause = _root_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from None


def _root_cause(error: BaseException | None) -> BaseException | None:
    """The `OSError` or signal's exception behind an error, also one that another process sent."""
    if isinstance(error, OSError) or not isinstance(error, Exception):  # KeyboardInterrupt etc.
        return error
    errors = [error.__cause__, error.__context__]
    errors += [failure[0] for failure in getattr(error, "failures", {}).values()]
    return next((cause for other in errors if (cause := _root_cause(other))), None)


def _commit(run: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Complete a checkpoint whose tensors are written, and remove older ones."""
    partial = _partial_folder(run, step)
    (partial / STATE).write_text(json.dumps(state | {"step": step}), encoding="utf-8")
    flush_to_disk(partial / STATE)
    replace_folder(partial, _step_folder(run, step))
    flush_to_disk(run)
    for old in steps(run)[:-keep]:
        _remove(run, old)


def _remove(run: Path, step: int) -> None:
    # Renamed first, so that an interrupted removal leaves nothing that counts as a checkpoint.
    removed = run / f"{_PARTIAL}old-{step:08d}"
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(_step_folder(run, step), removed)
    shutil.rmtree(removed, ignore_errors=True)


def _flatten(tensors: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries by their path, such as `model/lm_head.weight`."""
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{name}/")
        elif isinstance(value, Tensor):  # the optimizer's settings come from the run's config
            yield f"{path}{name}", value


def _unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_flatten`."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *keys, name = path.split("/")
        inner: dict[Any, Any] = nested
        # Parameters of an optimizer are numbered: `optimizer/state/0/exp_avg`.
        for key in keys:
            inner = inner.setdefault(int(key) if key.isdigit() else key, {})
        inner[name] = value
    return nested


def _check_shapes(
    targets: Mapping[str, Tensor], saved_shapes: Mapping[str, tuple[int, ...]], run: Path
) -> None:
    """Raise `CheckpointError` unless all tensors to be filled were saved in the same shape."""
    for name, value in targets.items():
        saved_shape = saved_shapes.get(name, "missing")
        if saved_shape != tuple(value.shape):
            raise CheckpointError(
                f"{run} holds a model of another shape ({name} is {saved_shape}, "
                f"not {tuple(value.shape)}): give the same shape or another out folder"
            )


def _read_shards(folder: Path, prefix: str) -> dict[str, Any]:
    """All tensors whose path begins with `prefix`, joined from their shards."""
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    reader = _reader(folder)
    entries = reader.read_metadata().state_dict_metadata
    flat = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():  # torch warns that a single process reads, which is intended
        warnings.simplefilter("ignore")
        load_shards(flat, storage_reader=reader, no_dist=True)
    return _unflatten(flat)


def _reader(folder: Path) -> Any:
    """A reader of the shards in this folder, which reads their index safely."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            # torch's reader would unpickle any class.
            try:
                with (folder / ".metadata").open("rb") as file:
                    metadata = _IndexUnpickler(file).load()
            except (OSError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(
                    f"{folder} has no index that can be read ({error}): use another checkpoint"
                ) from None
            assert isinstance(metadata, Metadata)
            if metadata.storage_meta is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of shards; refuses every class and function that an index does not need."""

    def find_class(self, module: str, name: str) -> Any:
        member = super().find_class(module, name) if module in _INDEX_MODULES else None
        if module.endswith(".metadata") and isinstance(member, type):
            return member
        if isinstance(member, torch.dtype) or name in _INDEX_NAMES.get(module, ()):
            return member
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _enum_member(owner: Any, name: str) -> Any:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 pickles as a call of getattr."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"getattr of {owner!r} does not belong there")


# What the index of shards may name, besides the classes of `torch.distributed.checkpoint.metadata`.
_INDEX_NAMES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}
_INDEX_MODULES = {*_INDEX_NAMES, "torch.distributed.checkpoint.metadata"}


def _copy_to_cpu(tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copies on the CPU, which can be written while the training continues."""
    copies: dict[Any, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            copies[name] = _copy_to_cpu(value)
        elif isinstance(value, Tensor):
            copies[name] = value.detach().to("cpu", copy=True)
        else:
            copies[name] = value
    return copies
