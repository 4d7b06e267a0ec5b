"""Names that can't be resolved, or that mean something else now: what is said, and that clients are served meanwhile."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from typing import Iterator, Optional, Tuple

import pytest
from faults import Stand, ends, make_stand, play
from harness import Exchange, Line, Proxy, wait_until


class Names:
    """A DNS server on port 53 of a namespace: what it answers, the test decides (RFC 1035, section 4.1)."""

    OK, SERVFAIL, NXDOMAIN = 0, 2, 3
    NODATA = 16  # an answer without an error and without a record

    def __init__(self, address: str) -> None:
        self.address: Optional[str] = address  # None: it keeps silent
        self.code = self.OK
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))
        self._last = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._thread = threading.Thread(target=self._serve, name="names")
        self._thread.start()

    def _serve(self) -> None:
        while True:
            question, client = self._socket.recvfrom(512)
            if not question:
                return
            self.asked += 1
            if self.address is not None:
                self._socket.sendto(self._answer(question, self.address), client)

    def _answer(self, question: bytes, address: str) -> bytes:
        name_end = question.index(0, 12)
        (kind,) = struct.unpack_from("!H", question, name_end + 1)
        asked = question[12 : name_end + 5]
        wanted, family = (28, socket.AF_INET6) if ":" in address else (1, socket.AF_INET)  # AAAA or A
        found = self.code == self.OK and kind == wanted
        raw = socket.inet_pton(family, address)
        record = struct.pack("!HHHIH", 0xC00C, wanted, 1, 0, len(raw)) + raw
        head = question[:2] + struct.pack("!HHHHH", 0x8180 | self.code & 15, 1, int(found), 0, 0)
        return head + asked + (record if found else b"")

    def close(self) -> None:
        self._last.sendto(b"", ("127.0.0.1", 53))
        self._thread.join()
        self._last.close()
        self._socket.close()


def asking_here(tmp_path: Path) -> Tuple[str, ...]:
    """The words before a command whose resolver shall ask the server on port 53 of its own namespace, and nothing else."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: dns\n")
    binds = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("resolv.conf", "nsswitch.conf"))
    return ("unshare", "--mount", "sh", "-c", f'{binds} && exec "$@"', "sh")


class Named(contextlib.ExitStack):
    """An exchange at 127.0.0.2 that is known by name, and one at 127.0.0.3, same port, that it may move to."""

    def __init__(self, stand: Stand, tmp_path: Path) -> None:
        super().__init__()
        self.stand = stand
        with stand.host:
            self.names = self.enter_context(contextlib.closing(Names("127.0.0.2")))
            self.old = self.enter_context(contextlib.closing(Exchange(play, host="127.0.0.2")))
        self._wrap = asking_here(tmp_path)

    def start(self, *options: str) -> Proxy:
        return self.stand.start(*options, target=f"exchange.test:{self.old.port}", wrap=self._wrap)

    def move(self) -> None:
        """The exchange is at its new address, and only there."""
        self.old.close()
        with self.stand.host:
            new = Exchange(play, host="127.0.0.3", port=self.old.port)
        self.enter_context(contextlib.closing(new))

    def refused(self, proxy: Proxy) -> Line:
        seen = len(proxy.lines)
        with self.stand.host:
            proxy.expect_reset()
        return proxy.line("connection", lambda line: line["reason"] != "closed", after=seen)


@pytest.fixture
def named(bundle: Path, tmp_path: Path) -> Iterator[Named]:
    """On one stand: names are the main process's affair, whatever the runtime."""
    for stand in make_stand("processes from checkout", bundle):
        with Named(stand, tmp_path) as named:
            yield named


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_an_exchange_that_moves_is_followed_when_connecting_fails(named: Named, workers: str) -> None:
    proxy = named.start(workers)
    assert proxy.line("start")["upstream_addresses"] == [f"127.0.0.2:{named.old.port}"]
    with named.stand.unharmed(proxy):
        named.names.address = "127.0.0.3"
        named.move()
        assert named.refused(proxy)["reason"] == "connect_refused"
        assert proxy.line("resolve")["message"] == f"upstream addresses are now 127.0.0.3:{named.old.port}"
    used = [line["upstream_address"] for line in proxy.lines if line["event"] == "connection"]
    assert used == ["127.0.0.2"] * 9 + ["127.0.0.3"] * 8
    assert ends(proxy) == {("connect_refused", "SC"): 1}


@pytest.mark.parametrize("how", ["NXDOMAIN", "silent"])
def test_a_resolver_that_fails_leaves_the_last_answer_in_use(named: Named, how: str) -> None:
    proxy = named.start()
    rejecting = f"tcp dport {named.old.port} reject with tcp reset"
    with named.stand.unharmed(proxy):
        named.names.code = getattr(Names, how, Names.OK)
        named.names.address = None if how == "silent" else "127.0.0.2"
        with named.stand.rule(rejecting):
            named.refused(proxy)
            warning = proxy.line("warning")["message"]
        named.stand.ask(proxy)
        named.names.address, named.names.code = "127.0.0.2", Names.OK
        with named.stand.rule(rejecting):
            named.refused(proxy)
            healed = proxy.line("resolve")["message"]
    assert warning.startswith(f"can't resolve exchange.test:{named.old.port}: ")
    assert warning.endswith("; the last answer stays in use")
    assert healed == f"exchange.test:{named.old.port} can be resolved again"
    assert (proxy.count("warning"), proxy.count("resolve")) == (1, 1), "once for each change"


@pytest.mark.parametrize("how", ["NXDOMAIN", "SERVFAIL", "NODATA", "silent"])
def test_a_name_that_can_not_be_resolved_yet_ends_the_start_with_75_and_the_next_one_is_good(named: Named, how: str) -> None:
    """Not with 2: there is nothing wrong with what was given."""
    named.names.code = getattr(Names, how, Names.OK)
    named.names.address = None if how == "silent" else "127.0.0.2"
    early = named.start()
    assert early.wait() == 75
    (line,) = early.stderr().splitlines()
    assert line.startswith(f"tsproxy.py: --target: given 'exchange.test:{named.old.port}'; can't be resolved: ")
    named.names.address, named.names.code = "127.0.0.2", Names.OK
    named.stand.ask(named.start())


def test_a_resolver_that_keeps_silent_holds_neither_clients_nor_the_end_up(named: Named) -> None:
    proxy = named.start("--drain-timeout=0")
    named.stand.ask(proxy)
    named.names.address = None
    asked = named.names.asked
    with named.stand.rule(f"tcp dport {named.old.port} reject with tcp reset"):
        named.refused(proxy)
    wait_until(lambda: named.names.asked > asked, "it asks")
    named.stand.ask(proxy)
    assert proxy.stop() == 0
