"""--zero-copy in a running tsproxy: when there is a pipe, and that no byte is lost or overtaken in it."""

from __future__ import annotations

import os
import socket
import threading
from pipes import MIB, push_through
from typing import Any

import pytest
from harness import Exchange, receive_exactly


def test_a_long_transfer_takes_one_pipe_and_keeps_it_for_the_next(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--workers=1")
    assert "zero_copy=splice" in proxy.line("start")["knobs"]
    before, during, after = push_through(proxy, exchange)
    assert (during - before, after - before) == (2, 2)
    assert push_through(proxy, exchange) == [after, after, after]
    assert proxy.stop() == 0


def test_with_zero_copy_never_there_is_no_pipe(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--workers=1", "--zero-copy=never")
    assert not any("zero_copy" in knob for knob in proxy.line("start")["knobs"])
    assert len(set(push_through(proxy, exchange))) == 1
    assert proxy.stop() == 0


@pytest.mark.parametrize("direction", ["to upstream", "to downstream"])
@pytest.mark.parametrize("then", ["more", "the end"])
def test_urgent_bytes_while_splicing_arrive_in_line_and_so_do_those_behind_them(
    start: Any, exchange: Exchange, then: str, direction: str
) -> None:
    """splice(2) stops at the urgent mark for good, with EAGAIN, or with 0 once FIN is there: recv(2) must go on."""
    proxy = start(exchange, "--workers=1")
    client, server = proxy.connect(), exchange.accept()
    if direction == "to downstream":
        client, server = server, client
    data = os.urandom(MIB) * 8

    def send() -> None:
        for _ in range(3):
            client.sendall(data)
            client.send(b"!", socket.MSG_OOB)
        client.sendall(b"behind")
        if then == "the end":
            client.shutdown(socket.SHUT_WR)

    sending = threading.Thread(target=send)
    sending.start()
    expected = (data + b"!") * 3 + b"behind"
    assert receive_exactly(server, len(expected)) == expected
    sending.join()
    for sock in (client, server):
        sock.close()
    assert proxy.line("connection")["reason"] == "closed"
    assert proxy.stop() == 0
