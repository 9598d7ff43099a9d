"""Lowers the priority of background threads, so that the event loop gets a core first."""

from __future__ import annotations

import os
import sys
from threading import get_native_id

_NICENESS = 5


def yield_to_others() -> None:
    """Lower the priority of this thread and of the threads that it starts (on Linux only)."""
    if sys.platform == "linux":
        thread = get_native_id()
        nice = min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, 19)
        os.setpriority(os.PRIO_PROCESS, thread, nice)
