"""Files of mergekit-moe: dense models that become the experts of a sparse one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightsmith import adapt
from weightsmith.recipe._mergekit_schema import read_reference
from weightsmith.recipe._yaml import Node, plain
from weightsmith.weights import Weights, open


@dataclass
class Mixture:
    """What such a file asks for; read like a `Plan`."""

    node: Node
    paths: Mapping[str, str]
    """Where models and adapters are, by what the file calls them."""
    warnings: list[str] = field(default_factory=list)

    @property
    def references(self) -> tuple[str, ...]:
        """The models, as the file calls them."""
        return tuple(dict.fromkeys(str(read_reference(one)) for one in _models(self.node)))

    def build(self) -> Weights:
        """The mixture. Gates by hidden states or embeddings read the base now; everything else is lazy."""
        from weightsmith.merge.moe import assemble_document

        try:
            return assemble_document(plain(self.node), self._opened)
        except ValueError as error:
            key = str(error).partition(":")[0].partition("[")[0]  # what it speaks of, if it is a key of the file
            raise self.node.value.get(key, self.node).error(str(error)) from None

    def explain(self) -> list[Any]:
        """Nothing is done to any tensor but to rename it."""
        return []

    def _opened(self, called: Any) -> Weights:
        one = read_reference(_as_node(called, self.node))
        model = open(self.paths[one.path])
        return model if one.lora is None else adapt.apply(model, self.paths[one.lora], tied="keep")


def read(node: Node, resolve: Callable[[str], str]) -> Mixture:
    """The plan of a document with ``experts``. No weights are opened.

    Raises:
        Error: a model that is not there, with line and column.
    """
    paths: dict[str, str] = {}
    for one in _models(node):
        reference = read_reference(one)
        for name in (reference.path, reference.lora):
            if name is not None and name not in paths:
                try:
                    paths[name] = resolve(name)
                except ValueError as error:
                    raise one.error(str(error)) from None
    return Mixture(node, paths)


def _models(node: Node) -> list[Node]:
    """The places where the document names a model."""
    found = [node.value["base_model"]] if "base_model" in node.value else []
    for key in ("experts", "shared_experts"):
        entries = node.value.get(key)
        if entries is not None and not isinstance(entries.value, list) and entries.value is not None:
            raise entries.error(f"{key}: must be a list of models with their prompts")
        for entry in (entries.value or []) if entries is not None else []:
            if not isinstance(entry.value, Mapping) or "source_model" not in entry.value:
                raise entry.error(f"an entry of {key} needs source_model:")
            found.append(entry.value["source_model"])
    return found


def _as_node(value: Any, near: Node) -> Node:
    """A plain value as a node again, all at one place."""
    if isinstance(value, Mapping):
        return replace(near, value={key: _as_node(inner, near) for key, inner in value.items()}, keys={})
    if isinstance(value, list):
        return replace(near, value=[_as_node(inner, near) for inner in value], keys={})
    return replace(near, value=value, keys={})
