"""Small exact problems that methods of several rooms rest on.

A solver is a generator: it asks for readings of the data (`weightsmith.weights.Pass`) and returns
something small, so it works on tensors that are never in memory as a whole. On tensors that are,
`weightsmith.weights.in_memory` runs it.
"""

from weightsmith.solve._top import EVERYTHING, NOTHING, Cut, cut_at, cuts_at, kept, keys, shrink

__all__ = ["EVERYTHING", "NOTHING", "Cut", "cut_at", "cuts_at", "kept", "keys", "shrink"]
