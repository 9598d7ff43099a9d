"""Files of generated images: decodes codes to pixels, and encodes these as PNG, WEBP or JPEG.

If the engine runs in another process and the model is on a CPU, a third process decodes images. A
thread of the server's process would take Python's interpreter lock hundreds of times per image, and
every client would wait for it. The process starts with the first image. Until it has started, and
after it has ended, threads decode.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import socket
import struct
from collections import deque
from concurrent.futures import Executor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import BinaryIO, NamedTuple, TypeAlias

import torch

from earlyfusion.api import Chameleon
from earlyfusion.generation.request import ImageDone, ImagePreview
from earlyfusion.serve.image_io import encode_image
from earlyfusion.serve.niceness import yield_to_others
from earlyfusion.serve.protocol import Format
from earlyfusion.serve.store import digest_pixels

log = logging.getLogger("earlyfusion.serve")
_LENGTH = struct.Struct("<Q")  # before each pickle between the two processes


class ImageFile(NamedTuple):
    """The bytes of an image file, and the digest of its pixels (`store.digest_pixels`)."""

    data: bytes
    pixel_digest: bytes


Task: TypeAlias = tuple[ImageDone | ImagePreview, Format, int]
"""The arguments of `Decoder.file`."""


class _EndedError(Exception):
    """The decoder's process has ended."""


class Decoder:
    """Makes the image files of one server, in `threads`, or `in_process` in a process of its
    own."""

    def __init__(self, model: Chameleon, threads: Executor, in_process: bool) -> None:
        self._model, self._threads, self._in_process = model, threads, in_process
        self._process: _Process | None = None
        self._starting: asyncio.Task[None] | None = None

    async def file(
        self, event: ImageDone | ImagePreview, output_format: Format, compression: int
    ) -> ImageFile:
        """The file of a finished or an unfinished image; `compression` is the quality of webp and
        jpeg, 0 to 100."""
        process = self._ready_process()
        if process is not None:
            try:
                return await process.run((event, output_format, compression))
            except _EndedError:
                self._drop(process)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, image_file, self._model, event, output_format, compression
        )

    @property
    def has_process(self) -> bool:
        """Whether a process decodes now."""
        return self._process is not None

    async def close(self) -> None:
        self._in_process = False
        if self._starting is not None:
            await self._starting
        if self._process is not None:
            self._process.close()

    def _ready_process(self) -> _Process | None:
        """The process, or None until it has started. Starts it if it is not starting yet."""
        if self._in_process and self._process is None and self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return self._process

    async def _start(self) -> None:
        try:
            self._process = await _Process.start(self._model)
        except Exception:
            log.exception("the decoder's process did not start: threads decode images")
            self._in_process = False
        self._starting = None

    def _drop(self, process: _Process) -> None:
        if self._process is process:
            log.error("the decoder's process ended: it is started again")
            self._process = None


class _Process:
    """The decoder's process. It runs one task at a time, in the order of the calls."""

    def __init__(self, process: BaseProcess, writer: asyncio.StreamWriter) -> None:
        self._process, self._writer = process, writer
        self._results: deque[asyncio.Future[ImageFile]] = deque()  # that are still to come
        self._ended = False
        # asyncio holds tasks weakly: without this reference it could be garbage-collected.
        self._reader_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, model: Chameleon) -> _Process:
        """Start a process, and wait until it is ready. Raises whatever error prevents that."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = get_context("spawn").Process(target=_run, args=(theirs, model), daemon=True)
            await asyncio.to_thread(process.start)
        reader, writer = await asyncio.open_connection(sock=ours)
        await reader.readexactly(1)  # sent when the process is ready
        started = cls(process, writer)
        started._reader_task = asyncio.create_task(started._read(reader))
        return started

    async def run(self, task: Task) -> ImageFile:
        """The file that a task makes. Raises `RuntimeError` for an image that cannot be decoded,
        `_EndedError` if the process has ended."""
        if self._ended:
            raise _EndedError
        future = asyncio.get_running_loop().create_future()
        self._results.append(future)
        self._writer.write(_to_message(task))
        return await future

    def close(self) -> None:
        self._writer.close()
        self._process.kill()
        self._process.join()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                [length] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                result = pickle.loads(await reader.readexactly(length))
                future = self._results.popleft()
                if future.done():  # cancelled: its client has left
                    continue
                if isinstance(result, ImageFile):
                    future.set_result(result)
                else:
                    future.set_exception(result)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._ended = True
            self._writer.close()
            for future in self._results:
                if not future.done():
                    future.set_exception(_EndedError())


def image_file(
    model: Chameleon, event: ImageDone | ImagePreview, output_format: Format, compression: int
) -> ImageFile:
    """As `Decoder.file`, in the calling thread."""
    decoded = model.with_pixels(event)
    assert isinstance(decoded, ImageDone | ImagePreview) and decoded.pil is not None
    data = encode_image(decoded.pil, output_format, compression)
    return ImageFile(data, digest_pixels(decoded.pil))


def _to_message(content: object) -> bytes:
    data = pickle.dumps(content)
    return _LENGTH.pack(len(data)) + data


def _run(connection: socket.socket, model: Chameleon) -> None:
    """The main function of the process, which ends when the server closes the connection."""
    # A signal to the process group is meant for the server, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield_to_others()
    # All threads of a step of the engine wait for the slowest: an image decoded on all cores would
    # stop the engine again and again.
    torch.set_num_threads(max(1, torch.get_num_threads() // 4))
    try:
        with connection, connection.makefile("rb") as stream:
            connection.sendall(b"\0")
            while (task := _read_task(stream)) is not None:
                connection.sendall(_to_message(_run_task(model, task)))
    except OSError:
        pass  # the server has ended


def _read_task(stream: BinaryIO) -> Task | None:
    """The next task; None at the end of the connection."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    task: Task = pickle.loads(stream.read(_LENGTH.unpack(head)[0]))
    return task


def _run_task(model: Chameleon, task: Task) -> ImageFile | Exception:
    try:
        return image_file(model, *task)
    except Exception as error:
        log.exception("an image could not be decoded")
        return RuntimeError(f"{type(error).__name__} in the decoder's process")
