"""Whether a network can still learn: units that no longer react, features that collapse, gradients that vanish.

A network that was trained for long, or on tasks that changed, often learns a new one worse than a fresh network.
No single number says why; these have been found to go with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._models import untouched
from weightsmith.inspect._parts import Source
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.training._parts import middle
from weightsmith.solve import effective_rank
from weightsmith.stats import Batch, Forward, Loss, example_gradients, fitted
from weightsmith.stats.room import default_forward
from weightsmith.weights import Pattern, matches, working

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Tanh,
    nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold,
)  # fmt: skip


def feature_rank(values: Tensor, *, delta: float = 0.01) -> int:
    r"""How many singular values make up all but a share ``delta`` of their sum.

    .. math:: \min \{ k : \textstyle\sum_{i \le k} \sigma_i \ge (1 - \delta) \sum_i \sigma_i \}

    (Kumar, Agarwal, Ghosh, Levine 2021, 'Implicit Under-Parameterization Inhibits Data-Efficient Deep Reinforcement
    Learning'.)

    Args:
        values: ``[r]`` singular values of features ``[examples, units]``, in any order.
        delta: the share that may be left out.

    Returns:
        0 where all are zero.

    Raises:
        ValueError: delta outside [0, 1), values below 0 or not finite.

    >>> feature_rank(torch.tensor([10.0, 5.0, 0.01])), feature_rank(torch.zeros(2))
    (2, 0)
    """
    if not 0 <= delta < 1:
        raise Error(f"delta lies in [0, 1), got {delta}")
    if not (values.isfinite() & (values >= 0)).all():
        raise Error("singular values are finite and at least 0; these are not")
    sums = values.double().sort(descending=True).values.cumsum(0)
    if not len(sums) or not float(sums[-1]):
        return 0
    return int((sums < (1 - delta) * sums[-1]).sum()) + 1


class _Layer:
    """What adds up over batches, of one layer: float64, units squared."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = self.largest = self.low = self.high = self.gram = torch.empty(0)

    def add(self, name: str, outputs: Tensor) -> None:
        units = 1 if outputs.dim() in (4, 5) else outputs.dim() - 1  # channels of images, else the last axis
        rows = working(outputs.detach()).movedim(units, -1).flatten(0, -2).double()
        if not len(rows):
            return
        if self.count and rows.shape[1] != len(self.sums):
            raise Error(f"layer {name} has {len(self.sums)} units, then {rows.shape[1]}: choose others with layers=")
        found = (rows.abs().sum(dim=0), rows.abs().amax(dim=0), rows.amin(dim=0), rows.amax(dim=0), rows.T @ rows)
        if not self.count:
            self.sums, self.largest, self.low, self.high, self.gram = found
        else:
            self.sums = self.sums + found[0]
            self.largest = torch.maximum(self.largest, found[1])
            self.low, self.high = torch.minimum(self.low, found[2]), torch.maximum(self.high, found[3])
            self.gram = self.gram + found[4]
        self.count += len(rows)

    def row(self, name: str, tau: float) -> dict[str, Any]:
        if not self.gram.isfinite().all():
            raise Error(f"outputs of layer {name} are not all finite: look at the weights before it and at the data")
        mean = self.sums / self.count
        overall = float(mean.mean())
        scores = mean / overall if overall else torch.zeros_like(mean)
        values = torch.linalg.eigvalsh(self.gram).clamp(min=0).sqrt()
        values = values[values > 1e-7 * values.max()]
        return {
            "layer": name,
            "units": len(mean),
            "dead": int((self.largest == 0).sum()),
            "constant": int((self.high == self.low).sum()),
            "dormant": int((scores <= tau).sum()),
            "mean activation": overall,
            "feature rank": feature_rank(values),
            "effective rank": effective_rank(values),
        }


@card(
    paper="Sokar, Agarwal, Castro, Evci 2023, 'The Dormant Neuron Phenomenon in Deep Reinforcement Learning'; "
    "Kumar et al. 2021, 'Implicit Under-Parameterization Inhibits Data-Efficient Deep Reinforcement "
    "Learning' (feature rank)",
    needs=("data",),
    unit="model",
)
def dead_units(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tau: float = 0.025,
    layers: Pattern | None = None,
    weights: Source | None = None,
    forward: Forward | None = None,
) -> Report:
    r"""Units that never react, or much less than the others of their layer.

    .. math:: s_i = \frac{\mathbb E_x |h_i(x)|}{\frac1m \sum_k \mathbb E_x |h_k(x)|}, \qquad
        i \text{ is } \tau\text{-dormant where } s_i \le \tau

    Args:
        model: in evaluation mode, left as it was.
        batches: any iterable, read once.
        tau: of dormant units.
        layers: names of the modules whose outputs are looked at; by default the activation modules. An activation
            that is only a function shows in no module: name the module that follows or holds it. A module that is
            used several times in a forward pass counts as several layers.
        weights: a checkpoint in place of the model's own.
        forward: ``(model, batch) -> outputs``, where the default does not fit.

    Returns:
        Report: a row a layer (in the order of use): ``units`` (channels of images; else the last axis), ``dead``
        (exactly 0 on all data), ``constant`` (one value on all data), ``dormant``, ``mean activation`` (absolute),
        ``feature rank`` (singular values that hold 99 % of their sum) and ``effective rank``. Memory: units squared
        for each layer.

    Raises:
        ValueError: no layer fits, none of them was used, no batch, outputs that are not finite.

    >>> net = torch.nn.Sequential(torch.nn.ReLU())
    >>> dead_units(net, [torch.tensor([[1.0, -1.0], [2.0, -3.0]])])["dead"]
    [1]
    """
    if not tau >= 0:
        raise Error(f"tau is at least 0, got {tau}")
    found: dict[str, _Layer] = {}
    seen = False
    with untouched(model), torch.no_grad(), _heard(model, layers, found):
        held = {} if weights is None else fitted(model, weights)

        def called(*inputs: Any, **named: Any) -> Any:
            return functional_call(model, held, inputs, named)

        for batch in batches:
            (forward or default_forward)(called, batch)
            seen = True
    used = {name: layer for name, layer in found.items() if layer.count}
    if not used:
        raise Error("dead_units needs at least one batch of data, got none" if not seen else "no chosen layer was used")
    rows = [layer.row(name, tau) for name, layer in used.items()]
    units = sum(row["units"] for row in rows)
    figures = {
        "all units": units,
        "dead, share": sum(row["dead"] for row in rows) / units,
        "constant, share": sum(row["constant"] for row in rows) / units,
        "dormant, share": sum(row["dormant"] for row in rows) / units,
        "tau": tau,
        "feature rank of the last layer": rows[-1]["feature rank"],
        "effective rank of the last layer": rows[-1]["effective rank"],
    }
    names = [row["layer"] for row in rows]
    lines = [Line(column, names, [row[column] / row["units"] for row in rows], style="bars")
             for column in ("dead", "dormant")]  # fmt: skip
    plot = Plot("Units that do not react", "layer", "share of units", lines)
    notes = ["Activations that are functions and not modules are not seen; layers= names others."] * (layers is None)
    return Report("Dead and dormant units", figures, rows, [plot], notes)


@contextmanager
def _heard(model: nn.Module, layers: Pattern | None, found: dict[str, _Layer]) -> Iterator[None]:
    chosen = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, _ACTIVATIONS) if layers is None else name and matches(layers, name))
    }
    if not chosen:
        known = (
            f"no module fits layers={layers!r}; there are {listed(name for name, _ in model.named_modules() if name)}"
        )
        if layers is None:
            known = "the model has no activation modules; name others with layers="
        raise Error(known)

    calls: Counter[str] = Counter()

    def hear(name: str, output: Any) -> None:
        calls[name] += 1
        if calls[name] > 1:
            name = f"{name}, use {calls[name]}"
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.dim():
            found.setdefault(name, _Layer()).add(name, first if first.dim() > 1 else first[None])

    hooks = [m.register_forward_hook(lambda _, __, output, name=name: hear(name, output)) for name, m in chosen.items()]
    hooks.append(model.register_forward_pre_hook(lambda *_: calls.clear()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@card(
    paper="Lyle et al. 2023, 'Understanding Plasticity in Neural Networks'; Dohare et al. 2024, 'Loss of plasticity in "
    "deep continual learning'; Lewandowski et al. 2023, 'Directions of Curvature as an Explanation for Loss of "
    "Plasticity'",
    needs=("data",),
    unit="model",
    departs="the curvature's rank is that of examples' gradients (the empirical Fisher matrix), not of the Hessian",
)
def plasticity(
    model: nn.Module,
    batches: Sequence[Batch],
    checkpoints: Sequence[Source],
    *,
    tau: float = 0.025,
    layers: Pattern | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    dim: int | None = 512,
    seed: int = 0,
) -> Report:
    """Signs that a network loses its ability to learn, checkpoint by checkpoint.

    Args:
        model: in evaluation mode, left as it was.
        batches: a sequence of ``(inputs, labels)``, best of the task that is to be learned next.
        checkpoints: in the order of the run.
        tau, layers, forward: as for `dead_units`.
        loss: ``(model, batch) -> number``, summed over examples; by default cross-entropy, which knows no
            ``forward``: give both where the default does not fit.
        dim: gradients are projected into so many numbers; None for exact ones.
        seed: of the projection.

    Returns:
        Report: a row a checkpoint: shares of ``dead`` and ``dormant`` units, ``feature rank`` and ``effective rank``
        of the last layer looked at, the ``weight`` norm over the first checkpoint's, the norm of the mean
        ``gradient``, and ``gradient rank``, the effective rank of the examples' gradients: how many directions the
        loss is curved in. Memory: ``dim`` numbers an example, and the square of the smaller of the two.

    Raises:
        ValueError: no checkpoint, batches that can be read only once, outputs or gradients that are not finite.
    """
    if not checkpoints or not isinstance(batches, Sequence) or not batches:
        raise Error("plasticity needs at least one checkpoint, and a sequence of batches (it is read more than once)")
    rows: list[dict[str, Any]] = []
    for place, one in enumerate(checkpoints):
        units = dead_units(model, batches, tau=tau, layers=layers, weights=one, forward=forward)
        with untouched(model):
            held = fitted(model, one)
            own = [held[name] for name, _ in model.named_parameters() if name in held]
            norm = math.sqrt(sum(float(working(value).double().square().sum()) for value in own))
            gradients = example_gradients(model, batches, dim=dim, seed=seed, weights=one, loss=loss).double()
        if not gradients.isfinite().all():
            raise Error(f"gradients of checkpoint {place} are not all finite: the run has diverged, leave it out")
        flat = gradients if gradients.shape[0] > gradients.shape[1] else gradients.T
        values = torch.linalg.eigvalsh(flat.T @ flat).clamp(min=0)
        rows.append(
            {
                "checkpoint": place,
                "dead": units.figures["dead, share"],
                "dormant": units.figures["dormant, share"],
                "feature rank": units.figures["feature rank of the last layer"],
                "effective rank": units.figures["effective rank of the last layer"],
                "weight": norm,
                "gradient": float(gradients.mean(dim=0).norm()),
                "gradient rank": effective_rank(values[values > 1e-12 * values.max()]),
            }
        )
    first = rows[0]["weight"]
    for row in rows:
        row["weight"] = row["weight"] / first if first else math.nan
    changes = {
        name: _ratio(rows[-1][name], rows[0][name]) for name in ("feature rank", "weight", "gradient", "gradient rank")
    }
    figures = {
        "dormant, first": rows[0]["dormant"],
        "dormant, last": rows[-1]["dormant"],
        **{f"{name}, last over first": value for name, value in changes.items()},
        "mean dead": middle([row["dead"] for row in rows]),
    }
    places = [row["checkpoint"] for row in rows]
    plots = [
        Plot("Units", "checkpoint", "share of units",
             [Line(c, places, [row[c] for row in rows]) for c in ("dead", "dormant")]),
        Plot("Ranks", "checkpoint", "effective rank",
             [Line(c, places, [row[c] for row in rows]) for c in ("effective rank", "gradient rank")]),
    ]  # fmt: skip
    return Report("Plasticity along a run", figures, rows, plots)


def _ratio(last: float, first: float) -> float:
    return last / first if first else math.nan
