"""The block pool of the paged KV cache, with prefix caching: which branches use a block, which
tokens it holds, which block is evicted next. No tensors here.

The keys and values of a branch lie in blocks of `size` tokens, listed in its block table. A full
block never changes, so any number of branches may share it; a partial block belongs to one branch.
Blocks that no branch uses keep their content until they are needed, the least recently used being
evicted first, and serve later prompts with the same beginning: full blocks are shared, the matching
part of a partial one is copied. A full block is found by a hash of its tokens, of all tokens before
them, and of the adapter, whose keys and values differ from those of other weights.
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

_MAX_CANDIDATES = 64  # cached blocks with one parent that are compared, the newest first
_MIN_COPIED = 8
"""A copy of fewer than one in so many tokens of a block takes longer than computing them. Nearly
all prompts begin with the same token."""


@dataclass(eq=False)
class Branch:
    """One token sequence that the model reads for a request: its prompt and reply, or a condition
    of guidance."""

    tokens: list[int]
    blocks: array[int] = field(default_factory=lambda: array("q"))
    """The block table: where the keys and values of its computed tokens are."""
    num_computed: int = 0
    """The number of its first tokens whose keys and values are computed."""
    keys: list[bytes] = field(default_factory=list)
    """The hashes of its full blocks."""
    adapter: str = ""
    """The name of the adapter that reads it; "" for the model's own weights."""
    partial_end: int = 0
    """The end, in tokens, of the block that it is filling, if the pool has registered that
    block."""
    num_cached: int | None = None
    """The number of tokens that the cache already held when it first got blocks; None before."""

    @property
    def pending(self) -> int:
        """The number of tokens whose keys and values are not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def parent(self) -> bytes:
        """The key of everything before its first block that is not full."""
        return self.keys[-1] if self.keys else _root_key(self.adapter)


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
    """The tokens of a block, which follow the prefix with the key `parent`. A full block has a
    `key` too. A partial block that a `branch` is filling holds that branch's tokens from `start`
    on, any other block its `kept_tokens`."""

    parent: bytes
    branch: Branch | None
    start: int
    kept_tokens: list[int] = field(default_factory=list)
    key: bytes | None = None

    def tokens(self, size: int) -> list[int]:
        if self.branch is None:
            return self.kept_tokens
        return self.branch.tokens[self.start : min(self.branch.num_computed, self.start + size)]


class BlockPool:
    """`number` blocks of `size` tokens. Without `prefix_caching`, prompts share no blocks."""

    def __init__(self, number: int, size: int = BLOCK_SIZE) -> None:
        if number < 1 or size < 1:
            raise SettingError(f"{number} blocks of {size} tokens: at least 1 of 1 is needed")
        self.size, self.prefix_caching = size, True
        self.references = [0] * number  # branches that use each block
        self._empty = list(range(number - 1, -1, -1))  # the last one is taken first
        self.num_ever_taken = 0  # blocks that branches have used so far: they are the first ones
        # Dicts without values serve as ordered sets.
        self._cached: dict[int, None] = {}  # unused blocks with content, least recently used first
        self._content: list[_Content | None] = [None] * number
        self._by_key: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, None]] = {}  # blocks with content, by their parent

    def __len__(self) -> int:
        return len(self.references)

    @property
    def free(self) -> int:
        """The number of blocks that no branch uses."""
        return len(self._empty) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def content(self, block: int) -> Sequence[int]:
        """The tokens whose keys and values a block holds."""
        content = self._content[block]
        return [] if content is None else content.tokens(self.size)

    def find_prefix(self, tokens: list[int], adapter: str = "") -> Prefix:
        """The full blocks of a prompt that the cache holds. They never include the prompt's last
        token, which must be computed to get the logits of the next one."""
        prefix = Prefix([], [])
        while self.prefix_caching and (end := (len(prefix.blocks) + 1) * self.size) < len(tokens):
            parent = prefix.keys[-1] if prefix.keys else _root_key(adapter)
            key = _key(parent, tokens[end - self.size : end])
            if key not in self._by_key:
                break
            prefix.blocks.append(self._by_key[key])
            prefix.keys.append(key)
        return prefix

    def count_free(self, prefixes: Iterable[Prefix]) -> int:
        """The number of blocks in these prefixes that no branch uses."""
        return len({b for prefix in prefixes for b in prefix.blocks if not self.references[b]})

    def attach(self, branch: Branch, prefix: Prefix) -> None:
        """Let a branch without blocks share those of a prefix; their tokens count as computed."""
        for block in prefix.blocks:
            self._cached.pop(block, None)
            self.references[block] += 1
        branch.blocks.extend(prefix.blocks)
        branch.keys += prefix.keys
        branch.num_computed = len(prefix.blocks) * self.size

    def extend(self, branch: Branch, tokens: int) -> Copy | None:
        """Give a branch new blocks until it has room for `tokens` tokens. If all its blocks are
        full, the cached block whose beginning matches most of its next tokens is looked up, and the
        returned copy brings that beginning into the first new block, if it is worth that."""
        number = len(branch.blocks)
        source, shared = None, 0
        if self.prefix_caching and branch.num_computed == number * self.size:
            source, shared = self._longest_match(branch)
        while len(branch.blocks) < self.blocks_for(tokens):
            branch.blocks.append(self._allocate())
        if source is None:
            return None
        branch.num_computed += shared
        self._register_partial(branch)
        target = branch.blocks[number]
        # If the source itself was allocated as the new block, nothing needs to be copied.
        return None if source == target else Copy(source, target, shared)

    def mark_computed(self, branch: Branch, number: int) -> None:
        """Count the branch's next tokens as computed."""
        branch.num_computed += number
        if self.prefix_caching:
            self._register(branch)

    def release(self, branch: Branch) -> None:
        """Take the blocks of a branch. They keep their content until they are evicted."""
        if self.prefix_caching:
            self._register(branch)
        # Last block first, so that the beginning of a prompt is evicted last.
        for block in reversed(branch.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free(block)
        del branch.blocks[:]
        branch.keys, branch.num_computed, branch.partial_end = [], 0, 0

    def drop(self, branch: Branch) -> list[int]:
        """Release a branch and forget the content of the blocks that only it uses. Returns them."""
        exclusive = [block for block in branch.blocks if self.references[block] == 1]
        for block in exclusive:
            self._unregister(block)
        branch.keys, branch.num_computed = [], 0
        self.release(branch)
        return exclusive

    def forget_all(self) -> None:
        """Forget the content of all blocks: after a change of the weights, or a failed step."""
        for block in range(len(self)):
            self._unregister(block)
        self._empty += reversed(self._cached)
        self._cached.clear()

    def _allocate(self) -> int:
        if self._empty:
            block = self._empty.pop()
            self.num_ever_taken = max(self.num_ever_taken, block + 1)
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            self._unregister(block)
        self.references[block] = 1
        return block

    def _free(self, block: int) -> None:
        content = self._content[block]
        # The branch will change or end: keep a copy of the tokens of its last block.
        if content is not None and content.branch is not None:
            content.kept_tokens, content.branch = content.tokens(self.size), None
        if content is None or not content.kept_tokens:
            self._unregister(block)
            self._empty.append(block)
        else:
            self._cached[block] = None

    def _register(self, branch: Branch) -> None:
        """Register the new full blocks of a branch, and the partial one."""
        size = self.size
        while (end := (len(branch.keys) + 1) * size) <= branch.num_computed:
            number = len(branch.keys)
            parent = branch.parent
            tokens = branch.tokens[end - size : end]
            key = _key(parent, tokens)
            branch.keys.append(key)
            self._register_full(branch.blocks[number], parent, key, tokens)
        if branch.num_computed % size:
            self._register_partial(branch)

    def _register_full(self, block: int, parent: bytes, key: bytes, tokens: list[int]) -> None:
        """Register a full block, unless one with the same content is registered already."""
        self._unregister(block)
        if key not in self._by_key:
            self._content[block] = _Content(parent, None, 0, tokens, key)
            self._by_key[key] = block
            self._children.setdefault(parent, {})[block] = None

    def _register_partial(self, branch: Branch) -> None:
        number = branch.num_computed // self.size
        branch.partial_end = (number + 1) * self.size
        block = branch.blocks[number]
        content = self._content[block]
        if content is None or content.branch is not branch:
            self._unregister(block)
            parent = branch.parent
            self._content[block] = _Content(parent, branch, number * self.size)
            self._children.setdefault(parent, {})[block] = None

    def _unregister(self, block: int) -> None:
        content, self._content[block] = self._content[block], None
        if content is None:
            return
        if content.key is not None:
            del self._by_key[content.key]
        children = self._children[content.parent]
        del children[block]
        if not children:
            del self._children[content.parent]

    def _longest_match(self, branch: Branch) -> tuple[int | None, int]:
        """The cached block that begins like the next tokens of a branch for the longest stretch,
        and the length of that stretch; None and 0 if there is none that is worth a copy."""
        start = len(branch.blocks) * self.size
        tokens = branch.tokens[start : min(start + self.size, len(branch.tokens) - 1)]
        children = self._children.get(branch.parent, {})
        best: tuple[int | None, int] = None, 0
        for block in islice(reversed(children), _MAX_CANDIDATES):
            shared = _common_length(self.content(block), tokens)
            if shared > best[1] and shared * _MIN_COPIED >= self.size:
                best = block, shared
        return best


def _root_key(adapter: str) -> bytes:
    return blake2b(adapter.encode(), digest_size=16).digest() if adapter else b""


def _key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """A hash of a full block and of everything before it; 128 bits make collisions negligible."""
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common beginning of two lists."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
