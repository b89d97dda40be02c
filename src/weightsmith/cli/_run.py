"""``weightsmith run``: a recipe of many steps, or a mergekit file as it is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._manual import PATH, SAVING, Manual, Option
from weightsmith.cli._output import clean, echo_json, echo_table, number, plural, size
from weightsmith.cli._save import said, save_options

if TYPE_CHECKING:
    from weightsmith.recipe import Foreign, Planned, Ran, Recipe, Row, Settings

_RECIPE = "Recipe"


def command() -> click.Command:
    """The ``run`` command."""
    without = {"output", "dtype", "format", "max_shard_size", "as_json"}
    own = [
        Option(
            ["--set", "settings"],
            multiple=True,
            metavar="STEP.OPTION=VALUE",
            section=_RECIPE,
            help="Another value than the file says. Repeatable.",
        ),
        Option(
            ["--sweep"],
            multiple=True,
            metavar="STEP.OPTION=V1,V2",
            section=_RECIPE,
            help="Several values; with more of these, all combinations. Repeatable.",
        ),
        Option(
            ["--dry-run"],
            is_flag=True,
            section=_RECIPE,
            help="Check everything and print the plan: bytes to read and write, passes, memory, time.",
        ),
        Option(
            ["-o", "--output"],
            type=PATH,
            section=_RECIPE,
            help="Where the result goes: needed for a mergekit file, and in place of the only path of a recipe.",
        ),
        Option(["--report"], type=PATH, section=_RECIPE, help="Write what was measured as one HTML file."),
        Option(["--json", "as_json"], is_flag=True, help="Print one JSON document and nothing else."),
    ]
    return Manual(
        "run",
        callback=run,
        params=[click.Argument(["path"], type=PATH, metavar="FILE"), *own, *save_options(without=without)],
        help=_HELP,
        short_help="Run a recipe of many steps, or a mergekit file.",
        examples=[
            ("weightsmith run recipe.yaml --dry-run", "What would be done, checked in full."),
            ("weightsmith run recipe.yaml --set merged.density=0.3", "With another value."),
            ("weightsmith run recipe.yaml --sweep merged.density=0.2,0.5,0.8", "All of them, and the best is kept."),
            ("weightsmith run mergekit.yaml -o merged/", "A file that was written for mergekit."),
        ],
        status=SAVING,
    )


_HELP = """Run the recipe in FILE: named inputs, steps that are calls of methods, outputs, figures of merit.

Everything is checked before anything runs, and what is wrong is said with its line and column. Steps that can stream
run together: merged, pruned and rounded to 4 bits in one pass over the bytes. Paths are relative to where the command
is run.

Files of mergekit run as they are; where their result goes is said with -o."""


def run(path: str, **given: Any) -> None:
    """Read, check, and either say what would be done or do it."""
    from weightsmith.recipe import Foreign, Settings, read

    as_json = given.pop("as_json")
    recipe = read(path, given.pop("settings"), given.pop("sweep"))
    output, report, dry = given.pop("output"), given.pop("report"), given.pop("dry_run")
    settings = Settings(**{key: value for key, value in given.items() if value is not None})
    if isinstance(recipe, Foreign):
        _foreign(recipe, output, report, settings, dry, as_json)
        return
    recipe = _redirected(recipe, output, report)
    if dry:
        from weightsmith.recipe import plan

        _say_plan(plan(recipe, settings), as_json)
        return
    from weightsmith import recipe as recipes

    ran = recipes.run(recipe, settings, None if as_json else _say_row)
    if as_json:
        echo_json(_record(ran))
    else:
        _say(recipe, ran)


def _redirected(recipe: Recipe, output: str | None, report: str | None) -> Recipe:
    if output is not None:
        if len(recipe.outputs) != 1:
            raise click.UsageError(
                f"the recipe has {plural(len(recipe.outputs), 'output')}; -o is for one that has one"
            )
        recipe = dataclasses.replace(recipe, outputs=(dataclasses.replace(recipe.outputs[0], path=output),))
    return dataclasses.replace(recipe, report=report) if report else recipe


def _foreign(
    recipe: Foreign, output: str | None, report: str | None, settings: Settings, dry: bool, as_json: bool
) -> None:
    from weightsmith.recipe import _foreign

    for line in recipe.warnings:
        click.echo(f"weightsmith: note: {clean(line)}", err=True)
    if report is not None:
        raise click.UsageError("a mergekit file measures nothing, so --report has no meaning")
    if output is None:
        raise click.UsageError("a mergekit file does not say where its result goes; add -o FOLDER")
    if dry:
        _say_plan([_foreign.plan(recipe, output, settings)], as_json)
        return
    saved = _foreign.run(recipe, output, settings)
    if as_json:
        echo_json(dataclasses.asdict(saved))
        return
    click.echo(said(saved))


# Words


def _say_plan(planned: list[Planned], as_json: bool) -> None:
    if as_json:
        echo_json([_plain(dataclasses.asdict(one)) for one in planned])
        return
    rows = [
        [
            one.path,
            f"{one.tensors:,}",
            size(one.reads),
            size(one.writes),
            f"{'at least ' if one.passes_at_least else ''}{one.passes}",
            size(one.memory),
            duration(one.seconds),
            size(one.free),
        ]
        for one in planned
    ]
    headings = ["output", "tensors", "reads", "writes", "passes", "memory", "about", "disk free"]
    echo_table(headings, rows)
    click.echo("Nothing was written.")


def duration(seconds: float) -> str:
    """Time for people, roughly.

    >>> duration(0.2), duration(40), duration(600), duration(9000)
    ('1 s', '40 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _say_row(row: Row) -> None:
    values = ", ".join(f"{key}={value}" for key, value in row.values.items())
    figures = ", ".join(f"{name} {number(value)}" for name, value in row.figures.items())
    click.echo(clean(f"{row.weights}{f' ({values})' if values else ''}: {figures}"), err=True)


def _say(recipe: Recipe, ran: Ran) -> None:
    if ran.rows:
        swept, names = list(recipe.sweep), [measure.name for measure in recipe.measures]
        rows = [
            [
                row.weights,
                *(str(row.values.get(key, "")) for key in swept),
                *(number(row.figures.get(n)) for n in names),
            ]
            for row in ran.rows
        ]
        echo_table(["checkpoint", *swept, *names], rows)
    if ran.best:
        click.echo(clean(f"kept: {', '.join(f'{key}={value}' for key, value in ran.best.items())}"))
    for saved in ran.saved:
        click.echo(said(saved))
    if ran.report:
        click.echo(clean(f"report: {ran.report}"))


def _record(ran: Ran) -> dict[str, Any]:
    return {
        "saved": [dataclasses.asdict(one) for one in ran.saved],
        "measured": [_plain(dataclasses.asdict(row)) for row in ran.rows],
        "kept": _plain(ran.best),
        "report": ran.report,
    }


def _plain(value: Any) -> Any:
    """JSON has no word for infinity or NaN; they are said as texts."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
