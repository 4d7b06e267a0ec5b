"""Why a policy can't be honoured here, and the commands that would change that. Text only; checks nothing itself."""

from __future__ import annotations

from typing import List, Sequence

from _tsproxy.cli import program
from _tsproxy.policy.evidence import Answer
from _tsproxy.policy.inspector import PolicyCheck
from _tsproxy.policy.levers import Policy
from _tsproxy.policy.rehearsal import MISBEHAVES

_WHY = """\
Linux has no unprivileged switch for this: the option is decided for a whole network namespace (net.ipv4.tcp_timestamps)
or by a packet filter; no socket option turns it off for one connection."""


def unattainable(policy_check: PolicyCheck, policy: Policy, targets: Sequence[str]) -> str:
    """The message of exit code 78: what was found, why, and what an administrator has to run once."""
    asked = f"--timestamps={policy.mode}" + (f" --static-timestamp={policy.tsval}" if policy.mode == "rewrite" else "")
    problem = f"{asked} can't be honoured here: {policy_check.problem}."
    why = [] if policy_check.sysctl is None else [f"Found: {policy_check.evidence}.", _WHY]
    return "\n".join(
        [problem, *why, "An administrator has to run one of these, once:", *_commands(policy_check, policy, targets)]
    )


def fixes(policy_check: PolicyCheck, policy: Policy, targets: Sequence[str]) -> List[str]:
    """The commands alone, one line each, the best one first. `targets` are HOST:PORT, or the one option --routes=FILE."""
    return [line.strip() for line in _commands(policy_check, policy, targets) if line.startswith("    ")]


def _commands(policy_check: PolicyCheck, policy: Policy, targets: Sequence[str]) -> List[str]:
    if policy_check.sysctl is None and policy.mode != "preserve":
        return [
            "  where tsproxy runs (not with a chroot, RootDirectory= or ProcSubset=pid that hides it):",
            "    mount -t proc proc /proc",
        ]
    if MISBEHAVES in policy_check.problem:
        return _newer_rules(policy, targets)
    if policy_check.families and not policy_check.of(Answer.FAILS) and not policy_check.of(Answer.HOLDS):
        return _make_checkable(policy_check)  # no lever helps where the check itself failed
    return _rewrite(policy_check, policy, targets) if policy.mode == "rewrite" else _strip(targets)


def _make_checkable(policy_check: PolicyCheck) -> List[str]:
    commands = dict.fromkeys(f"    {found.fix}" for found in policy_check.families.values() if found.fix)
    if commands:
        return ["  in this network namespace:", *commands]
    return [
        "  Nothing to run is known: see what keeps TCP from passing on lo here, e.g. nft list ruleset. rewrite needs conntrack."
    ]


def _newer_rules(policy: Policy, targets: Sequence[str]) -> List[str]:
    mode = f"--timestamps=rewrite --static-timestamp={policy.tsval} " if policy.mode == "rewrite" else ""
    return [
        "  rules that hold for each packet, in the place of those here, which are older or not ours:",
        f"    {program.name()} generate nftables {mode}{_targets(targets)} | nft -f -",
        *([] if mode else ["  for everything in this network namespace:", "    sysctl -w net.ipv4.tcp_timestamps=0"]),
    ]


def _strip(targets: Sequence[str]) -> List[str]:
    to = _targets(targets)
    return [
        "  for everything in this network namespace (the best lever: nothing to see on the wire, no cost):",
        "    sysctl -w net.ipv4.tcp_timestamps=0",
        "  for a namespace of its own that holds the uplink, with the listener left where it is:",
        f"    {program.name()} generate systemd {to}",
        "  for tsproxy's own connections only:",
        f"    {program.name()} generate nftables {to} | nft -f -",
        "  in a container:",
        f"    {program.name()} generate docker {to}     (or kubernetes)",
        "If the option is stripped where this host can't see it, say --trust-host. To relay with timestamps and only count",
        "them, say --timestamps=preserve.",
    ]


def _rewrite(policy_check: PolicyCheck, policy: Policy, targets: Sequence[str]) -> List[str]:
    on = ["    sysctl -w net.ipv4.tcp_timestamps=1"] if policy_check.sysctl == 0 else []
    mode = f"--timestamps=rewrite --static-timestamp={policy.tsval}"
    return [
        "  nftables rules for tsproxy's own connections, both ways:",
        *on,
        f"    {program.name()} generate nftables {mode} {_targets(targets)} | nft -f -",
        "To send no timestamps at all, say --timestamps=strip; with net.ipv4.tcp_timestamps=0 that needs no rules.",
    ]


def _targets(targets: Sequence[str]) -> str:
    return " ".join(target if target.startswith("--") else f"-t {target}" for target in targets)
