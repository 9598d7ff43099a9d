"""Files of drawn pictures: codes are decoded, and the pixels encoded as PNG, WEBP or JPEG.

If the engine runs in another process and the model is on a CPU, pictures are decoded in a third
process. A thread beside the event loop would take Python's lock hundreds of times per picture, and
every client would wait for it. The process starts with the first picture. Until it has started, and
if it ends, threads decode.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from multiprocessing import get_context
from threading import Thread
from typing import NamedTuple

from earlyfusion.api import Chameleon
from earlyfusion.generation.request import ImageDone, ImagePreview
from earlyfusion.serve.niceness import yield_to_others
from earlyfusion.serve.pictures import encoded
from earlyfusion.serve.protocol import Format
from earlyfusion.serve.store import pixels_digest

log = logging.getLogger("earlyfusion.serve")


class Drawn(NamedTuple):
    """The file of a picture, and the digest of its pixels."""

    data: bytes
    pixels: bytes


class Decoder:
    """Makes the files of one server. Without a process, `threads` decode."""

    def __init__(self, model: Chameleon, threads: Executor, apart: bool) -> None:
        self._model, self._threads, self._apart = model, threads, apart
        self._pool: ProcessPoolExecutor | None = None
        self._starting = self._closed = False

    async def file(self, event: ImageDone | ImagePreview, form: Format, compression: int) -> Drawn:
        """The file of a whole or an unfinished picture."""
        loop = asyncio.get_running_loop()
        pool = self._started()
        if pool is not None:
            try:
                return await loop.run_in_executor(pool, _drawn_there, event, form, compression)
            except BrokenExecutor:
                self._lose(pool)
        return await loop.run_in_executor(
            self._threads, drawn, self._model, event, form, compression
        )

    @property
    def apart(self) -> bool:
        """Whether a process decodes now."""
        return self._pool is not None

    def close(self) -> None:
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor | None:
        """The process; None until it has started. Starts it if none is starting."""
        if self._apart and self._pool is None and not self._starting:
            self._starting = True
            Thread(target=self._start, name="start decoder", daemon=True).start()
        return self._pool

    def _start(self) -> None:
        pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_begin, initargs=(self._model,)
        )
        try:
            pool.submit(os.getpid).result()
        except Exception:
            log.exception("the decoder's process did not start: threads decode pictures")
            self._apart = False
            pool.shutdown(wait=False)
        else:
            self._pool = pool
        self._starting = False
        if self._closed:
            self.close()

    def _lose(self, pool: ProcessPoolExecutor) -> None:
        log.error("the decoder's process ended: it is started again")
        if self._pool is pool:
            self._pool = None
        pool.shutdown(wait=False)


def drawn(
    model: Chameleon, event: ImageDone | ImagePreview, form: Format, compression: int
) -> Drawn:
    """As `Decoder.file`, in the calling thread."""
    shown = model.with_pixels(event)
    assert isinstance(shown, ImageDone | ImagePreview) and shown.pil is not None
    return Drawn(encoded(shown.pil, form, compression), pixels_digest(shown.pil))


_there: list[Chameleon] = []  # in the decoder's process: its model


def _begin(model: Chameleon) -> None:
    # A signal to the process group is meant for the server, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Thread(target=_end_with_server, name="watch", daemon=True).start()
    yield_to_others()
    _there.append(model)


def _end_with_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(0)


def _drawn_there(event: ImageDone | ImagePreview, form: Format, compression: int) -> Drawn:
    return drawn(_there[0], event, form, compression)
