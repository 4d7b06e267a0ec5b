"""A process that forks workers on demand. It is made before there is any thread, so that its fork(2)s stay safe.

The main process has a reporter thread by the time that a dead worker must be replaced: a fork(2) there would copy the
locks which that thread holds. A new Python would need its files and rights, which are gone after --user. The fork server
has one thread, the imports done and the memory shared; it forks workers, calls wait4(2) for them, reports how they
exited, and exits when the main process does (EOF on its control socket).

If the fork server itself is killed, its workers go on. Then only a pipe for each, whose other end the worker holds, shows
that it has exited, and no replacement can be started. At the end the pipes count, too: a fork server that is stopped (SIGSTOP)
reports nothing. What has not exited by itself then is killed: nothing outlives the main process.

A fork server that is stopped reads no requests either, and its socket takes some 270 of them. Which routes have come and gone
beyond that waits here, and is sent before a worker is asked for: none is forked without a route that it is to serve.

Knows fork(2), wait4(2) and how requests and reports look. Knows nothing of when a worker is started, or what it does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import time
from typing import Callable, Dict, List, Optional, Set

from _tsproxy.linux import children, inherited, uapi
from _tsproxy.linux.devnull import open_devnull
from _tsproxy.linux.needs import Refused, needing
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.proxy.inbox import Channel, ChannelProducer
from _tsproxy.supervisor.worker_args import WorkerArgs, WorkerShared, run_worker

_LAST_S = 2.0
_ANSWER_S = 1.0
_REPORT_S = 0.5  # behind the end of an exit pipe
_EXIT_S = 1.0  # for the fork server, once all workers have exited
_REQUEST = struct.Struct("=BI")  # one of the next line, number of the worker or route
_START, _ADD_ROUTE, _REMOVE_ROUTE = range(3)
_REPORT = struct.Struct("=HBi")  # worker's number, one of the next line, its process id, errno or wait status
_STARTED, _REFUSED, _EXITED, _FAILED = range(4)
_LONGEST = 256  # behind _FAILED comes why


class ForkServer:
    """The main process's handle on it."""

    def __init__(self, shared: WorkerShared) -> None:
        """Fork it now: no thread may have been started. Descriptors that are not in `shared` are closed in it.

        `shared.exited` is rung for each worker that exits, and when the fork server itself does.
        """
        with needing("socketpair(2)", "to start workers as processes"):
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._exited = shared.exited
        self._alive: Set[int] = set()
        self._worker_pids: Dict[int, int] = {}
        self._exit_statuses: Dict[int, str] = {}
        self._exit_pipes: Dict[int, int] = {}  # worker's number -> our end of its pipe
        self._answers: Dict[int, int] = {}  # worker's number -> errno of the last request for it, or 0
        self._route_changes: Dict[int, List[int]] = {}  # not sent yet: number -> what came with it, or [] for one that went
        self._own_exit_status = self._unreported = self._failure = ""
        with needing("fork(2)", "to start workers as processes"):
            self._pid = children.fork_ignoring_signals()
        if self._pid == 0:
            _run_fork_server(theirs, shared)
        theirs.close()
        self._control.setblocking(False)
        with needing("epoll_create1(2) or epoll_ctl(2)", "to watch the workers"):
            self._events = select.epoll()
            self._events.register(self._control, select.EPOLLIN | select.EPOLLET)

    def fileno(self) -> int:
        """Readable when is_alive() or own_exit() may have changed."""
        return self._events.fileno()

    @property
    def pids(self) -> List[int]:
        """The child that is waited for here, by its process id, and by nobody else."""
        return [] if self._own_exit_status else [self._pid]

    def start(self, args: WorkerArgs, inbox: ChannelProducer) -> None:
        """Fork a worker, which gets its end of the inbox. If the fork server has exited, so has the worker.

        OSError if there can't be a worker now. No answer within a second (the fork server is stopped) counts as success.
        """
        exit_pipe = self._new_exit_pipe(args.number)
        try:
            self._answers.pop(args.number, None)
            fds = [inbox.theirs.fileno(), exit_pipe, *args.listeners]
            if not (self._send_route_changes() and self._send(_START, args.number, fds)):
                raise OSError(errno.EAGAIN, "the fork server, which starts workers, reads no requests (is it stopped?)")
        finally:
            os.close(exit_pipe)
        self._alive.add(args.number)
        self._await_answer(args.number)

    def add_route(self, number: int, counters_fd: int) -> None:
        """Workers that it forks from now on have the route. The descriptor is to stay open until remove_route()."""
        self._route_changes[number] = [counters_fd]
        self._try_route_changes()

    def remove_route(self, number: int) -> None:
        """They have it no more. A number is not used again."""
        if not self._route_changes.pop(number, []):
            self._route_changes[number] = []
        self._try_route_changes()

    def _try_route_changes(self) -> None:
        """What can't be sent now stays, and start() says why (ETOOMANYREFS, ENOBUFS)."""
        with contextlib.suppress(Refused):
            self._send_route_changes()

    def _send_route_changes(self) -> bool:
        """Send what waits, as far as there is room; whether that was all."""
        for number, fds in list(self._route_changes.items()):
            if not self._send(_ADD_ROUTE if fds else _REMOVE_ROUTE, number, fds):
                return False
            del self._route_changes[number]
        return True

    def _send(self, kind: int, number: int, fds: List[int]) -> bool:
        """Never blocks; False if the socket is full. What else the worker needs, the fork server has from its own fork(2)."""
        with needing("sendmsg(2)", "to reach the fork server"):
            try:
                socket.send_fds(self._control, [_REQUEST.pack(kind, number)], fds)
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has exited, and so the exit pipe is hung up at once
        return True

    def _await_answer(self, number: int) -> None:
        self._receive_until(lambda: number in self._answers or bool(self._own_exit_status), _ANSWER_S)
        if not self.can_start:
            raise Refused("fork(2)", errno.ECHILD, "for a worker", f"the fork server died ({self._own_exit_status})")
        if self._answers.get(number):
            raise Refused("fork(2)", self._answers[number], "for a worker")

    def _new_exit_pipe(self, number: int) -> int:
        """The worker's end of a new pipe; EPOLLHUP on ours when the worker has exited, however."""
        if number in self._exit_pipes:
            os.close(self._exit_pipes.pop(number))
        with needing("pipe2(2)", "to see a worker end"):
            self._exit_pipes[number], theirs = os.pipe2(os.O_CLOEXEC)
        self._events.register(self._exit_pipes[number], select.EPOLLET)
        return theirs

    def own_exit(self) -> str:
        """How the fork server itself exited, the first time that it is asked after that; else ""."""
        self._receive()
        exit_status, self._unreported = self._unreported, ""
        return exit_status

    @property
    def can_start(self) -> bool:
        """Whether a worker can be started."""
        self._receive()
        return not self._own_exit_status

    def is_alive(self, number: int) -> bool:
        """Whether that worker runs, as far as has been reported."""
        self._receive()
        return number in self._alive

    def exit_status(self, number: int) -> str:
        """How that worker exited."""
        return self._exit_statuses.get(number, "it has not ended")

    @property
    def has_workers(self) -> bool:
        """Whether any worker still runs, also where the fork server does not report it (it is stopped, or was killed)."""
        self._receive()
        return bool(self._running)

    @property
    def _running(self) -> List[int]:
        """The numbers of workers that have not closed their exit pipe."""
        return [number for number in self._alive if not _is_hung_up(self._exit_pipes[number])]

    def await_reports(self) -> None:
        """Have it known of each worker that has closed its exit pipe how it exited: the report comes a moment after that.

        Blocks for half a second at most, if the fork server is stopped.
        """
        self._receive_until(lambda: self._alive <= set(self._running), _REPORT_S)
        self._note_unreported("the fork server does not report it")

    def end(self) -> None:
        """SIGKILL workers that are left, and have the fork server exit: by SIGKILL if it has not within a second.

        Blocks for two seconds at most. A worker's exit pipe is open while it lives, and so its process id is its own.
        """
        self._receive()
        for number in self._running:
            with contextlib.suppress(KeyError, OSError):  # not forked yet; ESRCH, or a sandbox refuses kill(2)
                os.kill(self._worker_pids[number], signal.SIGKILL)
        if not self._own_exit_status:
            self._control.shutdown(socket.SHUT_WR)
            server = children.Child(self._pid)
            with contextlib.suppress(OSError):  # a sandbox refuses wait4(2) or kill(2): it exits by itself, for it reads EOF
                if not server.has_exited(_EXIT_S):
                    server.send_signal(signal.SIGKILL)
                    server.has_exited(_EXIT_S)
        self._control.close()

    def _receive_until(self, is_done: Callable[[], bool], within_s: float) -> None:
        """Handle reports until `is_done()`, or for so long."""
        reports = select.poll()
        reports.register(self._control, select.POLLIN)
        deadline = time.monotonic() + within_s
        self._receive()
        while not is_done() and time.monotonic() < deadline:
            reports.poll(max(0.0, deadline - time.monotonic()) * 1000)
            self._receive()

    def _receive(self) -> None:
        """Handle all reports. recvmsg(2) does not block."""
        self._events.poll(0)
        while True:
            try:
                message = self._control.recv(_LONGEST)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it exited with a request unread; its last reports come after this error
                continue
            if not message:
                self._on_eof()
                return
            number, kind, value = _REPORT.unpack_from(message)
            self._on_report(number, kind, value, message[_REPORT.size :].decode())

    def _on_report(self, number: int, kind: int, value: int, text: str) -> None:
        if kind == _FAILED:
            self._failure = text
        elif kind == _STARTED:
            self._answers[number], self._worker_pids[number] = 0, value
        elif kind == _REFUSED:
            self._answers[number] = value
        if kind == _REFUSED:
            self._note_exit(number, f"fork(2): {os.strerror(value)}")
        elif kind == _EXITED:
            self._note_exit(number, _exit_status(value))

    def _note_exit(self, number: int, exit_status: str) -> None:
        self._alive.discard(number)
        self._exit_statuses[number] = exit_status

    def _on_eof(self) -> None:
        """The fork server has exited: find out how, and which workers have exited since.

        Whoever asked may be in the middle of something else, and the edges on the epoll descriptor are consumed: so ring.
        """
        exited = self._note_unreported("the fork server is gone")
        is_new = not self._own_exit_status
        if is_new:
            exit_status = self._wait()
            self._own_exit_status = self._unreported = self._failure or exit_status
        if exited or is_new:
            self._exited.wake()

    def _note_unreported(self, why: str) -> Set[int]:
        """The numbers of workers that have closed their exit pipe, and of which no report will come."""
        exited = self._alive.difference(self._running)
        for number in exited:
            self._note_exit(number, f"how is not known, since {why}")
        return exited

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


# In the fork server's process


def _run_fork_server(control: socket.socket, shared: WorkerShared) -> None:
    """All that the child does. Never returns."""
    code = 1
    try:
        _close_all_but({*shared.fds, control.fileno()})
        _serve(control, shared)
        code = 0
    except OSError as problem:
        why = problem.strerror or str(problem)
        _report(control, shared.exited, _REPORT.pack(0, _FAILED, 0) + why.encode()[: _LONGEST - _REPORT.size])
    finally:
        os._exit(code)


def _close_all_but(kept: Set[int]) -> None:
    """A listener that stayed open here would never close, and the reader of standard output would get no EOF."""
    inherited.close_all_but(kept)
    devnull = open_devnull()
    for fd in (0, 1):
        with needing("dup2(2)", "to leave standard output"):
            os.dup2(devnull, fd)
    os.close(devnull)


def _serve(control: socket.socket, shared: WorkerShared) -> None:
    """Fork what is requested and report what has exited, until EOF: the main process is gone."""
    with needing("pipe2(2)", "to see workers end"):
        child_signals, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    requests = control.fileno()
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    workers: Dict[int, int] = {}
    events = select.poll()  # not select(2): behind many inherited listeners a descriptor may be beyond FD_SETSIZE
    events.register(requests, select.POLLIN)
    events.register(child_signals, select.POLLIN)
    while True:
        ready = {fd for fd, _ in events.poll()}
        if child_signals in ready:
            os.read(child_signals, 4096)
            _reap(workers, control, shared.exited)
        if requests in ready:
            with needing("recvmsg(2)", "to receive requests for workers"):
                request, fds, _, _ = socket.recv_fds(control, _REQUEST.size, uapi.SCM_MAX_FD)
            if not request:
                _end_workers(workers, child_signals)
                return
            kind, number = _REQUEST.unpack(request)
            if kind == _START:
                args = WorkerArgs(number, shared, Channel(fds[0]), tuple(fds[2:]))
                _start(args, fds, workers, control, {requests, child_signals, wake})
            else:
                _keep_routes(shared, kind, number, fds)


def _keep_routes(shared: WorkerShared, kind: int, number: int, fds: List[int]) -> None:
    """What workers forked from now on get."""
    if kind == _ADD_ROUTE:
        shared.add_route(number, fds[0])
    elif number in shared.routes:
        os.close(shared.routes.pop(number).counters_fd)


def _end_workers(workers: Dict[int, int], child_signals: int) -> None:
    """The main process is gone; workers see that, too (EOF of the inbox). SIGKILL for one that is stuck: it holds the port."""
    deadline = time.monotonic() + _LAST_S
    events = select.poll()
    events.register(child_signals, select.POLLIN)
    while workers and events.poll(max(0.0, deadline - time.monotonic()) * 1000):
        os.read(child_signals, 4096)
        for pid in _wait_for(workers):
            del workers[pid]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def _wait_for(workers: Dict[int, int]) -> Dict[int, int]:
    """Process id -> wait status of those that have exited since the last call. Does not block."""
    found: Dict[int, int] = {}
    while len(found) < len(workers):
        with needing("wait4(2)", "to see workers end"):
            pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            break
        found[pid] = status
    return found


def _start(args: WorkerArgs, fds: List[int], workers: Dict[int, int], control: socket.socket, private: Set[int]) -> None:
    """Fork a worker, and report its process id or the errno of fork(2): EAGAIN (too many tasks) or ENOMEM.

    `fds`: the worker's end of its inbox and of its exit pipe, which it holds until it exits; then its listeners. `private`
    is what the worker must close: a copy of the control socket would keep the main process from seeing EOF.
    """
    try:
        pid = os.fork()
    except OSError as error:
        _report(control, args.shared.exited, _REPORT.pack(args.number, _REFUSED, error.errno or errno.EAGAIN))
    else:
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for fd in private:
                os.close(fd)
            _be_worker(args)
        workers[pid] = args.number
        _report(control, None, _REPORT.pack(args.number, _STARTED, pid))
    for fd in fds:
        os.close(fd)


def _be_worker(args: WorkerArgs) -> None:
    """All that the worker's process does. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run_worker(args)
        code = 0
    finally:
        os._exit(code)


def _reap(workers: Dict[int, int], control: socket.socket, exited: Wakeup) -> None:
    for pid, status in _wait_for(workers).items():
        _report(control, exited, _REPORT.pack(workers.pop(pid), _EXITED, status))


def _report(control: socket.socket, wakeup: Optional[Wakeup], report: bytes) -> None:
    """EPIPE or ECONNRESET: the main process is gone, which the next recvmsg(2) shows as well."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.sendmsg([report])
        if wakeup:
            wakeup.wake()
