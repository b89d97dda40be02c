"""The command line. Commands are imported when they are used; help and completion need no torch."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from weightsmith._version import __version__
from weightsmith.errors import Error, did_you_mean

SECTIONS = {
    "Look": ("show", "graph", "look", "diff", "verify", "eval", "inspect", "scaling"),
    "Change": ("run", "explain", "convert", "average", "adapt", "cut"),
    "Know": ("methods", "claims"),
    "Help": ("demo", "completion"),
}
"""The commands under their headings; the rooms with methods stand under "Change" as well."""

OWN = ("prune", "quantize")
"""Rooms whose commands do more than call a method."""

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 and the number of the signal, as shells have it


class Root(click.Group):
    """The command ``weightsmith``: finds its commands by name, in modules and in the rooms."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in self.sections().values() for name in names]

    def sections(self) -> dict[str, tuple[str, ...]]:
        from weightsmith.cli._rooms import rooms

        return SECTIONS | {"Change": (*SECTIONS["Change"], *rooms())}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if any(cmd_name in names for names in SECTIONS.values()):
            module = importlib.import_module(f"weightsmith.cli._{cmd_name}")
            return module.group() if hasattr(module, "group") else module.command()
        from weightsmith.cli import _rooms

        if cmd_name in OWN:
            return importlib.import_module(f"weightsmith.cli._{cmd_name}").group()
        return _rooms.group(cmd_name) if cmd_name in _rooms.rooms() else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = self.sections()
        width = max(len(name) for names in sections.values() for name in names)
        for heading, names in sections.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            limit = formatter.width - width - 4
            with formatter.section(heading):
                formatter.write_dl([(f"{n:<{width}}", c.get_short_help_str(limit)) for n, c in found if c])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # Who reads has enough. Python would complain once more when it closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(BROKEN_PIPE)
        except click.exceptions.Exit:
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise


def root() -> click.Group:
    """The whole command line as a click group."""

    @click.group(
        "weightsmith",
        cls=Root,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog='weightsmith COMMAND --help says more of each. eval "$(weightsmith completion bash)" completes them.',
    )
    @click.version_option(__version__, message="%(prog)s %(version)s")
    @click.pass_context
    def weightsmith(ctx: click.Context) -> None:
        """Start, merge, prune, quantize and read the weights of neural networks.

        Weights are read from folders and files of safetensors, PyTorch, GGUF and npz, and from addresses
        such as s3://. No input is ever changed, no file is ever unpickled, and an output appears whole or
        not at all.
        """
        if os.environ.get("NO_COLOR"):
            ctx.color = False

    return weightsmith


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = root().main(args=given, prog_name="weightsmith", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt) as stopped:
        return _fail(str(stopped) or "interrupted", given, INTERRUPTED)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "weightsmith"
        return _fail(f"{error.format_message().rstrip('.')}; try {path} --help", given)
    except click.ClickException as error:
        return _fail(error.format_message(), given)
    except Error as error:
        return _fail(str(error), given)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", given)
    except MemoryError:
        return _fail("there is not enough memory; fewer --threads need less", given)


def _fail(message: str, given: Sequence[str], status: int = 2) -> int:
    """Say what went wrong: for people on standard error, with ``--json`` for programs as well."""
    from weightsmith.cli._output import clean

    for line in message.splitlines():
        click.echo(f"weightsmith: error: {clean(line)}", err=True)
    if "--json" in given:
        click.echo(json.dumps({"error": message}))
    return status
