"""An average of any length, after training, from a few averages that were stored on the way.

Each stored average is a known mixture of the run's moments, and so is the one that is wanted. The
mixture of stored ones that comes nearest to it is a small least-squares problem that knows nothing
of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.average._parts import combination
from weightsmith.average._power_ema import power_of
from weightsmith.average.room import Source
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge.room import check_alike
from weightsmith.weights import Step, Weights, open

Profile = tuple[float, float]
"""What an average remembers: the step at which it was stored, and its ``sigma_rel``."""

_RANK = 1e-13  # of the largest eigenvalue of profiles of length one; smaller ones are rounding


def ema_coefficients(
    profiles: Sequence[Profile], step: float, sigma_rel: float, *, normalize: bool = True
) -> tuple[Tensor, float]:
    r"""How to mix stored averages into the average of another length.

    .. math:: \min_c \left\| p - \sum_i c_i p_i \right\|^2, \qquad
        p_i(\tau) = (\gamma_i + 1)\, \tau^{\gamma_i} / t_i^{\gamma_i + 1} \text{ for } 0 < \tau \le t_i

    by the profiles' inner products :math:`\frac{(\gamma_i + 1)(\gamma_j + 1)}{\gamma_i + \gamma_j + 1} \cdot
    \frac{\min(t_i, t_j)^{\gamma_i + \gamma_j + 1}}{t_i^{\gamma_i + 1} t_j^{\gamma_j + 1}}`.

    Args:
        profiles: of each stored average the step :math:`t_i` and the ``sigma_rel`` that gives :math:`\gamma_i`.
        step: of the average that is wanted; not after the last stored one.
        sigma_rel: its length; above 0, at most 0.2887.
        normalize: with :math:`\sum_i c_i = 1`, as the average of a run that stands still must have. What is left
            out of the paper: weights are large beside their changes, so a sum of 0.999 costs more than the fit.

    Returns:
        ``[n]`` float64, and the distance that is left, as a share of the length of :math:`p`: about the relative
        error that the average will have along a run whose moments are independent.

    Raises:
        ValueError: no profile, a step that is not positive, a step after the last, or no such ``sigma_rel``.

    >>> stored = [(step, sigma) for step in range(10, 101, 10) for sigma in (0.05, 0.1)]
    >>> coefficients, error = ema_coefficients(stored, step=100, sigma_rel=0.1)     # one that is stored
    >>> coefficients.argmax().item(), round(coefficients.max().item(), 4), error < 1e-4
    (19, 1.0, True)
    """
    if not profiles:
        raise Error("post-hoc averaging needs at least 1 stored average, got 0")
    wrong = [at for at in (*(at for at, _ in profiles), step) if not (math.isfinite(at) and at > 0)]
    if wrong:
        raise Error(f"steps of averages are counted from 1, got {wrong[0]:g}")
    latest = max(at for at, _ in profiles)
    if step > latest:
        raise Error(f"the last stored average is of step {latest:g}, so none of step {step:g} can be made")
    times = torch.tensor([*(at for at, _ in profiles), step], dtype=torch.float64)
    powers = torch.tensor([*(power_of(sigma) for _, sigma in profiles), power_of(sigma_rel)], dtype=torch.float64)
    cosines = _cosines(times, powers)
    gram, toward = cosines[:-1, :-1], cosines[:-1, -1]
    inverse = torch.linalg.pinv(gram, rtol=_RANK, hermitian=True)
    lengths = _lengths(times, powers)
    sums = lengths[-1] / lengths[:-1]  # what a profile of length one adds to the sum of the coefficients
    mixed = inverse @ toward
    if normalize:
        lacking = 1 - sums @ mixed
        mixed = mixed + inverse @ sums * (lacking / (sums @ inverse @ sums))
    left = 1 - 2 * mixed @ toward + mixed @ gram @ mixed
    return mixed * sums, float(left.clamp(min=0).sqrt())


def _lengths(times: Tensor, powers: Tensor) -> Tensor:
    """The norms ``[n]`` of profiles."""
    return (powers + 1) / (times * (2 * powers + 1)).sqrt()


def _cosines(times: Tensor, powers: Tensor) -> Tensor:
    """The inner products ``[n, n]`` of profiles, each scaled to length one."""
    early = times[:, None] <= times
    ratio = torch.where(early, times[:, None] / times, times / times[:, None])  # at most 1
    # Of min(s, t) ** (g + h + 1) / (s ** (g + 1/2) * t ** (h + 1/2)) the later profile's power is what is left.
    later = torch.where(early, powers, powers[:, None])
    scale = ((2 * powers[:, None] + 1) * (2 * powers + 1)).sqrt() / (powers[:, None] + powers + 1)
    return scale * ratio ** (later + 0.5)


def profile_of(snapshot: Weights) -> Profile | None:
    """Step and ``sigma_rel`` of a stored `power_ema`, from what it says of how it was made; None if it is none.

    >>> average = ws.average.power_ema(sigma_rel=0.05)
    >>> for value in (1.0, 2.0):
    ...     info = average.update({"w": torch.tensor([value])})
    >>> profile_of(average.weights())
    (2.0, 0.05)
    """
    for method, options in _steps(snapshot.lineage):
        if method == "average.power_ema":
            try:
                return float(options["count"]), float(options["sigma_rel"])
            except (KeyError, TypeError, ValueError):
                return None
    return None


def _steps(made: Step | Mapping[str, Any]) -> Iterator[tuple[object, Mapping[str, Any]]]:
    """The last steps that made some weights, back to the first that had several inputs."""
    for _ in range(1000):
        if isinstance(made, Step):
            method, options, inputs, past = made.method, made.options, made.inputs, made.past
        else:  # what a file recorded, which nobody has checked
            method, options, inputs, past = (made.get(key) for key in ("method", "options", "inputs", "made"))
        yield method, options if isinstance(options, Mapping) else {}
        before = [past] if past else list(inputs) if isinstance(inputs, list | tuple) else []
        if len(before) != 1 or not isinstance(before[0], Step | Mapping):
            return
        made = before[0]


@card(
    paper="Karras, Aittala, Lehtinen, Hellsten, Aila, Laine 2024, 'Analyzing and Improving the Training Dynamics of "
    "Diffusion Models' (post-hoc EMA, Algorithm 3)",
    covers=("analyzing-improving-training-dynamics",),
    unit="model",
    claim="an average of another length, made of snapshots of two, is that of training up to a small error",
    departs="the coefficients are made to sum to one, so that what does not change in a run comes out unchanged",
)
def post_hoc_ema(
    snapshots: Sequence[Source],
    sigma_rel: float,
    *,
    step: float | None = None,
    profiles: Sequence[Profile] | None = None,
    normalize: bool = True,
) -> Weights:
    r"""The power-function average of a length that was not kept in training, from snapshots of others.

    .. math:: \bar w = \sum_i c_i \bar w_i

    with the coefficients of `ema_coefficients`. During training two `power_ema`, of ``sigma_rel`` 0.05 and 0.1, are
    stored every now and then, in float32; afterwards any length can be tried without training again.

    Args:
        snapshots: stored averages of one run, in any order; anything that `weightsmith.open` opens.
        sigma_rel: the length that is wanted: standard deviation of the weights' times, as a share of the run;
            above 0, at most 0.2887.
        step: where in the run; at the last snapshot by default.
        profiles: step and ``sigma_rel`` of each snapshot; read from what they say of themselves by default.
        normalize: have the coefficients sum to one; off, they are the paper's.

    Returns:
        Weights: lazy. ``lineage`` names the coefficients, and in ``error`` what the fit leaves.

    Raises:
        ValueError: a snapshot does not say what it is, or `ema_coefficients` refuses.

    >>> kept, snapshots = [ws.average.power_ema(sigma_rel=sigma) for sigma in (0.05, 0.1)], []
    >>> for step in range(1, 101):
    ...     for average in kept:
    ...         info = average.update({"w": torch.tensor([step / 100])})
    ...         if step % 10 == 0:
    ...             snapshots.append(average.weights())
    >>> wanted = ws.average.power_ema(sigma_rel=0.15)
    >>> for step in range(1, 101):
    ...     info = wanted.update({"w": torch.tensor([step / 100])})
    >>> wanted.weights()["w"], post_hoc_ema(snapshots, sigma_rel=0.15)["w"]
    (tensor([0.8250]), tensor([0.8252]))
    """
    opened = [open(snapshot) for snapshot in snapshots]
    if profiles is None:
        profiles = [_said(number, snapshot) for number, snapshot in enumerate(opened, start=1)]
    if len(profiles) != len(opened):
        raise Error(
            f"post_hoc_ema needs a step and a sigma_rel for each of {len(opened)} snapshots, got {len(profiles)}"
        )
    if not opened:
        raise Error("post_hoc_ema needs at least 1 snapshot, got 0")
    check_alike(opened, None, "post_hoc_ema")
    at = max(at for at, _ in profiles) if step is None else step
    coefficients, error = ema_coefficients(profiles, at, sigma_rel, normalize=normalize)
    order = sorted(range(len(opened)), key=lambda index: profiles[index][0])
    chosen = {
        "sigma_rel": sigma_rel,
        "step": at,
        "coefficients": [float(coefficients[i]) for i in order],
        "error": error,
    }
    return combination([opened[i] for i in order], chosen["coefficients"], "average.post_hoc_ema", chosen)


def _said(number: int, snapshot: Weights) -> Profile:
    found = profile_of(snapshot)
    if found is None:
        path = snapshot.lineage.options.get("path", f"snapshot {number}")
        raise Error(
            f"{path} does not say that it is a snapshot of power_ema, at which step and of which sigma_rel; "
            "store what average.weights() gives, or say it with profiles=[(step, sigma_rel), ...]"
        )
    return found
