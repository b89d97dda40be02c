"""``weightsmith claims``: measure what papers say, and show what came of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from weightsmith import claims
from weightsmith.cli._manual import Manual, json_option, option
from weightsmith.errors import Error

_RUN = [
    ("weightsmith claims run model-soups swa", "All claims of two papers; their results are kept in claims/results."),
    ("weightsmith claims run model-soups--text-encoder", "One of a paper's claims."),
]
_TABLE = [("weightsmith claims table --markdown", "Every result, as a table for a page.")]
_STYLES = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


def rows(folder: Path) -> list[dict[str, Any]]:
    """One record per claim file, by name: its result, or ``{"key", "variant", "verdict": "not measured"}``."""
    found = []
    for path in claims.find(folder):
        result = claims.read(path)
        if result is None:
            found.append({**_named(path), "verdict": "not measured"})
        else:
            found.append({**dataclasses.asdict(result), "stale": claims.is_stale(result, path)})
    return found


def _named(path: Path) -> dict[str, str]:
    """Key and variant of a claim that nothing else is known of."""
    key, _, variant = path.stem.partition("__")
    return {"key": key.replace("_", "-"), "variant": variant.replace("_", " ")}


def cells(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """Name, statement, measured difference and verdict of a record, as text."""
    name = claims.claim_name(Path(claims.file_name(record["key"], record["variant"])))
    if "interval" not in record:
        return name, "", "", record["verdict"]
    low, high = record["interval"]
    better = "" if record["higher_is_better"] else ", lower is better"
    measured = (
        f"{record['method']} against {record['baseline']}{better}: {record['difference']:+.3g} "
        f"[{low:+.3g}, {high:+.3g}], asserted ≥ {record['margin']:g}, {len(record['seeds'])} seeds"
    )
    stale = " (stale: the claim was changed since)" if record["stale"] else ""
    return name, record["statement"], measured, record["verdict"] + stale


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = ["| claim | what is asserted | measured | verdict |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in cells(r)) + " |" for r in records])


def _print_table(records: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for record in records:
        name, statement, measured, verdict = cells(record)
        style = _STYLES.get(verdict, "dim")
        console.print(Text.assemble((verdict, style), "  ", (name, "bold")))
        for line in filter(None, (statement, measured)):
            console.print(Padding(Text(line), (0, 0, 0, 2)))


def _run(paths: Sequence[Path], quiet: bool) -> list[dict[str, Any]]:
    """A record per claim, each result kept at once; what could not be measured says why in ``error``."""
    records = []
    for path in paths:
        try:
            result = claims.run(path, tell=lambda line: None if quiet else click.echo(line, err=True))
        except Error as error:
            records.append({**_named(path), "verdict": "failed", "error": str(error)})
            continue
        claims.write(result, path)
        records.append({**dataclasses.asdict(result), "stale": False})
    return records


_folder = option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="PATH",
    section="Which claims",
    help="Where the claims are.  [default: claims, or that of the checkout]",
)


def group() -> click.Group:
    """The ``claims`` group."""

    @click.group("claims")
    def claims_group() -> None:
        """Measure what papers say, on real data and several seeds."""

    @claims_group.command("run", cls=Manual, examples=_RUN)
    @click.argument("keys", nargs=-1, metavar="KEY[--VARIANT]...")
    @option("--all", "everything", is_flag=True, section="Which claims", help="Every claim of the folder.")
    @json_option
    @_folder
    def run(keys: tuple[str, ...], everything: bool, as_json: bool, folder: Path | None) -> None:
        """Measure claims and keep their results, whatever they say."""
        if bool(keys) == everything:
            raise Error("name the keys of the claims to run, or give --all")
        paths = claims.find(folder or claims.default_folder(), keys)
        records = _run(paths, quiet=as_json)
        failures = [record["error"] for record in records if "error" in record]
        if as_json:
            click.echo(json.dumps(records, indent=2))
        else:
            _print_table([record for record in records if "error" not in record])
            if failures:
                raise Error("\n".join(failures))
        if failures:
            raise click.exceptions.Exit(2)

    @claims_group.command("table", cls=Manual, examples=_TABLE)
    @json_option
    @option("--markdown", "as_markdown", is_flag=True, help="Print a Markdown table.")
    @_folder
    def table(as_json: bool, as_markdown: bool, folder: Path | None) -> None:
        """Show the results that are kept."""
        records = rows(folder or claims.default_folder())
        if as_json or as_markdown:
            click.echo(json.dumps(records, indent=2) if as_json else markdown(records))
        else:
            _print_table(records)

    return claims_group
