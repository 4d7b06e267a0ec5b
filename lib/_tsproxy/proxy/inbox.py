"""A worker's inbox: accepted descriptors and commands, in order, without a lock.

Within one process: a lock-free ring in shared memory, one producer, one consumer. Its wake-up, an eventfd, counts the messages
that were put. The kernel's lock on that counter is the memory barrier between writing a message and reading it: the consumer
reads no message beyond that count. The producer writes the message, then wakes; the consumer clears the wake-up, and pops as
many as it counted, one at a time. Between processes: a socket pair that carries the message with the descriptor itself
(SCM_RIGHTS, unix(7)). The number of consumed messages is in the worker's row of the shared counters, so that a replacement
continues there.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
from enum import IntEnum, auto
from typing import NamedTuple, Optional, Protocol, Union

from _tsproxy.linux import memory, uapi, wakeup
from _tsproxy.linux.addresses import PACKED_SIZE
from _tsproxy.linux.needs import Refused, needing
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.stats.counters import Counter

RING_SLOTS = 256  # a slot is large, and each that was once in use stays in memory
_SLOT = 2048  # room for config.MOST_UPSTREAMS addresses
_MESSAGE = struct.Struct(f"=BiQqHII{PACKED_SIZE}s")
_RIGHT = struct.Struct("i")  # the one descriptor in a message (SCM_RIGHTS, unix(7))
_ROOM = socket.CMSG_LEN(_RIGHT.size)
_FULL = uapi.RETRY | uapi.CAPACITY | {errno.EPIPE, errno.ECONNRESET, errno.ETOOMANYREFS}


class Command(IntEnum):
    """What a worker has to do; a message has it as this number."""

    CLIENT = 0  # connect and relay the client that comes with it
    DRAIN = auto()  # accept no more; end when the last session has ended
    KILL = auto()  # end all sessions, and exit
    POLICY_FAILED = auto()  # end the sessions that would leak from now on
    EVIDENCE = auto()  # there is new evidence: connectors that wait for the gate try again
    PING = auto()  # do nothing: that it is consumed shows that the loop runs
    START_ACCEPTING = auto()  # on the worker's own listeners, with the upstream addresses in the message
    STOP_ACCEPTING = auto()
    ADD_ROUTE = auto()  # whose counters' descriptor comes with it; clients of the route may follow
    REMOVE_ROUTE = auto()  # whose last session has ended


_COMMANDS = tuple(Command)  # Command(number) takes five times as long


class Message(NamedTuple):
    """A client, whose descriptor the worker then owns, with the upstream addresses to try; or another command.

    A client's descriptor is closed here once the worker has its own. A route's stays open, and is the worker's too if it is in
    this process.
    """

    command: Command
    fd: int = -1
    connection_id: int = 0
    accepted_ns: int = 0  # CLOCK_MONOTONIC
    client: bytes = bytes(PACKED_SIZE)
    upstreams: bytes = b""  # packed addresses, one after the other, at most config.MOST_UPSTREAMS
    client_slot: int = 0  # where in the worker's row this client's connections are counted; 0: they are not
    route: int = 0  # its number

    def encode(self) -> bytes:
        """At most one slot of bytes."""
        (command, fd, connection_id, accepted_ns, client, upstreams, slot, route) = self
        return _MESSAGE.pack(command, fd, connection_id, accepted_ns, len(upstreams), slot, route, client) + upstreams

    @classmethod
    def decode(cls, data: bytes, passed_fd: Optional[int] = None) -> Message:
        """The message in a slot of the ring, or in a packet, whose descriptor is the one that was passed with it."""
        command, fd, connection_id, accepted_ns, length, client_slot, route, client = _MESSAGE.unpack_from(data)
        upstreams = data[_MESSAGE.size : _MESSAGE.size + length]
        return cls(
            _COMMANDS[command],
            fd if passed_fd is None else passed_fd,
            connection_id,
            accepted_ns,
            client,
            upstreams,
            client_slot,
            route,
        )


class Consumer(Protocol):
    """The worker's side of either kind."""

    fileno: int  # readable when there is a message

    def pop(self) -> Optional[Message]:
        """The next message, which counts as consumed; None if there is none. Does not block."""
        ...

    @property
    def has_more(self) -> bool:
        """Whether there is another message though the descriptor is not readable any more."""
        ...

    def close(self) -> None:
        """Close what is the worker's own. Messages that were not consumed stay for a replacement."""
        ...


class Ring(NamedTuple):
    """What both sides need to map the ring. Plain numbers, so it can be passed to another interpreter."""

    memory: int
    wakeup: Wakeup


class Channel(NamedTuple):
    """The worker's end of the socket pair."""

    fd: int


def create_ring() -> Ring:
    """A new, empty ring."""
    return Ring(memory.create("tsproxy-inbox", RING_SLOTS * _SLOT), wakeup.create())


def consumer(inbox: Union[Ring, Channel], row: memoryview) -> Consumer:
    """The worker's side; `row` is the worker's own."""
    return RingConsumer(inbox, row) if isinstance(inbox, Ring) else ChannelConsumer(inbox, row)


class _Producer:
    """Which messages were consumed. They are numbered from 1; `last_put` is the number of the last one."""

    def __init__(self, row: memoryview) -> None:
        """`row` is the consuming worker's; it is only read here."""
        self._row = row
        self.last_put = 0

    def has_consumed(self, number: int) -> bool:
        """Whether the worker has consumed the message of that number."""
        return bool(self._row[Counter.CONSUMED] >= number)

    @property
    def is_empty(self) -> bool:
        """Whether the worker has consumed all messages."""
        return self.has_consumed(self.last_put)


class RingProducer(_Producer):
    """The acceptor's side of a ring."""

    def __init__(self, ring: Ring, row: memoryview) -> None:
        """Attach to the ring."""
        super().__init__(row)
        self._wakeup = ring.wakeup
        self._map = mmap.mmap(ring.memory, 0)

    def put(self, message: Message) -> bool:
        """Write one message and wake the worker; False, with nothing done, if the ring is full."""
        if self.last_put - self._row[Counter.CONSUMED] >= RING_SLOTS:
            return False
        data = message.encode()
        start = (self.last_put % RING_SLOTS) * _SLOT
        self._map[start : start + len(data)] = data
        self.last_put += 1
        self._wakeup.wake()
        return True

    def redispatch(self) -> None:
        """The worker has exited: wake its replacement for the messages that were not consumed."""
        self._wakeup.collect()
        for _ in range(self.last_put - self._row[Counter.CONSUMED]):
            self._wakeup.wake()

    def close(self) -> None:
        """Nothing to do: a worker that is stuck still has the memory, and the process is about to exit."""


class RingConsumer:
    """The worker's side of a ring."""

    def __init__(self, ring: Ring, row: memoryview) -> None:
        self._wakeup, self._row = ring.wakeup, row
        self._map = mmap.mmap(ring.memory, 0)
        self.fileno = ring.wakeup.reader
        self._announced = 0  # messages counted by the wake-up, and not consumed

    @property
    def has_more(self) -> bool:
        """See Consumer."""
        return self._announced > 0

    def pop(self) -> Optional[Message]:
        """See Consumer."""
        self._announced = self._announced or self._wakeup.collect()
        if not self._announced:
            return None
        self._announced -= 1
        start = (self._row[Counter.CONSUMED] % RING_SLOTS) * _SLOT
        message = Message.decode(self._map[start : start + _SLOT])
        self._row[Counter.CONSUMED] += 1
        return message

    def close(self) -> None:
        """See Consumer."""
        self._map.close()


class ChannelProducer(_Producer):
    """The acceptor's side of a socket pair. Messages that were not consumed stay in the socket for a replacement."""

    def __init__(self, row: memoryview) -> None:
        """`theirs` is the worker's end: pass it on, and keep it open for a replacement."""
        super().__init__(row)
        with needing("socketpair(2)", "for a worker's inbox"):
            self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    def put(self, message: Message) -> bool:
        """Send one message with its descriptor, then close(2) a client's; False, with nothing done, if the socket is full."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _RIGHT.pack(message.fd))] if message.fd >= 0 else []
        try:
            self._ours.sendmsg([message.encode()], rights)
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise Refused("sendmsg(2)", error.errno or 0, "to reach a worker") from None
        if message.fd >= 0 and message.command is Command.CLIENT:
            os.close(message.fd)
        self.last_put += 1
        return True

    def redispatch(self) -> None:
        """Nothing to do: the socket keeps messages that were not consumed."""

    def close(self) -> None:
        """Close both ends, once no worker is left."""
        self._ours.close()
        self.theirs.close()


class ChannelConsumer:
    """The worker's side of a socket pair. EOF means that the main process has exited: KILL."""

    def __init__(self, channel: Channel, row: memoryview) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=channel.fd)
        self._socket.setblocking(False)
        self._buffers = [memoryview(bytearray(_SLOT))]
        self._row = row
        self.fileno = channel.fd
        self.has_more = False

    def pop(self) -> Optional[Message]:
        """See Consumer. If the kernel could not pass the descriptor (EMFILE), `fd` is -1."""
        try:
            length, ancillary, _, _ = self._socket.recvmsg_into(self._buffers, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        if not length:
            return Message(Command.KILL)
        self._row[Counter.CONSUMED] += 1
        return Message.decode(bytes(self._buffers[0][:length]), _RIGHT.unpack(ancillary[0][2])[0] if ancillary else -1)

    def close(self) -> None:
        """See Consumer."""
        self._socket.close()
