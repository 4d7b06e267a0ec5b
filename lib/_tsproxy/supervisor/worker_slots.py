"""A worker's place: its inbox and its row stay, whoever sits there. One kind of slot for each way to start a worker.

Knows how to start a worker and to see that it is gone. Knows nothing of what to do then.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from typing import Any, Dict, Protocol, Union

from _tsproxy.linux import children, needs
from _tsproxy.proxy import inbox
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import Notice, RecordWriter
from _tsproxy.supervisor import origin
from _tsproxy.supervisor.fork_server import ForkServer
from _tsproxy.supervisor.worker_args import WorkerArgs, run_worker

Producer = Union[inbox.RingProducer, inbox.ChannelProducer]


class WorkerSlot(Protocol):
    """What the worker pool does with a worker."""

    @property
    def box(self) -> Producer:
        """Where entries for the worker are put."""
        ...

    def start(self) -> None:
        """Start a worker here; the one before must be gone. OSError if there can't be one now."""
        ...

    @property
    def can_start(self) -> bool:
        """Whether there is a way to start a worker here (any more)."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs."""
        ...

    @property
    def exit_status(self) -> str:
        """How the last worker ended, for people."""
        ...


class ThreadSlot:
    """A thread of this interpreter. Free-threaded builds run them side by side; others take turns (the GIL)."""

    def __init__(self, args: WorkerArgs, box: Producer) -> None:
        self._args, self.box = args, box
        self._thread = self._new()

    def _new(self) -> threading.Thread:
        self._over = False
        return threading.Thread(target=self._live, name=f"worker-{self._args.number}", daemon=True)

    def _live(self) -> None:
        """Work, then say that it is over: first so that it can be seen, and only then aloud."""
        try:
            self._work()
        except Exception:
            self._tell(traceback.format_exc())
        finally:
            self._over = True
            self._args.exited.ring()

    def _work(self) -> None:
        run_worker(self._lent())

    def _lent(self) -> WorkerArgs:
        """The WorkerArgs with descriptors of its own: the worker closes them."""
        return self._args._replace(listeners=tuple(map(os.dup, self._args.listeners)))

    def _tell(self, why: str) -> None:
        """What the worker can't tell itself: it was never there."""
        args = self._args
        notice = Notice(args.number, time.time_ns(), "error", f"worker {args.number} did not begin: {why}")
        RecordWriter(args.records_fd, SharedCounters(args.ledger_fd).worker(args.number)).put(notice)

    def start(self) -> None:
        """See WorkerSlot."""
        self._thread = self._new()
        needs.start_thread(self._thread, "for a worker")

    @property
    def can_start(self) -> bool:
        """See WorkerSlot."""
        return True

    @property
    def is_alive(self) -> bool:
        """See WorkerSlot."""
        return self._thread.is_alive() and not self._over

    @property
    def exit_status(self) -> str:
        """See WorkerSlot."""
        return "its thread ended"


class InterpreterSlot(ThreadSlot):
    """A thread with an interpreter, and so a GIL, of its own (PEP 684; Python 3.13 and later)."""

    def _work(self) -> None:
        interpreters: Any = __import__("_interpreters")
        own = interpreters.create("isolated")
        try:
            failure = interpreters.exec(own, _IN_INTERPRETER, self._shared())
        finally:
            interpreters.destroy(own)
        if failure is not None and failure.type.__name__ != "SystemExit":
            raise RuntimeError(failure.formatted)

    def _shared(self) -> Dict[str, object]:
        return {**_path(), "origin": origin.find(), "bundled": origin.is_bundle(), "spec": pickle.dumps(self._lent())}

    @property
    def exit_status(self) -> str:
        """See WorkerSlot."""
        return "its interpreter ended"


def _path() -> Dict[str, object]:
    """What _TAKE_PATH takes. A new interpreter would look beside the script first, whatever this one has made of its path."""
    return {"path": "\0".join(sys.path)}


_TAKE_PATH = """
import sys
sys.path[:] = path.split(chr(0))
"""
_IN_INTERPRETER = f"""{_TAKE_PATH}
import runpy
if bundled:
    runpy.run_path(origin)
else:
    sys.path.insert(0, origin)
import pickle
from _tsproxy.supervisor.worker_args import run_worker
run_worker(pickle.loads(spec))
"""


class ProcessSlot:
    """A process, forked by the fork server. Any Python can; the descriptors travel by SCM_RIGHTS."""

    def __init__(self, args: WorkerArgs, box: inbox.ChannelProducer, fork_server: ForkServer) -> None:
        self._args, self.box, self._fork_server = args, box, fork_server

    def start(self) -> None:
        """See WorkerSlot."""
        self._fork_server.start(self._args, self.box)

    @property
    def can_start(self) -> bool:
        """See WorkerSlot."""
        return self._fork_server.can_start

    @property
    def is_alive(self) -> bool:
        """See WorkerSlot."""
        return self._fork_server.is_alive(self._args.number)

    @property
    def exit_status(self) -> str:
        """See WorkerSlot."""
        return self._fork_server.exit_status(self._args.number)


def have_interpreters() -> bool:
    """Whether this Python can run a worker in an interpreter of its own: tried, not guessed from the version."""
    if sys.version_info < (3, 13):
        return False
    try:
        interpreters: Any = __import__("_interpreters")
        own = interpreters.create("isolated")
    except Exception:  # _interpreters.InterpreterError among others: this user may not read Python's own files
        return False
    try:
        return interpreters.exec(own, f"{_TAKE_PATH}import mmap, select, socket, selectors, pickle", _path()) is None
    finally:
        interpreters.destroy(own)


def is_free_threaded() -> bool:
    """Whether threads of this interpreter run side by side (PEP 703)."""
    enabled = getattr(sys, "_is_gil_enabled", None)
    return enabled is not None and not enabled()


def best() -> str:
    """What --runtime=auto takes here."""
    if is_free_threaded():
        return "threads"
    if have_interpreters():
        return "interpreters"
    return "processes" if _may_fork() else "threads"


def _may_fork() -> bool:
    """Whether fork(2), and waiting for a child, are allowed at all: tried. For want of tasks it may fail now and not later."""
    try:
        pid = children.fork_deaf()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    except OSError as error:
        return error.errno in needs.PASSING
    return True
