"""Everything at once for a while: text, images both ways, structured text, clients that leave,
and requests that are wrong."""

from __future__ import annotations

import asyncio
import os
from functools import partial

import pytest
from serve_case import data_url, running

from earlyfusion.bench.clients import mixed_load
from earlyfusion.serve.process import RemoteEngine
from earlyfusion.serve.spawn import LoadPlan, start


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_mixed_load(seconds: int) -> None:
    # What the server and the engine may keep is small, and full once they are warm.
    plan = LoadPlan("mini", dtype="fp32", cache_bytes=32_000_000)
    remote = RemoteEngine(partial(start, plan), step_timeout=120)
    with running(remote, file_bytes=100_000) as server:
        port = int(server.url.rpartition(":")[2])
        pids = [os.getpid(), remote.pid]
        report = asyncio.run(mixed_load(port, seconds, 8, data_url(), pids))
        server.wait_until_idle()
        print(report.sent.total(), dict(report.sent))
        assert not report.errors, report.errors[:5]
        assert remote.pid == pids[1] and server.service.driver.restarts == 0
        if seconds > 60:
            growth = [report.growth(pid, warm=seconds // 5) for pid in pids]
            print("growth of both processes:", growth)
            assert max(growth) < 0.02
            assert len(report.sent) == 12
