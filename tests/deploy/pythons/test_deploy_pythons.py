"""The newest Pythons, from a Debian that is not released: the bundle relays with each runtime, and the fast tests pass."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator, List

import pytest
import roots
from harness import Exchange, Proxy, echo, receive_exactly
from namespaces import Namespace
from progress import Progress

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]
PYTHONS = ("python3.14", "python3.15")
FAST = """unit/cli unit/config unit/encoder unit/histogram unit/inbox unit/posted_events process/printable unit/records
    process/relay process/runtime unit/syn process/fork_server""".split()
# In a mount namespace of its own, where nothing that is written stays.
ENTER = """
mount --make-rprivate /
mount -t overlay -o lowerdir="$1",upperdir="$2/upper",workdir="$2/work" overlay "$2/merged"
mount --bind "$2/payload" "$2/merged/mnt"
for each in /proc /sys /dev; do mount --rbind $each "$2/merged$each"; done
mount -t tmpfs none "$2/merged/tmp"
cd /
root=$2/merged
shift 2
exec chroot "$root" "$@"
"""


class Newest:
    """A root with these Pythons, and in /mnt the checkout, what it imports, and the bundle."""

    def __init__(self, tell: Progress, bundle: Path) -> None:
        self._root, self._place = roots.made(roots.NEWEST, tell), roots.scratch("pythons")
        for each in ("upper", "work", "merged", "payload"):
            (self._place / each).mkdir()
        roots.copy_checkout(self._place / "payload")
        shutil.copy(bundle, self._place / "payload/tsproxy")

    @property
    def enter(self) -> List[str]:
        """The words to put before a command to run it in there."""
        return [
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            "--mount",
            "sh",
            "-euc",
            ENTER,
            "sh",
            str(self._root),
            str(self._place),
        ]

    def close(self) -> None:
        roots.remove(self._place)


@pytest.fixture(scope="module")
def newest(bundle: Path, tell: Progress) -> Iterator[Newest]:
    roots.require("setpriv", "unshare", "ip")
    with contextlib.closing(Newest(tell, bundle)) as one:
        yield one


@pytest.fixture
def clean() -> Iterator[Namespace]:
    """A network namespace that sends no timestamps."""
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        yield namespace


@pytest.mark.parametrize("runtime", ["threads", "processes", "interpreters"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_bundle_relays_without_timestamps(
    newest: Newest, clean: Namespace, tell: Progress, python: str, runtime: str
) -> None:
    with clean:
        far = Exchange(echo)
    words = [*clean.enter, *newest.enter, python, "-I", "-S", "/mnt/tsproxy"]
    proxy = Proxy(words, "-t", far.target, "-p0", f"--runtime={runtime}", "--workers=2")
    try:
        start = proxy.line("start")
        assert (start["runtime"], start["witness"]) == (runtime, "sysctl")
        assert start["python"].startswith(python[len("python") :])
        for _ in range(4):
            with clean, proxy.connect() as client:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
        assert proxy.stop() == 0
        assert [line["upstream_timestamps"] for line in proxy.lines if line["event"] == "connection"] == [False] * 4
        tell(f"Python {start['python']}, {runtime}: relayed")
    finally:
        proxy.close()
        far.close()


@pytest.mark.parametrize("python", PYTHONS)
def test_the_tests_that_take_little_time_pass(newest: Newest, clean: Namespace, tell: Progress, python: str) -> None:
    modules = " ".join("tests/{}/test_{}.py".format(*name.split("/")) for name in FAST)
    script = (
        f"cd /mnt/checkout && PYTHONPATH=/mnt/libraries exec {python} -m pytest -q --durations=10 -p no:cacheprovider {modules}"
    )
    done = subprocess.run([*clean.enter, *newest.enter, "sh", "-c", script], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    tell(f"{python}: {re.sub('=+', '', done.stdout.strip().splitlines()[-1]).strip()}")
    assert done.returncode == 0
