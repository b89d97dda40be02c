"""How much of each fine-tune goes into a merge is learned, with few or no labels.

One coefficient for all models and layers is a compromise. With one for each task and layer a merge fits several
tasks better, and they are few enough to be learned from unlabelled inputs: the merge should be sure of its
answers, or give those that the fine-tune of the task gives. If each task may also keep one layer of its own, most
of what is left of the conflict between tasks is gone, at the cost of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.merge import _task_vectors
from weightsmith.merge._coefficients import (
    Objective,
    Per,
    Progress,
    Span,
    Values,
    asked,
    check_data,
    check_objective,
    descend,
    forwards,
    span,
)
from weightsmith.merge.room import Source, check_alike, lift, opened_models
from weightsmith.stats.room import Batch, Forward, Loss, restored
from weightsmith.weights import Pattern, Step, Weights, matches, open

_sum_of = lift(_task_vectors.task_arithmetic)

BOUNDS = (0.0, 1.0)


@card(
    paper="Yang, Wang, Shen, Liu, Guo, Wang, Tao 2024, 'AdaMerging: Adaptive Model Merging for Multi-Task Learning'",
    needs=("base", "data"),
    unit="model",
    claim="with coefficients learned from unlabelled inputs at least as accurate on all tasks as with the best single "
    "coefficient",
    departs="a coefficient that leaves its bounds is moved back to them, where the paper's code cuts it off within the "
    "model, so that it never comes back; the loss is the mean of the tasks' losses and not their sum",
)
def adamerging(
    models: Sequence[Source],
    base: Source,
    module: nn.Module,
    data: Sequence[Iterable[Batch]],
    *,
    per: Per = "tensor",
    loss: Objective | Loss = "entropy",
    initial: float = 0.3,
    bounds: tuple[float, float] = BOUNDS,
    steps: int = 500,
    rate: float = 1e-3,
    seed: int = 0,
    forward: Forward | Sequence[Forward] | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Weights:
    r"""Task arithmetic with coefficients that are trained on what the merge answers.

    .. math:: w_l = w_{0,l} + \sum_t \lambda_{t,l} (w_{t,l} - w_{0,l}), \qquad
        \lambda = \arg\min \frac1T \sum_t \mathbb E_{x \sim t}\, H\bigl(p(\cdot \mid x; w)\bigr)

    Only the search holds the models in memory (the base and a difference for each, in float32 or wider). What it
    finds is a `task_arithmetic` with these coefficients, read and written in one streaming pass like any other.

    Args:
        models: a fine-tune of ``base`` for each task; anything that `weightsmith.open` opens.
        base: the weights they were all started from.
        module: what computes with such weights. It is asked in evaluation mode and left as it was. Tensors that the
            models do not have (a task's own head) stay the module's.
        data: for each model, batches of its task: a list (in a new order every time) or a loader. Labels are looked
            at with ``loss="labels"`` only.
        per: what shares a coefficient: all of a ``"model"`` (task-wise), tensors of one depth (``"layer"``), or
            nothing (``"tensor"``).
        loss: ``"entropy"`` of the answers; ``"agreement"``, cross-entropy with the answers of the task's model;
            ``"confident"``, agreement where both give one answer or the task's model is at least as sure;
            ``"labels"``, cross-entropy with the labels; or a function ``(model, batch) -> number``, a sum over the
            examples.
        initial: every coefficient before the first step.
        bounds: least and largest coefficient.
        steps: of Adam, each on one batch of every task.
        rate: how large they are.
        seed: of the order of batches.
        forward: ``(model, batch) -> logits``, where the default does not fit; one for all tasks or one for each.
        on_step: told of every step.

    Returns:
        Weights: lazy, like every merge. ``lineage`` names the coefficients.

    Raises:
        ValueError: no model, models of different architectures or ones that do not fit the module, no data for a
            model, or a loss that is not finite.

    >>> layer, base = torch.nn.Linear(1, 2, bias=False), {"weight": torch.zeros(2, 1)}
    >>> task = {"weight": torch.tensor([[1.0], [-1.0]])}                  # the further along, the surer
    >>> adamerging([task], base, layer, [[torch.ones(4, 1)]], steps=200, rate=0.1)["weight"]
    tensor([[ 1.],
            [-1.]])
    """
    shared, _ = _descended(
        "adamerging", models, base, module, data, None,
        per=per, loss=loss, initial=initial, bounds=bounds, steps=steps, rate=rate, seed=seed, forward=forward,
        on_step=on_step,
    )  # fmt: skip
    return shared


class Tinted(NamedTuple):
    """One model that all tasks share, and for each task the few tensors that it has to itself."""

    shared: Weights
    private: tuple[Weights, ...]

    def task(self, number: int) -> Weights:
        """The whole model of a task: ``shared | private[number]``."""
        return self.shared | self.private[number]


@card(
    paper="Jung, Lee, Han, Hong 2024, 'Tint Your Models Task-wise for Improved Multi-task Model Merging'",
    covers=("tint-models-task-wise-improved",),
    needs=("base", "data"),
    unit="model",
    claim="with one private layer a task more accurate on all tasks than with learned coefficients alone",
    departs="one step goes down the mean loss of all tasks, where the authors' code steps for one task after another",
)
def tint(
    models: Sequence[Source],
    base: Source,
    module: nn.Module,
    data: Sequence[Iterable[Batch]],
    layer: Pattern,
    *,
    per: Per = "tensor",
    loss: Objective | Loss = "agreement",
    initial: float = 0.3,
    bounds: tuple[float, float] = BOUNDS,
    steps: int = 500,
    rate: float = 1e-2,
    seed: int = 0,
    forward: Forward | Sequence[Forward] | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Tinted:
    r"""A merge with learned coefficients in which each task keeps one layer of its own.

    .. math:: \min_{\lambda, p_1, \dots, p_T} \frac1T \sum_t \mathbb E_{x \sim t}\,
        L\bigl(f(x; w(\lambda) \mid p_t),\, f(x; w_t)\bigr)

    with :math:`w(\lambda)` as in `adamerging`, and :math:`p_t` the tensors of one layer, which are laid over those
    of the merge. They begin as those of the task's own model and are trained together with the coefficients.

    Args:
        models: a fine-tune of ``base`` for each task; anything that `weightsmith.open` opens.
        base: the weights they were all started from.
        module: what computes with such weights; see `adamerging`.
        data: for each model, batches of its task.
        layer: names of the private tensors: a late layer or the head, ``"blocks.11.*"``.
        per: what shares a coefficient: ``"model"``, ``"layer"`` or ``"tensor"``.
        loss: as in `adamerging`; the paper's is ``"agreement"``, that of its extended variant ``"confident"``.
        initial: every coefficient before the first step.
        bounds: least and largest coefficient.
        steps: of Adam, each on one batch of every task.
        rate: how large they are, for coefficients and private tensors alike.
        seed: of the order of batches.
        forward: ``(model, batch) -> logits``; one for all tasks or one for each.
        on_step: told of every step.

    Returns:
        Tinted: ``shared``, lazy, a whole model in which the layer is merged as well, and ``private``, one small
        `Weights` a task, held in memory: ``tinted.task(0).save("first/")``.

    Raises:
        ValueError: as `adamerging`; a pattern that fits nothing, or one name only of a tied tensor.

    >>> layer, base = torch.nn.Linear(1, 2), {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}
    >>> tasks = [{"weight": torch.zeros(2, 1), "bias": torch.tensor([x, -x])} for x in (1.0, -1.0)]
    >>> tinted = tint(tasks, base, layer, [[torch.ones(4, 1)], [torch.ones(4, 1)]], "bias", steps=10)
    >>> [bool(tinted.task(task)["bias"][0] > 0) for task in (0, 1)]
    [True, False]
    """
    shared, private = _descended(
        "tint", models, base, module, data, layer,
        per=per, loss=loss, initial=initial, bounds=bounds, steps=steps, rate=rate, seed=seed, forward=forward,
        on_step=on_step,
    )  # fmt: skip
    return Tinted(shared, private)


def _descended(
    method: str,
    models: Sequence[Source],
    base: Source,
    module: nn.Module,
    data: Sequence[Iterable[Batch]],
    layer: Pattern | None,
    *,
    per: Per,
    loss: Objective | Loss,
    initial: float,
    bounds: tuple[float, float],
    steps: int,
    rate: float,
    seed: int,
    forward: Forward | Sequence[Forward] | None,
    on_step: Callable[[Progress], None] | None,
) -> tuple[Weights, tuple[Weights, ...]]:
    """The merge with learned coefficients, and for each task what it keeps of ``layer``: nothing without one."""
    opened, origin = _checked(models, base, data, loss, method)
    ways = forwards(forward, len(opened), method)
    space = span(module, opened, origin, per, method)
    names = set[str]() if layer is None else _private(space, layer)
    weight = _initial(space, len(opened), initial, bounds, method)
    own = {
        f"{task} {name}": space.start[name] + space.directions[name][task]
        for task in range(len(opened))
        for name in names
    }

    def slope(values: Values, task: int, batch: Batch) -> Tensor:
        private = {name: values[f"{task} {name}"] for name in names}
        return asked(space, space.mixed(values["weight"]) | private, batch, task, loss, ways[task])

    with restored(module):
        found = descend(
            method,
            {"weight": weight, **own},
            data,
            slope,
            steps=steps,
            rate=rate,
            seed=seed,
            bounds={"weight": bounds},
            tell=_teller(space, on_step),
        )
    chosen = space.option(found["weight"])
    merged = _sum_of(opened, origin, weight=chosen)
    shared = merged.zip_nodes(lambda name, node: node, (), f"merge.{method}", {"weight": chosen})
    private = tuple(
        _kept(shared, {name: found[f"{task} {first}"] for name, first in space.first.items() if first in names}, task)
        for task in range(len(opened))
        if names
    )
    return shared, private


def _checked(
    models: Sequence[Source], base: Source, data: Sequence[Iterable[Batch]], loss: object, method: str
) -> tuple[list[Weights], Weights]:
    opened, origin = opened_models(models, method), open(base)
    check_alike(opened, origin, method)
    check_data(data, len(opened), method)
    check_objective(loss, method)
    return opened, origin


def _initial(space: Span, count: int, initial: float, bounds: tuple[float, float], method: str) -> Tensor:
    low, high = bounds
    if not low <= initial <= high:
        raise Error(f"{method}: initial={initial} lies outside of bounds={bounds}")
    device = next(iter(space.start.values())).device
    return torch.full((space.groups, count), float(initial), dtype=torch.float64, device=device)


def _teller(
    space: Span, on_step: Callable[[Progress], None] | None
) -> Callable[[int, tuple[float, ...], Values], None] | None:
    if on_step is None:
        return None
    return lambda number, losses, values: on_step(Progress(number, losses, space.option(values["weight"])))


def _private(space: Span, layer: Pattern) -> set[str]:
    """First names of the tensors that fit."""
    names = {first for name, first in space.first.items() if matches(layer, name)}
    if not names:
        raise Error(f"tint: no tensor fits layer={layer!r}{did_you_mean(str(layer), space.first)}")
    torn = [name for name, first in space.first.items() if first in names and not matches(layer, name)]
    if torn:
        raise Error(f"tint: {torn[0]} is tied to a tensor that fits layer={layer!r}; name both or neither")
    return names


def _kept(shared: Weights, tensors: dict[str, Tensor], task: int) -> Weights:
    """Private tensors in the dtypes of the merge; tied ones stay tied."""
    plain = Weights.of(tensors)  # rounded by cast, which keeps ties
    plain = plain.cast(lambda name: shared.spec(name).dtype)
    return Weights({name: plain.node(name) for name in plain}, Step("merge.tint", {"task": task}, (shared.lineage,)))
