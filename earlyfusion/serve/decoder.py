"""Files of generated images: codes are decoded, and the pixels encoded as PNG, WEBP or JPEG.

If the engine runs in another process and the model is on a CPU, images are decoded in a third
process. A thread beside the event loop would take Python's lock hundreds of times per image, and
every client would wait for it. The process starts with the first image. Until it has started, and
if it ends, threads decode.
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

from earlyfusion.api import Chameleon
from earlyfusion.generation.request import ImageDone, ImagePreview
from earlyfusion.serve.image_io import encoded
from earlyfusion.serve.niceness import yield_to_others
from earlyfusion.serve.protocol import Format
from earlyfusion.serve.store import pixels_digest

log = logging.getLogger("earlyfusion.serve")
_LENGTH = struct.Struct("<Q")  # before each pickle between the two processes


class ImageFile(NamedTuple):
    """The file of an image, and the digest of its pixels."""

    data: bytes
    pixels: bytes


Task: TypeAlias = tuple[ImageDone | ImagePreview, Format, int]


class _EndedError(Exception):
    """The decoder's process has ended."""


class Decoder:
    """Makes the files of one server. Without a process, `threads` decode."""

    def __init__(self, model: Chameleon, threads: Executor, apart: bool) -> None:
        self._model, self._threads, self._apart = model, threads, apart
        self._process: _Process | None = None
        self._starting: asyncio.Task[None] | None = None

    async def file(
        self, event: ImageDone | ImagePreview, output_format: Format, compression: int
    ) -> ImageFile:
        """The file of a whole or an unfinished image."""
        process = self._started()
        if process is not None:
            try:
                return await process.ask((event, output_format, compression))
            except _EndedError:
                self._lose(process)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, image_file, self._model, event, output_format, compression
        )

    @property
    def apart(self) -> bool:
        """Whether a process decodes now."""
        return self._process is not None

    async def close(self) -> None:
        self._apart = False
        if self._starting is not None:
            await self._starting
        if self._process is not None:
            self._process.close()

    def _started(self) -> _Process | None:
        """The process; None until it has started. Starts it if none is starting."""
        if self._apart and self._process is None and self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return self._process

    async def _start(self) -> None:
        try:
            self._process = await _Process.started(self._model)
        except Exception:
            log.exception("the decoder's process did not start: threads decode images")
            self._apart = False
        self._starting = None

    def _lose(self, process: _Process) -> None:
        if self._process is process:
            log.error("the decoder's process ended: it is started again")
            self._process = None


class _Process:
    """The decoder's process. It answers in order, one image after the other."""

    def __init__(self, process: BaseProcess, writer: asyncio.StreamWriter) -> None:
        self._process, self._writer = process, writer
        self._asked: deque[asyncio.Future[ImageFile]] = deque()
        self._ended = False
        self._reading: asyncio.Task[None] | None = None  # kept, as the loop does not keep it

    @classmethod
    async def started(cls, model: Chameleon) -> _Process:
        """A process that is ready. Raises what hindered it."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = get_context("spawn").Process(target=_run, args=(theirs, model), daemon=True)
            await asyncio.to_thread(process.start)
        reader, writer = await asyncio.open_connection(sock=ours)
        await reader.readexactly(1)  # it has loaded
        there = cls(process, writer)
        there._reading = asyncio.create_task(there._read(reader))
        return there

    async def ask(self, task: Task) -> ImageFile:
        """The answer. Raises the error of an image that cannot be decoded, or `_EndedError`."""
        if self._ended:
            raise _EndedError
        future = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self._writer.write(_message(task))
        return await future

    def close(self) -> None:
        self._writer.close()
        self._process.kill()
        self._process.join()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                [length] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                answer = pickle.loads(await reader.readexactly(length))
                future = self._asked.popleft()
                if future.done():  # its client has left
                    continue
                if isinstance(answer, ImageFile):
                    future.set_result(answer)
                else:
                    future.set_exception(answer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._ended = True
            self._writer.close()
            for future in self._asked:
                if not future.done():
                    future.set_exception(_EndedError())


def image_file(
    model: Chameleon, event: ImageDone | ImagePreview, output_format: Format, compression: int
) -> ImageFile:
    """As `Decoder.file`, in the calling thread."""
    shown = model.with_pixels(event)
    assert isinstance(shown, ImageDone | ImagePreview) and shown.pil is not None
    return ImageFile(encoded(shown.pil, output_format, compression), pixels_digest(shown.pil))


def _message(content: object) -> bytes:
    data = pickle.dumps(content)
    return _LENGTH.pack(len(data)) + data


def _run(connection: socket.socket, model: Chameleon) -> None:
    """The main function of the process: it ends with the connection, so with the server."""
    # A signal to the process group is meant for the server, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield_to_others()
    try:
        with connection, connection.makefile("rb") as stream:
            connection.sendall(b"\0")
            while (task := _next(stream)) is not None:
                connection.sendall(_message(_answer(model, task)))
    except OSError:
        pass  # the server has ended


def _next(stream: BinaryIO) -> Task | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    task: Task = pickle.loads(stream.read(_LENGTH.unpack(head)[0]))
    return task


def _answer(model: Chameleon, task: Task) -> ImageFile | Exception:
    try:
        return image_file(model, *task)
    except Exception as error:
        log.exception("an image could not be decoded")
        return RuntimeError(f"{type(error).__name__} in the decoder's process")
