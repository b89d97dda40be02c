"""Compute with the weights that will be stored, and train the ones beneath them.

Rounding has no slope, so gradients pass through it as if it were not there: a weight moves by many small steps and its
code changes when it has come far enough. The network learns to live with the points of its grid, which below 4 bits
repairs most of what rounding afterwards breaks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from weightsmith.adapt import fold, parametrized, unparametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.sparse import weights_of
from weightsmith.quantize import _coded
from weightsmith.quantize._coded import Coded, fitted
from weightsmith.quantize._layout import Layout, parts_of, with_codes
from weightsmith.quantize.grids import Grid, Params, named
from weightsmith.quantize.room import divided
from weightsmith.stats.room import NoneFits
from weightsmith.weights import Held, Pattern, PerTensor, Spec, Weights, matches, open, resolve
from weightsmith.weights import Step as Made

Step = Literal["fitted", "learned"]
"""Where the parameters of the grid come from: fitted to the weights at every pass, or learned with them."""

LEARNED = ("scale", "minimum")
"""Parameters of grids that can learn: values are ``scale * (code - zero) + minimum``."""

BEGINNING = 16  # ranges that are tried for where a learned step begins


class Fake(nn.Module):
    """The parametrization ``W -> g(W)``, the nearest points of a grid; gradients pass straight through.

    Args:
        weight: ``[out, ...]``, what it will stand on.
        layout: how it is taken for a matrix ``[out, in]``, and its grid.
        step: see `Step`; what learns begins at the range that leaves the least error in the weight.
        clip: how many narrower ranges are tried at every fit.
    """

    held: Tensor | None
    """``[out, in]``: the values of frozen weights, else None."""
    frozen: Tensor | None
    """``[out, in]`` boolean: true where a weight stands still, else None."""
    place: Tensor
    """Nothing, on the device of the weight: there goes what comes with a state."""

    def __init__(self, weight: Tensor, layout: Layout, step: Step = "fitted", clip: int = 0):
        super().__init__()
        self.layout, self.clip = layout, clip
        self.register_buffer("held", None)
        self.register_buffer("frozen", None)
        self.register_buffer("place", weight.detach().new_empty(0), persistent=False)
        self.fixed: Kept | None = None
        self.learned: nn.ParameterDict | None = None
        if step == "learned":
            begun = self.found(layout.matrix(weight.detach()), max(clip, BEGINNING))
            self.learned = nn.ParameterDict({name: nn.Parameter(begun[name]) for name in learnable(layout.grid)})
            self.fixed = Kept({name: value for name, value in begun.items() if name not in self.learned})

    @property
    def grid(self) -> Grid:
        """The points."""
        return self.layout.grid

    def found(self, rows: Tensor, clip: int) -> dict[str, Tensor]:
        """All parameters of the grid, fitted to ``[out, in]``: each group's own and shared ones together."""
        shared = self.grid.shared(rows)
        return {**shared, **fitted(rows, self.grid, clip=clip, shared=shared)}

    def params(self, rows: Tensor) -> dict[str, Tensor]:
        """All parameters of the grid as they stand, rounded as they are stored."""
        fixed = self.fixed.tensors() if self.fixed is not None else {}
        if self.learned is not None:
            stored = self.grid.stored()
            rounded = {name: stepped_straight(value, stored[name].dtype) for name, value in self.learned.items()}
            # A step that has become too small for its dtype stays the smallest one: nothing is divided by zero.
            least = torch.finfo(stored["scale"].dtype).tiny
            rounded["scale"] = rounded["scale"] + least * (rounded["scale"].detach() == 0)
            return fixed | rounded
        return fixed or self.found(rows, self.clip)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight that is rounded: ``[out, in]``, with frozen values in their place."""
        rows = self.layout.matrix(weight)
        return rows if self.frozen is None or self.held is None else torch.where(self.frozen, self.held, rows)

    @torch.no_grad()
    def coded(self, weight: Tensor) -> Coded:
        """The codes as they stand, of the weight beneath."""
        rows = self.rows(weight)
        return self.coded_rows(rows, {name: value.detach() for name, value in self.params(rows).items()})

    def coded_rows(self, rows: Tensor, params: Params) -> Coded:
        """The codes of rows, with all parameters."""
        shared = {name for name, one in self.grid.stored().items() if one.shared}
        own = {name: value for name, value in params.items() if name not in shared}
        return _coded.coded(rows, self.grid, own, {name: value for name, value in params.items() if name in shared})

    def fix(self, weight: Tensor) -> dict[str, Tensor]:
        """Let the grid stand still from now on, as it lies over the weight; the parameters it has."""
        with torch.no_grad():
            params = {name: value.detach().clone() for name, value in self.params(self.rows(weight)).items()}
        self.fixed, self.learned = Kept(params), None
        return params

    def forward(self, weight: Tensor) -> Tensor:
        rows = self.rows(weight)
        if self.learned is None:
            made = Straight.apply(rows, self.coded(weight).values().to(rows.dtype))
        else:
            made = self._with_learned(rows)
        return cast(Tensor, made).view(weight.shape).to(weight.dtype)

    def _with_learned(self, rows: Tensor) -> Tensor:
        assert self.learned is not None
        params = self.params(rows)
        with torch.no_grad():
            still = {name: value.detach() for name, value in params.items()}
            values = self.coded_rows(rows, still).values().to(rows.dtype)
            low, high = reach(self, rows, still)
        group = rows.shape[1] if self.grid.group is None else min(self.grid.group, rows.shape[1])
        sharing = rows.numel() if params["scale"].dim() == 0 else group
        slowed = 1 / math.sqrt(max(sharing, 1) * max(2 ** (self.grid.bits - 1) - 1, 1))
        scale = over_inputs(scaled_gradient(params["scale"], slowed), rows.shape[1], self.grid.group)
        minimum = params.get("minimum")
        if minimum is not None:
            minimum = over_inputs(scaled_gradient(minimum, slowed), rows.shape[1], self.grid.group)
        return cast(Tensor, Learned.apply(rows, scale, minimum, values, (rows >= low) & (rows <= high)))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """What was frozen after this module was made comes with the state."""
        for name in ("held", "frozen"):
            if prefix + name in state_dict and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.place.device))
        begin = prefix + "fixed."
        stored = {key[len(begin) :]: value for key, value in state_dict.items() if key.startswith(begin)}
        if stored and (self.fixed is None or set(stored) != set(self.fixed.tensors())):
            there = self.place.device
            self.fixed = Kept({name: torch.empty_like(value, device=there) for name, value in stored.items()})
            self.learned = self.learned if any(key.startswith(prefix + "learned.") for key in state_dict) else None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return str(self.grid)


class Kept(nn.Module):
    """Tensors by name that do not learn."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self.named_buffers(recurse=False))


class Straight(torch.autograd.Function):
    """Given values forwards; backwards the weight is moved as if they had been it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor) -> Tensor:
        return values.clone() if values is rows else values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Learned(torch.autograd.Function):
    r"""Given values :math:`v` of weights :math:`w` forwards; backwards steps and minima learn too.

    .. math:: \frac{\partial v}{\partial w} = 1, \quad \frac{\partial v}{\partial s} = \frac{v - w}{s}, \quad
        \frac{\partial v}{\partial m} = 0 \quad \text{within reach, else} \quad 0, \; \frac{v - m}{s}, \; 1
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, scale: Tensor, minimum: Tensor | None, values: Tensor, within: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, scale, minimum, values, within)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        rows, scale, minimum, values, within = ctx.saved_tensors
        of_rows = gradient * within
        base = values if minimum is None else values - minimum
        of_scale = gradient * torch.where(within, values - rows, base) / scale
        of_minimum = None if minimum is None else gradient * ~within
        return of_rows, of_scale, of_minimum, None, None


class _Rounded(torch.autograd.Function):
    """A number as it is stored; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def stepped_straight(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A learned parameter rounded to the dtype it will be stored in."""
    return value if value.dtype == dtype else cast(Tensor, _Rounded.apply(value, dtype))


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """The same value; its gradient is multiplied with a factor."""
    return value * factor + (value * (1 - factor)).detach()


def over_inputs(params: Tensor, inputs: int, group: int | None) -> Tensor:
    """A parameter of each group ``[out, groups]``, or of the tensor ``[]``, at every input: it broadcasts to
    ``[out, in]``."""
    if params.dim() == 0 or params.shape[1] == 1:
        return params
    return params.repeat_interleave(cast(int, group), dim=1)[:, :inputs]


def reach(fake: Fake, rows: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """The lowest and the highest point of the grid at every weight: two tensors that broadcast to ``[out, in]``."""
    stored, grid = fake.grid.stored(), fake.grid
    lead = next((value.shape[:2] for name, value in params.items() if not stored[name].shared), torch.Size((1, 1)))
    spread = [value.abs().amax() for name, value in params.items() if name in LEARNED and value.numel()]
    far = rows.abs().amax() + sum(spread, rows.new_zeros(())) * 2 ** (grid.bits + 1) + 1
    outer = [grid.decode(grid.encode((far * sign).expand(*lead, 1), params), params) for sign in (-1, 1)]
    ends = [over_inputs(one.squeeze(-1).to(rows.dtype), rows.shape[1], grid.group) for one in outer]
    return ends[0], ends[1]


def learnable(grid: Grid) -> list[str]:
    """The parameters of a grid that can learn, checked."""
    stored = grid.stored()
    names = [name for name in LEARNED if name in stored]
    plain = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if "scale" not in names or any(stored[name].tail or stored[name].dtype not in plain for name in names):
        raise Error(f"{grid} has no step that could learn: one number a group, stored as a plain float")
    return names


@card(
    paper="Jacob et al. 2018, 'Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference' (straight-through rounding); Esser et al. 2019, 'Learned Step Size Quantization' (learned steps)",
    unit="model",
    claim="at 2 and 3 bits it keeps what rounding a trained network loses",
    departs="any grid; learned steps begin at the range of least squared error, not at 2 mean|w| / sqrt(Q)",
)
def fake(
    module: nn.Module,
    *,
    bits: PerTensor[int] | None = None,
    group: PerTensor[int | None] | None = None,
    grid: PerTensor[str | Grid] = "int",
    symmetric: PerTensor[bool] | None = None,
    step: Step = "fitted",
    clip: int = 0,
    pattern: Pattern | None = None,
) -> dict[str, Fake]:
    r"""Let a module compute with quantized weights and learn the weights beneath.

    .. math:: \hat w = g(w), \qquad \frac{\partial \hat w}{\partial w} = 1

    and, with learned steps, :math:`\partial \hat w / \partial s = (\hat w - w) / s` within reach of the grid and the
    outermost point's beyond, where the weight gets no gradient; steps learn :math:`\sqrt{n (2^{b-1} - 1)}` times more
    slowly, for :math:`n` weights that share one.

    Args:
        module: changed in place: its weights get the parametrization `Fake`. Any optimizer trains it.
        bits: width of a code; None for the grid's own, 4 for ``"int"``.
        group: inputs that share parameters; None for whole rows.
        grid: a word of ``weightsmith.quantize.grids.GRIDS``, or a grid, which then says bits and groups itself.
        symmetric: of integer grids, whether zero lies in the middle.
        step: ``"fitted"``: at every pass the grid is fitted to the weights as they are; ``"learned"``: its steps are
            parameters, for grids whose step is a plain float.
        clip: how many narrower ranges are tried at every fit; each costs about what the fit does.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        name of a weight -> its parametrization, in order. `weightsmith.adapt.fold` makes of the module a plain one
        with the quantized weights; `codes` and `coded` give what to store. Memory in training: two copies of a weight
        more, five with learned steps.

    Raises:
        Error: no weight fits, groups that do not fill a row, or a grid without a step that could learn. The module is
            then as it was.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> list(fake(model, bits=2))
    ['0.weight', '2.weight']
    >>> len(model[0].weight.unique()) <= 3 * 4
    True
    """
    if step not in get_args(Step):
        raise Error(f"fake: step is one of {', '.join(get_args(Step))}; got {step!r}")
    layouts = layouts_of(module, pattern, bits=bits, group=group, grid=grid, symmetric=symmetric)
    return put_on(module, pattern, lambda name, weight: Fake(weight, layouts[name], step, clip))


def layouts_of(
    module: nn.Module,
    pattern: Pattern | None,
    *,
    grid: PerTensor[str | Grid] = "int",
    **settings: PerTensor[Any],
) -> dict[str, Layout]:
    """How every weight that fits is taken for a matrix, and on which grid: name -> layout, in order.

    Raises:
        Error: no weight fits, settings that the grid does not have, or groups that do not fill a row.
    """
    weights = weights_of(module, pattern)
    chosen = {word: resolve(value, weights, word) for word, value in {"grid": grid, **settings}.items()}
    found = {}
    for name, weight in weights.items():
        own = {word: values[name] for word, values in chosen.items()}
        if isinstance(own["grid"], str):  # steps are stored as the weights are, where nobody says otherwise
            own["scale_dtype"] = step_dtype(weight)
        spec = Spec(tuple(weight.shape), weight.dtype)
        try:
            found[name] = Layout.of(name, spec, named(own.pop("grid"), **own))
        except Error as error:
            raise Error(f"{name} {list(weight.shape)}: {error}") from None
    return divided(found, "error", "leave them out with pattern=")


def step_dtype(weight: Tensor) -> torch.dtype:
    """In what steps of a weight are stored where nobody says: as the weight is, but for floats of one byte."""
    return weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16


def put_on(module: nn.Module, pattern: Pattern | None, make: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """Put a parametrization ``make(name, weight)`` on every weight that fits, in place: on all, or after an error on
    none."""
    done: dict[str, Any] = {}
    for name, weight in weights_of(module, pattern).items():
        try:
            made = make(name, weight)
            parametrized(module, name, made)
        except Error as error:
            for earlier in done:
                place, _, leaf = earlier.rpartition(".")
                unparametrized(module.get_submodule(place), leaf, keep=False)
            raise Error(f"{name} {list(weight.shape)}: {error}") from None
        done[name] = made
    return done


def beneath(module: nn.Module, pattern: Pattern | None = None) -> dict[str, Tensor]:
    """The weights that learn: those beneath a quantization, and those that fit and carry none.

    Args:
        module: only looked at.
        pattern: of names; default: all that are quantized, and matrices and convolutions, but not embeddings and the
            head.

    Raises:
        Error: none fits, or one that carries no quantization is held by two modules.
    """
    found = {name: below for name, _, below in standing(module) if pattern is None or matches(pattern, name)}
    try:
        return found | dict(weights_of(module, pattern))
    except NoneFits:
        if found:
            return found
        raise


def standing(module: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, parametrization and weight beneath, of every weight whose last parametrization gives codes.

    A module that stands in several places has its first name.
    """
    for place, part in module.named_modules():
        stacks = cast(Mapping[str, Any], getattr(part, "parametrizations", {}))
        for leaf, stack in stacks.items():
            top = stack[len(stack) - 1]
            if hasattr(top, "coded"):
                given = [stack.original] if stack.is_tensor else [stack[0](*_originals(stack))]
                below = given[0]
                for under in list(stack)[0 if stack.is_tensor else 1 : -1]:
                    below = under(below)
                yield f"{place}.{leaf}" if place else leaf, top, below


def _originals(stack: Any) -> list[Tensor]:
    return [getattr(stack, f"original{index}") for index in range(stack.ntensors)]


@torch.no_grad()
def codes(module: nn.Module) -> dict[str, Coded]:
    """The codes of all quantized weights of a module as they stand.

    Args:
        module: only looked at.

    Returns:
        name of a weight -> `Coded`; ``.values()`` is the weight that the module computes with, before it is rounded
        to its dtype.

    Raises:
        Error: nothing in the module is quantized.

    >>> model = nn.Linear(4, 3)
    >>> _ = fake(model, bits=3, pattern="*")
    >>> torch.equal(codes(model)["weight"].values(), model.weight)
    True
    """
    found = {name: top.coded(below) for name, top, below in standing(module)}
    if not found:
        raise Error("nothing in this module is quantized; put a grid on its weights with fake(module)")
    return found


def coded(module: nn.Module) -> Weights:
    """The tensors of a module, its quantized weights as codes like those that the methods of the room give.

    Args:
        module: only looked at; other parametrizations than those that give codes count as folded.

    Returns:
        Weights: ``save`` writes them, `weightsmith.quantize.dequantize` makes of them the values that the module
        computes with. They are copies, so for a moment the module is held twice. Ranges of inputs are left out.

    Raises:
        Error: nothing in the module is quantized.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = fake(model, bits=3)
    >>> stored = coded(model)
    >>> [name for name in stored if name.startswith("0")]
    ['0.bias', '0.weight_packed', '0.weight_scale', '0.weight_shape']
    >>> torch.equal(ws.quantize.dequantize(stored)["0.weight"], model[0].weight)
    True
    """
    from weightsmith.quantize.training._inputs import without_inputs

    found = codes(module)
    plain = copy.deepcopy(module)
    fold(plain)
    without_inputs(plain)
    tensors = open(plain)
    layouts = {name: top.layout for name, top, _ in standing(module)}
    nodes = {
        name: {ending: Held(part) for ending, part in parts_of(one, layouts[name]).items()}
        | {"_shape": Held(torch.tensor(layouts[name].shape))}
        for name, one in found.items()
    }
    return with_codes(tensors, nodes, layouts, Made("quantize.training.coded", {}, ()))
