"""A deeper or shallower model from layers of several.

Layers of a residual network read from one stream and add to it, so a layer still does much of its work
at another depth. Layers can be left out, repeated, or taken in turns from several models; what comes
out is trained on, as a rule.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge._match import EMBEDDINGS, HEADS, with_config, with_ties
from weightsmith.merge.room import Source
from weightsmith.weights import Lazy, Step, Weights, matches, open
from weightsmith.weights._files import Bytes, content_of

CONFIG = "config.json"

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_STEM = re.compile(r"emb|wte|wpe|stem|patch|tok_|cls_token|project_in|^conv1|^shared", re.IGNORECASE)
_HEAD = re.compile(r"embed_out|unembed|lm_head|output", re.IGNORECASE)
_VISION = re.compile(r"visi|visual|image")
_AUDIO = re.compile(r"audio|speech")
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
_DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")
_INDICES = re.compile(r"(mlp_only|moe|cross_attention|full_attn|full_attention|dense)_(layers|idxs|layer_ids|indices)$")


@card(
    paper="Kim et al. 2024, 'SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling'",
    unit="model",
    claim="trained on, a model with its middle layers doubled is better than one of its old depth",
    departs="any layers of any models; the paper stacks the first and the last three quarters of one",
)
def stack(
    slices: Sequence[tuple[Source, Sequence[int]]],
    *,
    prefix: str | None = None,
) -> Weights:
    r"""A model whose layers are those of others, by number.

    .. math:: w_{\text{layer } n} = w^{(j)}_{\text{layer } a_j + n - \sum_{i<j} (b_i - a_i)}

    for the slice :math:`j = (\text{model}, (a_j, b_j))` in which the layer :math:`n` lies: layers :math:`a_j` up to
    and without :math:`b_j`, numbered anew from 0. What stands before the layers (embeddings, a stem) comes from the
    model of the first slice, what stands after them (a norm, a head) from that of the last. An empty slice
    ``(model, (0, 0))`` at an end gives those alone.

    Args:
        slices: ``[(model, (first, end)), ...]``; models are anything that `weightsmith.open` opens.
        prefix: what stands before the number of a layer, such as ``"model.layers."``. It is found from the names,
            but where a model has several stacks of one depth (an encoder and a decoder) it must be said.

    Returns:
        Weights: lazy. ``config.json`` has the new number of layers, and lists by layer follow. Tied embeddings stay
        tied where they are tied in both models, and then both are the first model's.

    Raises:
        ValueError: no slice, layers that a model does not have, several stacks of layers or none, or models whose
            layers have other names or shapes.

    >>> model = {"embed.weight": torch.zeros(1), "layers.0.w": torch.ones(1), "layers.1.w": 2 * torch.ones(1)}
    >>> deeper = stack([(model, (0, 2)), (model, (1, 2))])
    >>> {name: float(value) for name, value in deeper.items()}
    {'embed.weight': 0.0, 'layers.0.w': 1.0, 'layers.1.w': 2.0, 'layers.2.w': 2.0}
    """
    if not slices:
        raise Error("stack needs at least 1 slice, got 0")
    ranges = [_range(number, one) for number, one in enumerate(slices, 1)]
    keys = [os.fspath(model) if isinstance(model, str | os.PathLike) else id(model) for model, _ in slices]
    opened = {key: open(model) for key, (model, _) in zip(keys, slices, strict=True)}
    tied = dict(zip(opened, with_ties(list(opened.values())), strict=True))
    models = [tied[key] for key in keys]
    first, *others = [layers_of(model, prefix, f"stack: model {n}") for n, model in enumerate(models, 1)]
    for number, (model, layers) in enumerate(zip(models[1:], others, strict=True), 2):
        check_alike_layers(models[0], first, model, layers, f"stack: slice {number}")
    nodes = {name: models[0].node(name) for name in models[0] if first.is_stem(name)}
    taken: list[tuple[Weights, int]] = []
    for number, (model, layers, (start, stop)) in enumerate(zip(models, [first, *others], ranges, strict=True), 1):
        check_range(layers, start, stop, f"stack: slice {number}")
        for index in range(start, stop):
            nodes |= {first.moved(name, len(taken)): model.node(name) for name in first.named(model, index)}
            taken.append((model, index))
    nodes |= {name: models[-1].node(name) for name in models[-1] if first.is_head(name)}
    tie_again(nodes, [models[0], models[-1]])
    said = {"slices": [[start, stop] for start, stop in ranges], **({"prefix": prefix} if prefix else {})}
    step = Step("merge.stack", said, tuple(model.lineage for model in models))
    files = with_depth(models[0].files, first, [(model.files, index) for model, index in taken])
    return with_config(Weights(nodes, step, files, models[0].metadata), models)


def _range(number: int, one: Any) -> tuple[int, int]:
    try:
        _, (start, stop) = one
        start, stop = int(start), int(stop)
    except (TypeError, ValueError):
        raise Error(f"stack: slice {number} must be (model, (first, end)), got {one!r:.80}") from None
    return start, stop


# What recipes with slices use as well


@dataclass(frozen=True)
class Layers:
    """Where the numbers of layers stand in the names of a model, and how many layers there are."""

    prefix: str
    count: int

    def number(self, name: str) -> int | None:
        """The layer that a tensor belongs to."""
        if not name.startswith(self.prefix):
            return None
        digits, dot, _ = name[len(self.prefix) :].partition(".")
        return int(digits) if digits.isdecimal() and dot else None

    def named(self, names: Iterable[str], index: int) -> list[str]:
        """The tensors of one layer."""
        return [name for name in names if self.number(name) == index]

    def moved(self, name: str, index: int) -> str:
        """The name of the same tensor in another layer."""
        rest = name[len(self.prefix) :].partition(".")[2]
        return f"{self.prefix}{index}.{rest}"

    def is_stem(self, name: str) -> bool:
        """Whether a tensor outside of the layers stands before them; another stack of layers does."""
        if self.number(name) is not None:
            return False
        return (_STEM.search(name) is not None and _HEAD.search(name) is None) or _NUMBER.search(name) is not None

    def is_head(self, name: str) -> bool:
        """Whether a tensor stands after the layers."""
        return self.number(name) is None and not self.is_stem(name)


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Prefix -> number of layers, for every run of numbers 0, 1, 2, ... that is the first in some names.

    >>> stacks_of(["h.0.w", "h.1.w", "tower.blocks.0.w", "projector.0.w", "projector.2.w", "norm.w"])
    {'h.': 2, 'tower.blocks.': 1}
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if (found := _NUMBER.search(name)) and found.end(1) < len(name):
            numbers.setdefault(name[: found.start(1)], set()).add(int(found[1]))
    return {prefix: len(seen) for prefix, seen in numbers.items() if seen == set(range(len(seen)))}


def layers_of(model: Weights, prefix: str | None = None, where: str = "the model") -> Layers:
    """The stack of layers: the one with ``prefix``, the only one, or the one whose depth the configuration tells."""
    there = stacks_of(model)
    if prefix is not None:
        prefix = prefix if prefix.endswith(".") or not prefix else prefix + "."
        if prefix not in there:
            near = did_you_mean(prefix, there)
            raise Error(f"{where} has no layers {prefix}0, {prefix}1, ...{near}; it has {listed(there) or 'none'}")
        return Layers(prefix, there[prefix])
    config = config_of(model.files)
    if len(there) > 1 and config is not None:
        told = {key: count for key, count in there.items() if _count_in(_part(config, key), key) == count}
        text = {key: count for key, count in told.items() if not (_VISION.search(key) or _AUDIO.search(key))}
        there = text or told or there
    if len(there) != 1:
        if not there:
            raise Error(f"{where} has no layers: no names with the numbers 0, 1, 2, ... in them, as layers.0.weight")
        raise Error(
            f"{where} has several stacks of layers: {listed(f'{p}* ({n})' for p, n in there.items())}; "
            f"say which with prefix={next(iter(there))!r}"
        )
    return Layers(*next(iter(there.items())))


def check_range(layers: Layers, start: int, stop: int, where: str) -> None:
    """An error for layers that are not there."""
    if start > stop:
        raise Error(f"{where}: layers {start} to {stop} run backwards; the first must not be after the end")
    if start < 0 or stop > layers.count:
        raise Error(f"{where}: there are no layers ({start}, {stop}); the model has (0, {layers.count})")


def check_alike_layers(first: Weights, one: Layers, model: Weights, other: Layers, where: str) -> None:
    """An error where layers of a model could not stand among those of the first."""
    if one.prefix != other.prefix:
        raise Error(f"{where}: its layers are called {other.prefix}*, those of the first model {one.prefix}*")
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name in first:
        if one.number(name) is not None:
            shapes.setdefault(one.moved(name, 0), set()).add(first.spec(name).shape)
    for name in model:
        known = shapes.get(one.moved(name, 0)) if one.number(name) is not None else None
        if known is not None and model.spec(name).shape not in known:
            raise Error(f"{where}: {name} is {list(model.spec(name).shape)}, in the first model {list(min(known))}")


def tie_again(nodes: dict[str, Lazy], models: Iterable[Weights]) -> None:
    """A head that is the embedding in all of the models it comes from is the embedding here."""
    heads = [name for name in nodes if matches(HEADS, name)]
    embeddings = [name for name in nodes if matches(EMBEDDINGS, name)]
    for head in heads:
        for name in embeddings:
            if all(head in one and name in one and one.node(head) is one.node(name) for one in models):
                nodes[head] = nodes[name]


def config_of(files: Mapping[str, bytes | Bytes]) -> dict[str, Any] | None:
    """The ``config.json`` beside weights; None where there is none that can be read."""
    raw = files.get(CONFIG)
    if raw is None:
        return None
    try:
        found = json.loads(content_of(raw))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def with_depth(
    files: Mapping[str, bytes | Bytes], layers: Layers, taken: Sequence[tuple[Mapping[str, bytes | Bytes], int]]
) -> dict[str, bytes | Bytes]:
    """The files with a ``config.json`` that has as many layers as there are now.

    Args:
        files: of the model that gives the configuration.
        layers: its layers.
        taken: for each layer now, the files of the model that it was taken from and its number there. Lists by
            layer (``layer_types``) follow.
    """
    config = config_of(files)
    if config is None or [index for _, index in taken] == list(range(layers.count)):
        return dict(files)
    part = _part(config, layers.prefix)
    keys = [key for key in _counts(config, layers.prefix) if part.get(key) == layers.count]
    if not keys and "model_type" in config:
        raise Error(
            f"{CONFIG} does not say that there are {layers.count} layers ({layers.prefix}*), so the new number of "
            f"{len(taken)} has no place in it; looked for {listed(_counts(config, layers.prefix))}"
        )
    own: dict[int, Mapping[str, Any]] = {}
    for there, _ in taken:
        own.setdefault(id(there), _part(config_of(there) or {}, layers.prefix))
    before = dict(part)
    for key, value in before.items():
        if key in keys:
            part[key] = len(taken)
        elif not isinstance(value, list):
            continue
        elif _INDICES.search(key):
            part[key] = [new for new, (there, old) in enumerate(taken) if old in (own[id(there)].get(key) or ())]
        elif len(value) == layers.count and "token" not in key and key != "architectures":
            part[key] = [_entry(own[id(there)].get(key), value, old) for there, old in taken]
    if part == before:
        return dict(files)
    return {**files, CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _entry(own: Any, value: list[Any], index: int) -> Any:
    if isinstance(own, list) and index < len(own):
        return own[index]
    return value[min(index, len(value) - 1)]


def _part(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a configuration that speaks of a stack of layers."""
    inner = ("vision_config",) if _VISION.search(prefix) else ("audio_config",) if _AUDIO.search(prefix) else _TEXT
    return next((config[key] for key in inner if isinstance(config.get(key), dict)), config)


def _counts(config: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    two = any(key in config for key in _DECODER_COUNTS) or bool(config.get("is_encoder_decoder"))
    if two and "decoder" in prefix:
        return _DECODER_COUNTS
    return _COUNTS


def _count_in(part: Mapping[str, Any], prefix: str) -> int | None:
    return next((part[key] for key in _counts(part, prefix) if isinstance(part.get(key), int)), None)
