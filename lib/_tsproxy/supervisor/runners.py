"""The three ways to start a worker: a thread, an interpreter, a process.

Knows how to start one and how to see that it has exited. Knows nothing of what to do then.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import Any, Dict, Protocol

from _tsproxy.linux import children, needs
from _tsproxy.proxy.inbox import ChannelProducer
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import Notice, RecordWriter
from _tsproxy.supervisor import origin
from _tsproxy.supervisor.fork_server import ForkServer
from _tsproxy.supervisor.worker_args import WorkerArgs, run_worker


class Runner(Protocol):
    """Runs the worker of one slot, and its replacements one after the other. Rings WorkerShared.exited after each."""

    def start(self) -> None:
        """Start a worker; the one before must have exited. OSError if the host has no room for one now."""
        ...

    @property
    def can_start(self) -> bool:
        """Whether start() may still work: now or later."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs. False already when `exited` is rung."""
        ...

    @property
    def exit_status(self) -> str:
        """How the last worker exited, for people."""
        ...


class ThreadRunner:
    """A thread of this interpreter. Free-threaded builds run several at once; under the GIL they alternate."""

    can_start = True
    exit_status = "its thread ended"

    def __init__(self, args: WorkerArgs) -> None:
        self._args = args
        self.is_alive = False

    def start(self) -> None:
        """See Runner."""
        self.is_alive = True
        thread = threading.Thread(target=self._run, name=f"worker-{self._args.number}", daemon=True)
        try:
            needs.start_thread(thread, "for a worker")
        except OSError:
            self.is_alive = False
            raise

    def _run(self) -> None:
        """In the new thread."""
        try:
            self._work()
        except Exception:
            self._log(traceback.format_exc())
        finally:
            self.is_alive = False
            self._args.shared.exited.wake()

    def _work(self) -> None:
        run_worker(self._own_args())

    def _own_args(self) -> WorkerArgs:
        """With dup(2)s of the listeners, since the worker closes what it is given."""
        return self._args._replace(listeners=tuple(map(os.dup, self._args.listeners)))

    def _log(self, why: str) -> None:
        """For a worker that did not get so far that it could do this itself."""
        number, shared = self._args.number, self._args.shared
        notice = Notice(number, time.time_ns(), "error", f"worker {number} did not begin: {why}")
        RecordWriter(shared.records_fd, SharedCounters(shared.counters_fd).worker(number)).put(notice)


class InterpreterRunner(ThreadRunner):
    """A thread with an interpreter, and so a GIL, of its own (PEP 684; Python 3.13 and later)."""

    exit_status = "its interpreter ended"

    def _work(self) -> None:
        interpreters: Any = __import__("_interpreters")
        own = interpreters.create("isolated")
        try:
            failure = interpreters.exec(own, _IN_INTERPRETER, self._variables())
        finally:
            interpreters.destroy(own)
        if failure is not None and failure.type.__name__ != "SystemExit":
            raise RuntimeError(failure.formatted)

    def _variables(self) -> Dict[str, object]:
        import pickle  # a process and a thread are not sent their arguments

        return {**_path(), "origin": origin.find(), "compiled": origin.compiled(), "args": pickle.dumps(self._own_args())}


def _path() -> Dict[str, object]:
    """The variable of _SET_PATH. By itself a new interpreter would look beside the script first, as `python -I` does not."""
    return {"path": "\0".join(sys.path)}


_SET_PATH = """
import sys
sys.path[:] = path.split(chr(0))
"""
_IN_INTERPRETER = f"""{_SET_PATH}
import gc
gc.disable()
if compiled:
    import marshal
    loader, modules = marshal.loads(compiled)
    names = dict(__name__="bundle_loader")
    exec(loader, names)
    names["install"](origin, dict(), modules)
    del compiled, loader, modules, names
else:
    sys.path.insert(0, origin)
import pickle
from _tsproxy.supervisor.worker_args import run_worker
run_worker(pickle.loads(args))
"""


class ProcessRunner:
    """A process, forked by the fork server. Works on any Python; descriptors are passed by SCM_RIGHTS."""

    def __init__(self, args: WorkerArgs, inbox: ChannelProducer, fork_server: ForkServer) -> None:
        self._args, self._inbox, self._fork_server = args, inbox, fork_server

    def start(self) -> None:
        """See Runner."""
        self._fork_server.start(self._args, self._inbox)

    @property
    def can_start(self) -> bool:
        """See Runner."""
        return self._fork_server.can_start

    @property
    def is_alive(self) -> bool:
        """See Runner."""
        return self._fork_server.is_alive(self._args.number)

    @property
    def exit_status(self) -> str:
        """See Runner."""
        return self._fork_server.exit_status(self._args.number)


def best() -> str:
    """The runtime that --runtime=auto takes here."""
    if is_free_threaded():
        return "threads"
    if have_interpreters():
        return "interpreters"
    return "processes" if _may_fork() else "threads"


def is_free_threaded() -> bool:
    """Whether threads of this interpreter run in parallel (PEP 703)."""
    enabled = getattr(sys, "_is_gil_enabled", None)
    return enabled is not None and not enabled()


def have_interpreters() -> bool:
    """Whether this Python can run a worker in an interpreter of its own. Tried, not concluded from the version."""
    if sys.version_info < (3, 13):
        return False
    try:
        interpreters: Any = __import__("_interpreters")
        own = interpreters.create("isolated")
    except Exception:  # _interpreters.InterpreterError among others: this user may not read Python's own files
        return False
    try:
        return interpreters.exec(own, f"{_SET_PATH}import mmap, select, struct, _socket, _pickle", _path()) is None
    finally:
        interpreters.destroy(own)


def _may_fork() -> bool:
    """Whether fork(2) and wait4(2) are allowed. Tried; EAGAIN or ENOMEM now does not mean that they are not."""
    try:
        pid = children.fork_ignoring_signals()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    except OSError as error:
        return error.errno in needs.TRANSIENT
    return True
