"""Blocks of the cache: which branches read them, what they hold, which is taken next. Without
tensors.

The keys and values of a branch lie in blocks of `size` tokens, listed in its block table. A full
block never changes, so any number of branches may read it; a block that is being filled belongs to
one branch. Blocks that no branch reads keep their content until they are needed, the least recently
read going first, and serve later prompts that begin alike: full ones are shared, the beginning of
another one is copied. A full block is found by a hash of its tokens, of everything before them, and
of the adapter that read them, since another adapter's keys and values differ.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from earlyfusion.errors import SettingError

BLOCK_SIZE = 32
"""Tokens per block. The compiled step reads sixteen at a time, so it is a multiple of sixteen."""

_CANDIDATES = 64  # at most so many blocks behind one prefix are compared, the newest first


@dataclass(eq=False)
class Branch:
    """One condition of a request: `tokens` to read, the first `read` of which are in `blocks`.
    `keys` are the hashes of its full blocks. `adapter` names the weights that read it, "" for the
    model's own. `filling_to` is where the block ends that the pool knows it to be filling."""

    tokens: list[int]
    blocks: array[int] = field(default_factory=lambda: array("q"))
    read: int = 0
    keys: list[bytes] = field(default_factory=list)
    adapter: str = ""
    filling_to: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.read

    @property
    def parent(self) -> bytes:
        """The key of everything before its first block that is not full."""
        return self.keys[-1] if self.keys else _root(self.adapter)


class Copy(NamedTuple):
    """Copy the first `tokens` tokens of block `source` to block `target`."""

    source: int
    target: int
    tokens: int


class Prefix(NamedTuple):
    """The full blocks of a prompt that the cache already holds, and their keys."""

    blocks: list[int]
    keys: list[bytes]


@dataclass(eq=False)
class _Content:
    """Tokens of a block behind the prefix `parent`. A full block has a `key`. A block being filled
    belongs to a `branch`, of which it holds the tokens from `start` on."""

    parent: bytes
    branch: Branch | None
    start: int
    sealed: list[int] = field(default_factory=list)
    key: bytes | None = None

    def tokens(self, size: int) -> list[int]:
        if self.branch is None:
            return self.sealed
        return self.branch.tokens[self.start : min(self.branch.read, self.start + size)]


class BlockPool:
    """`number` blocks of `size` tokens. Without `shares`, no prompt reuses blocks of another."""

    def __init__(self, number: int, size: int = BLOCK_SIZE) -> None:
        if number < 1 or size < 1:
            raise SettingError(f"{number} blocks of {size} tokens: at least 1 of 1 is needed")
        self.size, self.shares = size, True
        self.references = [0] * number
        self._empty = list(range(number - 1, -1, -1))  # the last one is taken first
        # Dicts without values serve as ordered sets.
        self._cached: dict[int, None] = {}  # unread blocks with content, least recently read first
        self._content: list[_Content | None] = [None] * number
        self._by_key: dict[bytes, int] = {}
        self._behind: dict[bytes, dict[int, None]] = {}  # blocks with content, by their parent

    def __len__(self) -> int:
        return len(self.references)

    @property
    def free(self) -> int:
        """The number of blocks that no branch reads."""
        return len(self._empty) + len(self._cached)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def content(self, block: int) -> Sequence[int]:
        """The tokens whose keys and values a block holds."""
        content = self._content[block]
        return [] if content is None else content.tokens(self.size)

    def find(self, tokens: list[int], adapter: str = "") -> Prefix:
        """The full blocks that the cache holds of a prompt. The prompt's last token is never among
        them: it must be read to get the logits behind it."""
        found = Prefix([], [])
        while self.shares and (end := (len(found.blocks) + 1) * self.size) < len(tokens):
            parent = found.keys[-1] if found.keys else _root(adapter)
            key = _key(parent, tokens[end - self.size : end])
            if key not in self._by_key:
                break
            found.blocks.append(self._by_key[key])
            found.keys.append(key)
        return found

    def unread(self, prefixes: Iterable[Prefix]) -> int:
        """The number of free blocks among these prefixes."""
        return len({b for prefix in prefixes for b in prefix.blocks if not self.references[b]})

    def give(self, branch: Branch, prefix: Prefix) -> None:
        for block in prefix.blocks:
            self._cached.pop(block, None)
            self.references[block] += 1
        branch.blocks.extend(prefix.blocks)
        branch.keys += prefix.keys
        branch.read = len(prefix.blocks) * self.size

    def extend(self, branch: Branch, tokens: int) -> Copy | None:
        """Give a branch new blocks until it has room for this number of tokens. Behind a prefix of
        full blocks, the first new block begins with a copy of what the one that agrees longest with
        the rest of the prompt has in common with it."""
        number = len(branch.blocks)
        source, shared = None, 0
        if self.shares and branch.read == number * self.size:
            source, shared = self._longest(branch)
        while len(branch.blocks) < self.needed(tokens):
            branch.blocks.append(self._take())
        if source is None:
            return None
        branch.read += shared
        self._begin(branch)
        target = branch.blocks[number]
        # If the source itself was the next free block, it is simply filled further.
        return None if source == target else Copy(source, target, shared)

    def read(self, branch: Branch, number: int) -> None:
        """Count the branch's next tokens as read."""
        branch.read += number
        if self.shares:
            self._index(branch)

    def release(self, branch: Branch) -> None:
        """Take a branch's blocks away. They keep their content until they are needed."""
        if self.shares:
            self._index(branch)
        # Last block first, so that the beginning of a prompt is evicted last.
        for block in reversed(branch.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self._leave(block)
        del branch.blocks[:]
        branch.keys, branch.read, branch.filling_to = [], 0, 0

    def drop(self, branch: Branch) -> list[int]:
        """Release a branch and forget what only it has read. Returns those blocks."""
        alone = [block for block in branch.blocks if self.references[block] == 1]
        for block in alone:
            self._forget(block)
        branch.keys, branch.read = [], 0
        self.release(branch)
        return alone

    def forget(self) -> None:
        """Forget the content of all blocks, as the weights have changed."""
        for block in range(len(self)):
            self._forget(block)
        self._empty += reversed(self._cached)
        self._cached.clear()

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            self._forget(block)
        self.references[block] = 1
        return block

    def _leave(self, block: int) -> None:
        content = self._content[block]
        # The branch will change or go: keep a copy of the tokens of its last block.
        if content is not None and content.branch is not None:
            content.sealed, content.branch = content.tokens(self.size), None
        if content is None or not content.sealed:
            self._forget(block)
            self._empty.append(block)
        else:
            self._cached[block] = None

    def _index(self, branch: Branch) -> None:
        """Register the blocks of a branch that are full, and the one it is filling."""
        size = self.size
        while (end := (len(branch.keys) + 1) * size) <= branch.read:
            number = len(branch.keys)
            parent = branch.parent
            tokens = branch.tokens[end - size : end]
            key = _key(parent, tokens)
            branch.keys.append(key)
            self._fill(branch.blocks[number], parent, key, tokens)
        if branch.read % size:
            self._begin(branch)

    def _fill(self, block: int, parent: bytes, key: bytes, tokens: list[int]) -> None:
        """Register a full block. Of several with the same content only the first can be found."""
        self._forget(block)
        if key not in self._by_key:
            self._content[block] = _Content(parent, None, 0, tokens, key)
            self._by_key[key] = block
            self._behind.setdefault(parent, {})[block] = None

    def _begin(self, branch: Branch) -> None:
        number = branch.read // self.size
        branch.filling_to = (number + 1) * self.size
        block = branch.blocks[number]
        content = self._content[block]
        if content is None or content.branch is not branch:
            self._forget(block)
            parent = branch.parent
            self._content[block] = _Content(parent, branch, number * self.size)
            self._behind.setdefault(parent, {})[block] = None

    def _forget(self, block: int) -> None:
        content, self._content[block] = self._content[block], None
        if content is None:
            return
        if content.key is not None:
            del self._by_key[content.key]
        behind = self._behind[content.parent]
        del behind[block]
        if not behind:
            del self._behind[content.parent]

    def _longest(self, branch: Branch) -> tuple[int | None, int]:
        """The block that agrees longest with the next tokens of a branch, and with how many."""
        start = len(branch.blocks) * self.size
        tokens = branch.tokens[start : min(start + self.size, len(branch.tokens) - 1)]
        behind = self._behind.get(branch.parent, {})
        best: tuple[int | None, int] = None, 0
        for block in islice(reversed(behind), _CANDIDATES):
            shared = _shared(self.content(block), tokens)
            if shared > best[1]:
                best = block, shared
        return best


def _root(adapter: str) -> bytes:
    return blake2b(adapter.encode(), digest_size=16).digest() if adapter else b""


def _key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """A hash of a full block and of all before it: 128 bits, so that no two are alike."""
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()


def _shared(held: Sequence[int], tokens: Sequence[int]) -> int:
    """The number of tokens that two lists have in common at their beginning."""
    for number, (one, other) in enumerate(zip(held, tokens, strict=False)):
        if one != other:
            return number
    return min(len(held), len(tokens))
