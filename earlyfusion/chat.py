"""A chat in the terminal: reads lines from standard input and prints replies. After a wrong line
the chat continues; if the input is a pipe, its exit code is then 2, so that scripts notice."""

from __future__ import annotations

import json
import os
import shlex
import sys
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlyfusion.content import (
    Image,
    Message,
    Segment,
    Text,
    counted,
    fill_placeholders,
    read_turns,
)
from earlyfusion.errors import EarlyFusionError, PromptError, SettingError
from earlyfusion.files import next_number, removed_on_failure, write_next, write_whole
from earlyfusion.terminal import OutputFolder, Screen, answer, png_writer

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon
    from earlyfusion.generation.settings import Output, SamplingParams

HELP = "/image FILE adds an image, /undo, /reset, /save FOLDER, /load FOLDER, /quit"
_MAX_UNDO = 1000  # states that /undo can return to


class Conversation:
    """The turns so far, and the images for the next turn."""

    def __init__(
        self,
        chameleon: Chameleon,
        output: Output,
        sampling: SamplingParams,
        output_folder: OutputFolder,
    ) -> None:
        self._chameleon, self._output, self._sampling = chameleon, output, sampling
        self._output_folder, self._screen = output_folder, Screen()
        self._at_terminal = sys.stdin.isatty()
        self._turns: list[Message] = []
        self._next_images: list[Image] = []
        self._undo_states: list[tuple[list[Message], list[Image]]] = []
        self._saved_folder: ConversationFolder | None = None
        self._saved_turns: list[Message] = []
        self._has_warned = False  # of unsaved turns, since the last command
        self._has_failed = False
        self._commands = {
            "/image": self._add_image,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
        }

    def resume(self, folder: Path) -> None:
        """Continue a conversation that /save wrote. Raises an `EarlyFusionError`."""
        saved_folder = ConversationFolder(folder, _codebook(self._chameleon))
        turns = saved_folder.read()
        self._set_state(turns, [])
        self._saved_folder, self._saved_turns = saved_folder, turns
        self._screen.line(f"{counted(len(turns) // 2, 'turn')} of {folder}")

    def run(self) -> int:
        """Read lines until /quit or the end of the input. Returns the exit code."""
        if self._at_terminal:
            self._screen.line(HELP)
        try:
            while (line := self._read()) is not None:
                self._handle(line)
        except KeyboardInterrupt:
            self._warn_of_unsaved()
            raise
        return 2 if self._has_failed else 0

    def _handle(self, line: str) -> None:
        """Execute a line, and print its error if it is wrong."""
        try:
            self._execute(line)
        except EarlyFusionError as error:
            self._screen.end()
            self._has_failed = not self._at_terminal
            print(f"{'' if self._at_terminal else 'Error: '}{error}", file=sys.stderr)
        except KeyboardInterrupt:
            self._screen.end()
            if not self._at_terminal:
                raise
            print("Stopped.", file=sys.stderr)

    def _read(self) -> str | None:
        """The next line; None at the end of the chat. At the end, unsaved turns are reported, and
        at a terminal one more line is read, so that the user can still save them."""
        while True:
            line = self._read_line()
            if line not in (None, "/quit"):
                return line
            if self._has_warned or not self._warn_of_unsaved() or not self._at_terminal:
                return None

    def _read_line(self) -> str | None:
        """The next line, at a terminal with a prompt; None at the end of the input."""
        if not self._at_terminal:
            line = sys.stdin.readline()
            return line.strip() if line else None
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            if self._has_warned or not self._num_unsaved:
                raise
            return None

    @property
    def _num_unsaved(self) -> int:
        """The number of the user's turns that are not saved."""
        saved = {id(turn) for turn in self._saved_turns}
        return sum(turn.role == "user" and id(turn) not in saved for turn in self._turns)

    def _warn_of_unsaved(self) -> bool:
        """Print, once, how many turns are unsaved. Returns whether there are any."""
        if not self._num_unsaved:
            return False
        if not self._has_warned:
            turns = counted(self._num_unsaved, "turn")
            leave = ", leave again to drop it" if self._at_terminal else ""
            print(f"{turns} not saved: /save FOLDER keeps the conversation{leave}", file=sys.stderr)
        self._has_warned = True
        return True

    def _execute(self, line: str) -> None:
        """Carry out a command, or send the line to the model."""
        command, _, argument = line.partition(" ")
        self._has_warned = False
        if command in self._commands:
            self._commands[command](argument.strip())
        elif command == "/help":
            self._screen.line(HELP)
        elif command.startswith("/"):
            raise SettingError(f"command {command!r} is unknown: {HELP}")
        elif line:
            self._send(line)

    def _send(self, text: str) -> None:
        turns = [*self._turns, Message("user", fill_placeholders(text, self._next_images))]
        reply = answer(
            self._chameleon, turns, self._output, self._sampling, self._output_folder, self._screen
        )
        self._set_state([*turns, reply.message], [])

    def _set_state(self, turns: list[Message], images: list[Image]) -> None:
        """Set the turns, and the images for the next turn; /undo returns to the state before."""
        # New lists, as earlier states hold the old ones.
        self._undo_states = [*self._undo_states[1 - _MAX_UNDO :], (self._turns, self._next_images)]
        self._turns, self._next_images = turns, images

    def _add_image(self, typed: str) -> None:
        if not typed:
            raise SettingError("/image needs a file: give one, as in /image cat.png")
        image = Image.open(typed_path(typed))
        self._set_state(self._turns, [*self._next_images, image])
        self._screen.show_image(image)

    def _undo(self, _: str) -> None:
        if not self._undo_states:
            raise SettingError("there is nothing to undo: nothing has been said yet")
        self._turns, self._next_images = self._undo_states.pop()
        waiting = (
            f", {counted(len(self._next_images), 'image')} waiting" if self._next_images else ""
        )
        self._screen.line(f"back at {counted(len(self._turns) // 2, 'turn')}{waiting}")

    def _reset(self, _: str) -> None:
        notice = self._unsaved_notice()
        self._set_state([], [])
        self._saved_folder = None
        self._screen.line(f"The conversation starts anew{notice}.")

    def _load(self, typed: str) -> None:
        if not typed:
            raise SettingError("/load needs a folder: give one that /save wrote")
        notice = self._unsaved_notice()
        self.resume(typed_path(typed))
        if notice:
            self._screen.line(notice.removeprefix("; "))

    def _unsaved_notice(self) -> str:
        unsaved = counted(self._num_unsaved, "turn")
        return f"; {unsaved} not saved, /undo brings them back" if self._num_unsaved else ""

    def _save(self, typed: str) -> None:
        """Write conversation.json and its images to a folder."""
        folder = typed_path(typed) if typed else self._default_folder()
        saved_folder = self._saved_folder
        if saved_folder is None or saved_folder.path.absolute() != folder.absolute():
            saved_folder = ConversationFolder(folder, _codebook(self._chameleon))
        saved_folder.write(self._turns)
        self._saved_folder, self._saved_turns = saved_folder, self._turns
        self._screen.line(f"saved in {folder}")

    def _default_folder(self) -> Path:
        """The folder that this conversation was last saved to, or a new one."""
        if self._saved_folder is not None:
            return self._saved_folder.path
        if not os.path.lexists("conversation"):
            return Path("conversation")
        return Path(f"conversation-{max(2, next_number(Path(), 'conversation', ''))}")


class ConversationFolder:
    """A folder with one conversation: conversation.json, and its images. Generated images are saved
    with their codes, so that they are not encoded again, which would change them. `codebook`
    identifies the image tokenizer's codewords: codes for another one are ignored."""

    def __init__(self, path: Path, codebook: str) -> None:
        self.path, self._codebook = path, codebook
        self._text: str | None = None  # of conversation.json, as last read or written
        self._image_names: list[tuple[Image, str]] = []

    def read(self) -> list[Message]:
        """The turns in the folder. Raises an `EarlyFusionError`."""
        text = _read_text(self._json_path)
        try:
            data = json.loads(text or "")
            turns, codebook = data["messages"], data.get("codebook")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise PromptError(
                f"{self.path} holds no conversation.json that /save wrote: give its folder"
            ) from None
        if codebook != self._codebook:
            _remove_codes(turns)
        messages = [Message(*turn) for turn in read_turns(turns, self.path)]  # type: ignore[arg-type]
        if [turn.role for turn in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise PromptError(
                f"the turns of {self._json_path} are out of order: user and assistant alternate, "
                "the assistant's is the last"
            )
        self._text = text
        for turn, message in zip(turns, messages, strict=True):
            names = [p["image"] for p in turn["content"] if not isinstance(p, str) and "image" in p]
            self._image_names += zip(message.images, names, strict=True)
        return messages

    def write(self, turns: list[Message]) -> None:
        """Write the turns, whole or not at all. Replaces conversation.json only if this object has
        read or written it and it is unchanged since. Raises `SettingError`."""
        is_unchanged = self._text is not None and _read_text(self._json_path) == self._text
        if not is_unchanged:
            self._check_empty()
        names = list(self._image_names)
        with removed_on_failure() as new_files:
            messages = [
                {"role": t.role, "content": [self._part(p, names, new_files) for p in t.parts]}
                for t in turns
            ]
            data = {"codebook": self._codebook, "messages": messages}
            text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
            write_whole(
                self._json_path, lambda file: file.write(text.encode()), overwrite=is_unchanged
            )
        self._text, self._image_names = text, names

    @property
    def _json_path(self) -> Path:
        return self.path / "conversation.json"

    def _check_empty(self) -> None:
        """Raise `SettingError` if the folder holds anything."""
        try:
            is_empty = not os.path.lexists(self.path) or not any(self.path.iterdir())
        except OSError:
            is_empty = False
        if not is_empty:
            raise SettingError(
                f"{self.path} exists and holds other things, or was changed since: "
                "give /save the name of a new folder"
            )

    def _part(
        self, part: Segment, names: list[tuple[Image, str]], new_files: list[Path]
    ) -> dict[str, Any]:
        """A part as JSON. Writes an image that has no file yet, and adds it to `names` and
        `new_files`."""
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        name = next((name for image, name in names if image is part), None)
        if name is None:
            first = next_number(self.path, "image", ".png")
            new_files.append(write_next(self.path, "image", ".png", png_writer(part), first))
            name = new_files[-1].name
            names.append((part, name))
        codes = {} if part.codes is None else {"codes": part.codes.tolist()}
        return {"type": "image", "image": name} | codes


def typed_path(typed: str) -> Path:
    """The path in a typed or pasted text, which may be quoted, escaped with backslashes, or have
    ~."""
    unquoted = os.path.expanduser(typed)
    if os.path.lexists(unquoted):
        return Path(unquoted)
    try:
        words = shlex.split(typed)
    except ValueError:  # a single quote is part of the name
        return Path(unquoted)
    return Path(os.path.expanduser(words[0]) if len(words) == 1 else unquoted)


def _read_text(path: Path) -> str | None:
    """The text of a file; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _remove_codes(turns: Any) -> None:
    """Remove the codes of all images from turns in JSON."""
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                part.pop("codes", None)


def _codebook(chameleon: Chameleon) -> str:
    """An identifier of the codewords, the same for float32 and bfloat16 copies."""
    import torch

    codewords = chameleon.image_tokenizer.vqgan.codewords.detach()
    data = codewords.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    return blake2b(data, digest_size=8).hexdigest()
