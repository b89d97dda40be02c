"""Who is best over many tasks or many games: rankings from scores and from comparisons, with intervals.

The signature of the room: ``(scores [systems, tasks] or wins [systems, systems]) -> Report``. A report has a
row per system, the best first, and where tasks or games can be drawn again, how the ranks vary.
"""

from weightsmith.card import table
from weightsmith.inspect.ranking._borda import borda, kemeny, kemeny_order, kendall_tau
from weightsmith.inspect.ranking._bradley_terry import Strengths, bradley_terry, components, strengths
from weightsmith.inspect.ranking._consensus import breakdown, consensus_ranking, pairwise, weak_order_distance
from weightsmith.inspect.ranking._nash import hodge, nash_average
from weightsmith.inspect.ranking._votes import condorcet_winner, vote, winning_weights

__all__ = [
    "Strengths",
    "borda",
    "bradley_terry",
    "breakdown",
    "components",
    "condorcet_winner",
    "consensus_ranking",
    "hodge",
    "kemeny",
    "kemeny_order",
    "kendall_tau",
    "nash_average",
    "pairwise",
    "strengths",
    "vote",
    "weak_order_distance",
    "winning_weights",
]

METHODS = table(
    borda,
    kemeny,
    kemeny_order,
    kendall_tau,
    vote,
    condorcet_winner,
    winning_weights,
    nash_average,
    hodge,
    bradley_terry,
    strengths,
    components,
    consensus_ranking,
    breakdown,
    pairwise,
    weak_order_distance,
)
