"""What theory says of networks, computed: critical starts, infinite widths, margins, memories.

The signature of the room: ``(activation, shape or small model) -> Report``.
"""

from weightsmith.card import table
from weightsmith.inspect.theory._attention_svm import AttentionSVM, attention_margin, attention_svm
from weightsmith.inspect.theory._compute_phases import RandomFeatures, compute_optimal, compute_phase, random_features
from weightsmith.inspect.theory._criticality import Criticality, critical_start, depth_theory
from weightsmith.inspect.theory._dense_memory import hebbian_couplings, hebbian_patterns, retrieval_diagram, retrieve
from weightsmith.inspect.theory._depth_limit import DepthLimit, depth_limit, hermite, kernel_classes, optimal_activation
from weightsmith.inspect.theory._depth_probe import depth_ensemble, depth_probe
from weightsmith.inspect.theory._dual import Dual, deep_kernels, dual
from weightsmith.inspect.theory._generative_head import head_curves, logistic_head, naive_bayes_head
from weightsmith.inspect.theory._permutations import (
    ensemble_complexity,
    permutation_ensemble,
    relu_kernels,
    trained_outputs,
)
from weightsmith.inspect.theory._sensitivity import sensitivity

__all__ = [
    "AttentionSVM",
    "Criticality",
    "DepthLimit",
    "Dual",
    "RandomFeatures",
    "attention_margin",
    "attention_svm",
    "compute_optimal",
    "compute_phase",
    "critical_start",
    "deep_kernels",
    "depth_ensemble",
    "depth_limit",
    "depth_probe",
    "depth_theory",
    "dual",
    "ensemble_complexity",
    "head_curves",
    "hebbian_couplings",
    "hebbian_patterns",
    "hermite",
    "kernel_classes",
    "logistic_head",
    "naive_bayes_head",
    "optimal_activation",
    "permutation_ensemble",
    "random_features",
    "relu_kernels",
    "retrieval_diagram",
    "retrieve",
    "sensitivity",
    "trained_outputs",
]

METHODS = table(
    attention_margin,
    attention_svm,
    compute_optimal,
    compute_phase,
    critical_start,
    deep_kernels,
    depth_ensemble,
    depth_limit,
    depth_probe,
    depth_theory,
    dual,
    ensemble_complexity,
    head_curves,
    hebbian_couplings,
    hebbian_patterns,
    kernel_classes,
    logistic_head,
    naive_bayes_head,
    optimal_activation,
    permutation_ensemble,
    random_features,
    relu_kernels,
    retrieval_diagram,
    retrieve,
    sensitivity,
)
