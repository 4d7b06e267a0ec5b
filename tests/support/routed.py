"""A tsproxy that serves a file of routes: the file is the test's to write, and each reload's outcome is waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Union

from harness import PATIENCE, Line, Proxy, receive_exactly, target, wait_until

Section = Mapping[str, Union[str, float, Sequence[str]]]
Sections = Mapping[str, Section]


def text_of(sections: Sections) -> str:
    """The file, each of several values in a line of its own."""
    return "".join(f"[{name}]\n{''.join(map(_key, section, section.values()))}\n" for name, section in sections.items())


def _key(name: str, value: Any) -> str:
    values = [value] if isinstance(value, (str, int, float)) else value
    return f"{name} = {chr(10).join(f'  {one}' for one in values).strip()}\n"


class Held(NamedTuple):
    """What a process holds. Of its memory maps those of memfds: how many arenas there are is the allocator's affair."""

    sockets: int
    other_fds: int
    memory_maps: int
    threads: int


def held_by(pid: int) -> Held:
    kinds = [target(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = sum(kind.startswith("socket:") for kind in kinds)
    maps = Path(f"/proc/{pid}/maps").read_text().count("/memfd:")
    return Held(sockets, sum(map(bool, kinds)) - sockets, maps, len(os.listdir(f"/proc/{pid}/task")))


class RoutedProxy(Proxy):
    """See the module. Routes relay with `timestamps = preserve` if their section does not say otherwise."""

    def __init__(self, command: Sequence[str], file: Path, sections: Sections, *options: str, **popen: Any) -> None:
        self.file = file
        self.write(sections)
        super().__init__(command, f"--routes={file}", "--metrics-interval=0", "--timestamps=preserve", *options, **popen)

    def write(self, sections: Union[Sections, str]) -> None:
        """Replace the file as an editor does: it is never half there."""
        new = self.file.with_suffix(".new")
        new.write_text(sections if isinstance(sections, str) else text_of(sections))
        new.replace(self.file)

    # Reload

    def reload(self, sections: Union[Sections, str]) -> Line:
        """Have it read this file; the `reload` line, once what it says is in effect and told."""
        self.line("start")  # before it the file may not have been read
        self.write(sections)
        return self.hang_up()

    def hang_up(self) -> Line:
        """SIGHUP, and the `reload` line that follows."""
        self.line("start")
        seen = len(self.lines)
        self.process.send_signal(signal.SIGHUP)
        return self.reloaded(seen)

    def reloaded(self, seen: int) -> Line:
        """The first `reload` line from line `seen` on, with the `route` lines that belong to it."""
        line = self.line("reload", after=seen)
        at = self.lines.index(line, seen)
        for _ in range(line.get("added", 0) + line.get("changed", 0)):
            at = self.lines.index(self.line("route", after=at + 1), at + 1)
        return line

    def good(self, sections: Sections) -> List[int]:
        """Reload; how many routes were added, removed, changed and left alone."""
        line = self.reload(sections)
        assert line["level"] == "info", line
        return [line[count] for count in ("added", "removed", "changed", "unchanged")]

    def bad(self, sections: Union[Sections, str]) -> str:
        """Reload a file that can't be taken; what the line says."""
        line = self.reload(sections)
        assert line["level"] == "error", line
        assert line["message"].endswith("; everything goes on as it was"), line
        return str(line["message"])

    # Routes

    def route(self, name: str) -> Line:
        """Its last `route` line."""
        started = self.lines.index(self.line("start"))
        self.line("route", lambda line: line["route"] == name, after=started)
        return [line for line in self.lines if line["event"] == "route" and line["route"] == name][-1]

    def port(self, name: str) -> int:
        return int(self.route(name)["listen_port"])

    def connect_to(self, name: str, timeout: float = PATIENCE) -> socket.socket:
        route = self.route(name)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(route["listen_address"], route["listen_address"])
        return socket.create_connection((host, route["listen_port"]), timeout)

    def ask(self, name: str, what: bytes = b"order") -> None:
        """A new client of the route has its bytes echoed."""
        with self.connect_to(name) as client:
            answers(client, what)

    def refuses(self, port: int) -> bool:
        """Whether nothing listens on the port."""
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), PATIENCE):
            return False
        return True

    # Lines

    def metrics(self) -> Line:
        """The process's `metrics` line made now; those of the routes are before it in `lines`."""
        return self.metrics_by_route()[None]

    def metrics_by_route(self) -> Dict[Optional[str], Line]:
        """All made now, by route; None is the process's."""
        self.line("start")
        while not self._came.empty() and self._take(1):
            pass
        before = len(self.lines)
        self.process.send_signal(signal.SIGUSR1)
        end = self.lines.index(self.line("metrics", lambda line: line["route"] is None, after=before), before)
        lines = [line for line in self.lines[before : end + 1] if line["event"] == "metrics"]
        assert len({line["route"] for line in lines}) == len(lines), [line["route"] for line in lines]
        return {line["route"]: line for line in lines}

    def wait_by_route(self, fits: Callable[[Dict[Optional[str], Line]], bool]) -> Dict[Optional[str], Line]:
        """The first that fit."""

        def fitting() -> Optional[Dict[Optional[str], Line]]:
            found = self.metrics_by_route()
            return found if fits(found) else None

        found: Dict[Optional[str], Line] = wait_until(fitting, "metrics that fit")
        return found

    # What it holds

    def held(self) -> List[Held]:
        """By each of its processes: the main process, the fork server, the workers."""
        return [held_by(pid) for pid in self.family()]

    def settled(self, routes: int) -> List[Held]:
        """The same once no line is left but those of so many routes, nobody is connected, and nothing changes any more."""
        found: List[List[Held]] = []

        def is_steady() -> bool:
            found.append(self.held())
            return len(found) > 1 and found[-1] == found[-2]

        self._has_only(routes)
        wait_until(is_steady, "nothing changes any more", pace=0.1)
        return found[-1]

    def holds_no_more_than(self, before: List[Held], routes: int) -> None:
        """Wait for that, with so many routes and nobody connected: a busy worker lets go of a removed route when it can."""
        self._has_only(routes)

        def is_down() -> bool:
            return all(now <= was for of_now, of_before in zip(self.held(), before) for now, was in zip(of_now, of_before))

        wait_until(is_down, f"what it holds is what it held before: {before}")
        assert len(self.family()) == len(before)

    def _has_only(self, routes: int) -> None:
        self.wait_by_route(lambda by_route: len(by_route) == routes + 1 and not by_route[None]["downstream_cx_active"])


StartRouted = Callable[..., RoutedProxy]


def routed_starter(command: Sequence[str], directory: Path, *always: str) -> Iterator[StartRouted]:
    """Start the program with a file of routes: start(sections, options...) -> RoutedProxy."""
    running: List[RoutedProxy] = []

    def begin(sections: Sections, *options: str, **popen: Any) -> RoutedProxy:
        running.append(RoutedProxy(command, directory / "routes.ini", sections, *always, *options, **popen))
        return running[-1]

    yield begin
    for proxy in running:
        proxy.close()


class Talkers:
    """Sessions that never rest: each sends a message of random bytes, verifies its echo, and sends the next."""

    def __init__(self, clients: Sequence[socket.socket]) -> None:
        self._clients = clients
        self.messages = 0
        self.failures: List[str] = []
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="talkers")

    def __enter__(self) -> Talkers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends = True
        self._thread.join()
        for client in self._clients:
            client.close()

    def _run(self) -> None:
        while not (self._ends or self.failures):
            for client in self._clients:
                try:
                    answers(client, os.urandom(4096))
                except (OSError, AssertionError) as problem:
                    self.failures.append(repr(problem))
                else:
                    self.messages += 1


def answers(client: socket.socket, what: bytes = b"order") -> None:
    client.sendall(what)
    assert receive_exactly(client, len(what)) == what
