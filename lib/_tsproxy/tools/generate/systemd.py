"""`generate systemd`: the listener in the host's namespace, the service in the clean one, the one-shot that makes that."""

from __future__ import annotations

import math

from _tsproxy.cli.config import Config
from _tsproxy.linux.limits import descriptors_for
from _tsproxy.tools.generate import netns
from _tsproxy.tools.generate.text import command, fill, targets, words

_LISTENING = ("--port", "--bind", "--reuse-port")  # the socket unit does these
_GRACE_S = 10  # beyond the drain, for what does not end by itself, and the last lines

_UNITS = """\
# tsproxy @VERSION@ under systemd: clients connect in the host's network namespace, tsproxy relays from a clean one.
# Asked for: @TARGETS@.
#
# Make:   1. tsproxy.py bundle /usr/local/bin/tsproxy
#         2. put each part below in the file that its heading names, which this does:
#            @COMMAND@ |
#                awk '$1 == "#" && NF == 2 && $2 ~ "^/" { file = $2; next } file { print > file }'
#         3. systemctl daemon-reload && systemctl enable --now tsproxy.socket tsproxy.service
# Undo:   systemctl disable --now tsproxy.socket tsproxy.service; systemctl stop tsproxy-netns.service
#         (cd /etc/systemd/system && rm tsproxy.socket tsproxy.service tsproxy-netns.service)
#         rm /usr/local/sbin/tsproxy-netns
#         systemctl daemon-reload
# Look:   systemctl status tsproxy; journalctl -u tsproxy -f -o cat; systemd-analyze security tsproxy.service

# /usr/local/sbin/tsproxy-netns
@SCRIPT@
# /etc/systemd/system/tsproxy-netns.service
# Makes the clean namespace before tsproxy starts, and takes it away when stopped.
# Undo: systemctl stop tsproxy-netns.service
[Unit]
Description=The network namespace tsproxy, whose TCP sends no timestamps
Wants=network-online.target
After=network-online.target
# No default route yet, say: tried again until there is one. A limit would close the port until a person comes.
StartLimitIntervalSec=0

[Service]
Type=oneshot
RemainAfterExit=yes
Restart=on-failure
RestartSec=2
# MODE, UPLINK, ADDRESS and GATEWAY, if the defaults won't do: the script says what they mean.
EnvironmentFile=-/etc/default/tsproxy-netns
ExecStart=/bin/sh /usr/local/sbin/tsproxy-netns up
ExecStop=/bin/sh /usr/local/sbin/tsproxy-netns down

# /etc/systemd/system/tsproxy.socket
# The listener. No NetworkNamespacePath= here: it stays in the host's namespace, where the clients are.
# Undo: systemctl disable --now tsproxy.socket
[Unit]
Description=tsproxy: where clients connect

[Socket]
ListenStream=@LISTEN@
FileDescriptorName=tsproxy
# The address may come up later than this does.
FreeBind=yes
# However often the service has to be started: a limit here would refuse every client from then on.
TriggerLimitIntervalSec=0
NoDelay=yes
Backlog=4096
@REUSE@

[Install]
WantedBy=sockets.target

# /etc/systemd/system/tsproxy.service
# The proxy, in the clean namespace: no privilege, nothing to write to, no system call that it has no use for.
# Undo: systemctl disable --now tsproxy.service
[Unit]
Description=tsproxy: relays without TCP timestamps
# The namespace goes away: so does tsproxy.
BindsTo=tsproxy-netns.service
Requires=tsproxy.socket
After=tsproxy-netns.service tsproxy.socket
# While it can't start, clients wait in the socket's queue. With a limit the socket would fail after five tries in ten seconds,
# and refuse them, also when the cause is gone.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
NetworkNamespacePath=/run/netns/tsproxy
# The host's name server may be on its loopback, which is not in there.
BindReadOnlyPaths=-/etc/netns/tsproxy/resolv.conf:/etc/resolv.conf
ExecStart=/usr/bin/python3 -I -S /usr/local/bin/tsproxy @OPTIONS@
@USER@
StandardOutput=journal
StandardError=journal
# Else it would be python3, and no syslog rule for tsproxy would fit.
SyslogIdentifier=tsproxy
# One line for each connection: none shall be held back.
LogRateLimitIntervalSec=0

# It sends WATCHDOG=1; one that hangs is replaced. Whatever a start fails for may heal: a name that can't be resolved yet (75),
# a policy whose lever somebody pulls (78), a script that is being replaced (Python's 2).
WatchdogSec=10
Restart=on-failure
RestartSec=2
# SIGTERM drains: the drain timeout, and a little more.
KillMode=mixed
TimeoutStopSec=@STOP_S@
# Two sockets for each connection, and some.
LimitNOFILE=@NOFILE@

CapabilityBoundingSet=
AmbientCapabilities=
NoNewPrivileges=yes
PrivateUsers=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateIPC=yes
PrivateMounts=yes
ProtectSystem=strict
ProtectHome=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
# Not ProcSubset=pid: tsproxy reads /proc/sys/net/ipv4/tcp_timestamps before it connects.
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
KeyringMode=private
UMask=0077
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
# SECURITY.md lists what is used; of the rest, what would help an intruder most is left out.
SystemCallFilter=~@privileged @resources @aio @keyring @setuid
SystemCallFilter=~kcmp process_vm_readv process_vm_writev setns unshare userfaultfd
@PIN@
# No core file: there could be an order in it.
LimitCORE=0

[Install]
WantedBy=multi-user.target
"""

_DYNAMIC = """\
# A user that exists only while it runs, unlike nobody, which others may be too; generate --user=NAME for one of yours.
DynamicUser=yes"""

_PIN = """\
# For --cpus, which pins the workers.
SystemCallFilter=sched_setaffinity"""


def text(config: Config) -> str:
    """The units and the script, each under a heading that names its file."""
    return fill(
        _UNITS,
        COMMAND=command("systemd", config),
        TARGETS=targets(config),
        SCRIPT=netns.text(config),
        LISTEN=_value(netns.listen_address(config)),
        REUSE="# Another instance may have the port at the same time.\nReusePort=yes" if config.reuse_port else "",
        OPTIONS=" ".join(map(_word, words(config, without=(*_LISTENING, "--user")))),
        USER=_DYNAMIC if config.user in (None, "nobody") else f"User={_value(str(config.user))}",
        STOP_S=math.ceil(config.drain_timeout_s) + _GRACE_S,
        NOFILE=descriptors_for(config.max_connections, config.workers),
        PIN=_PIN if config.cpus else "",
    )


def _value(text: str) -> str:
    """A setting's value: systemd reads % in it (systemd.unit(5), specifiers), and nothing into $."""
    return text.replace("%", "%%")


def _word(text: str) -> str:
    """A word of a command line, in which variables are read too (systemd.service(5)). Ours have no blanks and no quotes."""
    return _value(text).replace("$", "$$")
