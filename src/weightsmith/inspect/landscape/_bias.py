"""How much must be known before any data: the information that picks out models which generalise.

Draw models at random from what an architecture (or an architecture and its training data) allows. Were every tenth
one good, a choice among them would take log 10 nats of knowledge. Good ones are far too rare to be met in a
sample, so the law of the sampled losses is fitted, and its tail read off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.landscape._tail import Law, fit, log_chance, log_density

Hypothesis = Any

GROUPS = 256
"""Of sampled losses, for the interval."""


MISFIT = 1.63
"""Over the root of the sample: how far from a law a sample of it lies in one case of a hundred (Kolmogorov)."""


@card(
    paper="Boopathy, Yue, Hwang, Iyer, Fiete 2024, 'Towards Exact Computation of Inductive Bias'",
    covers=("exact-computation-inductive-bias",),
    needs=("data",),
    unit="model",
    claim="within ten per cent where the law of the losses is known",
    departs="the tail is summed exactly where the authors' code falls back to an approximation by a normal law; the "
    "interval by bootstrap is added",
)
def inductive_bias(
    sampler: Callable[[int], Hypothesis] | Sequence[float] | Tensor,
    loss: Callable[[Hypothesis], float] | None = None,
    eps: float = 0.0,
    *,
    samples: int = 1000,
    bootstrap: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    r"""The nats of inductive bias that a task needs: how rare a model with a loss of at most eps is.

    .. math:: I = -\log P_{h}\bigl[ L(h) \le \varepsilon \bigr]

    The sampled losses are taken to follow a scaled non-central chi-square law, as squared errors of a model that
    is linear in Gaussian weights do; it is fitted by likelihood, and its distribution function read at
    :math:`\varepsilon`.

    Args:
        sampler: ``seed -> hypothesis``: a network with random weights, say, or one trained from a random start; or
            the losses themselves.
        loss: ``hypothesis -> number`` above 0 on test data; squared errors follow the law best.
        eps: the loss that counts as success, above 0.
        samples: hypotheses drawn.
        bootstrap: samples of the losses, drawn with replacement, for the interval.
        confidence: of the interval.
        seed: of the bootstrap; hypotheses have the numbers from ``seed * samples`` on.

    Returns:
        Report: ``nats`` with ``low`` and ``high``, ``bits``, the fitted law, how far its distribution function is from
        that of the sample (``misfit``), and the share of samples that reach eps (``reached``).

    Raises:
        ValueError: an eps or losses that are not above 0, or fewer than 8 of them.

    >>> losses = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)).square().sum(1)
    >>> found = inductive_bias(losses, eps=0.1, bootstrap=0)
    >>> 19 < found["nats"] < 21          # of the ten Gaussians all must be near 0: exactly 19.8
    True
    """
    if not (math.isfinite(eps) and eps > 0):
        raise Error(f"eps is the loss that counts as success, above 0; got {eps}")
    if bootstrap < 0 or not 0 < confidence < 1:
        raise Error(f"bootstrap is at least 0 and confidence between 0 and 1, got {bootstrap} and {confidence}")
    losses = _sampled(sampler, loss, samples, seed)
    law = fit(losses)
    nats = -float(log_chance(law, eps))
    ordered = losses.sort().values
    few = ordered[:: max(len(ordered) // 100, 1)].contiguous()  # about a hundred, evenly
    theory = torch.tensor([float(log_chance(law, x).exp()) for x in few.tolist()], dtype=torch.float64)
    places = torch.searchsorted(ordered, few, right=True).double() / len(ordered)
    figures: dict[str, Any] = {"nats": nats, "bits": nats / math.log(2)}
    if bootstrap:
        others = -log_chance(_fits_again(ordered, law, bootstrap, seed), eps)
        tail = (1 - confidence) / 2
        low, high = torch.quantile(others, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        figures |= {"low": low, "high": high}
    figures |= {
        "eps": eps,
        "reached": float((losses <= eps).double().mean()),
        "freedom": float(law.freedom),
        "offset": float(law.offset),
        "scale": float(law.scale),
        "misfit": float((theory - places).abs().max()),
        "samples": len(losses),
    }
    notes = []
    if figures["misfit"] > MISFIT / math.sqrt(len(losses)):
        notes.append("The sampled losses do not follow the fitted law well (misfit); its tail is a guess.")
    return Report("Inductive bias that the task needs", figures, (), [_drawn(ordered, law, eps)], notes)


def _fits_again(ordered: Tensor, law: Law, bootstrap: int, seed: int) -> Law:
    """The law fitted to samples of the sample. Neighbours count as one of their mean: `GROUPS` tell as much."""
    n = len(ordered)
    group = torch.arange(n) * min(GROUPS, n) // n
    sizes = torch.bincount(group)
    middles = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, group, ordered) / sizes
    drawn = group[torch.randint(0, n, (bootstrap, n), generator=torch.Generator().manual_seed(seed))]
    counts = torch.zeros(bootstrap, len(sizes), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return fit(middles, counts, law, rounds=25)


def _sampled(sampler: Any, loss: Callable[[Any], float] | None, samples: int, seed: int) -> Tensor:
    if not callable(sampler):
        losses = torch.as_tensor(sampler, dtype=torch.float64).detach().reshape(-1).cpu()
    else:
        if samples < 8:
            raise Error(f"samples is at least 8, got {samples}")
        found = []
        with progress.task("hypotheses", samples) as advance:
            for index in range(samples):
                hypothesis: Any = sampler(seed * samples + index)
                found.append(float(loss(hypothesis)) if loss is not None else float(hypothesis))
                advance(1)
        losses = torch.tensor(found, dtype=torch.float64)
    bad = int((~(losses.isfinite() & (losses > 0))).sum())
    if bad:
        raise Error(f"{bad} of {len(losses)} losses are not finite numbers above 0")
    return losses


def _drawn(ordered: Tensor, law: Law, eps: float) -> Plot:
    low, high = float(ordered[0]), float(ordered[-1])
    grid = torch.linspace(min(eps, low), high, 200, dtype=torch.float64)
    density = log_density(law, grid).exp()
    counts = torch.histc(ordered, 40, low, high) / len(ordered) / ((high - low) / 40 or 1.0)
    middles = [low + (i + 0.5) * (high - low) / 40 for i in range(40)]
    lines = [
        Line("sampled", middles, counts.tolist(), style="points"),
        Line("fitted law", grid.tolist(), density.tolist()),
        Line("eps", [eps, eps], [0.0, float(density.max())]),
    ]
    return Plot("Losses of random models", "loss", "density", lines)
