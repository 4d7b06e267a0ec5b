"""`generate completion`: which words may follow which, for bash and zsh, made of the manual and of what the options take.

Knows the manual's usage lines. Knows nothing of how a shell asks for words: that is in the template.
"""

from __future__ import annotations

import re
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

from _tsproxy.cli import config, parser
from _tsproxy.tools.generate import templates

_FILE = "FILE"  # what the template takes for any file's name
_NO_VALUE = "?"


def text(manual: str, kinds: Sequence[str]) -> str:
    """The script; `kinds` are what the manual calls KIND."""
    after = _after(manual, kinds)
    words = dict.fromkeys(word for given in after for word in given.split())
    arms = {"VALUES": _arms(_values(manual)), "GIVEN": _arms((f"'{given}'", words) for given, words in after.items())}
    return templates.fill("completion.bash", WORDS=" | ".join(words), **arms)


def _arms(cases: Iterable[Tuple[str, List[str]]]) -> str:
    """Of the shell's `case`: (pattern, words), those with the same words together."""
    patterns: Dict[str, List[str]] = {}
    for pattern, words in cases:
        patterns.setdefault(" ".join(dict.fromkeys(words)), []).append(pattern)
    return "\n".join(f"{' | '.join(same)}) words='{words}' ;;" for words, same in patterns.items())


def _after(manual: str, kinds: Sequence[str]) -> Dict[str, List[str]]:
    """The command and its kind, as far as they are given -> the words that may come next."""
    table = parser.options_of(manual)
    after: Dict[str, List[str]] = {"": list(parser.commands_of(manual))}
    for usage in parser.usages(manual):
        command, *rest = usage.split()[1:]
        taken = parser.allowed(manual, table, usage)
        options = [name for name in table if name.startswith("--") and name in taken]
        if not command.isalpha():
            after[""] += options
        elif command != "generate":
            after.setdefault(command, []).extend([_FILE] * bool({"FILE", "[FILE]", "FILE...", "OUT"} & set(rest)) + options)
        else:
            named = re.findall(r"[a-z-]+", rest[0]) or kinds
            after.setdefault(command, []).extend(named)
            for kind in named:
                after.setdefault(f"{command} {kind}", []).extend(options)
    return after


def _values(manual: str) -> Iterator[Tuple[str, List[str]]]:
    """Each spelling of an option that takes a value, and the words that it takes, as far as they are few."""
    for spelling, known in parser.options_of(manual).items():
        if known.argument:
            yield spelling, [_FILE] if known.argument == "<file>" else _choices(known.name)


def _choices(name: str) -> List[str]:
    """What the option says that it takes when it is given what it does not."""
    try:
        config.OPTIONS[name].parse(name, _NO_VALUE)
    except config.UsageError as refusal:
        allowed = re.search(r"allowed: ([a-z]+(?: or [a-z]+)+)$", str(refusal))
        return allowed[1].split(" or ") if allowed else []
    except KeyError:  # it repeats: an address or a network
        pass
    return []
