"""What the host gives: addresses, wake-ups, sockets with their options in effect, limits, privileges, CPUs."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import select
import socket
import threading
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest
from _tsproxy.linux import cpus, limits, privileges, sockets, uapi, wakeup
from _tsproxy.linux.addresses import PACKED_SIZE, Address, from_sockaddr, pack, raw_ip, unpack
from _tsproxy.linux.sockets import Tuning
from harness import PATIENCE, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from in_child import child

unhurried = settings(deadline=None)
PORTS = st.integers(0, 65535)
SCOPES = st.integers(0, 2**32 - 1)
QUIET = Tuning(keepalive_s=0, user_timeout_ms=0)
FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


# Addresses


@given(st.ip_addresses(v=4).map(str), PORTS)
def test_an_ipv4_address_survives_the_way_between_workers(ip: str, port: int) -> None:
    packed = pack(socket.AF_INET, (ip, port))
    assert len(packed) == PACKED_SIZE
    assert unpack(packed) == Address(socket.AF_INET, ip, port)
    assert unpack(packed).sockaddr == (ip, port)
    assert str(unpack(packed)) == f"{ip}:{port}"
    assert raw_ip(packed) == (socket.AF_INET, int(ipaddress.ip_address(ip)))


@given(st.ip_addresses(v=6).filter(lambda ip: not ip.ipv4_mapped), PORTS, SCOPES)
@example(ipaddress.IPv6Address("::"), 0, 0)
@example(ipaddress.IPv6Address("::7f00:1"), 1, 0)
def test_an_ipv6_address_survives_the_way_between_workers(ip: ipaddress.IPv6Address, port: int, scope: int) -> None:
    packed = pack(socket.AF_INET6, (str(ip), port, 7, scope))
    assert len(packed) == PACKED_SIZE
    found = unpack(packed)
    assert ipaddress.ip_address(found.ip) == ip
    assert found.sockaddr == (found.ip, port, 0, scope)
    names = dict(socket.if_nameindex())
    zone = f"%{names.get(scope, scope)}" if scope else ""
    assert str(found) == f"[{found.ip}{zone}]:{port}"
    assert raw_ip(packed) == (socket.AF_INET6, int(ip))


@given(st.ip_addresses(v=4), PORTS)
def test_an_ipv4_client_of_an_ipv6_listener_is_an_ipv4_client(ip: ipaddress.IPv4Address, port: int) -> None:
    mapped = pack(socket.AF_INET6, (f"::ffff:{ip}", port, 0, 0))
    assert mapped == pack(socket.AF_INET, (str(ip), port))
    assert from_sockaddr(socket.AF_INET6, (f"::ffff:{ip}", port, 0, 0)) == Address(socket.AF_INET, str(ip), port)


def test_a_zone_goes_over_as_its_number() -> None:
    assert from_sockaddr(socket.AF_INET6, ("fe80::1%lo", 443, 0, 1)) == Address(socket.AF_INET6, "fe80::1", 443, 1)


@pytest.mark.parametrize(("family", "ip"), FAMILIES)
def test_what_the_kernel_gives_goes_back_to_the_kernel(family: int, ip: str) -> None:
    with socket.create_server((ip, 0), family=family) as listener:
        address = from_sockaddr(family, listener.getsockname())
        with socket.create_connection(address.sockaddr[:2]) as client:
            accepted, peer = listener.accept()
            accepted.close()
            assert from_sockaddr(family, peer) == from_sockaddr(family, client.getsockname())


# Wake-ups


KIND = "eventfd" if wakeup.HAS_EVENTFD else "pipe"


@contextlib.contextmanager
def bell(kind: str) -> Iterator[wakeup.Wakeup]:
    """A wake-up of that kind: what this Python has, or what an older one falls back to."""
    made = wakeup.create() if kind == KIND else wakeup.Wakeup(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        yield made
    finally:
        made.close()


KINDS = pytest.mark.parametrize("kind", list(dict.fromkeys([KIND, "pipe"])))


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@KINDS
@unhurried
@given(steps=st.lists(st.integers(0, 50), max_size=20))
def test_a_wakeup_counts_each_ring_once(kind: str, steps: List[int]) -> None:
    with bell(kind) as wake:
        for rings in steps:
            for _ in range(rings):
                wake.wake()
            assert is_readable(wake.reader) is (rings > 0)
            assert wake.collect() == rings
            assert wake.collect() == 0


@KINDS
def test_rings_from_many_threads_are_all_counted(kind: str) -> None:
    with bell(kind) as wake:
        threads = [threading.Thread(target=lambda: [wake.wake() for _ in range(500)]) for _ in range(8)]
        collected = 0
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            collected += wake.collect()
        for thread in threads:
            thread.join()
        assert collected + wake.collect() == 4000


@KINDS
def test_a_wakeup_that_is_full_neither_blocks_nor_sleeps(kind: str) -> None:
    with bell(kind) as wake:
        with contextlib.suppress(BlockingIOError):
            while True:
                if kind == "pipe":
                    os.write(wake.writer, bytes(65536))
                else:
                    os.eventfd_write(wake.writer, 2**64 - 2)
        wake.wake()
        assert is_readable(wake.reader)
        assert wake.collect() > 0


@KINDS
def test_a_wakeup_is_not_inherited_by_other_programs(kind: str) -> None:
    with bell(kind) as wake:
        assert not any(os.get_inheritable(fd) for fd in wake)


def test_a_ring_from_another_process_arrives() -> None:
    with bell("pipe") as wake:
        code = "import sys; from _tsproxy.linux.wakeup import Wakeup; Wakeup(-1, int(sys.argv[1])).wake()"
        child([code, str(wake.writer)], pass_fds=(wake.writer,))
        assert wake.collect() == 1


# Sockets


@contextlib.contextmanager
def pair(family: int, ip: str, tuning: Tuning) -> Iterator[Tuple[socket.socket, socket.socket, socket.socket]]:
    """(listener, dialled, accepted), connected, made by the functions under test."""
    with sockets.listener(Address(family, ip, 0), 16, tuning, False) as listening:
        with contextlib.closing(sockets.dial(family, None)) as dialled:
            assert dialled.connect_ex(listening.getsockname()) in {0, errno.EINPROGRESS}
            assert not dialled.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            tuning.set_keepalive(dialled)  # as a session does that has lived for a second
            select.select([listening], [], [], PATIENCE)
            accepted, _ = listening.accept()
            with accepted:
                yield listening, dialled, accepted


@pytest.mark.parametrize(("family", "ip"), FAMILIES)
def test_tuning_is_in_effect_on_both_legs(family: int, ip: str) -> None:
    tcp, level = socket.IPPROTO_TCP, socket.SOL_SOCKET
    with pair(family, ip, Tuning(keepalive_s=31, user_timeout_ms=12345)) as legs:
        for sock in legs[1:]:
            assert sock.getsockopt(tcp, socket.TCP_NODELAY)
            assert sock.getsockopt(level, socket.SO_KEEPALIVE)
            assert [sock.getsockopt(tcp, n) for n in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)] == [31, 3]
            assert sock.getsockopt(tcp, socket.TCP_KEEPCNT) == 3
            assert sock.getsockopt(tcp, uapi.TCP_USER_TIMEOUT) == 0  # it would count the time of a closed window


@pytest.mark.parametrize(
    ("keepalive_s", "user_timeout_ms", "gap_s", "count"),
    [(30, 10_000, 3, 3), (30, 0, 10, 3), (1, 500, 1, 1), (30, 300_000, 90, 3), (32767, 2**31 - 1, 32767, 64), (1, 9000, 2, 4)],
)
def test_an_idle_peer_is_asked_more_than_once_within_its_time(
    keepalive_s: int, user_timeout_ms: int, gap_s: int, count: int
) -> None:
    with socket.socket() as sock:
        Tuning(keepalive_s, user_timeout_ms).apply(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == gap_s
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == count


class Noting(socket.socket):
    """Notes which options are set, in order."""

    def setsockopt(self, level: int, name: int, *value: Any) -> None:
        self.noted = [*getattr(self, "noted", []), (level, name)]
        super().setsockopt(level, name, *value)


def test_the_time_that_may_send_a_probe_at_once_is_set_after_what_the_next_one_is_due_by() -> None:
    """On a connection that was idle for so long TCP_KEEPIDLE fires the timer, in the middle of the calls."""
    with Noting() as sock:
        Tuning(keepalive_s=1, user_timeout_ms=500).set_keepalive(sock)
        options = [(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_KEEPIDLE)]
        assert sock.noted == [*options[:2], (socket.SOL_SOCKET, socket.SO_KEEPALIVE), options[2]]


def test_without_a_user_timeout_three_probes_decide() -> None:
    with pair(socket.AF_INET, "127.0.0.1", Tuning(keepalive_s=31, user_timeout_ms=0)) as legs:
        for sock in legs[1:]:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


def test_tuning_of_zero_leaves_the_kernels_settings() -> None:
    with socket.socket() as fresh, pair(socket.AF_INET, "127.0.0.1", QUIET) as legs:
        for sock in legs[1:]:
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for option in (socket.TCP_KEEPIDLE, uapi.TCP_USER_TIMEOUT):
                assert sock.getsockopt(socket.IPPROTO_TCP, option) == fresh.getsockopt(socket.IPPROTO_TCP, option)


@pytest.mark.parametrize("seconds", [1, 2, 32767])
def test_the_shortest_and_the_longest_keepalive_are_taken(seconds: int) -> None:
    with socket.socket() as sock:
        Tuning(seconds, 2**31 - 1).apply(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == seconds


def test_no_socket_blocks_or_is_inherited() -> None:
    with pair(socket.AF_INET, "127.0.0.1", QUIET) as (listening, dialled, accepted):
        with contextlib.closing(sockets.from_fd(accepted.detach())) as adopted:
            for sock in (listening, dialled, adopted):
                assert not sock.getblocking()
                assert not os.get_inheritable(sock.fileno())
            with pytest.raises(BlockingIOError):
                adopted.recv(1)


def test_a_reset_on_close_reaches_the_other_side_as_a_reset() -> None:
    with pair(socket.AF_INET, "127.0.0.1", QUIET) as (_, dialled, accepted):
        sockets.reset_on_close(accepted)
        accepted.close()
        select.select([dialled], [], [], PATIENCE)
        with pytest.raises(ConnectionResetError):
            dialled.recv(1)


@pytest.mark.parametrize(("family", "ip"), FAMILIES)
def test_tcp_info_agrees_with_the_kernel_on_timestamps(family: int, ip: str) -> None:
    with pair(family, ip, QUIET) as (_, dialled, accepted):
        wanted = Path("/proc/sys/net/ipv4/tcp_timestamps").read_text() != "0\n"
        for sock in (dialled, accepted):
            wait_until(lambda sock=sock: sockets.tcp_info(sock).rtt_us > 0, "a measured round trip")
            assert sockets.tcp_info(sock).timestamps is wanted
            assert sockets.has_timestamps(sock) is wanted
            assert sockets.tcp_info(sock).rtt_us < 10_000_000
            assert sockets.tcp_info(sock).retransmits == 0


def test_a_connection_is_asked_for_timestamps_only_while_there_is_one() -> None:
    with socket.socket() as fresh:
        assert sockets.connected(fresh) is None
    with pair(socket.AF_INET, "127.0.0.1", QUIET) as (_, dialled, accepted):
        wanted = sockets.has_timestamps(dialled)
        info = wait_until(lambda: sockets.connected(dialled), "a connection")
        assert (info.timestamps, info.retransmits) == (wanted, 0)
        accepted.shutdown(socket.SHUT_WR)
        select.select([dialled], [], [], PATIENCE)
        assert dialled.recv(1) == b""
        assert sockets.connected(dialled)  # the other half is still there
        sockets.reset_on_close(accepted)
        accepted.close()
        wait_until(lambda: sockets.connected(dialled) is None, "the reset")


def test_first_segments_are_acknowledged_at_once_without_being_asked_to() -> None:
    with pair(socket.AF_INET, "127.0.0.1", QUIET) as (_, dialled, accepted):
        assert [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) for sock in (dialled, accepted)] == [1, 1]


@pytest.mark.parametrize(("family", "ip"), FAMILIES)
def test_an_upstream_socket_leaves_from_its_source(family: int, ip: str) -> None:
    source = "127.0.0.77" if family == socket.AF_INET else "::1"
    with socket.create_server((ip, 0), family=family) as far:
        with contextlib.closing(sockets.dial(family, Address(family, source, 9))) as dialled:
            assert dialled.getsockname()[1] == 0  # no port is taken before connect()
            dialled.connect_ex(far.getsockname())
            accepted, peer = far.accept()
            accepted.close()
            assert peer[0] == source
            assert peer[1] not in {0, 9}


@pytest.mark.parametrize("source", ["192.0.2.1", "2001:db8::1"])
def test_a_source_that_is_not_here_is_an_error_and_leaves_nothing_open(source: str) -> None:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Cannot assign requested address"):
        sockets.dial(family, Address(family, source, 0))
    assert os.listdir("/proc/self/fd") == before


def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_open() -> None:
    with sockets.listener(Address(socket.AF_INET, "127.0.0.1", 0), 1, QUIET, False) as first:
        address = from_sockaddr(first.family, first.getsockname())
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="in use"):
            sockets.listener(address, 1, QUIET, False)
        with pytest.raises(OSError, match="in use"):
            sockets.listener(address, 1, QUIET, True)  # both must ask to share it
        assert os.listdir("/proc/self/fd") == before


def test_listeners_share_a_port_when_both_ask_for_it() -> None:
    with sockets.listener(Address(socket.AF_INET, "127.0.0.1", 0), 1, QUIET, True) as first:
        address = from_sockaddr(first.family, first.getsockname())
        with sockets.listener(address, 1, QUIET, True) as second:
            assert second.getsockname() == first.getsockname()


# Numbers


def test_our_numbers_are_those_that_python_has() -> None:
    for name in ("TCP_INFO", "TCP_USER_TIMEOUT"):
        assert getattr(uapi, name) == getattr(socket, name)


def test_our_numbers_are_those_of_the_kernels_headers() -> None:
    headers = [Path("/usr/include/linux") / name for name in ("tcp.h", "in.h", "fcntl.h")]
    if not all(header.exists() for header in headers):
        pytest.skip("no kernel headers here")
    text = "".join(header.read_text() for header in headers).replace("(F_LINUX_SPECIFIC_BASE + ", "(1024 + ")
    stated = dict(re.findall(r"^#define\s+(\w+)\s+(\d+|\(\d+ \+ \d+\))", text, re.M))
    for name in ("TCP_INFO", "TCP_USER_TIMEOUT", "TCP_TIMESTAMP", "TCP_SAVE_SYN", "TCP_SAVED_SYN", "TCPI_OPT_TIMESTAMPS"):
        assert sum(map(int, re.findall(r"\d+", stated[name]))) == getattr(uapi, name), name
    for name in ("IP_BIND_ADDRESS_NO_PORT", "F_SETPIPE_SZ"):
        assert sum(map(int, re.findall(r"\d+", stated[name]))) == getattr(uapi, name), name


def test_no_errno_stands_in_two_families() -> None:
    families = [uapi.RETRY, uapi.PEER_ERRORS, uapi.CAPACITY]
    assert sum(map(len, families)) == len(frozenset().union(*families))
    assert uapi.PEER_RESET < uapi.PEER_ERRORS


# Limits

CAP_SYS_RESOURCE = 24  # include/uapi/linux/capability.h
RAISE = """
import resource, sys
from _tsproxy.linux import limits
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(limits.raise_nofile(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def raised(soft: int, hard: int, wanted: int) -> Tuple[int, ...]:
    """(answer, soft, hard) in a process that began with these limits."""
    return tuple(map(int, child([RAISE, str(soft), str(hard), str(wanted)]).split()))


def test_a_soft_limit_is_raised_as_far_as_it_is_wanted() -> None:
    assert raised(100, 1000, 500) == (500, 500, 1000)


def test_a_limit_that_is_high_enough_is_left_alone() -> None:
    assert raised(600, 1000, 500) == (600, 600, 1000)


UNPRIVILEGED = "import os, _tsproxy.linux.limits\nif os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"


def test_without_the_right_to_more_the_hard_limit_is_what_there_is() -> None:
    assert child([UNPRIVILEGED + RAISE, "100", "1000", "2000"]) == "1000 1000 1000\n"


def test_the_hard_limit_is_raised_where_that_is_allowed() -> None:
    status = Path("/proc/self/status").read_text()
    if not int(status.split("CapEff:")[1].split()[0], 16) >> CAP_SYS_RESOURCE & 1:
        pytest.skip("LOUD: no CAP_SYS_RESOURCE: raising the hard limit is NOT tested here")
    assert raised(100, 1000, 2000) == (2000, 2000, 2000)


@given(st.integers(0, 1_000_000), st.integers(1, 256))
def test_the_descriptors_asked_for_are_enough_for_the_connections(connections: int, workers: int) -> None:
    needed = limits.descriptors_for(connections, workers)
    assert limits.connections_within(needed, workers) == connections
    assert connections == 0 or limits.connections_within(needed - 1, workers) == connections - 1
    assert limits.connections_within(0, workers) == 0


# Privileges


def test_without_root_there_is_nothing_to_drop_to() -> None:
    code = "try: privileges.drop(privileges.account('root'))\nexcept PermissionError: print('refused')"
    assert child(["from _tsproxy.linux import privileges\n" + UNPRIVILEGED + code]) == "refused\n"


def test_a_user_that_is_not_here_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        privileges.account("no-such-user-here")


# CPUs


def test_pinning_moves_the_calling_thread_alone() -> None:
    before, seen = cpus.usable(), []
    chosen = min(before)

    def pinned() -> None:
        cpus.pin_this_thread(chosen)
        seen.append(cpus.usable())

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == [frozenset({chosen})]
    assert cpus.usable() == before


def test_a_cpu_that_is_not_here_is_an_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        cpus.pin_this_thread(1023)
