"""``weightsmith methods``: which methods there are, and what each of them says of itself."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from typing import Any

import click

from weightsmith.catalogue import Catalogue, Method
from weightsmith.cli._manual import Manual, json_option, option
from weightsmith.errors import Error, did_you_mean

_EXAMPLES = [
    ("weightsmith methods --room merge", "The methods of one room."),
    ("weightsmith methods model_stock", "Options, paper, claim and laws of one method."),
]


def rows(room: str | None = None, pattern: str | None = None) -> list[dict[str, Any]]:
    """One record per method, in the order of the rooms' tables.

    Args:
        room: only this room and those inside it (``merge`` has ``merge.align`` in it).
        pattern: only methods whose name, or whose ``room.name``, matches (``*`` and ``?``).

    Raises:
        Error: there is no such room.
    """
    catalogue = Catalogue()
    if room is not None and not any(_inside(known, room) for known in catalogue.tables):
        raise Error(f"no room {room!r}{did_you_mean(room, catalogue.tables)}; rooms: {', '.join(catalogue.tables)}")
    found = (m for m in catalogue.methods if room is None or _inside(m.room, room))
    return [row(m) for m in found if pattern is None or _matches(m, pattern)]


def row(method: Method) -> dict[str, Any]:
    """What ``--json`` prints of a method."""
    return {
        "method": method.path,
        "call": method.call,
        "summary": method.summary,
        "options": {p.name: p.default for p in method.options},
        "needs": list(method.needs),
        "unit": method.unit,
        "reads": method.reads,
        "paper": method.paper,
        "covers": list(method.covers),
        "claim": method.claim,
        "departs": method.departs,
        "laws": list(method.laws),
        "file": method.file,
        "line": method.line,
    }


def find(name: str) -> Method:
    """The method called ``ties`` or ``merge.ties``.

    Raises:
        Error: there is none, or several rooms have one of that name.
    """
    every = Catalogue().methods
    found = [m for m in every if name in (m.name, m.path)]
    if not found:
        close = did_you_mean(name, {m.name for m in every} | {m.path for m in every})
        raise Error(f"no method {name!r}{close}; weightsmith methods lists them")
    if len(found) > 1:
        raise Error(f"{name!r} is in several rooms: {' or '.join(m.path for m in found)}")
    return found[0]


def _inside(room: str, outer: str) -> bool:
    return room == outer or room.startswith(outer + ".")


def _matches(method: Method, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (method.name, method.path))


# On a terminal


def _print_list(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not found:
        console.print("no method of that name")
        return
    # One width for the names of all rooms, so that their tables line up.
    width = max(len(record["method"].rpartition(".")[2]) for record in found)
    for room in dict.fromkeys(record["method"].rpartition(".")[0] for record in found):
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(style="bold", no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        for record in found:
            where, _, name = record["method"].rpartition(".")
            if where == room:
                table.add_row(f"  {name}", _plain(record["summary"]))
        console.print(f"[bold cyan]{room}[/]")
        console.print(table)
        console.print()
    console.print("weightsmith methods NAME shows options, paper and claim of one.", highlight=False)


def _print_card(method: Method) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"weightsmith.{method.call}", style="bold"))
    console.print(Text(_plain(method.summary)))
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in _card_lines(method):
        table.add_row(heading, Text(text))
    console.print(table)


def _card_lines(method: Method) -> Iterable[tuple[str, str]]:
    for given in method.options:
        yield ("options" if given is method.options[0] else ""), str(given)
    passes = "read once" if method.reads == 1 else "read twice: statistics first"
    lines = {
        "needs": ", ".join(method.needs),
        "computed per": f"{method.unit}; {passes}",
        "paper": method.paper,
        "catalogue": ", ".join(method.covers),
        "claim": method.claim,
        "departs": method.departs,
        "laws": ", ".join(method.laws),
        "code": f"{method.file}:{method.line}",
    }
    yield from ((heading, text) for heading, text in lines.items() if text)


def _plain(text: str) -> str:
    """A docstring's line without its code quotes."""
    return text.replace("``", "").replace("`", "")


def command() -> click.Command:
    """The ``methods`` command."""

    @click.command("methods", cls=Manual, examples=_EXAMPLES)
    @click.argument("name", required=False)
    @option("--room", metavar="ROOM", section="Which methods", help="Only the methods of this room.")
    @option("--match", "pattern", metavar="PATTERN", section="Which methods", help="Only names that fit: '*soup*'.")
    @json_option
    def methods(name: str | None, room: str | None, pattern: str | None, as_json: bool) -> None:
        """List the methods, or show one of them with its options, paper and claim."""
        if name is not None and (room or pattern):
            raise Error(f"either the method {name} or --room and --match, not both")
        if name is not None:
            method = find(name)
            if as_json:
                click.echo(json.dumps(row(method), indent=2))
            else:
                _print_card(method)
            return
        found = rows(room, pattern)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            _print_list(found)

    return methods
