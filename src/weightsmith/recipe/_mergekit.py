"""Files that were written for mergekit, run as they are.

A file is one merge, or several documents of which one without a name is the last and the others are
its inputs. Every key is checked before a model is opened: what is misspelt is warned of, what
cannot be done is an error with line and column. The result is one lazy `Weights`, whatever the
number of documents: nothing is written in between.

Where mergekit leaves it to chance we do not: without a base model, the configuration and the
tokenizer come from the first model of the file. Beyond mergekit, filters may be patterns
(``*.mlp.*``, ``re:layers\\.[0-3]\\.``), and a merge may say ``seed:`` and ``nonfinite: allow``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightsmith.errors import Error, did_you_mean
from weightsmith.recipe import _mergekit_moe
from weightsmith.recipe._mergekit_build import assign, merged, prepared
from weightsmith.recipe._mergekit_methods import METHODS
from weightsmith.recipe._mergekit_moe import Mixture
from weightsmith.recipe._mergekit_schema import (
    EVOLVE_KEYS,
    MOE_KEYS,
    Document,
    Reference,
    read_document,
    resolve,
)
from weightsmith.recipe._yaml import Node
from weightsmith.weights import Weights, open

__all__ = ["Plan", "Row", "is_mergekit", "read", "resolve"]


@dataclass(frozen=True)
class Row:
    """How one tensor is made."""

    document: str | None
    """The name of the merge it belongs to; None for the last."""
    name: str
    method: str
    sources: tuple[str, ...]
    """``model: tensor``; the base, if there is one, is marked."""
    parameters: Mapping[str, Any]
    """By mergekit's names; those of which every model has one as ``{model: value}``."""


@dataclass
class Plan:
    """What a file asks for, checked and not yet built."""

    last: Document
    named: Mapping[str, Document]
    """The other documents, by name."""
    paths: Mapping[str, str]
    """Where models and adapters are, by what the file calls them."""
    warnings: list[str] = field(default_factory=list)
    """What is unusual in the file; those about names of tensors come when it is built."""

    @property
    def references(self) -> tuple[str, ...]:
        """The models of all documents, as the file calls them."""
        every = [one for document in self._used() for one in document.references]
        return tuple(dict.fromkeys(str(one) for one in every if one.path not in self.named))

    def build(self) -> Weights:
        """The merged weights. Only headers are read.

        Raises:
            Error: what does not fit, with line and column.
        """
        return self._merged(self.last, {}, {})

    def explain(self) -> list[Row]:
        """How every tensor is made, in the order of the output; the documents before the last come first."""
        rows: list[Row] = []
        built: dict[str, Weights] = {}
        opened: dict[Reference, Weights] = {}
        for document in self._used():
            models = prepared(document, self._models(document, built, opened))
            name = None if document is self.last else document.name
            rows += [_row(name, document.method, entry) for entry in assign(document, models, self._warn).entries]
        return rows

    def _used(self) -> list[Document]:
        """The last document after those that it rests on."""
        found: list[Document] = []

        def visit(document: Document) -> None:
            for reference in document.references:
                if reference.path in self.named:
                    visit(self.named[reference.path])
            if document not in found:
                found.append(document)

        visit(self.last)
        return found

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def _merged(self, document: Document, built: dict[str, Weights], opened: dict[Reference, Weights]) -> Weights:
        return merged(document, self._models(document, built, opened), self._warn)

    def _models(
        self, document: Document, built: dict[str, Weights], opened: dict[Reference, Weights]
    ) -> dict[Reference, Weights]:
        for one in document.references:
            if one.path in self.named and one.path not in built:
                built[one.path] = self._merged(self.named[one.path], built, opened)
            if one not in opened:
                try:
                    model = built[one.path] if one.path in self.named else open(self.paths[one.path])
                    opened[one] = model if one.lora is None else _adapted(model, self.paths[one.lora])
                except ValueError as error:
                    raise one.node.error(str(error)) from None
        return {one: opened[one] for one in document.references}


def _row(document: str | None, method: str, entry: Any) -> Row:
    names = [str(reference) for reference, _ in entry.sources]
    sources = [
        f"{reference}: {name}{' (base)' if place == entry.base else ''}"
        for place, (reference, name) in enumerate(entry.sources)
    ]
    others = [name for place, name in enumerate(names) if place != entry.base]
    each = METHODS[method].each
    said = {
        key: dict(zip(others, value, strict=True)) if key in each and len(set(others)) == len(others) else value
        for key, value in entry.parameters.items()
    }
    return Row(document, entry.name, method, tuple(sources), said)


def _adapted(model: Weights, path: str) -> Weights:
    try:
        from weightsmith import adapt
    except ImportError:
        raise Error("adapters cannot be merged into models by this version of weightsmith") from None
    return adapt.apply(model, path, tied="keep")


# Reading


def is_mergekit(document: Node) -> bool:
    """Whether a document is one of mergekit's: a merge, a list of layers, a mixture of experts or a search."""
    keys = document.value if isinstance(document.value, Mapping) else {}
    return (
        "merge_method" in keys
        or "layer_slices" in keys
        or ("experts" in keys and bool({"base_model", "gate_mode"} & keys.keys()))
        or "genome" in keys
    )


def read(documents: Sequence[Node], resolve: Callable[[str], str] = resolve) -> Plan | Mixture:
    """A plan from the documents of a file. No weights are opened.

    Args:
        documents: of one file.
        resolve: from what the file calls a model to a path.

    Raises:
        Error: what is wrong with it, with line and column.
    """
    whole = [node for node in documents if node.value is not None]
    keys = whole[0].value if len(whole) == 1 and isinstance(whole[0].value, Mapping) else {}
    if "experts" in keys and "merge_method" not in keys:
        return _mergekit_moe.read(whole[0], resolve)
    warnings: list[str] = []
    read_ones = [_read_one(node, warnings.append) for node in documents if node.value is not None]
    if not read_ones:
        raise Error("there is no merge in this file")
    named: dict[str, Document] = {}
    unnamed = [document for document in read_ones if document.name is None]
    for document in read_ones:
        if document.name is not None:
            if document.name in named:
                raise document.node.value["name"].error(f"there is a merge named {document.name!r} already")
            named[document.name] = document
    if len(unnamed) > 1:
        raise unnamed[1].node.error(
            "two merges have no name:; only the last one has none, and the others are its inputs"
        )
    if not unnamed and len(named) > 1:
        raise read_ones[-1].node.error("all merges have a name:; the one that is to be the result must have none")
    last = unnamed[0] if unnamed else named.pop(read_ones[0].name or "")
    _check_order(last, named)
    plan = Plan(last, named, _paths(read_ones, named, resolve), warnings)
    used = plan._used()
    for document in named.values():
        if document not in used:
            node = document.node.value["name"]
            warnings.append(
                f"{node.file}:{node.line}:{node.column}: nothing uses the merge {document.name!r}; it is not made"
                f"{did_you_mean(str(document.name), plan.references)}"
            )
    return plan


def _read_one(node: Node, warn: Callable[[str], None]) -> Document:
    if not isinstance(node.value, Mapping):
        raise node.error("a merge must be a mapping of names to values")
    for key in EVOLVE_KEYS:
        if key in node.value:
            raise node.at(key).error(f"{key}: belongs to a search by mergekit-evolve; write a recipe with sweep:")
    if "layer_slices" in node.value and "merge_method" not in node.value:
        return read_document(_stacked(node), warn)
    if "merge_method" not in node.value:
        for key in MOE_KEYS:
            if key in node.value:
                raise node.at(key).error(
                    f"{key}: a mixture of experts stands alone in its file; it is no input of a merge"
                )
    return read_document(node, warn)


_LAYER_LIST = ("layer_slices", "embedding_source", "lm_head_source")
_LAYER_SLICE = ("model", "start", "end", "scale")
_SCALED = ("o_proj", "down_proj")
"""What a layer adds to the stream with."""


def _stacked(node: Node) -> Node:
    """A list of layers, as bakllama has it, as the merge that it stands for.

    ``scale`` is how much a layer adds to the stream. The embedding and the head may come from other models.
    """
    for key in node.value:
        if key not in _LAYER_LIST:
            raise node.at(key).error(f"a list of layers has no key {key!r}{did_you_mean(str(key), _LAYER_LIST)}")
    entries = node.value["layer_slices"]
    if not isinstance(entries.value, list) or not entries.value:
        raise entries.error("layer_slices: must be a list with at least one entry")

    def source(place: Node, model: Node, start: Node, stop: Node, scale: Node | None = None) -> Node:
        here = {"model": model, "layer_range": replace(place, value=[start, stop])}
        if scale is not None and scale.value is not None:
            rules = [replace(place, value={"filter": replace(place, value=name), "value": scale}) for name in _SCALED]
            rules.append(replace(place, value={"value": replace(place, value=1)}))
            here["parameters"] = replace(place, value={"scale": replace(place, value=rules)})
        return replace(place, value={"sources": replace(place, value=[replace(place, value=here)])})

    slices = []
    for entry in entries.value:
        given = entry.value if isinstance(entry.value, Mapping) else {}
        for key in given:
            if key not in _LAYER_SLICE:
                raise entry.at(key).error(f"an entry of layer_slices has no key {key!r}")
        for key in _LAYER_SLICE[:3]:
            if key not in given:
                raise entry.error(f"an entry of layer_slices needs {key}:")
        slices.append(source(entry, given["model"], given["start"], given["end"], given.get("scale")))
    for key, place in (("embedding_source", 0), ("lm_head_source", len(slices) + 1)):
        model = node.value.get(key)
        if model is not None and model.value is not None:
            none = replace(model, value=0)
            slices.insert(place, source(model, model, none, none))
    method = replace(node, value="passthrough")
    return replace(node, value={"merge_method": method, "slices": replace(entries, value=slices)})


def _check_order(last: Document, named: Mapping[str, Document]) -> None:
    """No merge rests on itself."""
    done: set[str] = set()

    def visit(document: Document, above: tuple[str, ...]) -> None:
        for reference in document.references:
            name = reference.path
            if name in above:
                raise reference.node.error(f"the merge {name!r} rests on itself: {' <- '.join((*above, name))}")
            if name in named and name not in done:
                visit(named[name], (*above, name))
                done.add(name)

    visit(last, ())
    for name, document in named.items():
        if name not in done:
            visit(document, (name,))


def _paths(
    documents: Iterable[Document], named: Mapping[str, Document], resolve: Callable[[str], str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for document in documents:
        for reference in document.references:
            for text in (reference.path, reference.lora):
                if text is None or text in found or text in named:
                    continue
                try:
                    found[text] = os.fspath(resolve(text))
                except Error as error:
                    raise reference.node.error(f"{error}{did_you_mean(text, named)}") from None
    return found
