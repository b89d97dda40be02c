"""One sparse model from several dense ones: their MLPs become experts, and a router picks among them for each token.

Fine-tunes of one start agree about attention and differ in what their MLPs know. Kept side by side, with a router
that tells by a token which of them it needs, they make a model that is trained on or used as it is. The experts are
the MLPs of the models under other names: nothing is computed but routers, casts and what an `Expert` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge._drop import uniform
from weightsmith.merge._tokenizer import parsed, written
from weightsmith.merge.moe._experts import (
    COMPUTED,
    CONFIG,
    IN_LAYER,
    PARTS,
    Expert,
    check_expert,
    check_scales,
    check_vocabulary,
    embedding_of,
    first_part,
    layers_of,
    opened_experts,
    several,
    sizes_of,
    target_of,
)
from weightsmith.merge.moe._gates import BY_PROMPTS, GATES, gates
from weightsmith.merge.moe._targets import FUSED, ROUTER, Target, settings
from weightsmith.merge.room import Source
from weightsmith.weights import Held, Lazy, Scratch, Spec, Step, Weights, apply, as_dtype, open
from weightsmith.weights._lazy import Cast, convert


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
    >>> dense = ws.Weights.of({f"model.{name}.weight": torch.ones(2, 2) for name in names})
    >>> dense = dense.with_files({"config.json": config})
    >>> print(*assemble([dense, dense], dense, gate="zeros"), sep="\n")     # doctest: +ELLIPSIS
    model.embed_tokens.weight
    model.layers.0.block_sparse_moe.gate.weight
    model.layers.0.block_sparse_moe.experts.0.w1.weight
    ...
    model.layers.0.block_sparse_moe.experts.1.w2.weight
    model.norm.weight
    """
    experts = [one if isinstance(one, Expert) else Expert(one) for one in several(models)]
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
    check_scales(everyone, told)
    origin, opened = open(base), opened_experts(everyone)
    config = parsed(origin.files, CONFIG, "assemble: the base")
    target = target_of(architecture, config, both is not None)
    if layout == "fused" and not target.fused:
        raise Error(f"assemble: {target.name} is read with separate experts alone; leave out layout='fused'")
    layers = layers_of(origin, target)
    for model, who in zip(opened, told, strict=True):
        check_expert(model, who, origin, config, layers, target)
    if vocabulary == "check":
        check_vocabulary(origin, opened, told)
    kind = None if dtype is None else as_dtype(dtype)
    hidden = origin.spec(embedding_of(origin)).shape[-1]
    routers = _routers(gate, everyone, both is not None, target, origin, len(layers), hidden, seed)
    plain = origin if kind is None else origin.cast(kind)
    nodes: dict[str, Lazy] = {}
    apart: set[int] = set()
    for name in origin:
        found = IN_LAYER.match(name)
        if COMPUTED.search(name):
            continue
        if not found or found["rest"] not in PARTS:
            nodes[name] = plain.node(name)
        elif found["rest"] == first_part(origin, found["layer"]):
            place = found["layer"]
            row = routers[layers.index(place)]
            mixture = _Layer(place, origin, opened, everyone, both is not None, kind, seed)
            made = mixture.separate(target, row) if layout == "separate" else mixture.fused(target, row)
            for name, node in made.items():  # a model that comes twice is two experts, and not one tensor of two names
                nodes[name] = Joined([node], node.spec.shape) if id(node) in apart else node
                apart.add(id(node))
    said = {"architecture": target.name, "gate": gate if isinstance(gate, str) else "given", "layout": layout}
    said |= {"experts_per_token": experts_per_token, "experts": len(experts), "seed": seed}
    step = Step("merge.moe.assemble", said, (origin.lineage, *(model.lineage for model in opened)))
    found = settings(target, config, len(experts), experts_per_token, both is not None, sizes_of(origin, layers), kind)
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
            for part, name in zip(PARTS, target.projections, strict=True):
                nodes[f"{self.place}{target.block}.experts.{number}.{name}.weight"] = self._part(number, part)
        return nodes | self._shared(target)

    def fused(self, target: Target, router: Tensor) -> dict[str, Lazy]:
        nodes = self._gates(f"{self.place}mlp.", target, router)
        gate, up, down = ([self._part(number, part) for number in range(self._count)] for part in PARTS)
        paired = [one for pair in zip(gate, up, strict=True) for one in pair]
        for name, members, per in zip(FUSED, (paired, down), (2, 1), strict=True):
            rows, columns = members[0].spec.shape
            nodes[f"{self.place}mlp.experts.{name}"] = Joined(members, (self._count, per * rows, columns))
        return nodes | self._shared(target)

    @property
    def _count(self) -> int:
        return len(self.models) - self.shared

    def _gates(self, block: str, target: Target, router: Tensor) -> dict[str, Lazy]:
        kind = self.dtype or self.origin.spec(self.place + PARTS[0]).dtype
        nodes: dict[str, Lazy] = {block + ROUTER: _as(Held(router[: self._count].contiguous()), kind)}
        if target.shared_gate:
            nodes[block + target.shared_gate] = _as(Held(router[self._count :].contiguous()), kind)
        return nodes

    def _shared(self, target: Target) -> dict[str, Lazy]:
        if not self.shared:
            return {}
        names = (part.removeprefix("mlp.") for part in PARTS)
        return {f"{self.place}mlp.{target.shared}.{n}": self._part(-1, p) for n, p in zip(names, PARTS, strict=True)}

    def _part(self, number: int, part: str) -> Lazy:
        expert, name = self.experts[number], self.place + part
        node, kind = self.models[number].node(name), self.dtype or self.origin.spec(name).dtype
        scale = expert.residual_scale if part == PARTS[-1] else 1.0
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


def _given(gate: Tensor | Mapping[int, Tensor], layers: int, rows: int, hidden: int, gated: bool) -> Tensor:
    if isinstance(gate, Mapping):
        if set(gate) != set(range(layers)):
            raise Error(
                f"assemble: gate needs a tensor for every layer from 0 to {layers - 1}, got {listed(map(str, gate))}"
            )
        shapes = {tuple(one.shape) for one in gate.values()}
        if len(shapes) > 1:
            raise Error(f"assemble: the gates of the layers differ in shape: {listed(map(str, sorted(shapes)))}")
        gate = torch.stack([gate[number] for number in range(layers)])
    found = gate.detach().float()
    found = found.expand(layers, *found.shape) if found.dim() == 2 else found
    if gated and found.dim() == 3 and found.shape[1] == rows - 1:
        found = torch.cat([found, found.new_zeros(len(found), 1, found.shape[2])], dim=1)
    if tuple(found.shape) != (layers, rows, hidden):
        who = "experts and the shared one" if gated else "experts"
        raise Error(
            f"assemble: gate must be [{layers}, {rows}, {hidden}] (layers, {who}, hidden), or the last two "
            f"of these for all layers alike; got {list(gate.shape)}"
        )
    if not found.isfinite().all():
        raise Error("assemble: the gate holds NaN or infinity")
    return found
