"""A teacher's probabilities for a student that computes with quantized weights.

The teacher's probabilities say of every example how it differs from the others, which labels do not; a student with few
points to choose from needs to be told more often which of its mistakes matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.stats import Batch, Forward, Loss
from weightsmith.stats.room import counted, default_forward, default_loss, predictions, restored


def divergence(teacher: Tensor, student: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    r"""How far a student's probabilities are from a teacher's, a prediction.

    .. math:: T^2 \operatorname{KL}\big(\operatorname{softmax}(t / T) \,\Vert\, \operatorname{softmax}(s / T)\big)

    Args:
        teacher, student: logits ``[n, ..., c]`` of one batch; the teacher's get no gradient.
        batch: says which predictions count: not those of padding.
        temperature: :math:`T`; the factor keeps gradients of one size.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> divergence(logits, logits, logits).item()
    0.0
    """
    keep = counted(student, batch)
    rows = predictions(student, batch)[keep] / temperature
    given = predictions(teacher.detach(), batch)[keep] / temperature
    apart = functional.kl_div(rows.log_softmax(-1), given.log_softmax(-1), reduction="sum", log_target=True)
    return temperature**2 * apart / max(len(rows), 1)


def of_logits(loss: Loss, logits: Tensor, batch: Batch) -> Tensor:
    """A loss of logits that are there already, a prediction."""
    whole = loss(lambda *_, **__: logits, batch)
    return whole / counted(logits, batch).sum().clamp(min=1)


@card(
    paper="Polino, Pascanu, Alistarh 2018, 'Model compression via distillation and quantization' (quantized "
    "distillation)",
    covers=("model-compression-distillation-quantization",),
    needs=("data",),
    unit="model",
    claim="through a quantizer of 2 bits a teacher helps more than labels alone",
    departs="gradients at the quantized weights move the weights beneath, by any optimizer; grids fit each row, not "
    "buckets of a flat vector",
)
def distilled(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    *,
    truth: float = 0.3,
    temperature: float = 2.0,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Tensor:
    r"""The loss of a student that learns from labels and from a teacher, to go backwards from.

    .. math:: \alpha \, \text{loss} + (1 - \alpha)\, T^2 \operatorname{KL}(p_\text{teacher} \Vert p_\text{student})

    With `fake` on the student this is quantized distillation: the loss is that of the quantized weights, and its
    gradient moves the ones beneath.

    Args:
        student: called as it is, in its mode.
        teacher: called in evaluation mode and without gradients; left as it was.
        batch: ``inputs`` (with ``truth=0``), ``(inputs, labels)`` or a mapping.
        truth: :math:`\alpha`, from 0 to 1.
        temperature: :math:`T`.
        forward, loss: as in `weightsmith.stats.collect`, where the defaults do not fit; ``loss`` is called with a
            model that gives the logits.

    Returns:
        a number, the mean a prediction.

    Raises:
        Error: ``truth`` outside [0, 1], a temperature of 0 or less, logits that do not fit each other.

    >>> model, batch = nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    >>> distilled(model, model, batch, truth=0.0).item()
    0.0
    """
    if not 0 <= truth <= 1 or not temperature > 0:
        raise Error(f"distilled: truth lies in [0, 1] and the temperature above 0, got {truth} and {temperature}")
    call: Any = forward or default_forward
    with torch.no_grad(), restored(teacher):
        given = call(teacher, batch)
    logits = call(student, batch)
    if logits.shape != given.shape:
        raise Error(f"distilled: the student gives {list(logits.shape)} and the teacher {list(given.shape)}")
    total = (1 - truth) * divergence(given, logits, batch, temperature)
    if truth:
        total = total + truth * of_logits(loss or default_loss, logits, batch)
    return total
