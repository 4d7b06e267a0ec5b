"""From the words of the command line to the command and its exit code."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from typing import Any, Callable, Dict, List, Tuple, Union

import _tsproxy
from _tsproxy.cli import config, exits, parser, program
from _tsproxy.cli.config import UsageError
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import inherited, systemd
from _tsproxy.linux.devnull import open_devnull
from _tsproxy.linux.needs import TRANSIENT, Refused
from _tsproxy.linux.printable import printable

_UNWRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

Docopt = Callable[..., Dict[str, Any]]


def run(manual: str, words: List[str], docopt: Docopt) -> int:
    """Do what `words` ask for. Usage errors end with 2 and one line; other refusals with their own code."""
    _open_standard_descriptors()
    inherited.keep_exit_statuses()
    if not sys.platform.startswith("linux"):
        return _fail(exits.FAILED, f"needs Linux; this is {sys.platform}")
    try:
        options = parser.read(manual, words, docopt)
        if any(options[name] for name in parser.commands_of(manual)):
            gc.enable()
            inherited.unblock_signals()  # relaying does so once it has its handlers
        code = _dispatch(options, manual)
        if sys.stdout is not None:
            sys.stdout.flush()  # now, where a failure can still be told
        return code
    except (UsageError, Exit, Refused) as problem:
        return _fail(*_code_and_line(problem))
    except OSError as problem:
        _forget_output()
        gone = isinstance(problem, BrokenPipeError)  # who read our output: nobody to tell
        return exits.FAILED if gone else _fail(exits.FAILED, _told(problem))
    except KeyboardInterrupt:
        return 130


def _code_and_line(problem: Union[UsageError, Exit, Refused]) -> Tuple[int, str]:
    if isinstance(problem, Refused):
        return exits.NOT_YET if problem.errno in TRANSIENT else exits.FAILED, str(problem.strerror)
    return problem.code if isinstance(problem, Exit) else exits.USAGE, str(problem)


def _told(problem: OSError) -> str:
    """For people: what it was about, and no number. Without a name, what can't be written is what commands print."""
    about = printable(str(problem.filename or "")) or ("standard output" if problem.errno in _UNWRITTEN else "")
    return f"{about}: {problem.strerror}" if about else str(problem.strerror or problem)


def _open_standard_descriptors() -> None:
    """Started with 0, 1 or 2 closed, the next socket would take that number and get our lines."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # then it is the lowest that is free
            os.set_inheritable(open_devnull(), True)


def _forget_output() -> None:
    """What could not be written would be tried again when the interpreter ends, and its exit code would be 120."""
    with contextlib.suppress(OSError):
        os.dup2(open_devnull(), 1)


def _dispatch(options: Dict[str, Any], manual: str) -> int:
    if options["--help"]:
        print(program.named(manual.strip()))
        return exits.DRAINED
    if options["--version"]:
        print(f"tsproxy {_tsproxy.__version__}")
        return exits.DRAINED
    return _command(options, manual)


def _command(options: Dict[str, Any], manual: str) -> int:
    """The chosen command; each is imported only when it is asked for."""
    if options["bundle"]:
        from _tsproxy.tools import bundle

        return bundle.run(options["OUT"])
    if options["demo"]:
        from _tsproxy.tools import demo

        return demo.run()
    if options["top"]:
        from _tsproxy.tools import top

        return top.run(next(iter(options["FILE"]), None))
    if options["audit"]:
        from _tsproxy.tools import audit

        return audit.run(options)
    if options["generate"] and options["KIND"] is None:
        from _tsproxy.tools import generate

        return generate.without_options(options, manual)
    return _for_targets(options, _settings(options))


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


def _for_targets(options: Dict[str, Any], settings: config.Config) -> int:
    """The commands that are told how to relay, and relaying itself."""
    if options["check"]:
        from _tsproxy.tools import check

        return check.run(settings, as_json=options["--json"])
    if options["generate"]:
        from _tsproxy.tools import generate

        return generate.run(options["KIND"], settings)
    from _tsproxy.supervisor.serve import serve

    return serve(settings)


def _fail(code: int, message: str) -> int:
    if sys.stderr is not None:  # print() would take standard output for a standard error that was closed
        print(f"{program.name()}: {printable(message, kept=chr(10))}", file=sys.stderr)
    return code
