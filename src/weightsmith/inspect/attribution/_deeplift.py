"""What each input and each unit adds to an answer, by passing differences from a reference through the network.

A gradient is blind where a unit is saturated or switched off. Here every nonlinear step passes on the slope of the
straight line between what it gives for the reference and for the input. Such slopes multiply along the network as
gradients do, in one backward pass, and the parts sum to the difference of the outputs exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.attribution._parts import Attribution, Target, chosen, frozen, layer_of, like, slope_at


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words(
    """
    relu leaky_relu prelu rrelu elu selu celu gelu silu mish sigmoid tanh softplus softsign logsigmoid log_sigmoid
    hardtanh relu6 hardswish hardsigmoid tanhshrink hardshrink softshrink threshold exp log log1p expm1 sqrt rsqrt abs
    square pow __pow__ clamp clip erf sin cos reciprocal
    """
)
"""One value in, one value out: the slope of the secant takes the place of the derivative."""

LINEAR = _words(
    """
    sum mean cumsum add sub rsub neg __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __neg__ view view_as reshape
    reshape_as flatten unflatten permute transpose t swapaxes movedim squeeze unsqueeze expand expand_as repeat cat
    concat concatenate stack chunk split unbind narrow select index_select gather __getitem__ __get__ pad roll flip
    contiguous clone to float double half bfloat16 type_as dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    pixel_shuffle pixel_unshuffle channel_shuffle upsample interpolate
    """
)
"""Sums of the inputs with fixed weights (dropout in evaluation mode): the gradient is the multiplier."""

PRODUCTS = _words(
    """
    mul multiply __mul__ __rmul__ __imul__ matmul mm bmm mv __matmul__ __rmatmul__ einsum addmm linear conv1d conv2d
    conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm
    """
)
"""Linear as long as only one factor depends on the inputs (batch norm in evaluation mode)."""

QUOTIENTS = _words("div divide true_divide __truediv__ __itruediv__")
"""Linear in what is divided, as long as nothing is rounded."""

CONSTANTS = _words("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor")
"""Tensors made after the inputs' shape, whatever the inputs say."""

TRAINING = {
    "batch_norm": (5, False),
    "rrelu": (3, False),
    "dropout": (2, True),
    "dropout1d": (2, True),
    "dropout2d": (2, True),
    "dropout3d": (2, True),
    "alpha_dropout": (2, False),
    "feature_alpha_dropout": (2, False),
}
"""Where these say that they are in training, and what they take if nothing is said."""

POOLS = frozenset(f"{kind}_pool{axes}d" for kind in ("max", "adaptive_max") for axes in (1, 2, 3))


@card(
    paper="Shrikumar, Greenside, Shcherbina, Kundaje 2016, 'Not Just a Black Box: Learning Important Features Through "
    "Propagating Activation Differences'",
    covers=("not-just-black-box",),
    needs=("data",),
    unit="model",
    claim="complete at the cost of two forward passes and one backward pass",
    departs="the rescale rule alone; a max pool gives a rise to the place of the new maximum, a fall to the old one",
)
def deeplift(
    model: nn.Module,
    inputs: Tensor,
    *,
    target: Target = None,
    baselines: Tensor | float = 0.0,
    layer: str | None = None,
) -> Attribution:
    r"""The part of each input value, or of each value a layer gives, in the difference from a reference.

    .. math:: m = \frac{f(z) - f(z')}{z - z'}, \qquad A_i = (x_i - x'_i)\, \prod m

    for every nonlinear step f of one value (its derivative, where :math:`z = z'`), with sums over the network's paths
    as in the chain rule. Steps may be modules or plain functions, in place or not.

    Args:
        model: of linear and convolution layers, elementwise activations, batch norm, max and mean pools, sums and
            changes of shape; asked in evaluation mode and left as it was.
        inputs: ``[n, *shape]``.
        target: the output that is meant: a class, one for each example ``[n]``, or ``outputs -> [n]``, whose
            steps count as the model's do.
        baselines: the reference :math:`x'`: a number, ``[*shape]`` or ``[n, *shape]``.
        layer: name of a module whose output the parts are wanted of, instead of the inputs.

    Returns:
        Attribution: ``values`` of the inputs' or the layer's shape; ``gap`` is rounding alone, unless the model has a
        way around the layer.

    Raises:
        ValueError: a step that none of the rules covers (softmax, layer norm, products of two activations, anything
            without a gradient, such as a comparison), named with its module; parts that miss the change by more than
            rounding, as with steps that PyTorch does not show; shapes that do not fit.

    >>> dead = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU())       # relu(1 - x): gradient 0 at 2
    >>> _ = torch.nn.init.constant_(dead[0].weight, -1), torch.nn.init.ones_(dead[0].bias)
    >>> deeplift(dead, torch.tensor([[2.0]])).values
    tensor([[-1.]])
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not len(inputs):
        raise Error("deeplift needs inputs [n, ...] of floats, at least one")
    references = like(inputs, baselines, "baselines")
    if len(references) > 1:
        raise Error(f"deeplift takes one reference an example, got {len(references)}; average the results of several")
    if layer is not None:
        layer_of(model, layer)
    with frozen(model), torch.enable_grad():
        before, was, at_reference = _passed(model, references[0], target, layer, None)
        _, output, at = _passed(model, inputs, target, layer, before)
        multipliers = slope_at(output, at, "the inputs" if layer is None else layer)
    found = Attribution("DeepLIFT", ((at - at_reference) * multipliers).detach(), (output - was).detach())
    if layer is None:
        sizes = found.values.double().abs().flatten(1).sum(dim=1) + output.detach().abs() + was.detach().abs()
        missed = found.gap.abs() > 10 * torch.finfo(inputs.dtype).eps ** 0.5 * sizes
        if missed.any():
            raise Error(
                f"deeplift: the parts of example {int(missed.nonzero()[0])} miss the change of the output by more than "
                "rounding: a step of the model is hidden (a custom autograd function, a number read off a tensor) or "
                "mixes examples; use integrated_gradients"
            )
    return found


@card(
    paper="Shrikumar, Greenside, Shcherbina, Kundaje 2016, 'Not Just a Black Box: Learning Important Features Through "
    "Propagating Activation Differences', for hidden units",
    covers=("not-just-black-box",),
    needs=("data",),
    unit="model",
    claim="units that it calls important cost more when removed than those with large activations",
)
def unit_importance(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    *,
    target: Target | str = "labels",
    baselines: Tensor | float = 0.0,
) -> Report:
    r"""How much each unit of some layers adds to the answers: mean size of its contribution.

    .. math:: I_u = \frac1n \sum_x \Bigl| \sum_{p} A_{u,p}(x) \Bigr|

    with :math:`A` from `deeplift` and p the positions of unit u (for convolutions).

    Args:
        model: as for `deeplift`.
        batches: ``inputs``, or ``(inputs, labels)`` where the outputs meant are those of the labels.
        layers: names of modules that give ``[n, units, ...]``.
        target: ``"labels"``, or as for `deeplift`.
        baselines: the reference of the inputs.

    Returns:
        Report: a row a unit with ``importance`` and ``mean`` (signed); units of one layer are in order.

    Raises:
        ValueError: no batch, no layer, no labels; what `deeplift` refuses.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> _ = torch.nn.init.eye_(net[0].weight)
    >>> with torch.no_grad():
    ...     _ = net[2].weight.copy_(torch.tensor([[3.0, -1.0]]))
    >>> unit_importance(net, [torch.ones(4, 2)], ["1"], target=None)["importance"]
    [3.0, 1.0]
    """
    if not layers:
        raise Error("unit_importance needs the names of layers, got none")
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    examples = 0
    for batch in batches:
        inputs, labels = (batch[0], batch[1]) if isinstance(batch, list | tuple) else (batch, None)
        if isinstance(target, str) and (target != "labels" or labels is None):
            raise Error(f"target={target!r} needs batches (inputs, labels)")
        wanted: Any = labels if isinstance(target, str) else target
        examples += len(inputs)
        for name in layers:
            parts = deeplift(model, inputs, target=wanted, baselines=baselines, layer=name).values.double()
            whole = parts.flatten(2).sum(dim=2) if parts.dim() > 2 else parts
            size, mean = sums.get(name, (0.0, 0.0))
            sums[name] = size + whole.abs().sum(dim=0), mean + whole.sum(dim=0)
    if not examples:
        raise Error("unit_importance needs at least one example, got none")
    rows = [
        {"layer": name, "unit": unit, "importance": float(size) / examples, "mean": float(mean) / examples}
        for name, pair in sums.items()
        for unit, (size, mean) in enumerate(zip(*pair, strict=True))
    ]
    lines = [
        Line(name, list(range(len(found))), found)
        for name in layers
        for found in [sorted((row["importance"] for row in rows if row["layer"] == name), reverse=True)]
    ]
    plot = Plot("Importance", "units, the most important first", "mean size of the contribution", lines)
    return Report("Units by their contributions", {"examples": examples, "units": len(rows)}, rows, [plot])


class _Differences(TorchFunctionMode):
    """Notes what nonlinear steps see; where a noted reference is given, puts secants in the place of slopes."""

    def __init__(self, reference: _Differences | None):
        super().__init__()
        self.reference = reference
        self.steps: list[tuple[str, Tensor, Tensor]] = []
        self.met = 0
        self.where: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        word = getattr(function, "__name__", str(function))
        moving = [one for one in _tensors((arguments, named)) if one.requires_grad]
        if not moving:
            return function(*arguments, **named)
        place = f" in module {self.where[-1]!r}" if self.where and self.where[-1] else ""
        if word in TRAINING and _argument(arguments, named, *TRAINING[word]):
            raise Error(
                f"deeplift: {word}{place} works as in training, where it is not a fixed function of each example"
            )
        alone = len(moving) == 1
        leads = alone and bool(arguments) and arguments[0] is moving[0]
        # A method with one underscore at its end, such as relu_, works in place.
        method = word.removesuffix("_") if not word.endswith("__") else word
        if method in ELEMENTWISE and leads:
            inplace = bool(named.pop("inplace", False)) or method != word
            made = self._step(method, moving[0], lambda z: function(z.clone(), *arguments[1:], **named))
            return moving[0].copy_(made) if inplace else made
        if word in POOLS and leads:
            return self._pool(word, moving[0], arguments[1:], named)
        known = method in LINEAR or (method in PRODUCTS and alone)
        known = known or (method in QUOTIENTS and leads and named.get("rounding_mode") is None)
        made = function(*arguments, **named)
        if any(word not in CONSTANTS and not (known and one.requires_grad) for one in _tensors(made)):
            raise Error(
                f"deeplift has no rule for {word}{place}: it knows elementwise activations, max pools, and what is "
                "linear; use integrated_gradients"
            )
        return made

    def _noted(self, word: str, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the step saw and gave for the reference; None if this is the reference."""
        index, self.met = self.met, self.met + 1
        if self.reference is None:
            self.steps.append((word, z.detach().clone(), y.detach()))  # z may be changed in place later on
            return None
        known = self.reference.steps
        before = known[index] if index < len(known) else ("nothing", z[:0], y[:0])
        if before[0] != word or before[1].shape != z.shape:
            raise Error(f"the model takes another way for the reference: {before[0]} where the input meets {word}")
        return before[1], before[2]

    def _step(self, word: str, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        y = function(z.detach())
        noted = self._noted(word, z, y)
        if noted is None:
            return _moving(y)
        change, size = z.detach() - noted[0], z.detach().abs() + noted[0].abs()
        # Where rounding would spoil the secant, the slope half-way is as good.
        same = change.abs() <= torch.finfo(z.dtype).eps ** 0.5 * size
        with torch.enable_grad():
            between = torch.where(same, torch.lerp(noted[0], z.detach(), 0.5), z.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(function(between).sum(), between)
        multiplier = torch.where(same, slope, (y - noted[1]) / change.where(~same, torch.ones_like(change)))
        return y + multiplier * (z - z.detach())

    def _pool(self, word: str, z: Tensor, arguments: Any, named: dict[str, Any]) -> Tensor:
        axes, pool = int(word[-2]), getattr(functional, word)
        if named.pop("return_indices", False) or z.dim() < axes + 2:
            raise Error(f"deeplift: {word} needs inputs [n, channels, ...] and return_indices=False")
        y, place = pool(z.detach(), *arguments, **named, return_indices=True)
        noted = self._noted(word, z, y)
        if noted is None:
            return _moving(y)
        before, low = noted
        _, old_place = pool(before, *arguments, **named, return_indices=True)
        flat, high = z.flatten(-axes), torch.maximum(y, low)
        change = flat.detach() - before.flatten(-axes)
        rise = _gathered(flat, change, place.flatten(-axes), (high - low).flatten(-axes), otherwise=1.0)
        fall = _gathered(flat, change, old_place.flatten(-axes), (y - high).flatten(-axes), otherwise=0.0)
        moved = (rise + fall).reshape(y.shape)
        return y.detach() + moved - moved.detach()


def _moving(values: Tensor) -> Tensor:
    """The values, marked as depending on the inputs: of the reference's pass no slope is ever asked."""
    return values + values.new_zeros(()).requires_grad_()


def _gathered(flat: Tensor, change: Tensor, place: Tensor, part: Tensor, otherwise: float) -> Tensor:
    """Values at the places, times the multipliers that give each output its part of the change."""
    moved = change.gather(-1, place)
    still = moved == 0
    multiplier = torch.where(
        still, torch.full_like(part, otherwise), part / moved.where(~still, torch.ones_like(moved))
    )
    return multiplier * flat.gather(-1, place)


def _passed(
    model: nn.Module, inputs: Tensor, target: Target, layer: str | None, reference: _Differences | None
) -> tuple[_Differences, Tensor, Tensor]:
    """One forward pass: the steps, the chosen output ``[n]`` and the tensor whose parts are wanted."""
    steps = _Differences(reference)
    start = inputs.detach().clone().requires_grad_()
    caught: list[Tensor] = [start] if layer is None else []
    with _named(model, steps.where), ExitStack() as hooks:
        if layer is not None:

            def catch(module: nn.Module, given: Any, made: Any) -> Any:
                caught.append(made)
                return made.clone() if isinstance(made, Tensor) else made  # which may be changed in place

            hooks.callback(layer_of(model, layer).register_forward_hook(catch).remove)
        given = start.clone()  # which the model may change in place
        with steps:
            outputs = model(given)
            if not isinstance(outputs, Tensor):
                raise Error(f"deeplift needs a model that gives one tensor, got {type(outputs).__name__}")
            output = chosen(outputs, target)
    if len(caught) != 1 or not isinstance(caught[0], Tensor):
        raise Error(f"deeplift: layer {layer!r} was called {len(caught)} times; it must be called once, for one tensor")
    return steps, output, caught[0]


@contextmanager
def _named(model: nn.Module, where: list[str]) -> Iterator[None]:
    """The name of the module that is running, for messages."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def enter(module: nn.Module, given: Any, name: str = name) -> None:
                where.append(name)

            def leave(module: nn.Module, given: Any, made: Any) -> None:
                where.pop()

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


def _argument(arguments: Sequence[Any], named: dict[str, Any], index: int, otherwise: bool) -> bool:
    return bool(named.get("training", arguments[index] if len(arguments) > index else otherwise))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
