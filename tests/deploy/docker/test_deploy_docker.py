"""What `generate docker` prints, under a real Docker, and the pod as a kubelet would start it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import roots
import yaml
from harness import Line, receive_exactly, wait_until
from machine import EXCHANGE, Machine
from progress import Progress
from storms import far_end
from wire import UPSTREAM, Sniffer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]
LISTENER = ("127.0.0.1", 8080)
PLACE = "/root/image"
BASE = "python:3.13-slim"
PROGRAM = "/usr/local/bin/python3 -I -S /usr/local/bin/tsproxy"
HEALED_S = 120
# No registry is asked: Debian's own Python under the base image's name, and none of what a container has no use for.
IMPORT = f"""
mkdir -p {PLACE}
ln -sf ../../bin/python3 /usr/local/bin/python3
tar -C / -c --one-file-system --exclude=./var --exclude=./usr/share/doc \\
    --exclude=./usr/share/locale --exclude=./usr/share/man \\
    --exclude=./usr/bin/docker* --exclude=./usr/sbin/docker* --exclude=./usr/bin/containerd* --exclude=./usr/sbin/runc \\
    --exclude=./usr/lib/modules --exclude=./root --exclude=./etc/resolv.conf --exclude=./etc/hosts . | docker import - {BASE}
"""


class Docker:
    """A machine on which it runs, with the script as printed and the bundle beside it."""

    def __init__(self, machine: Machine, program: Path) -> None:
        self.machine = machine
        self._stack = contextlib.ExitStack()
        self._require()
        machine.write(f"{PLACE}/tsproxy", program.read_text(), "755")
        self.port = int(self._stack.enter_context(far_end(EXCHANGE, machine.exchange.enter)).split(":")[1])
        self.target = f"{EXCHANGE}:{self.port}"
        machine.write(f"{PLACE}/tsproxy-docker.sh", self.generated("docker"))
        self.before = self.has()

    def _require(self) -> None:
        """That dockerd runs here, and has the base image, is not what is tested."""
        try:
            wait_until(lambda: self.machine.try_run("docker", "info").returncode == 0, "dockerd answers", HEALED_S, 0.2)
            self.machine.sh(IMPORT)
        except AssertionError as problem:
            said = self.machine.try_run("journalctl", "-q", "-u", "docker", "-o", "cat", "-n", "3").stdout
            roots.machine_refuses(f"Docker does not run here: {problem}; {said}")

    def generated(self, kind: str) -> str:
        return self.machine.run("python3", f"{PLACE}/tsproxy", "generate", kind, f"--target={self.target}")

    def script(self, *words: str) -> str:
        return self.machine.sh(f"cd {PLACE} && sh tsproxy-docker.sh {' '.join(words)}")

    def refused(self, setting: str) -> str:
        """What it says under that setting, where it does not run."""
        done = self.machine.try_run("sh", "-c", f"cd {PLACE} && {setting} sh tsproxy-docker.sh")
        assert done.returncode == 1, done
        return done.stderr.strip().splitlines()[-1]

    def has(self) -> Dict[str, str]:
        """What a run could leave."""
        kinds = {"containers": "ps -a", "images": "images -a", "volumes": "volume ls", "networks": "network ls"}
        return {kind: self.machine.run("docker", *words.split(), "-q") for kind, words in kinds.items()}

    def run(self, *words: str) -> str:
        return self.machine.run("docker", *words)

    def inspect(self, what: str, name: str = "tsproxy") -> str:
        return self.run("inspect", "--format", what, name).strip()

    def lines(self, event: str, name: str = "tsproxy") -> List[Line]:
        found = [json.loads(line) for line in self.run("logs", name).splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def status(self, pid: str) -> Dict[str, str]:
        """/proc/PID/status of a process, by the number that Docker has for it."""
        text = self.machine.run("cat", f"/proc/{pid}/status")
        return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}

    # What a client sees

    @contextlib.contextmanager
    def connected(self, address: Any = LISTENER) -> Iterator[socket.socket]:
        """A client that has been answered."""
        with self.machine.host:
            client = socket.create_connection(address, 30)
        with client:
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"
            yield client

    def trade(self, address: Any = LISTENER) -> None:
        with self.connected(address):
            pass

    def seconds_until_served(self, address: Any = LISTENER) -> float:
        """Docker's own proxy takes a client before the container is there, and lets it go again."""
        began = time.monotonic()

        def is_served() -> bool:
            with contextlib.suppress(OSError, AssertionError):
                self.trade(address)
                return True
            return False

        wait_until(is_served, "a client is served", HEALED_S, 0.05)
        return time.monotonic() - began

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def docker(bundle: Path, tell: Progress) -> Iterator[Docker]:
    """Running as printed."""
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(contextlib.closing(Machine(roots.made(roots.DEBIAN, tell), containers=True)))
        one = stack.enter_context(contextlib.closing(Docker(machine, bundle)))
        tell(one.run("info", "--format", "Docker {{.ServerVersion}}, {{.Driver}}, cgroup {{.CgroupVersion}}").strip())
        one.script()
        one.seconds_until_served()
        yield one


@pytest.fixture(autouse=True)
def lines_of_a_failure(request: pytest.FixtureRequest, docker: Docker) -> Iterator[None]:
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        print(docker.machine.try_run("docker", "ps", "-a").stdout, docker.machine.try_run("docker", "logs", "tsproxy"))


def test_the_container_as_printed_relays_and_no_timestamp_is_on_the_bridge_or_behind_it(docker: Docker) -> None:
    with contextlib.ExitStack() as stack:
        places = [(docker.machine.host, "docker0"), (docker.machine.exchange, UPSTREAM)]
        sniffers = [stack.enter_context(contextlib.closing(Sniffer(*place))) for place in places]
        docker.trade()
        bridge, behind = (sniffer.stop() for sniffer in sniffers)
    for packets in (bridge, behind):
        to_the_exchange = [packet for packet in packets if packet.target == (EXCHANGE, docker.port)]
        assert len(to_the_exchange) >= 4
        assert [
            packet for packet in packets if packet.tsval is not None and EXCHANGE in (packet.source[0], packet.target[0])
        ] == []


def test_the_container_can_write_nothing_and_has_no_capability(docker: Docker) -> None:
    status = docker.status(docker.inspect("{{.State.Pid}}"))
    assert {status[each] for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Uid"].split()[0]) == ("1", "65534")
    done = docker.machine.try_run("docker", "exec", "tsproxy", "touch", "/usr/local/bin/x")
    assert "Read-only file system" in done.stderr


def test_check_in_the_container_says_yes(docker: Docker) -> None:
    said = docker.run("exec", "tsproxy", *PROGRAM.split(), "check", f"--target={docker.target}")
    assert "\nYES: " in said


def test_orphans_in_the_container_are_reaped_by_tsproxy(docker: Docker) -> None:
    docker.run("exec", "tsproxy", "sh", "-c", "sleep 0.1 & sleep 0.2 & exit")

    def orphans() -> List[str]:
        """docker top shows no zombies; ps does, and nothing else in there sleeps."""
        return [line for line in docker.machine.run("ps", "-eo", "pid,ppid,stat,comm").splitlines() if "sleep" in line]

    wait_until(lambda: orphans() == [], "both have ended and been reaped", HEALED_S, 0.1)


def test_a_restart_and_a_killed_main_process_are_followed_by_service(docker: Docker, tell: Progress) -> None:
    docker.run("restart", "tsproxy")
    tell(f"docker restart: served after {docker.seconds_until_served():.1f} s more")
    began = time.monotonic()
    docker.machine.run("kill", "-KILL", docker.inspect("{{.State.Pid}}"))
    wait_until(lambda: docker.inspect("{{.RestartCount}}") == "1", "Docker starts it again", HEALED_S, 0.1)
    docker.seconds_until_served()
    tell(f"main process killed: served after {time.monotonic() - began:.1f} s")


def test_run_again_replaces_the_container(docker: Docker) -> None:
    old = docker.inspect("{{.Id}}")
    docker.script()
    docker.seconds_until_served()
    assert docker.inspect("{{.Id}}") != old
    assert len(docker.run("ps", "-aq").split()) == 1


def test_a_stop_lets_a_connection_that_stays_go_on_for_the_whole_drain(docker: Docker, tell: Progress) -> None:
    stopping = [*docker.machine.enter, "docker", "stop", "tsproxy"]
    with docker.connected() as client, subprocess.Popen(stopping, stdout=subprocess.DEVNULL) as stop:
        began = time.monotonic()
        wait_until(lambda: docker.lines("drain"), "it drains", HEALED_S, 0.1)
        client.sendall(b"still")
        assert receive_exactly(client, 5) == b"still"
        assert stop.wait(HEALED_S) == 0
        tell(f"docker stop with a connection that stays: {time.monotonic() - began:.1f} s")
    assert docker.inspect("{{.State.ExitCode}}") == "0"  # not 137: nobody had to kill it
    line = docker.lines("stop")[-1]
    assert (line["drained"], line["killed_connections"]) == (False, 1)
    docker.run("start", "tsproxy")
    docker.seconds_until_served()


def test_what_would_leak_or_is_no_docker_is_refused(docker: Docker) -> None:
    assert "NETWORK" in docker.refused("NETWORK=host")
    assert "docker info can't say" in docker.refused("DOCKER_HOST=unix:///run/nowhere.sock")
    # Podman has no such field, and says so; its name for it is what podman-docker installs.
    docker.machine.write("/opt/docker", '#!/bin/sh\necho "Error: can\'t evaluate field OperatingSystem" >&2\nexit 125\n', "755")
    assert "docker info can't say" in docker.refused("PATH=/opt:$PATH")
    assert docker.inspect("{{.State.Running}}") == "true"  # what ran before goes on


class Pod:
    """The pod's one container as a kubelet would start it: everything that a container runtime is told, and no cluster."""

    def __init__(self, docker: Docker) -> None:
        self._docker = docker
        parts = {part["kind"]: part for part in yaml.safe_load_all(docker.generated("kubernetes"))}
        self.spec = parts["Deployment"]["spec"]["template"]["spec"]
        (self.container,) = self.spec["containers"]

    def words(self) -> List[str]:
        context, own = self.spec["securityContext"], self.container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert own["allowPrivilegeEscalation"] is False
        (mount,) = self.container["volumeMounts"]
        return [
            *(f"--sysctl={each['name']}={each['value']}" for each in context["sysctls"]),
            f"--user={context['runAsUser']}:{context['runAsGroup']}",
            "--read-only",
            "--security-opt=no-new-privileges",
            *(f"--cap-drop={each}" for each in own["capabilities"]["drop"]),
            f"--volume={PLACE}:{mount['mountPath']}:ro",
            f"--entrypoint={self.container['command'][0]}",
            self.container["image"],
            *self.container["command"][1:],
            *self.container["args"],
        ]

    def probe(self, name: str) -> bool:
        """By exec, as the kubelet does."""
        done = self._docker.machine.try_run("docker", "exec", "pod", *self.container[name]["exec"]["command"])
        return done.returncode == 0


def test_the_pod_as_a_kubelet_would_start_it_is_probed_and_drains_within_its_grace(docker: Docker, tell: Progress) -> None:
    pod = Pod(docker)
    docker.run("run", "--detach", "--name=pod", *pod.words())
    address = (docker.inspect("{{.NetworkSettings.IPAddress}}", "pod"), pod.container["ports"][0]["containerPort"])
    wait_until(lambda: pod.probe("startupProbe"), "the start-up probe", HEALED_S, 0.5)
    assert pod.probe("livenessProbe")
    assert pod.probe("readinessProbe")
    docker.trade(address)
    pause = pod.container["lifecycle"]["preStop"]["exec"]["command"]
    with (
        docker.connected(address) as client,
        subprocess.Popen([*docker.machine.enter, "docker", "exec", "pod", *pause]) as stopping,
    ):
        docker.trade(address)  # the endpoint goes only now, so some still come
        assert stopping.wait(HEALED_S) == 0
        left = pod.spec["terminationGracePeriodSeconds"] - int(pause[-1])
        with subprocess.Popen(
            [*docker.machine.enter, "docker", "stop", f"--time={left}", "pod"], stdout=subprocess.DEVNULL
        ) as stop:
            wait_until(lambda: docker.lines("drain", "pod"), "it drains", HEALED_S, 0.1)
            assert not pod.probe("readinessProbe")
            client.sendall(b"still")
            assert receive_exactly(client, 5) == b"still"
            client.close()
            assert stop.wait(HEALED_S) == 0
    assert docker.inspect("{{.State.ExitCode}}", "pod") == "0"
    assert docker.lines("stop", "pod")[-1]["drained"]
    docker.run("rm", "pod")


def test_routes_are_published_and_a_file_that_an_editor_replaced_is_read_again(docker: Docker) -> None:
    """In the container both listen on all addresses; outside they differ in theirs alone."""
    first, second, place = ("127.0.0.1", 9001), ("127.0.0.2", 9001), f"{PLACE}/many"
    sections = "".join(
        f"[{name}]\nbind = {bind}\nport = {port}\n" for name, (bind, port) in (("oe.a", first), ("oe-b", second))
    )
    docker.machine.sh(f"mkdir -p {place}; cp {PLACE}/tsproxy {place}")
    docker.machine.write(f"{place}/venue.ini", f"[DEFAULT]\ntarget = {docker.target}\n{sections}")
    generate = f"cd {place}; python3 tsproxy generate docker --routes=venue.ini >tsproxy-docker.sh"
    printed = "mkdir -p tsproxy-routes && sh tsproxy-docker.sh routes > tsproxy-routes/routes.ini"
    docker.machine.sh(f"{generate}; {printed}; sh tsproxy-docker.sh")
    for address in (first, second):
        docker.seconds_until_served(address)
    with docker.connected(first) as client:
        docker.machine.sh(f"sed -i '$a max-connections = 7' {place}/tsproxy-routes/routes.ini")  # sed replaces the file
        docker.run("kill", "--signal=HUP", "tsproxy")
        wait_until(lambda: docker.lines("reload"), "the routes are read again", HEALED_S, 0.1)
        assert (docker.lines("reload")[0]["changed"], docker.lines("reload")[0]["unchanged"]) == (1, 1)
        client.sendall(b"still")
        assert receive_exactly(client, 5) == b"still"
    docker.trade(second)
    assert {line["witness"] for line in docker.lines("route")} == {"sysctl"}


def test_down_leaves_nothing(docker: Docker) -> None:
    docker.script("down")
    assert docker.has() == docker.before
