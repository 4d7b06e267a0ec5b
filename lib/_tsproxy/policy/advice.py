"""Why a policy can't be honoured here, and the commands that would change that. Text only; checks nothing itself."""

from __future__ import annotations

import shlex
from typing import List

from _tsproxy.cli import program
from _tsproxy.cli.config import Config
from _tsproxy.cli.words import words
from _tsproxy.policy import kinds
from _tsproxy.policy.evidence import Answer
from _tsproxy.policy.inspector import PolicyCheck
from _tsproxy.policy.levers import Policy
from _tsproxy.policy.rehearsal import MISBEHAVES

_WHY = """\
Linux has no unprivileged switch for this: the option is decided for a whole network namespace (net.ipv4.tcp_timestamps)
or by a packet filter; no socket option turns it off for one connection."""


def unattainable(policy_check: PolicyCheck, policy: Policy, config: Config) -> str:
    """The message of exit code 78: what was found, why, and what an administrator has to run once."""
    problem = f"{_asked(policy, config)} can't be honoured here: {policy_check.problem}."
    why = [] if policy_check.sysctl is None else [f"Found: {policy_check.evidence}.", _WHY]
    return "\n".join(
        [problem, *why, "An administrator has to run one of these, once:", *_commands(policy_check, policy, config)]
    )


def _asked(policy: Policy, config: Config) -> str:
    """In the words of who asked."""
    if policy.mode == "rewrite":
        return f"--timestamps=rewrite --static-timestamp={policy.tsval}"
    if policy.mode == "strip" and config.rewrites_to_zero:
        return "--timestamps=rewrite with --static-timestamp=0, which is strip,"
    return f"--timestamps={policy.mode}"


def fixes(policy_check: PolicyCheck, policy: Policy, config: Config) -> List[str]:
    """The commands alone, one line each, the best one first. Those of a file of routes are for all of them."""
    return [line.strip() for line in _commands(policy_check, policy, config) if line.startswith("    ")]


def _commands(policy_check: PolicyCheck, policy: Policy, config: Config) -> List[str]:
    if policy_check.sysctl is None and policy.mode != "preserve":
        return [
            "  where tsproxy runs (not with a chroot, RootDirectory= or ProcSubset=pid that hides it):",
            "    mount -t proc proc /proc",
        ]
    if MISBEHAVES in policy_check.problem:
        return _newer_rules(policy, config)
    if policy_check.families and not policy_check.of(Answer.FAILS) and not policy_check.of(Answer.HOLDS):
        return _make_checkable(policy_check)  # no lever helps where the check itself failed
    return _rewrite(policy_check, config) if policy.mode == "rewrite" else _strip(config)


def _make_checkable(policy_check: PolicyCheck) -> List[str]:
    commands = dict.fromkeys(f"    {found.fix}" for found in policy_check.families.values() if found.fix)
    if commands:
        return ["  in this network namespace:", *commands]
    return [
        "  Nothing to run is known: see what keeps TCP from passing on lo here, e.g. nft list ruleset. rewrite needs conntrack."
    ]


def _newer_rules(policy: Policy, config: Config) -> List[str]:
    sysctl = ["  for everything in this network namespace:", "    sysctl -w net.ipv4.tcp_timestamps=0"]
    return [
        *_rules("rules that hold for each packet, in the place of those here, which are older or not ours:", config),
        *([] if policy.mode == "rewrite" else sysctl),
    ]


def _strip(config: Config) -> List[str]:
    kubernetes = "" if kinds.refusal("kubernetes", config) else "     # or kubernetes"
    return [
        "  for everything in this network namespace (the best lever: nothing to see on the wire, no cost):",
        "    sysctl -w net.ipv4.tcp_timestamps=0",
        *_set_up("for a namespace of its own that holds the uplink, with the listener left where it is:", "systemd", config),
        *_rules("for tsproxy's own connections only:", config),
        *_set_up("in a container:", "docker", config, kubernetes),
        "If the option is stripped where this host can't see it, say --trust-host. To relay with timestamps and only count",
        "them, say --timestamps=preserve.",
    ]


def _rewrite(policy_check: PolicyCheck, config: Config) -> List[str]:
    on = ["    sysctl -w net.ipv4.tcp_timestamps=1"] if policy_check.sysctl == 0 else []
    heading, *rules = _rules("nftables rules for tsproxy's own connections, both ways:", config)
    last = "To send no timestamps at all, say --timestamps=strip; with net.ipv4.tcp_timestamps=0 that needs no rules."
    return [heading, *on, *rules, last]


def _rules(what_for: str, config: Config) -> List[str]:
    """Also where there are none for this Config: they may be all that could help, so why not is said."""
    problem = kinds.refusal("nftables", config)
    return [f"  no rules: {problem}"] if problem else _set_up(what_for, "nftables", config, " | nft -f -")


def _set_up(what_for: str, kind: str, config: Config, then: str = "") -> List[str]:
    """What it is for, and the command; nothing for a kind that `generate` would refuse."""
    if kinds.refusal(kind, config):
        return []
    return [f"  {what_for}", f"    {_command(kind, config)}{then}"]


def _command(kind: str, config: Config) -> str:
    """With all options that this Config was made of: rules set the DSCP, units the listeners."""
    targets = [word for target in config.routes[0].targets for word in ("-t", str(target))] if not config.routes_file else []
    return shlex.join([program.name(), "generate", kind, *targets, *words(config, without=("--target",))])
