"""What runs beside the event loop lets it have a core first."""

from __future__ import annotations

import os
import sys
from threading import get_native_id

_NICENESS = 5


def yield_to_others() -> None:
    """Let the event loop have a core before this thread, and those that it starts (Linux; elsewhere
    all threads are alike)."""
    if sys.platform == "linux":
        thread = get_native_id()
        nice = min(os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS, 19)
        os.setpriority(os.PRIO_PROCESS, thread, nice)
