"""A small process that forks workers on demand: made before there is any thread, so that its forks are safe for ever.

The main process has a reporter thread when a dead worker must be replaced, and to fork then would copy whatever lock
that thread holds. To start Python anew would need its files and rights, which are gone after --user. The fork server has
one thread, the imports done and the memory shared; it starts workers, reaps them, tells how they ended, and ends with
the main process (its control socket is closed then).

Should it be killed itself, its workers go on. Nobody tells of their ends then but a pipe that each of them holds one
end of, and nobody can start a replacement.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import signal
import socket
import struct
import time
from typing import Dict, List, Optional, Set

from _tsproxy.linux import children, inherited, memory, uapi
from _tsproxy.linux.devnull import open_devnull
from _tsproxy.linux.needs import Refused, needing
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.proxy import inbox
from _tsproxy.supervisor.worker_args import WorkerArgs, run_worker

_LAST_S = 2.0
_ANSWER_S = 1.0
_NEWS = struct.Struct("=HBi")  # worker's number, one of the next line, wait status or errno
_BEGUN, _REFUSED, _ENDED, _FAILED = range(4)
_LONGEST = 256  # behind _FAILED comes why


class ForkServer:
    """The main process's handle on it."""

    def __init__(self, kept: Set[int], exited: Wakeup) -> None:
        """Fork it now: no thread may have been started. `kept` are the descriptors that workers need; others are closed."""
        with needing("socketpair(2)", "to start workers as processes"):
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._alive: Set[int] = set()
        self._exit_statuses: Dict[int, str] = {}
        self._lifelines: Dict[int, int] = {}  # worker's number -> our end of its pipe
        self._answers: Dict[int, int] = {}  # worker's number -> what became of the last request for it: an errno, or 0
        self._own_exit_status = self._unsaid = self._failure = ""
        with needing("fork(2)", "to start workers as processes"):
            self._pid = children.fork_deaf()
        if self._pid == 0:
            _run_fork_server(theirs, kept | {*exited, theirs.fileno()}, exited)
        theirs.close()
        self._control.setblocking(False)
        with needing("epoll_create1(2) or epoll_ctl(2)", "to watch the workers"):
            self._ends = select.epoll()
            self._ends.register(self._control, select.EPOLLIN | select.EPOLLET)

    def fileno(self) -> int:
        """Readable when is_alive() or loss() may have something new to tell."""
        return self._ends.fileno()

    @property
    def pids(self) -> List[int]:
        """The child that is to be waited for here, by its number, and by nobody else."""
        return [] if self._own_exit_status else [self._pid]

    def start(self, args: WorkerArgs, box: inbox.ChannelProducer) -> None:
        """Fork a worker. Its end of the inbox goes along. If the fork server is gone, the worker has ended already.

        OSError if there can't be a worker now. No answer within a second (it is stopped) counts as one that will come.
        """
        lifeline = self._new_lifeline(args.number)
        try:
            self._ask(args, [box.theirs.fileno(), lifeline, *args.listeners])
        finally:
            os.close(lifeline)
        self._alive.add(args.number)
        self._await_answer(args.number)

    def _ask(self, args: WorkerArgs, fds: List[int]) -> None:
        self._answers.pop(args.number, None)
        self._control.setblocking(True)
        try:
            with open(memory.create("tsproxy-spec", 0), "w+b") as text:  # a message has no room for 3,000 --allow
                pickle.dump(args, text)
                text.flush()
                with needing("sendmsg(2)", "to start a worker"):
                    socket.send_fds(self._control, [b"."], [text.fileno(), *fds])
        except Refused as problem:
            if problem.errno not in (errno.EPIPE, errno.ECONNRESET):  # then nobody has the other end of the lifeline now
                raise
        finally:
            self._control.setblocking(False)

    def _await_answer(self, number: int) -> None:
        answer = select.poll()
        answer.register(self._control, select.POLLIN)
        deadline = time.monotonic() + _ANSWER_S
        while self.can_start and number not in self._answers and time.monotonic() < deadline:
            answer.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not self.can_start:
            raise Refused("fork(2)", errno.ECHILD, "for a worker", f"the fork server died ({self._own_exit_status})")
        if self._answers.get(number):
            raise Refused("fork(2)", self._answers[number], "for a worker")

    def _new_lifeline(self, number: int) -> int:
        """The worker's end of a new pipe; ours is hung up when the worker is gone, however it ended."""
        if number in self._lifelines:
            os.close(self._lifelines.pop(number))
        with needing("pipe2(2)", "to see a worker end"):
            self._lifelines[number], theirs = os.pipe2(os.O_CLOEXEC)
        self._ends.register(self._lifelines[number], select.EPOLLET)
        return theirs

    def own_exit(self) -> str:
        """How the fork server itself ended: told once; "" before, and after."""
        self._listen()
        told, self._unsaid = self._unsaid, ""
        return told

    @property
    def can_start(self) -> bool:
        """Whether a worker can be started."""
        self._listen()
        return not self._own_exit_status

    def is_alive(self, number: int) -> bool:
        """Whether that worker runs, as far as has been heard."""
        self._listen()
        return number in self._alive

    def exit_status(self, number: int) -> str:
        """How that worker ended."""
        return self._exit_statuses.get(number, "it has not ended")

    def _listen(self) -> None:
        self._ends.poll(0)
        while True:
            try:
                message = self._control.recv(_LONGEST)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it ended without taking a request, which comes before what it said last
                continue
            if not message:
                self._look_ourselves()
                return
            number, what, value = _NEWS.unpack_from(message)
            self._hear(number, what, value, message[_NEWS.size :].decode())

    def _hear(self, number: int, what: int, value: int, text: str) -> None:
        if what == _FAILED:
            self._failure = text
        elif what != _ENDED:
            self._answers[number] = value
        if what == _REFUSED:
            self._alive.discard(number)
            self._exit_statuses[number] = f"fork(2): {os.strerror(value)}"
        elif what == _ENDED:
            self._alive.discard(number)
            self._exit_statuses[number] = _exit_status(value)

    def _look_ourselves(self) -> None:
        """The fork server is gone: see how it ended, and which workers have ended without it."""
        if not self._own_exit_status:
            exit_status = self._wait()
            self._own_exit_status = self._unsaid = self._failure or exit_status
        for number in {number for number in self._alive if _is_hung_up(self._lifelines[number])}:
            self._alive.discard(number)
            self._exit_statuses[number] = "how is not known, since the fork server is gone"

    def _wait(self) -> str:
        try:
            return _exit_status(os.waitpid(self._pid, 0)[1])
        except OSError as problem:
            return f"wait4(2): {problem.strerror}"


def _is_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def _exit_status(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {known.value: known.name for known in signal.Signals}  # of the real-time signals two have names
        return f"killed by {names.get(number, f'signal {number}')}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _run_fork_server(control: socket.socket, kept: Set[int], exited: Wakeup) -> None:
    """The child's life. Never returns."""
    code = 1
    try:
        _settle(kept)
        _serve(control, exited)
        code = 0
    except OSError as problem:
        why = problem.strerror or str(problem)
        _tell(control, exited, _NEWS.pack(0, _FAILED, 0) + why.encode()[: _LONGEST - _NEWS.size])
    finally:
        os._exit(code)


def _settle(kept: Set[int]) -> None:
    """Of what the main process has open only what workers need stays: a listener kept here would never close."""
    inherited.close_all_but(kept)
    devnull = open_devnull()
    for fd in (0, 1):
        with needing("dup2(2)", "to let go of standard output"):
            os.dup2(devnull, fd)  # the reader of standard output must see its end when the main process ends
    os.close(devnull)


def _serve(control: socket.socket, exited: Wakeup) -> None:
    """Fork what is asked for, report what has ended, until the main process is gone."""
    with needing("pipe2(2)", "to hear of workers that end"):
        deaths, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    asked = control.fileno()
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    workers: Dict[int, int] = {}
    events = select.poll()  # not select(2): behind many inherited listeners a descriptor may be beyond what that takes
    events.register(asked, select.POLLIN)
    events.register(deaths, select.POLLIN)
    while True:
        prepared = {fd for fd, _ in events.poll()}
        if deaths in prepared:
            os.read(deaths, 4096)
            _reap(workers, control, exited)
        if asked in prepared:
            with needing("recvmsg(2)", "to be told of workers to start"):
                request, fds, _, _ = socket.recv_fds(control, 1, uapi.SCM_MAX_FD)
            if not request:
                _outlive(workers, deaths)
                return
            args = _args(fds.pop(0))
            refusal = _fork(args, fds, workers, {asked, deaths, wake})
            _tell(control, exited if refusal else None, _NEWS.pack(args.number, _REFUSED if refusal else _BEGUN, refusal))


def _outlive(workers: Dict[int, int], deaths: int) -> None:
    """The main process is gone, which its workers see as well. One that is stuck would keep what it has open: the port."""
    deadline = time.monotonic() + _LAST_S
    events = select.poll()
    events.register(deaths, select.POLLIN)
    while workers and events.poll(max(0.0, deadline - time.monotonic()) * 1000):
        os.read(deaths, 4096)
        for pid in _ended(workers):
            del workers[pid]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def _ended(workers: Dict[int, int]) -> Dict[int, int]:
    """Process id -> wait status of those that have ended since the last time."""
    found: Dict[int, int] = {}
    while len(found) < len(workers):
        with needing("wait4(2)", "to see workers end"):
            pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            break
        found[pid] = status
    return found


def _args(fd: int) -> WorkerArgs:
    with open(fd, "rb") as text:
        text.seek(0)  # it shares the writer's position
        args: WorkerArgs = pickle.load(text)  # noqa: S301 -- from our own parent, by a socket pair
    return args


def _fork(args: WorkerArgs, fds: List[int], workers: Dict[int, int], private: Set[int]) -> int:
    """0, or the errno of fork(2): too many tasks, no memory.

    `fds`: its end of the inbox, and of its lifeline, which it holds till it ends; then its listeners. `private` is what it
    must not keep: with the fork server's own ends its death would go unnoticed.
    """
    pid, refusal = -1, 0
    try:
        pid = os.fork()
    except OSError as error:
        refusal = error.errno or errno.EAGAIN
    if pid == 0:
        signal.set_wakeup_fd(-1)
        for fd in private:
            os.close(fd)
        _be_worker(args._replace(inbox=inbox.Channel(fds[0]), listeners=tuple(fds[2:])))
    if not refusal:
        workers[pid] = args.number
    for fd in fds:
        os.close(fd)
    return refusal


def _be_worker(args: WorkerArgs) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run_worker(args)
        code = 0
    finally:
        os._exit(code)


def _reap(workers: Dict[int, int], control: socket.socket, exited: Wakeup) -> None:
    for pid, status in _ended(workers).items():
        _tell(control, exited, _NEWS.pack(workers.pop(pid), _ENDED, status))


def _tell(control: socket.socket, bell: Optional[Wakeup], news: bytes) -> None:
    """Nobody hears it when the main process is gone, which the end of its requests shows."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.sendmsg([news])
        if bell:
            bell.ring()
