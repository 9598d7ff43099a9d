"""How a reply reaches a person: text as it comes, pictures as files and half-blocks.

Half-blocks and progress are drawn only where a person looks: on a terminal, and not with `--json`.
Half-blocks need colours too (not with NO_COLOR or TERM=dumb) and an encoding that has them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from rich.color import Color
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.text import Text as Characters

from earlyfusion.content import Image, Prompt, Text
from earlyfusion.files import Write, check_writable, next_number, write_next

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon, Reply
    from earlyfusion.generation.settings import Output, SamplingParams

_MAX_COLUMNS = 40
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Album:
    """The folder that drawn pictures go to: image-N.png, each with the next free number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[int, Path] = {}
        self._images: list[Image] = []

    def check(self) -> None:
        """Raise `SettingError` now if no picture could be written later; creates nothing."""
        check_writable(self.folder)

    def save(self, image: Image) -> Path:
        """Write a picture beside those that are there; the same pixels give the same bytes."""
        first = next_number(self.folder, "image", ".png")
        path = write_next(self.folder, "image", ".png", png(image), first)
        self._images.append(image)
        self._paths[id(image)] = path
        return path

    def path_of(self, image: Image) -> Path:
        return self._paths[id(image)]


def png(image: Image) -> Write:
    """What writes the pixels of a picture to a file."""
    pil = image.pil
    assert pil is not None
    return lambda file: pil.save(file, format="PNG")


def answer(
    chameleon: Chameleon,
    prompt: Prompt,
    output: Output,
    sampling: SamplingParams,
    album: Album,
    screen: Screen,
) -> Reply:
    """Generate a reply, showing it as it comes and filing its pictures."""
    from earlyfusion.generation.request import Event, ImageProgress, TextDelta

    def watch(event: Event, image: Image | None) -> None:
        if isinstance(event, TextDelta):
            screen.text(event.text)
        elif isinstance(event, ImageProgress):
            screen.drawing(event.codes_done, event.codes_total)
        elif image is not None:
            screen.picture(image, album.save(image))

    reply = chameleon.collect(chameleon.stream(prompt, output, sampling), watch)
    screen.end()
    return reply


def reply_json(reply: Reply, path_of: Callable[[Image], Path | str]) -> dict[str, Any]:
    """A reply as JSON has it, its pictures as the paths that `path_of` tells."""
    segments = [
        {"type": "text", "text": segment.text}
        if isinstance(segment, Text)
        else {"type": "image", "path": str(path_of(segment))}
        for segment in reply.segments
    ]
    return {
        "text": reply.text,
        "images": [segment["path"] for segment in segments if segment["type"] == "image"],
        "segments": segments,
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage) | {"total_tokens": reply.usage.total_tokens},
    }


def decoded(chameleon: Chameleon, *codes: npt.NDArray[np.int64]) -> list[Image]:
    """The pictures of codes [h, w] each."""
    import torch

    pictures = chameleon.image_tokenizer.decode(torch.from_numpy(np.stack(codes)))
    return [Image(picture, own) for picture, own in zip(pictures, codes, strict=True)]


class Screen:
    """Shows one reply after the other; `quiet` shows nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._pictures = not quiet and shows_pictures()
        self._line_open = False
        self._progress: Progress | None = None

    def line(self, text: str = "") -> None:
        """A line of our own, on a line of its own."""
        self._close_line()
        self._write(text + "\n")

    def text(self, delta: str) -> None:
        """More text of the model, without the characters that could steer the terminal."""
        shown = delta.translate(_CONTROLS)
        if not self._line_open:
            shown = shown.lstrip()
        self._write(shown)

    def drawing(self, done: int, total: int) -> None:
        """How much of the picture is drawn, in codes."""
        if self._progress is None:
            self._close_line()
            self._progress = progress_bar(self._quiet)
            self._progress.add_task("drawing")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def picture(self, image: Image, path: Path | None = None) -> None:
        """A whole picture, and the file that it was written to."""
        self.end_drawing()
        self._close_line()
        if self._pictures and image.pil is not None:
            console = Console()
            console.print(half_blocks(image.pil, min(_MAX_COLUMNS, console.width)))
        if path is not None:
            self.line(str(path))

    def end_drawing(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def end(self) -> None:
        """The reply is over."""
        self.end_drawing()
        self._close_line()

    def _close_line(self) -> None:
        if self._line_open:
            self._write("\n")

    def _write(self, text: str) -> None:
        if self._quiet or not text:
            return
        sys.stdout.write(text)
        sys.stdout.flush()
        self._line_open = not text.endswith("\n")


def shows_pictures() -> bool:
    """Whether standard output is a terminal that can show half-blocks."""
    console = Console()
    colours = console.is_terminal and console.color_system and not console.no_color
    try:
        "▀".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return bool(sys.stdout.isatty() and colours)


def _moves() -> bool:
    """Whether standard error is a terminal on which a line can be drawn again."""
    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


@contextmanager
def busy(what: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr for as long as the block runs; what is given says something else."""
    if quiet or not _moves():
        yield lambda _: None
        return
    with Console(stderr=True).status(what) as status:
        yield lambda words: status.update(words)


def half_blocks(picture: PIL.Image.Image, columns: int) -> Characters:
    """A picture in characters, at most `columns` wide: each shows one pixel above another."""
    width = min(columns, picture.width)
    rows = max(1, round(picture.height * width / picture.width / 2))
    small = picture.convert("RGB").resize((width, 2 * rows), PIL.Image.Resampling.LANCZOS)
    pixels = memoryview(small.tobytes())
    blocks = Characters()
    for row in range(rows):
        for column in range(width):
            above = 3 * (2 * row * width + column)
            below = above + 3 * width
            style = Style(color=_color(pixels, above), bgcolor=_color(pixels, below))
            blocks.append("▀", style)
        blocks.append("\n")
    blocks.rstrip()
    return blocks


def _color(pixels: memoryview, at: int) -> Color:
    return Color.from_rgb(*pixels[at : at + 3])


def progress_bar(quiet: bool) -> Progress:
    """A bar on stderr, for a person who waits."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not _moves(),
    )
