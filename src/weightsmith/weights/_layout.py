"""What a format tells the writer before a byte is written: which files, how long, what goes where.

A format that knows its tensors' specs can lay out its files in advance. Tensors are then written
straight to their places, in any order, by any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith.weights._files import Bytes
from weightsmith.weights._lazy import Lazy


@dataclass
class Contents:
    """What a reader found in a file or folder, with nothing read but headers.

    Names that share a node are tied. ``files`` are what travels beside the tensors (config,
    tokenizer, licence), by relative path.
    """

    nodes: dict[str, Lazy]
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes | Bytes] = field(default_factory=dict)


@dataclass
class OutFile:
    """A file to be: its length, and the bytes that are known now (headers, directories) by offset."""

    name: str
    size: int
    fixed: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass
class Layout:
    """Where everything goes.

    Args:
        files: the files that hold tensors.
        places: tensor name -> (index into ``files``, offset of its little-endian values).
        small: small whole files written beside them (an index), by relative path.
        finish: called with the folder once every value stands in its place, for what depends on
            the values (checksums). Must be repeatable.
    """

    files: list[OutFile]
    places: dict[str, tuple[int, int]]
    small: dict[str, bytes] = field(default_factory=dict)
    finish: Callable[[Path], None] | None = None
