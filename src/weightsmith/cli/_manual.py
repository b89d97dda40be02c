"""Commands whose help reads like a manual page: sections of options, examples, exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

USUAL = {0: "it went well", 2: "something was wrong; a line that starts with weightsmith: error says what"}
"""Exit status of most commands."""

SAVING = USUAL | {130: "interrupted; the same command with --resume goes on"}
"""Exit status of commands with an output."""


class Option(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, section: str = "Other options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        # That a number of workers is at least one goes without saying.
        return {key: value for key, value in super().get_help_extra(ctx).items() if key != "range"}


def option(*names: str, section: str = "Other options", **fields: Any) -> Callable[[Any], Any]:
    """``click.option`` with a heading."""
    return click.option(*names, cls=Option, section=section, **fields)


def json_option(command: Any) -> Any:
    """``--json``, which every command has."""
    return option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(command)


class Manual(click.Command):
    """A command with examples and exit statuses.

    Args:
        examples: pairs of a command line and what it does.
        status: exit status and what it means.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]] = (),
        status: dict[int, str] = USUAL,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.status = dict(status)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Other options"), []).append(record)
        for heading in sorted(sections, key=lambda heading: heading == "Other options"):
            with formatter.section(heading):
                formatter.write_dl(sections[heading], col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for line, does in self.examples:
                    # Not through write_text: a command line must not be broken in two.
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
                    formatter.indent()
                    formatter.write_text(does)
                    formatter.dedent()
        with formatter.section("Exit status"):
            formatter.write_dl([(str(code), means) for code, means in self.status.items()])


class Some(click.ParamType):
    """Any word, with usual ones for the shell to complete."""

    def __init__(self, name: str, *usual: str):
        self.name, self.usual = name, usual

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name.upper()

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self.usual if word.startswith(incomplete)]


PATH = click.Path()
"""A file, a folder or an address; whether it is there is for the library to say."""

DTYPE = Some("dtype", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
INPUT_FORMAT = click.Choice(["safetensors", "pt", "gguf", "npz"])
OUTPUT_FORMAT = click.Choice(["safetensors", "pt", "npz"])

_SELECTING = "Which tensors"
_READING = "Reading"


def pattern_option(command: Any) -> Any:
    """``--pattern``, repeatable."""
    text = "Only tensors whose name fits: a glob ('*.weight') or an expression ('re:layers\\.[0-3]\\.'). Repeatable."
    return option("--pattern", "-p", multiple=True, metavar="PATTERN", section=_SELECTING, help=text)(command)


def drop_option(command: Any) -> Any:
    """``--drop``, repeatable."""
    text = "Leave out tensors whose name fits. Repeatable."
    return option("--drop", multiple=True, metavar="PATTERN", section=_SELECTING, help=text)(command)


def input_options(command: Any) -> Any:
    """What `weightsmith.open` takes beside the path."""
    for decorate in (
        option("--at", metavar="NAME", section=_READING, help="Part of a nested PyTorch file, such as state_dict."),
        option(
            "--input-format", type=INPUT_FORMAT, section=_READING, help="Which weights of a folder that has several."
        ),
    ):
        command = decorate(command)
    return command


def threads_option(command: Any) -> Any:
    """``--threads``."""
    text = "Workers.  [default: one a core]"
    return option("--threads", type=click.IntRange(1), metavar="N", section=_READING, help=text)(command)
