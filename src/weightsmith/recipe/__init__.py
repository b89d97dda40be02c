"""Many steps in one file: inputs, methods with their options, outputs, figures of merit, sweeps.

A recipe is read and checked in full, with line and column, before anything runs; then it is built
lazily, so that steps which can stream run together in one pass over the bytes. Files written for
mergekit are recipes too. Knows every room, and owns no knowledge of any method.
"""

from weightsmith.recipe._explain import Line, explain
from weightsmith.recipe._plan import Planned, plan
from weightsmith.recipe._read import Foreign, Recipe, read
from weightsmith.recipe._run import Ran, Row, run
from weightsmith.recipe._save import Settings

__all__ = ["Foreign", "Line", "Planned", "Ran", "Recipe", "Row", "Settings", "explain", "plan", "read", "run"]
