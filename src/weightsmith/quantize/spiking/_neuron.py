"""Neurons that add up what they are given and answer with 0 or 1, and how to lose less at that.

A spike says only that the potential was high enough. Two things keep more of it: what is left over stays for the next
moment (the *soft* reset takes a spike's worth away, the hard one all), and potentials are drawn to 0 or 1 before they
are compared, so that a spike stands for nearly what was there.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error

Reset = Literal["soft", "hard"]


@card(
    paper="Guo, Chen, Zhang, Wang, Liu, Tong, Ou, Huang, Ma 2022, 'Reducing Information Loss for Spiking Neural "
    "Networks' (membrane potential rectifier)",
    covers=("reducing-information-loss-spiking",),
    unit="model",
    claim="what spiking neurons compare with their threshold lies nearer to the spikes that it becomes",
    departs="the steepness can be chosen; the paper's is 3",
)
def rectified(potential: Tensor, steepness: float = 3.0) -> Tensor:
    r"""Potentials drawn towards 0 and 1; what was nearer to 1 stays so.

    .. math:: \varphi(u) = \begin{cases} 1 - \sqrt[3]{1 - u} & u < 0 \\
        \frac{1}{2} + \frac{\tanh(k (u - 1/2))}{2 \tanh(k / 2)} & 0 \le u \le 1 \\
        \sqrt[3]{u} & u > 1 \end{cases}

    Args:
        potential: :math:`u`, any shape, floating.
        steepness: :math:`k`, above 0; towards 0 the middle becomes a line, towards infinity a step.

    Returns:
        The shape and dtype of ``potential``; computed in float32 or wider. Continuous and growing, with
        :math:`\varphi(0) = 0`, :math:`\varphi(1/2) = 1/2` and :math:`\varphi(1) = 1`; its slope is finite everywhere.

    Raises:
        Error: a steepness that is not above 0.

    >>> rectified(torch.tensor([-7.0, 0.0, 0.25, 0.5, 1.0, 8.0]))
    tensor([-1.0000,  0.0000,  0.1491,  0.5000,  1.0000,  2.0000])
    """
    if not (steepness > 0 and math.isfinite(steepness)):
        raise Error(f"rectified needs a steepness above 0, got {steepness!r}")
    wide = potential.to(torch.promote_types(potential.dtype, torch.float32))
    # Of each branch only what belongs to it goes in, so that no other sends back a slope that is not finite.
    below = 1 - (1 - wide.clamp(max=0)) ** (1 / 3)
    inside = 0.5 + torch.tanh(steepness * (wide.clamp(0, 1) - 0.5)) / (2 * math.tanh(steepness / 2))
    above = wide.clamp(min=1) ** (1 / 3)
    return torch.where(wide < 0, below, torch.where(wide > 1, above, inside)).to(potential.dtype)


class _Spike(torch.autograd.Function):
    """1 above the threshold, else 0; backwards the slope of a ramp that is one wide and has it in its middle."""

    @staticmethod
    def forward(ctx: Any, potential: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(potential)
        ctx.threshold = threshold
        return (potential > threshold).to(potential.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (potential,) = ctx.saved_tensors
        return gradients[0] * ((potential - ctx.threshold).abs() <= 0.5), None


class Fire(nn.Module):
    r"""Spikes of potentials: :math:`o = [u > \theta]`, with the gradient of :math:`\mathrm{clamp}(u - \theta + 1/2, 0,
    1)`.

    Args:
        threshold: :math:`\theta`; with 1/2 a spike is the nearest of 0 and 1.

    >>> Fire()(torch.tensor([0.4, 0.6, -3.0]))
    tensor([0., 1., 0.])
    """

    def __init__(self, threshold: float = 0.5):
        super().__init__()
        self.threshold = threshold

    def forward(self, potential: Tensor) -> Tensor:
        return _Spike.apply(potential, self.threshold)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class Neuron(nn.Module):
    r"""Leaky integrate-and-fire neurons, over moments in the first axis.

    .. math:: u_t = \tau v_{t-1} + x_t, \qquad o_t = [\varphi(u_t) > \theta], \qquad
        v_t = \begin{cases} u_t - o_t & \text{soft reset} \\ (1 - o_t)\, u_t & \text{hard reset} \end{cases}

    The gradient goes through all moments, resets included; that of the comparison is `Fire`'s. Nothing is remembered
    between calls.

    Args:
        decay: :math:`\tau`, from 0 to 1: what is left of a potential after a moment; 1: nothing leaks.
        reset: ``"soft"``: a spike takes 1 away; ``"hard"``: all.
        rectify: :math:`\varphi` is `rectified`; else potentials are compared as they are.
        threshold: :math:`\theta`.
        steepness: of the rectifier.

    Raises:
        Error: an unknown reset, or a decay outside [0, 1].

    >>> drive = torch.full((4, 1), 0.7)
    >>> Neuron(decay=1.0)(drive).flatten(), Neuron(decay=1.0, reset="hard")(drive).flatten()
    (tensor([1., 0., 1., 1.]), tensor([1., 1., 1., 1.]))
    """

    def __init__(
        self,
        decay: float = 0.5,
        *,
        reset: Reset = "soft",
        rectify: bool = False,
        threshold: float = 0.5,
        steepness: float = 3.0,
    ):
        super().__init__()
        if reset not in ("soft", "hard"):
            raise Error(f"reset is soft or hard, got {reset!r}")
        if not 0 <= decay <= 1:
            raise Error(f"decay lies between 0 and 1, got {decay!r}")
        self.decay, self.reset, self.rectify, self.steepness = decay, reset, rectify, steepness
        self.fire = Fire(threshold)

    def forward(self, inputs: Tensor) -> Tensor:
        """Spikes ``[t, ...]`` of what comes in ``[t, ...]``, in its dtype."""
        if not inputs.dim() or not len(inputs):
            raise Error(f"neurons need inputs [t, ...] of at least one moment, got {list(inputs.shape)}")
        left, spikes = torch.zeros_like(inputs[0]), []
        for now in inputs:
            potential = self.decay * left + now
            spikes.append(self.fire(rectified(potential, self.steepness) if self.rectify else potential))
            left = potential - spikes[-1] if self.reset == "soft" else potential * (1 - spikes[-1])
        return torch.stack(spikes)

    def extra_repr(self) -> str:
        return f"decay={self.decay}, reset={self.reset!r}, rectify={self.rectify}, steepness={self.steepness}"
