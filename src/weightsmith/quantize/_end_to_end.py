"""Train the steps of a quantized model on a task, with its codes as they are.

A step is one number for a whole group of weights, so little memory is needed to train all of them, and a model stays
exactly as small as it was. Where blocks were quantized one by one, this lets them play together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._flexround import LEAST, MOST, learns_steps, over_inputs
from weightsmith.quantize._layout import Layout, dequantize, layouts_of
from weightsmith.quantize._learners import straight
from weightsmith.quantize._parts import unpack
from weightsmith.quantize.grids import Packing
from weightsmith.quantize.room import Source
from weightsmith.solve import generator_for
from weightsmith.stats import Batch, Forward, Loss
from weightsmith.stats.room import counted, default_forward, default_loss, predictions, restored
from weightsmith.weights import Held, Step, Weights, as_dtype, open


@card(
    paper="Chen et al. 2024, 'EfficientQAT: Efficient Quantization-Aware Training for Large Language Models' "
    "(end-to-end training of quantization parameters)",
    covers=("efficientqat",),
    needs=("data",),
    unit="model",
    claim="a coded model loses less on text that was not seen, at the same size",
    departs="steps learn as a share of themselves, from 1/4 to 4 of what they were; a teacher may stand in for labels",
)
def end_to_end(
    weights: Source,
    batches: Iterable[Batch],
    model: nn.Module,
    *,
    teacher: bool = False,
    steps: int = 100,
    lr: float = 1e-3,
    loss: Loss | None = None,
    forward: Forward | None = None,
    compute: torch.dtype | str | None = None,
    seed: int = 0,
) -> Weights:
    r"""Codes as they were, with steps that were trained through the whole model.

    .. math:: \hat W = (s\,f) \odot (q - z), \qquad \min_f \; \mathcal{L}(\hat W)

    from :math:`f = 1`, by Adam with a rate that falls to zero along a line. One of the batches, at random, makes up
    a step. Memory, beside the model: its tensors once more and those that are coded once again, in float32, all
    batches, and what a batch leaves behind for its gradients.

    Args:
        weights: what a method of this room made, coded. Those tensors learn whose steps are plain floats, one at least;
            others stay as they are.
        batches: ``(inputs, labels)``, or mappings such as ``{"input_ids": ...}``; with ``teacher`` also ``inputs``; on
            the device of the model, and all of them held.
        model: in which the weights are used, with its own in floats; it is left as it was.
        teacher: learn what the model gives with its own weights (the divergence of predictions), instead of the labels.
        steps: of Adam.
        lr: as a share of a step.
        loss: ``(model, batch) -> number``, where the default does not fit.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        compute: ``"bfloat16"`` for products in half the width (autocast).
        seed: of the order of batches.

    Returns:
        Weights: the given ones with other scales, rounded to the dtype that they had.

    Raises:
        Error: nothing is coded, no step that could learn, weights that the model does not have, no batch, or steps that
            came to be no numbers.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> coded = ws.quantize.rtn(net, bits=3)
    >>> better = end_to_end(coded, [torch.ones(3, 4)], net, teacher=True, steps=3)
    >>> torch.equal(better["0.weight_packed"], coded["0.weight_packed"])
    True
    """
    if steps < 1 or not lr > 0:
        raise Error(f"end_to_end needs a step and an lr above 0, got {steps=} and {lr=}")
    opened = open(weights)
    given = list(batches)
    if not given:
        raise Error("end_to_end needs at least one batch of data, got none")
    steppers = _steppers(opened, model)
    ask, judge = forward or default_forward, loss or default_loss
    own = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    values = dequantize(opened, torch.float32)
    for name in own:
        if name in values and name not in steppers:  # norms, biases and embeddings are those of the coded weights
            own[name] = values[name].to(own[name])
    leaves = [one.factor for one in steppers.values()]
    adam = torch.optim.Adam(leaves, lr=lr, betas=(0.9, 0.99), eps=1e-12)
    generator = generator_for(seed)
    device = leaves[0].device.type
    order: list[int] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        tensors = {**own, **{name: one.values().to(own[name].dtype) for name, one in steppers.items()}}
        return functional_call(model, tensors, args, kwargs)

    with restored(model), torch.enable_grad(), progress.task("steps", steps) as advance:
        for number in range(steps):
            order = order or torch.randperm(len(given), generator=generator).tolist()
            batch = given[order.pop()]
            with torch.autocast(device, _dtype(compute), enabled=compute is not None):
                total = _divergence(ask, called, model, batch) if teacher else judge(called, batch)
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            adam.param_groups[0]["lr"] = lr * (1 - number / steps)
            adam.step()
            with torch.no_grad():
                for leaf in leaves:
                    leaf.clamp_(LEAST, MOST)
            advance(1)
    lost = [name for name, one in steppers.items() if not one.factor.isfinite().all()]
    if lost:
        raise Error(
            f"the steps of {listed(lost)} came to be no numbers: the loss or its slope was none; see the batches"
        )
    said = {"teacher": teacher, "steps": steps, "lr": lr, "seed": seed, "compute": compute and str(_dtype(compute))}
    step = Step("quantize.end_to_end", said, (opened.lineage,))
    nodes = {name: opened.node(name) for name in opened}
    for one in steppers.values():
        nodes |= dict.fromkeys((f"{name}_scale" for name in one.names), Held(one.scale().detach().to("cpu", one.dtype)))
    return Weights(nodes, step, opened.files, opened.metadata)


@dataclass
class _Stepper:
    """A coded matrix whose steps learn: its values are ``begun * factor * base + minimum``, a group at a time."""

    names: list[str]
    layout: Layout
    base: Tensor
    minimum: Tensor | None
    begun: Tensor
    factor: Tensor
    dtype: torch.dtype

    def scale(self) -> Tensor:
        """The steps, rounded as they are stored; gradients pass."""
        scale = self.begun * self.factor
        return straight(scale, scale.detach().to(self.dtype).to(scale.dtype))

    def values(self) -> Tensor:
        """The weight."""
        wide, grid = self.base.shape[1], self.layout.grid
        found = self.base * over_inputs(self.scale(), grid, wide)
        if self.minimum is not None:
            found = found + over_inputs(self.minimum, grid, wide)
        return found[:, : self.layout.inputs].reshape(self.layout.shape)


def _steppers(weights: Weights, model: nn.Module) -> dict[str, _Stepper]:
    """Every coded matrix whose steps can learn, by the model's first name of it."""
    own = dict(model.named_parameters(remove_duplicate=False))
    first = {id(value): name for name, value in model.named_parameters()}
    layouts = layouts_of(weights)
    absent = [name for name in layouts if name not in own]
    if absent:
        raise Error(f"the model has no {listed(absent)}, which the weights hold as codes")
    names: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        if learns_steps(layout.grid):
            names.setdefault(first[id(own[name])], []).append(name)
    if not names:
        name, layout = next(iter(layouts.items()))
        raise Error(f"{name} lies on {layout.grid}, and no coded tensor has a step that could learn: a plain float")
    for tied in names.values():
        if len({weights.ties.get(f"{name}_packed", f"{name}_packed") for name in tied}) > 1:
            raise Error(f"{listed(tied)} are one tensor in the model, and have codes of their own in the weights")
    return {name: _stepper(weights, tied, layouts[tied[0]], own[name].device) for name, tied in names.items()}


def _stepper(weights: Weights, names: list[str], layout: Layout, place: torch.device) -> _Stepper:
    name, grid, stored = names[0], layout.grid, layout.grid.stored()
    given = {key: weights[f"{name}_{key}"] for key in stored}
    params = {key: (value if value.dtype == torch.float64 else value.float()).to(place) for key, value in given.items()}
    packed = weights[f"{name}_packed"].to(place)
    codes = grid.unpacked(packed, layout.width, params) if isinstance(grid, Packing) else unpack(
        packed, grid.bits, layout.width
    )  # fmt: skip
    # Of steps of 1 and with no minimum, so that steps multiply what codes stand for, those of 0 too.
    plain = {**params, "scale": torch.ones_like(params["scale"])}
    minimum = params.get("minimum")
    if minimum is not None:
        plain["minimum"] = torch.zeros_like(minimum)
    shared = {key: plain.pop(key) for key, one in stored.items() if one.shared}
    base = Coded(codes, plain, grid, shared).values()
    factor = torch.ones_like(params["scale"]).requires_grad_()
    return _Stepper(names, layout, base, minimum, params["scale"], factor, given["scale"].dtype)


def _divergence(ask: Forward, called: Any, model: nn.Module, batch: Batch) -> Tensor:
    """Of the predictions from those of the model with its own weights, summed over those that count."""
    with torch.no_grad():
        target = ask(model, batch).float()
    found = ask(called, batch).float()
    counts = counted(found, batch)
    found, target = predictions(found, batch), predictions(target, batch)
    each = kl_div(log_softmax(found, -1), log_softmax(target, -1), log_target=True, reduction="none").sum(-1)
    return each[counts].sum()


def _dtype(compute: torch.dtype | str | None) -> torch.dtype:
    return torch.bfloat16 if compute is None else as_dtype(compute)
