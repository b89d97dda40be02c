"""Fake quantization of what goes into layers, beside that of their weights.

Codes for both sides of a product are what integer arithmetic needs. Inputs change with every batch, so their range is
found anew each time, of each token or of the whole tensor, or once and for all over a few batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.grids import Grid, Integer
from weightsmith.quantize.training._fake import Straight, beneath
from weightsmith.weights import Pattern

Range = Literal["token", "tensor", "static"]
"""Whose range counts: that of each token (the last axis of what comes in), of each tensor that comes in, or that of
all tensors that came by while `calibrating`."""

PLACE = "input_grid"
"""Under this name the quantizer of a layer's inputs is one of its modules."""


class InputGrid(nn.Module):
    """Quantizes the inputs of a layer; gradients pass straight.

    Args:
        grid: the points.
        range: see `Range`.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, range: Range = "tensor"):
        super().__init__()
        self.grid, self.range = grid, range
        self.observing = False
        if range == "static":
            self.register_buffer("low", torch.tensor(torch.inf))
            self.register_buffer("high", torch.tensor(-torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise Error(
                f"inputs of {x.dtype} have no points to lie on; leave this layer out with fake_inputs(pattern=)"
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad():
            if self.range == "static" and self.observing:
                if x.numel():
                    low, high = torch.aminmax(wide)
                    self.low.copy_(torch.minimum(self.low, low.to(self.low)))
                    self.high.copy_(torch.maximum(self.high, high.to(self.high)))
                return x
            params = self.params(wide)
            flat = wide if self.range == "token" else wide.reshape(1, -1)
            values = self.grid.decode(self.grid.encode(flat, params), params).view(wide.shape).to(wide.dtype)
        return cast(Tensor, Straight.apply(wide, values)).to(x.dtype)

    def params(self, x: Tensor) -> Mapping[str, Tensor]:
        """The parameters of the grid for an input."""
        if self.range == "token":
            return self.grid.fit(x)
        if self.range == "tensor":
            return self.grid.fit(x.reshape(1, -1))
        if not self.low <= self.high:
            raise Error(
                "a static range of inputs is not known yet, or holds values that are not finite: call the model on "
                "data within calibrating(module)"
            )
        return self.grid.fit(torch.stack([self.low, self.high]).to(x).view(1, 2))

    def extra_repr(self) -> str:
        return f"{self.grid}, range={self.range!r}"


def _quantized_first(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook: found in the module itself, so that copies of the module have their own."""
    made = cast(InputGrid | None, getattr(module, PLACE, None))
    if made is None or not (inputs or named):
        return inputs, named
    if inputs:
        return (made(inputs[0]), *inputs[1:]), named
    first = next(iter(named))
    return inputs, {**named, first: made(named[first])}


@card(
    paper="Jacob et al. 2018, 'Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference' (ranges of activations); ranges of tokens as in Yao et al. 2022, 'ZeroQuant: Efficient and Affordable "
    "Post-Training Quantization for Large-Scale Transformers'",
    unit="model",
    claim="8 bits a token lose next to nothing",
)
def fake_inputs(
    module: nn.Module,
    *,
    bits: int = 8,
    symmetric: bool = False,
    range: Range = "tensor",
    grid: Grid | None = None,
    pattern: Pattern | None = None,
) -> dict[str, InputGrid]:
    """Let layers of a module see quantized inputs.

    Args:
        module: changed in place: each layer gets a module ``input_grid`` and a hook that calls it on the first of the
            layer's inputs; layers of several, such as ``nn.MultiheadAttention``, are better left out. `without_inputs`
            takes both off again.
        bits: width of a code, 1 to 8.
        symmetric: whether zero lies in the middle of the range; else it is one of the points.
        range: whose range counts, see `Range`. Ranges of tokens are those of the last axis, so they are not for
            convolutions. ``"static"`` needs data: call the model within `calibrating`.
        grid: the points, instead of ``bits`` and ``symmetric``.
        pattern: of the names of weights whose layers are meant; default: those of `fake`.

    Returns:
        name of a weight -> the quantizer of its layer's inputs.

    Raises:
        Error: no weight fits, a layer has one already, ranges of tokens for a convolution, or static ranges on a grid
            that is fitted to more than its range.

    >>> layer = nn.Linear(2, 1)
    >>> _ = fake_inputs(layer, bits=1, symmetric=False, pattern="weight")
    >>> torch.equal(layer(torch.tensor([[0.9, 0.2]])), layer(torch.tensor([[0.9, 0.0]])))
    True
    """
    if range not in get_args(Range):
        raise Error(f"fake_inputs: range is one of {', '.join(get_args(Range))}; got {range!r}")
    points = Integer(bits, symmetric=symmetric) if grid is None else grid
    if any(one.shared for one in points.stored().values()) or points.group is not None:
        raise Error(f"fake_inputs: {points} has parameters of groups or of tensors; inputs have one range each")
    if range == "static" and any(one.tail for one in points.stored().values()):
        raise Error(f"fake_inputs: {points} is fitted to values, of which a static range keeps two; use 'tensor'")
    found: dict[str, nn.Module] = {}
    for name, dims in ((name, value.dim()) for name, value in beneath(module, pattern).items()):
        layer = module.get_submodule(name.rpartition(".")[0])
        if hasattr(layer, PLACE):
            raise Error(f"{name}: the inputs of its layer are quantized already; without_inputs takes that off")
        if range == "token" and dims > 2:
            raise Error(f"{name}: a convolution's inputs have no tokens along the last axis; use range='tensor'")
        if layer not in found.values():
            found[name] = layer
    made = {}
    for name, layer in found.items():
        made[name] = InputGrid(points, range).to(next(layer.parameters()).device)
        setattr(layer, PLACE, made[name])
        layer.register_forward_pre_hook(_quantized_first, with_kwargs=True)
    return made


def without_inputs(module: nn.Module) -> None:
    """Take the quantizers of inputs off again, in place.

    Args:
        module: as `fake_inputs` left it; one without quantized inputs stays as it is.

    >>> layer = nn.Linear(2, 1)
    >>> _ = fake_inputs(layer, bits=1, pattern="weight")
    >>> without_inputs(layer)
    >>> list(layer.children())
    []
    """
    for layer in list(module.modules()):
        if hasattr(layer, PLACE) and isinstance(getattr(layer, PLACE), InputGrid):
            delattr(layer, PLACE)
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _quantized_first]:
                del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Within it, static ranges widen to hold all inputs that come by, and these pass as they are.

    Args:
        module: as `fake_inputs` with ``range="static"`` left it.

    Raises:
        Error: no range of the module is static.

    >>> layer = nn.Linear(2, 1)
    >>> made = fake_inputs(layer, range="static", pattern="weight")["weight"]
    >>> with calibrating(layer):
    ...     _ = layer(torch.tensor([[0.0, 3.0]]))
    >>> made.high.item()
    3.0
    """
    found = [part for part in module.modules() if isinstance(part, InputGrid) and part.range == "static"]
    if not found:
        raise Error("calibrating: no range of inputs in this module is static")
    for part in found:
        part.observing = True
    try:
        yield
    finally:
        for part in found:
            part.observing = False
