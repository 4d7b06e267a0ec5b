"""Command lines by the hundred, each to a process: exit code 2 and one line, without the manual, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import List, Tuple

import pytest
from command_line import ending
from harness import ROOT

T = b"-t127.0.0.1:9"


HUNDRED: List[List[bytes]] = [
    [],
    *ending([T, b"--port="], b"", b" ", b"-1", b"+1", b"65536", b"1_000", b"1e3", b"0x1", b"\xff", b"\xd9\xa3", b"1\n"),
    *ending([T, b"--port", b""], b"--port", b"--", b"-", b"-p", b"\xef\xbc\x91", b"9" * 5000, b"1 2"),
    *ending([T, b""], b"--p", b"--port", b"-p", b"-P", b"-pp", b"---", b"--=", b"-", b"", b"\xff", b"-\xff", b"--\xff"),
    *ending([T, b"--"], b"json", b"Port=1", b"port\n=1", b"PORT=1", b"trust", b"trust-host=", b"no-reuse-port", b"port-1"),
    *ending([b"--target"], b"", b"=", b"=a", b"=:1", b"s=a:1"),
    *ending([b"-t"], b"", b" ", b":", b":1", b"a", b"a:", b"a:0", b"a:65536", b"a:1_0", b"http://a:1", b"a:1/x", b"a:1:1"),
    *ending([b"-t"], b"::1:1", b"[::1]", b"[1.2.3.4]:1", b"[::1%]:1", b"[::g]:1", b"[::ffff:1.2.3.4%lo]:1", b"[[::1]]:1"),
    *ending([b"-t"], b"1.2.3:1", b"127.1:1", b"1:1", b"0x7f.1:1", b"a..b:1", b"-a:1", b"a b:1", b"b\xc3\xbc:1", b"\xff:1"),
    *ending([T, b"--allow="], b"", b"any", b"10/8", b"10.0.0.1/8", b"10.0.0.0/33", b"::/129", b"10.0.0.0/255.0.0.0", b"\xff"),
    *ending([T, b"--bind="], b"", b"localhost", b"127.1", b"01.2.3.4", b"fe80::1%lo", b"::1/128", b"[[::1]]", b"*"),
    *ending([T, b"--timestamps="], b"", b"STRIP", b"strip ", b"spoof", b"strip,preserve", b"\xe2\x80\xae"),
    *ending([T, b"--cpus="], b"", b",", b"9999", b"0,0", b"0-", b"-1", b"all"),
    *ending([T, b"--idle-timeout="], b"", b".5", b"1.", b"1h30m", b"721h", b"5 s", b"inf", b"nan"),
    *ending([T, b"--"], b"buffer-size=1g", b"static-timestamp=1", b"source=::1", b"user=a/b", b"log-level=warn"),
    *ending([T, b"--spoof-timestamps", b"--timestamps="], b"strip", b"preserve"),
    *ending([T, b"-p1", b""], b"-p1", b"--port=1", b"--port"),
    *ending([b""], b"bundle", b"bundel", b"check", b"generate", b"demo=", b"relay", b"OUT", b"help", b"--bundle", b"\n"),
    *ending([b"bundle", b""], b"/nowhere/\xff/out", b"", b".", b"/dev/null", b"--", b"-p1"),
    *ending([b"bundle", b"--", b""], b"-out", b"--", b""),
    *ending([b"demo", b""], b"-p1", b"demo", b"", b"--json"),
    *ending([b"check", T, b""], b"check", b"x", b"--jso", b""),
    *ending([b"generate", T, b""], b"\xff\n", b"", b"--json", b"check"),
    *ending([b"generate", b"netns", T, b"-"], b"-json", b"p0", b"-timestamps=preserve"),
]


# Runs the script as often as there are lines, each in a process of its own that has the imports done already.
AGAIN_AND_AGAIN = """
import ast, os, runpy, sys
script, place = sys.argv[1:]
sys.path.insert(0, os.path.join(os.path.dirname(script), "lib"))
import docopt, _tsproxy.tools.main, _tsproxy.cli.config
for number, words in enumerate(ast.literal_eval(sys.stdin.read())):
    if os.fork() == 0:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{place}/{number}.{name}", os.O_WRONLY | os.O_CREAT), fd)
        sys.argv = [script, *map(os.fsdecode, words)]
        runpy.run_path(script, run_name="__main__")
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)  # or the next child has it in its buffer, too
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> List[Tuple[int, bytes, bytes]]:
    """How tsproxy.py itself ends each of the hundred: (exit code, standard output, standard error)."""
    place = tmp_path_factory.mktemp("answers")
    command = [sys.executable, "-c", AGAIN_AND_AGAIN, str(ROOT / "tsproxy.py"), str(place)]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, input=repr(HUNDRED), stdout=subprocess.PIPE, text=True, timeout=100, check=True, env=env)
    codes = map(int, done.stdout.split())
    return [(code, *((place / f"{at}.{name}").read_bytes() for name in ("out", "err"))) for at, code in enumerate(codes)]


@pytest.mark.parametrize("number", range(len(HUNDRED)), ids=lambda number: ascii(b" ".join(HUNDRED[number]))[2:-1][:50])
def test_each_of_a_hundred_bad_lines_ends_with_2_and_one_line(answers: List[Tuple[int, bytes, bytes]], number: int) -> None:
    code, out, err = answers[number]
    assert (code, out) == (2, b"")
    line = err.decode()
    assert re.match(r"tsproxy(\.py)?: ", line)
    assert line.endswith("\n")
    assert line[:-1].isprintable()


def test_without_its_manual_it_says_why_it_cannot_read_options() -> None:
    for words in ([], ["-t", "a:1"], ["check"]):
        command = [sys.executable, "-OO", "-B", str(ROOT / "tsproxy.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "-OO" in line
