"""One fitter for all laws: many starts at once, a robust loss of logarithms, and a bootstrap of the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.scaling import _runs
from weightsmith.inspect.scaling._form import Form
from weightsmith.inspect.scaling._forms import FORMS
from weightsmith.inspect.scaling._law import Law, rows_at_once, search
from weightsmith.inspect.scaling._runs import Runs, Table

_TRIED, _FOLLOWED = 48, 12  # starts that take some steps, and those of them that are followed to their end
_STEPS = 25  # that those which are tried take
_GOLDEN = 0x9E3779B97F4A7C15  # spreads small seeds over all 63 bits
_SAME = 1e-5  # objectives that differ by less, relatively, are one minimum


def known(law: str | Form) -> Form:
    """The form of that name, or the form itself.

    >>> known("kaplan-size").about
    'L = (Nc / N)^alpha_N'
    """
    if isinstance(law, Form):
        return law
    if law not in FORMS:
        raise Error(f"no law {law!r}{did_you_mean(law, FORMS)}; there are {', '.join(FORMS)}")
    return FORMS[law]


@card(
    paper="Hoffmann et al. 2022, 'Training Compute-Optimal Large Language Models'; Besiroglu, Erdil, Barnett, "
    "You 2024, 'Chinchilla Scaling: A replication attempt'",
    covers=("chinchilla-replication",),
    unit="model",
    claim="of the 90 % intervals of a bootstrap over 240 runs at least 80 % hold the constant that made the runs",
    departs="damped Gauss-Newton steps from the best of all starts, as one batch, instead of BFGS from each",
)
def fit(
    runs: Table | Runs,
    law: str | Form = "chinchilla",
    *,
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
    delta: float = 1e-3,
    bootstrap: int = 200,
    groups: str | None = None,
    duplicates: bool = False,
    seed: int = 0,
) -> Law:
    r"""The constants of a law from a table of runs.

    .. math:: \min_\theta \sum_i \mathrm{Huber}_\delta(\log f_\theta(x_i) - \log y_i)

    Args:
        runs: a mapping of columns, records, or the path of a CSV file.
        law: its name (`FORMS`), or a `Form` of your own.
        target: the column to be predicted; the form's own by default.
        columns: the law's words -> the table's, where they differ: ``{"N": "params"}``.
        fixed: constants that are known and not to be fitted.
        starts: other starting values for some constants.
        delta: threshold of the Huber loss, on the form's scale; far below the noise it acts as absolute error.
        bootstrap: how many times the runs are resampled, for intervals; 0 for none.
        groups: a column: runs that share its value are resampled, and left out, together (points of one curve are not
            independent).
        duplicates: allow runs that stand twice.
        seed: of the resampling.

    Returns:
        A `Law`. All work is float64 on the CPU; memory is bounded by about 2 million residuals at once.

    Raises:
        Error: an unknown law, constant or column, a cell that is no number above 0, a run that stands twice, fewer
            runs than constants, fewer than two groups, or no start from which the law can be computed.

    >>> N = [1e6, 4e6, 16e6, 64e6, 1e6, 4e6, 16e6, 64e6]
    >>> runs = {"N": N, "loss": [(1e13 / n) ** 0.076 * (1 + 1e-9 * i) for i, n in enumerate(N)]}
    >>> round(fit(runs, "kaplan-size", bootstrap=0, duplicates=True).parameters["alpha_N"], 4)
    0.076
    """
    form, held = known(law), dict(fixed or {})
    _check_options(form, held, delta, bootstrap, starts or {})
    goal = target or form.target
    idle = [name for name in columns or {} if name not in (*form.columns, goal, groups)]
    if idle:
        words = (*form.columns, goal)
        raise Error(f"law {form.name} speaks of {listed(words, 9)}, not of {idle[0]!r}{did_you_mean(idle[0], words)}")
    table = _runs.read(runs, columns)
    x, y = _only(form, table), table.numbers(goal, above_zero=form.scale == "log")
    labels = _numbered(table.raw(groups)) if groups is not None else torch.arange(len(table))
    present = [name for name in form.columns if name in table.cells]
    if not duplicates:
        _runs.refuse_twins(table, [*present, goal])
    open_ = len(form.names) - len(held)
    if len(table) < max(open_, 2):
        raise Error(f"{table.source}: {len(table)} runs cannot tell the {open_} constants of {form.name}; give more")
    theta, value, followed, agreeing = _best(form, x, y, held, delta, starts)
    if not math.isfinite(value):
        raise Error(f"law {form.name} cannot be computed for these runs from any start; give starts={{...}}")
    draws = torch.empty(0, len(form.names), dtype=torch.float64)
    if bootstrap:
        parts = resamples(labels, bootstrap, seed).split(rows_at_once(len(y)))
        draws = torch.cat([search(form, x, y, theta.expand(len(part), -1), held, delta, part)[0] for part in parts])
    return Law(form, theta, x, y, held, delta, draws, followed, agreeing, labels)


def given(law: str | Form, **parameters: float) -> Law:
    """A law whose constants are known: it predicts and advises, and has no intervals.

    >>> given("kaplan-size", Nc=8.8e13, alpha_N=0.076).predict(N=8.8e13)
    1.0
    """
    form = known(law)
    return Law(form, torch.tensor(form.raw(parameters), dtype=torch.float64))


def simulate(
    law: str | Form,
    parameters: Mapping[str, float],
    design: Mapping[str, Sequence[float] | Tensor],
    *,
    noise: float = 0.01,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Runs as they would be if a law with these constants were true: what to test a fit on.

    Args:
        law: its name or form.
        parameters: its constants.
        design: the columns, of n values each.
        noise: standard deviation of the logarithm (of the value itself, for laws on a linear scale).
        seed: of the noise.

    Returns:
        The columns and the target.

    >>> simulate("kaplan-size", {"Nc": 100.0, "alpha_N": 0.5}, {"N": [25.0, 1.0]}, noise=0.0)
    {'N': [25.0, 1.0], 'loss': [2.0, 10.0]}
    """
    form = known(law)
    table = _runs.read(design)
    absent = [name for name in form.columns if name not in table.cells and name not in form.defaults]
    if absent:
        raise Error(f"law {form.name} needs a design with {', '.join(form.columns)}; {absent[0]} is missing")
    x = _only(form, table)
    theta = torch.tensor([form.raw(parameters)], dtype=torch.float64)
    value = form.predict(theta, x)[0]
    # A stream of its own: a design drawn with the same seed would otherwise be tied to its noise.
    generator = torch.Generator().manual_seed((seed + 1) * _GOLDEN % 2**63)
    random = torch.randn(len(table), generator=generator, dtype=torch.float64) * noise
    made = value * random.exp() if form.scale == "log" else value + random
    given_ = {name: x[name].tolist() for name in form.columns if name in table.cells}
    return given_ | {form.target: [float(f"{one:.15g}") for one in made.tolist()]}


def compare(
    runs: Table | Runs,
    laws: Sequence[str | Form],
    *,
    hold_out: str = "largest",
    share: float = 0.25,
    by: str | None = None,
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    duplicates: bool = False,
) -> Report:
    """Which law tells runs best that it has not seen.

    Args:
        runs: the table.
        laws: names or forms; all predict one column.
        hold_out: ``largest``: the runs that are largest ``by`` a column are held out together, as when one
            extrapolates; ``each``: every run is told by a fit without it.
        share: of the runs that is held out as the largest, rounded up.
        by: a column; by default the product of the columns of the first law.
        target: the column to be predicted.
        columns, delta, duplicates: as in `fit`.

    Returns:
        A row per law with its mean and largest held-out error (relative where the first law is on a log scale,
        differences otherwise), and one for the constant guess: the best value of the runs that are not held out.

    Raises:
        Error: no laws, an unknown column, a share that holds out nothing or everything; as `fit`, for each law.
    """
    if hold_out not in ("largest", "each"):
        raise Error(f"hold_out is 'largest' or 'each', got {hold_out!r}")
    forms = [known(law) for law in laws]
    if not forms:
        raise Error("compare needs at least one law")
    table = _runs.read(runs, columns)
    goal = target or forms[0].target
    observed = table.numbers(goal, above_zero=False)
    order = _order(forms[0], table, by)
    count = max(math.ceil(share * len(table)), 1)
    if not 0 < share < 1 or count >= len(table):
        raise Error(f"a share of {share} holds out {count} of {len(table)} runs; give one between 0 and 1")
    kept, held = sorted(order[:-count]), sorted(order[-count:])
    relative = forms[0].scale == "log"
    against = observed if hold_out == "each" else observed[held]
    unit = against if relative else torch.ones_like(against)
    rows = []
    for form in forms:
        options: dict[str, Any] = {"target": goal, "delta": delta, "duplicates": duplicates, "bootstrap": 0}
        if hold_out == "each":
            law = fit(table, form, **options)
            away = law.errors() * (observed if form.scale == "log" else 1.0)
        else:
            law = fit(table.take(kept), form, **options)
            away = law.told(_only(form, table.take(held))) - observed[held]
        rows.append(_row(form.name, len(form.names), away / unit, law.loss / len(law.observed)))
    sign = 1.0 if relative else -1.0  # the best loss is the least, the best score the largest
    seen = torch.ones(len(table), len(table)).bool().fill_diagonal_(False) if hold_out == "each" else None
    base = (sign * observed).expand(len(table), -1) if seen is not None else (sign * observed[kept])[None]
    best = sign * (base if seen is None else base.where(seen, torch.inf)).amin(dim=1)
    rows.append(_row("constant: the best fitted run", 1, (best - against) / unit, None))
    rows.sort(key=lambda row: (math.isnan(row["mean error"]), row["mean error"]))
    what = f"the {count} largest of {len(table)} runs" if hold_out == "largest" else f"each of {len(table)} runs"
    plot = Plot(
        "Held-out error",
        "law",
        "mean error",
        [Line("mean error", [row["law"] for row in rows], [row["mean error"] for row in rows], style="bars")],
    )
    return Report(
        f"Laws compared on {what}",
        {"best": rows[0]["law"], "error of the best": rows[0]["mean error"]},
        rows,
        [plot],
        [f"Errors are {'relative' if relative else 'differences'}. Held-out runs took no part in the fit."],
    )


def resamples(labels: Tensor, times: int, seed: int) -> Tensor:
    """How often each of n runs is drawn, ``[times, n]``; runs of one label (``[n]``, from 0) are drawn together.

    >>> resamples(torch.arange(3), 2, seed=0).sum(dim=1).tolist()
    [3.0, 3.0]
    """
    generator = torch.Generator().manual_seed(seed)
    groups = int(labels.max()) + 1
    drawn = torch.randint(groups, (times, groups), generator=generator)
    counts = torch.zeros(times, groups, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return counts[:, labels]


def _numbered(cells: Sequence[Any]) -> Tensor:
    """Labels as numbers from 0, ``[n]``."""
    names = list(dict.fromkeys(map(str, cells)))
    if len(names) < 2:
        raise Error("groups need at least 2 different values, to be drawn and left out")
    place = {name: index for index, name in enumerate(names)}
    return torch.tensor([place[str(cell)] for cell in cells])


def _best(
    form: Form,
    x: Mapping[str, Tensor],
    y: Tensor,
    held: Mapping[str, float],
    delta: float,
    starts: Mapping[str, Sequence[float]] | None,
) -> tuple[Tensor, float, int, int]:
    """The best constants, their objective, how many starts were followed, and how many of them agree."""
    grid = form.grid(held, starts)
    looked = [search(form, x, y, part, held, delta, steps=0)[1] for part in grid.split(rows_at_once(len(y)))]
    order = torch.cat(looked).argsort()[:_TRIED]
    tried, reached = search(form, x, y, grid[order], held, delta, steps=_STEPS)
    found, value = search(form, x, y, tried[reached.argsort()[:_FOLLOWED]], held, delta)
    best = int(value.argmin())
    agreeing = int((value <= value[best] * (1 + _SAME) + 1e-18).sum())
    return found[best], float(value[best]), len(value), agreeing


def _only(form: Form, table: Runs) -> dict[str, Tensor]:
    """The columns of a form, checked; those that may be missing take their default."""
    made = {}
    for name in form.columns:
        if name in table.cells or name not in form.defaults:
            made[name] = table.numbers(name, above_zero=name not in form.signed)
        else:
            made[name] = torch.full((len(table),), form.defaults[name], dtype=torch.float64)
    return made


def _check_options(
    form: Form, held: Mapping[str, float], delta: float, bootstrap: int, starts: Mapping[str, Sequence[float]]
) -> None:
    for name in [*held, *starts]:
        if name not in form.names:
            raise Error(f"law {form.name} has no constant {name!r}{did_you_mean(name, form.names)}")
    odd = [(name, value) for name, value in held.items() if not math.isfinite(value)]
    odd += [(name, v) for name, some in starts.items() for v in some if name not in form.free and not v > 0]
    if odd:
        raise Error(f"law {form.name}: {odd[0][0]} cannot be or start from {odd[0][1]}")
    if not 0 < delta < math.inf:
        raise Error(f"delta must be above 0 and finite, got {delta}")
    if bootstrap < 0 or bootstrap == 1:
        raise Error(f"bootstrap is 0, or 2 and more, got {bootstrap}")


def _order(form: Form, table: Runs, by: str | None) -> list[int]:
    sizes = [name for name in form.columns if name not in form.signed]
    names = [by] if by is not None else [name for name in sizes if name in table.cells or name not in form.defaults]
    if not names:
        raise Error(f"law {form.name} has no column that tells which runs are largest; say it with by=...")
    return torch.stack([table.numbers(name).log() for name in names]).sum(dim=0).argsort(stable=True).tolist()


def _row(name: str, constants: int, errors: Tensor, objective: float | None) -> dict[str, Any]:
    return {
        "law": name,
        "constants": constants,
        "mean error": float(errors.abs().mean()),
        "largest error": float(errors.abs().max()),
        "bias": float(errors.mean()),
        "fitted loss a run": objective,
    }
