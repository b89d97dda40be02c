"""Which grid each tensor is coded on, and what it takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from weightsmith.quantize._layout import endings_of, layouts_of
from weightsmith.quantize.grids import Grid
from weightsmith.weights import open


class Code(NamedTuple):
    """How one tensor is coded."""

    grid: Grid
    shape: tuple[int, ...]
    inputs: int
    """Of a row, without padding."""
    padding: int
    """Zeros after the inputs of each row."""
    nbytes: int
    """Of its codes and of all that decodes them."""

    @property
    def bits(self) -> float:
        """Bits a weight, with all that decodes them."""
        return 8 * self.nbytes / max(math.prod(self.shape), 1)


def codes(weights: Any) -> dict[str, Code]:
    """Tensor -> how it is coded; reads headers and shapes alone. Tied tensors are there under their first name.

    Args:
        weights: what a rounding made, or a folder of it; without codes the result is empty.

    >>> found = codes(ws.quantize.rtn({"l.weight": torch.ones(2, 64)}, bits=3, group=32))["l.weight"]
    >>> found.grid.bits, found.grid.group, found.bits
    (3, 32, 4.0)
    """
    opened = open(weights)
    ties = opened.ties
    if not any(name.endswith("_packed") for name in opened):
        return {}
    found = {}
    for name, layout in layouts_of(opened).items():
        if f"{name}_packed" in ties:
            continue
        nbytes = sum(opened.spec(name + ending).nbytes for ending in endings_of(layout))
        found[name] = Code(layout.grid, layout.shape, layout.inputs, layout.padding, nbytes)
    return found
