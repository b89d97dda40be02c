"""What can be an expert of a mixture: models that differ in what they know and in nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge._tokenizer import parsed, read
from weightsmith.merge.moe._targets import TARGETS, Target
from weightsmith.merge.room import Source
from weightsmith.weights import Weights, dtype_name, open

CONFIG = "config.json"

IN_LAYER = re.compile(r"^(?P<layer>(?:.*\.)?layers\.(?P<number>\d+)\.)(?P<rest>.+)$")
PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_EMBEDDING = re.compile(r"(^|\.)embed_tokens\.weight$")
_OUTSIDE = re.compile(r"^((model\.)?(embed_tokens|norm)|lm_head)\.weight$")
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
"""Stored by old versions, and computed anew when a model is loaded."""


@dataclass(frozen=True)
class Expert:
    """A model whose MLPs become an expert, and what is particular about it."""

    model: Source
    prompts: Sequence[str] = ()
    """Texts for which the router should choose it."""
    negative_prompts: Sequence[str] = ()
    """Texts for which it should not."""
    residual_scale: float = 1.0
    """Its output is multiplied by this."""
    noise_scale: float = 0.0
    """Standard deviation of normal noise on its weights, so that equal experts come apart in training."""


def several(models: Any) -> Sequence[Source | Expert]:
    if not isinstance(models, Sequence) or isinstance(models, str | bytes) or not models:
        raise Error(f"assemble takes a list of models that become experts, got {type(models).__name__}")
    return models


def opened_experts(experts: Sequence[Expert]) -> list[Weights]:
    """Each model once, however often it comes."""
    made: dict[object, Weights] = {}
    keys = [one.model if isinstance(one.model, str) else id(one.model) for one in experts]
    for key, expert in zip(keys, experts, strict=True):
        if key not in made:
            made[key] = open(expert.model)
    return [made[key] for key in keys]


def check_scales(experts: Sequence[Expert], told: Sequence[str]) -> None:
    for expert, who in zip(experts, told, strict=True):
        if not (math.isfinite(expert.residual_scale) and math.isfinite(expert.noise_scale) and expert.noise_scale >= 0):
            raise Error(
                f"assemble: {who} needs a finite residual_scale and noise_scale >= 0, "
                f"got {expert.residual_scale} and {expert.noise_scale}"
            )


def target_of(architecture: str | None, config: Mapping[str, Any], shared: bool) -> Target:
    """The architecture asked for, or the first that takes the base."""
    kind = config.get("model_type")
    if architecture is not None and architecture not in TARGETS:
        raise Error(
            f"assemble: no architecture {architecture!r}{did_you_mean(architecture, TARGETS)}; "
            f"there are {', '.join(TARGETS)}"
        )
    if not kind:
        raise Error(
            "assemble: the base has no config.json that says its model_type; open the folder that it was saved to, "
            "or add one with .with_files({'config.json': ...})"
        )
    tried = list(TARGETS.values()) if architecture is None else [TARGETS[architecture]]
    fitting = [target for target in tried if kind in target.takes]
    if not fitting:
        known = sorted({one for target in tried for one in target.takes})
        what = f"{tried[0].name} is made from" if architecture else "mixtures are made from"
        raise Error(f"assemble: {what} {', '.join(known)}, and the base is {kind!r}")
    found = next((target for target in fitting if shared in target.with_shared), None)
    if found is None:
        one = fitting[0]
        word = "needs shared=, a model whose MLPs work on every token" if not shared else "has no shared expert"
        others = [t.name for t in TARGETS.values() if kind in t.takes and shared in t.with_shared]
        raise Error(f"assemble: {one.name} {word}" + (f"; {others[0]} would do" if others else ""))
    return found


def layers_of(base: Weights, target: Target) -> list[str]:
    """What stands before the names of each layer, in their order; every tensor is one that the target has."""
    places: dict[str, int] = {}
    strange = []
    for name in base:
        found = IN_LAYER.match(name)
        known = bool(found and (found["rest"] in PARTS or re.fullmatch(target.inside, found["rest"])))
        if found and found["rest"] in PARTS:
            places[found["layer"]] = int(found["number"])
        if not (known or _OUTSIDE.match(name) or COMPUTED.search(name)):
            strange.append(name)
    if strange:
        raise Error(f"assemble: {target.name} has no place for {listed(strange)} of the base")
    ordered = sorted(places, key=lambda place: places[place])
    if [places[place] for place in ordered] != list(range(len(ordered))) or not ordered:
        raise Error(
            f"assemble: the base has no MLPs model.layers.0.{PARTS[0]} and so on, one for each layer; is it a "
            "dense model, and not quantized?"
        )
    lacking = [place + part for place in ordered for part in PARTS if place + part not in base]
    if lacking:
        raise Error(f"assemble: the base has no {listed(lacking)}")
    return ordered


def check_expert(
    model: Weights, who: str, base: Weights, config: Mapping[str, Any], layers: Sequence[str], target: Target
) -> None:
    own = parsed(model.files, CONFIG, f"assemble: {who}")
    kind = own.get("model_type")
    if kind and kind not in target.takes:
        raise Error(f"assemble: {who} is a model of type {kind!r}, and {target.name} takes {', '.join(target.takes)}")
    acts = own.get("hidden_act", "silu") if own else config.get("hidden_act", "silu"), config.get("hidden_act", "silu")
    if acts[0] != acts[1]:
        raise Error(f"assemble: {who} computes with {acts[0]}, the base with {acts[1]}")
    names = [place + part for place in layers for part in PARTS]
    lacking = [name for name in names if name not in model]
    if lacking:
        raise Error(f"assemble: {who} has no {listed(lacking)}; all models must have as many layers as the base")
    more = [n for n in model if (m := IN_LAYER.match(n)) and (m["layer"] not in layers or "mlp." in m["rest"])]
    more = [name for name in more if name not in names]
    if more:
        raise Error(f"assemble: {who} has {listed(more)}, which the base has not")
    wrong = [
        f"{name} {list(model.spec(name).shape)} against {list(base.spec(name).shape)}"
        for name in names
        if model.spec(name).shape != base.spec(name).shape
    ]
    if wrong:
        raise Error(f"assemble: {who} and the base differ in shape: {listed(wrong)}")
    coded = [name for name in names if not model.spec(name).dtype.is_floating_point]
    if coded:
        found = dtype_name(model.spec(coded[0]).dtype)
        raise Error(f"assemble: {listed(coded)} of {who} are {found}; experts are made of floats")


def check_vocabulary(base: Weights, models: Sequence[Weights], told: Sequence[str]) -> None:
    """Row 17 of the embedding must mean the same to an expert as it does to the base."""
    remedy = (
        "; give all models one vocabulary with weightsmith.merge.share_vocabulary([base, *models], base=0), or take "
        "the base's with vocabulary='base'"
    )
    own = read(base.files, "assemble: the base") if "tokenizer.json" in base.files else None
    seen = {id(base)}
    for model, who in zip(models, told, strict=True):
        if id(model) in seen:
            continue
        seen.add(id(model))
        rows = [[w.spec(n).shape[0] for n in w if _EMBEDDING.search(n)] for w in (base, model)]
        if rows[1] and rows[0] != rows[1]:
            raise Error(f"assemble: {who} has {rows[1][0]} tokens, the base {rows[0][0]}{remedy}")
        theirs = model.files.get("tokenizer.json")
        if own is None or theirs is None or theirs is base.files["tokenizer.json"]:
            continue
        other = read(model.files, f"assemble: {who}")
        assert other is not None
        if other.ids != own.ids:
            apart = [t for t in {**own.ids, **other.ids} if own.ids.get(t) != other.ids.get(t)]
            raise Error(f"assemble: {who} has other tokens than the base: {listed(map(repr, apart))}{remedy}")


def embedding_of(base: Weights) -> str:
    found = [name for name in base if _EMBEDDING.search(name)]
    if len(found) != 1:
        raise Error(f"assemble: the base has {len(found)} tensors embed_tokens.weight, and needs one")
    return found[0]


def first_part(base: Weights, place: str) -> str:
    return next(name for name in base if name.startswith(f"{place}mlp.")).removeprefix(place)


def sizes_of(base: Weights, layers: Sequence[str]) -> dict[str, int]:
    rows, hidden = base.spec(embedding_of(base)).shape
    inner = base.spec(layers[0] + PARTS[0]).shape[0]
    return {"vocab_size": rows, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": len(layers)}
