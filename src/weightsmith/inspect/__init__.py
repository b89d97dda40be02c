"""Read weights and say what they are: contents, differences, soundness.

The signature of the room: ``(weights or model, data?) -> Report``; nothing is changed and nothing prints.
A `Report` is data that prints well, draws itself and writes itself to a file. A result with a life of its
own (a fitted law, a comparison of checkpoints) is an object with ``report()``, ``rows()``, one flat record
each, and ``to_json()``.
"""

from weightsmith.card import table
from weightsmith.inspect import attribution, evaluation, landscape, ranking, scaling, theory, training
from weightsmith.inspect._diff import Diff, LayerDiff, Sums, TensorDiff, diff
from weightsmith.inspect._diversity import Diversity, Flips, Locality, Pair, diversity, flips, locality, rescued
from weightsmith.inspect._report import Line, Plot, Report, Surface, page_of
from weightsmith.inspect._spectra import Spectrum, spectrum
from weightsmith.inspect._statistics import Statistics
from weightsmith.inspect._summary import Layer, Summary, TensorSummary, summary
from weightsmith.inspect._verify import Finding, Verified, verify

__all__ = [
    "Diff",
    "Diversity",
    "Finding",
    "Flips",
    "Layer",
    "LayerDiff",
    "Line",
    "Locality",
    "Pair",
    "Plot",
    "Report",
    "Spectrum",
    "Statistics",
    "Summary",
    "Sums",
    "Surface",
    "TensorDiff",
    "TensorSummary",
    "Verified",
    "attribution",
    "diff",
    "diversity",
    "evaluation",
    "flips",
    "landscape",
    "locality",
    "page_of",
    "ranking",
    "rescued",
    "scaling",
    "spectrum",
    "summary",
    "theory",
    "training",
    "verify",
]

METHODS = table()
