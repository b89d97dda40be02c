"""One self-contained HTML page: it asks for nothing from anywhere and follows the reader's colours.

The page is made of small pieces (`section`, `table`, `figure`, `code`), each a function from plain
values to HTML in which everything is escaped. No script is used. Drawings are matplotlib figures
drawn in the colours of `COLOURS`; `themed_svg` turns those into CSS variables, so that the same
drawing is light or dark with the page, and its text stays text.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#00f001",
    "muted": "#00f002",
    "rule": "#00f003",
    "paper": "#00f004",
    "panel": "#00f005",
    "blue": "#00f006",
    "orange": "#00f007",
    "green": "#00f008",
    "violet": "#00f009",
}
"""Colours to draw with. They are place holders: `themed_svg` replaces each by the variable of its name."""

LIGHT = {
    "ink": "#1b1f23",
    "muted": "#57606a",
    "rule": "#d0d7de",
    "paper": "#ffffff",
    "panel": "#f6f8fa",
    "blue": "#0b62c4",
    "orange": "#a85200",
    "green": "#1a7f37",
    "violet": "#7a3fbf",
}
"""The colours of a light page, for a drawing that stands alone."""

_DARK = {
    "ink": "#e6e8ea",
    "muted": "#a3adb6",
    "rule": "#39424a",
    "paper": "#14171a",
    "panel": "#1d2227",
    "blue": "#6cb0ff",
    "orange": "#f0a35e",
    "green": "#5cc773",
    "violet": "#c19bff",
}

_STYLE = """
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
footer { padding-bottom: 3rem; color: var(--muted); font-size: .9rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; line-height: 1.4; margin: 1.5rem 0 .4rem; }
p, ul, ol { margin: .5rem 0; max-width: 46rem; }
ul, ol { padding-left: 1.3rem; }
li { margin: .25rem 0; }
a { color: var(--blue); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
.lead { font-size: 1.08rem; }
.note { color: var(--muted); font-size: .92rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86rem; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .6rem .75rem;
  margin: .5rem 0; overflow-x: auto; line-height: 1.5; max-width: 100%; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--muted); }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
.scroll { overflow-x: auto; margin: .75rem 0; }
.hint { display: none; color: var(--muted); font-size: .92rem; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .92rem; padding: 0 0 .4rem; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap; background: var(--paper); }
thead th { vertical-align: bottom; color: var(--muted); font-weight: 600; white-space: normal; min-width: 4.5rem; }
th[scope=row], thead th:first-child { text-align: left; position: sticky; left: 0; font-weight: 600; }
th[scope=row] { white-space: normal; min-width: 8rem; max-width: 18rem; line-height: 1.4; overflow-wrap: anywhere; }
th.name { min-width: 13rem; }
td small, th small { display: block; color: var(--muted); font-weight: 400; font-size: .82rem; }
td.words, thead th.words { text-align: left; }
td.long { white-space: normal; min-width: 12rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem;
  align-items: start; }
figure { margin: .75rem 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: .92rem; margin-top: .4rem; max-width: 30rem; }
@media (max-width: 48rem) { .hint { display: block; } }
@media (max-width: 30rem) {
  h1 { font-size: 1.45rem; }
  th, td { padding: .35rem .5rem; }
  th[scope=row] { min-width: 6.5rem; max-width: 7.5rem; }
}
@media print {
  body { font-size: 10pt; }
  nav, .hint { display: none; }
  header, main, footer { max-width: none; padding: 0; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; }
  th[scope=row], thead th:first-child { position: static; }
  thead th { min-width: 0; }
  .figures { grid-template-columns: 1fr 1fr; }
}
"""


_LONG = 32  # letters from which the words of a cell may be broken into lines
_NAME = 24  # and those of the name of a row


@dataclass(frozen=True)
class Cell:
    """What stands in a table's cell: a value, and a smaller line under it."""

    text: str
    under: str = ""
    is_words: bool = False
    """Words are set from the left and may wrap; figures are set from the right."""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; ``body`` is HTML."""

    key: str
    heading: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """A whole HTML document.

    Args:
        title: text; the heading, and the name of the window.
        lead: HTML under the heading.
        sections: in order; listed in the contents where there are several.
        footer: HTML at the end.
    """
    links = "".join(f'<li><a href="#{escape(one.key)}">{escape(one.heading)}</a></li>' for one in sections)
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    body = "\n".join(
        f'<section aria-labelledby="{escape(one.key)}">\n<h2 id="{escape(one.key)}">{escape(one.heading)}</h2>\n'
        f"{one.body}\n</section>"
        for one in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{colours()}{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{lead}
{contents}
</header>
<main>
{body}
</main>
<footer>
{footer}
</footer>
</body>
</html>
"""


def colours() -> str:
    def block(values: Mapping[str, str]) -> str:
        return ":root {" + "".join(f" --{name}: {value};" for name, value in values.items()) + " }"

    dark = f"@media screen and (prefers-color-scheme: dark) {{ {block(_DARK)} }}"
    return f"\n:root {{ color-scheme: light dark; }}\n{block(LIGHT)}\n{dark}"


def paragraph(text: str, kind: str = "") -> str:
    """Text as a paragraph; ``kind`` is ``"lead"`` or ``"note"``."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """Lines of text as a list."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def code(text: str) -> str:
    """Source or plain output, as it stands. It can be scrolled with the keyboard."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def folded(summary: str, body: str) -> str:
    """HTML that opens when its summary is chosen."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{body}\n</details>"


def table(key: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table whose first column names the rows. Wider than the screen, it scrolls on its own.

    Keep the caption short: it is as wide as the table and so cannot be broken on a phone.
    """
    words = [any(row[index].is_words for row in rows) for index in range(len(columns))]
    kinds = [' class="words"' if is_words else "" for is_words in words]
    head = "".join(f'<th scope="col"{kind}>{escape(column)}</th>' for column, kind in zip(columns, kinds, strict=True))
    body = "\n".join(f"<tr>{_header(row[0])}{''.join(_cell(cell) for cell in row[1:])}</tr>" for row in rows)
    return (
        '<p class="hint" aria-hidden="true">The table scrolls sideways.</p>\n'
        f'<div class="scroll" role="region" aria-labelledby="{escape(key)}" tabindex="0">\n'
        f'<table>\n<caption id="{escape(key)}">{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _header(cell: Cell) -> str:
    if len(cell.text) < _NAME:
        return f'<th scope="row">{_content(cell)}</th>'
    # Names of tensors and files are broken after a dot, a stroke or a line.
    broken = re.sub(r"(?<=[._/])(?=[A-Za-z0-9])", "<wbr>", escape(cell.text))
    return f'<th scope="row" class="name">{_content(cell, broken)}</th>'


def _cell(cell: Cell) -> str:
    kind = f"words{' long' * (len(cell.text) > _LONG)}"
    return f'<td class="{kind}">{_content(cell)}</td>' if cell.is_words else f"<td>{_content(cell)}</td>"


def _content(cell: Cell, text: str | None = None) -> str:
    return (escape(cell.text) if text is None else text) + (
        f" <small>{escape(cell.under)}</small>" if cell.under else ""
    )


def figures(drawn: Sequence[str]) -> str:
    """Figures beside each other where there is room."""
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"


def figure(drawing: Figure, key: str, caption: str, alternative: str, *, wide: bool = False) -> str:
    """A drawing with its caption.

    Args:
        drawing: drawn in `COLOURS`.
        key: a word that no other drawing of the page has.
        caption: text under it.
        alternative: what the drawing shows, in words, for who does not see it.
        wide: it keeps its own width, and scrolls where that is more than there is.
    """
    drawn = themed_svg(drawing, key, alternative)
    if wide:
        width = f'<svg style="width: {drawing.get_figwidth() * 6:.1f}rem; max-width: none"'
        drawn = (
            f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">\n'
            f"{drawn.replace('<svg', width, 1)}\n</div>"
        )
    return f"<figure>\n{drawn}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def drawing_style(key: str, colours: Mapping[str, str] = COLOURS) -> AbstractContextManager[Any]:
    """The matplotlib settings under which a drawing is made and written; by default one for a page."""
    import matplotlib

    ink, muted, rule = colours["ink"], colours["muted"], colours["rule"]
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": key,
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.edgecolor": muted,
            "axes.labelcolor": ink,
            "axes.titlecolor": ink,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "figure.facecolor": "none",
            "grid.color": rule,
            "grid.linewidth": 0.6,
            "text.color": ink,
            "xtick.color": muted,
            "ytick.color": muted,
            "xtick.labelcolor": ink,
            "ytick.labelcolor": ink,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.6,
        }
    )


def themed_svg(drawing: Figure, key: str, alternative: str) -> str:
    """A matplotlib figure as an ``<svg>`` to be put into a page.

    Its colours are those of the page, its text is text in the page's font, and it scales with the
    width it is given. What matplotlib says of itself (with addresses) is left out.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with drawing_style(key):
        FigureCanvasSVG(drawing).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    # A style element inside a drawing would hold for the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    text = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = _own_names(text, key)
    text = re.sub(r"(font: [\d.]*(?: ?\w+)* ?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    size = re.search(r'viewBox="[^"]*"', text)
    opening = f'<svg {size[0] if size else ""} role="img" aria-label="{escape(alternative)}">'
    text = re.sub(r"<svg.*?>", lambda _: opening, text, count=1, flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n", text).strip()


def _own_names(text: str, key: str) -> str:
    """Ids that are referred to get the key before them; the others go, as they repeat in every drawing."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r'\s+id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", text)


def written(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Put a page, or any small file, in its place: whole or not at all.

    Raises:
        OutputError: it cannot be written there.
    """
    place = Path(os.path.expanduser(path))
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(place)
    except OSError as error:
        raise OutputError(f"{os.fspath(path)}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return place
