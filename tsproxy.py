#!/usr/bin/env python3
"""tsproxy: a TCP proxy that lets no TCP timestamp (RFC 7323 TSopt) out, and proves it for each connection.

Usage:
  tsproxy.py --target=<host:port>... [--source=<address>]... [--allow=<cidr>]... [options]
  tsproxy.py bundle OUT
  tsproxy.py (-h | --help)
  tsproxy.py (-V | --version)

Without a command it relays: clients connect to it, it connects to the target. `bundle` writes OUT, the whole
program as one plain-text script to copy onto a host that has nothing but Python.

Where to:
  -t --target=<host:port>      Upstream; repeat it for ordered failover; [::1]:443 for IPv6.
  --source=<address>           Local address of upstream connections; repeat it to spread them.
  --connect-timeout=<s>        For each upstream address [default: 5].

Where from:
  -p --port=<port>             Listening port; 0 picks one, and the start line tells. Default: 8080.
  -b --bind=<address>          Listening address. Default: 127.0.0.1.
  --allow=<cidr>               Clients that may connect; repeat it; others are reset and counted. Default: any.
  --max-connections=<n>        Concurrent client connections [default: 1000].
  --on-full=<action>           Beyond that: reject (reset at once) or queue (stay in the backlog) [default: reject].
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
  --runtime=<kind>             How they are started: auto or threads [default: auto].
  --cpus=<list>                Pin worker i to the i-th CPU of e.g. 2-5,8; sets --workers.
  --busy-poll=<us>             Spin that long after the last event before sleeping [default: 0].
  --buffer-size=<bytes>        Relay buffer [default: 65536].
  --idle-timeout=<s>           End a connection that moved no byte for so long; 0 is off [default: 0].
  --half-close-timeout=<s>     The same after one side's FIN [default: 300].
  --user-timeout=<ms>          Unacknowledged for so long: dead (TCP_USER_TIMEOUT); 0 is off [default: 10000].
  --keepalive=<s>              Idle time before keepalive probes; 0 is off [default: 30].
  --drain-timeout=<s>          How long connections may finish after SIGTERM [default: 30].

Lines on standard output:
  --metrics-interval=<s>       Between metrics lines; 0 is only the last one [default: 10].
  --connection-log=<on|off>    One line for each closed connection [default: on].
  --log-level=<level>          debug, info, warning or error [default: info].

  -h --help                    Show this and exit.
  -V --version                 Show the version and exit.

Exit codes: 0 drained, 1 failed while running, 2 usage or a bad value, 69 can't bind, 78 the timestamp policy can't be
honoured. Signals: SIGTERM, SIGINT, SIGHUP drain (a second one ends now), SIGUSR1 prints a metrics line.
"""

import os
import sys

_HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isdir(os.path.join(_HERE, "lib", "_tsproxy")):
    sys.path.insert(0, os.path.join(_HERE, "lib"))


def main() -> int:
    """Run the command line; the exit code. What a user did wrong costs one line on standard error, never a traceback."""
    try:
        from _tsproxy.commands import main as commands
    except ImportError:
        return _say("lib/ is missing: copy the whole checkout, or make one file there with: tsproxy.py bundle OUT")
    try:
        from docopt import docopt
    except ImportError:
        return _say("docopt-ng is missing: pip install docopt-ng, or use the one file that 'tsproxy.py bundle OUT' makes")
    return commands.run(__doc__ or "", sys.argv[1:], docopt)


def _say(message: str) -> int:
    print(f"tsproxy: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
