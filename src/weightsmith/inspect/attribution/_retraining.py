"""Whether an attribution finds what a network can learn from: keep or remove what it points at, and train anew.

A network that is shown a picture with holes never saw such pictures, and its fall says little. One that is trained on
them says how much there was left to learn: pixels ranked high should teach more than those ranked low.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.attribution._parts import Target, chosen, frozen, one_each, slope_at

Data = tuple[Tensor, Tensor]
"""Inputs ``[n, *shape]`` and labels ``[n]``."""

Attribute = Callable[[Tensor, Tensor], Tensor]
"""``(inputs, labels) -> scores`` of the inputs' shape, or with a 1 in the place of channels."""

Fit = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
"""``(inputs, labels) -> (inputs -> classes [n] or logits [n, c])``: a model trained from the start."""

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)


@card(
    paper="Simonyan, Vedaldi, Zisserman 2014, 'Deep Inside Convolutional Networks'",
    covers=("input-gradients-highlight-discriminative",),
    needs=("data",),
    unit="model",
    claim="the plainest attribution, which others are to beat",
)
def input_gradients(model: nn.Module, inputs: Tensor, *, target: Target = None, at_once: int = 256) -> Tensor:
    r"""How much an answer would change with each input value: :math:`\partial F / \partial x`.

    Args:
        model: asked in evaluation mode and left as it was.
        inputs: ``[n, *shape]`` of floats.
        target: the output F that is meant, as for `integrated_gradients`.
        at_once: examples that are computed together.

    Returns:
        ``[n, *shape]``, signed.

    Raises:
        ValueError: inputs that have no gradient, an output that does not depend on them or is several numbers.

    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> input_gradients(layer, torch.zeros(1, 2))
    tensor([[1., 1.]])
    """
    if not inputs.is_floating_point() or not len(inputs):
        raise Error("input_gradients needs inputs [n, ...] of floats, at least one")
    if at_once < 1:
        raise Error(f"at_once is at least 1, got {at_once}")
    one_each(target, len(inputs))
    parts = []
    with frozen(model), torch.enable_grad():
        for rows in torch.arange(len(inputs)).split(at_once):
            point = inputs.detach()[rows.to(inputs.device)].requires_grad_()
            parts.append(slope_at(chosen(model(point), target, rows), point))
    return torch.cat(parts)


@card(
    paper="Shah, Jain, Netrapalli 2021, 'Do Input Gradients Highlight Discriminative Features?'",
    covers=("input-gradients-highlight-discriminative",),
    unit="row",
    claim="exactly the asked share of each example is kept; equal scores are drawn by lot",
)
def keep_ranked(
    inputs: Tensor, scores: Tensor, share: float, *, bottom: bool = False, fill: float | Tensor = 0.0, seed: int = 0
) -> Tensor:
    r"""Inputs of which only the values ranked highest (or lowest) are left.

    Args:
        inputs: ``[n, *shape]``.
        scores: of the same shape, or with a 1 in the second place, where channels are kept together.
        share: of the values to keep, in [0, 1]; rounded to a whole number.
        bottom: keep the lowest instead.
        fill: what takes the place of the others: a number or ``[*shape]``.
        seed: of the lots that equal scores draw.

    Returns:
        ``[n, *shape]``.

    Raises:
        ValueError: scores of another shape or that are not finite, a share outside of [0, 1].

    >>> keep_ranked(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.1, 0.9, 0.2, 0.8]]), 0.5)
    tensor([[0., 2., 0., 4.]])
    """
    wide = inputs.dim() > 2 and scores.shape == (len(inputs), 1, *inputs.shape[2:])
    if scores.shape != inputs.shape and not wide:
        raise Error(f"scores {list(scores.shape)} do not fit inputs {list(inputs.shape)}")
    if not 0 <= share <= 1:
        raise Error(f"share lies in [0, 1], got {share}")
    if not scores.isfinite().all():
        raise Error("the scores hold values that are not finite")
    flat = scores.reshape(len(scores), -1)
    lots = torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1).to(flat.device)
    order = flat.gather(1, lots).argsort(dim=1, descending=not bottom, stable=True)
    kept = lots.gather(1, order)[:, : round(share * flat.shape[1])]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).reshape(scores.shape)
    return torch.where(mask, inputs, torch.as_tensor(fill, dtype=inputs.dtype, device=inputs.device))


@card(
    paper="Shah, Jain, Netrapalli 2021, 'Do Input Gradients Highlight Discriminative Features?': DiffROAR",
    covers=("input-gradients-highlight-discriminative",),
    needs=("data",),
    unit="model",
    claim="about 0 for a random ranking, above 0 for one that knows where the signal is",
)
def diffroar(
    attribute: Attribute,
    training: Data,
    test: Data,
    fit: Fit,
    *,
    shares: Sequence[float] = SHARES,
    fill: float | Tensor = 0.0,
    seed: int = 0,
) -> Report:
    r"""Do the values an attribution ranks high teach more than those it ranks low?

    .. math:: \mathrm{DiffROAR}(k) = \mathrm{acc}\bigl(\text{top } k\bigr) - \mathrm{acc}\bigl(\text{bottom } k\bigr)

    with the accuracy of a model trained and tested on inputs of which only those values are left.

    Args:
        attribute: ``(inputs, labels) -> scores``: the higher, the more important (sizes, where signs mean nothing).
        training: inputs and labels.
        test: inputs and labels.
        fit: ``(inputs, labels) -> predict``: trains from the start. Called twice a share.
        shares: k, of the values that are kept.
        fill: what takes the place of the others.
        seed: of the lots that equal scores draw.

    Returns:
        Report: ``mean`` of DiffROAR over the shares, and a row a share with ``top``, ``bottom`` and ``difference``.

    Raises:
        ValueError: no share; what `keep_ranked` refuses.

    >>> inputs, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]] * 4), torch.tensor([1, 0] * 4)
    >>> fit = lambda inputs, labels: lambda test: (test[:, 0] > 0).long()         # learns from the first value
    >>> first = lambda inputs, labels: torch.tensor([[1.0, 0.0]]).expand_as(inputs)
    >>> diffroar(first, (inputs, labels), (inputs, labels), fit, shares=[0.5])["mean"]
    0.5
    """
    ranks = _ranks(attribute, training, test, shares)
    rows = []
    with progress.task("DiffROAR", 2 * len(shares)) as advance:
        for share in shares:
            found = {}
            for word in ("top", "bottom"):
                left = [
                    (keep_ranked(x, scores, share, bottom=word == "bottom", fill=fill, seed=seed + i), y)
                    for i, ((x, y), scores) in enumerate(zip((training, test), ranks, strict=True))
                ]
                found[word] = _accuracy(fit(*left[0]), left[1])
                advance(1)
            rows.append({"share kept": share, **found, "difference": found["top"] - found["bottom"]})
    lines = [Line(word, list(shares), [row[word] for row in rows]) for word in ("top", "bottom", "difference")]
    figures = {
        "mean": sum(row["difference"] for row in rows) / len(rows),
        "highest": max(row["difference"] for row in rows),
    }
    return Report("DiffROAR", figures, rows, [Plot("DiffROAR", "share of values kept", "accuracy", lines)])


@card(
    paper="Hooker, Erhan, Kindermans, Kim 2019, 'A Benchmark for Interpretability Methods in Deep Neural Networks'",
    covers=("input-gradients-highlight-discriminative",),
    needs=("data",),
    unit="model",
    claim="the better an attribution, the faster accuracy falls with what it removes",
)
def remove_and_retrain(
    attributes: Mapping[str, Attribute],
    training: Data,
    test: Data,
    fit: Fit,
    *,
    shares: Sequence[float] = SHARES,
    fill: float | Tensor = 0.0,
    seed: int = 0,
) -> Report:
    """How fast accuracy falls when what attributions rank highest is removed and models are trained anew.

    Args:
        attributes: attributions by name, ``random`` apart: under that name a random one is added.
        training, test, fit, fill, seed: as for `diffroar`.
        shares: of the values that are removed.

    Returns:
        Report: for each attribution the ``mean`` accuracy over the shares (the lower, the better it is) and ``below
        random``, how much lower that is than for random removal; a row a share.

    Raises:
        ValueError: no share, an attribution named ``random``; what `keep_ranked` refuses.

    >>> inputs, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]] * 4), torch.tensor([1, 0] * 4)
    >>> fit = lambda inputs, labels: lambda test: (test[:, 0] > 0).long()
    >>> first = lambda inputs, labels: torch.tensor([[1.0, 0.0]]).expand_as(inputs)
    >>> found = remove_and_retrain({"first": first}, (inputs, labels), (inputs, labels), fit, shares=[0.5])
    >>> found["first"], found["share removed"]
    ([0.5], [0.5])
    """
    if "random" in attributes:
        raise Error("remove_and_retrain adds the attribution 'random' by itself; give yours another name")
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Attribute] = {"random": lambda x, y: torch.rand(x.shape, generator=generator).to(x.device)}
    every = dict(attributes) | drawn
    curves: dict[str, list[float]] = {}
    with progress.task("remove and retrain", len(every) * len(shares)) as advance:
        for name, attribute in every.items():
            ranks = _ranks(attribute, training, test, shares)
            curves[name] = []
            for share in shares:
                left = [
                    (keep_ranked(x, scores, 1 - share, bottom=True, fill=fill, seed=seed + i), y)
                    for i, ((x, y), scores) in enumerate(zip((training, test), ranks, strict=True))
                ]
                curves[name].append(_accuracy(fit(*left[0]), left[1]))
                advance(1)
    rows = [
        {"share removed": share} | {name: curve[i] for name, curve in curves.items()} for i, share in enumerate(shares)
    ]
    means = {name: sum(curve) / len(curve) for name, curve in curves.items()}
    figures = {f"mean, {name}": mean for name, mean in means.items()}
    figures |= {f"below random, {name}": means["random"] - means[name] for name in attributes}
    lines = [Line(name, list(shares), curve) for name, curve in curves.items()]
    return Report("Remove and retrain", figures, rows, [Plot("Accuracy", "share of values removed", "accuracy", lines)])


@card(
    paper="Shah, Jain, Netrapalli 2021, 'Do Input Gradients Highlight Discriminative Features?': BlockMNIST",
    covers=("input-gradients-highlight-discriminative",),
    needs=("data",),
    unit="row",
    claim="pictures in which it is known where the signal is",
)
def block_pictures(signals: Tensor, *, null: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures of two blocks, one above the other in random order: one with the signal, one that never changes.

    Args:
        signals: ``[n, c, h, w]``.
        null: ``[c, h, w]``, the block without information; a square frame of the signals' largest value if None.
        seed: of the order.

    Returns:
        ``[n, c, 2 h, w]`` pictures, and ``[n, 1, 2 h, w]`` bool: where the signal is.

    Raises:
        ValueError: shapes that do not fit.

    >>> pictures, places = block_pictures(torch.rand(5, 1, 4, 4))
    >>> pictures.shape, places.float().mean().item()
    (torch.Size([5, 1, 8, 4]), 0.5)
    """
    if signals.dim() != 4 or not len(signals):
        raise Error(f"signals are [n, c, h, w], at least one; got {list(signals.shape)}")
    if null is None:
        null = torch.zeros_like(signals[0])
        high, wide = signals.shape[2] // 4, signals.shape[3] // 4
        null[:, high : signals.shape[2] - high, wide : signals.shape[3] - wide] = signals.max()
        null[:, high + 1 : signals.shape[2] - high - 1, wide + 1 : signals.shape[3] - wide - 1] = 0
    if null.shape != signals.shape[1:]:
        raise Error(f"null {list(null.shape)} does not fit signals {list(signals.shape)}")
    above = torch.rand(len(signals), generator=torch.Generator().manual_seed(seed)) < 0.5
    above = above.to(signals.device)[:, None, None, None]
    blocks = null.to(signals).expand_as(signals)
    pictures = torch.cat([torch.where(above, signals, blocks), torch.where(above, blocks, signals)], dim=2)
    places = torch.cat([above, ~above], dim=2).repeat_interleave(signals.shape[2], dim=2)
    return pictures, places.expand(-1, -1, -1, signals.shape[3])


def _ranks(attribute: Attribute, training: Data, test: Data, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    if not shares:
        raise Error("at least one of shares= is needed")
    scores = attribute(*training), attribute(*test)
    for (inputs, labels), found in zip((training, test), scores, strict=True):
        if len(inputs) != len(labels) or not len(labels):
            raise Error(f"{len(inputs)} inputs and {len(labels)} labels do not fit")
        keep_ranked(inputs, found, shares[0])  # what is wrong shows before anything is trained
        for share in shares[1:]:
            keep_ranked(inputs[:1], found[:1], share)
    return scores


def _accuracy(predict: Callable[[Tensor], Tensor], data: Data) -> float:
    said = predict(data[0])
    said = said.argmax(dim=1) if said.dim() == 2 else said
    return float((said == data[1]).double().mean())
