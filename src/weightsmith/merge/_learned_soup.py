"""The shares of an average of fine-tunes, and the temperature of its answers, are trained on held-out data.

Where a greedy soup takes a model whole or not at all, here each has a share, and a share may differ from layer to
layer. A few numbers are trained, so little held-out data is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.merge import _mean
from weightsmith.merge._coefficients import Per, Values, descend, forwards, likelihood, span
from weightsmith.merge.room import Source, check_alike, lift, opened_models
from weightsmith.stats.room import Batch, Forward, Loss, restored, size
from weightsmith.weights import Weights

_mean_of = lift(_mean.mean)


@dataclass(frozen=True)
class Stirring:
    """What a person wants to see of a step."""

    number: int
    """From 1."""
    loss: float
    """On the batch, before the step."""
    weight: dict[str, Any]
    """The shares after the step."""
    temperature: float
    """What the logits are to be multiplied by."""


@card(
    paper="Wortsman et al. 2022, 'Model soups: averaging weights of multiple fine-tuned models improves accuracy "
    "without increasing inference time' (Appendix I, learned soup)",
    covers=("model-soups",),
    needs=("data",),
    unit="model",
    claim="on test data at least as accurate as the uniform and the greedy soup",
)
def learned_soup(
    models: Sequence[Source],
    module: nn.Module,
    data: Iterable[Batch],
    *,
    per: Per = "model",
    loss: Loss | None = None,
    steps: int = 500,
    rate: float = 0.1,
    seed: int = 0,
    forward: Forward | None = None,
    on_step: Callable[[Stirring], None] | None = None,
) -> Weights:
    r"""The average of models with the shares that fit held-out data best.

    .. math:: \min_{\alpha, \beta} \sum_{(x, y)}
        \ell\Bigl(\beta\, f\bigl(x; \sum_i \alpha_i w_i\bigr),\, y\Bigr), \qquad \alpha = \mathrm{softmax}(a)

    The temperature :math:`\beta` keeps the search from buying certainty with shares; it changes no prediction, is
    not in the weights, and is named in ``lineage``. Only the search holds the models in memory; what it finds is
    a weighted `mean`, read and written in one streaming pass.

    Args:
        models: fine-tunes of one start; anything that `weightsmith.open` opens.
        module: what computes with such weights. It is asked in evaluation mode and left as it was.
        data: labelled batches that no model was trained on: a list (in a new order every time) or a loader.
        per: what has shares of its own: the ``"model"``, each depth (``"layer"``), or each ``"tensor"``.
        loss: ``(model, batch) -> number``, a sum over the examples, where cross-entropy with the labels does not
            fit; without temperature then.
        steps: of Adam, each on one batch, from equal shares.
        rate: how large they are.
        seed: of the order of batches.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        on_step: told of every step.

    Returns:
        Weights: lazy, like every merge. ``lineage`` names the shares and the temperature.

    Raises:
        ValueError: no model, models of different architectures or ones that do not fit the module, batches without
            labels, or a loss that is not finite.

    >>> layer, data = torch.nn.Linear(1, 2, bias=False), [(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))]
    >>> right, wrong = ({"weight": torch.tensor([[x], [-x]])} for x in (1.0, -1.0))
    >>> soup = learned_soup([right, wrong], layer, data)
    >>> [round(share, 1) for share in soup.lineage.options["weight"]["*"]]
    [1.0, 0.0]
    """
    opened = opened_models(models, "learned_soup")
    check_alike(opened, None, "learned_soup")
    ask = forwards(forward, 1, "learned_soup")[0]
    space = span(module, opened, _mean_of(opened), per, "learned_soup")
    device = next(iter(space.start.values())).device
    raw = torch.zeros(space.groups, len(opened), dtype=torch.float64, device=device)
    cold = torch.zeros((), dtype=torch.float64, device=device)

    def slope(values: Values, task: int, batch: Batch) -> Tensor:
        model = space.model(space.mixed(values["shares"].softmax(1)))
        if loss is not None:
            return loss(model, batch) / size(batch)
        logits = ask(model, batch)
        return likelihood(logits * values["temperature"].exp().to(logits.dtype), batch)

    def tell(number: int, losses: tuple[float, ...], values: Values) -> None:
        if on_step is not None:
            shares = space.option(values["shares"].softmax(1))
            on_step(Stirring(number, losses[0], shares, float(values["temperature"].exp())))

    with restored(module):
        begin = {"shares": raw, "temperature": cold}
        found = descend("learned_soup", begin, [data], slope, steps=steps, rate=rate, seed=seed, tell=tell)
    chosen = space.option(found["shares"].softmax(1))
    soup = _mean_of(opened, weight=chosen)
    options = {"weight": chosen, "temperature": float(found["temperature"].exp())}
    return soup.zip_nodes(lambda name, node: node, (), "merge.learned_soup", options)
