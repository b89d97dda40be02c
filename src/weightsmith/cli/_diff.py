"""``weightsmith diff``: how far two checkpoints are apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from weightsmith.cli._inspect import MANY, SHOWING, check_report, listing_options, report_options
from weightsmith.cli._manual import (
    INPUT_FORMAT,
    PATH,
    Manual,
    json_option,
    option,
    pattern_option,
    threads_option,
)
from weightsmith.cli._output import echo_json, echo_table, number, percent, plural

if TYPE_CHECKING:
    from weightsmith.inspect import Diff, LayerDiff, Sums, TensorDiff

_KEYS = ("distance", "cosine", "largest", "changed")


def command() -> click.Command:
    """The ``diff`` command."""

    @click.command(
        "diff",
        cls=Manual,
        short_help="How far two checkpoints are apart, tensor by tensor.",
        examples=[
            ("weightsmith diff base/ tuned/ --sort distance", "What fine-tuning has changed, the most changed first."),
            ("weightsmith diff a.safetensors b.pt --changed", "Only what differs."),
            ("weightsmith diff a/ b/ > /dev/null && echo same", "A test in a script."),
        ],
        status={
            0: "the same names, shapes, dtypes and bits",
            1: "they differ",
            2: "trouble: they could not be compared",
        },
    )
    @click.argument("a", type=PATH)
    @click.argument("b", type=PATH)
    @option(
        "--sort",
        type=click.Choice(["name", *_KEYS]),
        section=SHOWING,
        help="By name, or the most different first.  [default: as in A]",
    )
    @option("--changed", is_flag=True, section=SHOWING, help="Leave out what is the same.")
    @listing_options
    @pattern_option
    @option("--input-format", type=INPUT_FORMAT, section="Reading", help="Which weights of a folder that has several.")
    @threads_option
    @report_options
    @json_option
    @click.pass_context
    def diff(
        ctx: click.Context,
        a: str,
        b: str,
        sort: str | None,
        changed: bool,
        layers: bool,
        everything: bool,
        pattern: tuple[str, ...],
        input_format: str | None,
        threads: int | None,
        output: str | None,
        overwrite: bool,
        as_json: bool,
    ) -> None:
        """Compare the checkpoints A and B by the names of their tensors.

        For every tensor that both have in one shape: the distance ||a - b|| / ||a||, the cosine of
        the angle between them, the largest absolute difference and the share of the values that
        changed. Both are read once, piece by piece; sums are kept in float64.

        A tensor is the same when its bits are. Where dtypes differ the tensor is different, and its
        figures say how far the values are apart.
        """
        from weightsmith import inspect
        from weightsmith import open as open_weights

        check_report(output, overwrite)
        found = inspect.diff(
            open_weights(a, format=input_format),
            open_weights(b, format=input_format),
            list(pattern) or "*",
            threads,
        )
        tensors = [t for t in found.tensors if not changed or t.status != "same"]
        if sort:
            tensors.sort(key=lambda t: _rank(sort, t.name, t.sums))
        if output is not None:
            found.report().save(output)
        if as_json:
            by_name = {row["name"]: row for row in found.rows()}
            echo_json({"a": a, "b": b, **found.to_json(), "tensors": [by_name[t.name] for t in tensors]})
        else:
            _print(found, tensors, sort, changed, layers, everything)
        ctx.exit(0 if found.same else 1)

    return diff


def _rank(key: str, name: str, sums: Sums | None) -> tuple[float, str]:
    """Where a tensor stands: what cannot be compared first, then the most different."""
    if key == "name":
        return 0.0, name
    if sums is None:
        return -math.inf, name
    cosine = 1.0 if sums.cosine is None else sums.cosine
    return {"distance": -sums.distance, "cosine": cosine, "largest": -sums.largest, "changed": -sums.share}[key], name


def _print(
    found: Diff, tensors: list[TensorDiff], sort: str | None, changed: bool, layers: bool, everything: bool
) -> None:
    by_layer = layers or (len(tensors) > MANY and not everything)
    if by_layer:
        _print_layers([y for y in found.layers() if y.different or not changed], sort)
        tensors = [t for t in tensors if t.sums is None]
    if tensors:
        if by_layer:
            click.echo()
        rows = [[t.name, _status(t), *_figures(t.sums)] for t in tensors]
        echo_table(["tensor", "status", "distance", "cosine", "largest", "changed"], rows, left=2)
    if by_layer and not layers:
        click.echo("\nby layer; --all lists the tensors one by one")
    if by_layer or tensors:
        click.echo()
    click.echo(_conclusion(found))


def _print_layers(found: list[LayerDiff], sort: str | None) -> None:
    if sort:
        found = sorted(found, key=lambda y: _rank(sort, y.name, y.sums))
    rows = [[y.name, f"{y.different} of {y.tensors}", *_figures(y.sums)] for y in found]
    echo_table(["layer", "differ", "distance", "cosine", "largest", "changed"], rows)


def _status(tensor: TensorDiff) -> str:
    if tensor.status in ("shape", "dtype"):
        return f"{tensor.a} / {tensor.b}"
    return tensor.status


def _figures(sums: Sums | None) -> list[str]:
    if sums is None:
        return [""] * 4
    bad = f" ({sums.nonfinite:,} not finite)" if sums.nonfinite else ""
    cosine = "-" if sums.cosine is None else f"{sums.cosine:.6f}"
    return [number(sums.distance), cosine, number(sums.largest), percent(sums.share) + bad]


def _conclusion(found: Diff) -> str:
    if found.same:
        return f"the same: {plural(len(found.tensors), 'tensor')}, bit for bit"
    counts = ", ".join(f"{count:,} {_SAID[status]}" for status, count in found.counts().items() if status != "same")
    figures = f"distance {number(found.overall.distance)}, {percent(found.overall.share)} of values changed"
    return f"different: of {plural(len(found.tensors), 'tensor')}, {counts}; {figures}"


_SAID = {
    "changed": "changed",
    "dtype": "of another dtype",
    "shape": "of another shape",
    "only in a": "only in A",
    "only in b": "only in B",
}
