"""Shards made by a Ray cluster: the only owner of Ray. Every machine of the cluster must see the
corpus, the model and the output under the same paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from earlyfusion.data.shard_maker import Job, ShardMaker
from earlyfusion.errors import DataError, EarlyFusionError, SettingError


def make_on_ray(job: Job, shards: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Notes of the shards as actors of Ray Data finish them, on `RAY_ADDRESS` or this machine."""
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise SettingError(
            "--ray needs Ray Data, which is not installed: pip install 'earlyfusion[ray]'"
        ) from None
    if not shards:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Each actor runs in a different folder, so paths must be absolute.
    job = replace(job, out=job.out.absolute(), model=job.model.absolute())
    notes = ray.data.from_items(
        [{"shard": n} for n in shards], override_num_blocks=len(shards)
    ).map(
        _Actor,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
        num_gpus=1 if job.device.startswith("cuda") else 0,
    )
    try:
        for row in notes.iter_rows():
            yield _note(row)
    except ray.exceptions.RayError as error:
        raise DataError(
            f"the cluster failed ({type(error).__name__}): run the same command again; finished "
            "shards are kept"
        ) from None


class _Actor:
    """A process of the cluster: makes one shard per row of the Ray data set."""

    def __init__(self, job: Job) -> None:
        self._maker = ShardMaker(job)

    def __call__(self, row: dict[str, int]) -> dict[str, str]:
        # As text: Ray would turn a note into columns, and lose empty values.
        try:
            return {"note": json.dumps(self._maker.make(int(row["shard"]))), "error": ""}
        except EarlyFusionError as error:
            return {"note": "", "error": str(error)}


def _note(row: dict[str, str]) -> dict[str, Any]:
    if row["error"]:
        raise DataError(row["error"])
    note: dict[str, Any] = json.loads(row["note"])
    return note
