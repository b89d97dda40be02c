"""``weightsmith look``: a page to browse checkpoints with."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from weightsmith.cli._manual import PATH, Manual, input_options, json_option, option
from weightsmith.cli._output import clean, plural, size

if TYPE_CHECKING:
    from weightsmith.look import Server
    from weightsmith.weights import Weights

_PAGE = "The page"


def command() -> click.Command:
    """The ``look`` command."""

    @click.command(
        "look",
        cls=Manual,
        short_help="Browse checkpoints on a local page: values, spectra, changes.",
        examples=[
            ("weightsmith look model/", "Every tensor: figures, histogram, singular values, picture."),
            ("weightsmith look base/ tuned/", "The same of two, and what changed from the first to the second."),
            ("weightsmith look model/ --no-browser --port 8080", "For a machine far away: ssh -L 8080:127.0.0.1:8080."),
        ],
        status={0: "it was stopped with Ctrl-C", 2: "something was wrong; a line says what"},
    )
    @click.argument("paths", type=PATH, nargs=-1, required=True)
    @option("--port", type=click.IntRange(0, 65535), default=0, section=_PAGE, help="0 takes a free one.  [default: 0]")
    @option("--no-browser", is_flag=True, section=_PAGE, help="Print the address and open nothing.")
    @input_options
    @json_option
    def look(
        paths: tuple[str, ...], port: int, no_browser: bool, at: str | None, input_format: str | None, as_json: bool
    ) -> None:
        """Browse the checkpoints PATHS on a page of this machine until Ctrl-C.

        Only headers are read at first. Figures, histograms, singular values and pictures of a tensor
        are computed when its page asks for them, piece by piece, at most two at a time. With two
        checkpoints or more, any can be set against any other.

        The page is for you alone: the server listens on 127.0.0.1, and the address ends with a token
        that others do not have. With --json the address is printed as JSON and no browser is opened;
        nor is one where there is no desktop.
        """
        from weightsmith import open as open_weights
        from weightsmith.look import Server
        from weightsmith.look._answers import title_of

        opened = [(title_of(path), open_weights(path, at=at, format=input_format)) for path in paths]
        server = Server(opened, port)
        with _terminable():
            try:
                _announce(server, opened, as_json)
                if not (no_browser or as_json) and sys.stdout.isatty() and has_desktop():
                    threading.Thread(target=_browse, args=(server,), daemon=True).start()
                server.serve()
            except KeyboardInterrupt:
                if not as_json:
                    click.echo("stopped", err=True)
            finally:
                server.close()
        if not server.answers.jobs.idle(1.0):
            # A decomposition cannot be called off half way, and Python cannot end properly beneath it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    return look


def _announce(server: Server, opened: Sequence[tuple[str, Weights]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": server.url, "port": server.port, "token": server.token, "pid": os.getpid()}))
    else:
        for title, weights in opened:
            click.echo(f"{clean(title)}: {plural(len(weights), 'tensor')}, {size(weights.nbytes)}")
        click.echo(f"\n  {server.url}\n\nThe token lets whoever has it read these weights. Ctrl-C stops the server.")
    sys.stdout.flush()


def _browse(server: Server) -> None:
    import webbrowser

    webbrowser.open(server.ticket_url())


def has_desktop() -> bool:
    """Whether a window can be opened; in a bare terminal a browser would take the terminal itself."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite signal to end does what Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
