"""Several models into one that keeps them apart inside, and tells by the input how much of each it needs.

The signature of the room: ``(models, ...) -> a mixture of experts``. Methods on networks give a module, on which
`fold` leaves a plain one; methods on mixtures that are plain tensors (`Mixture`) give such a mixture.
"""

from weightsmith.card import table
from weightsmith.merge.moe._gaussian import Mixture, expected, fit, log_likelihood
from weightsmith.merge.moe._transport import Reduced, reduce_mixture
from weightsmith.merge.moe._weight_ensembling import Routing, WeightMixture, fold, weight_ensembling

METHODS = table(
    weight_ensembling,
    reduce_mixture,
)

__all__ = [
    "METHODS",
    "Mixture",
    "Reduced",
    "Routing",
    "WeightMixture",
    "expected",
    "fit",
    "fold",
    "log_likelihood",
    "reduce_mixture",
    "weight_ensembling",
]
