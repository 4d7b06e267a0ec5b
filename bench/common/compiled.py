"""The load generator, far end and naked relay in C (bench/c/): they cost less than Python ones, so the relay shows more.

Knows a compiler and how to run what it makes. Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import Dict, FrozenSet, Iterator, List, NamedTuple

from common.processes import program
from common.trouble import Failed, Refusal

SOURCES = Path(__file__).resolve().parent.parent / "c"
_TIMEOUT_S = 120.0
_LOOK_S = 0.005


class Compiled(NamedTuple):
    """The two programs, in a directory that goes when the benchmark ends, and the CPUs of load and far end."""

    directory: Path
    cpus: FrozenSet[int]

    @classmethod
    def build(cls, directory: Path, cpus: FrozenSet[int]) -> Compiled:
        """Compile both. Refusal where there is no compiler, or with the first line that it says."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not compiler:
            raise Refusal("needs a C compiler, cc, gcc or clang; the other benchmarks do without")
        for source in sorted(SOURCES.glob("*.c")):
            command = [compiler, "-O2", "-o", str(directory / source.stem), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Refusal(f"{compiler} can't compile {source.name}: {(done.stderr.splitlines() or ['no word why'])[0]}")
        return cls(directory, cpus)

    def load(self, *words: object) -> Dict[str, float]:
        """Run the load generator to its end; what it has measured. Failed with what it says if it does not end well."""
        output = self.directory / "load.out"
        with program([str(self.directory / "loadgen"), *map(str, words)], self.cpus, output) as child:
            try:
                code = child.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"the load did not end within {_TIMEOUT_S:g} s") from None
        if code:
            raise Failed(output.with_suffix(".err").read_text().strip() or f"the load ended with {code}")
        return _pairs(output.read_text())

    @contextlib.contextmanager
    def far_end(self, kind: str, cpus: FrozenSet[int]) -> Iterator[int]:
        """An `echo` or a `sink`; its port."""
        output = self.directory / "far-end.out"
        with program([str(self.directory / "loadgen"), kind], cpus, output):
            deadline = time.monotonic() + _TIMEOUT_S
            while not output.read_text().endswith("\n"):
                if time.monotonic() > deadline:
                    raise Failed("the far end did not begin")
                time.sleep(_LOOK_S)
            yield int(_pairs(output.read_text())["port"])

    def naked(self, *words: str) -> List[str]:
        """The command of the naked relay."""
        return [str(self.directory / "naked_relay"), *words]


def _pairs(text: str) -> Dict[str, float]:
    return {key: float(value) for key, value in (pair.split("=") for pair in text.split())}
