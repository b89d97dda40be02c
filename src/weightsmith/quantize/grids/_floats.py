"""Floats of few bits that share a scale: microscaling blocks, NVFP4 and scaled FP8.

A weight keeps an exponent of its own, so small weights beside a large one keep some of their digits. What a block
shares is a power of two (MX), an 8-bit float (NVFP4), or any float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids._elements import element_of, of_element, to_element
from weightsmith.quantize.grids._grid import (
    Params,
    Stored,
    check_group,
    check_scale_dtype,
    check_values,
    largest,
    needed,
    stepped,
)

BLOCK, SMALL_BLOCK = 32, 16
"""Inputs of a block, of MX and of NVFP4."""

SMALLEST = 2.0**-9  # of the positive numbers of E4M3
HIGHEST = 127  # power of two of an E8M0 scale; the lowest is its negative


@dataclass(frozen=True)
class Microscaling:
    r"""Blocks of small floats that share a power of two.

    .. math:: w \approx 2^X\, e_q, \qquad X = \lfloor \log_2 \max |w| \rfloor - e_{\max}

    with :math:`e` the values of the element format and :math:`e_{\max}` the exponent of its largest. What then lies
    beyond the largest value becomes it (``scaling="floor"``, as the specification has it); with ``scaling="ceil"`` the
    power is the smallest that holds all values. Narrower ranges (``clip`` of a rounding) are then worth a search: one
    of half the width is one power less, which is that of ``"floor"`` or cuts off more.

    Attributes:
        element: a word of `ELEMENTS`: ``"e4m3"``, ``"e5m2"``, ``"e3m2"``, ``"e2m3"``, ``"e2m1"`` or ``"int8"``.
        group: inputs of a block; 32 in the specification.
        scaling: see above.

    >>> grid = Microscaling("e2m1")
    >>> values = torch.tensor([[7.0, 1.3, -0.2, 0.0]])
    >>> params = grid.fit(values)
    >>> params["scale"], grid.decode(grid.encode(values, params), params)
    (tensor([1.]), tensor([[6.0000, 1.5000, -0.0000, 0.0000]]))
    """

    element: str = "e4m3"
    group: int | None = BLOCK
    scaling: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        element_of(self.element)
        check_group(self.group)
        if self.scaling not in ("floor", "ceil"):
            raise Error(f"scaling is 'floor' or 'ceil', got {self.scaling!r}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return element_of(self.element).bits

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {"scale": Stored((), torch.float8_e8m0fnu)}

    def shared(self, weight: Tensor) -> Params:
        """Nothing."""
        return {}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``scale [...]``, powers of two; the smallest that there is for a block of zeros."""
        check_values(values)
        element = element_of(self.element)
        most = largest(values) * shrink
        if self.scaling == "floor":
            power = torch.frexp(most).exponent - 1 - element.top
        else:
            part = torch.frexp(most / element.largest)
            power = part.exponent - (part.mantissa == 0.5).int()
        if power.numel() and int(power.max()) > HIGHEST:
            raise Error(f"there are values too large for a scale of 2^{HIGHEST}: divide the tensor by a power of two")
        power = torch.where(most > 0, power, torch.full_like(power, -HIGHEST)).clamp(min=-HIGHEST)
        return {"scale": torch.ldexp(torch.ones_like(most), power)}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        return to_element(values / params["scale"].unsqueeze(-1), element_of(self.element))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        scale = params["scale"].unsqueeze(-1)
        return of_element(codes, element_of(self.element), scale.dtype).mul_(scale)


@dataclass(frozen=True)
class NvFloat4:
    r"""Blocks of 16 four-bit floats that share an 8-bit float, over one float of the tensor.

    .. math:: w \approx t\, s\, e_q, \qquad t = \frac{\max |W|}{448 \cdot 6}, \qquad
        s = \operatorname{E4M3}\Big(\frac{\max |w|}{6\,t}\Big)

    Attributes:
        group: inputs of a block; 16 in hardware.

    >>> grid = NvFloat4()
    >>> values = torch.tensor([[6.0, 1.3, -0.2, 0.0]])
    >>> params = {**grid.shared(values), **grid.fit(values, grid.shared(values))}
    >>> grid.decode(grid.encode(values, params), params)
    tensor([[6.0000, 1.5000, -0.0000, 0.0000]])
    """

    group: int | None = SMALL_BLOCK

    def __post_init__(self) -> None:
        check_group(self.group)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {"scale": Stored((), torch.float8_e4m3fn), "tensor_scale": Stored((), torch.float32, shared=True)}

    def shared(self, weight: Tensor) -> Params:
        """``tensor_scale``, with which the largest block's own scale is the largest that there is."""
        check_values(weight)
        most = largest(weight.flatten())
        return {
            "tensor_scale": stepped(most / (element_of("e4m3").largest * element_of("e2m1").largest), torch.float32)
        }

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``scale [...]``, the blocks' own part."""
        check_values(values)
        over = needed(shared, "tensor_scale", "nvfp4")
        scale = largest(values) * shrink / (element_of("e2m1").largest * over)
        coded = of_element(to_element(scale, element_of("e4m3")), element_of("e4m3"), scale.dtype)
        return {"scale": torch.where(scale > 0, coded.clamp(min=SMALLEST), torch.ones_like(coded))}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        return to_element(values / self._step(params), element_of("e2m1"))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        step = self._step(params)
        return of_element(codes, element_of("e2m1"), step.dtype).mul_(step)

    @staticmethod
    def _step(params: Params) -> Tensor:
        return (params["scale"] * params["tensor_scale"]).unsqueeze(-1)


@dataclass(frozen=True)
class Float:
    r"""Small floats under a scale: :math:`w \approx s\, e_q` with :math:`s = \max |w| / e_{\text{largest}}`.

    Attributes:
        element: a word of `ELEMENTS`.
        group: inputs that share a scale; None for whole rows.
        per_tensor: one scale for the whole tensor; ``group`` is then None.
        scale_dtype: in what scales are stored.

    >>> grid = Float("e4m3", per_tensor=True)
    >>> params = grid.shared(torch.tensor([[448.0, 3.3]]))
    >>> grid.decode(grid.encode(torch.tensor([[448.0, 3.3]]), params), params)
    tensor([[448.0000,   3.2500]])
    """

    element: str = "e4m3"
    group: int | None = None
    per_tensor: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        element_of(self.element)
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)
        if self.per_tensor and self.group is not None:
            raise Error(f"per_tensor=True has one scale for all, so group={self.group} does not go with it")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return element_of(self.element).bits

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {"scale": Stored((), self.scale_dtype, shared=self.per_tensor)}

    def shared(self, weight: Tensor) -> Params:
        """The scale of the whole tensor, if it has one."""
        return self._fit(weight.flatten(), 1.0) if self.per_tensor else {}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``scale [...]``, with which the largest magnitude is the largest value."""
        return {} if self.per_tensor else self._fit(values, shrink)

    def _fit(self, values: Tensor, shrink: float | Tensor) -> dict[str, Tensor]:
        check_values(values)
        return {"scale": stepped(largest(values) * shrink / element_of(self.element).largest, self.scale_dtype)}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        return to_element(values / params["scale"].unsqueeze(-1), element_of(self.element))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        scale = params["scale"].unsqueeze(-1)
        return of_element(codes, element_of(self.element), scale.dtype).mul_(scale)
