"""The ``README.md`` of an output, with the front matter that the Hugging Face Hub reads, and the recipe itself.

Nothing in it depends on the time or the machine, so the same recipe makes the same files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith._version import __version__
from weightsmith.recipe._yaml import Node, plain, scalar
from weightsmith.weights import Weights, dtype_name

if TYPE_CHECKING:
    from weightsmith.recipe._run import Row
    from weightsmith.recipe._schema import Output, Recipe
    from weightsmith.recipe._sweep import Variant

RECIPE = "recipe.yaml"

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+$")


def files(
    recipe: Recipe, variant: Variant, output: Output, weights: Weights, rows: Sequence[Row] = ()
) -> dict[str, bytes]:
    """The card and the recipe of an output of a recipe."""
    text = written(variant.recipe.document)
    sources = [str(given.path.value) for given in recipe.inputs.values()]
    title = recipe.title or variant.path(output).rstrip("/").rpartition("/")[2]
    table = [
        (row.weights, row.figures)
        for row in rows
        if all(variant.values.get(key) == value for key, value in row.values.items())
    ]
    return {"README.md": card(title, text, weights, sources, table).encode(), RECIPE: text.encode()}


def card(
    title: str,
    recipe: str,
    weights: Weights,
    sources: Iterable[str] = (),
    figures: Iterable[tuple[str, Mapping[str, float]]] = (),
    name: str = RECIPE,
) -> str:
    """A model card in Markdown.

    Args:
        title: its heading.
        recipe: the text of the recipe.
        weights: what the card is of.
        sources: names or paths of the models it was made from; those that may be names on the Hub are listed in
            the front matter.
        figures: what was measured, by checkpoint.
        name: the file beside the tensors that holds the recipe.
    """
    parts = [_front(weights, sources), f"# {_line(title)}", _about(weights)]
    rows = [(of, found) for of, found in figures if found]
    if rows:
        parts += ["## Measured", _table(rows)]
    parts += ["## How it was made", _fenced(str(weights.lineage), "text")]
    parts += ["## Recipe", f"Saved beside the tensors as `{name}`:", _fenced(recipe, "yaml")]
    return "\n\n".join(parts) + "\n"


def _front(weights: Weights, sources: Iterable[str]) -> str:
    lines = ["---"]
    if "config.json" in weights.files:
        lines.append("library_name: transformers")
    named = [source for source in dict.fromkeys(sources) if _HUB.match(source) and not os.path.exists(source)]
    if named:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in named)]
    return "\n".join([*lines, "tags:", "- merge", "- weightsmith", "---"])


def _about(weights: Weights) -> str:
    dtypes = sorted({dtype_name(spec.dtype) for spec in weights.specs.values()})
    return (
        f"Made with weightsmith {__version__}: {len(weights) - len(weights.ties):,} tensors, "
        f"{weights.numel:,} parameters, {', '.join(dtypes)}."
    )


def _table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    names = list(dict.fromkeys(name for _, figures in rows for name in figures))
    head = ["| checkpoint | " + " | ".join(map(_escaped, names)) + " |", "|---|" + "---:|" * len(names)]
    body = [
        f"| {_escaped(of)} | " + " | ".join(_number(figures.get(name)) for name in names) + " |" for of, figures in rows
    ]
    return "\n".join([*head, *body])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _line(text: str) -> str:
    return _escaped(text) or "A model"


def _escaped(text: str) -> str:
    """Words of a user's in one line of Markdown: no heading, link, tag or cell of its own."""
    return re.sub(r"([\\`*\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def written(document: Node) -> str:
    """A document as YAML again, with the values that it has now."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what `load` would take for something else than a text: ``1e-5`` is one to PyYAML, not to us."""

    def text(dumper: Any, value: str) -> Any:
        style = None if isinstance(scalar(value), str) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(plain(document), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
