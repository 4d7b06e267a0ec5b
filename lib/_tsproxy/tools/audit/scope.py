"""Which senders are judged: `--from`, the hosts that must send no timestamp, and `-t`, where to. Both must hold.

Knows addresses and names. Knows nothing of segments or verdicts.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any, Callable, FrozenSet, List, NamedTuple, Sequence, Set, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import IPNetwork, Target
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import needs


class Scope(NamedTuple):
    """`sources` and `targets` are empty where none were given: then any sender, to anywhere."""

    sources: Tuple[IPNetwork, ...] = ()
    targets: FrozenSet[Tuple[str, int]] = frozenset()
    judged_from: Tuple[str, ...] = ()  # as given
    judged_to: Tuple[str, ...] = ()

    def holds(self, source: str, destination: str, port: int) -> bool:
        """Whether what `source` sends to that port is judged."""
        if self.targets and (destination, port) not in self.targets:
            return False
        return not self.sources or any(ipaddress.ip_address(source) in block for block in self.sources)


def scope(
    sources: Sequence[IPNetwork], targets: Sequence[Target], judged_from: Sequence[str], judged_to: Sequence[str]
) -> Scope:
    """Exit 75 if a name can't be resolved."""
    found: Set[Tuple[str, int]] = set()
    for target in targets:
        found.update((address, target.port) for address in _addresses(target))
    return Scope(tuple(sources), frozenset(found), tuple(judged_from), tuple(judged_to))


def _addresses(target: Target) -> List[str]:
    """In the spelling that inet_ntop(3) gives."""
    try:
        answers = _interruptible(partial(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as problem:
        raise Exit(exits.NOT_YET, f"--target={target}: {getattr(problem, 'strerror', None) or problem}") from None
    return [str(answer[4][0]).partition("%")[0] for answer in answers]


def _interruptible(look_up: Callable[[], List[Any]]) -> List[Any]:
    """Its result, in a thread: no signal ends getaddrinfo(3), but Ctrl-C ends the wait for it."""
    answer: Future[List[Any]] = Future()

    def answered() -> None:
        try:
            answer.set_result(look_up())
        except (OSError, UnicodeError) as problem:
            answer.set_exception(problem)

    needs.start_thread(threading.Thread(target=answered, name="look-up", daemon=True), "to resolve the targets")
    return answer.result()
