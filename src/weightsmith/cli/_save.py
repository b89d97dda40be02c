"""The options that every command with an output has, and the save itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._manual import DTYPE, OUTPUT_FORMAT, PATH, Option
from weightsmith.cli._output import clean, echo_json, plural, size

if TYPE_CHECKING:
    from weightsmith import Weights
    from weightsmith.weights import Saved

_SECTION = "Output"


class Interrupted(click.Abort):
    """Stopped by the user during a save that can go on."""


def save_options(without: Collection[str] = ()) -> list[click.Option]:
    """The options of `save`, but for names that a command uses otherwise."""
    options = [
        Option(
            ["-o", "--output"],
            type=PATH,
            required=True,
            section=_SECTION,
            help="A folder, or a file: .safetensors, .pt, .npz. It appears whole or not at all.",
        ),
        Option(["--dtype"], type=DTYPE, section=_SECTION, help="Cast the floats, as the last step."),
        Option(
            ["--format"],
            type=OUTPUT_FORMAT,
            section=_SECTION,
            help="Where the name does not say.  [default: safetensors]",
        ),
        Option(
            ["--max-shard-size"],
            metavar="SIZE",
            default="5GB",
            show_default=True,
            section=_SECTION,
            help="Bytes of one file in a folder; none for a single file.",
        ),
        Option(
            ["--overwrite"], is_flag=True, section=_SECTION, help="Replace what is there once the new one is whole."
        ),
        Option(
            ["--resume"], is_flag=True, section=_SECTION, help="Go on with the same command where it was interrupted."
        ),
        Option(
            ["--threads"],
            type=click.IntRange(1),
            metavar="N",
            section=_SECTION,
            help="How many.  [default: one a core]",
        ),
        Option(
            ["--memory"], metavar="SIZE", section=_SECTION, help="Bytes in flight at most.  [default: 256MB a thread]"
        ),
        Option(
            ["--executor"],
            type=click.Choice(["threads", "processes", "ray"]),
            section=_SECTION,
            help="Who computes; the bytes are the same.  [default: threads]",
        ),
        Option(
            ["--workers"],
            type=click.IntRange(1),
            metavar="N",
            section=_SECTION,
            help="Processes, or actors of the Ray cluster.  [default: one a core]",
        ),
        Option(["--json", "as_json"], is_flag=True, help="Print one JSON document and nothing else."),
    ]
    return [one for one in options if one.name not in without]


def check_output(given: Mapping[str, Any]) -> None:
    """An error, before any work, for an output that is there and is not to be replaced."""
    from weightsmith.errors import OutputError

    if os.path.exists(given["output"]) and not (given.get("overwrite") or given.get("resume")):
        raise OutputError(f"{given['output']}: is there already; --overwrite replaces it")


def save(weights: Weights, given: dict[str, Any], found: Mapping[str, Any] | None = None) -> None:
    """Write ``weights`` as the options of `save_options` say, and tell what was written.

    Args:
        weights: what to write.
        given: the options.
        found: what else ``--json`` tells.
    """
    place = given["output"]
    if given.get("dtype"):
        weights = weights.cast(given["dtype"])
    shard = given.get("max_shard_size")
    try:
        saved = weights.save(
            place,
            format=given.get("format"),
            max_shard_size=None if shard == "none" else shard,
            overwrite=given.get("overwrite", False),
            resume=given.get("resume", False),
            threads=given.get("threads"),
            memory=given.get("memory"),
            executor=given.get("executor") or "threads",
            workers=given.get("workers"),
        )
    except KeyboardInterrupt:
        if os.path.isdir(place.rstrip("/") + ".partial"):
            raise Interrupted(f"{place}: interrupted; the same command with --resume goes on from here") from None
        raise
    if given.get("as_json"):
        echo_json({**dataclasses.asdict(saved), **(found or {})})
        return
    click.echo(said(saved))


def said(saved: Saved) -> str:
    """What was written, in a line."""
    again = f", {plural(saved.resumed, 'piece')} found finished" if saved.resumed else ""
    written = f"{plural(saved.tensors, 'tensor')}, {size(saved.nbytes)} in {plural(len(saved.files), 'file')}"
    return f"{clean(saved.path)}: {written}{again}"
