"""Writes the generated pages before the build reads them: methods, papers, command line.

Pages of methods come from cards, signatures and docstrings read as text; the page of the command
line comes from the commands themselves.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

from weightsmith.catalogue import INTERNAL, Catalogue, Evidence, Measured, Method, Paper
from weightsmith.cli import root

_SPAN = re.compile(r"``(.+?)``|`(.+?)`|(?<![\w-])(--[a-z][\w-]*)")


# Words in reStructuredText


def prose(text: str) -> str:
    """Plain words, in which only code in backquotes and options such as ``--json`` are marked."""
    parts, last = [], 0
    for span in _SPAN.finditer(text):
        parts += [_escaped(text[last : span.start()]), f"``{span[1] or span[2] or span[3]}``"]
        last = span.end()
    return " ".join("".join([*parts, _escaped(text[last:])]).split())


def _escaped(text: str) -> str:
    return re.sub(r"([\\*`_|<>])", r"\\\1", text)


def heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * max(len(text), 3)}\n"


def indented(text: str, by: int = 3) -> str:
    return "\n".join(" " * by + line if line.strip() else "" for line in text.splitlines())


def list_table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), widths: str = "auto", style: str = "") -> str:
    """A table whose cells may hold markup; ``head`` and the CSS class ``style`` may be left out."""
    every = [head, *rows] if head else list(rows)
    lines = [".. list-table::", f"   :widths: {widths}"] + ["   :header-rows: 1"] * bool(head)
    lines += [f"   :class: {style}"] * bool(style) + [""]
    for row in every:
        for index, cell in enumerate(row):
            first, *rest = cell.splitlines() or [""]
            lines.append(f"   {'* -' if index == 0 else '  -'} {first}".rstrip())
            lines += [f"       {line}" if line else "" for line in rest]
    return "\n".join(lines) + "\n"


def label(method: Method) -> str:
    return "method-" + method.path.replace(".", "-").replace("_", "-")


def link(method: Method, text: str = "") -> str:
    return f":ref:`{text or method.path} <{label(method)}>`"


def badge(verdict: str) -> str:
    """A verdict, coloured by its class."""
    return f":{verdict.replace(' ', '-')}:`{verdict}`" if verdict else ""


ROLES = "".join(
    f".. role:: {name}\n   :class: verdict {name}\n"
    for name in ("holds", "does-not-hold", "undecided", "stale", "not-measured")
)


# One method


def method_page(method: Method, catalogue: Catalogue, evidence: dict[str, Evidence], config: Config) -> str:
    parts = [
        f"{ROLES}\n.. _{label(method)}:\n",
        heading(method.name),
        f".. py:function:: weightsmith.{method.call}\n   :no-index-entry:\n",
        indented(str(GoogleDocstring(public_words(method), config, what="function"))),
        "",
        heading("Card", "-"),
        list_table(card_rows(method, catalogue), widths="20 80"),
        heading("Does it do what the paper says?", "-") if method.covers else "",
        *(text for key in method.covers if key in evidence for text in verdict_texts(evidence[key])),
        heading("Source", "-"),
        f"``src/weightsmith/{method.file}``, line {method.line}; its test is ``{method.test}``.\n",
        ".. code-block:: python\n",
        indented(source(method, catalogue)),
    ]
    return "\n".join(parts) + "\n"


def public_words(method: Method) -> str:
    """The docstring for a caller: without what the room hands to its kernels, and told that it is lifted."""
    names = "|".join(name for name in INTERNAL if name not in {p.name for p in method.public})
    internal = rf"^    (?:{names}): .*\n(?:(?: {{8}}.*)?\n)*?(?=    \S|\S|\n)"
    text = method.docstring + "\n"
    text = re.sub(internal, "", text, flags=re.MULTILINE) if names else text
    if method.public == method.parameters:
        return text
    first, _, rest = text.partition("\n\n")
    room = f":ref:`How the methods of this room are called <room-{method.room.replace('.', '-')}>`"
    return f"{first}\n\nWhat follows is said of one tensor; the call works on whole weights. {room}.\n\n{rest}"


def card_rows(method: Method, catalogue: Catalogue) -> Iterator[tuple[str, str]]:
    passes = "the values are read once" if method.reads == 1 else "the values are read twice, first for statistics"
    yield "Paper", prose(method.paper)
    if method.claim:
        yield "It promises", prose(method.claim)
    if method.departs:
        yield "It departs", prose(method.departs)
    if method.needs:
        yield "It needs", ", ".join(f"``{need}``" for need in method.needs)
    yield "Computed per", f"{method.unit}; {passes}"
    if method.laws:
        laws = law_docs(catalogue, method.room)
        yield "Laws", "\n".join(f"| ``{law}``: {prose(laws.get(law, ''))}" for law in method.laws)


def verdict_texts(found: Evidence) -> Iterator[str]:
    """What was asserted of a paper, and what came out: one text for each claim."""
    if not found.measured:
        yield f"*{prose(found.paper.title)}* (``{found.paper.key}``): not measured here yet.\n"
    for measured in found.measured:
        yield verdict_text(found.paper, measured)


def verdict_text(paper: Paper, found: Measured) -> str:
    text = f"*{prose(paper.title)}* (``{found.claim.name}``): {prose(found.claim.statement)}.\n\n"
    if found.result is None:
        return text + badge(found.verdict) + "\n"
    low, high = found.result.interval
    r = found.result
    text += (
        f"{badge(found.verdict)} — {prose(r.method)} against {prose(r.baseline)}: {r.difference:+.3g}, "
        f"95 % interval {low:+.3g} to {high:+.3g} over {len(r.seeds)} seeds; asserted at least {r.margin:g}"
        f"{'' if r.higher_is_better else ' (lower figures are better, the sign is turned)'}.\n\n"
    )
    rows = [
        (prose(name), *(f"{value:.4g}" for value in (statistics.fmean(values), min(values), max(values))))
        for name, values in r.figures.items()
    ]
    return text + list_table(rows, ("figure", "mean", "lowest seed", "highest seed"))


def source(method: Method, catalogue: Catalogue) -> str:
    """The kernel without its card and docstring."""
    text = (catalogue.package / method.file).read_text(encoding="utf-8")
    lines = text.splitlines()
    found = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == method.name)
    shown = lines[found.lineno - 1 : found.body[0].lineno - 1]
    return "\n".join(shown + lines[(found.body[0].end_lineno or 0) : found.end_lineno])


def law_docs(catalogue: Catalogue, room: str) -> dict[str, str]:
    """The first paragraph of every law of a room."""
    file = catalogue.package.joinpath(*room.split("."), "laws.py")
    if not file.exists():
        return {}
    body = ast.parse(file.read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return {f.name: " ".join((ast.get_docstring(f) or "").split("\n\n")[0].split()) for f in functions}


# One room, and all rooms


def room_page(room: str, catalogue: Catalogue, evidence: dict[str, Evidence]) -> str:
    methods = [m for m in catalogue.methods if m.room == room]
    about, calling = catalogue.about(room)
    rows = [(link(m, m.name), prose(m.summary), verdicts(m, evidence)) for m in methods]
    parts = [
        ROLES,
        f".. _room-{room.replace('.', '-')}:\n",
        heading(room),
        about,
        "",
        list_table(rows, ("method", "what it does", "claim"), "25 55 20"),
    ]
    if calling:
        parts += [heading("How they are called", "-"), calling, ""]
    contents = "\n".join(f"   {m.name}" for m in methods)
    parts.append(f".. toctree::\n   :hidden:\n\n{contents}\n")
    laws = law_docs(catalogue, room)
    used = {law: [link(m, m.name) for m in methods if law in m.laws] for law in laws}
    if any(used.values()):
        rows = [(f"``{law}``", prose(laws[law]), ", ".join(who)) for law, who in used.items() if who]
        parts += [heading("Laws", "-"), list_table(rows, ("law", "what it says", "who keeps it"), "20 45 35")]
    return "\n".join(parts) + "\n"


def verdicts(method: Method, evidence: dict[str, Evidence]) -> str:
    return " ".join(badges(evidence[key]) for key in method.covers if key in evidence)


def badges(found: Evidence) -> str:
    """The verdicts on a paper's claims."""
    return " ".join(badge(measured.verdict) for measured in found.measured)


def rooms_page(catalogue: Catalogue) -> str:
    rooms = [room for room in catalogue.tables if any(m.room == room for m in catalogue.methods)]
    rows = []
    for room in rooms:
        names = ", ".join(link(m, m.name) for m in catalogue.methods if m.room == room)
        rows.append((f":ref:`{room} <room-{room.replace('.', '-')}>`", names))
    contents = "\n".join(f"   {room}/index" for room in rooms)
    text = "Every method is a function from weights to weights. A room holds those of one signature.\n"
    tree = f".. toctree::\n   :hidden:\n\n{contents}\n" if rooms else ""
    return "\n".join([heading("Methods"), text, list_table(rows, ("room", "methods"), "20 80") if rows else "", tree])


# Papers


def papers_page(evidence: Sequence[Evidence]) -> str:
    done = [e for e in evidence if e.methods]
    measured = [m for e in evidence for m in e.measured if m.result is not None]
    papers = sum(any(m.result is not None for m in e.measured) for e in evidence)
    verdict = {word: sum(m.verdict == word for m in measured) for word in ("holds", "does not hold", "undecided")}
    counts = ", ".join(f"{count} {badge(word)}" for word, count in verdict.items() if count)
    parts = [
        ROLES,
        heading("Papers"),
        f"The catalogue has {len(evidence)} papers. {len(done)} have a method here, {papers} a measured claim; "
        f"{len(measured)} claims were measured"
        + (f": {counts}" if counts else "")
        + ". This page is made from the methods' cards and the results that are kept; nobody types it.\n",
        heading("What works", "-"),
        *_works(evidence),
        heading("What does not exist here yet", "-"),
        *_open(evidence),
    ]
    return "\n".join(parts)


def _works(evidence: Sequence[Evidence]) -> Iterator[str]:
    for family, members in by_family(e for e in evidence if e.methods or e.measured):
        yield heading(family, "~")
        yield list_table((_paper_row(e) for e in members), ("paper", "claim", "methods and tests"), "45 15 40", "wide")


def _paper_row(found: Evidence) -> tuple[str, str, str]:
    places = [f"| {link(m)}\n| ``{m.file}:{m.line}``\n| ``{m.test}``" for m in found.methods]
    return f"| {prose(found.paper.title)}\n| ``{found.paper.key}``", badges(found), "\n".join(places)


def _open(evidence: Sequence[Evidence]) -> Iterator[str]:
    for family, members in by_family(e for e in evidence if not e.methods and not e.measured):
        yield heading(family, "~")
        yield "\n".join(f"- {prose(e.paper.title)} (``{e.paper.key}``)" for e in members) + "\n"


def by_family(evidence: Iterable[Evidence]) -> list[tuple[str, list[Evidence]]]:
    found: dict[str, list[Evidence]] = {}
    for each in evidence:
        found.setdefault(each.paper.family, []).append(each)
    return sorted(found.items())


# The command line


def cli_page() -> str:
    """Every command with its options, examples and exit statuses."""
    return heading("Command line") + "\n" + "\n".join(_command(root(), ["weightsmith"]))


def _command(command: click.Command, path: list[str]) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(path))
    if len(path) > 1:
        yield f".. _cli-{'-'.join(path[1:])}:\n"
        yield heading(" ".join(path[1:]), '-~^"'[min(len(path) - 2, 3)])
    yield f".. code-block:: text\n\n   {' '.join([*path, *command.collect_usage_pieces(context)])}\n"
    yield _help(command.help or "") + "\n"
    yield from _options(command, context)
    if examples := getattr(command, "examples", ()):
        text = "\n\n".join(f"# {does}\n{line}" for line, does in examples)
        yield f".. rubric:: Examples\n\n.. code-block:: sh\n\n{indented(text)}\n"
    if status := getattr(command, "status", {}):
        yield "Exit status: " + "; ".join(f"{code}, {prose(means)}" for code, means in status.items()) + ".\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from _command(inner, [*path, name])


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    """The options under their headings, in the order of the help."""
    sections: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1] and not {"--help", "--version"} & set(parameter.opts):
            text = f"``{record[0]}``\n   {prose(record[1])}\n"
            sections.setdefault(getattr(parameter, "section", "Options"), []).append(text)
    for section in sorted(sections, key=lambda section: section == "Other options"):
        yield f".. rubric:: {section}\n"
        yield "\n".join(sections[section])


def _help(text: str) -> str:
    """A command's words. Paragraphs that click is told not to wrap stay as they are."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\f", "").strip())
    return "\n\n".join(_kept(p) if p.lstrip().startswith("\b") else prose(p) for p in paragraphs)


def _kept(paragraph: str) -> str:
    return ".. code-block:: text\n\n" + indented(paragraph.replace("\b", "").strip("\n"))


# The noun


def api_page() -> str:
    """What the package itself exports, from its docstrings."""
    parts = [
        heading("Weights, in full"),
        ".. autofunction:: weightsmith.open\n",
        ".. autoclass:: weightsmith.Weights\n   :members:\n   :exclude-members: items, keys, values, get\n",
        ".. autoclass:: weightsmith.Spec\n   :members: numel, nbytes\n",
        ".. autoclass:: weightsmith.by_depth\n   :members: at\n",
        heading("Progress", "-"),
        ".. automodule:: weightsmith.progress\n   :members:\n",
        heading("Errors", "-"),
        ".. automodule:: weightsmith.errors\n   :members: Error, FormatError, OutputError, MissingPackage\n",
    ]
    return "\n".join(parts)


# All of it


def pages(config: Config) -> dict[str, str]:
    """Every generated page by its path below the documentation's folder."""
    catalogue = Catalogue()
    by_key = {found.paper.key: found for found in catalogue.evidence}
    made = {"methods/index.rst": rooms_page(catalogue), "generated/papers.rst": papers_page(catalogue.evidence)}
    made |= {"generated/cli.rst": cli_page(), "generated/api.rst": api_page()}
    for room in dict.fromkeys(method.room for method in catalogue.methods):
        made[f"methods/{room}/index.rst"] = room_page(room, catalogue, by_key)
    for method in catalogue.methods:
        made[f"methods/{method.room}/{method.name}.rst"] = method_page(method, catalogue, by_key, config)
    return made


def write(app: Sphinx) -> None:
    """Write the pages that changed, and remove those that are no more."""
    made = pages(app.config)
    root = Path(app.srcdir)
    for folder in ("methods", "generated"):
        for file in (root / folder).rglob("*.rst"):
            if file.relative_to(root).as_posix() not in made:
                file.unlink()
    for name, text in made.items():
        file = root / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
