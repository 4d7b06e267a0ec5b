"""The kernels that people have, emulated: what tsproxy asks of each is asked by the tests that ask it of this one.

Emulation takes its time, so the selection is short, waits are long, and nothing is said of speed. What fails is run a second
time: where a processor stands still for a quarter of a second the kernel sends a SYN again, which is refused as it should be.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import List

import pytest
import roots
from debs import Apt
from emulated import booted
from progress import Progress

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(3600)]
SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports")
REHEARSAL = "tests/root/test_evidence.py::test_rules_have_to_hold_against_what_a_far_end_can_do_not_for_our_syn_alone"
HOSTILE = "tests/root/test_hostile_exchange.py::test_a_hostile_far_end_gets_no_timestamp_when"
SELECTED = [
    "tests/root/test_check.py::test_in_a_clean_namespace_the_policy_holds_and_the_target_is_tried[checkout]",
    "tests/root/test_check.py::test_where_timestamps_are_on_no_syn_leaves_and_the_fixes_are_told[1]",
    "tests/root/test_demo.py::test_root_sees_a_leg_with_timestamps_and_a_leg_without[checkout]",
    "tests/root/test_wire.py::test_strip_lets_no_timestamp_out_in_any_packet_of_a_life",  # both levers and families
    "tests/root/test_wire.py::test_rewrite_gives_each_packet_the_constant_and_nothing_else",
    f"{REHEARSAL}[ours, strip-without]",
    f"{REHEARSAL}[ours, rewrite-without]",
    "tests/root/test_egress.py::test_an_interface_may_be_a_vrf_whose_addresses_are_no_addresses_outside_it",
    "tests/root/test_saved_syn.py::test_a_syn_behind_headers_that_the_kernel_takes_is_read",
    "tests/root/test_routes_policy.py::test_each_route_leaves_by_its_own_source_and_dscp",
    "tests/root/test_routes_policy.py::test_a_family_that_drifts_leaves_the_routes_over_the_other_one_alone",
    "tests/root/test_drift.py::test_a_lever_that_goes_under_load_lets_no_byte_out_beside_a_timestamp",
    "tests/process/test_restart.py::test_an_overlap_by_reuse_port_loses_no_client_of_a_storm[threads 2]",
    "tests/process/test_restart.py::test_an_overlap_by_reuse_port_loses_no_client_of_a_storm[processes 1]",
    "tests/process/test_restart.py::test_an_overlap_by_reuse_port_loses_no_client_of_a_storm[interpreters 2]",
    "tests/root/test_liveness.py::test_a_reader_that_pauses_for_many_user_timeouts_gets_every_byte[client-auto]",
    "tests/root/test_liveness.py::test_a_reader_that_pauses_for_many_user_timeouts_gets_every_byte[exchange-auto]",
    "tests/root/test_liveness.py::test_a_peer_that_goes_while_data_is_under_way_is_noticed",
    "tests/root/test_liveness.py::test_a_window_that_was_closed_for_long_hides_neither_life_nor_death[client, before 6.15]",
    f"{HOSTILE}[sysctl, IPv4-a SYN-ACK has a timestamp that was not offered]",
    f"{HOSTILE}[nftables strip, IPv4-a SYN-ACK has a timestamp that was not offered]",
    f"{HOSTILE}[nftables strip, IPv4-a connection in TIME_WAIT is reset and probed]",
    f"{HOSTILE}[nftables strip, IPv6-a connection in TIME_WAIT is reset and probed]",
    f"{HOSTILE}[nftables rewrite, IPv4-a connection in TIME_WAIT is reset and probed]",
]
INIT = """#!/bin/sh
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm && mount -t devpts devpts /dev/pts
for place in /dev/shm /tmp /run; do mount -t tmpfs none $place; done
mkdir -p /lib/modules && ln -sfn /mnt/modules /lib/modules/$(uname -r) && depmod
ip link set lo up
echo "booted $(uname -r)"
cd /mnt/checkout
export PYTHONPATH=/mnt/libraries PYTHONDONTWRITEBYTECODE=1 TSPROXY_TEST_PATIENCE=300 HOME=/root PATH
set -- python3 -m pytest -v -m '' -p no:cacheprovider -o timeout=1200
"$@" {selected}
echo "exit code $?"
sync
echo o >/proc/sysrq-trigger
sleep 600
"""


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """The checkout, what it imports, and what is done with it."""
    place = tmp_path / "payload"
    roots.copy_checkout(place)
    (place / "init").write_text(INIT.format(selected=shlex.join(SELECTED)))
    return place


@pytest.mark.parametrize("suite", SUITES)
def test_a_kernel_of_debian_keeps_what_tsproxy_rests_on(suite: str, payload: Path, tell: Progress) -> None:
    roots.require("qemu-system-x86_64", "mke2fs", "cpio", "busybox", "setpriv", "dpkg", "apt-get")
    root, kernel = roots.made(roots.EMULATED, tell), Apt(suite, tell).kernel()
    said: List[str] = []
    with booted(kernel, root, payload) as console:
        for line in console:
            said.append(line)
            if re.search(r"booted|PASSED|FAILED|ERROR|SKIPPED| in [0-9.]+s", line):
                tell(f"{kernel.release}: {line}")
    print(*said[-400:], sep="\n")
    if f"booted {kernel.release}" not in said:
        roots.machine_refuses(f"{kernel.release} does not boot in QEMU")
    assert "exit code 0" in said
