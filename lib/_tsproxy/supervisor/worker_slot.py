"""One worker's place in the pool: its inbox and its row of the counters stay, also while a dead worker is replaced.

Knows the state of one slot. Knows nothing of other slots, or of what the pool does about an exit.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Deque, Dict, Union

from _tsproxy.proxy.inbox import ChannelProducer, Command, Message, RingProducer
from _tsproxy.supervisor.runners import Runner

Producer = Union[RingProducer, ChannelProducer]

_QUICK_S = 1.0  # a worker that lives no longer than this ...
_MOST_QUICK_EXITS = 3  # ... so often in a row is not replaced any more
_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0  # before a replacement is tried again: doubled each time


class WorkerSlot:
    """See the module."""

    def __init__(self, number: int, inbox: Producer, runner: Runner) -> None:
        self.number, self.inbox, self.runner = number, inbox, runner
        self.is_abandoned = False  # there will be no replacement any more
        self.backoff_s = 0.0  # until a replacement is tried again; 0: there is a worker
        self._started_at = 0.0
        self._quick_exits = 0
        self._ping_mark = 0  # the last message in the inbox at the last ping
        self._last_notices: Dict[Command, int] = {}  # command -> the last such message in the inbox
        self.pending: Deque[Message] = deque()  # commands that are not in the inbox yet, in order

    @property
    def is_vacant(self) -> bool:
        """Whether there is known to be no worker: a replacement could not be started, or will not be."""
        return self.is_abandoned or self.backoff_s > 0

    def start(self) -> None:
        """Start a worker. OSError if there can't be one now: the next backoff is longer then."""
        try:
            self.runner.start()
        except OSError:
            self.backoff_s = min(2 * self.backoff_s, _LONGEST_BACKOFF_S) or _BACKOFF_S
            raise
        self.backoff_s = 0.0
        self._started_at = time.monotonic()

    def note_exit(self) -> None:
        """Its worker has exited: see how long it lived."""
        self._quick_exits = self._quick_exits + 1 if time.monotonic() - self._started_at < _QUICK_S else 0

    @property
    def obstacle(self) -> str:
        """Why there can be no replacement, now or later; "" if there can."""
        if self._quick_exits >= _MOST_QUICK_EXITS:
            return "its replacements die at once"
        return "" if self.runner.can_start else "nobody can start a replacement"

    def send_pending(self) -> bool:
        """Put the pending commands into the inbox as far as there is room; whether that was all of them."""
        while self.pending and self.inbox.put(self.pending[0]):
            self.pending.popleft()
        return not self.pending

    @property
    def last_sent(self) -> int:
        """The number in the inbox that the last pending command has, or will have."""
        return self.inbox.last_put + len(self.pending)

    def put(self, message: Message) -> bool:
        """Put a message that is no pending command; False while there are such: a client must not overtake its route."""
        return not self.pending and self.inbox.put(message)

    def notify(self, command: Command) -> None:
        """Put a command that needs no repetition: not while one of its kind is in the inbox, and not if that is full."""
        if self.inbox.has_consumed(self._last_notices.get(command, 0)) and self.put(Message(command)):
            self._last_notices[command] = self.inbox.last_put

    @property
    def has_consumed_all(self) -> bool:
        """Whether the worker has consumed every message that it was sent."""
        return not self.pending and self.inbox.is_empty

    def ping(self) -> None:
        """See to it that there is something for the worker to consume, for has_answered."""
        if self.inbox.is_empty:
            self.put(Message(Command.PING))
        self._ping_mark = self.inbox.last_put

    @property
    def has_answered(self) -> bool:
        """Whether the worker has consumed what its inbox held at the last ping, however much was put since.

        One that has exited need not answer: it was sent DRAIN or KILL, or is to be replaced.
        """
        return self.inbox.has_consumed(self._ping_mark) or not self.runner.is_alive
