"""A DNS server of the test's own, and an exchange that is known by name."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from typing import List, Optional, Tuple

from faults import Stand, play
from harness import Exchange, Line, Proxy


class Names:
    """A DNS server on port 53 of a namespace: what it answers, the test decides (RFC 1035, section 4.1)."""

    OK, SERVFAIL, NXDOMAIN = 0, 2, 3
    NODATA = 16  # an answer without an error and without a record

    def __init__(self, address: str) -> None:
        self.address: Optional[str] = address  # None: it keeps silent
        self.code = self.OK
        self.asked = 0
        self._unanswered: List[Tuple[bytes, Tuple[str, int]]] = []
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
            if self.address is None:
                self._unanswered.append((question, client))
            else:
                self._socket.sendto(self._answer(question, self.address), client)

    def answer_at_last(self, address: str) -> None:
        """Answer what was asked while it kept silent."""
        self.address = address
        for question, client in self._unanswered:
            self._socket.sendto(self._answer(question, address), client)

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


def asking_here(tmp_path: Path, patience_s: int = 1) -> Tuple[str, ...]:
    """The words before a command whose resolver shall ask the server on port 53 of its own namespace, and nothing else.

    `patience_s`: how long it waits for an answer, once; 30 at most (resolv.conf(5)).
    """
    (tmp_path / "resolv.conf").write_text(f"nameserver 127.0.0.1\noptions timeout:{patience_s} attempts:1\n")
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

    def command(self, *words: str) -> List[str]:
        """The words that run another command than relaying there."""
        return [*self.stand.host.enter, *self._wrap, *self.stand.command, *words]

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
