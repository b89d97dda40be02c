"""What each width of codes would cost each tensor, measured before any is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from weightsmith import stats
from weightsmith.card import card, card_of
from weightsmith.errors import Error, listed
from weightsmith.language import whole
from weightsmith.quantize._coded import Coded, row_errors
from weightsmith.quantize._judged import moved
from weightsmith.quantize._layout import endings_of
from weightsmith.quantize._rtn import rtn
from weightsmith.quantize._sequential import kernel_of
from weightsmith.quantize.room import Plan, Source, planned, rounded, takes_gram
from weightsmith.stats import Batch, Forward
from weightsmith.stats.room import ROWS
from weightsmith.weights import Pattern, Weights, open


class Level(NamedTuple):
    """One way to store a tensor."""

    bits: int
    codes: int
    """Bits of all its codes."""
    size: int
    """Bytes of all that is stored of it."""
    error: float


Curves = Mapping[str, Sequence[Level]]
"""Tensor -> its levels, from few bits to many."""


@card(
    paper="Dong et al. 2020, 'HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks' (the second order "
    "of the loss times the error, summed over tensors, as what is to be least)",
    needs=("data",),
    unit="model",
    claim="errors by loss are in the units of the loss, so that layers can be compared",
    departs="the curvature is the empirical Fisher information of each output with the Gram matrix of its inputs",
)
def curves(
    weights: Source,
    batches: Iterable[Batch],
    *,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    method: str | Callable[..., Coded] = "rtn",
    by: Literal["loss", "output"] = "loss",
    pattern: Pattern | None = None,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> dict[str, tuple[Level, ...]]:
    r"""The error of every tensor of the blocks at several widths, each alone.

    .. math:: \delta_b = \frac{1}{2 n} \sum_j s_j\, (w_j - q_b(w_j))\, H\, (w_j - q_b(w_j))^\top

    with :math:`H` the Gram matrix of the inputs, :math:`n` the tokens and :math:`s_j` the mean squared gradient of the
    loss at output j (``by="loss"``: nats a token, to second order, outputs and tokens taken one by one), or
    :math:`s_j / 2n` one over the energy of all outputs (``by="output"``).

    Args:
        weights: the checkpoint, with a ``config.json`` of transformers beside it, or a module.
        batches: calibration data.
        bits: widths to try.
        method: the rounding with which errors are measured.
        by: ``"loss"`` needs the whole model in memory, and one backward pass; ``"output"`` one block at a time.
        pattern: which tensors; by default matrices and convolutions without embeddings and the head.
        model, blocks, dtype, device, forward: as in `weightsmith.stats.walk`.
        options: of the method and its grid, such as ``group``.

    Returns:
        tensor -> a `Level` for each width. Tensors in no block have none; those of whose inputs nothing is told
        (layers that no token reached, experts that are fused into one tensor) have the mean error of the others.

    Raises:
        Error: options that do not fit, or no tensor in a block.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> found = curves(net, [torch.ones(3, 4)], bits=(2, 4), by="output")["0.weight"]
    >>> [(level.bits, level.codes, level.size) for level in found], found[0].error > found[1].error
    ([(2, 32, 32), (4, 64, 32)], True)
    """
    if by not in ("loss", "output"):
        raise Error(f"by is 'loss' or 'output', got {by!r}")
    widths = sorted(set(bits))
    if not widths:
        raise Error("curves need at least one width to try, got bits=()")
    opened, batches = open(weights), list(batches)
    kernel = kernel_of(method)
    plans = {width: planned(kernel, opened, {**options, "pattern": pattern, "bits": width}) for width in widths}
    own = frozenset(plans[widths[0]])
    module = weights if model is None and isinstance(weights, nn.Module) else model
    felt = sensitivity(opened, batches, own, module, dtype, device) if by == "loss" else None
    found: dict[str, tuple[Level, ...]] = {}
    unseen: set[str] = set()

    def visit(block: stats.Block) -> None:
        place = next(block.module.parameters()).device
        for name in (name for name in block.names if name in own):
            weight = block.weights[name].to(place)
            gram = block.statistics["gram"].get(name)
            errors = [_error(kernel, plans[width][name], weight, gram, felt, name) for width in widths]
            found[name] = tuple(_level(plans[width][name], error) for width, error in zip(widths, errors, strict=True))
            if gram is None:
                unseen.add(name)

    gather = {"gram": stats.Gram(pattern=own.__contains__, sums=torch.float32)}
    stats.walk(
        opened, batches, visit, model=module, blocks=blocks, statistics=gather, propagate="dense", dtype=dtype,
        device=device, forward=forward,
    )  # fmt: skip
    if not found:
        raise Error(f"none of {listed(own)} stands in a block; say with blocks= which modules are walked")
    known = [levels for name, levels in found.items() if name not in unseen]
    for name in unseen if known else ():
        means = [sum(levels[index].error for levels in known) / len(known) for index in range(len(widths))]
        found[name] = tuple(level._replace(error=mean) for level, mean in zip(found[name], means, strict=True))
    return {name: found[name] for name in plans[widths[0]] if name in found}


def sensitivity(
    weights: Weights, batches: Sequence[Batch], names: frozenset[str], model: nn.Module | None, dtype: Any, device: Any
) -> Mapping[str, Tensor]:
    """What a squared change of each output, summed over rows, costs in nats a token: ``{name: [out]}``."""
    if model is None:
        try:
            model = whole(weights, dtype, device)
        except Error as error:
            raise Error(f"errors by loss: {error}; those by output (by='output') ask no loss") from None
    # A module that is given is asked where it is: moving it would be seen by its owner.
    place = next((one.device for one in model.parameters()), None)
    found = stats.output_gradients(model, moved(batches, place), pattern=names.__contains__)
    rows = json.loads(found.metadata[ROWS])
    tokens = max(rows.values(), default=1.0)
    return {name: found[name] / (2 * tokens * max(rows[name], 1.0)) for name in found}


def _error(
    kernel: Callable[..., Coded], plan: Plan, weight: Tensor, gram: Tensor | None, felt: Mapping[str, Tensor] | None,
    name: str,
) -> float:  # fmt: skip
    """What rounding a tensor costs; without data the relative error of its weights."""
    inputs = plan.layout.inputs
    if gram is None and "stats.gram" in card_of(kernel).needs:
        coded = rounded(rtn, plan.layout, {}, weight, None)
    else:
        coded = rounded(kernel, plan.layout, plan.options, weight, gram if takes_gram(kernel) else None)
    rows = plan.layout.matrix(weight)[:, :inputs]
    apart = rows - coded.values()[:, :inputs]
    if gram is None:
        return float(apart.square().sum() / rows.square().sum().clamp(min=1e-30))
    each = _by_output(apart, gram)
    if felt is None:
        return float(each.sum() / _by_output(rows, gram).sum().clamp(min=1e-30))
    if name not in felt:
        return 0.0  # the loss does not hang on it
    return float((each * felt[name].to(each.device)).sum())


def _by_output(values: Tensor, gram: Tensor) -> Tensor:
    """``[out]``: the squares of what each row gives on the data."""
    return row_errors(values.to(gram.dtype), gram).clamp(min=0)


def _level(plan: Plan, error: float) -> Level:
    layout = plan.layout
    size = sum(spec.nbytes for spec in endings_of(layout).values())
    return Level(layout.grid.bits, layout.rows * layout.width * layout.grid.bits, size, error)
