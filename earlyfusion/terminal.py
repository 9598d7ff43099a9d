"""Replies on a terminal: text as it is generated, images as files and as half-block characters.
Half-blocks and progress bars are only shown on a terminal, and not with `--json`. Half-blocks also
need colours (not with NO_COLOR or TERM=dumb) and an encoding that has the character."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from earlyfusion.errors import SettingError
from earlyfusion.files import Write, check_writable, next_number, write_next

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon, Reply
    from earlyfusion.generation.settings import Output, SamplingParams

_MAX_COLUMNS = 40  # of an image in half-blocks
_DECODE_BATCH = 64  # images decoded together
_GAP = 4  # pixels between the images of a grid
_FORMATS = {".png": "PNG", ".webp": "WEBP"}
# With escape sequences a model could move the cursor, set colours or change the title.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class OutputFolder:
    """The folder that generated images are written to: image-N.png, with the next free number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[int, Path] = {}

    def check(self) -> None:
        """Raise `SettingError` if images cannot be written there. Creates nothing."""
        check_writable(self.folder)

    def save(self, image: Image) -> Path:
        """Write an image to a new file, and return its path. The same pixels give the same
        bytes."""
        first = next_number(self.folder, "image", ".png")
        path = write_next(self.folder, "image", ".png", png_writer(image), first)
        self._paths[id(image)] = path
        return path

    def path_of(self, image: Image) -> Path:
        """The path of a saved image, which must still be in memory: its `id` identifies it."""
        return self._paths[id(image)]


def png_writer(image: Image) -> Write:
    """A function that writes the image as PNG to a file."""
    pil = image.pil
    assert pil is not None
    return lambda file: pil.save(file, format="PNG")


def answer(
    chameleon: Chameleon,
    prompt: Prompt,
    output: Output,
    sampling: SamplingParams,
    output_folder: OutputFolder,
    screen: Screen,
) -> Reply:
    """Generate a reply, show it while it is generated, and save its images."""
    from earlyfusion.generation.request import Event, ImageProgress, TextDelta

    def watch(event: Event, image: Image | None) -> None:
        if isinstance(event, TextDelta):
            screen.text(event.text)
        elif isinstance(event, ImageProgress):
            screen.image_progress(event.codes_done, event.codes_total)
        elif image is not None:
            screen.show_image(image, output_folder.save(image))

    reply = chameleon.collect(chameleon.stream(prompt, output, sampling), watch)
    screen.end()
    return reply


def reply_json(reply: Reply, path_of: Callable[[Image], Path | str]) -> dict[str, Any]:
    """A reply as a JSON object, its images as the paths that `path_of` gives."""
    usage = reply.usage
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
        # Without the cached tokens, which depend on what ran before.
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "image_tokens": usage.image_tokens,
            "total_tokens": usage.total_tokens,
        },
    }


def image_grid(rows: Sequence[Sequence[PIL.Image.Image]]) -> PIL.Image.Image:
    """Rows of images of one size as one image, on white."""
    width, height = rows[0][0].size
    step_x, step_y = width + _GAP, height + _GAP
    size = (step_x * max(map(len, rows)) + _GAP, step_y * len(rows) + _GAP)
    grid = PIL.Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (_GAP + x * step_x, _GAP + y * step_y))
    return grid


def grid_writer(path: Path) -> Callable[[PIL.Image.Image], Write]:
    """A function that makes a writer of an image, in the format of the file name `path`. Raises
    `SettingError` for a format other than PNG and WEBP."""
    if path.suffix.lower() not in _FORMATS:
        raise SettingError(f"{path} is not an image file: end its name in {' or '.join(_FORMATS)}")
    format_name = _FORMATS[path.suffix.lower()]
    return lambda image: lambda file: image.save(file, format=format_name)


def decode_images(chameleon: Chameleon, codes_nhw: npt.NDArray[np.int64]) -> Iterator[Image]:
    """The images of codes [n, h, w], of which only a few are in memory at a time."""
    import torch

    for start in range(0, len(codes_nhw), _DECODE_BATCH):
        batch = codes_nhw[start : start + _DECODE_BATCH]
        pils = chameleon.image_tokenizer.decode(torch.from_numpy(batch))
        yield from map(Image, pils, batch)


class Screen:
    """Shows replies on standard output; a `quiet` screen shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shows_images = not quiet and can_show_images()
        self._line_open = False
        self._progress: Progress | None = None

    def line(self, text: str = "") -> None:
        """Show a line of the program itself."""
        self._close_line()
        self._write(text + "\n")

    def text(self, delta: str) -> None:
        """Show more text of the model, without control characters."""
        printable = delta.translate(_CONTROLS)
        if not self._line_open:
            printable = printable.lstrip()
        self._write(printable)

    def image_progress(self, done: int, total: int) -> None:
        """Show the progress of an image, in codes."""
        if self._progress is None:
            self._close_line()
            self._progress = progress_bar(self._quiet)
            self._progress.add_task("drawing")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def show_image(self, image: Image, path: Path | None = None) -> None:
        """Show a finished image, and the path of its file."""
        self.end_image()
        self._close_line()
        if self._shows_images and image.pil is not None:
            console = Console()
            console.print(half_blocks(image.pil, min(_MAX_COLUMNS, console.width)))
        if path is not None:
            self.line(str(path))

    def show_wide_image(self, image: PIL.Image.Image) -> None:
        """Show an image over the whole width of the terminal."""
        if self._shows_images:
            console = Console()
            console.print(half_blocks(image, console.width))

    def end_image(self) -> None:
        """Remove the progress of an image."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def end(self) -> None:
        """End the reply, and its last line."""
        self.end_image()
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


def can_show_images() -> bool:
    """Whether standard output is a terminal that can show half-blocks."""
    console = Console()
    colours = console.is_terminal and console.color_system and not console.no_color
    try:
        "▀".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return bool(sys.stdout.isatty() and colours)


def _can_redraw() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


@contextmanager
def spinner(text: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner with a text on stderr while the block runs. Yields a function that changes the
    text."""
    if quiet or not _can_redraw():
        yield lambda _: None
        return
    with Console(stderr=True).status(text) as status:
        yield lambda new_text: status.update(new_text)


def half_blocks(pil: PIL.Image.Image, columns: int) -> Characters:
    """An image as lines of at most `columns` characters, each of which shows two pixels."""
    width = min(columns, pil.width)
    rows = max(1, round(pil.height * width / pil.width / 2))
    small = pil.convert("RGB").resize((width, 2 * rows), PIL.Image.Resampling.LANCZOS)
    pixels = memoryview(small.tobytes())  # RGB, row by row
    blocks = Characters()
    for row in range(rows):
        for column in range(width):
            upper = 3 * (2 * row * width + column)
            lower = upper + 3 * width
            style = Style(color=_color(pixels, upper), bgcolor=_color(pixels, lower))
            blocks.append("▀", style)
        blocks.append("\n")
    blocks.rstrip()
    return blocks


def _color(pixels: memoryview, offset: int) -> Color:
    return Color.from_rgb(*pixels[offset : offset + 3])


@contextmanager
def show_progress(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar while the block runs. Yields a function that updates it: (done, total)."""
    with progress_bar(quiet) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_bar(quiet: bool) -> Progress:
    """A progress bar on stderr, shown on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not _can_redraw(),
    )
