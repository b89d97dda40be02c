"""Train nothing but whether each weight of an untrained network is kept, hidden or inverted.

The weights are constants with random signs. A mask of -1, 0 and 1 learns, and the network that results has one size of
weight in a layer: it is written down as a seed and two bits a weight.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weightsmith.adapt import parametrized
from weightsmith.card import card
from weightsmith.errors import Error, FormatError, listed
from weightsmith.prune.sparse._parametrizations import (
    Straight,
    fan_in,
    frozen,
    kept_wholes,
    of_each,
    original,
    standing,
    weights_of,
    wide,
)
from weightsmith.solve import uniform
from weightsmith.weights import Pattern, PerTensor, Weights, open

SEED, ABOUT = "seed", "supermask"


class SignedMask(nn.Module):
    """The parametrization ``W -> mask * W`` with a mask of -1, 0 and 1; see `signed_supermask`.

    Args:
        weight: ``[out, ...]``, the constants; they get no gradient.
        latent: ``[*shape]``, what learns.
        above: above it the mask is 1.
        below: under it the mask is -1.
        sparsity: instead of both thresholds, the share that is hidden: the smallest latent magnitudes.
        seed: the constants' own, kept for `packed`.
    """

    def __init__(
        self, weight: Tensor, latent: Tensor, above: float, below: float, sparsity: float | None = None, seed: int = 0
    ):
        super().__init__()
        self.latent = nn.Parameter(latent.to(weight.device, wide(weight)))
        self.above, self.below, self.sparsity, self.seed = above, below, sparsity, seed

    @torch.no_grad()
    def mask(self) -> Tensor:
        """``[*shape]`` int8: -1, 0 and 1."""
        if self.sparsity is None:
            return (self.latent > self.above).to(torch.int8) - (self.latent < self.below).to(torch.int8)
        kept = kept_wholes(self.latent.abs(), self.sparsity)
        # A latent value of zero that is kept has to have a sign, or one weight too many would be hidden.
        signs = 1 - 2 * (self.latent < 0).to(torch.int8)
        return torch.where(kept, signs, torch.zeros_like(signs))

    def forward(self, weight: Tensor) -> Tensor:
        return Straight.apply(weight.detach(), self.latent, self.mask())  # type: ignore[return-value]


def signed_constants(weight: Tensor, seed: int, name: str) -> Tensor:
    r"""Constants with random signs, :math:`\pm \sqrt{6 / \text{fan-in}}` ("ELUS": 3 times He's variance).

    Args:
        weight: ``[out, ...]``; of its shape, dtype and device.
        seed: of the signs.
        name: of the tensor; each has random numbers of its own.
    """
    drawn = uniform(weight.numel(), start=0, seed=seed, key=name).reshape(weight.shape)
    size = torch.tensor(math.sqrt(6 / fan_in(weight)), dtype=wide(weight))
    return torch.where(drawn < 0.5, -size, size).to(weight.device, weight.dtype)


@card(
    paper="Koster, Grothe, Rettinger 2022, 'Signing the Supermask: Keep, Hide, Invert'",
    covers=("signing-the-supermask",),
    unit="model",
    claim="at 95 % a mask that may invert weights is at least as accurate as one that may only hide them",
    departs="biases stand still instead of being absent; with sparsity= both thresholds follow from it, at one "
    "magnitude, so that exactly so many weights are hidden",
)
def signed_supermask(
    module: nn.Module,
    pattern: Pattern | None = None,
    *,
    above: float = 0.01,
    below: float = -0.01,
    sparsity: PerTensor[float] | None = None,
    seed: int = 0,
) -> dict[str, SignedMask]:
    r"""Replace weights by signed constants and let only a mask of them learn; everything else stands still.

    .. math:: \tilde W = m \odot W_0, \qquad m = \begin{cases} 1 & M > \tau_p \\ -1 & M < \tau_n \\ 0 & \text{else}
              \end{cases}, \qquad \frac{\partial}{\partial M} := W_0 \odot \frac{\partial}{\partial \tilde W}

    :math:`W_0 = \pm \sqrt{6 / \text{fan-in}}`, made for ELU activations; M begins uniform within
    :math:`\sqrt{6 / (\text{fan-in} + \text{fan-out})}`. With fixed thresholds it is the optimizer's weight decay on M
    that hides weights; ``sparsity`` says how many instead. Make the optimizer afterwards, of the parameters that still
    need gradients. `weightsmith.adapt.fold` leaves the network of signed constants.

    Args:
        module: changed in place: its weights get the parametrization `SignedMask`, and their values are lost.
        pattern: of the names of weights; default the usual ones.
        above: :math:`\tau_p`.
        below: :math:`\tau_n`.
        sparsity: the share hidden of each tensor, possibly by tensor; None: as the thresholds have it.
        seed: of constants and masks.

    Returns:
        name of a weight -> its parametrization, in order; ``.latent`` learns and ``.mask()`` is the mask.

    Raises:
        Error: no weight fits, thresholds out of order, or a share outside [0, 1].

    >>> model = nn.Linear(6, 2, bias=False)
    >>> masks = signed_supermask(model, sparsity=0.5)
    >>> int((model.weight == 0).sum()), model.weight.abs().max().item()
    (6, 1.0)
    """
    if not below <= above:
        raise Error(f"signed_supermask: below must not lie above {above}, got {below}")
    targets = weights_of(module, pattern)
    shares: Mapping[str, float | None] = dict.fromkeys(targets)
    if sparsity is not None:
        shares = of_each(sparsity, targets, "sparsity")
    frozen(module)
    found: dict[str, SignedMask] = {}
    for name, weight in targets.items():
        bound = math.sqrt(6 / (fan_in(weight) + fan_in(weight.transpose(0, 1))))
        drawn = uniform(weight.numel(), start=0, seed=seed, key=f"{name} mask").reshape(weight.shape)
        weight.data.copy_(signed_constants(weight, seed, name))
        found[name] = SignedMask(weight, (2 * drawn - 1) * bound, above, below, shares[name], seed)
        parametrized(module, name, found[name])
    return found


def packed(module: nn.Module) -> Weights:
    """The masks of a module in two bits a weight, and the seed of its constants.

    Args:
        module: the one that `signed_supermask` was given: constants are found again by seed and name.

    Returns:
        Weights: name -> uint8 ``[ceil(weights / 4)]``, and ``"seed"``; what else the module holds is not in it.

    Raises:
        Error: no such masks, or constants that are not those of one seed under these names.
    """
    masks = standing(module, SignedMask)
    seeds = {made.seed for made in masks.values()}
    if len(seeds) != 1:
        raise Error(f"packed needs the masks of signed_supermask with one seed, found {len(masks)} and {len(seeds)}")
    (seed,) = seeds
    codes: dict[str, Tensor] = {}
    for name, made in masks.items():
        constants = original(module, name).detach()
        # A cast of the module rounds its constants.
        if not torch.allclose(constants, signed_constants(constants, seed, name), rtol=0.01):
            raise Error(
                f"packed: the constants of {name} are not those of seed {seed} under this name; pack the module that "
                "signed_supermask was given, with its seed"
            )
        codes[f"{ABOUT}.{name}"] = two_bits(made.mask())
    return Weights.of({SEED: torch.tensor(seed)} | codes, "signed_supermask")


def unpacked(module: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Write what `packed` holds into a plain module of the same shapes, in place; the rest of it stays.

    Args:
        module: has weights of the same names.
        source: what `packed` returned, or a file of it.

    Raises:
        FormatError: it is something else, or of another length than a weight has.

    >>> model = nn.Linear(6, 2, bias=False)
    >>> _ = signed_supermask(model, sparsity=0.5, seed=3)
    >>> other = nn.Linear(6, 2, bias=False)
    >>> unpacked(other, packed(model))
    >>> torch.equal(other.weight, model.weight)
    True
    """
    opened = open(source)
    parameters = dict(module.named_parameters())
    names = [name.removeprefix(f"{ABOUT}.") for name in opened if name != SEED]
    if SEED not in opened or any(f"{ABOUT}.{name}" not in opened for name in names):
        raise FormatError(f"these are no packed masks of signed_supermask, but {listed(opened)}")
    for name in names:
        length = opened.spec(f"{ABOUT}.{name}").numel
        if name not in parameters or length != -(-parameters[name].numel() // 4):
            raise FormatError(f"the mask of {name}, {length} bytes, fits no plain weight of that name")
    seed = int(opened[SEED])
    masks = {name: of_two_bits(opened[f"{ABOUT}.{name}"], parameters[name].numel()) for name in names}
    with torch.no_grad():
        for name, mask in masks.items():
            weight = parameters[name]
            weight.copy_(signed_constants(weight, seed, name) * mask.reshape(weight.shape).to(weight.device))


def two_bits(mask: Tensor) -> Tensor:
    """-1, 0 and 1 to bytes of four, lowest bits first.

    >>> two_bits(torch.tensor([-1, 0, 1, 0, 1]))
    tensor([100,   2], dtype=torch.uint8)
    """
    codes = (mask.flatten() + 1).to(torch.uint8)
    codes = nn.functional.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
    return codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6


def of_two_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `two_bits`: int8 ``[count]``."""
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[:count]
    if (codes == 3).any():
        raise FormatError("a packed mask holds a code that is none of -1, 0 and 1")
    return codes.to(torch.int8) - 1
