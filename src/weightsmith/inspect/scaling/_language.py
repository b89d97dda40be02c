"""How the loss of a language model falls with its size, its data and its steps: the power laws of Kaplan et al.,
the sum of Hoffmann et al. that replaced them, and the same sum written for compute and over-training.

All take float64 tensors that fit together, in any unit; the constants carry the unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.inspect.scaling._form import TOKENS


@card(
    paper="Hoffmann et al. 2022, 'Training Compute-Optimal Large Language Models'; Besiroglu, Erdil, Barnett, "
    "You 2024, 'Chinchilla Scaling: A replication attempt'",
    covers=("chinchilla-replication",),
    unit="model",
    claim="fitted to 240 runs with 1 % noise, at least 80 % of its 90 % intervals hold the constant that made the runs",
    departs="damped Gauss-Newton steps from many starts instead of BFGS; the objective is the same",
)
def chinchilla(N: Tensor, D: Tensor, E: Tensor, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    r"""Loss from size and data: what cannot be had, what size lacks, what data lack.

    .. math:: L(N, D) = E + A / N^\alpha + B / D^\beta

    Args:
        N: parameters of the models.
        D: tokens seen.
        E, A, B, alpha, beta: constants, all above 0.

    >>> replication = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
    >>> N, D = torch.tensor(70e9, dtype=torch.float64), torch.tensor(1.4e12, dtype=torch.float64)
    >>> round(float(chinchilla(N, D, **replication)), 3)
    1.974
    """
    return E + A * N**-alpha + B * D**-beta


def chinchilla_size(parameters: Mapping[str, Any], compute: float) -> Any:
    r"""The size that is best for a budget: :math:`N = G (C/6)^{\beta/(\alpha+\beta)}`, with
    :math:`G = (\alpha A / \beta B)^{1/(\alpha+\beta)}`."""
    alpha, beta = parameters["alpha"], parameters["beta"]
    ratio = alpha * parameters["A"] / (beta * parameters["B"])
    return ratio ** (1 / (alpha + beta)) * (compute / TOKENS) ** (beta / (alpha + beta))


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'",
    covers=("kaplan-scaling-laws",),
    unit="model",
    claim="it tells the largest model's loss better than a line in the logarithm of size",
)
def size_law(N: Tensor, Nc: Tensor, alpha_N: Tensor) -> Tensor:
    r"""Converged loss from size without embeddings: :math:`L(N) = (N_c / N)^{\alpha_N}`.

    >>> size_law(torch.tensor(100.0), torch.tensor(400.0), torch.tensor(0.5))
    tensor(2.)
    """
    return torch.exp(alpha_N * (Nc.log() - N.log()))


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'",
    covers=("kaplan-scaling-laws",),
    unit="model",
)
def data_law(D: Tensor, Dc: Tensor, alpha_D: Tensor) -> Tensor:
    r"""Loss of a large model from its data, with early stopping: :math:`L(D) = (D_c / D)^{\alpha_D}`.

    >>> data_law(torch.tensor(100.0), torch.tensor(900.0), torch.tensor(0.5))
    tensor(3.)
    """
    return torch.exp(alpha_D * (Dc.log() - D.log()))


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'",
    covers=("kaplan-scaling-laws",),
    unit="model",
)
def joint_law(N: Tensor, D: Tensor, Nc: Tensor, Dc: Tensor, alpha_N: Tensor, alpha_D: Tensor) -> Tensor:
    r"""Loss from size and data together.

    .. math:: L(N, D) = \left[ (N_c / N)^{\alpha_N / \alpha_D} + D_c / D \right]^{\alpha_D}

    >>> N, D, one = torch.tensor(4.0), torch.tensor(2.0), torch.tensor(1.0)
    >>> joint_law(N, D, 4 * one, 6 * one, one, one)
    tensor(4.)
    """
    return ((alpha_N / alpha_D * (Nc.log() - N.log())).exp() + Dc / D) ** alpha_D


def joint_size(parameters: Mapping[str, Any], compute: float) -> Any:
    """The best size for a budget: where the two terms' slopes along ``C = 6 N D`` cancel."""
    power = parameters["alpha_N"] / parameters["alpha_D"]
    top = power * parameters["Nc"] ** power * compute / (TOKENS * parameters["Dc"])
    return top ** (1 / (power + 1))


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'",
    covers=("kaplan-scaling-laws", "unraveling-mystery-scaling-laws"),
    unit="model",
)
def step_law(N: Tensor, S: Tensor, Nc: Tensor, Sc: Tensor, alpha_N: Tensor, alpha_S: Tensor) -> Tensor:
    r"""Loss along training: :math:`L(N, S) = (N_c / N)^{\alpha_N} + (S_c / S)^{\alpha_S}`.

    Args:
        N: parameters.
        S: steps of updates, as many as a batch far above the critical one would need.
        Nc, Sc, alpha_N, alpha_S: constants, above 0.

    >>> one = torch.tensor(1.0)
    >>> step_law(4 * one, 2 * one, 8 * one, 6 * one, one, one)
    tensor(5.)
    """
    return size_law(N, Nc, alpha_N) + torch.exp(alpha_S * (Sc.log() - S.log()))


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'; McCandlish et al. 2018, 'An Empirical "
    "Model of Large-Batch Training'",
    covers=("kaplan-scaling-laws", "unraveling-mystery-scaling-laws"),
    unit="model",
)
def critical_batch(loss: Tensor, B_star: Tensor, alpha_B: Tensor) -> Tensor:
    r"""The batch at which time and compute are traded evenly: :math:`B_{crit}(L) = B_* / L^{1/\alpha_B}`.

    >>> critical_batch(torch.tensor(2.0), torch.tensor(80.0), torch.tensor(0.5))
    tensor(20.)
    """
    return B_star * loss ** (-1 / alpha_B)


@card(
    paper="Gadre et al. 2024, 'Language models scale reliably with over-training and on downstream tasks'",
    covers=("language-models-scale-reliably",),
    unit="model",
    claim="it tells larger and longer runs better than a law of compute alone",
)
def over_training(N: Tensor, D: Tensor, E: Tensor, a: Tensor, b: Tensor, eta: Tensor) -> Tensor:
    r"""Loss from compute and tokens per parameter: parallel lines, one per amount of over-training.

    .. math:: L(C, M) = E + (a M^\eta + b M^{-\eta})\, C^{-\eta}, \qquad C = 6 N D,\; M = D / N

    It is `chinchilla` with :math:`\alpha = \beta = 2 \eta`, :math:`a = A\,6^\eta` and :math:`b = B\,6^\eta`.

    Args:
        N: parameters.
        D: tokens.
        E, a, b, eta: constants, above 0.

    >>> one = torch.tensor(1.0, dtype=torch.float64)
    >>> round(float(over_training(2 * one, 3 * one, one, one, one, one)), 4)
    1.0602
    """
    compute, multiplier = TOKENS * N * D, D / N
    return E + (a * multiplier**eta + b * multiplier**-eta) * compute**-eta


def over_training_size(parameters: Mapping[str, Any], compute: float) -> Any:
    r"""The best size for a budget: :math:`M = (b / a)^{1 / 2\eta}`, whatever the budget."""
    multiplier = (parameters["b"] / parameters["a"]) ** (1 / (2 * parameters["eta"]))
    return (compute / (TOKENS * multiplier)) ** 0.5


@card(
    paper="Ghorbani et al. 2021, 'Scaling Laws for Neural Machine Translation'",
    covers=("scaling-laws-neural-machine",),
    unit="model",
    claim="on planted losses it tells the largest models better than a law of the sum of both sizes",
    departs="the paper's reference sizes are folded into the amount, with which they make one factor",
)
def encoder_decoder(Ne: Tensor, Nd: Tensor, amount: Tensor, pe: Tensor, pd: Tensor, floor: Tensor) -> Tensor:
    r"""Loss of translation from the sizes of encoder and decoder.

    .. math:: L(N_e, N_d) = \alpha\, N_e^{-p_e} N_d^{-p_d} + L_\infty

    Of :math:`N` parameters the encoder should have the share :math:`p_e / (p_e + p_d)`.

    Args:
        Ne, Nd: parameters of encoder and decoder.
        amount, pe, pd, floor: constants, above 0.

    >>> one = torch.tensor(1.0)
    >>> encoder_decoder(4 * one, 9 * one, 6 * one, one / 2, one / 2, one)
    tensor(2.)
    """
    return amount * (-pe * Ne.log() - pd * Nd.log()).exp() + floor


def encoder_size(parameters: Mapping[str, Any], size: float) -> Any:
    """The best encoder's parameters when encoder and decoder have ``size`` together."""
    return size * parameters["pe"] / (parameters["pe"] + parameters["pd"])


@card(
    paper="Tissue, Wang, Wang 2024, 'Scaling Law with Learning Rate Annealing'",
    covers=("lr-annealing-law",),
    unit="model",
    claim="it tells the final loss of an unseen schedule better than the same law without its annealing term",
)
def annealing(S1: Tensor, S2: Tensor, L0: Tensor, A: Tensor, alpha: Tensor, C: Tensor) -> Tensor:
    r"""Loss from the two areas of a schedule: :math:`L = L_0 + A\,S_1^{-\alpha} - C\,S_2`.

    Args:
        S1, S2: areas, from `areas`.
        L0, A, alpha: constants, above 0.
        C: what annealing brings.

    >>> one = torch.tensor(1.0)
    >>> annealing(4 * one, one, one, 2 * one, one / 2, one / 2)
    tensor(1.5000)
    """
    return L0 + A * S1**-alpha - C * S2


@card(
    paper="McCandlish et al. 2018, 'An Empirical Model of Large-Batch Training'; Su et al. 2024, 'Unraveling the "
    "Mystery of Scaling Laws: Part I'",
    covers=("unraveling-mystery-scaling-laws",),
    unit="model",
)
def batch_tradeoff(B: Tensor, S_min: Tensor, E_min: Tensor) -> Tensor:
    r"""Steps to a loss from the batch: :math:`S = S_{min} + E_{min} / B`, with :math:`B_{crit} = E_{min} / S_{min}`.

    Args:
        B: examples (or tokens) in a batch.
        S_min: steps that no batch undercuts.
        E_min: examples that no batch undercuts.

    >>> one = torch.tensor(1.0)
    >>> batch_tradeoff(10 * one, 100 * one, 500 * one)
    tensor(150.)
    """
    return S_min + E_min / B
