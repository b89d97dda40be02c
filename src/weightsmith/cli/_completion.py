"""``weightsmith completion``: let the shell complete commands, options and paths."""

from __future__ import annotations

import os

import click

from weightsmith.cli._manual import Manual
from weightsmith.errors import Error

SHELLS = ("bash", "zsh", "fish")


def command() -> click.Command:
    """The ``completion`` command."""

    @click.command(
        "completion",
        cls=Manual,
        short_help="A script that lets the shell complete commands and options.",
        examples=[
            ('eval "$(weightsmith completion bash)"', "In ~/.bashrc, for bash 4.4 or newer."),
            ('eval "$(weightsmith completion zsh)"', "In ~/.zshrc."),
            ("weightsmith completion fish | source", "In ~/.config/fish/config.fish."),
        ],
    )
    @click.argument("shell", type=click.Choice(SHELLS), required=False)
    @click.pass_context
    def completion(ctx: click.Context, shell: str | None) -> None:
        """Print a script for SHELL to read, after which it completes commands, options and file names.

        Without SHELL it is the one that the environment variable SHELL names.
        """
        from click.shell_completion import get_completion_class

        shell = shell or _current()
        kind = get_completion_class(shell)
        assert kind is not None
        # Not source(): that looks for the shell on this machine, and the script may be meant for another.
        made = kind(ctx.find_root().command, {}, "weightsmith", "_WEIGHTSMITH_COMPLETE")
        click.echo(made.source_template % made.source_vars())

    return completion


def _current() -> str:
    shell = os.path.basename(os.environ.get("SHELL", ""))
    if shell not in SHELLS:
        raise Error(f"cannot tell which shell this is (SHELL is {shell!r}); name one of {', '.join(SHELLS)}")
    return shell
