"""Read weights and say what they are: contents, differences, soundness.

The signature of the room: ``(weights or model, data?) -> Report``; nothing is changed and nothing prints.
A `Report` is data that prints well, draws itself and writes itself to a file. A result with a life of its
own (a fitted law, a comparison of checkpoints) is an object with ``report()``, ``rows()``, one flat record
each, and ``to_json()``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightsmith.card import table
from weightsmith.inspect._classify import classification
from weightsmith.inspect._degeneracy import degeneracy
from weightsmith.inspect._diff import Diff, LayerDiff, Sums, TensorDiff, diff
from weightsmith.inspect._diversity import Diversity, Flips, Locality, Pair, diversity, flips, locality, rescued
from weightsmith.inspect._geometry import directions, geometry, overlap, relative_change
from weightsmith.inspect._harness import harness_results
from weightsmith.inspect._interactions import Interactions, interactions
from weightsmith.inspect._language import language
from weightsmith.inspect._matrices import spectra
from weightsmith.inspect._modularity import modularity
from weightsmith.inspect._overlaps import overlaps
from weightsmith.inspect._pruning import pruning
from weightsmith.inspect._quantization import quantization_error
from weightsmith.inspect._quantized import quantized
from weightsmith.inspect._report import Line, Plot, Report, Surface, page_of
from weightsmith.inspect._sparsity import sparsity_knees
from weightsmith.inspect._spectra import Spectrum, spectrum
from weightsmith.inspect._statistics import Statistics
from weightsmith.inspect._summary import Layer, Summary, TensorSummary, summary
from weightsmith.inspect._superposition import Superposition, superposition
from weightsmith.inspect._tails import NoiseEdge, PowerLaw, noise_edge, power_law
from weightsmith.inspect._verify import Finding, Verified, verify

if TYPE_CHECKING:
    from weightsmith.inspect import attribution, evaluation, landscape, ranking, scaling, theory, training

__all__ = [
    "Diff",
    "Diversity",
    "Finding",
    "Flips",
    "Interactions",
    "Layer",
    "LayerDiff",
    "Line",
    "Locality",
    "NoiseEdge",
    "Pair",
    "Plot",
    "PowerLaw",
    "Report",
    "Spectrum",
    "Statistics",
    "Summary",
    "Sums",
    "Superposition",
    "Surface",
    "TensorDiff",
    "TensorSummary",
    "Verified",
    "attribution",
    "classification",
    "degeneracy",
    "diff",
    "directions",
    "diversity",
    "evaluation",
    "flips",
    "geometry",
    "harness_results",
    "interactions",
    "landscape",
    "language",
    "locality",
    "modularity",
    "noise_edge",
    "overlap",
    "overlaps",
    "page_of",
    "power_law",
    "pruning",
    "quantization_error",
    "quantized",
    "ranking",
    "relative_change",
    "rescued",
    "scaling",
    "sparsity_knees",
    "spectra",
    "spectrum",
    "summary",
    "superposition",
    "theory",
    "training",
    "verify",
]

METHODS = table(
    spectra,
    sparsity_knees,
    pruning,
    quantization_error,
    quantized,
    geometry,
    relative_change,
    overlaps,
    superposition,
    degeneracy,
    interactions,
    language,
    classification,
)

_ROOMS = ("attribution", "evaluation", "landscape", "ranking", "scaling", "theory", "training")


def __getattr__(name: str) -> Any:
    """The rooms inside are imported when they are first used: to show a checkpoint none of them is needed."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
