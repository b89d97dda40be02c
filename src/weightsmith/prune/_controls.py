"""What a mask is worth beside masks that were drawn, and whether a good start means a good end.

A pruned and retrained network may owe what it can do to the weights that it kept, to where they stand, to how many each
layer kept, or to the training that it got afterwards. So each of these is taken away in turn. And the loss right after
pruning, by which masks are usually chosen, may say little of the loss after retraining; that can be measured.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune import _random
from weightsmith.prune._holding import checked, holding
from weightsmith.prune.room import lift

if TYPE_CHECKING:
    from weightsmith.inspect import Report

Train = Callable[[nn.Module, int, int], Any]
"""``(model, epochs, seed)``: trains in place."""

Control = Literal["fine-tuned", "shuffled", "fresh weights", "equal computing", "random", "uniform"]
CONTROLS: tuple[Control, ...] = get_args(Control)
INHERITING = ("fine-tuned", "shuffled")
"""Those that begin with the model's weights."""

_drawn = lift(_random.random)


@card(
    paper="Su et al. 2020, 'Sanity-Checking Pruning Methods: Random Tickets can Win the Jackpot'; Frankle, Dziugaite, "
    "Roy, Carbin 2021, 'Pruning Neural Networks at Initialization: Why are We Missing the Mark?'; Liu et al. 2019, "
    "'Rethinking the Value of Network Pruning' (as much computing)",
    needs=("data", "evaluate"),
    unit="model",
    claim="tells what of a pruned network's quality its weights, their places, its layers' shares and training bring",
)
def controls(
    model: nn.Module,
    mask: Mapping[str, Tensor],
    train: Train,
    evaluate: Callable[[nn.Module], float],
    *,
    epochs: int,
    tune_epochs: int | None = None,
    longest: float = 2.0,
    rows: Sequence[Control] = CONTROLS,
    seeds: Sequence[int] = (0,),
    initialise: Callable[[nn.Module], Any] | None = None,
) -> Report:
    """A pruned network beside its controls, all trained with their masks kept.

    Args:
        model: trained; left as it is.
        mask: tensor -> ``[*shape]`` boolean, true where a weight is kept, such as a method of ``prune`` gives with
            ``action="mask"``.
        train: ``(model, epochs, seed)``, trains a module in place with any optimizer; the mask is kept for it. Runs
            that are compared get the same seed.
        evaluate: ``module -> quality`` on held-out data, higher is better.
        epochs: that the whole network was trained for.
        tune_epochs: of what starts from the model's weights; by default ``epochs``.
        longest: "equal computing" trains at most so many times as long.
        rows: which controls, each a training a seed: ``"fine-tuned"``: the mask and the weights it kept;
            ``"shuffled"``: the weights under a mask whose places were drawn, as many in each tensor; ``"fresh
            weights"``: the mask over a new start; ``"equal computing"``: that, for as many more epochs as the mask is
            sparse; ``"random"``: a new start under a shuffled mask; ``"uniform"``: a new start under a drawn mask that
            takes the same share of every tensor.
        seeds: one run each of all that is trained.
        initialise: ``(module) -> None``, gives fresh weights; see `weightsmith.prune.structured.reinitialised`.

    Returns:
        Report: a row for the whole network, the pruned one as it is, and each control: quality, its standard
        deviation over the seeds, the share of the masked tensors' elements that is kept, and the epochs.

    Raises:
        Error: no seed, no epoch, an unknown control, a mask that does not fit, one that keeps everything or nothing, or
            parameters that no part knows how to draw.
    """
    from weightsmith.inspect import Report

    unknown = [name for name in rows if name not in CONTROLS]
    if unknown:
        raise Error(f"controls knows {', '.join(CONTROLS)}; got {unknown[0]!r}")
    if not seeds or epochs < 1:
        raise Error(f"controls needs at least 1 seed and 1 epoch, got {len(seeds)} and {epochs}")
    masks = {name: value.bool() for name, value in mask.items()}
    checked(model, masks)
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    if not 0 < kept < total:
        raise Error(f"controls needs a mask that keeps some weights and removes some; this one keeps {kept} of {total}")
    density = kept / total
    tuned = epochs if tune_epochs is None else tune_epochs
    longer = round(epochs * min(1 / density, longest))
    lengths = {"fine-tuned": tuned, "shuffled": tuned, "equal computing": longer}
    if set(rows) - set(INHERITING):
        _start("fresh weights", model, masks, density, 0, initialise)  # whether it can be had is found before training
    whole, pruned = copy.deepcopy(model), copy.deepcopy(model)
    with holding(pruned, masks):
        pass
    found: dict[str, list[float]] = {name: [] for name in rows}
    with progress.task("controls", len(seeds) * len(found)) as advance:
        for seed in seeds:
            for name in found:
                start, own = _start(name, model, masks, density, seed, initialise)
                with holding(start, own):
                    train(start, lengths.get(name, epochs), seed)
                found[name].append(float(evaluate(start)))
                advance(1)
    table = [row("whole", [float(evaluate(whole))], 1.0, 0), row("pruned", [float(evaluate(pruned))], density, 0)]
    table += [row(name, values, density, lengths.get(name, epochs)) for name, values in found.items()]
    means = {name: statistics.fmean(values) for name, values in found.items()}
    figures: dict[str, Any] = {
        f"fine-tuned minus {name}": means["fine-tuned"] - value
        for name, value in means.items()
        if "fine-tuned" in means and name != "fine-tuned"
    }
    return Report(
        "A mask and its controls",
        {"kept": density, **figures, "seeds": len(seeds)},
        table,
        notes=[
            "Shuffled and random masks keep as many weights of each tensor, in places that were drawn; uniform ones "
            "keep the same share of every tensor.",
            f"Equal computing trains {longest:g} times as long at most, as if zeros cost nothing.",
        ],
    )


def _start(
    name: str,
    model: nn.Module,
    masks: Mapping[str, Tensor],
    density: float,
    seed: int,
    initialise: Callable[[nn.Module], Any] | None,
) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """What a control begins with: a module of its own, and its mask."""
    from weightsmith.prune.structured import reinitialised

    start = copy.deepcopy(model) if name in INHERITING else reinitialised(model, seed, initialise)
    if name in ("shuffled", "random"):
        return start, shuffled(masks, seed)
    if name == "uniform":
        return start, _places(masks, dict.fromkeys(masks, 1 - density), seed)
    return start, masks


def shuffled(masks: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Masks that keep as many weights of each tensor, in places that were drawn.

    Args:
        masks: tensor -> ``[*shape]`` boolean.
        seed: of the places; they also depend on the tensor's name.

    Returns:
        tensor -> ``[*shape]`` boolean.

    >>> shuffled({"w": torch.tensor([True, True, False, False])})["w"].sum()
    tensor(2)
    """
    return _places(masks, {name: 1 - int(mask.sum()) / max(mask.numel(), 1) for name, mask in masks.items()}, seed)


def _places(masks: Mapping[str, Tensor], shares: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    numbers = {name: mask.float() for name, mask in masks.items()}
    return _drawn(numbers, shares.__getitem__, seed=seed, pattern="*", action="mask").to_dict()


def row(name: str, found: Sequence[float], part: float, epochs: int) -> dict[str, Any]:
    """A row of a table of controls."""
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return {"network": name, "quality": statistics.fmean(found), "spread": spread, "cost": part, "epochs": epochs}


@card(
    paper="Feng, Tao, Wang 2024, 'Is Oracle Pruning the True Oracle?'",
    covers=("oracle-pruning-true-oracle",),
    needs=("data",),
    unit="model",
    claim="the harder the task, the less the loss right after pruning says of the loss after retraining",
    departs="anomalies are masks that end better than the one that began best",
)
def oracle_correlation(
    model: nn.Module,
    masks: Sequence[Mapping[str, Tensor]],
    train: Callable[[nn.Module, int], Any],
    before: Callable[[nn.Module], float],
    after: Callable[[nn.Module], float] | None = None,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    """Whether the mask with the least loss right after pruning also has the least after retraining.

    Every mask is put on a copy of the model, which is measured, retrained with the mask kept, and measured again.

    Args:
        model: trained; left as it is.
        masks: k >= 3 masks of the same sparsity, tensor -> boolean ``[*shape]``: all that there are, or a sample such
            as ``[prune.random(model, 0.5, seed=i, action="mask") for i in range(200)]``. The oracle's mask is the one
            among them with the least loss before retraining.
        train: ``(model, seed)``, retrains a module in place; all masks get the same seed.
        before: ``module -> loss`` on the training data, lower is better.
        after: ``module -> loss`` on held-out data after retraining, lower is better; by default ``before``.
        samples: resamples of the masks, for the intervals.
        confidence: of the intervals.
        seed: of the retraining and of the resamples.

    Returns:
        Report: a row for each mask, the best beginning first. Figures: ``Pearson``, ``Spearman`` and ``Kendall``
        correlation of the losses before and after (with `low` and `high`, percentiles of the bootstrap; None where
        all losses are equal), and ``anomalies``, the share of the other masks that end better than the oracle's.

    Raises:
        Error: fewer than three masks, a mask that does not fit, or a loss that is not finite.
    """
    from weightsmith.inspect import Line, Plot, Report

    if len(masks) < 3:
        raise Error(f"oracle_correlation needs at least 3 masks, got {len(masks)}")
    for mask in masks:
        checked(model, mask)
    losses: list[tuple[float, float]] = []
    with progress.task("oracle correlation", len(masks)) as advance:
        for mask in masks:
            made = copy.deepcopy(model)
            with holding(made, {name: value.bool() for name, value in mask.items()}):
                first = float(before(made))
                train(made, seed)
            losses.append((first, float((after or before)(made))))
            advance(1)
    pairs = torch.tensor(losses, dtype=torch.float64)
    if not pairs.isfinite().all():
        where = int((~pairs.isfinite().all(1)).nonzero()[0])
        raise Error(f"oracle_correlation: a loss of mask {where} is not finite: {losses[where]}")
    oracle = int(pairs[:, 0].argmin())
    figures: dict[str, Any] = {}
    for name, correlation in CORRELATIONS.items():
        figures |= _with_interval(name, correlation, pairs, samples, confidence, seed)
    figures["anomalies"] = float((pairs[:, 1] < pairs[oracle, 1]).sum()) / (len(pairs) - 1)
    order = pairs[:, 0].argsort(stable=True).tolist()
    rows = [{"mask": place, "before": losses[place][0], "after": losses[place][1]} for place in order]
    line = Line("masks", [entry["before"] for entry in rows], [entry["after"] for entry in rows], style="points")
    plot = Plot("Loss before and after retraining", "before", "after", [line])
    return Report("Does a good beginning mean a good end?", {**figures, "masks": len(masks)}, rows, [plot])


def _with_interval(
    name: str, correlation: Callable[..., Tensor], pairs: Tensor, samples: int, confidence: float, seed: int
) -> dict[str, Any]:
    from weightsmith.inspect.evaluation import bootstrap

    if any(len(column.unique()) < 2 for column in pairs.T):
        return {name: None, f"{name} low": None, f"{name} high": None}
    found = bootstrap(tuple(pairs.T), correlation, confidence=confidence, samples=samples, seed=seed)
    return {name: found.estimate, f"{name} low": found.low, f"{name} high": found.high}


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Correlation along the last axis; NaN where all numbers of one are equal.

    >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    tensor(1.)
    """
    one, other = first - first.mean(-1, keepdim=True), second - second.mean(-1, keepdim=True)
    return (one * other).sum(-1) / (one.square().sum(-1) * other.square().sum(-1)).sqrt()


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of ranks along the last axis, equal numbers sharing theirs.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 40.0, 600.0]))
    tensor(1.)
    """
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Tensor) -> Tensor:
    """``[..., n]`` -> how many are smaller, and half of those that are equal."""
    values = values.contiguous()
    order = values.sort(-1).values
    return (torch.searchsorted(order, values) + torch.searchsorted(order, values, right=True)).to(values.dtype) / 2


def _kendall(first: Tensor, second: Tensor) -> Tensor:
    from weightsmith.inspect.ranking import kendall_tau

    flat = [value.reshape(-1, value.shape[-1]) for value in (first, second)]
    rows = max(2**22 // first.shape[-1] ** 2, 1)  # pairs of so many resamples at once: 32 MiB
    parts = [kendall_tau(*part) for part in zip(*(value.split(rows) for value in flat), strict=True)]
    return torch.cat(parts).reshape(first.shape[:-1])


CORRELATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Pearson": pearson,
    "Spearman": spearman,
    "Kendall": _kendall,
}
