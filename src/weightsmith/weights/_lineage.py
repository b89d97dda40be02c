"""Where weights come from: the tree of steps that made them, down to the files.

The tree is written into the output, so that a checkpoint can always say what it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith._version import __version__
from weightsmith.weights._files import Bytes, read_bytes

KEY = "weightsmith.lineage"
"""Under this word the tree stands in a file's metadata."""

MOST_STEPS, DEEPEST = 1000, 100
"""Steps of a tree, and levels, that are recorded."""

SAMPLES, SAMPLE = 32, 4096  # places and bytes per place that a digest looks at

LONGEST = 1_000_000  # characters; a longer tree loses its deepest levels


@dataclass(frozen=True, repr=False)
class Step:
    """One step: a method or an ``open``, its settings, and the steps it started from."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Step, ...] = ()
    files: tuple[Bytes, ...] = ()
    past: Mapping[str, Any] | None = None
    """What a file that was opened said of itself."""

    def record(self) -> dict[str, Any]:
        """The tree as JSON-able data, with a digest of every input file. A very large tree is cut short."""
        return self._record(0, [MOST_STEPS], {})

    def _record(self, depth: int, left: list[int], digests: dict[int, str]) -> dict[str, Any]:
        left[0] -= 1
        record: dict[str, Any] = {"method": self.method}
        if self.options:
            record["options"] = {name: _plain(value) for name, value in self.options.items()}
        if self.files:
            for file in self.files:
                if id(file) not in digests:
                    digests[id(file)] = digest(file)
            record["digest"] = {file.name.rsplit("/", 1)[-1]: digests[id(file)] for file in self.files}
        if self.past:
            record["made"] = dict(self.past)
        if self.inputs and (depth >= DEEPEST or left[0] < len(self.inputs)):
            record["inputs"] = [{"method": "..."}]  # a loop of arithmetic: the steps would outgrow the weights
        elif self.inputs:
            record["inputs"] = [step._record(depth + 1, left, digests) for step in self.inputs]
        return record

    def all_files(self) -> list[Bytes]:
        """Every file that something was read from, in the order of the tree."""
        found: dict[int, Bytes] = {}
        todo: list[Step] = [self]
        seen: set[int] = set()
        while todo:
            step = todo.pop()
            if id(step) not in seen:
                seen.add(id(step))
                found |= {id(file): file for file in step.files}
                todo.extend(reversed(step.inputs))
        return list(found.values())

    def __str__(self) -> str:
        return "\n".join(lines(self.record()))

    def __repr__(self) -> str:
        # The tree is not written out: steps may be shared so often that it has no end.
        return f"<Step {self.method} of {len(self.inputs)} inputs>"


def lines(record: Mapping[str, Any], indent: int = 0) -> list[str]:
    """A recorded tree for people, one line a step."""
    found = record.get("options")
    options = ", ".join(
        f"{name}={_short(value)}" for name, value in (found if isinstance(found, Mapping) else {}).items()
    )
    text = ["  " * indent + f"{record.get('method', '?')}({options})"]
    inputs = record.get("inputs")
    for inner in [record.get("made"), *(inputs if isinstance(inputs, list | tuple) else ())]:
        if isinstance(inner, Mapping) and indent < DEEPEST:
            text += lines(inner, indent + 1)
    return text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def digest(file: Bytes) -> str:
    """A short fingerprint of a file: its size and evenly spaced samples. Tells siblings apart, proves nothing."""
    total = hashlib.blake2b(str(file.size).encode(), digest_size=12)
    step = max(file.size // SAMPLES, 1)
    for offset in range(0, file.size, step):
        total.update(read_bytes(file, offset, min(SAMPLE, file.size - offset)))
    return total.hexdigest()


def written(step: Step) -> dict[str, str]:
    """The words that carry a lineage in a file's metadata."""
    tree = step.record() | {"weightsmith": __version__}
    for levels in (DEEPEST, DEEPEST // 2, DEEPEST // 4, 10, 5, 3):
        text = json.dumps(_cut(tree, levels), separators=(",", ":"))
        if len(text) <= LONGEST:
            return {KEY: text}
    return {KEY: json.dumps({"method": step.method, "weightsmith": __version__})}


_LEFT_OUT = "..."


def _cut(tree: Any, levels: int) -> Any:
    """A copy of JSON-able data that goes no deeper than ``levels``."""
    if isinstance(tree, Mapping):
        return {name: _cut(value, levels - 1) for name, value in tree.items()} if levels > 0 else _LEFT_OUT
    if isinstance(tree, list | tuple):
        return [_cut(value, levels - 1) for value in tree] if levels > 0 else _LEFT_OUT
    return tree


def parsed(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The tree that a file's metadata carries, or None if there is none that can be read."""
    try:
        tree = json.loads(metadata.get(KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("method"), str) else None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")
