"""What can learn in a matrix that is being quantized: sliders between points, offsets, divisors, steps and zeros.

Each kind holds the tensors that an optimizer moves, gives the values that the network computes with on the way
(through which gradients flow), and in the end codes.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from weightsmith.quantize._adaround import STRETCH, WARM, inverse_slid
from weightsmith.quantize._coded import Coded, coded, fitted
from weightsmith.quantize._flexround import LEAST, MOST, learns_steps, over_inputs, reached
from weightsmith.quantize._neighbours import neighbours
from weightsmith.quantize.grids import Grid, Integer

Train = Literal["rounding", "low-rank rounding", "signed rounding", "division", "weights and steps"]
"""What learns: sliders between neighbours (AdaRound); sliders that are a product of two thin matrices, and steps
(CBQ); offsets of at most half a step, and ranges, by the signs of gradients (AutoRound); divisors and steps
(FlexRound); weights, steps and zeros (EfficientQAT)."""

RATES: dict[str, tuple[float, float]] = {
    "rounding": (5e-2, 0.0),
    "low-rank rounding": (1e-2, 1e-3),
    "signed rounding": (0.0, 0.0),
    "division": (5e-3, 2e-3),
    "weights and steps": (5e-3, 1e-3),
}
"""Learning rates of what moves weights (in steps of the grid, or as a share) and of steps and zeros (as a share). Of
signed rounding both are one over the number of optimizer steps, so that half a step can just be reached."""


HALF = 0.5 + 1e-5
"""In steps: how far from the point that it gets a weight may be that is not cut off. Often the largest of a group lies
half a step beyond the last point."""


class Learner(Protocol):
    """One matrix while it learns."""

    moves: list[Tensor]
    """Leaves that move weights."""
    ranges: list[Tensor]
    """Leaves that move the grid."""

    def values(self, progress: float) -> Tensor:
        """``[out, in]``, on the way; ``progress`` from 0 to 1."""
        ...

    def penalty(self, progress: float) -> Tensor | None:
        """What pulls towards codes, a mean over weights."""
        ...

    def held(self) -> None:
        """Bring all leaves back to where they may be."""
        ...

    def reopened(self) -> None:
        """Make ready for learning once more."""
        ...

    def coded(self) -> Coded:
        """Codes, as they stand."""
        ...


def learner(train: Train, rows: Tensor, grid: Grid, *, rank: int, clip: int, generator: torch.Generator) -> Learner:
    """What learns in ``rows [out, in]``, begun where rounding to nearest stands."""
    shared = grid.shared(rows)
    params = fitted(rows, grid, clip=clip, shared=shared)
    if train == "rounding":
        return Sliders(rows, grid, params, shared)
    if train == "low-rank rounding":
        return ThinSliders(rows, grid, params, shared, rank, generator)
    return Moved(train, rows, grid, params, shared)


class Sliders:
    """A slider for every weight, between the points below and above it."""

    def __init__(self, rows: Tensor, grid: Grid, params: dict[str, Tensor], shared: Any):
        self.around = neighbours(rows, grid, params, shared)
        self.apart = self.around.high - self.around.low
        self.slider = inverse_slid(self.around.share(rows)).requires_grad_()
        self.moves, self.ranges = [self.slider], cast(list[Tensor], [])

    def soft(self) -> Tensor:
        return (self.slider.sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)

    def values(self, progress: float) -> Tensor:
        return torch.addcmul(self.around.low, self.apart, self.soft())

    def penalty(self, progress: float) -> Tensor | None:
        if progress < WARM:
            return None
        beta = 20 - 18 * (progress - WARM) / (1 - WARM)
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).mean()

    def held(self) -> None:
        pass

    def reopened(self) -> None:
        """Sliders that have come to rest at an end have no slope; they are moved off it."""
        with torch.no_grad():
            ends = inverse_slid(self.slider.new_tensor([0.05, 0.95]))
            self.slider.clamp_(float(ends[0]), float(ends[1]))

    def coded(self) -> Coded:
        return self.around.chosen(self.slider.detach() > 0)


class ThinSliders:
    """Sliders that stand where the weights are and are moved by a product of two thin matrices; steps learn too.

    A thin matrix cannot drive every slider to its end, so all grow steeper together, and are steps at the end.
    """

    def __init__(
        self, rows: Tensor, grid: Grid, params: dict[str, Tensor], shared: Any, rank: int, generator: torch.Generator
    ):
        self.around = neighbours(rows, grid, params, shared)
        self.apart = self.around.high - self.around.low
        self.begun = inverse_slid(self.around.share(rows))
        rank = min(rank, *rows.shape)
        first = torch.randn(len(rows), rank, generator=generator, dtype=rows.dtype).to(rows.device)
        self.first = first.requires_grad_()
        self.second = rows.new_zeros(rank, rows.shape[1]).requires_grad_()
        self.factor = torch.ones_like(params["scale"]).requires_grad_() if learns_steps(grid) else None
        self.moves, self.ranges = [self.first, self.second], [] if self.factor is None else [self.factor]

    def sliders(self) -> Tensor:
        return self.begun + self.first @ self.second

    def values(self, progress: float) -> Tensor:
        steep = 1 + 30 * max(progress - WARM, 0.0) / (1 - WARM)
        soft = ((self.sliders() * steep).sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
        return self.stretched(torch.addcmul(self.around.low, self.apart, soft))

    def stretched(self, values: Tensor) -> Tensor:
        """Values with steps as they are now; codes are those of the steps at the start."""
        if self.factor is None:
            return values
        grid, minimum = self.around.grid, self.around.params.get("minimum")
        factor = over_inputs(self.factor, grid, values.shape[1])
        if minimum is None:
            return values * factor
        base = over_inputs(minimum, grid, values.shape[1])
        return base + (values - base) * factor

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def held(self) -> None:
        if self.factor is not None:
            with torch.no_grad():
                self.factor.clamp_(LEAST, MOST)

    def reopened(self) -> None:
        pass

    def coded(self) -> Coded:
        found = self.around.chosen(self.sliders().detach() > 0)
        if self.factor is None:
            return found
        params = {**found.params, "scale": as_stored(found.params["scale"] * self.factor.detach(), found.grid)}
        return Coded(found.codes, params, found.grid, found.shared)


class Moved:
    """Weights that are moved before they are rounded, on a grid that may learn; gradients pass through rounding."""

    def __init__(self, train: Train, rows: Tensor, grid: Grid, params: dict[str, Tensor], shared: Any):
        self.rows, self.grid, self.params, self.shared, self.train = rows, grid, params, shared, train
        self.even = type(grid) is Integer and learns_steps(grid) and rows.shape[1] % params["scale"].shape[1] == 0
        self.factor: Tensor | None = None
        self.place: Tensor | None = None
        self.ranges: list[Tensor] = []
        if learns_steps(grid):
            self.factor = torch.ones_like(params["scale"]).requires_grad_()
            self.ranges.append(self.factor)
            if train != "division" and {"zero_point", "minimum"} & params.keys():
                self.place = torch.zeros_like(params["scale"]).requires_grad_()
                self.ranges.append(self.place)
            self.unit = (
                params["scale"].unsqueeze(-1) if self.even else over_inputs(params["scale"], grid, rows.shape[1])
            )
        else:
            around = neighbours(rows, grid, params, shared)
            self.unit = around.high - around.low
        if train == "division":
            self.divisor = torch.ones_like(rows).requires_grad_()
            self.of_rows = torch.ones_like(rows[:, :1]).requires_grad_()
            self.moves = [self.divisor, self.of_rows]
        else:
            self.offset = torch.zeros_like(rows).requires_grad_()
            self.moves = [self.offset]

    def moved(self) -> Tensor:
        """The weights that are rounded."""
        if self.train == "division":
            return self.rows / (self.divisor * self.of_rows)
        if not self.even:
            return torch.addcmul(self.rows, self.unit, self.offset)
        runs = (one.unflatten(1, (self.unit.shape[1], -1)) for one in (self.rows, self.offset))
        return torch.addcmul(next(runs), self.unit, next(runs)).flatten(1)

    def now(self) -> dict[str, Tensor]:
        """The parameters of all groups, rounded as they are stored; gradients pass."""
        found = dict(self.params)
        if self.factor is not None:
            scale = found["scale"] * self.factor
            found["scale"] = straight(scale, as_stored(scale.detach(), self.grid))
        if self.place is not None:
            top = 2**self.grid.bits - 1
            if "zero_point" in found:
                zero = found["zero_point"] + self.place * top
                found["zero_point"] = straight(zero, zero.detach().round().clamp(0, top))
            else:
                least = found["minimum"] + self.place * top * self.params["scale"]
                found["minimum"] = straight(least, as_stored(least.detach(), self.grid, "minimum"))
        return found

    def values(self, progress: float) -> Tensor:
        moved, params = self.moved(), self.now()
        if self.even:
            made = Evenly.apply(moved, params["scale"], params.get("minimum"), params.get("zero_point"), self.grid)
            return cast(Tensor, made)
        with torch.no_grad():
            still = {name: value.detach() for name, value in params.items()}
            made = coded(moved.detach(), self.grid, still, self.shared).values().to(moved.dtype)
            within = reached(moved.detach(), self.grid, still, self.shared)
        if self.factor is None:
            return straight(moved * within, made)
        wide = self.rows.shape[1]
        learned = {name: over_inputs(value, self.grid, wide) for name, value in params.items()}
        minimum, zero = learned.get("minimum"), learned.get("zero_point")
        return cast(Tensor, Through.apply(moved, learned["scale"], minimum, zero, made, within))

    def penalty(self, progress: float) -> Tensor | None:
        return None

    @torch.no_grad()
    def held(self) -> None:
        if self.train == "signed rounding":
            self.offset.clamp_(-0.5, 0.5)
        if self.train == "division":
            self.divisor.clamp_(LEAST, MOST)
            self.of_rows.clamp_(LEAST, MOST)
        if self.factor is not None:
            self.factor.clamp_(LEAST, 1.0 if self.train == "signed rounding" else MOST)

    def reopened(self) -> None:
        pass

    @torch.no_grad()
    def coded(self) -> Coded:
        params = {name: value.detach() for name, value in self.now().items()}
        return coded(self.moved().detach(), self.grid, params, self.shared)


class Through(torch.autograd.Function):
    r"""Given values :math:`v = s\,(q - z)` or :math:`s\,q + m` of weights :math:`w`; all that they are made of learns.

    .. math:: \frac{\partial v}{\partial w} = 1, \quad \frac{\partial v}{\partial s} = \frac{v - w}{s}, \quad
        \frac{\partial v}{\partial z} = \frac{\partial v}{\partial m} = 0 \quad \text{within reach, else} \quad
        0, \; \frac{v - m}{s}, \; -s, \; 1
    """

    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, scale: Tensor, minimum: Tensor | None, zero: Tensor | None, made: Tensor,
        within: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(moved, scale, minimum, made, within)
        ctx.zero = zero is not None
        return made.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        moved, scale, minimum, made, within = ctx.saved_tensors
        base = made if minimum is None else made - minimum
        step = torch.where(scale != 0, scale, 1)  # of signs it may be zero
        of_scale = gradient * torch.where(within, made - moved, base) / step
        beyond = gradient * ~within
        alone = scale.shape != made.shape  # one step for a whole row

        def fitting(found: Tensor) -> Tensor:
            return found.sum(1, keepdim=True) if alone else found

        return (
            gradient * within,
            fitting(of_scale),
            None if minimum is None else fitting(beyond),
            fitting(-beyond * scale) if ctx.zero else None,
            None,
            None,
        )


class Evenly(torch.autograd.Function):
    """Values of evenly spaced points, with the gradients of `Through`, in as few passes as there can be."""

    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, scale: Tensor, minimum: Tensor | None, zero: Tensor | None, grid: Integer
    ) -> Tensor:
        runs, step = moved.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(-1)
        places = runs / step if minimum is None else (runs - minimum.unsqueeze(-1)).div_(step)
        middle: Any = 0 if minimum is not None else grid.middle if zero is None else zero.unsqueeze(-1)
        held = places.round().add_(middle).clamp_(*grid.ends()).sub_(middle)
        values = held * step if minimum is None else (held * step).add_(minimum.unsqueeze(-1))  # as they are decoded
        apart = torch.sub(held, places, out=places)
        within = apart.abs() <= HALF
        ctx.save_for_backward(torch.where(within, apart, held), within, scale)
        ctx.kinds = minimum is not None, zero is not None
        return values.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        of_step, within, scale = ctx.saved_tensors
        gradient = gradients[0].unflatten(1, (scale.shape[1], -1))
        passed = gradient * within
        of_scale = (gradient * of_step).sum(-1)
        low, zero = ctx.kinds
        of_low = of_zero = None
        if low or zero:
            beyond = (gradient - passed).sum(-1)  # exactly zero where nothing is cut off
            of_low, of_zero = beyond if low else None, -beyond * scale if zero else None
        return passed.flatten(1), of_scale, of_low, of_zero, None


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """What is rounded, with the gradient of what was not."""
    return rounded + (value - value.detach())


def as_stored(value: Tensor, grid: Grid, name: str = "scale") -> Tensor:
    """A parameter as it will be when it was written and read."""
    return value.to(grid.stored()[name].dtype).to(value.dtype)
