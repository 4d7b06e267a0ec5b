"""Relay buffers: acquired when the kernel takes less than it was given, released when it is gone."""

from __future__ import annotations

import mmap
from typing import Dict, List

_SPARE = 16
_HEADS = 256


class Buffers:
    """A pool of equal buffers. An anonymous mapping each, so that one given up goes back to the kernel (mmap(2))."""

    def __init__(self, size: int) -> None:
        """`size` in bytes."""
        self._size = size
        self._spare: List[memoryview] = []

    def acquire(self) -> memoryview:
        """A buffer; its content is whatever was there."""
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, self._size))

    def release(self, buffer: memoryview) -> None:
        """Take a buffer back; beyond a few spare ones it is freed."""
        if len(self._spare) < _SPARE:
            self._spare.append(buffer)


class PrefixViews(Dict[int, memoryview]):
    """The first n bytes of a buffer, by n. Messages come in few sizes: a slice that is there costs half of a new one."""

    def __init__(self, buffer: memoryview) -> None:
        super().__init__()
        self._buffer = buffer

    def __missing__(self, size: int) -> memoryview:
        head = self._buffer[:size]
        if len(self) < _HEADS:
            self[size] = head
        return head
