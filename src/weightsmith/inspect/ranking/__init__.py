"""Who is best over many tasks or many games: rankings from scores and from comparisons, with intervals.

The signature of the room: ``(scores [systems, tasks] or wins [systems, systems]) -> Report``.
"""

from weightsmith.card import table

METHODS = table()
