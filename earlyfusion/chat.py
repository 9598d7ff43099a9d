"""A conversation on standard input: lines in, replies out.

At a terminal a mistake costs one line; in a pipe it ends the chat, so that a script notices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from earlyfusion.content import Image, Message, Segment, Text, fill_placeholders
from earlyfusion.errors import EarlyFusionError, SettingError
from earlyfusion.terminal import Album, Screen, answer, check_writable

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon, Output
    from earlyfusion.generation.settings import SamplingParams

HELP = "/image FILE adds a picture, /save FOLDER, /reset, /quit"


class Conversation:
    """The turns so far, and the pictures that wait for the next one."""

    def __init__(
        self, chameleon: Chameleon, output: Output, sampling: SamplingParams, album: Album
    ) -> None:
        self._chameleon, self._output, self._sampling = chameleon, output, sampling
        self._album, self._screen = album, Screen()
        self._asks = sys.stdin.isatty()
        self._turns: list[Message] = []
        self._images: list[Image] = []
        self._commands = {"/image": self._image, "/save": self._save, "/reset": self._reset}

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        if self._asks:
            self._screen.line(HELP)
        while (line := self._read()) not in (None, "/quit"):
            try:
                self._obey(line or "")
            except (EarlyFusionError, KeyboardInterrupt) as error:
                self._screen.end()
                if not self._asks:
                    raise
                print(str(error) or "Stopped.", file=sys.stderr)

    def _read(self) -> str | None:
        if not self._asks:
            line = sys.stdin.readline()
            return line.strip() if line else None
        try:
            return input("> ").strip()
        except EOFError:
            return None

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("/"):
            raise SettingError(f"command {word!r} is unknown: {HELP}")
        elif line:
            self._say(line)

    def _say(self, text: str) -> None:
        turns = [*self._turns, Message("user", fill_placeholders(text, self._images))]
        reply = answer(
            self._chameleon, turns, self._output, self._sampling, self._album, self._screen
        )
        self._turns, self._images = [*turns, reply.message], []

    def _image(self, path: str) -> None:
        image = Image.open(path)
        self._images.append(image)
        self._screen.picture(image)

    def _reset(self, _: str) -> None:
        self._turns, self._images = [], []
        self._screen.line("The conversation starts afresh.")

    def _save(self, name: str) -> None:
        """Write conversation.json and its pictures to a folder."""
        folder = Path(name or "conversation")
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        book = Album(folder)
        messages = [
            {"role": turn.role, "content": [_part(part, book) for part in turn.parts]}
            for turn in self._turns
        ]
        text = json.dumps({"messages": messages}, ensure_ascii=False, indent=1)
        (folder / "conversation.json").write_text(text + "\n", encoding="utf-8")
        self._screen.line(f"saved in {folder}")


def _part(part: Segment, book: Album) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": book.save(part).name}
