"""Small floats with one value to choose: every group of weights takes the table that suits it.

A small float has two zeros. The code of the second one is given to a special value, and each group picks its own: it
fills a gap, or reaches further out on the side where the group does.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded, checked_matrix, coded, energy_of, fitted
from weightsmith.quantize.grids import Grid, MixedTypes


@card(
    paper="Chen et al. 2025, 'BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration'",
    covers=("bitmod",),
    unit="tensor",
    claim="at 3 bits a language model loses less than with evenly spaced points and a zero of their own",
    departs="where inputs are told, errors are weighed by them; steps of scales are the tensor's, not the row's; the "
    "hardware is not here",
)
def bitmod(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    grid: Grid = MixedTypes(),  # noqa: B008
    clip: int = 0,
) -> Coded:
    """The nearest point for every weight, on the table of its group that errs least.

    Args:
        weight: ``[out, in]``.
        gram: of its inputs, any form; tables are then chosen by its diagonal, and narrower ranges by what they do to
            the outputs.
        grid: a `MixedTypes`: 3 or 4 bits, and the inputs of a group.
        clip: how many narrower ranges are tried for each group; 0 for the one that holds all values.

    Returns:
        codes and parameters. Memory: some six copies of the weight.

    Raises:
        Error: another grid, shapes that do not fit, or values that are not finite.

    >>> bitmod(torch.tensor([[6.0, 2.0, 1.0, -4.0, 0.0]]), grid=ws.quantize.grids.MixedTypes(bits=3)).values()
    tensor([[ 6.,  2.,  1., -4.,  0.]])
    """
    if not isinstance(grid, MixedTypes):
        raise Error(f"bitmod rounds to mixed tables alone (grid='bitmod'), got {grid}")
    rows = checked_matrix("bitmod", weight, gram)
    shared, heed = grid.shared(rows), None if gram is None else energy_of(gram)
    return coded(rows, grid, fitted(rows, grid, gram, clip=clip, shared=shared, importance=heed), shared)
