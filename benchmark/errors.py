"""Errors for people: one line each, what was wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend. The command line prints it without a traceback and exits with code 2."""


class Notice(UserWarning):
    """Something that the user should know and that stops nothing. The command line prints it as one line on standard error."""


class UserErrors(UserError):
    """Several at once, so that one look at the output mends a whole config."""

    def __init__(self, messages: Iterable[str]):
        self.messages = list(messages)
        super().__init__("\n".join(self.messages))


def nearest(word: object, choices: Iterable[str], all_below: int = 20) -> str:
    """What to say after an unknown name: the nearest valid one, and all of them where they are few.

    >>> nearest("gdqf", ["gdfq", "round"])
    "did you mean 'gdfq'? known: gdfq, round"
    """
    names = sorted(choices)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    said = [f"did you mean {close[0]!r}?"] if close else []
    if len(names) < all_below:
        said.append("known: " + ", ".join(names) if names else "none is known")
    return " ".join(said) or f"{len(names)} are known"


def counted(number: int, word: str) -> str:
    """`1 job`, `2 jobs`, `2 processes`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith('s') else 's'}"
