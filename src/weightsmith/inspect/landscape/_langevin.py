"""Weights drawn from the posterior by noisy gradient steps, and the mean of what they predict.

Gradient descent with noise of the right size does not stop at a minimum: it visits weights as often as they are
likely given data and prior. The mean of the predictions along the way is that of the mixture of all models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.landscape._parts import Batches, Loss, Objective, Source, deviations, walking
from weightsmith.stats import room
from weightsmith.weights import Pattern, PerTensor, Weights, working


@dataclass(frozen=True)
class Posterior:
    """What was drawn."""

    samples: tuple[Weights, ...]
    losses: tuple[float, ...]
    """The batch's mean loss at every step."""

    def report(self) -> Report:
        """How the loss went."""
        line = Line("loss of the batch", list(range(1, len(self.losses) + 1)), list(self.losses))
        figures = {"samples": len(self.samples), "steps": len(self.losses), "last loss": self.losses[-1]}
        return Report("Langevin dynamics", figures, (), [Plot("Langevin dynamics", "step", "loss", [line])])


@card(
    paper="Feder, Urbanke, Fogel 2025, 'The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well'; "
    "Welling, Teh 2011, 'Bayesian Learning via Stochastic Gradient Langevin Dynamics'",
    covers=("the-universality-lens",),
    needs=("data",),
    unit="model",
    claim="its mean prediction on held-out data is likelier than single samples', and less likely than that of one "
    "network stopped at its best",
)
def langevin(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    examples: int,
    rate: float,
    steps: int = 1000,
    burn: int = 500,
    samples: int = 10,
    prior: PerTensor[float] = 1.0,
    temperature: float = 1.0,
    decay: float = 0.0,
    pattern: Pattern = "*",
    seed: int = 0,
) -> Posterior:
    r"""Weights drawn from the posterior by stochastic gradient Langevin dynamics.

    .. math:: w \leftarrow w - \frac{\epsilon_t}{2} \Bigl( n\, \nabla L_b(w) + \frac{w}{\sigma^2} \Bigr)
        + \sqrt{\epsilon_t T}\; \xi, \qquad \epsilon_t = \epsilon\, (1 + t)^{-\gamma}

    Args:
        model: where the walk starts; asked in evaluation mode and left as it was.
        loss: as for `line`: the mean of minus log-likelihoods over a batch.
        batches: gone through again and again, one a step.
        examples: n, how many there are in all: the posterior's likelihood is n times the mean loss.
        rate: the step size; the smaller, the truer and the slower.
        steps: in all.
        burn: steps before the first sample is kept.
        samples: kept, evenly over the other steps, the last among them.
        prior: standard deviation of each weight around 0; it may differ by tensor.
        temperature: below 1 the walk stays nearer to minima (a cold posterior); at 0 it is gradient descent.
        decay: how fast the steps shrink; the original has 0.55.
        pattern: names of the weights that move.
        seed: of the noise.

    Returns:
        Posterior: samples as `Weights` of the weights that moved, each for ``load_into(model, strict=False)``.

    Raises:
        ValueError: options out of range, no batch, or a walk that ran off to what is not finite.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> found = langevin(net, lambda model: (model.weight - 2).square().sum() / 2, examples=100, rate=0.01)
    >>> len(found.samples), 1 < sum(float(sample["weight"]) for sample in found.samples) / 10 < 3
    (10, True)
    """
    for name, value, least in (("examples", examples, 1), ("samples", samples, 1), ("burn", burn, 0)):
        if value < least:
            raise Error(f"{name} is at least {least}, got {value}")
    if not (math.isfinite(rate) and rate > 0 and temperature >= 0 and decay >= 0):
        raise Error(f"rate is above 0, temperature and decay at least 0; got {rate}, {temperature}, {decay}")
    if steps < burn + samples:
        raise Error(f"{samples} samples after {burn} steps need at least {burn + samples} steps, got {steps}")
    parameters = parameters_of(model, pattern)
    spreads = deviations(prior, parameters)
    objective = Objective.of(loss, batches)
    keep = {burn + round((i + 1) * (steps - burn) / samples) for i in range(samples)}
    generator = torch.Generator().manual_seed(seed)
    kept, losses = [], []
    with walking(model, {n: p.detach().clone() for n, p in parameters.items()}, []), torch.enable_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parameters)
        place = {name: working(p.detach().clone()) for name, p in parameters.items()}
        with progress.task("langevin", steps) as advance:
            for step, batch in zip(range(1, steps + 1), _again(objective), strict=False):
                value, _ = objective.loss_of(model, batch)
                slopes = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise Error(f"langevin: the loss is {losses[-1]} at step {step}; take a smaller rate than {rate:g}")
                size = rate * step**-decay
                with torch.no_grad():
                    for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
                        now = place[name]
                        drift = examples * slope.to(now) + now / spreads[name] ** 2
                        noise = torch.randn(now.shape, generator=generator, dtype=now.dtype).to(now.device)
                        now.add_(drift, alpha=-size / 2).add_(noise, alpha=math.sqrt(size * temperature))
                        parameter.copy_(now)
                if step in keep:
                    kept.append(
                        Weights.of({name: now.to(parameters[name].dtype).clone() for name, now in place.items()})
                    )
                advance(1)
    return Posterior(tuple(kept), tuple(losses))


def _again(objective: Objective) -> Iterator[Any]:
    """The batches without end."""
    while True:
        some = False
        for batch in objective.each():
            some = True
            yield batch
        if not some:
            raise Error("langevin needs at least one batch of data, got none")


@card(
    paper="Feder, Urbanke, Fogel 2025, 'The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well'",
    covers=("the-universality-lens",),
    needs=("data",),
    unit="model",
    claim="its log-loss is at most the mean log-loss of the samples",
)
@torch.no_grad()
def predictions(
    model: nn.Module,
    samples: Sequence[Source],
    batches: Batches,
    *,
    forward: Callable[[Any, Any], Tensor] | None = None,
) -> Tensor:
    r"""The mean of what several sets of weights predict, :math:`\frac1m \sum_i p(y \mid x, w_i)`.

    Args:
        model: lends its form, and the tensors that the samples lack; left as it was.
        samples: of `langevin`, or any checkpoints.
        batches: ``inputs`` or ``(inputs, labels)``.
        forward: ``(model, batch) -> logits [n, ..., c]``, where the default does not fit.

    Returns:
        Tensor: probabilities ``[n, ..., c]`` of all batches' examples, in order.

    Raises:
        ValueError: no sample or no batch.

    >>> net = torch.nn.Linear(1, 2, bias=False)
    >>> two = [{"weight": torch.tensor([[0.0], [100.0]])}, {"weight": torch.tensor([[100.0], [0.0]])}]
    >>> predictions(net, two, [torch.ones(1, 1)])
    tensor([[0.5000, 0.5000]])
    """
    if not len(samples):
        raise Error("predictions need at least 1 sample, got 0")
    if iter(batches) is batches:
        batches = list(batches)
    total: Tensor | None = None
    for sample in samples:
        with walking(model, sample, []) as walk:
            walk.go(())
            parts = [working((forward or room.default_forward)(model, batch)).softmax(dim=-1) for batch in batches]
        if not parts:
            raise Error("predictions need at least one batch of data, got none")
        found = torch.cat(parts)
        total = found if total is None else total + found
    assert total is not None
    return total / len(samples)
