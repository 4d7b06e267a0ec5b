"""Log shippers as the tests run them: real ones, in a directory of their own, with exactly the generated configuration."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from harness import CHECKOUT, PATIENCE, ROOT, Line, leave_out, wait_until

UNPACKED = ROOT / ".shippers"  # where .ci/run unpacks Debian's packages: rsyslog and syslog-ng exclude one another
_LIBRARIES = [UNPACKED / "usr/lib/x86_64-linux-gnu", UNPACKED / "lib/x86_64-linux-gnu", UNPACKED / "usr/lib/syslog-ng"]


def find(tool: str, required: bool = True) -> str:
    """Its path; else skip, loudly. In CI that is a failure where the tool is one that .ci/run brings."""
    unpacked = [str(UNPACKED / place) for place in ("usr/bin", "usr/sbin", "lib/systemd")]
    places = [*unpacked, os.environ.get("PATH", ""), "/usr/sbin", "/lib/systemd"]
    found = shutil.which(tool, path=os.pathsep.join(places))
    if found:
        return found
    message = f"no {tool}: what is generated for it is NOT run here"
    if required:
        leave_out(message)
    pytest.skip(f"LOUD: {message}")


def environment() -> Dict[str, str]:
    """For programs unpacked and not installed."""
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, _LIBRARIES))}


def generated(kind: str, directory: Optional[Path] = None) -> str:
    """What `generate KIND` prints, with its one directory replaced."""
    done = subprocess.run([*CHECKOUT, "generate", kind], capture_output=True, text=True, check=True)
    return done.stdout.replace("/var/log/tsproxy", str(directory)) if directory else done.stdout


def as_routes(lines: List[Line]) -> List[Line]:
    """Real lines as those of two routes of a file, with about half of what was counted, and of a process that sums it up."""
    (start,) = [line for line in lines if line["event"] == "start"]
    ended = [line for line in lines if line["event"] == "connection"]
    (last,) = [line for line in lines if line["event"] == "metrics"][-1:]
    last = {**last, "internal_errors_total": 3, "downstream_cx_lost_with_worker_total": 2}
    of_route = {name: value for name, value in last.items() if not name.startswith(("loop_lag", "log_lines", "worker_re"))}
    counts = [name for name, value in of_route.items() if isinstance(value, int) and name != "pid"]
    lesser = {**of_route, **{name: of_route[name] // 2 for name in counts}, "route": "oe-primary"}
    greater = {**of_route, **{name: of_route[name] - lesser[name] for name in counts}, "route": "md.a"}
    head = {"timestamp": last["timestamp"], "level": "info", "event": "route", "pid": last["pid"]}
    served = {name: start[name] for name in ("listen_address", "listen_port", "targets", "timestamps", "witness", "limits")}
    return [
        {**start, "routes": 2, "listen_address": None, "listen_port": None},
        *({**head, "route": name, **served} for name in ("oe-primary", "md.a")),
        *({**line, "route": name} for line, name in zip(ended, ["oe-primary", "md.a"] * 2)),
        {**head, "event": "reload", "added": 0, "removed": 0, "changed": 1, "unchanged": 1, "message": "read again"},
        {**head, "event": "reload", "level": "error", "message": 'routes.ini:7: [x]: port: given "y"'},
        lesser,
        {**last, "route": None},
        greater,
    ]


def rsyslogd() -> List[str]:
    """The program, told where its modules are if it is not installed."""
    modules = UNPACKED / "usr/lib/x86_64-linux-gnu/rsyslog"
    return [find("rsyslogd"), *(["-M", str(modules)] if modules.is_dir() else [])]


def syslog_ng() -> List[str]:
    """The same."""
    unpacked = sorted((UNPACKED / "usr/lib/syslog-ng").glob("[0-9]*"))
    return [find("syslog-ng"), *(["--module-path", str(unpacked[0])] if unpacked else [])]


class Shipper:
    """A running rsyslog or syslog-ng: as its package sets it up, but for the places, with our file beside."""

    kind = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines_file, self.socket = directory / "tsproxy.json", directory / "log"
        self._out, self._main = directory / "ecs.json", directory / "main.conf"
        (directory / "tsproxy.conf").write_text(generated(self.kind, directory))
        self._main.write_text(self._host_conf())
        self._process: Optional[subprocess.Popen[bytes]] = None
        self.start()

    def _host_conf(self) -> str:
        raise NotImplementedError

    def _command(self) -> List[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Start, or start again, and wait until it listens."""
        self.socket.unlink(missing_ok=True)
        with (self.directory / "said").open("ab") as said:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        wait_until(self.socket.exists, f"{self.kind} listens")

    def signal(self, number: int) -> None:
        assert self._process
        assert self._process.poll() is None, (self.directory / "said").read_text()
        self._process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._process.wait(PATIENCE)

    def records(self) -> List[Line]:
        """What has come out, whole lines only."""
        whole = self._out.read_bytes().split(b"\n")[:-1] if self._out.exists() else []
        return [json.loads(line) for line in whole]

    def wait_for(self, count: int) -> List[Line]:
        """That many records, or more."""
        wait_until(lambda: self._count() >= count, f"{count} records", 3 * PATIENCE)
        return self.records()

    def _count(self) -> int:
        return self._out.read_bytes().count(b"\n") if self._out.exists() else 0

    def close(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()


class Rsyslog(Shipper):
    kind = "rsyslog"

    def _host_conf(self) -> str:
        return f"""
            global(workDirectory="{self.directory}")
            module(load="imuxsock" SysSock.Use="off")
            input(type="imuxsock" Socket="{self.socket}")
            include(file="{self.directory}/tsproxy.conf")
            *.* /dev/null
        """

    def _command(self) -> List[str]:
        return [*rsyslogd(), "-n", "-f", str(self._main), "-i", str(self.directory / "pid")]


class SyslogNg(Shipper):
    kind = "syslog-ng"

    def _host_conf(self) -> str:
        included = self.directory / "tsproxy.conf"
        return f'@version: 4.0\nsource s_src {{ unix-dgram("{self.socket}"); }};\n@include "{included}"\n'

    def _command(self) -> List[str]:
        own = {"-R": "persist", "-p": "pid", "-c": "control"}
        places = [word for flag, name in own.items() for word in (flag, str(self.directory / name))]
        return [*syslog_ng(), "-F", "-f", str(self._main), "--no-caps", *places]


SHIPPERS: Dict[str, Any] = {"rsyslog": Rsyslog, "syslog-ng": SyslogNg}
