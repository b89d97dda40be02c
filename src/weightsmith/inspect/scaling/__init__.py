"""How loss and score change with size, data, compute and time: laws fitted to runs, and what they predict.

The signature of the room: ``(table of runs, form) -> Law`` with ``predict``, ``optimal``, intervals and ``report()``.
A law is a row of `FORMS`: a formula (a plain function of tensors), what its parameters may be, and where a search for
them starts; `fit` is one for all, and takes a `Form` of your own as well. `simulate` makes runs of known truth.
"""

from weightsmith.card import table
from weightsmith.inspect.scaling._annealing import AnnealingLaw, areas, fit_annealing
from weightsmith.inspect.scaling._chain import Chain, fit_chain, translate
from weightsmith.inspect.scaling._cost import (
    Cost,
    Shape,
    best_for_time,
    body_size,
    performance_features,
    shape_of,
    step_cost,
    training_flops,
)
from weightsmith.inspect.scaling._fit import compare, fit, given, simulate
from weightsmith.inspect.scaling._form import COMPUTE, TOTAL, Budget, Form
from weightsmith.inspect.scaling._forms import FORMS
from weightsmith.inspect.scaling._language import (
    annealing,
    batch_tradeoff,
    chinchilla,
    critical_batch,
    data_law,
    encoder_decoder,
    joint_law,
    over_training,
    size_law,
    step_law,
)
from weightsmith.inspect.scaling._law import Law, Optimum, Prediction
from weightsmith.inspect.scaling._scores import accuracy, downstream_error, log_linear, shifted_power, step_time
from weightsmith.inspect.scaling._stepwise import Trajectory, fit_trajectory

__all__ = [
    "COMPUTE",
    "FORMS",
    "TOTAL",
    "AnnealingLaw",
    "Budget",
    "Chain",
    "Cost",
    "Form",
    "Law",
    "Optimum",
    "Prediction",
    "Shape",
    "Trajectory",
    "accuracy",
    "annealing",
    "areas",
    "batch_tradeoff",
    "best_for_time",
    "body_size",
    "chinchilla",
    "compare",
    "critical_batch",
    "data_law",
    "downstream_error",
    "encoder_decoder",
    "fit",
    "fit_annealing",
    "fit_chain",
    "fit_trajectory",
    "given",
    "joint_law",
    "log_linear",
    "over_training",
    "performance_features",
    "shape_of",
    "shifted_power",
    "simulate",
    "size_law",
    "step_cost",
    "step_law",
    "step_time",
    "training_flops",
    "translate",
]

METHODS = table(
    fit,
    chinchilla,
    size_law,
    data_law,
    joint_law,
    step_law,
    critical_batch,
    batch_tradeoff,
    over_training,
    encoder_decoder,
    annealing,
    downstream_error,
    accuracy,
    shifted_power,
    log_linear,
    step_time,
    areas,
    fit_annealing,
    fit_chain,
    translate,
    fit_trajectory,
    shape_of,
    body_size,
    training_flops,
    performance_features,
    step_cost,
    best_for_time,
)
