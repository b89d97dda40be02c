"""``weightsmith verify``: whether a checkpoint is whole and sane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from weightsmith.cli._manual import PATH, Manual, json_option, threads_option
from weightsmith.cli._output import clean, echo_json, plural, size

if TYPE_CHECKING:
    from weightsmith.inspect import Finding, Verified

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def command() -> click.Command:
    """The ``verify`` command."""

    @click.command(
        "verify",
        cls=Manual,
        short_help="Whether a checkpoint is whole and its values are sane.",
        examples=[
            ("weightsmith verify model/", "Read everything and say what is wrong."),
            ("weightsmith verify runs/*/ --json > report.json", "Several, for a program to read."),
        ],
        status={0: "no errors (there may be warnings)", 1: "at least one error", 2: "a wrong command line"},
    )
    @click.argument("paths", type=PATH, nargs=-1, required=True, metavar="PATH...")
    @threads_option
    @json_option
    @click.pass_context
    def verify(ctx: click.Context, paths: tuple[str, ...], threads: int | None, as_json: bool) -> None:
        """Read the checkpoint at every PATH to its last byte and say everything that is wrong with it.

        Checked are the headers, the index against the shards, missing and left-over files, values
        that are not finite, matrices that hold a single value throughout, config.json against the
        tensors, and what an interrupted save has left beside it.

        Files are looked at one by one, so one damaged shard does not hide what is wrong with the
        others. Nothing is ever unpickled, and nothing is changed.
        """
        from weightsmith import inspect

        found = []
        for path in paths:
            found.append(inspect.verify(path, threads))
            if not as_json:
                _print(found[-1])
        ok = all(one.ok for one in found)
        if as_json:
            echo_json({"ok": ok, "checkpoints": [one.to_json() for one in found]})
        ctx.exit(0 if ok else 1)

    return verify


def _print(found: Verified) -> None:
    for finding in found.findings:
        severity = click.style(finding.severity, fg=_COLOURS[finding.severity])
        click.echo(f"{severity}: {_place(finding)}{clean(finding.message)}")
    read = f"{plural(found.tensors, 'tensor')} in {plural(found.files, 'file')}, {size(found.bytes)}"
    counts = [plural(n, s) for s in _COLOURS if (n := sum(f.severity == s for f in found.findings))]
    verdict = click.style("ok", fg="green") if found.ok else click.style("not ok", fg="red")
    click.echo(f"{clean(found.path)}: {verdict}: {read}" + (f"; {', '.join(counts)}" if counts else ""))


def _place(finding: Finding) -> str:
    return "".join(f"{clean(part)}: " for part in (finding.file, finding.tensor) if part)
