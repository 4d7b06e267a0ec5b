"""Resolves the targets to addresses: at the start, again when connects fail, and every half minute, in a thread.

Knows names and getaddrinfo(3). Knows nothing of who uses the addresses. A name that can't be resolved any more keeps its last
answer, with a warning. Addresses that TCP can't connect to, and those beyond what can be tried, are left out, with one, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from typing import Callable, Dict, List, Sequence, Tuple

from _tsproxy.cli.config import MOST_UPSTREAMS, Target, is_unicast
from _tsproxy.linux import children, namespaces, needs
from _tsproxy.linux.addresses import Address, from_sockaddr, pack
from _tsproxy.supervisor.signals import Signals

_INTERVAL_S = 30.0
_MOST_NAMED = 8  # addresses in a warning
_NO_GROUP = "TCP connects to no multicast or broadcast address"
Found = Tuple[Dict[Target, List[Address]], Dict[Target, str]]  # answers, and why there is none
Log = Callable[[str, str, str], None]  # event, level, message


class Resolver:
    """The upstream addresses to try, in order. `packed` is replaced as a whole, so any thread may read it at any time."""

    def __init__(self, targets: Sequence[Target], families: Sequence[int] = ()) -> None:
        """`families` limits the answers to address families that can be used (those of --source); empty is all."""
        self.targets = targets
        self._families = frozenset(families)
        self._answers: Dict[Target, List[Address]] = {}
        self._failures: Dict[Target, str] = {}
        self.addresses: List[Address] = []
        self.packed = b""
        self._is_due = threading.Event()
        self._is_stopped = False
        self.left_out = 0  # addresses of the targets that are not tried; see `warnings`
        self._excess = 0  # how many of these are beyond what can be tried

    def resolve(self) -> None:
        """Resolve all targets now. Blocks as long as getaddrinfo(3) does."""
        for target in self.targets:
            try:
                answer = self._usable(_lookup(target))
            except (OSError, UnicodeError) as error:
                self._failures[target] = getattr(error, "strerror", None) or str(error)
            else:
                self._answers[target] = answer
                self._failures.pop(target, None)
        self._publish()

    @property
    def may_change(self) -> bool:
        """Whether an answer can change: that of a name does, and the index of an interface that is made again."""
        return any(target.scope or not target.is_literal for target in self.targets)

    def adopt(self, found: Found) -> None:
        """Take what another process has found."""
        self._answers, self._failures = found
        self._publish()

    @property
    def found(self) -> Found:
        """What adopt() takes."""
        return self._answers, self._failures

    def _usable(self, found: List[Address]) -> List[Address]:
        """Those of a family of --source. OSError if TCP can connect to none of them."""
        usable = [address for address in found if not self._families or address.family in self._families]
        if not usable:
            raise OSError(0, "no address of a family that --source can reach")
        if not any(map(_is_unicast, usable)):
            raise OSError(0, f"no unicast address, but {_named(usable)}: {_NO_GROUP}")
        return usable

    def _publish(self) -> None:
        answers = [list(dict.fromkeys(self._answers.get(target, ()))) for target in self.targets]
        found = [list(filter(_is_unicast, answer)) for answer in answers]
        kept = every = _distinct(found)
        while len(kept) > MOST_UPSTREAMS:
            max(found, key=len).pop()  # of the longest answer: no target pushes another one out
            kept = _distinct(found)
        self.addresses, self._excess, self.left_out = kept, len(every) - len(kept), len(_distinct(answers)) - len(kept)
        self.packed = b"".join(pack(address.family, address.sockaddr) for address in self.addresses)

    @property
    def warnings(self) -> List[str]:
        """Which addresses are left out, for people."""
        groups = {target: [one for one in answer if not _is_unicast(one)] for target, answer in self._answers.items()}
        said = [f"{target}: left out {_named(some)}: {_NO_GROUP}" for target, some in groups.items() if some]
        if self._excess:
            tried = f"the targets have {self._excess + len(self.addresses)} addresses, and {MOST_UPSTREAMS} can be tried"
            said.append(f"{tried}: {self._excess} are left out, the last ones of the longest answers")
        return said

    @property
    def failures(self) -> List[Tuple[Target, str]]:
        """Each target whose last look-up failed, with the reason."""
        return list(self._failures.items())

    def follow(self, log: Log) -> None:
        """Keep the answers fresh until stop(), in a thread, where `log` is called. No thread if no answer can change."""
        if self.may_change:
            thread = threading.Thread(target=self._follow, args=(log,), name="resolver", daemon=True)
            needs.start_thread(thread, "to resolve the targets again")

    def _follow(self, log: Log) -> None:
        while True:
            self._is_due.wait(_INTERVAL_S)
            self._is_due.clear()
            if self._is_stopped:
                return
            self._refresh(log)

    def refresh(self) -> None:
        """Have the thread resolve now: connects fail. Never blocks."""
        self._is_due.set()

    def stop(self) -> None:
        """End the thread, at the latest when its look-up ends. What it logs then is for the owner to drop."""
        self._is_stopped = True
        self._is_due.set()

    def _refresh(self, log: Log) -> None:
        """Resolve again, and log what has changed."""
        before, failures, warnings = self.addresses, dict(self._failures), self.warnings
        self.resolve()
        for target, reason in self.failures:
            if failures.get(target) != reason:
                log("warning", "warning", f"can't resolve {target}: {reason}; the last answer stays in use")
        for target in failures.keys() - self._failures.keys():
            log("resolve", "info", f"{target} can be resolved again")
        if self.addresses != before:
            log("resolve", "info", f"upstream addresses are now {', '.join(map(str, self.addresses))}")
        for warning in self.warnings:
            if warning not in warnings:
                log("warning", "warning", warning)


def resolve_unless(resolvers: Sequence[Resolver], signals: Signals) -> bool:
    """resolve() of all, but False at once on a signal that ends the program.

    No signal ends getaddrinfo(3) early, and it may take a minute. So it runs in a child process: a thread would have
    to be gone before root is dropped and workers are forked. The child has exited when this returns, and is killed
    with this process (PR_SET_PDEATHSIG): standard output and inherited listeners are open in it, too.
    """
    asked = [resolver for resolver in resolvers if resolver.may_change]
    for resolver in resolvers:
        if not resolver.may_change:
            resolver.resolve()
    if not asked:
        return True
    import pickle  # 0.3 MiB that a target that is an address does not need

    reader, writer = os.pipe2(os.O_CLOEXEC)
    with open(reader, "rb") as answer:
        try:
            pid = children.fork_ignoring_signals()
            if pid == 0:
                _be_the_child(asked, writer)
        except OSError:  # a limit on tasks, or a sandbox: then the signal has to wait
            resolve_all(asked)
            return True
        finally:
            os.close(writer)
        is_answered = _comes_before_termination(reader, signals)
        pickled = answer.read() if is_answered else b""
    with contextlib.suppress(OSError):  # a sandbox refuses kill(2) or wait4(2): then it exits, or is reaped, later
        if not is_answered:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    no_answer = "the process that looks names up ended without an answer"
    unknown: List[Found] = [({}, dict.fromkeys(resolver.targets, no_answer)) for resolver in asked]
    found = pickle.loads(pickled) if pickled else unknown  # noqa: S301 -- from our own child, by a pipe
    for resolver, of_resolver in zip(asked, found):
        resolver.adopt(of_resolver)
    return is_answered


def _be_the_child(asked: Sequence[Resolver], writer: int) -> None:
    """Never returns."""
    import pickle

    try:
        with contextlib.suppress(OSError):
            namespaces.set_parent_death_signal(signal.SIGKILL)
        resolve_all(asked)
        with open(writer, "wb") as pipe:
            pickle.dump([resolver.found for resolver in asked], pipe)
    finally:
        os._exit(0)


def resolve_all(asked: Sequence[Resolver]) -> None:
    """Each in a thread, so that a name server which does not answer one does not keep the others waiting."""
    threads: List[threading.Thread] = []
    for resolver in asked:
        if not resolver.may_change:
            resolver.resolve()
            continue
        thread = threading.Thread(target=resolver.resolve, name="look-up", daemon=True)
        try:
            needs.start_thread(thread, "to resolve the targets")
            threads.append(thread)
        except OSError:  # a limit on tasks
            resolver.resolve()
    for thread in threads:
        thread.join()


def _is_unicast(address: Address) -> bool:
    return is_unicast(address.ip)


def _named(some: Sequence[Address]) -> str:
    first = ", ".join(address.ip for address in some[:_MOST_NAMED])
    return first if len(some) <= _MOST_NAMED else f"{first} and {len(some) - _MOST_NAMED} more"


def _distinct(answers: List[List[Address]]) -> List[Address]:
    return list(dict.fromkeys(address for answer in answers for address in answer))


def _comes_before_termination(fd: int, signals: Signals) -> bool:
    """Wait until `fd` is readable: True; or for a signal that ends the program: False. poll(2) has no limit as FD_SETSIZE."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.register(signals.fd, select.POLLIN)
    while not signals.has_termination:
        if fd in dict(poller.poll()):
            return True
    return False


def _lookup(target: Target) -> List[Address]:
    host = f"{target.host}%{target.scope}" if target.scope else target.host
    flags = socket.AI_NUMERICHOST if target.is_literal else 0
    answers = socket.getaddrinfo(host.encode(), target.port, type=socket.SOCK_STREAM, flags=flags)
    return [from_sockaddr(family, sockaddr) for family, _, _, _, sockaddr in answers]  # type: ignore[arg-type, unused-ignore]
