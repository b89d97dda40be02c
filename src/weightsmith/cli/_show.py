"""``weightsmith show``: what is in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._inspect import MANY, SHOWING, check_report, listing_options, report_options
from weightsmith.cli._manual import (
    PATH,
    Manual,
    input_options,
    json_option,
    option,
    pattern_option,
    threads_option,
)
from weightsmith.cli._output import clean, echo_json, echo_table, number, percent, plural, size

if TYPE_CHECKING:
    from weightsmith.inspect import Summary


def command() -> click.Command:
    """The ``show`` command."""

    @click.command(
        "show",
        cls=Manual,
        short_help="What is in a checkpoint: tensors, sizes, figures, origin.",
        examples=[
            ("weightsmith show model/", "Names, shapes, dtypes and sizes."),
            ("weightsmith show model/ --stats -p '*.bias'", "What the values of all biases are like."),
            ("weightsmith show run.pt::state_dict --layers", "One line a layer, of a part of a PyTorch file."),
            ("weightsmith show merged/ --lineage", "What it was made of, and how."),
        ],
    )
    @click.argument("path", type=PATH)
    @option(
        "--stats", is_flag=True, section=SHOWING, help="Norm, mean, deviation, extremes, zeros, NaN and infinities."
    )
    @option(
        "--spectra",
        is_flag=True,
        section=SHOWING,
        help="Singular values and ranks of every matrix. Slow for large ones.",
    )
    @listing_options
    @option("--lineage", is_flag=True, section=SHOWING, help="What made the weights, as a tree of steps.")
    @pattern_option
    @threads_option
    @input_options
    @report_options
    @json_option
    def show(
        path: str,
        stats: bool,
        spectra: bool,
        layers: bool,
        everything: bool,
        lineage: bool,
        pattern: tuple[str, ...],
        at: str | None,
        input_format: str | None,
        threads: int | None,
        output: str | None,
        overwrite: bool,
        as_json: bool,
    ) -> None:
        """Show what is in PATH: a checkpoint folder, a file of safetensors, PyTorch, GGUF or npz, or an address.

        Only headers are read, unless --stats or --spectra asks for the values; those are read once,
        piece by piece, so that a checkpoint may be larger than memory.

        A layer is all tensors whose names are equal up to their first number.
        """
        from weightsmith import open as open_weights
        from weightsmith.inspect import summary
        from weightsmith.weights._lineage import lines

        check_report(output, overwrite)
        weights = open_weights(path, at=at, format=input_format)
        made = weights.lineage
        weights = weights.select(list(pattern)) if pattern else weights
        found = summary(weights, stats, spectra, threads)
        if output is not None:
            found.report().save(output)
        if as_json:
            echo_json({"path": path, **found.to_json()} | ({"lineage": made.record()} if lineage else {}))
            return
        click.echo(f"{clean(path)}: {_totals(found)}")
        if lineage:
            click.echo("\n" + "\n".join(clean(line) for line in str(made).splitlines()))
            if not (stats or spectra or layers or everything):
                return
        elif made.past and made.past["method"] not in ("memory", "module", "open"):
            click.echo(clean(f"made by {lines(made.past)[0]}; --lineage shows where that comes from"))
        click.echo()
        _tables(found, stats, spectra, layers, everything)

    return show


def _totals(found: Summary) -> str:
    shares = [f"{name} {percent(count / found.parameters)}" for name, count in found.dtypes.items() if found.parameters]
    dtypes = ", ".join(found.dtypes if len(found.dtypes) < 2 else shares)
    counts = f"{plural(len(found.tensors), 'tensor')}, {plural(found.parameters, 'parameter')}"
    return f"{counts}, {size(found.bytes)}, {dtypes}"


def _tables(found: Summary, stats: bool, spectra: bool, layers: bool, everything: bool) -> None:
    many = len(found.tensors) > MANY and not (everything or stats or spectra)
    if layers or many:
        _layers(found)
        if many and not layers:
            click.echo(f"\n{plural(len(found.tensors), 'tensor')} by layer; --all lists them one by one")
    elif stats:
        _stats(found)
    elif not spectra:
        rows = [[_name(t), str(list(t.shape)), t.dtype, "tied" if t.tied_to else size(t.bytes)] for t in found.tensors]
        echo_table(["tensor", "shape", "dtype", "size"], rows, left=3)
    if layers and stats:
        click.echo()
        _stats(found)
    if spectra:
        if stats or layers:
            click.echo()
        _spectra(found)


def _name(tensor: Any) -> str:
    return f"{tensor.name} = {tensor.tied_to}" if tensor.tied_to else tensor.name


def _layers(found: Summary) -> None:
    rows = [[y.name, str(y.tensors), f"{y.parameters:,}", size(y.bytes), ", ".join(y.dtypes)] for y in found.layers()]
    echo_table(["layer", "tensors", "parameters", "size", "dtype"], rows)


def _stats(found: Summary) -> None:
    headings = ["tensor", "shape", "norm", "mean", "std", "min", "max", "zeros", "nan", "inf"]
    rows = []
    for tensor in found.tensors:
        s = tensor.stats
        figures = (
            [*map(number, (s.norm, s.mean, s.std, s.min, s.max)), percent(s.zeros), str(s.nan), str(s.inf)]
            if s is not None
            else ["-"] * 8
        )
        rows.append([_name(tensor), str(list(tensor.shape)), *figures])
    echo_table(headings, rows, left=2)


def _spectra(found: Summary) -> None:
    rows = []
    for tensor in found.tensors:
        s = tensor.spectrum
        if s is not None:
            rows.append(
                [_name(tensor), number(s.effective_rank), number(s.stable_rank), str(s.full_rank), *_largest(s.values)]
            )
    if not rows:
        click.echo("no matrix with finite values")
        return
    echo_table(["matrix", "effective rank", "stable rank", "of", "largest", "2nd", "3rd"], rows)


def _largest(values: tuple[float, ...]) -> list[str]:
    return [number(value) for value in (*values[:3], None, None, None)[:3]]
