"""Whether one model is better than another: metrics, intervals, tests, calibration, fairness.

The signature of the room: ``(predictions, targets, ...) -> figure or Report``. Predictions, targets and
numbers per example are tensors, arrays or lists; figures are plain numbers. An `Interval` or a `Test` has
``report()``.
"""

from weightsmith.card import table
from weightsmith.inspect.evaluation._bootstrap import bootstrap, bootstrap_632, paired_interval
from weightsmith.inspect.evaluation._calibration import (
    brier,
    calibration_error,
    log_loss,
    platt,
    reliability,
    temperature,
)
from weightsmith.inspect.evaluation._compare import compare
from weightsmith.inspect.evaluation._f1 import class_weights, f1_family, weighted_f1
from weightsmith.inspect.evaluation._fairness import (
    GroupThresholds,
    fair_thresholds,
    fairness_frontier,
    group_gap,
    roc_hull,
    unprocess,
)
from weightsmith.inspect.evaluation._forecasts import consensus, coverage_accuracy, forecast_pool, weighted_error
from weightsmith.inspect.evaluation._parts import Interval, Test
from weightsmith.inspect.evaluation._sample_only import harmonic_log_loss, power_loss, quadratic_loss
from weightsmith.inspect.evaluation._splits import Nested, Split, folds, nested_folds
from weightsmith.inspect.evaluation._streaming import OnlineCalibrator, online_calibration
from weightsmith.inspect.evaluation._tests import (
    adjusted,
    cochran_q,
    five_by_two,
    mcnemar,
    paired_t,
    permutation,
    resampled_t,
    wilcoxon,
)

__all__ = [
    "GroupThresholds",
    "Interval",
    "Nested",
    "OnlineCalibrator",
    "Split",
    "Test",
    "adjusted",
    "bootstrap",
    "bootstrap_632",
    "brier",
    "calibration_error",
    "class_weights",
    "cochran_q",
    "compare",
    "consensus",
    "coverage_accuracy",
    "f1_family",
    "fair_thresholds",
    "fairness_frontier",
    "five_by_two",
    "folds",
    "forecast_pool",
    "group_gap",
    "harmonic_log_loss",
    "log_loss",
    "mcnemar",
    "nested_folds",
    "online_calibration",
    "paired_interval",
    "paired_t",
    "permutation",
    "platt",
    "power_loss",
    "quadratic_loss",
    "reliability",
    "resampled_t",
    "roc_hull",
    "temperature",
    "unprocess",
    "weighted_error",
    "weighted_f1",
    "wilcoxon",
]

METHODS = table(
    bootstrap,
    bootstrap_632,
    paired_interval,
    mcnemar,
    cochran_q,
    paired_t,
    permutation,
    wilcoxon,
    five_by_two,
    resampled_t,
    adjusted,
    folds,
    nested_folds,
    compare,
    class_weights,
    weighted_f1,
    f1_family,
    calibration_error,
    brier,
    log_loss,
    reliability,
    temperature,
    platt,
    online_calibration,
    power_loss,
    quadratic_loss,
    harmonic_log_loss,
    roc_hull,
    fair_thresholds,
    unprocess,
    group_gap,
    fairness_frontier,
    consensus,
    weighted_error,
    coverage_accuracy,
    forecast_pool,
)
