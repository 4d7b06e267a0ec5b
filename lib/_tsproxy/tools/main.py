"""From the words of the command line to the command and its exit code."""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import Any, Callable, Dict, List, Tuple, Union

import _tsproxy
from _tsproxy.cli import config, exits, parser, program
from _tsproxy.cli.config import UsageError
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import inherited, systemd, uapi
from _tsproxy.linux.needs import TRANSIENT, Refused, hint
from _tsproxy.linux.printable import printable
from _tsproxy.tools import streams

_UNWRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})  # EBADF: opened for reading

Docopt = Callable[..., Dict[str, Any]]
Command = Callable[[], int]  # its value is the exit code


def run(manual: str, words: List[str], docopt: Docopt) -> int:
    """Do what `words` ask for. Usage errors end with 2 and one line; other refusals with their own code."""
    streams.open_closed()
    inherited.keep_exit_statuses()
    if not sys.platform.startswith("linux"):
        return _fail(exits.FAILED, f"needs Linux; this is {sys.platform}")
    try:
        options = parser.read(manual, words, docopt)
        command = _chosen(options, manual)
        if any(options[name] for name in parser.commands_of(manual)):
            gc.enable()
            inherited.unblock_signals()  # relaying does so once it has its handlers
        code = command()
        sys.stdout.flush()  # now, where a failure can still be told
        return code
    except (UsageError, Exit, Refused) as problem:
        return _fail(*_code_and_line(problem))
    except OSError as problem:
        streams.discard(1)
        if problem.errno in uapi.CAPACITY:
            return _fail(exits.NOT_YET, f"{_told(problem)}{hint(problem.errno)}")
        gone = isinstance(problem, BrokenPipeError)  # who read our output: nobody to tell
        return exits.FAILED if gone else _fail(exits.FAILED, _told(problem))
    except KeyboardInterrupt:
        return 130
    finally:
        streams.end_output()


def _code_and_line(problem: Union[UsageError, Exit, Refused]) -> Tuple[int, str]:
    if isinstance(problem, Refused):
        return exits.NOT_YET if problem.errno in TRANSIENT else exits.FAILED, str(problem.strerror)
    return problem.code if isinstance(problem, Exit) else exits.USAGE, str(problem)


def _told(problem: OSError) -> str:
    """For people: what it was about, and no number. Without a name, what can't be written is what commands print."""
    about = printable(str(problem.filename or "")) or ("standard output" if problem.errno in _UNWRITTEN else "")
    return f"{about}: {problem.strerror}" if about else str(problem.strerror or problem)


def _chosen(options: Dict[str, Any], manual: str) -> Command:
    if options["--help"]:
        return lambda: _print(program.named(manual.strip()))
    if options["--version"]:
        return lambda: _print(f"tsproxy {_tsproxy.__version__}")
    return _imported(options, manual)


def _print(text: str) -> int:
    print(text)
    return exits.DRAINED


def _imported(options: Dict[str, Any], manual: str) -> Command:
    """The chosen command. Each is imported only when it is asked for, and here, while signals are blocked.

    A KeyboardInterrupt while an extension module is imported may be fatal: orjson ends with SIGSEGV.
    """
    if options["bundle"]:
        from _tsproxy.tools import bundle

        return lambda: bundle.run(options["OUT"])
    if options["demo"]:
        from _tsproxy.tools import demo

        return demo.run
    if options["top"]:
        from _tsproxy.tools import top

        return lambda: top.run(next(iter(options["FILE"]), None))
    if options["audit"]:
        from _tsproxy.tools import audit

        return lambda: audit.run(options)
    return _for_targets(options, manual)


def _for_targets(options: Dict[str, Any], manual: str) -> Command:
    """The commands that are told how to relay, and relaying itself."""
    if options["check"]:
        from _tsproxy.tools import check

        return lambda: check.run(_settings(options), as_json=options["--json"])
    if options["generate"]:
        from _tsproxy.tools import generate

        if options["KIND"] is None:
            return lambda: generate.without_options(options, manual)
        return lambda: generate.run(options["KIND"], _settings(options))
    return lambda: _relay(options)


def _relay(options: Dict[str, Any]) -> int:
    """Signals stay blocked until relaying has its handlers, so this may import later: what was given is looked at first."""
    settings = _settings(options)
    from _tsproxy.supervisor.serve import serve

    return serve(settings)


def _settings(options: Dict[str, Any]) -> config.Config:
    """The route of the command line, or those of a file. Only relaying takes listeners that were handed over."""
    if options["--routes"] is None:
        return config.parse(options)
    from _tsproxy.cli import routes

    return routes.config_of(options, None if options["check"] or options["generate"] else _inherited_names())


def _inherited_names() -> List[str]:
    try:
        return [handed.name for handed in systemd.inherited(os.environ, os.getpid())]
    except systemd.BadHandover as problem:
        raise Exit(exits.USAGE, str(problem)) from None


def _fail(code: int, message: str) -> int:
    streams.say(message)
    return code
