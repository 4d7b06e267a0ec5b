"""A `selectors` selector on epoll, with what a relay needs and EpollSelector lacks.

- A descriptor with an interest of 0 stays registered, edge-triggered, for EPOLLERR and EPOLLHUP: a reset is noticed while
  reading is paused, and EPOLLHUP is reported once, not by each epoll_wait(2).
- wait() returns epoll's own (descriptor, mask) pairs, and set_interest() has a plain number; the caller keeps handlers by
  descriptor. The SelectorKey and mask translation of select() cost 0.15 us an event (bench/hotpath.py).
- READ_EDGES is edge-triggered (epoll(7)): the kernel need not poll each ready descriptor again in the next epoll_wait(2), which
  costs 3 % of the messages a second with 32 connections. So a reader that leaves bytes, or EOF, in the socket has to call
  rearm(). Each change of the interest rearms, too (EPOLL_CTL_MOD).
- epoll_wait(2) returns a bounded number of events; EpollSelector allocates a buffer for all descriptors at each call.
"""

from __future__ import annotations

import select
import selectors
from typing import Any, Dict, List, Mapping, Optional, Tuple

from _tsproxy.linux.needs import needing

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
MORE = select.EPOLLRDHUP | select.EPOLLPRI  # a receive stops before these: FIN, or the mark of urgent data
BROKEN = select.EPOLLERR | select.EPOLLHUP
HANGUP = BROKEN | select.EPOLLRDHUP  # EOF, a reset or an error
MAX_EVENTS = 64  # an iteration; Python allocates room for them at each call, and malloc(3) is faster below 1 KiB
READ_EDGES = 4  # instead of READ; not together with WRITE
_MASKS = {
    0: select.EPOLLET,
    READ: select.EPOLLIN,
    WRITE: select.EPOLLOUT,
    READ | WRITE: select.EPOLLIN | select.EPOLLOUT,
    READ_EDGES: select.EPOLLIN | MORE | select.EPOLLET,
}


class Poller(selectors.BaseSelector):
    """See the module. Descriptors are plain numbers; `data` is the caller's."""

    def __init__(self) -> None:
        with needing("epoll_create1(2)", "for the event loop"):
            self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self.interests: Dict[int, int] = {}  # by descriptor; remove one that is about to be closed
        self._data: Dict[int, Any] = {}
        self.wait = self._epoll.poll

    def set_interest(self, fd: int, events: int) -> None:
        """Wait for these events of a descriptor, registered or not. No system call if they are the same as before."""
        known = self.interests.get(fd)
        if known == events:
            return
        if known is None:
            self._epoll.register(fd, _MASKS[events])
        else:
            self._epoll.modify(fd, _MASKS[events])
        self.interests[fd] = events

    def rearm(self, fd: int) -> None:
        """EPOLL_CTL_MOD: if the descriptor is ready, the next epoll_wait(2) returns an event. Not registered: does nothing."""
        known = self.interests.get(fd)
        if known is not None:
            self._epoll.modify(fd, _MASKS[known])

    # The methods of BaseSelector

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Register a descriptor. KeyError if it is registered already; OSError as epoll_ctl(2) raises it."""
        if fileobj in self.interests:
            raise KeyError(f"descriptor {fileobj} is registered already")
        return self.modify(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Unregister it; call it before the descriptor is closed. KeyError if it is not registered."""
        key = self._key(fileobj)
        self._epoll.unregister(fileobj)
        del self.interests[fileobj]
        self._data.pop(fileobj, None)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Change the events and `data`."""
        self.set_interest(fileobj, events)
        self._data[fileobj] = data
        return self._key(fileobj)

    def _key(self, fd: int) -> selectors.SelectorKey:
        return selectors.SelectorKey(fd, fd, self.interests[fd], self._data.get(fd))

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        """As in `selectors`: (key, READ | WRITE) pairs. EPOLLERR and EPOLLHUP count as all events that are waited for."""
        ready = []
        for fd, mask in self._epoll.poll(-1 if timeout is None else timeout, MAX_EVENTS):
            key = self._key(fd)
            events = (READ if mask & ~WRITABLE else 0) | (WRITE if mask & ~READABLE else 0)
            ready.append((key, events & key.events))
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Descriptor -> key."""
        return {fd: self._key(fd) for fd in self.interests}

    def close(self) -> None:
        """Close the epoll descriptor. The registered descriptors stay open."""
        self._epoll.close()
        self.interests.clear()
