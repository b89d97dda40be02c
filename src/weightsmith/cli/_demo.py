"""``weightsmith demo``: train, average, prune and quantize small networks, and report what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from weightsmith.demo import Outcome, Row


def _print_outcome(outcome: Outcome) -> None:
    from rich.console import Console

    from weightsmith.demo._report import findings

    console = Console(highlight=False)
    console.print(_table(outcome))
    console.print()
    for line in findings(outcome):
        console.print(f"• {line}")
    console.print(
        "\nAccuracies with 95 % Wilson intervals; differences in percentage points on the same pictures, "
        "95 % paired bootstrap. Pruned zeros are stored like other values: they save no bytes here.",
        style="dim",
    )
    console.print(f"\n{outcome.seconds:.0f} seconds. Report: ", end="")
    console.print(str(outcome.report), style="bold", soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("test % [95 %]", justify="right", no_wrap=True)
    for heading in ("shifted %", "bytes", "zeros %", "seconds"):
        table.add_column(heading, justify="right")
    for row in outcome.rows:
        is_best = row.made.key == outcome.best
        table.add_row(*_cells(row, is_best), style="bold" if is_best else None)
    return table


def _cells(row: Row, is_best: bool) -> list[str]:
    low, high = (100 * end for end in row.test.interval)
    return [
        row.made.title + (" (best)" if is_best else ""),
        f"{100 * row.test.value:.1f} [{low:.1f}, {high:.1f}]".replace("[", r"\["),
        f"{100 * row.shifted.value:.1f}",
        f"{row.nbytes:,}",
        f"{100 * row.share_of_zeros:.1f}",
        f"{row.made.seconds:.2f}",
    ]


def command() -> click.Command:
    """The ``demo`` command."""

    @click.command("demo")
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of data and training.")
    @click.option(
        "--out",
        "folder",
        type=click.Path(path_type=Path),
        default=Path("weightsmith-demo"),
        show_default=True,
        help="Folder for the checkpoints and the report. An earlier demo's is overwritten.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
    @click.option("--open", "open_it", is_flag=True, help="Show the report in the browser.")
    @click.option("--quick", is_flag=True, hidden=True, help="Train next to nothing; the figures mean little.")
    def demo(seed: int, folder: Path, as_json: bool, open_it: bool, quick: bool) -> None:
        """Show on real data what weights can do, in under a minute.

        Trains a small network on scikit-learn's digits, fine-tunes siblings from it, averages, prunes
        and quantizes them, reads each back from its folder, measures it on held-out pictures, and
        writes report.html. Nothing is fetched.
        """
        from weightsmith import demo

        outcome = demo.run(folder, seed, demo.QUICK if quick else None)
        if as_json:
            click.echo(json.dumps(demo.record(outcome), indent=2))
        else:
            _print_outcome(outcome)
        if open_it:
            click.launch(outcome.report.resolve().as_uri())

    return demo
