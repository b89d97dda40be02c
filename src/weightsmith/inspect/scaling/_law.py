"""A fitted law: its constants and how sure they are, what it predicts, what it advises, and how well it holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Report
from weightsmith.inspect.scaling import _pictures, _solver
from weightsmith.inspect.scaling._form import Form

Kind = Literal["percentile", "basic", "bca"]
KINDS: tuple[Kind, ...] = ("percentile", "basic", "bca")
_CHUNK = 2_000_000  # residuals that are held at once


@dataclass(frozen=True)
class Prediction:
    """A predicted value and its interval; each a number, or ``[m]`` float64."""

    value: Any
    low: Any
    high: Any


@dataclass(frozen=True)
class Optimum:
    """How a budget is best spent."""

    columns: dict[str, float]
    """The law's first two columns."""
    value: float
    """What is then predicted."""
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Law:
    """A form with constants. Made by `fit`, or by `given` from constants that are known."""

    form: Form
    theta: Tensor
    """``[p]`` constants as they were searched: logarithms of those that are above 0."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """The runs it was fitted to, ``[n]`` each."""
    observed: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Constants that were given and not fitted."""
    delta: float = 1e-3
    draws: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    """``[b, p]``: the constants of each bootstrap."""
    starts: int = 0
    """How many starts were followed to their end."""
    agreeing: int = 0
    """How many of them reached the least objective."""
    groups: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """``[n]``: which group each run belongs to, numbered from 0; empty where each stands for itself."""

    @property
    def parameters(self) -> dict[str, float]:
        """The constants by name."""
        return {name: self._constant(self.theta, name).item() for name in self.form.names}

    @property
    def loss(self) -> float:
        """The objective: the Huber loss of the residuals, summed over the runs."""
        return float(_solver.huber(self.residuals, self.delta).sum())

    @functools.cached_property
    def residuals(self) -> Tensor:
        """``[n]``: predicted minus observed, of logarithms where the form says so."""
        self._need_runs("residuals")
        return self.form.difference(self.told(self.columns), self.observed)

    def predict(
        self, *, interval: bool = False, level: float = 0.9, of: Literal["law", "run"] = "law", **columns: Any
    ) -> Any:
        """What the law says of other sizes.

        Args:
            interval: whether to give a `Prediction` with the bootstrap's percentile interval.
            level: of the interval.
            of: the interval of the law itself, or (wider) of one more run, which has noise of its own.
            **columns: numbers or sequences of m numbers, one for each of the form's columns.

        Returns:
            A number, or ``[m]`` float64; a `Prediction` of such with ``interval``.

        Raises:
            Error: a column is missing, unknown, of another length or out of range; an interval of a law without
                bootstraps.

        >>> from weightsmith.inspect.scaling import given
        >>> law = given("chinchilla", E=1.0, A=1.0, B=1.0, alpha=0.5, beta=0.5)
        >>> law.predict(N=4.0, D=100.0)
        1.6
        """
        made, single = self._columns(columns)
        value = self.told(made)
        if of not in ("law", "run"):
            raise Error(f"an interval is of the law or of one more run: of='law' or 'run', got {of!r}")
        if not interval:
            return value.item() if single else value
        spread = self._at(self._draws(), made)
        if of == "run":
            spread = self._with_noise(spread)
        ends = _quantiles(spread, level)
        return Prediction(*(end.item() if single else end for end in (value, *ends)))

    def told(self, columns: Mapping[str, Tensor]) -> Tensor:
        """``[n]``: what the law says for columns ``[n]`` each, float64, all of them given."""
        return self._at(self.theta[None], columns)[0]

    def interval(self, name: str, level: float = 0.9, kind: Kind = "percentile") -> tuple[float, float]:
        """Where a constant lies, by the bootstrap over runs.

        Args:
            name: the constant.
            level: how often such intervals should hold the truth.
            kind: ``percentile``; ``basic`` (reflected about the estimate, on the searched scale); ``bca`` (corrected
                for bias and for skewness by leaving out each run, or group of runs, once).

        Raises:
            Error: no such constant or kind, a level outside (0, 1), a law without bootstraps.
        """
        if name not in self.form.names:
            raise Error(f"law {self.form.name} has no {name!r}{did_you_mean(name, self.form.names)}")
        if kind not in KINDS:
            raise Error(f"intervals are of kind {', '.join(KINDS)}, got {kind!r}")
        if name in self.fixed:
            return self.fixed[name], self.fixed[name]
        index = self.form.names.index(name)
        tails = _tails(level)
        estimate, draws = self.theta[index], self._draws()[:, index]
        if kind == "bca":
            tails = _corrected(tails, estimate, draws, self._left_out[:, index])
        ends = draws.quantile(tails)
        if kind == "basic":
            ends = 2 * estimate - ends.flip(0)
        low, high = (ends if name in self.form.free else ends.exp()).tolist()
        return low, high

    def intervals(self, level: float = 0.9, kind: Kind = "percentile") -> dict[str, tuple[float, float]]:
        """`interval` of every constant."""
        return {name: self.interval(name, level, kind) for name in self.form.names}

    def standard_errors(self) -> dict[str, float]:
        r"""Standard errors without any resampling, as a check of the bootstrap.

        The covariance of a robust fit, :math:`\frac{E\psi^2}{(E\psi')^2} (J'J)^{-1} \frac{n}{n-p}`, carried from
        logarithms to the constants themselves. Where fewer runs lie within ``delta`` than a density can be told
        from, :math:`E\psi'` comes from a window as wide as Silverman's rule has it. Runs count as independent, also
        those of one group.

        Returns:
            An error for each constant: 0 for fixed ones, infinite where no run lies within the window.
        """
        self._need_runs("standard errors")
        _, slopes = _solver.jacobian(lambda at: self._residuals(at, self.columns), self.theta[None])
        open_ = [i for i, name in enumerate(self.form.names) if name not in self.fixed]
        slopes, size = slopes[0][:, open_], self.residuals.abs()
        n, p = slopes.shape
        spread = min(float(self.residuals.std()), float(size.median()) / 0.6745) if n > 1 else 0.0
        window = max(self.delta, 1.06 * spread * n**-0.2)
        curvature = float((size <= window).double().mean()) * self.delta / window
        meat = float(self.residuals.clamp(-self.delta, self.delta).square().mean())
        scale = meat / curvature**2 * n / max(n - p, 1) if curvature else math.inf
        variances = torch.linalg.pinv(slopes.T @ slopes, hermitian=True).diagonal()
        found = dict.fromkeys(self.form.names, 0.0)
        for position, index in enumerate(open_):
            name = self.form.names[index]
            unit = 1.0 if name in self.form.free else math.exp(float(self.theta[index]))
            found[name] = unit * math.sqrt(max(float(variances[position]), 0.0) * scale) if scale < math.inf else scale
        return found

    @functools.cached_property
    def _left_out(self) -> Tensor:
        """``[g, p]``: the constants found without each of the runs (or groups of runs)."""
        places = self._places
        found = []
        for some in torch.arange(int(places.max()) + 1).split(rows_at_once(len(places))):
            counts = (places != some[:, None]).double()
            starts = self.theta.expand(len(some), -1)
            found.append(search(self.form, self.columns, self.observed, starts, self.fixed, self.delta, counts)[0])
        return torch.cat(found)

    @property
    def _places(self) -> Tensor:
        return self.groups if len(self.groups) else torch.arange(len(self.observed))

    def errors(self) -> Tensor:
        """``[n]``: the relative error (difference, on a linear scale) of each run, told by a fit without it.

        Runs of one group are left out together. There are as many fits as runs or groups.
        """
        self._need_runs("errors")
        alone = {name: column[:, None] for name, column in self.columns.items()}
        told = self._at(self._left_out[self._places], alone)[:, 0]
        error = self.form.difference(told, self.observed)
        return error.expm1() if self.form.scale == "log" else error

    def optimal(self, *, interval: bool = False, level: float = 0.9, closed: bool = True, **budget: float) -> Optimum:
        """How a budget is best shared between the form's first two columns.

        Args:
            interval: whether to add the bootstrap's percentile interval of each column.
            level: of the interval.
            closed: use the closed form where there is one; otherwise search.
            **budget: one number under the budget's name: ``compute=1e21`` operations, or ``size=1e9`` parameters.

        Raises:
            Error: the form has no budget, or one of another name; the budget is not above 0.

        >>> from weightsmith.inspect.scaling import given
        >>> law = given("chinchilla", E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
        >>> best = law.optimal(compute=5.76e23)
        >>> round(best.columns["D"] / best.columns["N"], 1)
        18.4
        """
        kind = self.form.budget
        if kind is None:
            raise Error(f"law {self.form.name} shares no budget between two columns")
        if list(budget) != [kind.name]:
            raise Error(f"law {self.form.name} shares one budget, {kind.name}=...; got {', '.join(budget) or 'none'}")
        return self.shared(float(budget[kind.name]), interval=interval, level=level, closed=closed)

    def shared(self, spent: float, *, interval: bool = False, level: float = 0.9, closed: bool = True) -> Optimum:
        """`optimal`, for a budget whose name goes without saying."""
        kind = self.form.budget
        if kind is None:
            raise Error(f"law {self.form.name} shares no budget between two columns")
        if not (spent > 0 and math.isfinite(spent)):
            raise Error(f"{kind.name} must be a number above 0, got {spent}")
        first, second = self.form.columns[:2]
        bests = self._best(self.theta[None], spent, closed)
        rest = kind.rest(bests, spent)
        value = self.told({first: bests, second: rest}).item()
        columns = {first: bests.item(), second: rest.item()}
        if not interval:
            return Optimum(columns, value)
        many = self._best(self._draws(), spent, closed)
        ends = {
            name: _quantiles(values[:, None], level)
            for name, values in ((first, many), (second, kind.rest(many, spent)))
        }
        low, high = ({name: pair[side].item() for name, pair in ends.items()} for side in (0, 1))
        return Optimum(columns, value, low, high)

    def _best(self, theta: Tensor, spent: float, closed: bool = True) -> Tensor:
        """``[b]``: the best first column for each row of constants."""
        form, kind = self.form, self.form.budget
        assert kind is not None
        if closed and form.optimum is not None:
            return form.optimum({name: self._constant(theta, name) for name in form.names}, spent)
        first, second = form.columns[:2]
        # Sizes lie below their sum; columns of a product lie about its root, whatever their units.
        ends = (math.log(spent) - 60.0, math.log(spent) - 1e-9)
        if kind.name != "size":
            ends = (math.log(spent) / 2 - 45.0, math.log(spent) / 2 + 45.0)
        low, high = (torch.full((len(theta),), end, dtype=torch.float64) for end in ends)
        share = torch.linspace(0, 1, 65, dtype=torch.float64)
        for _ in range(9):  # each round keeps two of 64 pieces, so nine leave no digit
            places = (low[:, None] + (high - low)[:, None] * share).exp()
            parameters = {name: self._constant(theta, name)[:, None] for name in form.names}
            value = form.formula(**{first: places, second: kind.rest(places, spent)}, **parameters)
            at = value.nan_to_num(nan=torch.inf).argmin(dim=1)
            logs = places.log()
            low = logs.gather(1, (at - 1).clamp(min=0)[:, None])[:, 0]
            high = logs.gather(1, (at + 1).clamp(max=64)[:, None])[:, 0]
        return ((low + high) / 2).exp()

    def report(self, level: float = 0.9, budgets: Sequence[float] | None = None) -> Report:
        """Constants with intervals, how well the law fits, and pictures of it.

        Args:
            level: of all intervals.
            budgets: those whose curves of equal cost are drawn; by default around what the runs cost.
        """
        return _pictures.report(self, level, budgets)

    def to_json(self, level: float = 0.9) -> dict[str, Any]:
        """The constants with their intervals, as plain data."""
        ends = self.intervals(level) if len(self.draws) else {}
        return {
            "law": self.form.name,
            "formula": self.form.about,
            "parameters": self.parameters,
            "intervals": {name: list(pair) for name, pair in ends.items()},
            "level": level,
            "runs": len(self.observed),
            "objective": self.loss if len(self.observed) else None,
            "starts": self.starts,
            "agreeing": self.agreeing,
        }

    def _constant(self, theta: Tensor, name: str) -> Tensor:
        if name in self.fixed:
            return torch.full_like(theta[..., 0], self.fixed[name])
        return self.form.natural(theta, name)

    def _at(self, theta: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        return self.form.predict(theta, columns, self.fixed)

    def _residuals(self, theta: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        return self.form.difference(self._at(theta, columns), self.observed)

    def _need_runs(self, what: str) -> None:
        if not len(self.observed):
            raise Error(f"law {self.form.name} was given, not fitted: without runs it has no {what}")

    def _draws(self) -> Tensor:
        if not len(self.draws):
            raise Error(f"law {self.form.name}: intervals need bootstraps; fit with bootstrap=200 or more")
        return self.draws

    def _columns(self, given_: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
        form, made = self.form, {}
        unknown = [name for name in given_ if name not in form.columns]
        if unknown:
            hint = did_you_mean(unknown[0], form.columns)
            raise Error(f"law {form.name} knows {', '.join(form.columns)}, not {unknown[0]!r}{hint}")
        for name in form.columns:
            if name not in given_ and name not in form.defaults:
                raise Error(f"law {form.name} predicts from {', '.join(form.columns)}; {name} is missing")
            value = torch.as_tensor(given_.get(name, form.defaults.get(name)), dtype=torch.float64, device="cpu")
            if not bool(value.isfinite().all()) or (name not in form.signed and not bool((value > 0).all())):
                raise Error(f"law {form.name}: {name} must be above 0 and finite, got {given_.get(name)}")
            made[name] = value
        single = all(value.ndim == 0 for value in made.values())
        lengths = {name: value.numel() for name, value in made.items()}
        if len(set(lengths.values()) - {1}) > 1:
            raise Error(f"law {form.name}: columns have one length, or are single numbers; got {lengths}")
        wide = torch.broadcast_tensors(*(value.reshape(-1) for value in made.values()))
        return dict(zip(made, wide, strict=True)), single

    def _with_noise(self, spread: Tensor) -> Tensor:
        """Bootstrapped predictions, each with a residual drawn for it."""
        generator = torch.Generator().manual_seed(0)
        n, p = len(self.observed), len(self.form.names) - len(self.fixed)
        grown = self.residuals * math.sqrt(n / max(n - p, 1))
        noise = grown[torch.randint(n, spread.shape, generator=generator)]
        return spread * (-noise).exp() if self.form.scale == "log" else spread - noise


def _tails(level: float) -> Tensor:
    if not 0 < level < 1:
        raise Error(f"the level of an interval lies between 0 and 1, got {level}")
    return torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)


def _quantiles(draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Ends of the percentile interval of each column of ``[b, m]``."""
    low, high = torch.nanquantile(draws, _tails(level), dim=0)
    return low, high


def _corrected(tails: Tensor, estimate: Tensor, draws: Tensor, left_out: Tensor) -> Tensor:
    """Efron's bias-corrected and accelerated tails."""
    normal = NormalDist()
    below = float((draws < estimate).double().mean() + (draws == estimate).double().mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / (len(draws) + 1)), len(draws) / (len(draws) + 1)))
    away = left_out.mean() - left_out
    spread = float(away.square().sum())
    skew = float(away.pow(3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    moved = []
    for tail in tails.tolist():
        z = bias + normal.inv_cdf(tail)
        moved.append(normal.cdf(bias + z / (1 - skew * z)))
    return torch.tensor(moved, dtype=torch.float64).clamp(0, 1)


def rows_at_once(n: int) -> int:
    """How many fits to n runs are worked on together: as many as 2 million residuals allow."""
    return max(_CHUNK // max(n, 1), 1)


def search(
    form: Form,
    columns: Mapping[str, Tensor],
    observed: Tensor,
    starts: Tensor,
    fixed: Mapping[str, float],
    delta: float,
    counts: Tensor | None = None,
    steps: int = 300,
) -> tuple[Tensor, Tensor]:
    """From rows of starts ``[b, p]`` to constants ``[b, p]`` and objectives ``[b]``; fixed constants stay."""
    open_ = [index for index, name in enumerate(form.names) if name not in fixed]
    frozen = starts[:1].clone()

    def residuals(some: Tensor, rows: Tensor) -> Tensor:
        whole = frozen.expand(len(some), -1).index_copy(1, torch.tensor(open_, dtype=torch.long), some)
        return form.difference(form.predict(whole, columns, fixed), observed)

    if not open_:
        rows = torch.arange(len(starts))
        return starts, _solver.objective(residuals(starts[:, open_], rows), counts, delta)
    found, value = _solver.minimise(residuals, starts[:, open_], counts=counts, delta=delta, steps=steps)
    whole = starts.clone()
    whole[:, open_] = found
    return whole, value
