"""The command line, checked against the manual before docopt parses it.

docopt accepts any unambiguous prefix of an option, and prints the whole usage text on an error. An operator needs the exact
name and one line. So the arguments are parsed here first, with the option table of the manual itself; docopt then gets only
options that are well formed.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

from _tsproxy.cli import program
from _tsproxy.cli.config import UsageError

KINDS = ("nftables", "netns", "systemd", "docker", "kubernetes")
"""What KIND may be."""
_OPERANDS = {
    "OUT": "a path, where the one file is written",
    "FILE": "captures, - for standard input, or --interface=<name>",
    "KIND": f"{' or '.join(KINDS)}; or what ships the lines: see --help",
}


class ManualOption(NamedTuple):
    """One option of the manual."""

    name: str
    argument: str  # "<port>", or empty for a switch
    repeats: bool


def options_of(manual: str) -> Dict[str, ManualOption]:
    """Each spelling ("-p", "--port") -> the option, read from the manual's option lines."""
    table: Dict[str, ManualOption] = {}
    repeated = set(re.findall(r"(--[a-z-]+)=\S+?\.\.\.", manual))
    for short, name, argument in re.findall(r"^  +(?:(-\w),? )?(--[a-z-]+)(?:=(<\S+?>))?(?:  |$)", manual, re.M):
        option = ManualOption(name, argument, name in repeated)
        table.update({spelling: option for spelling in (short, name) if spelling})
    return table


def commands_of(manual: str) -> Tuple[str, ...]:
    """The commands of the manual's usage lines."""
    return tuple(dict.fromkeys(re.findall(r"^  tsproxy\.py ([a-z]+)\b", manual, re.M)))


def read(manual: str, args: Sequence[str], docopt: Callable[..., Dict[str, Any]]) -> Dict[str, Any]:
    """docopt's dictionary of a command line. UsageError with the one line to print."""
    normalized = normalize(manual, args)
    try:
        options = docopt(_excerpt(manual, normalized), normalized, default_help=False)
    except SystemExit:
        raise UsageError(unusable(manual, normalized)) from None
    return {**dict.fromkeys(commands_of(manual), False), **options, **_repeated(manual, normalized)}


def _excerpt(manual: str, normalized: Sequence[str]) -> str:
    """For relaying, the manual without the other usage lines: docopt multiplies them out, which takes 7 ms of a start."""
    if not all(arg.startswith("--") for arg in normalized) or normalized in (["--help"], ["--version"]):
        return manual
    ours = _usage(manual, (), [arg.partition("=")[0] for arg in normalized])
    others = {f"  {usage}" for usage in usages(manual) if usage != ours}
    return "\n".join(line for line in manual.split("\n") if line not in others)


def _repeated(manual: str, normalized: Sequence[str]) -> Dict[str, List[str]]:
    """The values of the options that repeat. docopt-ng 0.9 has some twice if several usage lines name the option."""
    given: Dict[str, List[str]] = {option.name: [] for option in options_of(manual).values() if option.repeats}
    for name, _, value in (arg.partition("=") for arg in normalized):
        if name in given:
            given[name].append(value)
    return given


def normalize(manual: str, args: Sequence[str]) -> List[str]:
    """The arguments with each option as "--name=value". UsageError with the one line to print.

    If --help or --version is among valid arguments, it is the only one in the result.
    """
    table, seen, normalized = options_of(manual), set(), []
    for arg, value in _options(table, list(args)):
        if arg == "":
            normalized.append(value or "")
            continue
        option = table[arg]
        if option.name in seen and not option.repeats:
            raise UsageError(f"{option.name}: given twice; allowed: once")
        seen.add(option.name)
        normalized.append(option.name if value is None else f"{option.name}={value}")
    for switch in ("--help", "--version"):
        if switch in seen:
            return [switch]
    _command(manual, table, normalized)
    return normalized


def _options(table: Dict[str, ManualOption], args: List[str]) -> Iterator[Tuple[str, str | None]]:
    """(spelling, value or None) for each option, ("", operand) for each operand."""
    while args:
        arg = args.pop(0)
        if arg == "--":
            yield from (("", _operand(remaining)) for remaining in args)
            return
        if arg.startswith("--"):
            yield _long(table, arg, args)
        elif arg.startswith("-") and arg != "-":
            yield from _short(table, arg, args)
        else:
            yield "", arg


def _operand(arg: str) -> str:
    """An argument after "--", which docopt would still parse as an option."""
    if arg.startswith("-") and arg != "-":
        raise UsageError(f"can't take {arg!r} after --; a path that begins with a dash may be given as {'./' + arg!r}")
    return arg


def _long(table: Dict[str, ManualOption], arg: str, args: List[str]) -> Tuple[str, str | None]:
    name, equals, value = arg.partition("=")
    if name not in table:
        raise UsageError(f"unknown option {name!r}{_did_you_mean(name, table)}")
    if not table[name].argument:
        if equals:
            raise UsageError(f"{name}: given {value!r}; allowed: no value (it is a switch)")
        return name, None
    return name, value if equals else _value(table[name], args)


def _short(table: Dict[str, ManualOption], arg: str, args: List[str]) -> Iterator[Tuple[str, str | None]]:
    """Short options may be combined, the last one with its value: -hV, -p8080."""
    remaining = arg[1:]
    while remaining:
        name, remaining = f"-{remaining[0]}", remaining[1:]
        if name not in table:
            within = f" in {arg!r}" if len(arg) > len(name) else ""
            raise UsageError(f"unknown option {name!r}{within}{_other_case(name, table)}")
        if table[name].argument:
            yield name, remaining or _value(table[name], args)
            return
        yield name, None


def _value(option: ManualOption, args: List[str]) -> str:
    if not args or args[0] == "--":
        raise UsageError(f"{option.name}: given nothing; allowed: {option.name}={option.argument}")
    return args.pop(0)


def _other_case(name: str, table: Dict[str, ManualOption]) -> str:
    other = name.swapcase()
    return f"; did you mean {other} or {table[other].name}?" if other in table else "; see --help"


def _unknown_command(manual: str, name: str, table: Dict[str, ManualOption]) -> UsageError:
    """What it may have been: an option that answers a question, a kind of set-up, or a command with a typing error."""
    if name in ("help", "version"):
        hint = f"; did you mean --{name}?"
    elif name in (*KINDS, *_alone(manual)):
        hint = f"; did you mean generate {name}?"
    else:
        hint = _did_you_mean(name, commands_of(manual))
    return UsageError(f"unknown command {name!r}{hint}")


def _alone(manual: str) -> List[str]:
    """What `generate` makes without options."""
    return [name for line in usages(manual) if " generate (" in line for name in re.findall(r"[(|]([a-z-]+)", line)]


def _did_you_mean(name: str, candidates: Dict[str, ManualOption] | Tuple[str, ...]) -> str:
    import difflib

    longer = [other for other in candidates if name.strip("-") and other.startswith(name)]
    close = longer or difflib.get_close_matches(name, list(candidates), 1, 0.7)
    return f"; did you mean {' or '.join(close)}?" if close else "; see --help"


def _command(manual: str, table: Dict[str, ManualOption], args: List[str]) -> None:
    """UsageError for errors on which docopt would print the whole usage text."""
    commands, operands = commands_of(manual), [arg for arg in args if not arg.startswith("--")]
    if operands and operands[0] not in commands:
        raise _unknown_command(manual, operands[0], table)
    given = [arg.partition("=")[0] for arg in args if arg.partition("=")[0] in table]
    usage = _usage(manual, operands, given)
    for name in given:
        if name not in allowed(manual, table, usage):
            raise UsageError(f"{name}: {_not_allowed(manual, operands, usage, name)}")
    operand = re.match(r"tsproxy\.py [a-z]+ ([A-Z]+)\b", usage)
    if operand and len(operands) == 1:
        raise UsageError(f"{operand[1]}: given nothing; allowed: {_OPERANDS[operand[1]]}")
    if " --target" in usage and "--target" not in given:
        raise UsageError("--target: given nothing; allowed: at least one, e.g. --target=exchange.example:443")


def _not_allowed(manual: str, operands: Sequence[str], usage: str, name: str) -> str:
    if " --routes=" in usage and f"{name}=" in _usage(manual, operands):  # which is the line with --target
        return "given with --routes; allowed: only in the file, for each route"
    return f"not an option of {operands[0] if operands else 'relaying'!r}; usage: {program.named(usage)}"


def _usage(manual: str, operands: Sequence[str], given: Sequence[str] = ()) -> str:
    """The usage line of the command; of several the one that names its second operand, --routes, or its first option."""
    given = sorted(given, key=lambda name: name != "--routes")
    lines = [
        line for line in usages(manual) if line.split()[1].startswith(operands[0] if operands else ("--target", "--routes"))
    ]
    by_operand = (line for line in lines if operands[1:] and operands[1] in re.findall(r"[(|]([a-z-]+)", line))
    return next(by_operand, max(lines, key=lambda line: [f"{name}=" in line for name in given]))


def allowed(manual: str, table: Dict[str, ManualOption], usage: str) -> Set[str]:
    """The options that a usage line allows: those it names and, for [options], those that no usage line names."""
    named = set(re.findall(r"--[a-z-]+", usage))
    if "[options]" not in usage:
        return named
    return named | (table.keys() - set(re.findall(r"--[a-z-]+", "".join(usages(manual)))))


def usages(manual: str) -> List[str]:
    return re.findall(r"^  (tsproxy\.py .*)$", manual, re.M)


def unusable(manual: str, args: Sequence[str]) -> str:
    """The one line for arguments that docopt still refused."""
    operands = [arg for arg in args if not arg.startswith("--")]
    given = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    return f"can't take {' '.join(operands) or 'these options'!r}; usage: {program.named(_usage(manual, operands, given))}"
