"""The picture that `demo` prints: the two legs side by side, what each end's kernel said of them, and how long it took."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Sequence, Tuple

from _tsproxy.tools import terminal
from _tsproxy.tools.audit import verdict
from _tsproxy.tools.demo_trade import ORDER_BYTES
from _tsproxy.tools.terminal import BOLD, DIM, GREEN, RED, YELLOW, Style

Facts = Dict[str, Any]
_BOX, _ARROW = 18, 8  # three boxes and two arrows, within 80 columns
_LEG = 38
_BAR = 48
_MOST_BARS = 7


def draw(facts: Facts, style: Style) -> str:
    """All lines, at most 80 columns wide."""
    parts = [[style.paint(_title(facts), BOLD)], _boxes(facts), _legs(facts, style), _told(facts), _bars(facts, style)]
    parts += [_audit(facts["audit"], style), [_verdict(facts, style)]]
    return "\n".join(style.fit("\n".join(part)) + "\n" for part in parts).rstrip("\n")


def _title(facts: Facts) -> str:
    if facts["mode"] == "strip":
        return "tsproxy demo: strip, between two private network namespaces"
    return "tsproxy demo: preserve, in this network namespace: timestamps are only counted"


def _boxes(facts: Facts) -> List[str]:
    user = f"uid {facts['uid']}, {facts['mode']}"
    texts = [
        ("client", f"tcp_timestamps={facts['client_sysctl']}"),
        ("tsproxy", user),
        ("exchange", f"tcp_timestamps={facts['exchange_sysctl']}"),
    ]
    edge = "─" * _BOX
    gap, arrow = " " * _ARROW, "─" * (_ARROW - 1) + "▶"
    return [
        "  " + gap.join(f"┌{edge}┐" for _ in texts),
        "  " + gap.join(f"│{name:^{_BOX}}│" for name, _ in texts),
        "  " + "│" + f"{texts[0][1]:^{_BOX}}├{arrow}│{texts[1][1]:^{_BOX}}├{arrow}│{texts[2][1]:^{_BOX}}│",
        "  " + gap.join(f"└{edge}┘" for _ in texts),
    ]


def _legs(facts: Facts, style: Style) -> List[str]:
    """Two columns: the leg of the client, the leg to the exchange."""
    options = facts["client_syn"], facts["upstream_syn"]
    negotiated = facts["connection"]["client_timestamps"], facts["connection"]["upstream_timestamps"]
    height = max(map(len, options))
    left = _leg("client -> tsproxy", options[0], height, negotiated[0], facts["client"]["timestamps"])
    right = _leg("tsproxy -> exchange", options[1], height, negotiated[1], facts["upstream"]["timestamps"])
    tsval = facts["connection"]["client_syn_tsval"]
    left += [("one made beside the client's own SYN;", DIM)]
    left += [
        (f"that had {'no TSval' if tsval is None else f'TSval {tsval}'}, read by", DIM),
        ("tsproxy with TCP_SAVED_SYN", DIM),
    ]
    right += [("the very SYN that arrived, read by the", DIM), ("exchange with TCP_SAVED_SYN", DIM), ("", "")]
    return [_pair(a, b, style) for a, b in zip(left, right)]


Cell = Tuple[str, str]  # text, colour


def _leg(title: str, options: Sequence[str], height: int, negotiated: bool, at_the_other_end: bool) -> List[Cell]:
    """One column; both have the same height."""
    stamped = any(option.startswith("TS") for option in options)
    seen = ("SYN with a timestamp:", YELLOW) if stamped else ("SYN without a timestamp:", GREEN)
    words = [(f"    {option}", YELLOW if option.startswith("TS") else "") for option in options]
    agreed = "negotiated" if negotiated else "not negotiated"
    if at_the_other_end is not negotiated:
        agreed += ", say the ends differently"
    blank = [("", "")] * (height - len(options))
    return [(title, BOLD), seen, *words, *blank, (f"TCP_INFO: timestamps {agreed}", YELLOW if negotiated else GREEN)]


def _pair(left: Cell, right: Cell, style: Style) -> str:
    padded = f"{left[0]:<{_LEG}}  "
    return f"  {_paint(padded, left[1], style)}{_paint(right[0], right[1], style)}".rstrip()


def _paint(text: str, code: str, style: Style) -> str:
    return style.paint(text, code) if code else text


def _told(facts: Facts) -> List[str]:
    connection, metrics, trips = facts["connection"], facts["metrics"], facts["round_trips_ns"]
    orders = trips["count"]
    return [
        f"  {orders:,} orders of {ORDER_BYTES} bytes, one at a time; each came back as it was sent",
        f"  relayed     {connection['rx_bytes']:,} bytes to the exchange, {connection['tx_bytes']:,} bytes back",
        f"  round trip  p50 {trips['p50'] / 1000:.1f} us, p99 {trips['p99'] / 1000:.1f} us, as the client saw it",
        f"  in tsproxy  p50 {metrics['relay_us_p50']:.1f} us, p99 {metrics['relay_us_p99']:.1f} us, readable to sent, each way",
    ]


def _bars(facts: Facts, style: Style) -> List[str]:
    """How many relays took how long: a bar for each doubling from the first to the last that has some."""
    counts = list(_buckets(facts["metrics"]))
    total = sum(count for _, count in counts) or 1
    most = max(count for _, count in counts) if counts else 1
    lines = ["  how long a relay took"]
    for label, count in counts:
        bar = "█" * (_BAR * count // most) or "▏"
        lines.append(f"  {label:>12} {bar:<{_BAR}} {100 * count / total:6.2f} %")
    return lines


def _buckets(metrics: Facts) -> Iterator[Tuple[str, int]]:
    """(label, count) of each doubling with something in it, the rare long ones in one."""
    limits = sorted(int(name.rsplit("_", 1)[1]) for name in metrics if name.startswith("relay_us_le_"))
    below = [0, *(metrics[f"relay_us_le_{limit}"] for limit in limits)]
    found = [(limit, after - before) for limit, before, after in zip(limits, below, below[1:]) if after > before]
    yield from ((f"up to {limit:>4} us", count) for limit, count in found[:_MOST_BARS])
    rest = metrics["relay_us_count"] - sum(count for _, count in found[:_MOST_BARS])
    if rest:
        yield "longer", rest


def _audit(audit: Facts, style: Style) -> List[str]:
    """What the wire itself shows, of each leg; or why it can't be looked at, and what there is instead."""
    if audit["why"]:
        lines = terminal.wrapped(f"no audit of the wire: {audit['why']}", terminal.WIDTH - 2)
        return [f"  {line}" for line in [*lines, "what the kernel says of both legs, above, needs no such right"]]
    lines = ["  audit: a connection captured on each leg by a packet socket, from its SYN on"]
    for title, leg in zip(("client -> tsproxy", "tsproxy -> exchange"), audit["legs"]):
        word = style.paint(f"{leg['verdict']:<9}", GREEN if leg["verdict"] == verdict.CLEAN else YELLOW)
        clock = f", {leg['clock']}" if leg["clock"] else ""
        lines.append(f"  {title:<20} {word} {leg['stamped']} of {leg['segments']} segments have a timestamp{clock}")
    agreed = "the same" if audit["claimed"] == bool(audit["legs"][1]["stamped"]) else "otherwise"
    return [*lines, f'  tsproxy\'s line says {agreed}: "upstream_timestamps":{str(audit["claimed"]).lower()}']


def _verdict(facts: Facts, style: Style) -> str:
    offered = facts["connection"]["client_syn_tsval"] is not None
    carried = any(option.startswith("TS") for option in facts["upstream_syn"]) or facts["upstream"]["timestamps"]
    asked = "The client offered timestamps" if offered else "The client offered no timestamps"
    if not carried:
        return style.paint(f"{asked}; the exchange got none.", GREEN)
    return style.paint(f"{asked}; the exchange got the proxy host's own.", RED)
