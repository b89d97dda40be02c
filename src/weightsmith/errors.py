"""What weightsmith raises: every error says what was wrong, where, and what to do.

All derive from `Error`, which is a `ValueError`, so both ``except weightsmith.Error`` and the
standard idiom catch them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(ValueError):
    """Something a caller can put right: a wrong option, shape, name or path."""


class FormatError(Error):
    """A file is not what it says it is: truncated, overlapping, lying or unsafe."""


class OutputError(Error):
    """An output cannot be written: it exists, it is an input, another process holds it, or no space."""


class MissingPackage(Error, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


def missing(package: str, extra: str, purpose: str) -> MissingPackage:
    """The error for an optional package that is not installed."""
    return MissingPackage(f'{purpose} needs the package {package}: pip install "weightsmith[{extra}]"')


def told(error: BaseException) -> str:
    """An error of somebody else's, with its kind, for a message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(names: Iterable[str], most: int = 5) -> str:
    """A few names for a message, with the count of those left out."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
