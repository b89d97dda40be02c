"""How the loss bends at a point: products with the Hessian, its trace, its largest eigenvalues, its spectrum.

The Hessian of a network has as many rows as the network has weights, and is never held; it is only multiplied
with. Each product costs about two gradients over the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightsmith import progress, solve
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.landscape._parts import Batches, Loss, Objective, borrowed
from weightsmith.weights import Pattern, Weights, working_dtype

Matrix = Literal["hessian", "gauss_newton"]
Method = Literal["hutchinson", "hutch++"]


class Curvature:
    """The Hessian or Gauss-Newton matrix of a mean loss, as a function of columns; made by `curvature_of`."""

    def __init__(self, model: nn.Module, objective: Objective, matrix: Matrix, parameters: dict[str, nn.Parameter]):
        self.model, self.objective, self.matrix, self.parameters = model, objective, matrix, parameters
        self.sizes = [parameter.numel() for parameter in parameters.values()]
        dtypes = {working_dtype(parameter.dtype) for parameter in parameters.values()}
        self.like = torch.empty(0, dtype=max(dtypes, key=lambda d: d.itemsize), device=self._tensors[0].device)
        self.only: solve.Product | None = None  # the graph of a single batch, which is kept

    @property
    def _tensors(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    @property
    def size(self) -> int:
        """The number of rows."""
        return sum(self.sizes)

    def __call__(self, columns: Tensor) -> Tensor:
        """``[n, b] -> [n, b]``."""
        vectors = self.split(columns)
        if self.only is not None:
            return self.joined(self.only(vectors))
        total, weights = torch.zeros_like(columns), 0.0
        for index, batch in enumerate(self.objective.each()):
            product, weight = self._batch(batch)
            total += weight * self.joined(product(vectors))
            weights += weight
            if index == 0 and self._single():
                self.only = product
        if not weights:
            raise Error("the batches are empty: no example to take a mean over")
        return total / weights

    def _single(self) -> bool:
        batches = self.objective.batches
        return batches is None or (isinstance(batches, Sequence) and len(batches) == 1)

    def _batch(self, batch: Any) -> tuple[solve.Product, float]:
        if self.matrix == "hessian":
            value, weight = self.objective.loss_of(self.model, batch)
            return solve.hessian_product(value, self._tensors), weight
        asked = _Asked(self.model)
        _, weight = self.objective.loss_of(asked, batch)
        if asked.outputs is None or not asked.outputs.requires_grad:
            raise Error("the Gauss-Newton matrix needs a loss that calls model(...) once and works on its outputs")

        def loss(outputs: Tensor) -> Tensor:
            return next(iter(self.objective.values(lambda *inputs, **named: outputs, batch)[0].values()))

        return solve.gauss_newton_product(loss, asked.outputs, self._tensors), weight

    def split(self, columns: Tensor) -> list[Tensor]:
        """Columns ``[n, b]`` as vectors ``[b, *shape]`` of the parameters."""
        parts = columns.T.split(self.sizes, dim=1)
        return [
            part.reshape(len(part), *parameter.shape).to(parameter.device, parameter.dtype)
            for part, parameter in zip(parts, self._tensors, strict=True)
        ]

    def joined(self, vectors: Sequence[Tensor]) -> Tensor:
        """The reverse of `split`."""
        sized = zip(vectors, self.sizes, strict=True)
        return torch.cat([vector.detach().reshape(len(vector), size).to(self.like) for vector, size in sized], dim=1).T

    def named(self, column: Tensor) -> Weights:
        """A vector ``[n]`` as `Weights` of the parameters' names and shapes."""
        parts = column.split(self.sizes)
        shaped = {
            name: part.reshape(parameter.shape).to(parameter.device, working_dtype(parameter.dtype)).clone()
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }
        return Weights.of(shaped)

    def column(self, vector: Mapping[str, Tensor]) -> Tensor:
        """The reverse of `named`; names that are lacking are zeros."""
        unknown = [name for name in vector if name not in self.parameters]
        if unknown:
            raise Error(f"the vector names {unknown[0]!r}, which is no parameter that was chosen")
        parts = []
        for name, parameter in self.parameters.items():
            part = vector[name] if name in vector else torch.zeros_like(parameter)
            if part.shape != parameter.shape:
                raise Error(f"the vector's {name} is {list(part.shape)} for {list(parameter.shape)}")
            parts.append(part.detach().reshape(-1).to(self.like))
        return torch.cat(parts)


class _Asked:
    """A model that remembers what it said."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.outputs: Tensor | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        found = self._model(*inputs, **named)
        logits = getattr(found, "logits", found)
        if self.outputs is not None or not isinstance(logits, Tensor):
            raise Error(
                "the Gauss-Newton matrix needs a loss that calls model(...) once, and outputs that are a tensor"
            )
        self.outputs = logits
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def curvature_of(
    model: nn.Module,
    loss: Loss | None,
    batches: Batches | None,
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
) -> Iterator[Curvature]:
    """The matrix of the parameters that fit, while the model is lent."""
    if matrix not in get_args(Matrix):
        raise Error(f"matrix is one of {', '.join(get_args(Matrix))}; got {matrix!r}")
    objective = Objective.of(loss, batches)
    # Attention's fast kernels have no second derivative.
    with borrowed(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        chosen = parameters_of(model, pattern)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in chosen)
        yield Curvature(model, objective, matrix, chosen)


@card(
    paper="Pearlmutter 1994, 'Fast Exact Multiplication by the Hessian'; Schraudolph 2002, 'Fast Curvature "
    "Matrix-Vector Products for Second-Order Gradient Descent'",
    needs=("data",),
    unit="model",
    claim="exact: the dense matrix times the vector, but for rounding",
)
def hvp(
    model: nn.Module,
    vector: Mapping[str, Tensor],
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
) -> Weights:
    r"""The curvature of the mean loss times a vector, :math:`H v`.

    Args:
        model: asked in evaluation mode and left as it was; frozen parameters count as well. Its dtype is that of the
            products inside: in bf16 they are rough.
        vector: `Weights` or tensors by the parameters' names; those that are lacking are zeros.
        loss, batches: as for `line`. The graph of a single batch is kept for further products.
        matrix: ``"hessian"``, or ``"gauss_newton"``: without the network's own curvature, for a loss that calls
            ``model(...)`` once.
        pattern: names of the parameters; the Hessian is that of these alone.

    Returns:
        Weights: under the parameters' names.

    Raises:
        ValueError: no parameter that fits, a vector that does not, or a loss that is no number.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> loss = lambda model: (model.weight ** 2 * torch.tensor([1.0, 3.0])).sum()
    >>> hvp(net, {"weight": torch.ones(1, 2)}, loss)["weight"]
    tensor([[2., 6.]])
    """
    with curvature_of(model, loss, batches, matrix, pattern) as curvature:
        return curvature.named(curvature(curvature.column(vector)[:, None])[:, 0])


@card(
    paper="Hutchinson 1990, 'A stochastic estimator of the trace of the influence matrix'; Meyer, Musco, Musco, "
    "Woodruff 2021, 'Hutch++: Optimal Stochastic Trace Estimation'",
    needs=("data",),
    unit="model",
    claim="unbiased; Hutch++ is closer with as many products where few eigenvalues are large",
)
def trace(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    probes: int = 30,
    method: Method = "hutchinson",
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
    at_once: int = 1,
    seed: int = 0,
) -> Report:
    r"""The trace of the Hessian, sampled: the sum of all curvatures.

    .. math:: \operatorname{tr} H \approx \frac1m \sum_i z_i^\top H z_i

    Args:
        model, loss, batches, matrix, pattern: as for `hvp`.
        probes: products with the matrix.
        method: ``"hutchinson"``, or ``"hutch++"``, which holds some ``4 * probes / 3`` vectors and is closer with
            few large eigenvalues.
        at_once: products made together by vectorising; faster for small models, at as much more memory.
        seed: of the vectors.

    Returns:
        Report: ``trace``, its ``standard error`` and ``mean eigenvalue``.

    Raises:
        ValueError: as `hvp`.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> trace(net, lambda model: (model.weight ** 2 * torch.tensor([1.0, 3.0])).sum(), probes=2)["trace"]
    8.0
    """
    if method not in get_args(Method):
        raise Error(f"method is one of {', '.join(get_args(Method))}; got {method!r}")
    _at_least_one(probes=probes, at_once=at_once)
    estimator = solve.hutchinson_trace if method == "hutchinson" else solve.hutch_plus_plus
    with curvature_of(model, loss, batches, matrix, pattern) as curvature, _told("trace", probes, curvature) as apply:
        found = estimator(apply, curvature.size, probes, seed=seed, at_once=at_once, like=curvature.like)
        figures = {
            "trace": found.value,
            "standard error": found.error,
            "mean eigenvalue": found.value / curvature.size,
            "parameters": curvature.size,
            "products": found.products,
        }
    return Report(f"Trace of the {_name(matrix)}", figures)


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise Error(f"{name} is at least 1, got {value}")


def _name(matrix: Matrix) -> str:
    return {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}[matrix]


@contextmanager
def _told(label: str, total: int, curvature: Curvature) -> Iterator[solve.Apply]:
    with progress.task(label, total) as advance:

        def apply(columns: Tensor) -> Tensor:
            found = curvature(columns)
            advance(columns.shape[1])
            return found

        yield apply


@dataclass(frozen=True)
class Eigenvalues:
    """Some eigenvalues of a curvature matrix, with their vectors."""

    values: tuple[float, ...]
    vectors: tuple[Weights, ...]
    """Directions of length one, under the parameters' names."""
    residuals: tuple[float, ...]
    """An eigenvalue lies at most that far from each value."""
    products: int
    converged: bool
    matrix: Matrix

    def report(self) -> Report:
        """The values as a table and a drawing."""
        rows = [
            {"rank": i + 1, "eigenvalue": value, "residual": self.residuals[i]} for i, value in enumerate(self.values)
        ]
        bars = Line("eigenvalue", [row["rank"] for row in rows], list(self.values), style="bars")
        title = f"Eigenvalues of the {_name(self.matrix)}"
        notes = () if self.converged else ("Not all are converged: see the residuals, and give more steps.",)
        figures = {"largest": max(self.values), "least": min(self.values), "products": self.products}
        return Report(title, figures, rows, [Plot(title, "rank", "eigenvalue", [bars])], notes)


@card(
    paper="Golub, Underwood 1977, 'The block Lanczos method for computing eigenvalues'; Ghorbani, Krishnan, Xiao "
    "2019, 'An Investigation into Neural Net Optimization via Hessian Eigenvalue Density'",
    needs=("data",),
    unit="model",
    claim="the dense eigenvalues within the residuals, each as often as it occurs",
)
def top_eigen(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    count: int = 1,
    ends: solve.Ends = "largest",
    block: int | None = None,
    steps: int = 60,
    tolerance: float = 1e-3,
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
    seed: int = 0,
) -> Eigenvalues:
    """The largest or smallest eigenvalues of the Hessian, and the directions that they belong to.

    Args:
        model, loss, batches, matrix, pattern: as for `hvp`.
        count: how many; at each end with ``"both"``.
        ends: ``"largest"``, ``"smallest"``, ``"both"``, or the largest in ``"magnitude"``.
        block: vectors at once; by default ``count``, which finds equal eigenvalues as often as they occur. 1 takes
            fewer products, and lists equal ones once.
        steps: blocks at most. All are held: ``steps * block`` times the parameters.
        tolerance: of the residuals, against the largest eigenvalue.
        seed: of the start.

    Returns:
        Eigenvalues: descending (by size with ``"magnitude"``), with directions as `Weights` for `line` and `plane`.

    Raises:
        ValueError: as `hvp`, or more eigenvalues than there are parameters.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> found = top_eigen(net, lambda model: (model.weight ** 2 * torch.tensor([1.0, 3.0])).sum())
    >>> round(found.values[0], 4), found.vectors[0]["weight"].abs().round(decimals=4)
    (6.0, tensor([[0., 1.]]))
    """
    _at_least_one(count=count, steps=steps)
    with (
        curvature_of(model, loss, batches, matrix, pattern) as curvature,
        _told("eigenvalues", steps * (block or count), curvature) as apply,
    ):
        found = solve.extreme_eigenpairs(
            apply,
            curvature.size,
            count,
            ends=ends,
            block=block,
            steps=steps,
            tolerance=tolerance,
            seed=seed,
            like=curvature.like,
        )
        vectors = tuple(curvature.named(vector) for vector in found.vectors)
    return Eigenvalues(
        tuple(found.values.tolist()), vectors, tuple(found.residuals.tolist()), found.products, found.converged, matrix
    )


@card(
    paper="Ghorbani, Krishnan, Xiao 2019, 'An Investigation into Neural Net Optimization via Hessian Eigenvalue "
    "Density'; Yao, Gholami, Keutzer, Mahoney 2020, 'PyHessian'",
    needs=("data",),
    unit="model",
    claim="moments of the spectrum up to twice the steps, less one, are those of the matrix, on average over probes",
)
def spectral_density(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    steps: int = 60,
    probes: int = 1,
    points: int = 400,
    width: float = 0.01,
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
    seed: int = 0,
) -> Report:
    r"""The distribution of all eigenvalues of the Hessian, by stochastic Lanczos quadrature.

    .. math:: \phi(t) \approx \sum_j w_j\, \mathcal N(t;\, \theta_j,\, \sigma^2)

    Args:
        model, loss, batches, matrix, pattern: as for `hvp`.
        steps: of Lanczos' method for each probe; as many vectors of all parameters are held.
        probes: random vectors.
        points: where the density is drawn.
        width: :math:`\sigma` of the drawing, as a share of the spectrum's extent.
        seed: of the probes.

    Returns:
        Report: ``eigenvalue`` and ``weight`` as a table (weights sum to one), ends, trace, the share of the
        spectrum below zero, and the density drawn.

    Raises:
        ValueError: as `hvp`.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> found = spectral_density(net, lambda model: (model.weight ** 2 * torch.tensor([1.0, 3.0])).sum())
    >>> [round(value, 4) for value in found["eigenvalue"]], [round(weight, 4) for weight in found["weight"]]
    ([2.0, 6.0], [0.5, 0.5])
    """
    _at_least_one(steps=steps, probes=probes, points=points)
    if not (math.isfinite(width) and width > 0):
        raise Error(f"width is above 0, got {width}")
    with (
        curvature_of(model, loss, batches, matrix, pattern) as curvature,
        _told("spectral density", steps * probes, curvature) as apply,
    ):
        places, weights = solve.spectral_measure(apply, curvature.size, probes, steps, seed=seed, like=curvature.like)
        size = curvature.size
    extent = float(places[-1] - places[0]) or max(abs(float(places[0])), 1.0)
    sigma = width * extent
    grid = torch.linspace(float(places[0]) - 5 * sigma, float(places[-1]) + 5 * sigma, points, dtype=torch.float64)
    bells = (-0.5 * ((grid[:, None] - places) / sigma).square()).exp() / (sigma * math.sqrt(2 * math.pi))
    density = bells @ weights
    floor = float(density.max()) * 1e-8
    nothing = 1e-6 * float(places.abs().max())
    figures = {
        "largest": float(places[-1]),
        "least": float(places[0]),
        "trace": float(places @ weights) * size,
        "share below 0": float(weights[places < -nothing].sum()),
        "share near 0": float(weights[places.abs() <= 0.01 * places.abs().max()].sum()),
        "parameters": size,
    }
    rows = [{"eigenvalue": p, "weight": w} for p, w in zip(places.tolist(), weights.tolist(), strict=True)]
    title = f"Spectral density of the {_name(matrix)}"
    drawn = Line("density", grid.tolist(), density.clamp(min=floor).tolist())
    return Report(title, figures, rows, [Plot(title, "eigenvalue", "density", [drawn], log="y")])


@card(
    paper="Bekas, Kokiopoulou, Saad 2007, 'An estimator for the diagonal of a matrix'; Yao et al. 2021, 'ADAHESSIAN'",
    needs=("data",),
    unit="model",
    claim="unbiased; exact where the Hessian is diagonal",
)
def diagonal(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    probes: int = 10,
    matrix: Matrix = "hessian",
    pattern: Pattern = "*",
    at_once: int = 1,
    seed: int = 0,
) -> Weights:
    r"""The diagonal of the Hessian, sampled: how the loss bends along each single weight.

    .. math:: \operatorname{diag} H \approx \frac1m \sum_i z_i \odot H z_i

    Args:
        model, loss, batches, matrix, pattern, at_once, seed: as for `trace`.
        probes: products with the matrix.

    Returns:
        Weights: ``[*shape]`` under the parameters' names.

    Raises:
        ValueError: as `hvp`.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> diagonal(net, lambda model: (model.weight ** 2 * torch.tensor([1.0, 3.0])).sum(), probes=1)["weight"]
    tensor([[2., 6.]])
    """
    _at_least_one(probes=probes, at_once=at_once)
    with (
        curvature_of(model, loss, batches, matrix, pattern) as curvature,
        _told("diagonal", probes, curvature) as apply,
    ):
        found = solve.hutchinson_diagonal(
            apply, curvature.size, probes, seed=seed, at_once=at_once, like=curvature.like
        )
        return curvature.named(found)
