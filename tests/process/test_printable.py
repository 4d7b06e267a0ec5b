"""What comes from outside is shown, not acted on: no name of a file, an interface, a table or a host reaches a terminal raw."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any, List

import pytest
from _tsproxy.linux.printable import printable
from harness import CHECKOUT, Exchange
from hypothesis import given
from hypothesis import strategies as st
from namespaces import Namespace, require_root

ESCAPE = "\x1b[31m\x1b]0;owned\x07"
AWKWARD = ESCAPE + "\u202e\x9b1m\r\t\x7f"


@given(st.text())
def test_nothing_is_left_that_a_terminal_would_act_on(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown
    assert (shown == text) == text.isprintable()


@given(st.binary())
def test_bytes_that_are_no_utf_8_are_shown_as_what_they_are(name: bytes) -> None:
    shown = printable(os.fsdecode(name))
    for byte in (b"\xff", b"\xfe"):  # never in UTF-8
        assert shown.count(f"\\x{byte.hex()}") >= name.count(byte)


def test_a_line_break_may_be_kept() -> None:
    assert printable("a\nb\x1b", kept="\n") == "a\nb\\x1b"


def clean(said: bytes) -> str:
    """Fit for a terminal: UTF-8, and of all that it would act on nothing but line breaks."""
    text = said.decode("utf-8")
    assert all(one.isprintable() or one == "\n" for one in text), ascii(text)
    return text


def run(*words: Any, code: int, **popen: Any) -> str:
    """What it said, on both; it ended with that code."""
    done = subprocess.run([*words], capture_output=True, check=False, timeout=60, **popen)
    assert done.returncode == code, done
    assert b"Traceback" not in done.stderr
    return clean(done.stdout) + clean(done.stderr)


COMMANDS: List[List[str]] = [
    ["top", f"{AWKWARD}\n"],
    ["top", "\udcff\udcfe"],
    ["generate", AWKWARD, "-ta:1"],
    ["generate", "nftables", f"-t{AWKWARD}:1"],
    ["-ta:1", f"--user=nobody{AWKWARD}"],
    ["-ta:1", "--user=nobody\n"],
    ["-ta:1", f"--source={AWKWARD}"],
    ["-ta:1", f"--allow={AWKWARD}"],
    [f"--{AWKWARD}"],
    [f"-{AWKWARD}"],
    [AWKWARD],
    ["bundle", f"/nowhere/{AWKWARD}"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: ascii(" ".join(words))[:40])
def test_what_was_given_comes_back_without_its_escapes(words: List[str]) -> None:
    said = run(*CHECKOUT, *map(os.fsencode, words), code=2)
    assert said.startswith("tsproxy.py: ")
    assert said.count("\n") == 1


def test_the_name_of_a_bundle_is_shown_without_its_escapes(tmp_path: Path) -> None:
    out = f"a{ESCAPE}\udcff"
    assert "\\x1b[31m" in run(*CHECKOUT, "bundle", os.fsencode(out), code=0, cwd=tmp_path)
    assert (tmp_path / out).exists()


def test_a_word_of_the_handover_comes_back_without_its_escapes() -> None:
    script = f'LISTEN_PID=$$ LISTEN_FDS="{AWKWARD}" exec "$@"'
    said = run("sh", "-c", script, "sh", *CHECKOUT, "-t127.0.0.1:9", "--timestamps=preserve", code=2)
    assert said.startswith("tsproxy.py: LISTEN_FDS: given '\\x1b[31m")


def ip_link(space: Namespace, *words: Any) -> None:
    subprocess.run([*space.enter, "ip", "link", *words], check=True)


@pytest.mark.root
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_check_shows_names_of_interfaces_and_tables_without_their_escapes(form: List[str]) -> None:
    """Both may be set by whoever has a user namespace of its own; an interface may be called anything but / : and blanks."""
    require_root()
    with contextlib.closing(Namespace(tcp_timestamps="0")) as space:
        ip_link(space, "add", "\x1b[31mx\u202e", "type", "veth", "peer", "name", b"\xff\xfe\x1b]0;")
        ip_link(space, "set", "lo", "down")
        ip_link(space, "set", "lo", "name", b"\xfflo")
        ip_link(space, "set", b"\xfflo", "up")
        with space:
            far = Exchange()
        with contextlib.closing(far):
            said = run(*space.enter, *CHECKOUT, "check", "-t", far.target, *form, code=0)
    assert "\\x1b[31mx\\u202e" in said.replace("\\\\", "\\")
    assert "no UTF-8" in said, "the SYN on the wire of such an interface is seen all the same"


@pytest.mark.root
def test_a_network_namespace_is_named_without_its_escapes() -> None:
    require_root()
    hidden = 'mount -t tmpfs x /run && mkdir /run/netns && cd /run/netns && touch "$1" && mount --bind /proc/self/ns/net "$1"'
    words = ["unshare", "--net", "--mount", "sh", "-c", f'{hidden} && shift && ip link set lo up && exec "$@"', "sh", AWKWARD]
    said = run(*words, *CHECKOUT, "check", "-t127.0.0.1:9", "--timestamps=preserve", code=0)
    assert '"\\x1b[31m' in said
