"""Round every weight to the nearest point of a grid.

Each group of weights gets its own parameters, just wide enough for its largest value, or somewhat narrower where that
leaves less error. Needs no data; the baseline that every other rounding is measured against, and nearly free of loss
at 8 bits.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card
from weightsmith.quantize._coded import Coded, checked_matrix, coded, fitted
from weightsmith.quantize.grids import Grid, Integer


@card(
    paper="Jacob et al. 2018, 'Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference' (symmetric weights); measured as a strategy by Jin et al. 2024, 'A Comprehensive Evaluation of "
    "Quantization Strategies for Large Language Models'",
    covers=("comprehensive-evaluation-quantization-strategies",),
    unit="row",
    laws=("half_a_step", "scale", "row_order", "sign"),
    claim="at 4 bits a network is about as good as in floats; below that it breaks",
)
def rtn(weight: Tensor, gram: Tensor | None = None, *, grid: Grid = Integer(), clip: int = 0) -> Coded:  # noqa: B008
    r"""The nearest point of a grid for every weight.

    .. math:: q = \operatorname{arg\,min}_q |w - g(q)|

    Args:
        weight: ``[out, ...]``; the axes after the first are the inputs of a row.
        gram: of its inputs, any form; narrower ranges are then chosen by what they do to the outputs.
        grid: the points.
        clip: how many narrower ranges are tried for each group; 0 for the one that holds all values.

    Returns:
        codes and parameters. Memory: a few copies of the weight, with ``clip`` a few more.

    Raises:
        Error: values that are not finite, or shapes that do not fit.

    >>> rtn(torch.tensor([[7.5, -7.5, 1.0, 0.4]])).values()
    tensor([[ 7., -8.,  1.,  0.]])
    """
    rows = checked_matrix("rtn", weight, gram)
    shared = grid.shared(rows)
    return coded(rows, grid, fitted(rows, grid, gram, clip=clip, shared=shared), shared)
