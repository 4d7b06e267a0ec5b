"""A wire to look at: client, proxy and exchange in namespaces of their own, and a capture of every packet.

    client --- host (listener)          clean --- exchange
                     `-- the proxy process --'

`host` and `clean` are one namespace (rules) or two (the listener is inherited). The sniffer is an AF_PACKET socket on
the exchange's side; tcpdump beside it is the independent second opinion.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from common.tap import mac_of
from harness import PATIENCE, ROOT, Exchange, Proxy, wait_until
from namespaces import Namespace

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
DOWNSTREAM, UPSTREAM = "downstream", "upstream"  # the veths, by the same name on both ends
ADDRESSES = {4: ("10.1.0.", "10.2.0.", 24), 6: ("fd01::", "fd02::", 64)}


class Packet(NamedTuple):
    """One TCP segment as it crossed the wire."""

    source: Tuple[str, int]
    target: Tuple[str, int]
    flags: int
    sequence: int
    window: int
    payload: int
    tsval: Optional[int]
    tsecr: Optional[int]
    acknowledges: int  # up to this sequence number
    tos: int = 0  # DSCP, and the two bits of ECN

    @property
    def is_syn(self) -> bool:
        return self.flags & (SYN | ACK) == SYN


def dissect(raw: bytes) -> Optional[Packet]:
    """An IP packet with TCP in it; written apart from the product's own parser, which it judges."""
    if raw[0] >> 4 == 4:
        if raw[9] != 6:
            return None
        start, end, tos = (raw[0] & 15) * 4, struct.unpack_from("!H", raw, 2)[0] or len(raw), raw[1]
        ips = [socket.inet_ntop(socket.AF_INET, raw[at : at + 4]) for at in (12, 16)]
    else:
        if raw[6] != 6:
            return None
        start, end = 40, 40 + (struct.unpack_from("!H", raw, 4)[0] or len(raw) - 40)
        tos = struct.unpack_from("!H", raw)[0] >> 4 & 0xFF
        ips = [socket.inet_ntop(socket.AF_INET6, raw[at : at + 16]) for at in (8, 24)]
    sport, dport, sequence, acknowledges, offset, flags, window = struct.unpack_from("!HHIIBBH", raw, start)
    options = raw[start + 20 : start + (offset >> 4) * 4]
    stamps = _timestamps(options)
    payload = end - start - (offset >> 4) * 4
    return Packet((ips[0], sport), (ips[1], dport), flags, sequence, window, payload, *stamps, acknowledges, tos)


def _timestamps(options: bytes) -> Tuple[Optional[int], Optional[int]]:
    at = 0
    while at < len(options) and options[at]:
        if options[at] == 8:
            return struct.unpack_from("!II", options, at + 2)
        at += 1 if options[at] == 1 else options[at + 1]
    return None, None


class Sniffer:
    """Every TCP packet on one interface of a namespace, from start to stop()."""

    def __init__(self, namespace: Namespace, interface: str) -> None:
        with namespace:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
        self._socket.bind((interface, _ETH_P_ALL))
        self.packets: List[Packet] = []
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, name="sniffer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._socket, self._wake], [], [])
            if self._socket in ready:
                packet = dissect(self._socket.recv(256))
                if packet:
                    self.packets.append(packet)
            elif self._wake in ready:
                return

    def stop(self) -> List[Packet]:
        """Take what is still queued, end; AssertionError if the kernel had to drop any."""
        os.write(self._stop, b"x")
        self._thread.join()
        _, drops = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self.close()
        assert drops == 0, f"the sniffer missed {drops} packets"
        return self.packets

    def close_if_running(self) -> None:
        """For a test that failed in between."""
        if self._wake != -1:
            os.write(self._stop, b"x")
            self._thread.join()
            self.close()

    def close(self) -> None:
        self._socket.close()
        for fd in (self._wake, self._stop):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._wake = self._stop = -1


@contextlib.contextmanager
def tcpdump(namespace: Namespace, interface: str, path: Path) -> Iterator[Any]:
    """Captures to `path`; the yielded function, told how many packets there were, returns tcpdump's own words for each."""
    command = [
        *namespace.enter,
        "tcpdump",
        "-i",
        interface,
        "-U",
        "--immediate-mode",
        "-Z",
        "root",
        "-s",
        "128",
        "-B",
        "65536",
        "-w",
        str(path),
    ]
    process = subprocess.Popen([*command, "tcp"], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if "listening on" in line:
            break

    def lines() -> List[str]:
        command = ["tcpdump", "-nn", "-r", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()

    def read(packets: int) -> List[str]:
        wait_until(lambda: len(lines()) >= packets, "tcpdump has written what the sniffer saw")
        process.terminate()
        rest = process.communicate()[1]
        assert "\n0 packets dropped by kernel" in rest, rest
        return lines()

    try:
        yield read
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        process.stderr.close()


# As systemd does it (sd_listen_fds(3)): the listener is descriptor 3, and the process is named by its pid.
_HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_FDNAMES="orders", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Wire:
    """The namespaces, joined by veths, with addresses of both families."""

    def __init__(self, split: bool, sysctl: str = "1") -> None:
        """`split`: the listener's namespace is not the upstream one. `sysctl` is that of the upstream one."""
        self._stack = contextlib.ExitStack()
        make = lambda **options: self._stack.enter_context(contextlib.closing(Namespace(**options)))  # noqa: E731
        self.client, self.exchange = make(), make()
        self.clean = make(tcp_timestamps=sysctl)
        self.host = make() if split else self.clean
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            for ends in ((self.client, self.host, DOWNSTREAM, 0), (self.clean, self.exchange, UPSTREAM, 1)):
                join(*ends)
                introduce(*ends)
            undo.pop_all()

    def listen_address(self, family: int) -> str:
        return ADDRESSES[family][0] + "2"

    def exchange_address(self, family: int) -> str:
        return ADDRESSES[family][1] + "2"

    def far_end(self, family: int, handler: Any = None) -> Exchange:
        with self.exchange:
            far = Exchange(handler, host=self.exchange_address(family))
        self._stack.callback(far.close)
        return far

    def start(self, far: Exchange, family: int, *options: str, wrap: Sequence[str] = ()) -> Proxy:
        """The proxy in the clean namespace; where the wire is split, with a listener from the host's, by LISTEN_FDS.

        `wrap` are words to start it with.
        """
        words = ["-t", far.target, "--metrics-interval=0", *options]
        command = [*self.clean.enter, *wrap, sys.executable, str(ROOT / "tsproxy.py")]
        address = (self.listen_address(family), 0)
        if self.host is self.clean:
            proxy = Proxy(command, *words, "-p0", "-b", address[0])
        else:
            proxy = self._start_inherited([*command, *words], address)
        self._stack.callback(proxy.close)
        return proxy

    def _start_inherited(self, command: List[str], address: Tuple[str, int]) -> Proxy:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with self.host:
            listener = socket.create_server(address, family=family)
        fd = listener.fileno()
        with listener:
            return Proxy([sys.executable, "-c", _HAND_OVER, str(fd), *command], pass_fds=(fd,))

    def connect(self, proxy: Proxy) -> socket.socket:
        with self.client:
            return proxy.connect()

    def rules(self, text: str) -> None:
        self.clean.run("nft", "-f", "-", input=text)

    def close(self) -> None:
        self._stack.close()


def join(one: Namespace, other: Namespace, name: str, which: int) -> None:
    """A veth between two namespaces, called `name` on both ends: .1 on this one's, .2 on the other's."""
    one.run("ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", other.path)
    for namespace, last in ((one, "1"), (other, "2")):
        for family in (4, 6):
            prefix, length = ADDRESSES[family][which], ADDRESSES[family][2]
            dad = ["nodad"] if family == 6 else []
            namespace.run("ip", "addr", "add", f"{prefix}{last}/{length}", "dev", name, *dad)
        namespace.run("ip", "link", "set", name, "up")


def introduce(one: Namespace, other: Namespace, name: str, which: int) -> None:
    """Each knows the other's hardware address: on a new link the first IPv6 packet waits a second for it."""
    for namespace, peer, last in ((one, other, "2"), (other, one, "1")):
        with peer:
            mac = mac_of(name).hex(":")
        hosts = [f"{ADDRESSES[family][which]}{last}" for family in (4, 6)]
        commands = [f"neigh replace {host} lladdr {mac} dev {name} nud permanent\n" for host in hosts]
        namespace.run("ip", "-batch", "-", input="".join(commands))


def netstat(namespace: Namespace) -> Dict[str, int]:
    """TcpExt's counters of a namespace (/proc/net/netstat)."""
    with namespace, open("/proc/thread-self/net/netstat") as file:
        names, values = (line.split()[1:] for line in file.read().splitlines()[:2])
    return dict(zip(names, map(int, values)))


def kinds(packets: List[Packet], target: Tuple[str, int]) -> Set[str]:
    """Which kinds of segment went to `target`, by what can be seen of them."""
    found: Set[str] = set()
    unanswered: Set[Tuple[str, int]] = set()
    highest: Dict[Tuple[str, int], int] = {}
    for packet in packets:
        if packet.target != target:
            continue
        found |= _kind(packet, unanswered, highest)
    return found


def _kind(packet: Packet, unanswered: Set[Any], highest: Dict[Any, int]) -> Set[str]:
    if packet.flags & SYN:
        again = bool(unanswered)  # by the kernel from the same port, or by tsproxy from another one
        unanswered.add(packet.source)
        highest[packet.source] = packet.sequence + 1
        return {"SYN again" if again else "SYN"}
    unanswered.clear()
    if packet.flags & RST:
        return {"RST"}
    following = highest.get(packet.source, packet.sequence)
    highest[packet.source] = max(following, packet.sequence + packet.payload + (packet.flags & FIN))
    if packet.flags & FIN:
        return {"FIN"}
    if packet.payload:
        return {"data"}
    return {"probe" if packet.sequence == following - 1 else "ACK"}


def settled(sniffer: Sniffer, wanted: Set[str], target: Tuple[str, int]) -> None:
    """Wait until all wanted kinds have crossed."""
    wait_until(lambda: wanted <= kinds(list(sniffer.packets), target), f"{wanted} on the wire", max(30, PATIENCE))
