"""A bank of experts of low rank behind one model, and a router that picks among them for each token.

Adapters and fine-tunes that others have trained are kept apart instead of merged: each is a small change of some
linear layers, and for every token (or example) a router says how much of each change to make. Routers that need no
training read the experts themselves, or a few texts of each. The static limit, one share for all inputs, is the
weighted merge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge import _task_vectors
from weightsmith.merge._coefficients import Objective, check_data, check_objective, forwards
from weightsmith.merge.moe._routed_linear import Factors, RoutedLinear, Router, factored
from weightsmith.merge.moe._training import Routing, train_routers
from weightsmith.merge.room import Source, check_alike, lift
from weightsmith.stats.room import Batch, Forward, Loss
from weightsmith.weights import Pattern, Weights, matches, materialize, open

_sum_of = lift(_task_vectors.task_arithmetic)


@card(
    paper="Yadav et al. 2024, 'A Survey on Model MoErging: Recycling and Routing Among Specialized Experts for "
    "Collaborative Learning'; arrow is of Ostapenko et al. 2024, 'Towards Modular LLMs by Building and Reusing a "
    "Library of LoRAs'",
    covers=("survey-model-moerging-recycling",),
    needs=("base", "data"),
    unit="model",
    claim="with centroids, on inputs of all tasks it is more accurate than the best static merge of the same experts",
    departs="centroids are means of a layer's own inputs, where the methods surveyed embed whole texts",
)
def routed(
    module: nn.Module,
    base: Source | None,
    experts: Sequence[Source | Mapping[str, Factors]],
    layers: Pattern,
    router: Router = "arrow",
    *,
    rank: int | None = None,
    keep: int | None = None,
    temperature: float = 1.0,
    level: Literal["token", "example"] = "token",
    weight: Sequence[float] | None = None,
    data: Sequence[Iterable[Batch]] | None = None,
    loss: Objective | Loss = "labels",
    steps: int = 300,
    rate: float = 1e-3,
    seed: int = 0,
    forward: Forward | Sequence[Forward] | None = None,
    on_step: Callable[[Routing], None] | None = None,
) -> nn.Module:
    r"""A module in which linear layers keep several experts, and choose among them for every input.

    .. math:: W(x) = W_0 + \sum_e g_e(x)\, B_e A_e

    Args:
        module: what computes with the base's weights; it is copied.
        base: the weights that all experts were started from; None for those that the module has.
        experts: fine-tunes of the base; adapters (folders that PEFT wrote, or `Weights` with their tensors and
            ``adapter_config.json``); or ``{layer: (B, A)}``. All of one kind.
        layers: names of linear modules: ``"*.mlp.*"``. One of which an expert says nothing is not changed by it.
        router: ``"arrow"`` reads what each expert's change reads most; ``"centroid"`` needs ``data`` and takes the
            expert whose inputs lie nearest; ``"gate"`` is trained on ``data``; ``"mean"`` is the weighted merge.
        rank: of the changes, where experts are fine-tunes; by default all of it.
        keep: how many experts work on an input; by default all.
        temperature: scores are divided by this; a smaller one chooses more sharply.
        level: each ``"token"`` or each ``"example"`` has a choice of its own.
        weight: one number an expert: of ``"mean"``, and for what lies outside of the layers in fine-tunes (biases,
            norms), which is merged. By default 1 / k each.
        data: for each expert, batches of its task: a list or a loader.
        loss: what a gate is trained by: ``"labels"``, ``"entropy"`` without labels, or a function.
        steps, rate: of Adam on the gates.
        seed: of the order of batches.
        forward: ``(model, batch) -> logits``; one for all or one for each expert.
        on_step: told of every step.

    Returns:
        nn.Module: of the class of ``module``, in evaluation mode, each layer a `RoutedLinear`. `fold` makes a plain
        module of it.

    Raises:
        ValueError: no layer that fits, or none that an expert changes; experts that do not fit the module; options
            out of range; a router without the data it needs.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> experts = [{"0": (torch.ones(1, 1), torch.tensor([[3.0, 0.0]]))}, {"0": (torch.ones(1, 1), torch.eye(2)[1:])}]
    >>> found = routed(net, {"0.weight": torch.zeros(1, 2)}, experts, "0", "arrow", keep=1)
    >>> found(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    tensor([[3.],
            [1.]])
    """
    count = _checked(experts, router, keep, temperature, level, rank, weight)
    check_objective(loss, "routed", taught=False)
    ways = forwards(forward, count, "routed")
    if data is not None:
        check_data(data, count, "routed")
    elif router in ("centroid", "gate"):
        raise Error(f"routed: router={router!r} needs data=, for each of the {count} experts batches of its task")
    whole = copy.deepcopy(module).requires_grad_(False).eval()
    if base is not None:
        open(base).load_into(whole)
    places = _places(whole, layers)
    bank = _bank(whole, experts, places, rank, weight)
    means = _centroids(whole, places, data, ways) if router == "centroid" and data is not None else {}
    for place in places:
        layer = whole.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        options: dict[str, Any] = {"keep": keep, "temperature": temperature, "level": level}
        whole.set_submodule(
            place, RoutedLinear(layer, bank[place], router, points=means.get(place), weight=weight, **options)
        )
    whole.eval()
    if router == "gate" and data is not None:
        train_routers("routed", whole, data, loss, ways, steps=steps, rate=rate, seed=seed, on_step=on_step)
    return whole


def _checked(
    experts: Any, router: str, keep: int | None, temperature: float, level: str, rank: int | None, weight: Any
) -> int:
    if not isinstance(experts, Sequence) or isinstance(experts, str) or not experts:
        raise Error(f"routed takes a list of experts, got {type(experts).__name__}")
    for value, kind, word in ((router, Router, "router"), (level, Literal["token", "example"], "level")):
        if value not in get_args(kind):
            raise Error(f"routed: {word} is one of {', '.join(get_args(kind))}; got {value!r}")
    if keep is not None and not 1 <= keep <= len(experts):
        raise Error(f"routed: keep must be from 1 to {len(experts)}, the number of experts, got {keep}")
    if not temperature > 0 or (rank is not None and rank < 1):
        raise Error(f"routed needs temperature > 0 and rank >= 1, got {temperature} and {rank}")
    if weight is not None and len(weight) != len(experts):
        raise Error(f"routed needs {len(experts)} weights, one for each expert, got {len(weight)}")
    return len(experts)


def _places(whole: nn.Module, layers: Pattern) -> list[str]:
    linear = [name for name, inner in whole.named_modules() if isinstance(inner, nn.Linear)]
    found = [name for name in linear if matches(layers, name)]
    if not found:
        near = did_you_mean(str(layers), linear)
        raise Error(f"routed: no linear module fits layers={layers!r}{near}; there are {listed(linear) or 'none'}")
    return found


# The experts


def _bank(
    whole: nn.Module, experts: Sequence[Any], places: Sequence[str], rank: int | None, weight: Sequence[float] | None
) -> dict[str, list[Factors]]:
    """Layer -> the factors of every expert. What fine-tunes change elsewhere is merged into the module."""
    given = [_given(expert) for expert in experts]
    told = [one for one in given if one is not None]
    if not told:
        return _tuned(whole, experts, places, rank, weight)
    if len(told) != len(given):
        raise Error("routed: experts are all fine-tunes, or all adapters; some are of one kind and some of the other")
    bank: dict[str, list[Factors]] = {}
    for place in places:
        layer = whole.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        nothing = layer.weight.new_zeros(layer.out_features, 1), layer.weight.new_zeros(1, layer.in_features)
        bank[place] = [one.get(place, nothing) for one in told]
        for number, (b, a) in enumerate(bank[place]):
            wanted = (layer.out_features, layer.in_features)
            if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != wanted:
                raise Error(
                    f"routed: factors {list(b.shape)} and {list(a.shape)} of expert {number} do not fit {place}, "
                    f"which is {list(wanted)}"
                )
    for number, one in enumerate(told):
        if not any(place in one for place in places):
            raise Error(f"routed: expert {number} changes none of the layers; it changes {listed(one)}")
    return bank


def _given(expert: Any) -> dict[str, Factors] | None:
    """The factors of an adapter by module; None for a fine-tune."""
    if isinstance(expert, nn.Module):
        return None
    plain = isinstance(expert, Mapping) and not isinstance(expert, Weights) and bool(expert)
    if plain and all(isinstance(value, tuple) and len(value) == 2 for value in expert.values()):
        return dict(expert)
    from weightsmith.adapt.room import opened  # here, because adapters may themselves be merged

    if isinstance(expert, Mapping) and not any("lora_" in name for name in expert):
        return None
    try:
        found = opened(expert)
    except Error:
        if any("lora_" in name for name in open(expert)):
            raise
        return None
    odd = [d.module for d in found.deltas if d.embedding or d.bias is not None or d.magnitude is not None or d.depth]
    if odd or found.saved or found.tokens:
        raise Error(
            f"routed: {found.where} changes {listed([*odd, *found.saved, *found.tokens])} by more than a product of "
            "two factors; merge it into the base with weightsmith.adapt.apply, and give the fine-tune as an expert"
        )
    return {
        delta.module: (found.config.scale_of(delta.module) * materialize(delta.b).float(), materialize(delta.a).float())
        for delta in found.deltas
    }


def _tuned(
    whole: nn.Module, experts: Sequence[Source], places: Sequence[str], rank: int | None, weight: Sequence[float] | None
) -> dict[str, list[Factors]]:
    start, models = open(whole), [open(expert) for expert in experts]
    check_alike(models, start, "routed")
    start = Weights.of({name: value.clone() for name, value in start.items()})  # the module is written to below
    bank: dict[str, list[Factors]] = {}
    for place in places:
        name = f"{place}.weight"
        origin = start[name]
        wide = origin.to(torch.promote_types(origin.dtype, torch.float32))
        bank[place] = [factored(model[name].to(wide) - wide, rank) for model in models]
    shares = [1 / len(models)] * len(models) if weight is None else list(weight)
    merged = _sum_of(models, start, weight=shares)
    kept = start.select([f"{place}.weight" for place in places])
    (merged | kept).load_into(whole)
    return bank


# Routers that need data


@torch.no_grad()
def _centroids(
    whole: nn.Module, places: Sequence[str], data: Sequence[Iterable[Batch]], ways: Sequence[Forward]
) -> dict[str, Tensor]:
    """Layer -> ``[k, in]``: the mean of its inputs without the changes, over each expert's data."""
    sums: dict[str, list[Tensor]] = {place: [] for place in places}
    seen: dict[str, list[Tensor]] = {}

    def listen(place: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            seen.setdefault(place, []).append(torch.cat([rows.double().sum(0), rows.new_tensor([len(rows)]).double()]))

        return hook

    hooks = [whole.get_submodule(place).register_forward_pre_hook(listen(place)) for place in places]
    try:
        for number, (batches, way) in enumerate(zip(data, ways, strict=True)):
            seen.clear()
            for batch in batches:
                way(whole, batch)
            for place in places:
                if place not in seen:
                    raise Error(f"routed: the data of expert {number} never reach {place}, so it has no centroid there")
                total = torch.stack(seen[place]).sum(0)
                sums[place].append(total[:-1] / total[-1])
    finally:
        for hook in hooks:
            hook.remove()
    return {place: torch.stack(means) for place, means in sums.items()}
