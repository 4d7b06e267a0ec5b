"""The command line, checked word by word against the manual before docopt reads it.

docopt takes any unambiguous prefix for an option and answers a mistake with the whole usage text. An operator
wants the exact name and one line. So the words are read here first, by the option table in the manual itself;
docopt then sees only what is known to be well formed.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

from _tsproxy.cli import program
from _tsproxy.cli.config import UsageError


class Known(NamedTuple):
    """One option of the manual."""

    name: str
    argument: str  # "<port>", or empty for a switch
    repeats: bool


def options_of(manual: str) -> Dict[str, Known]:
    """Each spelling ("-p", "--port") -> the option, read from the manual's option lines."""
    table: Dict[str, Known] = {}
    for short, name, argument in re.findall(r"^  +(?:(-\w),? )?(--[a-z-]+)(?:=(<\S+?>))?(?:  |$)", manual, re.M):
        known = Known(name, argument, re.search(rf"{name}=\S+?\.\.\.", manual) is not None)
        table.update({spelling: known for spelling in (short, name) if spelling})
    return table


def commands_of(manual: str) -> Tuple[str, ...]:
    """The commands of the manual's usage lines."""
    return tuple(dict.fromkeys(re.findall(r"^  tsproxy\.py ([a-z]+)\b", manual, re.M)))


def read(manual: str, words: Sequence[str], docopt: Callable[..., Dict[str, Any]]) -> Dict[str, Any]:
    """docopt's dictionary of a command line, or UsageError with the one line to print."""
    ready = normalize(manual, words)
    try:
        options = docopt(manual, ready, default_help=False)
    except SystemExit:
        raise UsageError(unfit(manual, ready)) from None
    return {**options, **_repeated(manual, ready)}


def _repeated(manual: str, ready: Sequence[str]) -> Dict[str, List[str]]:
    """The values of the options that repeat. docopt-ng 0.9 gives some twice where several usage lines name the option."""
    given: Dict[str, List[str]] = {known.name: [] for known in options_of(manual).values() if known.repeats}
    for name, _, value in (word.partition("=") for word in ready):
        if name in given:
            given[name].append(value)
    return given


def normalize(manual: str, words: Sequence[str]) -> List[str]:
    """The words with each option spelled "--name=value", or UsageError with the one line to print.

    Where --help or --version is among words that are sound, it is all that is left of them.
    """
    table, seen, out = options_of(manual), set(), []
    for word, value in _options(table, list(words)):
        if word == "":
            out.append(value or "")
            continue
        known = table[word]
        if known.name in seen and not known.repeats:
            raise UsageError(f"{known.name}: given twice; allowed: once")
        seen.add(known.name)
        out.append(known.name if value is None else f"{known.name}={value}")
    for question in ("--help", "--version"):
        if question in seen:
            return [question]
    _command(manual, table, out)
    return out


def _options(table: Dict[str, Known], words: List[str]) -> Iterator[Tuple[str, str | None]]:
    """(spelling, value or None) for each option, ("", word) for each other word."""
    while words:
        word = words.pop(0)
        if word == "--":
            yield from (("", _plain(rest)) for rest in words)
            return
        if word.startswith("--"):
            yield _long(table, word, words)
        elif word.startswith("-") and word != "-":
            yield from _short(table, word, words)
        else:
            yield "", word


def _plain(word: str) -> str:
    """A word behind "--". docopt would still read an option in it."""
    if word.startswith("-") and word != "-":
        raise UsageError(f"can't take {word!r} after --; a path that begins with a dash may be given as {'./' + word!r}")
    return word


def _long(table: Dict[str, Known], word: str, words: List[str]) -> Tuple[str, str | None]:
    name, equals, value = word.partition("=")
    if name not in table:
        raise UsageError(f"unknown option {name!r}{_did_you_mean(name, table)}")
    if not table[name].argument:
        if equals:
            raise UsageError(f"{name}: given {value!r}; allowed: no value (it is a switch)")
        return name, None
    return name, value if equals else _value(table[name], words)


def _short(table: Dict[str, Known], word: str, words: List[str]) -> Iterator[Tuple[str, str | None]]:
    """Short options may be run together, the last one with its value: -hV, -p8080."""
    rest = word[1:]
    while rest:
        name, rest = f"-{rest[0]}", rest[1:]
        if name not in table:
            raise UsageError(f"unknown option {name!r} in {word!r}; see --help")
        if table[name].argument:
            yield name, rest or _value(table[name], words)
            return
        yield name, None


def _value(known: Known, words: List[str]) -> str:
    if not words or words[0] == "--":
        raise UsageError(f"{known.name}: given nothing; allowed: {known.name}={known.argument}")
    return words.pop(0)


def _did_you_mean(name: str, candidates: Dict[str, Known] | Tuple[str, ...]) -> str:
    longer = [other for other in candidates if name.strip("-") and other.startswith(name)]
    close = longer or difflib.get_close_matches(name, list(candidates), 1, 0.7)
    return f"; did you mean {' or '.join(close)}?" if close else "; see --help"


def _command(manual: str, table: Dict[str, Known], words: List[str]) -> None:
    """The mistakes that docopt would answer with the whole usage text."""
    commands, plain = commands_of(manual), [word for word in words if not word.startswith("--")]
    if plain and plain[0] not in commands:
        raise UsageError(f"unknown command {plain[0]!r}{_did_you_mean(plain[0], commands)}")
    given = [word.partition("=")[0] for word in words if word.partition("=")[0] in table]
    usage = _usage(manual, plain, given)
    for name in given:
        if name not in taken(manual, table, usage):
            raise UsageError(f"{name}: not an option of {plain[0] if plain else 'relaying'!r}; usage: {program.named(usage)}")
    if " --target" in usage and "--target" not in given:
        raise UsageError("--target: given nothing; allowed: at least one, e.g. --target=exchange.example:443")


def _usage(manual: str, plain: Sequence[str], given: Sequence[str] = ()) -> str:
    """The usage line that is meant: the command's, or the one of those that names its second word or its first option."""
    lines = [line for line in usages(manual) if (plain[0] if plain else "--target") in line.split()[1]]
    by_word = (line for line in lines if plain[1:] and plain[1] in re.findall(r"[(|]([a-z-]+)", line))
    return next(by_word, max(lines, key=lambda line: [f"{name}=" in line for name in given]))


def taken(manual: str, table: Dict[str, Known], usage: str) -> Set[str]:
    """The options that a usage line takes: those it names and, for [options], those that no usage line names."""
    named = set(re.findall(r"--[a-z-]+", usage))
    if "[options]" not in usage:
        return named
    return named | (table.keys() - set(re.findall(r"--[a-z-]+", "".join(usages(manual)))))


def usages(manual: str) -> List[str]:
    return re.findall(r"^  (tsproxy\.py .*)$", manual, re.M)


def unfit(manual: str, words: Sequence[str]) -> str:
    """The one line for what docopt refused all the same."""
    plain = [word for word in words if not word.startswith("--")]
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return f"can't take {' '.join(plain) or 'these options'!r}; usage: {program.named(_usage(manual, plain, given))}"
