"""A file to a recipe: one of ours, or one that was written for mergekit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith.errors import Error
from weightsmith.recipe._schema import Recipe, setting, with_settings
from weightsmith.recipe._schema import read as read_document
from weightsmith.recipe._yaml import Node, load
from weightsmith.weights import Weights

LARGEST = 10_000_000
"""Bytes; no recipe is larger."""


@dataclass(frozen=True)
class Foreign:
    """A mergekit file: what it makes goes where the caller says."""

    name: str
    text: str
    plan: Any

    @property
    def warnings(self) -> list[str]:
        """What is unusual in it, and what is done about it."""
        return list(self.plan.warnings)

    def build(self) -> Weights:
        """The merged weights, lazily."""
        return self.plan.build()


def read(
    source: str | os.PathLike[str],
    settings: Iterable[str] = (),
    sweep: Iterable[str] = (),
) -> Recipe | Foreign:
    """A recipe from a YAML file. No weights are opened.

    Args:
        source: the file.
        settings: other values, as ``step.option=value``.
        sweep: lists of values, as ``step.option=[0.2, 0.5]`` or ``step.option=0.2,0.5``.

    Raises:
        Error: what is wrong with it, with line and column.
    """
    path = os.fspath(source)
    text = _text(path)
    documents = load(text, path)
    if not documents:
        raise Error(f"{path}:1:1: is empty; a recipe has inputs:, steps: and save:")
    given = [setting(one) for one in settings]
    swept = [setting(one, "--sweep") for one in sweep]
    if not any(isinstance(document.value, Mapping) and "inputs" in document.value for document in documents):
        from weightsmith.recipe import _mergekit

        if any(_mergekit.is_mergekit(document) for document in documents):
            if swept:
                raise swept[0][1].error("files of mergekit cannot be swept; write a recipe with inputs: and steps:")
            documents = [*documents[:-1], with_values(documents[-1], given)]
            return Foreign(path, text, _mergekit.read(documents, _mergekit.resolve))
    if len(documents) > 1:
        raise documents[1].error("a recipe is one document; this is a second one")
    document = with_settings(documents[0], given)
    for key, value in swept:
        document = with_values(document, [("sweep", _with(document, key, _listed(value)))])
    return read_document(document)


def _text(path: str) -> str:
    try:
        size = os.path.getsize(path)
        if size > LARGEST:
            raise Error(f"{path}: {size:,} bytes are too many for a recipe")
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start].rpartition(b"\n")
        line, column = error.object.count(b"\n", 0, error.start) + 1, len(before[2]) + 1
        raise Error(f"{path}:{line}:{column}: is not a text in UTF-8; save it as one") from None


def with_values(document: Node, given: Iterable[tuple[str, Node]]) -> Node:
    """The document with other values at ``section.key`` places, whatever its sections are."""
    for key, value in given:
        document = _at(document, key.split("."), value)
    return document


def _at(node: Node, place: list[str], value: Node) -> Node:
    if not place:
        return value
    inner = node.value if isinstance(node.value, Mapping) else {}
    child = inner.get(place[0], Node(None, value.line, value.column, value.file))
    return replace(node, value={**inner, place[0]: _at(child, place[1:], value)})


def _with(document: Node, key: str, values: Node) -> Node:
    """The ``sweep`` section with one more entry."""
    inner = document.value.get("sweep") if isinstance(document.value, Mapping) else None
    known = inner.value if inner is not None and isinstance(inner.value, Mapping) else {}
    return Node({**known, key: values}, values.line, values.column, values.file)


def _listed(node: Node) -> Node:
    """``0.2,0.5`` is read as a text; it means a list."""
    if isinstance(node.value, str) and "," in node.value:
        (made,) = load(f"[{node.value}]", node.file)
        return made
    return node if isinstance(node.value, list) else replace(node, value=[node])
