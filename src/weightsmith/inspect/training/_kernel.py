"""Whether training moves along a fixed tangent (lazy) or changes what the network can express (rich).

Near its start a network is a linear model in its gradients; their inner products between examples are the neural
tangent kernel. Where the kernel stays the same, training is a kernel regression. Where it turns towards the labels,
features are learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of, untouched
from weightsmith.inspect._parts import Source
from weightsmith.inspect._plain import layer_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.training._parts import at_least
from weightsmith.solve import effective_rank
from weightsmith.stats import fitted, project
from weightsmith.stats.room import default_forward
from weightsmith.weights import Pattern, working

Outputs = Callable[[Any, Tensor], Tensor]
"""``(model, inputs [n, ...]) -> [n, c]``."""


@card(
    paper="Jacot, Gabriel, Hongler 2018, 'Neural Tangent Kernel: Convergence and Generalization in Neural Networks'",
    needs=("data",),
    unit="model",
    departs="with dim= the gradients are projected at random, and inner products are right to about 1 / sqrt(dim)",
)
def ntk(
    model: nn.Module,
    inputs: Tensor,
    *,
    weights: Source | None = None,
    pattern: Pattern = "*",
    by_layer: bool = False,
    whole: bool = False,
    dim: int | None = None,
    at_once: int = 32,
    forward: Outputs | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""The empirical neural tangent kernel of some examples.

    .. math:: K_{ij} = \frac1c \sum_{a=1}^{c} \nabla_\theta f_a(x_i) \cdot \nabla_\theta f_a(x_j)

    Args:
        model: in evaluation mode, left as it was; an example's outputs must not depend on the others.
        inputs: ``[n, ...]``.
        weights: a checkpoint in place of the model's own.
        pattern: names of the parameters.
        by_layer: the part of each layer beside the whole; the parts sum to it.
        whole: all pairs of outputs, ``[n, c, n, c]``, without the mean.
        dim: gradients of each output are projected into so many numbers a parameter tensor; None for exact ones.
        at_once: examples whose exact gradients are held together.
        forward: ``(model, inputs) -> [n, c]``, where the default does not fit. Other axes of outputs count as c.
        seed: of the projection.

    Returns:
        dict: ``"all"`` and, with ``by_layer``, the layers' names; each ``[n, n]``, float32 or wider. Memory: ``n * c``
        times the parameters, or times ``dim`` and the tensors; ``whole`` has ``(n * c) ** 2`` numbers.

    Raises:
        ValueError: no example, no parameter that fits, a layer called "all" that would be told apart.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> ntk(net, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))["all"]
    tensor([[5., 3.],
            [3., 9.]])
    """
    at_least(1, at_once=at_once)
    if dim is not None:
        at_least(1, dim=dim)
    given, parameters = _examples(inputs, at_once), parameters_of(model, pattern)
    if by_layer and "all" in map(layer_of, parameters):
        raise Error('a layer is called "all", as the whole kernel is; choose by pattern= in place of by_layer')
    parts: dict[str, list[Tensor]] = {name: [] for name in parameters}
    with untouched(model), sdpa_kernel(SDPBackend.MATH), progress.task("tangent kernel", len(inputs)) as advance:
        held, single = _function(model, weights, forward)
        chosen = {name: held[name] for name in parameters}
        slopes = vmap(jacrev(lambda values, one: single({**held, **values}, one)), in_dims=(None, 0))
        for part in given:
            for name, found in slopes(chosen, part).items():
                flat = found.detach().flatten(2) if found.dim() > 2 else found.detach()[..., None]
                if dim is not None and dim < flat.shape[2]:
                    flat = project({name: flat.flatten(0, 1)}, dim, seed).view(*flat.shape[:2], dim)
                parts[name].append(flat)
            advance(len(part))
    kernels: dict[str, Tensor] = {}
    for name in parameters:
        rows = torch.cat(parts.pop(name))
        kernel = torch.einsum("iap,jbp->iajb", rows, rows) if whole else _traced(rows)
        for key in ("all", layer_of(name)) if by_layer else ("all",):
            kernels[key] = kernels[key] + kernel if key in kernels else kernel
    return kernels


def _examples(inputs: Tensor, at_once: int) -> Sequence[Tensor]:
    """A few at a time, narrow floats as float32.

    Raises:
        Error: there is none.
    """
    if not isinstance(inputs, Tensor) or not inputs.dim() or not len(inputs):
        raise Error("a tangent is taken at inputs [n, ...] of at least one example")
    return working(inputs).split(at_once)


def _traced(rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    return flat @ flat.T / rows.shape[1]


def _function(
    model: nn.Module, weights: Source | None, forward: Outputs | None
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """The tensors that the model is called with (narrow floats as float32), and ``(tensors, one example) -> [c]``."""
    held = {name: value.detach() for name, value in model.named_parameters()}
    held |= {name: value.detach() for name, value in model.named_buffers()}
    if weights is not None:
        held |= {name: value for name, value in fitted(model, weights).items() if name in held}
    held = {name: working(value) for name, value in held.items()}

    def single(tensors: dict[str, Tensor], one: Tensor) -> Tensor:
        def called(*inputs: Any, **named: Any) -> Any:
            return functional_call(model, tensors, inputs, named)

        return (forward or default_forward)(called, one[None]).flatten()

    return held, single


def kernel_alignment(first: Tensor, second: Tensor, *, centred: bool = True) -> float:
    r"""How alike two kernels over the same examples are: the cosine of the matrices, 1 for equal ones.

    .. math:: \frac{\langle HAH, HBH \rangle}{\lVert HAH \rVert \, \lVert HBH \rVert}, \qquad H = I - \tfrac1n 1 1^\top

    (Cortes, Mohri, Rostamizadeh 2012, 'Algorithms for Learning Kernels Based on Centered Alignment'.)

    Args:
        first, second: ``[n, n]`` symmetric.
        centred: whether rows and columns are centred first (H), so that what all examples share does not count.

    Returns:
        In [-1, 1], from 0 for positive semi-definite kernels; NaN where one is zero, but for rounding.

    Raises:
        ValueError: kernels of different shapes, or not square.

    >>> round(kernel_alignment(torch.eye(3), 5 * torch.eye(3)), 6)
    1.0
    """
    if first.dim() != 2 or first.shape != second.shape or first.shape[0] != first.shape[1]:
        raise Error(f"kernels are [n, n] over the same examples, got {list(first.shape)} and {list(second.shape)}")
    a, b = first.double(), second.double().to(first.device)
    if centred:
        a, b = _centred(a), _centred(b)
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale else math.nan


def _centred(kernel: Tensor) -> Tensor:
    rows = kernel - kernel.mean(dim=0, keepdim=True)
    found = rows - rows.mean(dim=1, keepdim=True)
    constant = found.norm() <= 1e-12 * kernel.norm()  # what is left is rounding, and its direction means nothing
    return torch.zeros_like(found) if constant else found


def label_alignment(kernel: Tensor, labels: Tensor, *, centred: bool = True) -> float:
    """How far a kernel holds examples of one class together: its alignment with that of the labels.

    Args:
        kernel: ``[n, n]``.
        labels: classes ``[n]`` (any integers; the kernel compared to is 1 where they are equal), or targets ``[n]`` or
            ``[n, c]`` of floats (their inner products).
        centred: as for `kernel_alignment`.

    Raises:
        ValueError: labels of another number of examples.

    >>> round(label_alignment(torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), torch.tensor([0, 0, 1])), 6)
    1.0
    """
    if labels.shape[:1] != kernel.shape[:1]:
        raise Error(f"labels {list(labels.shape)} do not fit a kernel {list(kernel.shape)}")
    rows = labels.to(kernel.device).reshape(len(labels), -1)
    if labels.is_floating_point():
        return kernel_alignment(kernel, rows.double() @ rows.double().T, centred=centred)
    return kernel_alignment(kernel, (rows[:, None] == rows).sum(dim=2), centred=centred)


def kernel_rank(kernel: Tensor) -> float:
    """The effective rank of a kernel: the exponential of the entropy of its eigenvalues' shares.

    Args:
        kernel: ``[n, n]`` symmetric.

    Returns:
        0 for zeros, NaN where something is not finite.

    >>> round(kernel_rank(torch.eye(4)), 4)
    4.0
    """
    if not kernel.isfinite().all():
        return math.nan
    return effective_rank(torch.linalg.eigvalsh(kernel.double()).clamp(min=0))


@card(
    paper="Lee et al. 2019, 'Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent'; "
    "Chizat, Oyallon, Bach 2019, 'On Lazy Training in Differentiable Programming'",
    needs=("data",),
    unit="model",
    claim="1 for models that are linear in their weights",
)
def linear_share(
    model: nn.Module,
    inputs: Tensor,
    before: Source,
    after: Source,
    *,
    at_once: int = 256,
    forward: Outputs | None = None,
) -> float:
    r"""How much of what a network learned its tangent at the start explains.

    .. math:: 1 - \frac{\lVert f(\theta_1) - f(\theta_0) - J_{\theta_0} (\theta_1 - \theta_0) \rVert^2}
        {\lVert f(\theta_1) - f(\theta_0) \rVert^2}

    Args:
        model: in evaluation mode, left as it was.
        inputs: ``[n, ...]``.
        before, after: checkpoints. Buffers are those of ``before`` throughout.
        at_once: examples that are asked together.
        forward: as for `ntk`.

    Returns:
        1 where training was linear; below 0 where the tangent is worse than no change at all; NaN where nothing
        changed.

    Raises:
        ValueError: no example, checkpoints that do not fit the model.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> linear_share(net, torch.ones(2, 1), {"weight": torch.ones(1, 1)}, {"weight": torch.zeros(1, 1)})
    1.0
    """
    at_least(1, at_once=at_once)
    parts = _examples(inputs, at_once)
    with untouched(model), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        start, single = _function(model, before, forward)
        ends = {name: working(value) for name, value in fitted(model, after).items()}
        moving = {name for name, value in model.named_parameters() if value.is_floating_point()}
        fixed = {name: value for name, value in start.items() if name not in moving}
        origin = {name: start[name] for name in moving}
        target = {name: ends[name] for name in moving}
        step = {name: target[name] - origin[name] for name in moving}
        total = missed = 0.0
        for part in parts:

            def outputs(values: dict[str, Tensor], part: Tensor = part) -> Tensor:
                return vmap(lambda one: single({**fixed, **values}, one))(part)

            at_start, tangent = jvp(outputs, (origin,), (step,))[:2]
            change = outputs(target).double() - at_start.double()
            total += float(change.square().sum())
            missed += float((change - tangent.double()).square().sum())
    return 1 - missed / total if total else math.nan


@card(
    paper="Fort et al. 2020, 'Deep learning versus kernel learning: an empirical study of loss landscape geometry and "
    "the time evolution of the Neural Tangent Kernel'; Baratin et al. 2021, 'Implicit Regularization via Neural "
    "Feature Alignment'; Chizat, Oyallon, Bach 2019, 'On Lazy Training in Differentiable Programming'",
    needs=("data",),
    unit="model",
    claim="alignment and linear share are 1 for models that are linear in their weights",
)
def kernel_change(
    model: nn.Module,
    inputs: Tensor,
    checkpoints: Sequence[Source],
    *,
    labels: Tensor | None = None,
    pattern: Pattern = "*",
    by_layer: bool = False,
    dim: int | None = None,
    at_once: int = 32,
    forward: Outputs | None = None,
    seed: int = 0,
) -> Report:
    r"""How the tangent kernel changed along a run: lazy where it did not, rich where it turned to the labels.

    Args:
        model: in evaluation mode, left as it was.
        inputs: ``[n, ...]``, at least two examples.
        checkpoints: at least two, in the order of the run.
        labels: ``[n]`` classes or ``[n, ...]`` targets.
        pattern, by_layer, dim, at_once, forward, seed: as for `ntk`.

    Returns:
        Report: a row a checkpoint (and layer): ``alignment`` of its kernel with the first (centred), kernel
        ``distance`` :math:`1 - \cos` from the first (not centred), ``label alignment`` (None without labels),
        ``effective rank``, ``trace`` over that of the first, and ``moved``, the relative change of the weights
        :math:`\lVert \theta - \theta_0 \rVert / \lVert \theta_0 \rVert`. Figures: those of the last whole kernel, and
        ``linear share`` (see `linear_share`; of all parameters), which is 1 for lazy training.

    Raises:
        ValueError: fewer than two checkpoints or examples, labels that do not fit.
    """
    if len(checkpoints) < 2 or len(inputs) < 2:
        raise Error(f"kernel_change needs 2 checkpoints and examples, got {len(checkpoints)} and {len(inputs)}")
    if labels is not None and len(labels) != len(inputs):
        raise Error(f"labels {list(labels.shape)} do not fit {len(inputs)} inputs")
    options: dict[str, Any] = {"pattern": pattern, "by_layer": by_layer, "dim": dim, "at_once": at_once, "seed": seed}
    start: dict[str, Tensor] = {}
    rows = []
    for place, one in enumerate(checkpoints):
        found = ntk(model, inputs, weights=one, forward=forward, **options)
        start = start or found
        moved = _moved(model, checkpoints[0], one, pattern)
        for layer, kernel in found.items():
            first = start[layer]
            trace = float(first.diagonal().sum())
            rows.append(
                {
                    "checkpoint": place,
                    "layer": layer,
                    "alignment": kernel_alignment(first, kernel),
                    "distance": 1 - kernel_alignment(first, kernel, centred=False),
                    "label alignment": None if labels is None else label_alignment(kernel, labels),
                    "effective rank": kernel_rank(kernel),
                    "trace": float(kernel.diagonal().sum()) / trace if trace else math.nan,
                    "moved": moved[layer],
                }
            )
    whole = [row for row in rows if row["layer"] == "all"]
    figures = {
        "alignment with the first": whole[-1]["alignment"],
        "kernel distance": whole[-1]["distance"],
        "label alignment, first": whole[0]["label alignment"],
        "label alignment, last": whole[-1]["label alignment"],
        "effective rank, first": whole[0]["effective rank"],
        "effective rank, last": whole[-1]["effective rank"],
        "weights moved": whole[-1]["moved"],
        "linear share": linear_share(model, inputs, checkpoints[0], checkpoints[-1], forward=forward),
    }
    places = [row["checkpoint"] for row in whole]
    lines = [Line("with the first", places, [row["alignment"] for row in whole])]
    if labels is not None:
        lines.append(Line("with the labels", places, [row["label alignment"] for row in whole]))
    return Report("Change of the tangent kernel", figures, rows, [Plot("Alignment", "checkpoint", "alignment", lines)])


def _moved(model: nn.Module, first: Source, last: Source, pattern: Pattern) -> dict[str, float]:
    """Relative change of the weights, of all that fit and by layer."""
    start, end = fitted(model, first), fitted(model, last)
    squares: dict[str, list[float]] = {}
    for name in parameters_of(model, pattern):
        before = working(start[name]).double()
        sums = [float((working(end[name]).double() - before).square().sum()), float(before.square().sum())]
        for key in ("all", layer_of(name)):
            known = squares.get(key, [0.0, 0.0])
            squares[key] = [known[0] + sums[0], known[1] + sums[1]]
    return {key: math.sqrt(change / length) if length else math.nan for key, (change, length) in squares.items()}
