"""Read weights and say what they are: contents, differences, soundness.

A function here is ``(weights, ...) -> result`` and changes nothing. A result is a frozen dataclass
with ``rows()``, one flat record each, and ``to_json()``, all of it as plain data; nothing prints.
"""

from weightsmith.inspect._diff import Diff, LayerDiff, Sums, TensorDiff, diff
from weightsmith.inspect._diversity import Diversity, Flips, Locality, Pair, diversity, flips, locality, rescued
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
    "Locality",
    "Pair",
    "Spectrum",
    "Statistics",
    "Sums",
    "Summary",
    "TensorDiff",
    "TensorSummary",
    "Verified",
    "diff",
    "diversity",
    "flips",
    "locality",
    "rescued",
    "spectrum",
    "summary",
    "verify",
]
