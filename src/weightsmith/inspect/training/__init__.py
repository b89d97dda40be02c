"""What a training run does to weights, seen while it runs or from its checkpoints.

The signature of the room: ``(model or checkpoints, data?) -> Report``, or a recorder whose ``step`` is called in a
training loop and whose ``report()`` says what it saw.
"""

from weightsmith.card import table
from weightsmith.inspect.training._covariance import Covariance, contrastive_loss, contrastive_operator
from weightsmith.inspect.training._kernel import (
    kernel_alignment,
    kernel_change,
    kernel_rank,
    label_alignment,
    linear_share,
    ntk,
)
from weightsmith.inspect.training._opposing import (
    OpposingSignals,
    example_losses,
    loss_oscillation,
    opposing_groups,
    opposing_signals,
)
from weightsmith.inspect.training._plasticity import dead_units, feature_rank, plasticity
from weightsmith.inspect.training._rates import (
    UpdateRates,
    angular_update,
    equilibrium_angle,
    relative_update,
    updates,
)
from weightsmith.inspect.training._stability import (
    StabilityMonitor,
    largest_attention_logit,
    learning_rate_sensitivity,
    learning_rate_sweep,
    logit_growth,
    z_loss,
)
from weightsmith.inspect.training._token_losses import (
    TokenLosses,
    decay_groups,
    frequency_buckets,
    frequency_decay,
    label_losses,
    row_norms,
    token_counts,
    token_losses,
)

__all__ = [
    "Covariance",
    "OpposingSignals",
    "StabilityMonitor",
    "TokenLosses",
    "UpdateRates",
    "angular_update",
    "contrastive_loss",
    "contrastive_operator",
    "dead_units",
    "decay_groups",
    "equilibrium_angle",
    "example_losses",
    "feature_rank",
    "frequency_buckets",
    "frequency_decay",
    "kernel_alignment",
    "kernel_change",
    "kernel_rank",
    "label_alignment",
    "label_losses",
    "largest_attention_logit",
    "learning_rate_sensitivity",
    "learning_rate_sweep",
    "linear_share",
    "logit_growth",
    "loss_oscillation",
    "ntk",
    "opposing_groups",
    "opposing_signals",
    "plasticity",
    "relative_update",
    "row_norms",
    "token_counts",
    "token_losses",
    "updates",
    "z_loss",
]

METHODS = table(
    contrastive_operator,
    dead_units,
    kernel_change,
    learning_rate_sensitivity,
    learning_rate_sweep,
    linear_share,
    logit_growth,
    loss_oscillation,
    ntk,
    opposing_signals,
    plasticity,
    row_norms,
    token_losses,
    updates,
)
