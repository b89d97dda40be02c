"""``weightsmith explain``: what a recipe would do to every tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from weightsmith.cli._manual import PATH, Manual, json_option, option
from weightsmith.cli._output import clean, echo_json, echo_table, plural

if TYPE_CHECKING:
    from weightsmith.recipe import Line
    from weightsmith.weights import Weights


def command() -> click.Command:
    """The ``explain`` command."""

    @click.command(
        "explain",
        cls=Manual,
        short_help="What a recipe or mergekit file would do to every tensor.",
        examples=[
            ("weightsmith explain recipe.yaml", "Every tensor, what is done to it and with which options."),
            ("weightsmith explain mergekit.yaml -p '*.mlp.*'", "Some of them."),
            ("weightsmith explain recipe.yaml --of merged --json", "Of one step, for a program."),
        ],
    )
    @click.argument("path", type=PATH, metavar="FILE")
    @option("--set", "settings", multiple=True, metavar="STEP.OPTION=VALUE", help="Another value. Repeatable.")
    @option("--of", metavar="STEP", help="The result of this step.  [default: what is saved]")
    @option("--pattern", "-p", multiple=True, metavar="PATTERN", help="Only tensors whose name fits. Repeatable.")
    @json_option
    def explain(path: str, settings: tuple[str, ...], of: str | None, pattern: tuple[str, ...], as_json: bool) -> None:
        """Print what the recipe in FILE would do to every tensor, with the options that hold for it.

        Headers are read and nothing is computed. Of a sweep the first combination is shown.
        """
        from weightsmith import recipe as recipes

        found = recipes.read(path, settings)
        shown: list[tuple[str, list[Line]]] = []
        for name, weights in _results(found, of):
            lines = recipes.explain(weights.select(list(pattern)) if pattern else weights)
            shown.append((name, lines))
        if isinstance(found, recipes.Foreign):
            for line in found.warnings:
                click.echo(f"weightsmith: note: {clean(line)}", err=True)
        if as_json:
            echo_json({name: [dataclasses.asdict(line) for line in lines] for name, lines in shown})
            return
        for name, lines in shown:
            _say(name, lines)

    return explain


def _results(found: object, of: str | None) -> list[tuple[str, Weights]]:
    from weightsmith.recipe import Foreign, Recipe
    from weightsmith.recipe._build import build, lookup
    from weightsmith.recipe._sweep import variants

    if isinstance(found, Foreign):
        if of is not None:
            raise click.UsageError("a mergekit file has no named steps, so --of has no meaning")
        return [("merge", found.build())]
    assert isinstance(found, Recipe)
    built = build(variants(found)[0].recipe, {}, trial=True)
    names = [of] if of else list(dict.fromkeys(output.weights for output in found.outputs)) or [found.last]
    for name in names:
        if name.partition(".")[0] not in built:
            raise click.UsageError(f"there is no input or step {name!r}; there are {', '.join(built)}")
    return [(name, lookup(built, name)) for name in names]


def _say(name: str, lines: Sequence[Line]) -> None:
    click.echo(click.style(f"{clean(name)}: {plural(len(lines), 'tensor')}", bold=True))
    rows = [
        [
            line.tensor,
            "x".join(map(str, line.shape)) or "scalar",
            line.dtype,
            f"the same as {line.tied}" if line.tied else " > ".join(line.steps) or "as it is",
            "" if line.tied else f"{len(line.files)}",
        ]
        for line in lines
    ]
    echo_table(["tensor", "shape", "dtype", "what is done", "files"], rows, left=4)
