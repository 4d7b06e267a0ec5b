"""Set-ups are read by their own linters: each template as it stands, as far as it is sound before it is filled in, and each
output of `generate`. What needs more than reading (nft in a namespace, systemd-analyze, Kubernetes' schema, Vector's compiler,
rsyslog and syslog-ng at work) is in test_generate.py and test_shippers.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
import shippers
from _tsproxy.tools.generate import templates
from harness import CHECKOUT
from shippers import environment, find

FILES = {path.name: path for path in sorted(Path(next(iter(templates.__path__))).glob("*.*")) if path.suffix != ".py"}
YAML = """{extends: default, rules: {
    document-start: disable,  # of one document
    line-length: {max: %s},
    commas: {max-spaces-before: 1}, braces: {max-spaces-inside: 1},  # {level: , event: }
    comments-indentation: disable,  # a placeholder for lines is one
}}"""
OPTIONS = ("--target=[fe80::1%eth0]:9", "--user=nobody", "--reuse-port", "--keepalive=7")


ROUTES = """\
[oe-primary]
port = 9001
target = 203.0.113.10:443
[drop-copy.2]
bind = ::1
port = 9002
target = [fe80::1%eth0]:9
timestamps = preserve
"""


@pytest.fixture
def routes(tmp_path: Path) -> str:
    """The option that names a file of routes."""
    (tmp_path / "the routes.ini").write_text(ROUTES)
    return f"--routes={tmp_path / 'the routes.ini'}"


def named(suffix: str) -> List[str]:
    """The templates of that kind."""
    found = [name for name in FILES if name.endswith(suffix)]
    assert found
    return found


def printed(kind: str, *options: str) -> str:
    """What `generate KIND` prints."""
    return subprocess.run([*CHECKOUT, "generate", kind, *options], capture_output=True, text=True, check=True).stdout


def lint(*command: Any, text: str = "") -> str:
    """What a linter that is content says of the text on its standard input."""
    words = list(map(str, command))
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(params=["template", "printed"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Shell


def shellcheck(script: str) -> None:
    """SC2015: "A && B || fail" is a guard here, since fail does not return."""
    assert lint(find("shellcheck"), "--shell=sh", "--exclude=SC2015", "-", text=script) == ""


@pytest.mark.parametrize("name", named(".sh"))
def test_shellcheck_finds_no_fault_in_a_template(name: str) -> None:
    shellcheck(FILES[name].read_text())


@pytest.mark.parametrize("kind", ["netns", "docker"])
def test_shellcheck_finds_no_fault_in_a_script_that_is_printed(kind: str, routes: str) -> None:
    shellcheck(printed(kind, *OPTIONS))
    shellcheck(printed(kind, routes))


def test_shellcheck_finds_no_fault_in_the_completion(form: str) -> None:
    script = FILES["completion.bash"].read_text() if form == "template" else printed("completion")
    assert lint(find("shellcheck"), "-", text=script) == ""


def test_shellcheck_would_find_one() -> None:
    with pytest.raises(AssertionError, match="SC2086"):
        shellcheck(f"{FILES['netns.sh'].read_text()}\nrm $1\n")


# YAML


def yamllint(text: str, width: int = 128) -> None:
    assert lint(sys.executable, "-m", "yamllint", "--strict", "-d", YAML % width, "-", text=text) == ""


@pytest.mark.parametrize("name", named(".yaml"))
def test_yamllint_finds_no_fault_in_a_template(name: str) -> None:
    yamllint(FILES[name].read_text())


@pytest.mark.parametrize("kind", ["kubernetes", "vector", "fluent-bit", "filebeat", "promtail"])
def test_yamllint_finds_no_fault_in_what_is_printed(kind: str) -> None:
    yamllint(printed(kind, *(OPTIONS if kind == "kubernetes" else ())), width=256)  # as long as a command or a program is


def test_yamllint_finds_no_fault_in_the_compose_file(routes: str) -> None:
    yamllint(lint("sh", "-s", "compose", text=printed("docker", *OPTIONS)))
    yamllint(lint("sh", "-s", "compose", text=printed("docker", routes)))


def test_yamllint_finds_no_fault_in_the_manifest_of_routes(routes: str) -> None:
    yamllint(printed("kubernetes", routes), width=256)


# Log shippers


def configuration(form: str, kind: str) -> str:
    return FILES[f"{kind}.conf"].read_text() if form == "template" else printed(kind)


def test_rsyslog_takes_the_configuration(form: str, tmp_path: Path) -> None:
    whole = tmp_path / "rsyslog.conf"
    whole.write_text(f'global(workDirectory="{tmp_path}")\n{configuration(form, "rsyslog")}')
    assert lint(*shippers.rsyslogd(), "-N1", "-f", whole).endswith("End of config validation run. Bye.\n")


def test_syslog_ng_takes_the_configuration(form: str, tmp_path: Path) -> None:
    whole = tmp_path / "syslog-ng.conf"
    whole.write_text(f"@version: 4.0\nsource s_src {{ internal(); }};\n{configuration(form, 'syslog-ng')}")
    lint(*shippers.syslog_ng(), "--syntax-only", "-f", whole)


def test_logrotate_takes_the_configuration(form: str, tmp_path: Path) -> None:
    (tmp_path / "tsproxy.conf").write_text(configuration(form, "logrotate"))
    said = lint(find("logrotate"), "--debug", "--state", tmp_path / "state", tmp_path / "tsproxy.conf")
    assert "rotating pattern: /var/log/tsproxy/tsproxy.json  after 1 days (7 rotations)" in said
    assert "error" not in said


# Prometheus


def test_mtail_takes_the_program(form: str, tmp_path: Path) -> None:
    program = re.split(r"^# /\S+\n", printed("prometheus"), flags=re.M)[1]
    (tmp_path / "tsproxy.mtail").write_text(program if form == "printed" else FILES["tsproxy.mtail"].read_text())
    lint(find("mtail"), "--compile_only", "--progs", tmp_path / "tsproxy.mtail", "--log_dir", tmp_path)


def test_promtool_takes_the_alerts() -> None:
    assert "SUCCESS: 8 rules found" in lint(find("promtool"), "check", "rules", FILES["prometheus-rules.yaml"])


# The man page


def test_mandoc_and_groff_warn_of_nothing_in_the_man_page(tmp_path: Path) -> None:
    page = tmp_path / "tsproxy.1"
    page.write_text(printed("man"))
    assert lint(find("mandoc"), "-T", "lint", "-W", "warning", page) == ""
    done = subprocess.run([find("man"), "--warnings", "--local-file", page], capture_output=True, text=True, check=True)
    assert done.stderr == ""
