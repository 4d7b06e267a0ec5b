"""A `selectors` selector on epoll, with what a relay needs and EpollSelector lacks.

- Zero interest stays registered, edge-triggered, for the hang-up alone: a reset is noticed while reading is paused,
  and a hung-up descriptor does not wake the loop for ever.
- wait() hands out epoll's own (descriptor, mask) pairs and expect() takes a bare number; the caller keeps its handlers
  by descriptor. The SelectorKey and mask translation of select() cost 0.15 us an event (bench/hotpath.py).
- READ_EDGES is edge-triggered (epoll(7)): the kernel need not look at each descriptor once more in the next iteration, which
  costs 3 % of the messages a second with 32 connections. So a reader that leaves bytes, or the end of file, in the
  socket says so with again(). Every change of what is waited for looks afresh, as again() does.
- An iteration takes a bounded number of events; EpollSelector has a buffer made for all descriptors at each call.
"""

from __future__ import annotations

import select
import selectors
from typing import Any, Dict, List, Mapping, Optional, Tuple

from _tsproxy.linux.needs import needing

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
MORE = select.EPOLLRDHUP | select.EPOLLPRI  # what a receive stops short of: FIN, or the mark of urgent data
BROKEN = select.EPOLLERR | select.EPOLLHUP
ENDED = BROKEN | select.EPOLLRDHUP  # nothing more comes from there, or soon
_BATCH = 256
READ_EDGES = 4  # instead of READ; not together with WRITE
_MASKS = {
    0: select.EPOLLET,
    READ: select.EPOLLIN,
    WRITE: select.EPOLLOUT,
    READ | WRITE: select.EPOLLIN | select.EPOLLOUT,
    READ_EDGES: select.EPOLLIN | MORE | select.EPOLLET,
}


class Poller(selectors.BaseSelector):
    """See the module. Descriptors are plain numbers; `data` is whatever the caller likes."""

    def __init__(self) -> None:
        with needing("epoll_create1(2)", "for the event loop"):
            self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._events: Dict[int, int] = {}
        self._data: Dict[int, Any] = {}
        self.wait = self._epoll.poll

    def expect(self, fd: int, events: int) -> None:
        """Wait for these events of a descriptor from now on, whether it was watched before or not. Free if nothing changes."""
        known = self._events.get(fd)
        if known == events:
            return
        if known is None:
            self._epoll.register(fd, _MASKS[events])
        else:
            self._epoll.modify(fd, _MASKS[events])
        self._events[fd] = events

    def again(self, fd: int) -> None:
        """Look afresh: an event comes in the next iteration if the descriptor is ready then. Not watched yet: nothing to do."""
        known = self._events.get(fd)
        if known is not None:
            self._epoll.modify(fd, _MASKS[known])

    def forget(self, fd: int) -> None:
        """Stop knowing a descriptor that is about to be closed: close(2) itself ends the watch. Unknown ones are no error."""
        self._events.pop(fd, None)

    # What BaseSelector asks for

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a descriptor. KeyError if it is watched already; OSError as epoll_ctl(2) gives it."""
        if fileobj in self._events:
            raise KeyError(f"descriptor {fileobj} is registered already")
        return self.modify(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Stop watching; call it before the descriptor is closed. KeyError if it is not watched."""
        key = self._key(fileobj)
        self._epoll.unregister(fileobj)
        del self._events[fileobj]
        self._data.pop(fileobj, None)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch for other events."""
        self.expect(fileobj, events)
        self._data[fileobj] = data
        return self._key(fileobj)

    def _key(self, fd: int) -> selectors.SelectorKey:
        return selectors.SelectorKey(fd, fd, self._events[fd], self._data.get(fd))

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        """As in `selectors`: (key, READ | WRITE) pairs; a broken descriptor counts as ready for all it waits for."""
        ready = []
        for fd, mask in self._epoll.poll(-1 if timeout is None else timeout, _BATCH):
            key = self._key(fd)
            events = (READ if mask & ~WRITABLE else 0) | (WRITE if mask & ~READABLE else 0)
            ready.append((key, events & key.events))
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Descriptor -> key."""
        return {fd: self._key(fd) for fd in self._events}

    def close(self) -> None:
        """Close the epoll descriptor; what was watched stays open."""
        self._epoll.close()
        self._events.clear()
