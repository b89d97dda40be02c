"""The laws that `fit` knows by name: a row each."""

from __future__ import annotations

from weightsmith.inspect.scaling import _language as language
from weightsmith.inspect.scaling import _scores as scores
from weightsmith.inspect.scaling._form import COMPUTE, TOTAL, Form

_TENS = (1e0, 1e3, 1e6, 1e9, 1e12)  # scales of constants that carry a unit
_POWERS = (0.05, 0.15, 0.35, 0.7, 1.2)
_FLOORS = (0.1, 0.5, 1.0, 2.0)

_FORMS = (
    Form(
        "chinchilla",
        language.chinchilla,
        ("N", "D"),
        {"E": _FLOORS, "A": (1e0, 1e2, 1e4, 1e7), "B": (1e0, 1e2, 1e4, 1e7), "alpha": _POWERS, "beta": _POWERS},
        budget=COMPUTE,
        optimum=language.chinchilla_size,
        about="L = E + A / N^alpha + B / D^beta",
    ),
    Form(
        "kaplan-size",
        language.size_law,
        ("N",),
        {"Nc": (*_TENS, 1e15), "alpha_N": _POWERS},
        about="L = (Nc / N)^alpha_N",
    ),
    Form(
        "kaplan-data",
        language.data_law,
        ("D",),
        {"Dc": (*_TENS, 1e15), "alpha_D": _POWERS},
        about="L = (Dc / D)^alpha_D",
    ),
    Form(
        "kaplan-joint",
        language.joint_law,
        ("N", "D"),
        {"Nc": (*_TENS, 1e15), "Dc": (*_TENS, 1e15), "alpha_N": _POWERS, "alpha_D": _POWERS},
        budget=COMPUTE,
        optimum=language.joint_size,
        about="L = [(Nc / N)^(alpha_N / alpha_D) + Dc / D]^alpha_D",
    ),
    Form(
        "kaplan-steps",
        language.step_law,
        ("N", "S"),
        {"Nc": (*_TENS, 1e15), "Sc": (1e0, 1e3, 1e6), "alpha_N": _POWERS, "alpha_S": _POWERS},
        about="L = (Nc / N)^alpha_N + (Sc / S)^alpha_S",
    ),
    Form(
        "critical-batch",
        language.critical_batch,
        ("loss",),
        {"B_star": (1e0, 1e2, 1e4, 1e6, 1e8), "alpha_B": _POWERS},
        target="batch",
        about="Bcrit = B_star / L^(1 / alpha_B)",
    ),
    Form(
        "batch-tradeoff",
        language.batch_tradeoff,
        ("B",),
        {"S_min": (1e1, 1e2, 1e3, 1e4, 1e5), "E_min": (1e2, 1e4, 1e6, 1e8)},
        target="S",
        about="S = S_min + E_min / B",
    ),
    Form(
        "over-training",
        language.over_training,
        ("N", "D"),
        {"E": _FLOORS, "a": (1e0, 1e2, 1e4), "b": (1e0, 1e2, 1e4), "eta": (0.05, 0.1, 0.2, 0.4)},
        budget=COMPUTE,
        optimum=language.over_training_size,
        about="L = E + (a M^eta + b M^-eta) C^-eta, C = 6 N D, M = D / N",
    ),
    Form(
        "downstream-error",
        scores.downstream_error,
        ("loss",),
        {"eps": (0.3, 0.6, 0.9), "k": (0.1, 1.0, 5.0, 50.0), "gamma": (0.1, 0.5, 1.0, 3.0)},
        target="error",
        about="Err = eps - k exp(-gamma L)",
    ),
    Form(
        "accuracy",
        scores.accuracy,
        ("loss",),
        {"a": (0.3, 0.7), "k": (1.0, 4.0, 12.0), "L0": (0.3, 0.7, 1.0, 1.5, 2.5, 4.0), "b": (0.0, 0.25, 0.5)},
        target="accuracy",
        free=("b",),
        scale="linear",
        about="Acc = a / (1 + exp(k (L - L0))) + b",
    ),
    Form(
        "loss-to-loss",
        scores.shifted_power,
        ("loss",),
        {"K": (0.3, 1.0, 3.0), "kappa": (0.5, 1.0, 2.0), "E0": (0.05, 0.5, 1.0, 1.7), "E1": (0.05, 0.5, 1.0, 1.7)},
        target="other",
        about="L1 = K (L0 - E0)^kappa + E1",
    ),
    Form(
        "annealing",
        language.annealing,
        ("S1", "S2"),
        {"L0": (0.05, 0.5, 1.0, 2.0, 3.0), "A": (0.1, 1.0, 10.0), "alpha": (0.1, 0.3, 0.6, 1.0), "C": (0.01, 0.3, 3.0)},
        signed=("S2",),
        free=("C",),
        about="L = L0 + A S1^-alpha - C S2",
    ),
    Form(
        "encoder-decoder",
        language.encoder_decoder,
        ("Ne", "Nd"),
        {"amount": (1e0, 1e2, 1e4, 1e6), "pe": _POWERS, "pd": _POWERS, "floor": _FLOORS},
        budget=TOTAL,
        optimum=language.encoder_size,
        about="L = amount Ne^-pe Nd^-pd + floor",
    ),
    Form(
        "performance",
        scores.log_linear,
        ("depth", "width", "ffn", "tokens", "discount"),
        {"w1": (0.0,), "w2": (0.0,), "w3": (0.0,), "w4": (0.0,), "b": (0.0, 50.0)},
        target="score",
        free=("w1", "w2", "w3", "w4", "b"),
        scale="linear",
        defaults={"discount": 1.0},
        about="score = w1 log(u depth) + w2 log(u width) + w3 log(u ffn) + w4 log(u tokens) + b",
    ),
    Form(
        "step-time",
        scores.step_time,
        ("bytes", "flops"),
        {"fixed": (1e-5, 1e-3, 1e-1), "per_byte": (1e-12, 1e-11, 1e-10, 1e-9), "per_flop": (1e-14, 1e-12, 1e-11, 1e-9)},
        target="seconds",
        about="seconds = fixed + per_byte bytes + per_flop flops",
    ),
)

FORMS = {form.name: form for form in _FORMS}
"""By name."""
