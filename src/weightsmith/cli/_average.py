"""``weightsmith average``: one better model out of the checkpoints that a run left on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._manual import PATH, SAVING, Manual, Option
from weightsmith.cli._output import clean, number, percent, plural
from weightsmith.cli._save import save, save_options

if TYPE_CHECKING:
    from weightsmith import Weights

_MEAN, _SEARCH, _LENGTH = "Which checkpoints", "Search", "Another length of average"

_HELP = """Average the checkpoints of one training run.

Without more, the result is the mean of the latest six (LAWA). With --search it is the linear combination that is best
on held-out data, found by evolution (LCSC); its coefficients may be negative, and it is never worse on that data than
the last checkpoint, the best one, their mean and exponential averages. With --sigma-rel the paths are snapshots of two
or more power-function averages that training stored (weightsmith.average.power_ema), and the result is the average
of any other length (post-hoc EMA).

Paths that differ only in numbers are put in that order, so that checkpoint-900 comes before checkpoint-1000, whatever
the shell says; others are taken as they stand, from the earliest to the latest. Values are read and written piece by
piece, so the checkpoints may be larger than memory."""


def command() -> click.Command:
    """The ``average`` command."""
    own = [
        Option(
            ["--last"],
            type=click.IntRange(1),
            metavar="N",
            section=_MEAN,
            help="Only the latest N.  [default: 6; with --search all]",
        ),
        Option(["--search"], is_flag=True, section=_SEARCH, help="Find the best linear combination; needs --evaluate."),
        Option(
            ["--evaluate"],
            metavar="SPEC",
            section=_SEARCH,
            help="What to judge by, higher being better: my.py:function (of weights), or text:held_out.txt, the "
            "likelihood of a text under a Hugging Face causal language model.",
        ),
        Option(
            ["--budget"],
            type=click.IntRange(1),
            metavar="N",
            section=_SEARCH,
            help="How often to evaluate.  [default: 100]",
        ),
        Option(["--seed"], type=int, metavar="N", section=_SEARCH, help="Of the search.  [default: 0]"),
        Option(
            ["--sigma-rel"],
            type=float,
            metavar="X",
            section=_LENGTH,
            help="Spread of the average's memory as a share of the run, up to 0.2887 (all of it alike).",
        ),
        Option(
            ["--step"],
            type=click.FloatRange(0, min_open=True),
            metavar="N",
            section=_LENGTH,
            help="Up to where in the run.  [default: the last snapshot]",
        ),
    ]
    return Manual(
        "average",
        callback=average,
        params=[
            click.Argument(["paths"], type=PATH, nargs=-1, required=True, metavar="CHECKPOINT..."),
            *own,
            *save_options(),
        ],
        help=_HELP,
        short_help="One better model out of the checkpoints of a run.",
        examples=[
            ("weightsmith average run/checkpoint-* --last 5 -o out/", "The mean of the latest five."),
            (
                "weightsmith average run/checkpoint-* --search --evaluate text:held_out.txt -o out/",
                "The combination that reads a text best.",
            ),
            ("weightsmith average snapshots/* --sigma-rel 0.15 -o out/", "A longer memory than any that was kept."),
        ],
        status=SAVING,
    )


def average(paths: tuple[str, ...], **given: Any) -> None:
    """Check the options against each other, make the average, and save it."""
    last, search, sigma_rel, step = (given.pop(name) for name in ("last", "search", "sigma_rel", "step"))
    searching = {name: given.pop(name) for name in ("evaluate", "budget", "seed")}
    searching = {name: value for name, value in searching.items() if value is not None}
    if search and "evaluate" not in searching:
        raise click.UsageError("--search needs --evaluate, which says what is better: my.py:function, or text:FILE")
    if searching and not search:
        raise click.UsageError(f"--{next(iter(searching))} is for --search")
    if sigma_rel is not None and (search or last is not None):
        raise click.UsageError(
            f"--sigma-rel takes all snapshots, and goes without {'--search' if search else '--last'}"
        )
    if step is not None and sigma_rel is None:
        raise click.UsageError("--step is for --sigma-rel")
    if sigma_rel is not None:
        made, said = _post_hoc(paths, sigma_rel, step)
    else:
        run = _in_order(paths)
        run = run[-last:] if last is not None else run
        made, said = _searched(run, searching, given) if search else _latest(run, last)
    if not given["as_json"]:
        for line in said:
            click.echo(clean(line))
    save(made, given, {"average": dict(made.lineage.options)})


def _in_order(paths: tuple[str, ...]) -> list[str]:
    """By step, which is said where it is not as given; and where names tell no step, that is."""
    from weightsmith.average import by_step
    from weightsmith.errors import Error

    try:
        found = by_step(paths)
    except Error as error:
        click.echo(f"weightsmith: note: taken in the order given: {clean(str(error))}", err=True)
        return list(paths)
    if found != list(paths):
        click.echo(f"weightsmith: note: taken by their numbers, {clean(found[0])} to {clean(found[-1])}", err=True)
    return found


def _latest(run: list[str], last: int | None) -> tuple[Weights, list[str]]:
    from weightsmith.average import lawa

    made = lawa(run) if last is None else lawa(run, last=last)
    used = run[-made.lineage.options["last"] :]
    return made, [f"mean of {plural(len(used), 'checkpoint')}, {used[0]} to {used[-1]}"]


def _searched(run: list[str], options: dict[str, Any], given: dict[str, Any]) -> tuple[Weights, list[str]]:
    from weightsmith.average import lawa, lcsc
    from weightsmith.evaluators import evaluator

    evaluate = evaluator(options.pop("evaluate"))
    # Whatever would stop the save is found before the search, not hours later.
    shard = given["max_shard_size"]
    likewise = lawa(run, last=len(run))
    likewise = likewise.cast(given["dtype"]) if given["dtype"] else likewise
    likewise.planned(
        given["output"],
        format=given["format"],
        max_shard_size=None if shard == "none" else shard,
        overwrite=given["overwrite"] or given["resume"],
    )
    made = lcsc(run, evaluate, **options)
    found = made.lineage.options
    pairs = zip(run, found["coefficients"], strict=True)
    lines = [f"{os.path.normpath(path)}: {coefficient:+.4f}" for path, coefficient in pairs]
    return made, [*lines, f"score {number(found['score'])}, the best of {plural(found['evaluations'], 'evaluation')}"]


def _post_hoc(paths: tuple[str, ...], sigma_rel: float, step: float | None) -> tuple[Weights, list[str]]:
    from weightsmith.average import post_hoc_ema

    made = post_hoc_ema(paths, sigma_rel, step=step)
    found = made.lineage.options
    return made, [
        f"sigma_rel {sigma_rel:g} at step {found['step']:g}, of {plural(len(paths), 'snapshot')}; "
        f"what they cannot tell: {percent(found['error'])}"
    ]
