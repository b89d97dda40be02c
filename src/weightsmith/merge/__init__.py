"""Several models of one architecture into one.

The signature of the room: ``(models [k, *shape], base [*shape], **options) -> [*shape]`` on
tensors, lifted to ``(models, base=None, **options) -> Weights``. Methods that choose among whole
models (`greedy_soup`) take an ``evaluate`` instead of a base. Tensors that hold no floats (counters,
masks) come from the base, or else from the first model.
"""

from weightsmith.card import table
from weightsmith.merge import _data, _interpolate, _mean, _model_stock, _pick, _random, _spherical, _task_vectors
from weightsmith.merge._interpolate import backward_compatible
from weightsmith.merge._soups import greedy_soup
from weightsmith.merge.room import Merge, lift

mean: Merge = lift(_mean.mean)
model_stock: Merge = lift(_model_stock.model_stock)
task_arithmetic: Merge = lift(_task_vectors.task_arithmetic)
ties: Merge = lift(_task_vectors.ties)
dare_linear: Merge = lift(_random.dare_linear)
dare_ties: Merge = lift(_random.dare_ties)
della: Merge = lift(_random.della)
della_linear: Merge = lift(_random.della_linear)
breadcrumbs: Merge = lift(_task_vectors.breadcrumbs)
breadcrumbs_ties: Merge = lift(_task_vectors.breadcrumbs_ties)
slerp: Merge = lift(_spherical.slerp)
nuslerp: Merge = lift(_spherical.nuslerp)
multislerp: Merge = lift(_spherical.multislerp)
karcher: Merge = lift(_spherical.karcher)
nearswap: Merge = lift(_pick.nearswap)
sce: Merge = lift(_pick.sce)
ram: Merge = lift(_pick.ram)
arcee_fusion: Merge = lift(_pick.arcee_fusion)
wise_ft: Merge = lift(_interpolate.wise_ft)
fisher: Merge = lift(_data.fisher)
gradient_matching: Merge = lift(_data.gradient_matching)
regmean: Merge = lift(_data.regmean)

METHODS = table(
    mean,
    model_stock,
    greedy_soup,
    task_arithmetic,
    ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    breadcrumbs,
    breadcrumbs_ties,
    slerp,
    nuslerp,
    multislerp,
    karcher,
    nearswap,
    sce,
    ram,
    arcee_fusion,
    wise_ft,
    backward_compatible,
    fisher,
    gradient_matching,
    regmean,
)

__all__ = [
    "METHODS",
    "Merge",
    "arcee_fusion",
    "backward_compatible",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fisher",
    "gradient_matching",
    "greedy_soup",
    "karcher",
    "lift",
    "mean",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "wise_ft",
]
