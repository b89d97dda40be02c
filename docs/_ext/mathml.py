"""Formulas as MathML, which browsers show by themselves: no script, no font, no network."""

from __future__ import annotations

import html
import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

_SAME = {r"\dots": r"\ldots", r"\lVert": r"\|", r"\rVert": r"\|", r"\big": r"\bigl", r"\Big": r"\Bigl"}
"""Commands that the converter does not know, and what means the same."""


def mathml(tex: str, node: nodes.Node, as_block: bool) -> str:
    """The formula as MathML; one that cannot be read is warned about and shown as it was written."""
    for command, known in _SAME.items():
        tex = re.sub(re.escape(command) + r"(?![a-zA-Z])", lambda _, k=known: k, tex)
    if as_block and r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        # The modifier letter that the converter takes for a bar is missing from many fonts.
        return tex2mathml(tex.strip(), as_block=as_block).replace("\u02c9", "\u00af")
    except (MathError, IndexError, ValueError) as error:
        logger.warning("formula %r: %s", tex, error, location=node)
        return f"<code>{html.escape(tex)}</code>"


def visit_inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), node, as_block=False))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="formula"))
    self.body.append(mathml(node.astext(), node, as_block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
