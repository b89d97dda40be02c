"""Which tensors of several models are merged, and where the others come from.

Models of one architecture have the same tensors in the same shapes. Where they do not (another
vocabulary, another head, one model tied and the other not), a caller says what becomes of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.errors import Error, listed
from weightsmith.weights import Lazy, Pattern, Weights, dtype_name, same_names
from weightsmith.weights._files import Bytes, content_of

Rest = Literal["error", "base", "first", "drop"]
"""What becomes of tensors that not all have in one shape."""

HEADS: Pattern = ("lm_head.weight", "*.lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS: Pattern = (
    "*embed_tokens.weight",
    "*wte.weight",
    "*word_embeddings.weight",
    "*tok_embeddings.weight",
    "*embed_in.weight",
)
"""How the two matrices are called that ``tie_word_embeddings`` in a ``config.json`` speaks of."""

_CONFIG = "config.json"
_WORD = "tie_word_embeddings"


def check_alike(models: Sequence[Weights], base: Weights | None, method: str, hint: str = "") -> None:
    """Models of one architecture, or an error that says which tensors differ and how."""
    named = [(f"model {number + 1}", model) for number, model in enumerate(models)]
    named += [("the base", base)] if base is not None else []
    first = models[0]
    for who, other in named[1:]:
        try:
            same_names(first, other, f"{method}: model 1 and {who} must have the same tensors")
        except Error as error:
            raise Error(f"{error}{hint}") from None
        wrong = [
            f"{name} {list(first.spec(name).shape)} against {list(other.spec(name).shape)}"
            for name in first
            if first.spec(name).shape != other.spec(name).shape
        ]
        if wrong:
            raise Error(f"{method}: model 1 and {who} differ in shape: {listed(wrong)}{hint}")
        wrong = [
            f"{name} {dtype_name(first.spec(name).dtype)} against {dtype_name(other.spec(name).dtype)}"
            for name in first
            if _kind(first, name) != _kind(other, name)
        ]
        if wrong:
            raise Error(f"{method}: model 1 and {who} differ in whether they hold floats: {listed(wrong)}{hint}")


@dataclass(frozen=True)
class Matched:
    """What is merged, and the rest."""

    models: list[Weights]
    """Their common tensors, in one order."""
    base: Weights | None
    rest: dict[str, Lazy]
    order: list[str]

    def whole(self, merged: Weights) -> Weights:
        """The merged tensors and the rest, in the order of the first model."""
        if not self.rest and list(merged) == self.order:
            return merged
        nodes = {name: self.rest[name] if name in self.rest else merged.node(name) for name in self.order}
        return Weights(nodes, merged.lineage, merged.files, merged.metadata)


def matched(models: Sequence[Weights], base: Weights | None, used: bool, rest: Rest, method: str) -> Matched:
    """Part the tensors into those that are merged and the others, by ``rest``.

    Args:
        models, base: as they were given; ties by configuration are known already (`with_ties`).
        used: the method reads the base, so a tensor without one cannot be merged.
        rest: see `Rest`.
        method: for messages.
    """
    if rest not in ("error", "base", "first", "drop"):
        raise Error(f"{method}: rest must be 'error', 'base', 'first' or 'drop', got {rest!r}")
    if rest == "error":
        check_alike(models, base, method, "; or say with rest='base', 'first' or 'drop' what becomes of such tensors")
        return Matched(list(models), base, {}, list(models[0]))
    if rest == "base" and base is None:
        raise Error(f"{method}: rest='base' takes what does not match from the base; give base=, or rest='first'")
    judges = [*models, *([base] if base is not None and used else [])]
    sources = [*models, *([base] if base is not None else [])]
    common, others = [], {}
    for name in dict.fromkeys(name for source in sources for name in source):
        if all(name in judge for judge in judges) and len({_kind(judge, name) for judge in judges}) == 1:
            common.append(name)
            continue
        givers = {"base": sources[-1:], "first": sources, "drop": []}[rest]
        giver = next((giver for giver in givers if name in giver), None)
        if giver is not None:
            others[name] = giver.node(name)
    if not common:
        raise Error(f"{method}: there is no tensor that all models have in one shape; model 1 has {listed(models[0])}")
    order = list(dict.fromkeys(name for source in sources for name in source))
    kept = set(common) | others.keys()
    origin = None if base is None else _only(base, [name for name in common if _fits(base, models[0], name)])
    return Matched([_only(m, common) for m in models], origin, others, [name for name in order if name in kept])


def _kind(weights: Weights, name: str) -> tuple[tuple[int, ...], bool]:
    spec = weights.spec(name)
    return spec.shape, spec.dtype.is_floating_point


def _fits(base: Weights, model: Weights, name: str) -> bool:
    return name in base and _kind(base, name) == _kind(model, name)


def _only(weights: Weights, names: Sequence[str]) -> Weights:
    if list(weights) == list(names):
        return weights
    return Weights({n: weights.node(n) for n in names}, weights.lineage, weights.files, weights.metadata)


# Tied embeddings


def with_ties(models: Sequence[Weights]) -> list[Weights]:
    """The models, where one that lacks the head which others have gets its embedding for it, if it says it is tied.

    A checkpoint with tied embeddings stores them once, and its ``config.json`` says so.
    """
    heads = {name: _kind(model, name) for model in models for name in model.names(HEADS)}
    return [_with_head(model, heads) for model in models]


def _with_head(model: Weights, heads: Mapping[str, tuple[tuple[int, ...], bool]]) -> Weights:
    nodes: dict[str, Lazy] = {}
    for head, kind in heads.items():
        if head not in model and _says_tied(model) is not False:
            found = [name for name in model.names(EMBEDDINGS) if _kind(model, name) == kind]
            if len(found) == 1:
                nodes[head] = model.node(found[0])
    if not nodes:
        return model
    return Weights({n: model.node(n) for n in model} | nodes, model.lineage, model.files, model.metadata)


def with_config(merged: Weights, inputs: Sequence[Weights]) -> Weights:
    """The merged weights with a ``config.json`` that says of tied embeddings what is true of them now."""
    config = _config(merged.files)
    pairs = [(head, name) for head in merged.names(HEADS) for name in merged.names(EMBEDDINGS)]
    pairs = [(head, name) for head, name in pairs if merged.spec(head).shape == merged.spec(name).shape]
    if config is None or len(pairs) != 1:
        return merged
    (head, name) = pairs[0]
    tied = merged.node(head) is merged.node(name)
    said = _says_tied(merged)
    if said is None:  # what is the rule then depends on the kind of model: trust those that came in tied
        said = any(head in one and name in one and one.node(head) is one.node(name) for one in inputs) or tied
    if said == tied:
        return merged
    inner = config.get("text_config")
    for part in (config, *([inner] if isinstance(inner, dict) and _WORD in inner else [])):
        part[_WORD] = tied
    return merged.with_files({_CONFIG: (json.dumps(config, indent=2) + "\n").encode()})


def _says_tied(weights: Weights) -> bool | None:
    config = _config(weights.files) or {}
    inner = config.get("text_config")
    said = config.get(_WORD, inner.get(_WORD) if isinstance(inner, dict) else None)
    return said if isinstance(said, bool) else None


def _config(files: Mapping[str, bytes | Bytes]) -> dict[str, Any] | None:
    """The configuration among the files, or None where there is none that can be read."""
    raw = files.get(_CONFIG)
    if raw is None:
        return None
    try:
        found = json.loads(content_of(raw))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
