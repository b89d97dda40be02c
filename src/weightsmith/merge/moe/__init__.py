"""Several models into one that keeps them apart inside, and tells by the input how much of each it needs.

The signature of the room: ``(models, ...) -> a mixture of experts``. Methods on networks give a module, on which
`fold` leaves a plain one; methods on mixtures that are plain tensors (`Mixture`) give such a mixture.
"""

from weightsmith.card import table
from weightsmith.merge.moe._assemble import assemble
from weightsmith.merge.moe._document import assemble_document
from weightsmith.merge.moe._experts import Expert
from weightsmith.merge.moe._fold import fold
from weightsmith.merge.moe._gaussian import Mixture, expected, fit, log_likelihood
from weightsmith.merge.moe._routed_linear import RoutedLinear, Router
from weightsmith.merge.moe._routers import routed
from weightsmith.merge.moe._transport import Reduced, reduce_mixture
from weightsmith.merge.moe._weight_ensembling import Routing, WeightMixture, weight_ensembling

METHODS = table(
    weight_ensembling,
    reduce_mixture,
    assemble,
    routed,
)

__all__ = [
    "METHODS",
    "Expert",
    "Mixture",
    "Reduced",
    "RoutedLinear",
    "Router",
    "Routing",
    "WeightMixture",
    "assemble",
    "assemble_document",
    "expected",
    "fit",
    "fold",
    "log_likelihood",
    "reduce_mixture",
    "routed",
    "weight_ensembling",
]
