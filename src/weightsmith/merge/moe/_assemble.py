"""One sparse model from several dense ones: their MLPs become experts, and a router picks among them for each token.

Fine-tunes of one start agree about attention and differ in what their MLPs know. Kept side by side, with a router
that tells by a token which of them it needs, they make a model that is trained on or used as it is. The experts are
the MLPs of the models under other names: nothing is computed but routers, casts and what an `Expert` asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge._drop import uniform
from weightsmith.merge._tokenizer import parsed, read, written
from weightsmith.merge.moe._gates import BY_PROMPTS, GATES, gates
from weightsmith.merge.moe._targets import FUSED, ROUTER, TARGETS, Target, settings
from weightsmith.merge.room import Source
from weightsmith.weights import Held, Lazy, Scratch, Spec, Step, Weights, apply, as_dtype, dtype_name, open
from weightsmith.weights._lazy import Cast, convert

CONFIG = "config.json"

_IN_LAYER = re.compile(r"^(?P<layer>(?:.*\.)?layers\.(?P<number>\d+)\.)(?P<rest>.+)$")
_PARTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_EMBEDDING = re.compile(r"(^|\.)embed_tokens\.weight$")
_OUTSIDE = re.compile(r"^((model\.)?(embed_tokens|norm)|lm_head)\.weight$")
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
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


@card(
    paper="Komatsuzaki et al. 2023, 'Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints', with the "
    "MLPs of several models and routers by prompts, as mergekit makes them",
    needs=("base",),
    unit="model",
    claim="loads as a model of the sparse architecture; with equal experts it computes what the dense model does",
)
def assemble(
    models: Sequence[Source | Expert],
    base: Source,
    *,
    architecture: str | None = None,
    gate: str | Tensor | Mapping[int, Tensor] = "hidden",
    experts_per_token: int = 2,
    shared: Source | Expert | None = None,
    layout: Literal["separate", "fused"] = "separate",
    vocabulary: Literal["check", "base"] = "check",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> Weights:
    r"""A mixture of experts from dense models of one architecture, ready to be loaded by transformers.

    .. math:: y(x) = \sum_{e \in T(x)} \frac{\exp(r_e \cdot x)}{\sum_{j \in T(x)} \exp(r_j \cdot x)}\, \mathrm{MLP}_e(x)

    with :math:`T(x)` the ``experts_per_token`` experts of the largest :math:`r_e \cdot x`, in every layer. Attention,
    norms, embedding and head are those of ``base``.

    Args:
        models: whose MLPs become the experts, in this order; each an `Expert` or anything that `weightsmith.open`
            opens. One may come several times, and the base may be among them.
        base: a folder (or `Weights`) with a ``config.json``.
        architecture: ``"mixtral"`` from Llama and Mistral; ``"qwen2_moe"`` from Llama, Mistral and Qwen2, with
            ``shared``; ``"qwen3_moe"`` from Qwen3; ``"deepseek"`` from Llama and Mistral, which needs the code that
            comes with that model. By default the first of these that takes the base.
        gate: the routers :math:`r`. ``"hidden"``: the base's hidden state at a prompt's last token before each
            layer, its mean over the prompts, less that of the negative ones; ``"hidden_avg"``: at all tokens;
            ``"inputs"``: at all tokens what each MLP reads, which is what a router reads; ``"cheap_embed"``: the sum
            of the tokens' embeddings, in all layers; each to length 1. ``"random"``: standard normal;
            ``"uniform_random"``: as a new linear layer has it; ``"zeros"``: no expert before another. Or a tensor
            ``[layers, experts, hidden]``, or ``[experts, hidden]`` for all layers, or one for each layer by number;
            a last row more is the gate of ``shared``.
        experts_per_token: how many of them work on a token.
        shared: a model whose MLPs work on every token, beside the experts. In ``qwen2_moe`` its output is multiplied
            by a sigmoid of its own gate, and added: with equal experts, ``residual_scale`` has to make up for that.
        layout: ``"separate"`` tensors for each expert, as such models are published; or ``"fused"``, all experts of
            a layer in one, as transformers 5 holds them in memory.
        vocabulary: ``"check"`` that all models have the tokens of the base; or ``"base"``: take its own anyway.
        dtype: of all tensors; by default that of the same tensor of the base.
        seed: of random gates and of noise.

    Returns:
        Weights: lazy; routers are found at once, and need memory for the base where its hidden states are asked for.
        ``config.json`` is that of the sparse model, other files are the base's.

    Raises:
        ValueError: models that cannot be experts of this architecture, of different shapes or vocabularies; fewer
            models than ``experts_per_token``; prompts or a gate that do not fit.
        MissingPackage: transformers is not installed, and prompts are to be read.

    >>> import json
    >>> names = ["embed_tokens", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "norm"]
    >>> config = json.dumps({"model_type": "llama"}).encode()
    >>> dense = ws.Weights.of({f"model.{n}.weight": torch.ones(2, 2) for n in names}).with_files({"config.json": config})
    >>> print(*assemble([dense, dense], dense, gate="zeros"), sep="\n")     # doctest: +ELLIPSIS
    model.embed_tokens.weight
    model.layers.0.block_sparse_moe.gate.weight
    model.layers.0.block_sparse_moe.experts.0.w1.weight
    ...
    model.layers.0.block_sparse_moe.experts.1.w2.weight
    model.norm.weight
    """
    experts = [one if isinstance(one, Expert) else Expert(one) for one in _several(models)]
    both = None if shared is None else shared if isinstance(shared, Expert) else Expert(shared)
    everyone = [*experts, *([both] if both is not None else [])]
    told = [*(f"expert {number}" for number in range(len(experts))), *(["the shared expert"] if both else [])]
    if not 1 <= experts_per_token <= len(experts):
        raise Error(
            f"assemble: experts_per_token is {experts_per_token}, and there are {len(experts)} models; it must be "
            "from 1 up to as many as there are"
        )
    if layout not in ("separate", "fused") or vocabulary not in ("check", "base"):
        raise Error(
            "assemble: layout is 'separate' or 'fused' and vocabulary 'check' or 'base', "
            f"got {layout!r} and {vocabulary!r}"
        )
    _check_scales(everyone, told)
    origin, opened = open(base), _opened(everyone)
    config = parsed(origin.files, CONFIG, "assemble: the base")
    target = _target(architecture, config, both is not None)
    if layout == "fused" and not target.fused:
        raise Error(f"assemble: {target.name} is read with separate experts alone; leave out layout='fused'")
    layers = _layers(origin, target)
    for model, who in zip(opened, told, strict=True):
        _check_expert(model, who, origin, config, layers, target)
    if vocabulary == "check":
        _check_vocabulary(origin, opened, told)
    kind = None if dtype is None else as_dtype(dtype)
    hidden = origin.spec(_embedding(origin)).shape[-1]
    routers = _routers(gate, everyone, both is not None, target, origin, len(layers), hidden, seed)
    nodes: dict[str, Lazy] = {}
    for name in origin:
        found = _IN_LAYER.match(name)
        if _COMPUTED.search(name):
            continue
        if not found or found["rest"] not in _PARTS:
            nodes[name] = _as(origin.node(name), kind)
        elif found["rest"] == _first_part(origin, found["layer"]):
            place = found["layer"]
            row = routers[layers.index(place)]
            mixture = _Layer(place, origin, opened, everyone, both is not None, kind, seed)
            nodes |= mixture.separate(target, row) if layout == "separate" else mixture.fused(target, row)
    said = {"architecture": target.name, "gate": gate if isinstance(gate, str) else "given", "layout": layout}
    said |= {"experts_per_token": experts_per_token, "experts": len(experts), "seed": seed}
    step = Step("merge.moe.assemble", said, (origin.lineage, *(model.lineage for model in opened)))
    found = settings(target, config, len(experts), experts_per_token, both is not None, _sizes(origin, layers), kind)
    return Weights(nodes, step, {**origin.files, CONFIG: written(found)}, origin.metadata)


@dataclass(frozen=True)
class _Layer:
    """The tensors of a layer's mixture."""

    place: str
    origin: Weights
    models: Sequence[Weights]
    experts: Sequence[Expert]
    shared: bool
    dtype: torch.dtype | None
    seed: int

    def separate(self, target: Target, router: Tensor) -> dict[str, Lazy]:
        nodes = self._gates(f"{self.place}{target.block}.", target, router)
        for number in range(self._count):
            for part, name in zip(_PARTS, target.projections, strict=True):
                nodes[f"{self.place}{target.block}.experts.{number}.{name}.weight"] = self._part(number, part)
        return nodes | self._shared(target)

    def fused(self, target: Target, router: Tensor) -> dict[str, Lazy]:
        nodes = self._gates(f"{self.place}mlp.", target, router)
        gate, up, down = ([self._part(number, part) for number in range(self._count)] for part in _PARTS)
        paired = [one for pair in zip(gate, up, strict=True) for one in pair]
        for name, members, per in zip(FUSED, (paired, down), (2, 1), strict=True):
            rows, columns = members[0].spec.shape
            nodes[f"{self.place}mlp.experts.{name}"] = Joined(members, (self._count, per * rows, columns))
        return nodes | self._shared(target)

    @property
    def _count(self) -> int:
        return len(self.models) - self.shared

    def _gates(self, block: str, target: Target, router: Tensor) -> dict[str, Lazy]:
        kind = self.dtype or self.origin.spec(self.place + _PARTS[0]).dtype
        nodes: dict[str, Lazy] = {block + ROUTER: _as(Held(router[: self._count].contiguous()), kind)}
        if target.shared_gate:
            nodes[block + target.shared_gate] = _as(Held(router[self._count :].contiguous()), kind)
        return nodes

    def _shared(self, target: Target) -> dict[str, Lazy]:
        if not self.shared:
            return {}
        names = (part.removeprefix("mlp.") for part in _PARTS)
        return {f"{self.place}mlp.{target.shared}.{n}": self._part(-1, p) for n, p in zip(names, _PARTS, strict=True)}

    def _part(self, number: int, part: str) -> Lazy:
        expert, name = self.experts[number], self.place + part
        node, kind = self.models[number].node(name), self.dtype or self.origin.spec(name).dtype
        scale = expert.residual_scale if part == _PARTS[-1] else 1.0
        if scale != 1 or expert.noise_scale:
            key = f"{number % len(self.models)}.{name}"
            options = {"scale": scale, "noise": expert.noise_scale, "seed": self.seed, "key": key}
            node = apply(disturbed, node, spec=Spec(node.spec.shape, kind), options=options)
        return _as(node, kind)


def disturbed(values: Tensor, *, scale: float, noise: float, seed: int, key: str, start: int = 0) -> Tensor:
    """``scale * (values + noise * z)`` with ``z`` standard normal, drawn by the index of the element."""
    if noise:
        drawn = uniform(values.numel(), start=start, seed=seed, key=key).clamp(min=torch.finfo(torch.float32).eps / 2)
        normal = torch.erfinv(2 * drawn.double() - 1) * math.sqrt(2)
        values = values + noise * normal.to(values).view_as(values)
    return scale * values


class Joined:
    """Tensors of one shape and dtype, one after another, as one."""

    def __init__(self, members: Sequence[Lazy], shape: tuple[int, ...]):
        self.members = tuple(members)
        self.spec = Spec(shape, self.members[0].spec.dtype)
        self.each = self.members[0].spec.numel
        grain = math.lcm(*(member.grain for member in self.members))
        self.grain = grain if self.each % grain == 0 else max(self.spec.numel, 1)

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=self.spec.dtype)
        found = []
        for number in range(start // self.each, -(-stop // self.each)):
            first = number * self.each
            low, high = max(start - first, 0), min(stop - first, self.each)
            found.append(convert(self.members[number].read(low, high, scratch), self.spec.dtype, scratch))
        return found[0] if len(found) == 1 else torch.cat(found)

    def inputs(self) -> Iterable[Lazy]:
        return self.members

    def identity(self) -> object:
        return ["joined", str(self.spec), *(member.identity() for member in self.members)]


def _as(node: Lazy, dtype: torch.dtype | None) -> Lazy:
    floating = node.spec.dtype.is_floating_point
    return node if dtype is None or node.spec.dtype == dtype or not floating else Cast(node, dtype)


# Checks


def _several(models: Any) -> Sequence[Source | Expert]:
    if not isinstance(models, Sequence) or isinstance(models, str | bytes) or not models:
        raise Error(f"assemble takes a list of models that become experts, got {type(models).__name__}")
    return models


def _opened(experts: Sequence[Expert]) -> list[Weights]:
    """Each model once, however often it comes."""
    made: dict[object, Weights] = {}
    keys = [one.model if isinstance(one.model, str) else id(one.model) for one in experts]
    for key, expert in zip(keys, experts, strict=True):
        if key not in made:
            made[key] = open(expert.model)
    return [made[key] for key in keys]


def _check_scales(experts: Sequence[Expert], told: Sequence[str]) -> None:
    for expert, who in zip(experts, told, strict=True):
        if not (math.isfinite(expert.residual_scale) and math.isfinite(expert.noise_scale) and expert.noise_scale >= 0):
            raise Error(
                f"assemble: {who} needs a finite residual_scale and noise_scale >= 0, "
                f"got {expert.residual_scale} and {expert.noise_scale}"
            )


def _target(architecture: str | None, config: Mapping[str, Any], shared: bool) -> Target:
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


def _layers(base: Weights, target: Target) -> list[str]:
    """What stands before the names of each layer, in their order; every tensor is one that the target has."""
    places: dict[str, int] = {}
    strange = []
    for name in base:
        found = _IN_LAYER.match(name)
        known = bool(found and (found["rest"] in _PARTS or re.fullmatch(target.inside, found["rest"])))
        if found and found["rest"] in _PARTS:
            places[found["layer"]] = int(found["number"])
        if not (known or _OUTSIDE.match(name) or _COMPUTED.search(name)):
            strange.append(name)
    if strange:
        raise Error(f"assemble: {target.name} has no place for {listed(strange)} of the base")
    ordered = sorted(places, key=lambda place: places[place])
    if [places[place] for place in ordered] != list(range(len(ordered))) or not ordered:
        raise Error(
            f"assemble: the base has no MLPs model.layers.0.{_PARTS[0]} and so on, one for each layer; is it a "
            "dense model, and not quantized?"
        )
    lacking = [place + part for place in ordered for part in _PARTS if place + part not in base]
    if lacking:
        raise Error(f"assemble: the base has no {listed(lacking)}")
    return ordered


def _check_expert(
    model: Weights, who: str, base: Weights, config: Mapping[str, Any], layers: Sequence[str], target: Target
) -> None:
    own = parsed(model.files, CONFIG, f"assemble: {who}")
    kind = own.get("model_type")
    if kind and kind not in target.takes:
        raise Error(f"assemble: {who} is a model of type {kind!r}, and {target.name} takes {', '.join(target.takes)}")
    acts = own.get("hidden_act", "silu") if own else config.get("hidden_act", "silu"), config.get("hidden_act", "silu")
    if acts[0] != acts[1]:
        raise Error(f"assemble: {who} computes with {acts[0]}, the base with {acts[1]}")
    names = [place + part for place in layers for part in _PARTS]
    lacking = [name for name in names if name not in model]
    if lacking:
        raise Error(f"assemble: {who} has no {listed(lacking)}; all models must have as many layers as the base")
    more = [n for n in model if (m := _IN_LAYER.match(n)) and (m["layer"] not in layers or "mlp." in m["rest"])]
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


def _check_vocabulary(base: Weights, models: Sequence[Weights], told: Sequence[str]) -> None:
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


def _embedding(base: Weights) -> str:
    found = [name for name in base if _EMBEDDING.search(name)]
    if len(found) != 1:
        raise Error(f"assemble: the base has {len(found)} tensors embed_tokens.weight, and needs one")
    return found[0]


def _first_part(base: Weights, place: str) -> str:
    return next(name for name in base if name.startswith(f"{place}mlp.")).removeprefix(place)


def _sizes(base: Weights, layers: Sequence[str]) -> dict[str, int]:
    rows, hidden = base.spec(_embedding(base)).shape
    inner = base.spec(layers[0] + _PARTS[0]).shape[0]
    return {"vocab_size": rows, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": len(layers)}


# Routers


def _routers(
    gate: str | Tensor | Mapping[int, Tensor],
    everyone: Sequence[Expert],
    shared: bool,
    target: Target,
    base: Weights,
    layers: int,
    hidden: int,
    seed: int,
) -> Tensor:
    """``[layers, experts, hidden]``, with a last row for the gate of a shared expert where there is one."""
    gated = bool(target.shared_gate)
    wanted = list(everyone if gated else everyone[: len(everyone) - shared])
    if not isinstance(gate, str):
        return _given(gate, layers, len(wanted), hidden, gated)
    if gate not in GATES:
        raise Error(f"assemble: no gate {gate!r}{did_you_mean(gate, GATES)}; there are {', '.join(GATES)}")
    prompts = [(_texts(one.prompts, "prompts"), _texts(one.negative_prompts, "negative_prompts")) for one in wanted]
    if gate in BY_PROMPTS:
        for number, (positive, _) in enumerate(prompts):
            if not positive:
                who = "the shared expert" if gated and number == len(wanted) - 1 else f"expert {number}"
                raise Error(
                    f"assemble: gate={gate!r} needs prompts for every expert, and {who} has none: "
                    "Expert(model, prompts=[...])"
                )
        chosen = prompts[: len(prompts) - gated]
        if len(chosen) > 1 and all(one == chosen[0] for one in chosen):
            raise Error("assemble: all experts have the same prompts, so the router could not tell them apart")
    return gates(gate, base, prompts, layers, hidden, seed)


def _texts(texts: Sequence[str], option: str) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise Error(f"assemble: {option} of an expert is a list of texts, got {texts!r:.80}")
    return list(texts)


def _given(
    gate: Tensor | Mapping[int, Tensor], layers: int, rows: int, hidden: int, gated: bool
) -> Tensor:
    if isinstance(gate, Mapping):
        if set(gate) != set(range(layers)):
            raise Error(f"assemble: gate needs a tensor for every layer from 0 to {layers - 1}, got {listed(map(str, gate))}")
        shapes = {tuple(one.shape) for one in gate.values()}
        if len(shapes) > 1:
            raise Error(f"assemble: the gates of the layers differ in shape: {listed(map(str, sorted(shapes)))}")
        gate = torch.stack([gate[number] for number in range(layers)])
    found = gate.detach().float()
    found = found.expand(layers, *found.shape) if found.dim() == 2 else found
    if gated and found.dim() == 3 and found.shape[1] == rows - 1:
        found = torch.cat([found, found.new_zeros(len(found), 1, found.shape[2])], dim=1)
    if tuple(found.shape) != (layers, rows, hidden):
        raise Error(
            f"assemble: gate must be [{layers}, {rows}, {hidden}] (layers, experts{' and the shared one' if gated else ''}"
            f", hidden) or the same for all layers, got {list(gate.shape)}"
        )
    if not found.isfinite().all():
        raise Error("assemble: the gate holds NaN or infinity")
    return found
