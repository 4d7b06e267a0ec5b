"""Child processes: work of our own in a fork, programs of others in a session of their own. None outlives its `with`."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, FrozenSet, Iterator, Optional, Sequence

from common.layout import pinned
from common.trouble import Failed

_TURN_S = 1.0


class Task:
    """A function that runs in a fork of this process, on its own CPUs; it answers with what json can encode."""

    def __init__(self, work: Callable[[], Any], cpus: FrozenSet[int]) -> None:
        self._reader, writer = os.pipe()
        sys.stdout.flush()
        self._pid: Optional[int] = os.fork()
        if self._pid == 0:
            os.close(self._reader)
            _be_child(work, cpus, writer)
        os.close(writer)

    @property
    def is_ready(self) -> bool:
        """Whether result() would not wait for its beginning."""
        return bool(select.select([self._reader], [], [], 0)[0])

    def result(self, patience_s: float) -> Any:
        """What the function returned. Failed if it raised, or took longer than that."""
        data = b""
        while True:
            if not self._await(patience_s):
                raise Failed(f"no answer within {patience_s:g} s")
            piece = os.read(self._reader, 1 << 16)
            if not piece:
                break
            data += piece
        answer = json.loads(data or '{"error": "the load generator died"}')
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    def _await(self, patience_s: float) -> bool:
        """In turns: of a signal that comes just before select(2) Python hears when that returns."""
        end = time.monotonic() + patience_s
        while not select.select([self._reader], [], [], max(0.0, min(_TURN_S, end - time.monotonic())))[0]:
            if time.monotonic() >= end:
                return False
        return True

    def end(self) -> None:
        """Kill it if it still runs; one that began a session, with all that is in there."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._reader)
            self._pid = None


def _be_child(work: Callable[[], Any], cpus: FrozenSet[int], writer: int) -> None:
    """The child's life. Ctrl-C goes to the parent, which ends us. No collector: a pause of ours is not the relay's."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _hear_signals()
        gc.disable()
        gc.freeze()
        os.sched_setaffinity(0, cpus)
        try:
            answer = {"result": work()}
        except (OSError, Failed) as problem:
            answer = {"error": str(problem)}
        with open(writer, "w") as pipe:
            json.dump(answer, pipe)
    except KeyboardInterrupt:
        pass  # it came before we could ignore it
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


_ENDING = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM wait: between a child's start and our knowing of it they would leave it behind."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        _hear_signals()


def _hear_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


@contextlib.contextmanager
def tasks(works: Sequence[Callable[[], Any]], cpus: FrozenSet[int]) -> Iterator[Sequence[Task]]:
    """All of them, side by side."""
    running = []
    try:
        for work in works:
            with undisturbed():
                running.append(Task(work, cpus))
        yield running
    finally:
        for task in running:
            task.end()


def run(works: Sequence[Callable[[], Any]], cpus: FrozenSet[int], patience_s: float) -> Sequence[Any]:
    """Functions in forks, side by side, to their ends; their results."""
    with tasks(works, cpus) as running:
        return [task.result(patience_s) for task in running]


@contextlib.contextmanager
def program(command: Sequence[str], cpus: FrozenSet[int], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program on its own CPUs, writing to `output` and `output`.err. At the end it and its children are killed."""
    errors = output.with_suffix(".err")
    child: Optional[subprocess.Popen[bytes]] = None
    try:
        with open(output, "wb") as out, open(errors, "wb") as err, pinned(cpus), undisturbed():
            child = _start(command, output.parent, stdout=out, stderr=err)
        yield child
    finally:
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _start(command: Sequence[str], place: Path, **streams: Any) -> subprocess.Popen[bytes]:
    options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": _hear_signals, **streams}
    try:
        return subprocess.Popen(command, cwd=place, **options)
    except OSError as problem:
        raise Failed(f"can't start {command[0]}: {problem.strerror}") from None
