"""A layer that merges several models anew for every example.

Where tasks conflict most (in the MLPs of a transformer), the start and the task vectors are all kept, and a small
router reads from a layer's input how much of each task vector this example needs. All other tensors are merged
once and for all. The routers are trained without labels: the model should be sure of its answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.merge import _task_vectors
from weightsmith.merge._coefficients import Objective, Values, check_data, check_objective, forwards
from weightsmith.merge.moe._training import Routing, train_routers
from weightsmith.merge.room import Source, check_alike, lift, opened_models
from weightsmith.stats.room import Batch, Forward, Loss
from weightsmith.weights import Pattern, Weights, matches, open

_sum_of = lift(_task_vectors.task_arithmetic)

SMALL = 0.01
"""Standard deviation of a router's first weights: so small that it begins near its bias."""


class WeightMixture(nn.Module):
    r"""A layer whose weights are ``start + sum_i a_i direction_i``, with ``a`` found for each example by a router.

    .. math:: a(x) = \frac1n \sum_{j=1}^{n} r(h_j), \qquad y = f\bigl(x;\; w_0 + \sum_i a_i(x)\, d_i\bigr)

    over the positions :math:`h_1, \dots, h_n` of an example.

    Args:
        layer: a module of inputs ``[n, ..., features]`` with the weights of the start; it is copied and frozen.
        directions: parameter or buffer -> ``[k, *shape]``.
        features: of the input; None with ``depth`` 0.
        amount: every coefficient before the router is trained.
        depth: linear layers of the router; 0 for coefficients that do not depend on the input.
        generator: for the router's first weights.
        at_once: examples whose weights are held in memory together.

    >>> mixture = WeightMixture(torch.nn.Linear(1, 1), {"bias": torch.ones(2, 1)}, features=1, amount=0.5)
    >>> mixture.fold()(torch.zeros(1, 1)) - mixture.layer(torch.zeros(1, 1))       # both directions by half
    tensor([[1.]])
    """

    def __init__(
        self,
        layer: nn.Module,
        directions: Values,
        *,
        features: int | None = None,
        amount: float = 0.3,
        depth: int = 1,
        generator: torch.Generator | None = None,
        at_once: int = 32,
    ):
        super().__init__()
        self.layer = copy.deepcopy(layer).requires_grad_(False)
        self.names = list(directions)
        self.at_once = at_once
        for number, name in enumerate(self.names):  # names of parameters have dots, those of buffers must not
            self.register_buffer(f"direction_{number}", directions[name])
        first = next(iter(directions.values()))
        self.router = Router(len(first), features, amount, depth, generator).to(first.device)

    def weight(self, inputs: Tensor) -> Tensor:
        """The coefficients ``[n, k]`` of every example."""
        found = self.router(inputs)
        return found.flatten(1, -2).mean(dim=1) if found.dim() > 2 else found

    def mixed(self, weight: Tensor) -> dict[str, Tensor]:
        """The layer's values for coefficients ``[k]``."""
        held = self.layer.state_dict(keep_vars=True)
        return {
            name: (held[name].to(direction) + torch.tensordot(weight.to(direction), direction, dims=1)).to(held[name])
            for name, direction in ((n, self.get_buffer(f"direction_{i}")) for i, n in enumerate(self.names))
        }

    def forward(self, inputs: Tensor, *others: Any, **named: Any) -> Tensor:
        """What the layer gives for each example with weights of its own; other arguments are the same for all."""

        def one(weight: Tensor, example: Tensor) -> Tensor:
            found = functional_call(self.layer, self.mixed(weight), (example[None], *others), named)
            return found.squeeze(0)

        if self.router.weight is None:
            return functional_call(self.layer, self.mixed(self.router.bias), (inputs, *others), named)
        return vmap(one, chunk_size=self.at_once, randomness="different")(self.weight(inputs), inputs)

    def fold(self, weight: Sequence[float] | Tensor | None = None) -> nn.Module:
        """The plain layer with one set of coefficients for all examples: by default, the router's bias."""
        bias = self.router.bias.detach()
        chosen = bias if weight is None else torch.as_tensor(weight).to(bias)
        if chosen.shape != bias.shape:
            raise Error(f"fold needs {len(bias)} coefficients, got {list(chosen.shape)}")
        plain = copy.deepcopy(self.layer)
        with torch.no_grad():
            for name, value in self.mixed(chosen).items():
                plain.state_dict(keep_vars=True)[name].copy_(value)
        return plain


class Router(nn.Module):
    """Coefficients ``[..., k]`` from features: linear layers with ReLU between them, or with depth 0 a constant."""

    def __init__(self, count: int, features: int | None, amount: float, depth: int, generator: torch.Generator | None):
        super().__init__()
        if depth and features is None:
            raise Error("a router needs features=, the width of the layer's input; or depth=0")
        inner = features or 0

        def small(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, inner).normal_(std=SMALL, generator=generator))

        self.hidden = nn.ParameterList()
        for _ in range(depth - 1):
            self.hidden += [small(inner), nn.Parameter(torch.zeros(inner))]
        self.weight = small(count) if depth else None
        self.bias = nn.Parameter(torch.full((count,), float(amount)))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.weight is None:
            return self.bias.expand(*inputs.shape[:-1], -1)
        found = inputs.to(self.weight.dtype)
        for weight, bias in zip(self.hidden[::2], self.hidden[1::2], strict=True):
            found = functional.linear(found, weight, bias).relu()
        return functional.linear(found, self.weight, self.bias)


@card(
    paper="Tang, Shen, Luo, Yin, Zhang, Tao 2024, 'Merging Multi-Task Models via Weight-Ensembling Mixture of Experts'",
    covers=("merging-multi-task-models-weight-ensembling",),
    needs=("base", "data"),
    unit="model",
    claim="more accurate on all tasks than task arithmetic with its best single coefficient",
    departs="the loss is the mean of the tasks' losses and not their sum",
)
def weight_ensembling(
    models: Sequence[Source],
    base: Source,
    module: nn.Module,
    layers: Pattern,
    data: Sequence[Iterable[Batch]] | None = None,
    *,
    amount: float = 0.3,
    depth: int = 2,
    loss: Objective | Loss = "entropy",
    steps: int = 1000,
    rate: float = 1e-4,
    seed: int = 0,
    at_once: int = 32,
    forward: Forward | Sequence[Forward] | None = None,
    on_step: Callable[[Routing], None] | None = None,
) -> nn.Module:
    r"""A module in which some layers are merged anew for every example, and the rest by task arithmetic.

    .. math:: w(x) = w_0 + \sum_t \lambda_t(x)\, (w_t - w_0) \text{ in the layers}, \qquad
        w = w_0 + \lambda \sum_t (w_t - w_0) \text{ elsewhere}

    Before the routers are trained it gives what task arithmetic with ``amount`` gives, up to their small first
    weights. It holds the layers once for the start and once for each model. A router reads every position of its
    layer's input and takes the mean of what it finds, padding included.

    Args:
        models: a fine-tune of ``base`` for each task; anything that `weightsmith.open` opens.
        base: the weights they were all started from.
        module: what computes with such weights; it is copied. It may be built on the meta device.
        layers: names of modules that take ``[n, ..., features]`` and give one tensor: ``"*.mlp"``. Where one lies
            inside of another the outer one counts.
        data: for each model, unlabelled batches of its task: a list (in a new order every time) or a loader. None
            leaves the routers as they begin.
        amount: :math:`\lambda`, and every coefficient before the first step.
        depth: linear layers of a router; 0 for coefficients that do not depend on the input.
        loss: as in `weightsmith.merge.adamerging`; ``"labels"`` for labelled data. The two kinds of agreement need
            whole models, and are not to be had here.
        steps: of Adam on the routers, each on one batch of every task.
        rate: how large they are.
        seed: of the routers' first weights and of the order of batches.
        at_once: examples for which a layer's weights are held in memory together.
        forward: ``(model, batch) -> logits``; one for all tasks or one for each.
        on_step: told of every step.

    Returns:
        nn.Module: of the class of ``module``, in evaluation mode, each layer a `WeightMixture`. Only routers have
        parameters that are trained. `fold` makes a plain module of it.

    Raises:
        ValueError: no model, models of different architectures or ones that do not fit the module, no layer that
            fits, or a loss that is not finite.

    >>> net, base = torch.nn.Sequential(torch.nn.Linear(1, 1)), {"0.weight": torch.ones(1, 1), "0.bias": torch.zeros(1)}
    >>> moved = {"0.weight": torch.ones(1, 1), "0.bias": torch.ones(1)}
    >>> mixed = weight_ensembling([moved, moved], base, net, "0", depth=0)
    >>> mixed(torch.zeros(1, 1)).detach()                                                  # 0 + 0.3 + 0.3
    tensor([[0.6000]])
    """
    method = "weight_ensembling"
    opened, origin = opened_models(models, method), open(base)
    check_alike(opened, origin, method)
    check_objective(loss, method, taught=False)
    ways = forwards(forward, len(opened), method)
    if data is not None:
        check_data(data, len(opened), method)
    if depth < 0 or at_once < 1:
        raise Error(f"{method} needs depth >= 0 and at_once >= 1, got {depth} and {at_once}")
    chosen = _outermost(module, layers)
    whole = copy.deepcopy(module).requires_grad_(False).eval()
    _sum_of(opened, origin, weight=amount).load_into(whole)
    generator = torch.Generator().manual_seed(seed)
    for place in chosen:
        layer, directions = _taken_apart(whole.get_submodule(place), place, opened, origin)
        mixture = WeightMixture(
            layer,
            directions,
            features=_features(layer, place) if depth else None,
            amount=amount,
            depth=depth,
            generator=generator,
            at_once=at_once,
        )
        whole.set_submodule(place, mixture)
    whole.eval()
    if data is None:
        return whole
    train_routers(method, whole, data, loss, ways, steps=steps, rate=rate, seed=seed, on_step=on_step)
    return whole


def _outermost(module: nn.Module, layers: Pattern) -> list[str]:
    names = [name for name, inner in module.named_modules() if name and list(inner.parameters())]
    found = [name for name in names if matches(layers, name)]
    if not found:
        hint = did_you_mean(str(layers), names)
        raise Error(f"weight_ensembling: no module with weights fits layers={layers!r}{hint}")
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _taken_apart(
    layer: nn.Module, place: str, models: Sequence[Weights], base: Weights
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The layer with the start's values, and how each model differs from them."""
    began, directions = copy.deepcopy(layer), {}
    seen: set[int] = set()
    with torch.no_grad():
        for name, held in began.state_dict(keep_vars=True).items():
            own = f"{place}.{name}"
            if id(held) in seen:
                continue  # a tied tensor is mixed once, under its first name
            seen.add(id(held))
            if own not in base:
                raise Error(f"weight_ensembling: the models have no {own}, which {place} needs")
            start = base[own].to(held.device)
            if start.is_floating_point():
                held.copy_(start)
                wide = start.float() if start.dtype != torch.float64 else start
                directions[name] = torch.stack([model[own].to(wide) for model in models]) - wide
    return began, directions


def _features(layer: nn.Module, place: str) -> int:
    """The width of a layer's input: that of the first weight in it which is a matrix."""
    for parameter in layer.parameters():
        if parameter.dim() == 2:
            return parameter.shape[1]
    raise Error(f"weight_ensembling: {place} has no matrix that tells the width of its input; use depth=0")
