"""Run a mergekit file: what it makes, written with a card to where the caller says."""

from __future__ import annotations

from weightsmith.recipe import _model_card
from weightsmith.recipe._plan import Planned, estimate, told
from weightsmith.recipe._read import Foreign
from weightsmith.recipe._run import is_folder
from weightsmith.recipe._save import Settings
from weightsmith.weights import Saved, Weights

CONFIG = "mergekit_config.yml"
"""What mergekit calls the copy of its file."""


def plan(recipe: Foreign, path: str, settings: Settings | None = None) -> Planned:
    """What it would take; see `weightsmith.recipe.plan`."""
    settings = settings or Settings()
    weights = recipe.build()
    taken = weights.planned(path, **settings.planning({}))
    return told(taken, path, "merge", {}, estimate(weights, taken.writes, settings.threads))


def run(recipe: Foreign, path: str, settings: Settings | None = None) -> Saved:
    """Build and write it. The card and the file itself stand beside the tensors."""
    settings = settings or Settings()
    weights = recipe.build()
    if is_folder(path):
        weights = weights.with_files(_files(recipe, path, weights))
    return weights.save(path, **settings.saving({}))


def _files(recipe: Foreign, path: str, weights: Weights) -> dict[str, bytes]:
    title = path.rstrip("/").rpartition("/")[2]
    sources = getattr(recipe.plan, "references", ())
    text = _model_card.card(title, recipe.text, weights, sources, name=CONFIG)
    return {"README.md": text.encode(), CONFIG: recipe.text.encode()}
