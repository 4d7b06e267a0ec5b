"""A pool of relay buffers: acquired after a partial send(2), released when the pending bytes are sent or discarded."""

from __future__ import annotations

import mmap
from typing import Dict, List

_SPARE = 16
_HEADS = 256


class Buffers:
    """A pool of buffers of one size. Each is an anonymous mapping, so that a freed one is returned to the kernel (mmap(2))."""

    def __init__(self, size: int) -> None:
        """`size` in bytes."""
        self._size = size
        self._spare: List[memoryview] = []

    def acquire(self) -> memoryview:
        """A buffer with any content."""
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, self._size))

    def release(self, buffer: memoryview) -> None:
        """Put a buffer back into the pool; beyond a few spare ones it is freed."""
        if len(self._spare) < _SPARE:
            self._spare.append(buffer)


class PrefixViews(Dict[int, memoryview]):
    """Cached views of the first n bytes of a buffer, by n. Messages have few sizes; a cached slice takes half the time."""

    def __init__(self, buffer: memoryview) -> None:
        super().__init__()
        self._buffer = buffer

    def __missing__(self, size: int) -> memoryview:
        head = self._buffer[:size]
        if len(self) < _HEADS:
            self[size] = head
        return head
