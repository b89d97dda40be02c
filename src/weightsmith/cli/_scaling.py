"""``weightsmith scaling``: fit a scaling law to a table of runs, and ask it things."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._manual import PATH, Manual, json_option, option
from weightsmith.cli._output import echo_json, echo_table, number
from weightsmith.errors import Error

if TYPE_CHECKING:
    from weightsmith.inspect.scaling import Law

_FIT = [
    ("weightsmith scaling fit runs.csv --predict N=7e9,D=1e12", "What a larger model would reach, with its interval."),
    (
        "weightsmith scaling fit runs.csv --column N=params --column D=tokens --optimal 1e24 -o report.html",
        "Other names in the table; how 1e24 operations are best spent; a page with pictures.",
    ),
    ("weightsmith scaling fit runs.csv --law chinchilla --law kaplan-joint", "Which law tells the largest runs best."),
]
_LAWS = [("weightsmith scaling laws", "The laws, their columns and their formulas.")]
_ASKING, _FITTING = "What to ask of the law", "How to fit"


def group() -> click.Group:
    """The ``scaling`` group."""

    @click.group("scaling")
    def scaling() -> None:
        """Fit scaling laws to tables of runs, and predict with them."""

    @scaling.command("fit", cls=Manual, examples=_FIT, short_help="Fit a law to a table of runs.")
    @click.argument("runs", type=PATH)
    @option("--law", "laws", multiple=True, metavar="LAW", section=_FITTING, help="Its name.  [default: chinchilla]")
    @option(
        "--column",
        "-c",
        "columns",
        multiple=True,
        metavar="WORD=NAME",
        section=_FITTING,
        help="The table's name for a word of the law. Repeatable.",
    )
    @option("--target", metavar="NAME", section=_FITTING, help="The column to be predicted.  [default: the law's]")
    @option(
        "--fixed",
        multiple=True,
        metavar="CONSTANT=VALUE",
        section=_FITTING,
        help="A constant that is known. Repeatable.",
    )
    @option(
        "--bootstrap",
        type=click.IntRange(min=0),
        default=500,
        show_default=True,
        section=_FITTING,
        help="Resamples of the runs, for intervals.",
    )
    @option("--groups", metavar="NAME", section=_FITTING, help="Runs with one value here are resampled together.")
    @option(
        "--delta", type=float, default=1e-3, show_default=True, section=_FITTING, help="Threshold of the Huber loss."
    )
    @option("--duplicates", is_flag=True, section=_FITTING, help="Allow runs that stand twice.")
    @option("--seed", type=int, default=0, show_default=True, section=_FITTING, help="Of the resampling.")
    @option(
        "--predict",
        "questions",
        multiple=True,
        metavar="N=..,D=..",
        section=_ASKING,
        help="Predict for these columns. Repeatable.",
    )
    @option(
        "--optimal",
        "budgets",
        multiple=True,
        type=float,
        metavar="BUDGET",
        section=_ASKING,
        help="How to share a budget best. Repeatable.",
    )
    @option("--level", type=float, default=0.9, show_default=True, section=_ASKING, help="Of all intervals.")
    @option("--output", "-o", type=PATH, help="Write the report: .html, .svg, .png, .json, .csv or .txt.")
    @json_option
    def fit(
        runs: str,
        laws: tuple[str, ...],
        columns: tuple[str, ...],
        target: str | None,
        fixed: tuple[str, ...],
        bootstrap: int,
        groups: str | None,
        delta: float,
        duplicates: bool,
        seed: int,
        questions: tuple[str, ...],
        budgets: tuple[float, ...],
        level: float,
        output: str | None,
        as_json: bool,
    ) -> None:
        """Fit a law to the CSV file RUNS: a header, and a line for each training run.

        The sum of Huber losses of log residuals is minimised from many starts; intervals come from a
        bootstrap of the runs. With several --law, they are compared on the largest quarter of the runs,
        and the one that tells these best is fitted to all and used.
        """
        from pathlib import Path

        from weightsmith.inspect import scaling as room
        from weightsmith.inspect._report import KINDS

        if not 0 < level < 1:
            raise Error(f"--level lies between 0 and 1, got {level}")
        if any(not 0 < budget < math.inf for budget in budgets):
            raise Error(f"--optimal takes budgets above 0, got {', '.join(f'{budget:g}' for budget in budgets)}")
        if output is not None and Path(output).suffix not in KINDS:
            raise Error(f"{output}: a report is written as one of {', '.join(KINDS)}")
        names = dict(_pair(text, "--column") for text in columns)
        asked = [_numbers(text) for text in questions]
        if fixed and len(laws) > 1:
            raise Error("--fixed goes with one --law: laws that are compared have different constants")
        chosen, compared = laws[0] if laws else "chinchilla", None
        if len(laws) > 1:
            compared = room.compare(runs, laws, target=target, columns=names, delta=delta, duplicates=duplicates)
            chosen = next(row["law"] for row in compared.table if row["law"] in room.FORMS)
        law = room.fit(
            runs,
            chosen,
            target=target,
            columns=names,
            fixed={name: _value(text, "--fixed") for name, text in (_pair(one, "--fixed") for one in fixed)},
            bootstrap=bootstrap,
            groups=groups,
            delta=delta,
            duplicates=duplicates,
            seed=seed,
        )
        answers = [_answer(law, one, level) for one in asked]
        advice = [_advice(law, budget, level) for budget in budgets]
        report = law.report(level, budgets or None)
        written = str(report.save(output)) if output is not None else None
        if as_json:
            comparison = compared.rows() if compared is not None else None
            echo_json(
                law.to_json(level)
                | {"comparison": comparison, "predictions": answers, "optima": advice, "report": written}
            )
            return
        if compared is not None:
            click.echo(f"{compared}\n")
        click.echo(str(report))
        for row in answers:
            click.echo(f"\n{_said(row['at'])}: {law.form.target} {_ranged(row['value'], row['low'], row['high'])}")
        for row in advice:
            parts = [f"{name} {_ranged(*row[name])}" for name in law.form.columns[:2]]
            kind = law.form.budget.name if law.form.budget else ""
            click.echo(f"\n{kind} {row['budget']:g}: {', '.join(parts)}; {law.form.target} {number(row['value'])}")
        if written is not None:
            click.echo(f"\nreport in {written}")

    @scaling.command("laws", cls=Manual, examples=_LAWS, short_help="List the laws.")
    @json_option
    def laws(as_json: bool) -> None:
        """List the laws that can be fitted: the columns they need, what they predict, and their formulas."""
        from weightsmith.inspect.scaling import FORMS

        rows = [
            {
                "law": form.name,
                "columns": list(form.columns),
                "target": form.target,
                "constants": list(form.names),
                "budget": form.budget.name if form.budget else None,
                "formula": form.about,
            }
            for form in FORMS.values()
        ]
        if as_json:
            echo_json(rows)
            return
        cells = [[str(row["law"]), " ".join(row["columns"]), str(row["target"]), str(row["formula"])] for row in rows]
        echo_table(["law", "columns", "target", "formula"], cells, left=4)

    return scaling


def _pair(text: str, what: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise Error(f"{what} takes NAME=VALUE, got {text!r}")
    return name.strip(), value.strip()


def _value(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Error(f"{what}: {text!r} is no number") from None
    if not math.isfinite(value):
        raise Error(f"{what}: {text!r} is not finite")
    return value


def _numbers(text: str) -> dict[str, Any]:
    pairs = [_pair(part, "--predict") for part in text.split(",")]
    return {name: _value(value, "--predict") for name, value in pairs}


def _answer(law: Law, at: dict[str, Any], level: float) -> dict[str, Any]:
    if not len(law.draws):
        return {"at": at, "value": law.predict(**at), "low": None, "high": None}
    told = law.predict(interval=True, level=level, **at)
    return {"at": at, "value": told.value, "low": told.low, "high": told.high}


def _advice(law: Law, budget: float, level: float) -> dict[str, Any]:
    best = law.shared(budget, interval=bool(len(law.draws)), level=level)
    shares = {name: [value, best.low.get(name), best.high.get(name)] for name, value in best.columns.items()}
    return {"budget": budget, **shares, "value": best.value}


def _said(at: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in at.items())


def _ranged(value: float, low: float | None, high: float | None) -> str:
    return number(value) if low is None else f"{number(value)} [{number(low)}, {number(high)}]"
