"""YAML as a tree of plain values that know their place, so that an error can point at it.

A file is parsed to events and the tree is built here, by the core schema of YAML 1.2: ``null``,
``true`` and ``false``, numbers (``1e-5`` too), texts. No tag makes an object of anything, ``on`` and
``12:30`` stay texts, a key stands once in its mapping, and aliases can neither run in circles nor
grow without end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.errors import Error, FormatError, did_you_mean

MOST_NODES = 1_000_000
"""Values in a document, aliases counted as often as they are used."""
DEEPEST = 100

_INTEGER = re.compile(r"[-+]?[0-9]+$")
_PREFIXED = re.compile(r"0o[0-7]+$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)$")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


@dataclass(frozen=True)
class Node:
    """A value with its place: a plain value, ``list[Node]``, or ``dict[key, Node]``. Lines and columns count from 1."""

    value: Any
    line: int = 1
    column: int = 1
    file: str = ""
    keys: Mapping[Any, Node] = field(default_factory=dict, repr=False, compare=False)
    """Where the keys of a mapping stand."""

    def at(self, key: Any) -> Node:
        """The key itself, with its place; where that is not known, the place of its value or of the mapping."""
        if key in self.keys:
            return self.keys[key]
        near = self.value.get(key) if isinstance(self.value, Mapping) else None
        near = near if isinstance(near, Node) else self
        return Node(key, near.line, near.column, near.file)

    def error(self, message: str) -> Error:
        """``file:line:column: message``, to be raised."""
        return Error(f"{self.file}:{self.line}:{self.column}: {' '.join(message.splitlines())}")


def load(text: str | bytes, name: str = "<text>") -> list[Node]:
    """The documents of a YAML text; ``name`` is the file that errors speak of.

    >>> [document] = load("density: 0.5\\nmodels: [a, b]", "soup.yaml")
    >>> document.value["models"].line, plain(document)
    (2, {'density': 0.5, 'models': ['a', 'b']})

    Raises:
        Error: no YAML, a key that stands twice, a tag, an alias without its anchor or within it.
    """
    import yaml

    try:
        return _Builder(yaml.parse(text, Loader=yaml.BaseLoader), name).documents()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces" if "\\t" in said else ""
        raise FormatError(f"{place}: {said}{hint}") from None
    except yaml.reader.ReaderError as error:
        before = (text if isinstance(text, str) else text.decode(errors="replace"))[: error.position]
        line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
        shown = error.character if isinstance(error.character, int) else ord(error.character[:1])
        raise FormatError(f"{name}:{line}:{column}: the character #x{shown:02x} is not allowed") from None
    except yaml.YAMLError as error:
        raise FormatError(f"{name}: {' '.join(str(error).split())}") from None


def plain(node: Node) -> Any:
    """The value without its places, all the way down."""
    if isinstance(node.value, Mapping):
        return {key: plain(value) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [plain(value) for value in node.value]
    return node.value


def scalar(text: str) -> Any:
    """What a word without quotes stands for.

    >>> [scalar(word) for word in ("1e-5", "0x10", "true", "yes", "~", "a/b")]
    [1e-05, 16, True, 'yes', None, 'a/b']
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text) and len(text) <= 4000:  # longer ones Python refuses
        return int(text)
    if _PREFIXED.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _INFINITE.match(text):
        return -math.inf if text.startswith("-") else math.inf
    return text


class _Builder:
    """Events to nodes."""

    def __init__(self, events: Iterator[Any], file: str):
        self.events = events
        self.file = file
        self.anchors: dict[str, Node | None] = {}
        self.sizes: dict[int, int] = {}  # nodes under a node that has an anchor

    def documents(self) -> list[Node]:
        found: list[Node] = []
        for event in self.events:
            if type(event).__name__ == "DocumentStartEvent":
                self.anchors, self.sizes = {}, {}
                found.append(self.node(next(self.events), 0)[0])
        return found

    def node(self, event: Any, depth: int) -> tuple[Node, int]:
        """The node that begins with an event, and how many nodes it counts for."""
        here = Node(None, event.start_mark.line + 1, event.start_mark.column + 1, self.file)
        kind, anchor = type(event).__name__, event.anchor
        if kind == "AliasEvent":
            return self.alias(anchor, here)
        if depth > DEEPEST:
            raise here.error(f"nested more than {DEEPEST} deep")
        tag = event.tag
        if tag not in (None, "!") and not (tag == "tag:yaml.org,2002:str" and kind == "ScalarEvent"):
            raise here.error(f"the tag {tag!r} is not supported: only plain values are")
        if anchor:
            self.anchors[anchor] = None  # not whole yet
        if kind == "ScalarEvent":
            is_plain = event.style is None and tag is None
            made, size = Node(scalar(event.value) if is_plain else event.value, here.line, here.column, self.file), 1
        elif kind == "SequenceStartEvent":
            made, size = self.sequence(here, depth)
        else:
            made, size = self.mapping(here, depth)
        if size > MOST_NODES:
            raise here.error(f"more than {MOST_NODES} values")
        if anchor:
            self.anchors[anchor] = made
            self.sizes[id(made)] = size
        return made, size

    def alias(self, anchor: str, here: Node) -> tuple[Node, int]:
        if anchor not in self.anchors:
            raise here.error(f"no anchor &{anchor} before this{did_you_mean(anchor, self.anchors)}")
        made = self.anchors[anchor]
        if made is None:
            raise here.error(f"the alias *{anchor} stands inside of what it names")
        return made, self.sizes[id(made)]

    def sequence(self, here: Node, depth: int) -> tuple[Node, int]:
        items, size = [], 1
        while type(event := next(self.events)).__name__ != "SequenceEndEvent":
            item, count = self.node(event, depth + 1)
            items.append(item)
            size += count
        return Node(items, here.line, here.column, self.file), size

    def mapping(self, here: Node, depth: int) -> tuple[Node, int]:
        values: dict[Any, Node] = {}
        keys: dict[Any, Node] = {}
        merged: list[Node] = []
        size = 1
        while type(event := next(self.events)).__name__ != "MappingEndEvent":
            merging = getattr(event, "value", None) == "<<" and event.style is None
            key, _ = self.node(event, depth + 1)
            value, count = self.node(next(self.events), depth + 1)
            size += count + 1
            if isinstance(key.value, list | Mapping):
                raise key.error("a key must be a plain value")
            if merging:
                merged += value.value if isinstance(value.value, list) else [value]
                continue
            if key.value in values:
                first = keys[key.value]
                raise key.error(f"the key {key.value!r} is there already, at {first.line}:{first.column}")
            values[key.value], keys[key.value] = value, key
        for other in merged:  # its own keys come first, then those of the first mapping
            if not isinstance(other.value, Mapping):
                raise other.error("<< needs a mapping or a list of mappings")
            values |= {key: value for key, value in other.value.items() if key not in values}
            keys |= {key: value for key, value in other.keys.items() if key not in keys}
        return Node(values, here.line, here.column, self.file, keys), size
