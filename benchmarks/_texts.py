"""Texts of one kind each, from Debian packages: computer prose to calibrate on, other computer prose, the Bible.

    apt-get install debian-handbook python3-doc bible-kjv bible-kjv-text

No two are from the same source, and none is from the data of any model here by design.
"""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
HOWTO = "/usr/share/doc"


def handbook() -> str:
    """Prose of the Debian Administrator's Handbook: its paragraphs, without what is shown of screens and files."""
    paragraphs = []
    for page in sorted(HANDBOOK.glob("*.html")):
        for part in page.read_text(encoding="utf-8").split('<div class="para">')[1:]:
            words = html.unescape(re.sub(r"<[^>]+>", "", re.split(r"</div>|<pre|<div|<table|<ul", part)[0]))
            paragraphs.append(" ".join(words.split()))
    return "\n\n".join(dict.fromkeys(one for one in paragraphs if len(one) > 200))


def howto() -> str:
    """Sources of Python's how-to guides."""
    pages = sorted(Path(HOWTO).glob("python3*/html/_sources/howto/*.rst.txt"))
    return "\n\n".join({page.name: page.read_text(encoding="utf-8") for page in pages}.values())


def bible() -> str:
    """The King James Bible, without the numbers of verses."""
    said = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    return "\n".join(re.sub(r"^\S+ ", "", line) for line in said.splitlines())


def written(folder: Path) -> dict[str, Path]:
    """All of them as files.

    Raises:
        SystemExit: one is not there, with the packages that hold them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for name, read in (("handbook", handbook), ("howto", howto), ("bible", bible)):
        try:
            text = read()
        except (OSError, subprocess.CalledProcessError):
            text = ""
        if len(text) < 100_000:
            raise SystemExit(
                f"the text of {name} is not here: apt-get install debian-handbook python3-doc bible-kjv-text"
            )
        places[name] = folder / f"{name}.txt"
        places[name].write_text(text, encoding="utf-8")
    return places
