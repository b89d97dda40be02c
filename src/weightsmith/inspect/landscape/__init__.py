"""The loss around and between checkpoints: lines, planes, paths, barriers, curvature, volume.

The signature of the room: ``(model, loss, batches, ...) -> Report``. A loss is ``loss(model, batch) -> number``, the
mean over the batch's examples, or ``loss(model)`` without batches; by default it is the cross-entropy of batches
``(inputs, labels)``. The model is left as it was.
"""

from weightsmith.card import table
from weightsmith.inspect.landscape._bias import inductive_bias
from weightsmith.inspect.landscape._curvature import (
    Eigenvalues,
    diagonal,
    hvp,
    spectral_density,
    top_eigen,
    trace,
)
from weightsmith.inspect.landscape._directions import Principal, between, principal, random_direction
from weightsmith.inspect.landscape._growth import growth
from weightsmith.inspect.landscape._langevin import Posterior, langevin, predictions
from weightsmith.inspect.landscape._lines import line, plane
from weightsmith.inspect.landscape._paths import barrier, path, plane_through, trajectory
from weightsmith.inspect.landscape._sharpness import relative_flatness, sharpness
from weightsmith.inspect.landscape._volume import local_log_volume

__all__ = [
    "Eigenvalues",
    "Posterior",
    "Principal",
    "barrier",
    "between",
    "diagonal",
    "growth",
    "hvp",
    "inductive_bias",
    "langevin",
    "line",
    "local_log_volume",
    "path",
    "plane",
    "plane_through",
    "predictions",
    "principal",
    "random_direction",
    "relative_flatness",
    "sharpness",
    "spectral_density",
    "top_eigen",
    "trace",
    "trajectory",
]

METHODS = table(
    barrier,
    between,
    diagonal,
    growth,
    hvp,
    inductive_bias,
    langevin,
    line,
    local_log_volume,
    path,
    plane,
    plane_through,
    predictions,
    principal,
    random_direction,
    relative_flatness,
    sharpness,
    spectral_density,
    top_eigen,
    trace,
    trajectory,
)
