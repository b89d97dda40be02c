"""From a loss to what is wanted: the error of a task, its accuracy, the loss on other data, a benchmark's score."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card


@card(
    paper="Gadre et al. 2024, 'Language models scale reliably with over-training and on downstream tasks'",
    covers=("language-models-scale-reliably",),
    unit="model",
)
def downstream_error(loss: Tensor, eps: Tensor, k: Tensor, gamma: Tensor) -> Tensor:
    r"""The average error of tasks from the loss of the model.

    .. math:: Err(L) = \epsilon - k\, e^{-\gamma L}

    Args:
        loss: validation loss.
        eps: the error that guessing leaves.
        k, gamma: constants, above 0.

    >>> one = torch.tensor(1.0)
    >>> downstream_error(0 * one, 0.75 * one, 0.5 * one, one)
    tensor(0.2500)
    """
    return eps - k * (-gamma * loss).exp()


@card(
    paper="Bhagia et al. 2024, 'Establishing Task Scaling Laws via Compute-Efficient Model Ladders'",
    covers=("establishing-task-scaling-laws",),
    unit="model",
    departs="written so that k above 0 means that a smaller loss is a better score",
)
def accuracy(loss: Tensor, a: Tensor, k: Tensor, L0: Tensor, b: Tensor) -> Tensor:
    r"""A task's accuracy from the model's loss on the task's answers.

    .. math:: Acc(L) = \frac{a}{1 + e^{k (L - L_0)}} + b

    Args:
        loss: loss per character (or token) of the right answers.
        a: what is to be gained above ``b``.
        k: steepness.
        L0: where half is gained.
        b: what guessing gives; may be any number.

    >>> one = torch.tensor(1.0)
    >>> accuracy(one, 0.6 * one, 5 * one, one, 0.25 * one)
    tensor(0.5500)
    """
    return a * torch.sigmoid(-k * (loss - L0)) + b


@card(
    paper="Brandfonbrener, Anand, Vyas, Malach, Kakade 2024, 'Loss-to-Loss Prediction: Scaling Laws for All Datasets'",
    covers=("loss-to-loss-prediction",),
    unit="model",
)
def shifted_power(loss: Tensor, K: Tensor, kappa: Tensor, E0: Tensor, E1: Tensor) -> Tensor:
    r"""One loss from another: a power law between what both have above what cannot be had.

    .. math:: L_1 = K\,(L_0 - E_0)^\kappa + E_1

    Args:
        loss: the loss that is known.
        K, kappa: constants, above 0.
        E0, E1: the irreducible parts of the known and of the wanted loss.

    >>> one = torch.tensor(1.0)
    >>> shifted_power(3 * one, 2 * one, 2 * one, one, one)
    tensor(9.)
    """
    above = loss - E0
    # A loss below what is irreducible has no answer, also where kappa is a whole number.
    return K * torch.where(above >= 0, above, torch.nan) ** kappa + E1


@card(
    paper="Wu, Tang 2024, 'Performance Law of Large Language Models'",
    covers=("performance-law-large-language",),
    unit="model",
    claim="it tells a benchmark's score better than the mean of the other models, not than a line in log compute",
    departs="the discount u for instability is a column that defaults to 1, and the saturation of tokens is an option "
    "of performance_features: their exact forms in the paper could not be checked",
)
def log_linear(
    depth: Tensor,
    width: Tensor,
    ffn: Tensor,
    tokens: Tensor,
    discount: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    w4: Tensor,
    b: Tensor,
) -> Tensor:
    r"""A benchmark's score from the shape of a model and its tokens.

    .. math:: score = w_1 \log(u N) + w_2 \log(u h) + w_3 \log(u d) + w_4 \log(u T) + b

    Args:
        depth, width, ffn: layers, width of the residual stream, width of the feed-forward layers.
        tokens: tokens of training, as far as the model can use them.
        discount: u in (0, 1], for models whose training was unstable.
        w1, w2, w3, w4, b: constants of any sign.

    >>> one = torch.tensor(1.0)
    >>> log_linear(one, one, one, one.exp(), one, one, one, one, 3 * one, 2 * one)
    tensor(5.)
    """
    log_u = discount.log()
    first = w1 * (log_u + depth.log()) + w2 * (log_u + width.log())
    return first + w3 * (log_u + ffn.log()) + w4 * (log_u + tokens.log()) + b


@card(
    paper="Inbar, Sernau 2024, 'Time Matters: Scaling Laws for Any Budget'",
    covers=("time-matters",),
    unit="model",
    claim="bytes moved tell the time of a step of a model left out of the fit better than operations do",
    departs="operations may count beside bytes; the paper's regression is this one with per_flop fixed at 0",
)
def step_time(bytes: Tensor, flops: Tensor, fixed: Tensor, per_byte: Tensor, per_flop: Tensor) -> Tensor:
    r"""Seconds of a training step: :math:`t = t_0 + c_b\,bytes + c_f\,flops`.

    Args:
        bytes, flops: what a step moves and computes, from `step_cost`.
        fixed, per_byte, per_flop: constants of a machine, above 0 (or given as 0 to `fit`).

    >>> one = torch.tensor(1.0)
    >>> step_time(10 * one, 100 * one, one, 2 * one, 0 * one)
    tensor(21.)
    """
    return fixed + per_byte * bytes + per_flop * flops
