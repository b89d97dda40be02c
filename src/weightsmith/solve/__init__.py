"""Small exact problems that methods of several rooms rest on.

A solver is a generator: it asks for readings of the data (`weightsmith.weights.Pass`) and returns
something small, so it works on tensors that are never in memory as a whole. On tensors that are,
`weightsmith.weights.in_memory` runs it. What is about matrices that can only be multiplied with (products
with curvature, eigenvalues, traces) are plain functions of tensors.
"""

from weightsmith.solve._allocation import Choice, knapsack, lagrangian
from weightsmith.solve._assignment import assignment
from weightsmith.solve._binary_quadratic import binary_quadratic
from weightsmith.solve._columns import BLOCK, Begin, Settle, column_loop
from weightsmith.solve._definite import cholesky, inverse_factor, steadied
from weightsmith.solve._hvp import Product, gauss_newton_product, hessian_product
from weightsmith.solve._lanczos import (
    Apply,
    Eigenpairs,
    Ends,
    Estimate,
    Krylov,
    extreme_eigenpairs,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    krylov,
    signs,
    spectral_measure,
)
from weightsmith.solve._least_distance import least_distance
from weightsmith.solve._linear import linear_program, max_entropy
from weightsmith.solve._masked import masked_conjugate_gradients, masked_least_squares
from weightsmith.solve._resampling import draws, grouped, resampled_means
from weightsmith.solve._seeds import bit_source, generator_for, random_bits, seed_for, uniform
from weightsmith.solve._singular import (
    effective_rank,
    gram_of,
    largest_singular,
    roots_of,
    singular_values,
    stable_rank,
)
from weightsmith.solve._sinkhorn import sinkhorn
from weightsmith.solve._top import EVERYTHING, NOTHING, Cut, cut_at, cuts_at, kept, keys, shrink

__all__ = [
    "BLOCK",
    "EVERYTHING",
    "NOTHING",
    "Apply",
    "Begin",
    "Choice",
    "Cut",
    "Eigenpairs",
    "Ends",
    "Estimate",
    "Krylov",
    "Product",
    "Settle",
    "assignment",
    "binary_quadratic",
    "bit_source",
    "cholesky",
    "column_loop",
    "cut_at",
    "cuts_at",
    "draws",
    "effective_rank",
    "extreme_eigenpairs",
    "gauss_newton_product",
    "generator_for",
    "gram_of",
    "grouped",
    "hessian_product",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "inverse_factor",
    "kept",
    "keys",
    "knapsack",
    "krylov",
    "lagrangian",
    "largest_singular",
    "least_distance",
    "linear_program",
    "masked_conjugate_gradients",
    "masked_least_squares",
    "max_entropy",
    "random_bits",
    "resampled_means",
    "roots_of",
    "seed_for",
    "shrink",
    "signs",
    "singular_values",
    "sinkhorn",
    "spectral_measure",
    "stable_rank",
    "steadied",
    "uniform",
]
