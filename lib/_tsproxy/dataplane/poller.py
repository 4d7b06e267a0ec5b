"""A `selectors` selector on epoll, with what a relay needs and EpollSelector lacks.

- Zero interest stays registered, edge-triggered, for the hang-up alone: a reset is noticed while reading is paused,
  and a hung-up descriptor does not wake the loop for ever.
- wait() hands out epoll's own (descriptor, mask) pairs; the caller keeps its handlers by descriptor. The SelectorKey
  and mask translation of select() cost 0.15 us an event (bench/hotpath.py).
- A turn takes a bounded number of events; EpollSelector has a buffer made for all descriptors at each call.
"""

from __future__ import annotations

import select
import selectors
from typing import Any, Dict, List, Mapping, Optional, Tuple

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
BROKEN = select.EPOLLERR | select.EPOLLHUP
_BATCH = 256
_MASKS = (select.EPOLLET, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)  # by READ | WRITE


class Poller(selectors.BaseSelector):
    """See the module. Descriptors are plain numbers; `data` is whatever the caller likes."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._keys: Dict[int, selectors.SelectorKey] = {}
        self.wait = self._epoll.poll

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a descriptor. KeyError if it is watched already; OSError as epoll_ctl(2) gives it."""
        if fileobj in self._keys:
            raise KeyError(f"descriptor {fileobj} is registered already")
        self._epoll.register(fileobj, _MASKS[events])
        self._keys[fileobj] = key = selectors.SelectorKey(fileobj, fileobj, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Stop watching; call it before the descriptor is closed. KeyError if it is not watched."""
        key = self._keys.pop(fileobj)
        self._epoll.unregister(fileobj)
        return key

    def forget(self, fd: int) -> None:
        """Stop knowing a descriptor that is about to be closed: close(2) itself ends the watch. Its key is gone at once."""
        del self._keys[fd]

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch for other events. Free if nothing changes."""
        key = self._keys[fileobj]
        if key.events != events:
            self._epoll.modify(fileobj, _MASKS[events])
        if key.events != events or key.data is not data:
            self._keys[fileobj] = key = selectors.SelectorKey(fileobj, fileobj, events, data)
        return key

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        """As in `selectors`: (key, READ | WRITE) pairs; a broken descriptor counts as ready for all it waits for."""
        ready = []
        for fd, mask in self._epoll.poll(-1 if timeout is None else timeout, _BATCH):
            key = self._keys[fd]
            events = (READ if mask & ~WRITABLE else 0) | (WRITE if mask & ~READABLE else 0)
            ready.append((key, events & key.events))
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Descriptor -> key."""
        return self._keys

    def close(self) -> None:
        """Close the epoll descriptor; what was watched stays open."""
        self._epoll.close()
        self._keys.clear()
