#!/usr/bin/env python3
"""tsproxy: a TCP proxy that lets no TCP timestamp (RFC 7323 TSopt) out, and proves it for each connection.

Usage:
  tsproxy.py --target=<host:port>... [--source=<address>]... [--interface=<name>] [--allow=<cidr>]... [options]
  tsproxy.py --routes=<file> [options]
  tsproxy.py check --target=<host:port>... [--source=<address>]... [--interface=<name>] [--allow=<cidr>]... [--json] [options]
  tsproxy.py check --routes=<file> [--json] [options]
  tsproxy.py generate KIND --target=<host:port>... [--source=<address>]... [--interface=<name>] [--allow=<cidr>]... [options]
  tsproxy.py generate KIND --routes=<file> [options]
  tsproxy.py generate (rsyslog|syslog-ng|vector|fluent-bit|filebeat|promtail|alloy|journald|logrotate|fields)
  tsproxy.py generate (prometheus|grafana|man|completion)
  tsproxy.py audit FILE... [--from=<cidr>]... [--target=<host:port>]... [--lines=<file>] [--json] [--svg=<file>]
  tsproxy.py audit --interface=<name> [--seconds=<s>] [--from=<cidr>]... [--target=<host:port>]... [--json] [--svg=<file>]
  tsproxy.py demo
  tsproxy.py top [FILE]
  tsproxy.py bundle OUT
  tsproxy.py (-h | --help)
  tsproxy.py (-V | --version)

Without a command it relays: clients connect to it, it connects to the target; with --routes, to the targets of many routes.
check     would the timestamp policy hold here? Each lever, each witness, what is missing, the fix. Exit 0 only if so.
generate  print the one-time set-up, with its undo: nftables, netns, systemd, docker or kubernetes; or what ships the
          lines: a log shipper's configuration, or fields, their names in ECS and OpenTelemetry; or prometheus, which makes
          metrics of them, with alerts, and grafana, a dashboard; or man, this as a man page, and completion, for bash and
          zsh. Those need no option.
audit     the wire's own verdict: what captures (pcap, pcapng, gzip; - is standard input) or an interface (root, or
          CAP_NET_RAW) show, for each flow: CLEAN, LEAK, CONSTANT or UNDECIDED. It needs nothing of tsproxy.
demo      show it: a private namespace, an embedded exchange, a client, and the SYN options of both legs. No root.
top       watch it: a live screen of the JSON lines from standard input, or from FILE, which is followed; q quits.
          Where standard output is no terminal, each line becomes one that people can read.
bundle    write OUT, the whole program as one plain-text script to copy onto a host that has nothing but Python.

Where to:
  -t --target=<host:port>      Upstream; repeat it for ordered failover; [::1]:443 for IPv6.
  --routes=<file>              Many routes, a section each: its name, and its options without dashes (port = 9001). SIGHUP reads
                               the file again.
  --source=<address>           Local address of upstream connections; repeat it to spread them.
  --interface=<name>           Interface or VRF of upstream connections, and of no other (Linux 5.7). With audit: look at this
                               interface instead of at files, until Ctrl-C, and judge then.
  --dscp=<n>                   DSCP of upstream packets, 0 to 63. Under nftables the rules set it: generate them with it.
  --connect-timeout=<s>        For each upstream address [default: 5].

Where from:
  -p --port=<port>             Listening port; 0 picks one, and the start line tells. Default: 8080.
  -b --bind=<address>          Listening address. Default: 127.0.0.1.
  --allow=<cidr>               Clients that may connect; repeat it; others are reset and counted. Default: any.
  --max-connections=<n>        Concurrent client connections [default: 1000].
  --on-full=<action>           Beyond that: reject (reset at once) or queue (stay in the backlog) [default: reject].
  --max-connections-per-client=<n>
                               The same for each client address, IPv6 too; beyond that always reset at once; 0 is no
                               limit [default: 0].
  --reuse-port                 Share the port with another instance (overlapping restart).
  --user=<name>                Started as root: bind, then become this user for good.

Timestamps:
  --timestamps=<mode>          strip: none leaves; rewrite: each packet carries one constant TSval; preserve: relay and
                               count. What can't be had ends with 78. Default: strip.
  --spoof-timestamps           The same as --timestamps=rewrite.
  --static-timestamp=<tsval>   The TSval to rewrite to, up to 4294967295; 0 is none at all (strip). Default: 0.
  --trust-host                 No witness: stripping happens where it can't be seen. Each connection is still checked.

Relaying:
  --workers=<n>                Event loops. Default: one for each usable CPU.
  --runtime=<kind>             How they are started: interpreters (3.13+), processes, threads, or auto, which takes the best
                               that works here [default: auto].
  --cpus=<list>                Pin worker i to the i-th CPU of e.g. 2-5,8; sets --workers.
  --busy-poll=<us>             Spin that long after the last event before sleeping [default: 0].
  --buffer-size=<bytes>        Relay buffer [default: 65536].
  --zero-copy=<when>           auto: long streams go through pipes by splice(2) (Python 3.10+); never [default: auto].
  --idle-timeout=<s>           End a connection that moved no byte for so long; 0 is off [default: 0].
  --half-close-timeout=<s>     The same after one side's FIN [default: 300].
  --user-timeout=<ms>          Acknowledges nothing for so long: dead; slow is not; 0 is off [default: 10000].
  --keepalive=<s>              Idle time before keepalive probes; 0 is off [default: 30].
  --drain-timeout=<s>          How long connections may finish after SIGTERM [default: 30].

Lines on standard output:
  --metrics-interval=<s>       Between metrics lines; 0 is only the last one [default: 10].
  --segments-warning=<n>       Warn when more TCP segments than that go to the exchange in a second, once a minute at most;
                               0 is off [default: 0].
  --connection-log=<on|off>    One line for each closed connection [default: on].
  --log-level=<level>          debug, info, warning or error [default: info].

Audit:
  --from=<cidr>                Judge what these hosts send: they must send no timestamp; repeat it. Default: any.
                               With --target, what is sent to there; names are resolved. Both must hold.
  --seconds=<s>                With --interface: end by itself after so long.
  --lines=<file>               tsproxy's JSON lines, to hold against what was seen.
  --svg=<file>                 Draw TSval against time, one line a flow, one colour a clock.

  --json                       With check: the same as one JSON object; with audit: one for each flow and one at the end.
  -h --help                    Show this and exit.
  -V --version                 Show the version and exit.

Exit codes: 0 drained, 1 failed while running, 2 usage or a bad value, 69 can't bind, 75 what may come by itself is missing
(no target can be resolved yet, no such --source yet, no task, memory or descriptor left): try again, 78 the timestamp
policy can't be honoured. audit: 0 CLEAN or CONSTANT, 78 LEAK, 65 UNDECIDED, or no capture.
Signals: SIGTERM, SIGINT, SIGHUP drain (a second one ends now); with --routes SIGHUP reads the file again. SIGUSR1 prints the
metrics.
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]  # this script's directory: a json.py beside a script in /tmp would be taken for Python's own

import contextlib
import gc
import importlib
import os
import signal

_LIB = os.path.join(os.path.dirname(os.path.realpath(__file__)), "lib")
_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_OLDEST = (3, 9)  # as setup.cfg has it. This file, and the loader of a bundle, can be read by 3.6, so that it says so
_ABSENT = {
    "_tsproxy": "lib/ is missing: copy the whole checkout, or make one file there with: tsproxy.py bundle OUT",
    "docopt": "docopt-ng is missing: pip install docopt-ng, or use the one file that 'tsproxy.py bundle OUT' makes",
}


def main() -> int:
    """Run the command line; the exit code. What a user did wrong costs one line on standard error, never a traceback."""
    if sys.version_info[:2] < _OLDEST:
        return _say(f"needs Python {_OLDEST[0]}.{_OLDEST[1]} or later; this is {sys.version.split()[0]}")
    # Held back until there is a handler: SIGUSR1 would kill, Ctrl-C show a traceback, and PID 1 never hear of SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    gc.disable()  # a start makes next to no garbage, and each look for it goes through all that was imported so far
    _find_modules()
    try:
        commands = importlib.import_module("_tsproxy.tools.main")
        docopt = importlib.import_module("docopt").docopt
    except ModuleNotFoundError as missing:
        if missing.name not in _ABSENT:
            raise
        return _say(_ABSENT[missing.name])
    if "default_help" not in docopt.__code__.co_varnames:
        return _say(_ABSENT["docopt"].replace(":", " (docopt is another one):", 1))
    if not __doc__:
        return _say("the manual, which the options are read from, is missing: leave out Python's -OO (PYTHONOPTIMIZE=2)")
    code: int = commands.run(__doc__, sys.argv[1:], docopt)
    return code


def _find_modules() -> None:
    """Import from lib/ beside this file; a bundle brings its own modules, and a lib/ beside it may be anybody's."""
    if not any(hasattr(finder, "bundled") for finder in sys.meta_path) and os.path.isdir(os.path.join(_LIB, "_tsproxy")):
        sys.path.insert(0, _LIB)


def _say(message: str) -> int:
    with contextlib.suppress(OSError):  # closed, or full: the exit code tells
        os.write(2, os.fsencode(f"{os.path.basename(sys.argv[0])}: {message}\n"))
    return 2


if __name__ == "__main__":
    sys.exit(main())
