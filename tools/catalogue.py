"""Keep what is generated from the methods' cards up to date, and find what is missing.

    python tools/catalogue.py --check    what is missing or stale, one line each; exit status 1 if anything is
    python tools/catalogue.py --write    write README tables and the list of public names again

Nothing of a room is imported: torch is not needed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from weightsmith.catalogue import Catalogue, Evidence, Method, check  # noqa: E402
from weightsmith.errors import Error  # noqa: E402

NAMES = "tools/public_names.txt"


def methods_table(methods: Sequence[Method]) -> str:
    """One row per room: its methods, each with its page."""
    lines = ["| room | methods |", "|---|---|"]
    for room in dict.fromkeys(method.room for method in methods):
        names = ", ".join(f"`{method.name}`" for method in methods if method.room == room)
        lines.append(f"| `ws.{room}` | {names} |")
    return "\n".join(lines)


def claims_table(evidence: Sequence[Evidence]) -> str:
    """One row per measured claim."""
    lines = ["| paper | what was asserted here | measured, 95 % interval | verdict |", "|---|---|---|---|"]
    for paper, measured in ((found.paper, one) for found in evidence for one in found.measured):
        if measured.result is not None:
            low, high = measured.result.interval
            figures = f"{measured.result.difference:+.3g} [{low:+.3g}, {high:+.3g}]"
            variant = f" ({measured.claim.variant})" if measured.claim.variant else ""
            cells = (paper.title + variant, measured.result.statement, figures, measured.verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def filled(text: str, tables: dict[str, str]) -> str:
    """``text`` with every table put between its ``<!-- name:start -->`` and ``<!-- name:end -->``.

    Raises:
        Error: a marker is not there, or there twice.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise Error(f"README.md: needs exactly one {start} with one {end} after it")
        between = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        text = between.sub(lambda _, s=start, t=table, e=end: f"{s}\n{t}\n{e}", text)
    return text


def generated(root: Path) -> dict[str, str]:
    """Every file that is generated, wholly or in part, by its path: the text it should have."""
    catalogue = Catalogue(root / "src" / "weightsmith")
    files = {NAMES: "\n".join(catalogue.public_names()) + "\n"}
    readme = root / "README.md"
    if readme.exists():
        tables = {"methods": methods_table(catalogue.methods), "claims": claims_table(catalogue.evidence)}
        text = readme.read_text(encoding="utf-8")
        wanted = {name: table for name, table in tables.items() if f"<!-- {name}:" in text}
        files["README.md"] = filled(text, wanted)
    return files


def stale(root: Path) -> list[str]:
    """The generated files whose text is not what it should be."""
    problems = []
    for name, text in generated(root).items():
        file = root / name
        found = file.read_text(encoding="utf-8") if file.exists() else ""
        if found != text:
            problems.append(f"{name}: stale{_difference(found, text)}; python tools/catalogue.py --write")
    return problems


def _difference(found: str, wanted: str) -> str:
    removed = sorted(set(found.splitlines()) - set(wanted.splitlines()))
    added = sorted(set(wanted.splitlines()) - set(found.splitlines()))
    parts = [f"{word} {lines[0].strip()[:60]!r}" for word, lines in (("lacks", added), ("still has", removed)) if lines]
    return f" ({', '.join(parts)})" if parts else ""


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="print what is missing or stale")
    what.add_argument("--write", action="store_true", help="write the generated files again")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.write:
            for name, text in generated(root).items():
                (root / name).write_text(text, encoding="utf-8")
            return 0
        problems = check(root / "src" / "weightsmith") + stale(root)
    except Error as error:
        problems = [str(error)]
    print("\n".join(problems) if problems else "nothing is missing")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
