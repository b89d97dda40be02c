"""Bring a pruned model back: block by block first, then as a whole, with the dense model as its teacher.

Pruning leaves each block slightly wrong, and the errors add up on the way. Each block is first trained to give what the
dense one gave, from what it is really given now; what is left is then trained through the whole model, on the
teacher's probabilities, which say more of each token than its label.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress
from weightsmith.adapt import unparametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.repair._lora import checked_masks, masked_lora
from weightsmith.prune.repair._reconstruct import descend, evaluating, fit
from weightsmith.prune.repair._small import small_parameters
from weightsmith.prune.room import Source
from weightsmith.stats import Batch, Block, Forward, Loss, walk
from weightsmith.stats.room import counted, default_forward, default_loss, predictions, size
from weightsmith.weights import Weights, open

Stage = Literal["blocks", "small", "lora", "all"]
"""``"blocks"`` one after another; then, through the whole model, biases and norms alone (``"small"``), these and
changes of low rank that keep the zeros (``"lora"``), or every weight that is kept (``"all"``)."""

RATES: dict[Stage, float] = {"blocks": 3e-4, "small": 1e-3, "lora": 1e-3, "all": 1e-4}
"""Of Adam, where none is said."""


@card(
    paper="Hinton, Vinyals, Dean 2015, 'Distilling the Knowledge in a Neural Network'",
    needs=("data",),
    unit="model",
    claim="a few hundred steps bring back most of what pruning lost, and not one zero is lost",
    departs="block outputs before logits; weights that were pruned stay zero",
)
def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    masks: Mapping[str, Tensor] | None = None,
    steps: int = 100,
    stages: Sequence[Stage] = ("blocks", "lora"),
    rates: Mapping[Stage, float] | None = None,
    truth: float = 0.0,
    rank: int = 8,
    blocks: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> nn.Module:
    r"""Train a pruned model to give what the dense one gives; what was pruned stays zero.

    .. math:: \operatorname{KL}(p_{\text{teacher}} \,\Vert\, p) + \tau \cdot \text{loss}

    a prediction, for the stages through the whole model; for blocks see `reconstruct`, whose targets are here what the
    dense blocks give after one another, so that a block makes up for the loss of those before it too.

    Args:
        model: trained in place; in evaluation mode meanwhile (no dropout, batch norm stands still).
        teacher: the dense model; unchanged. Its parameters have the names of the model's.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; held in memory. One batch a step.
        masks: boolean by the names of weights, true for what is kept; default: the zeros that the weights hold.
        steps: of each block, and of each stage after; both cost about as much.
        stages: what is trained, in order; see `Stage`.
        rates: of Adam by stage, where `RATES` do not fit; they fall along a line to zero.
        truth: what the loss on the labels counts beside the teacher.
        rank: of ``"lora"``.
        blocks: the modules that follow one another, as in `weightsmith.stats.walk`; default: the one stack there is.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        loss: ``(model, batch) -> number``, summed, where the default does not fit and ``truth`` is not 0.
        seed: of the order of batches and of what is drawn.

    Returns:
        The model. Memory: the teacher; one block three times and the hidden states of all batches twice, in float32;
        then gradients and Adam's two numbers of what is trained, and the logits of a batch a few times.

    Raises:
        Error: unknown stages, no zeros and no masks, masks that do not fit, no batch, models of other names or shapes.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator ...>
    >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    >>> model = copy.deepcopy(teacher)
    >>> _ = ws.prune.magnitude(teacher, 0.7).load_into(model)
    >>> data = [torch.randn(32, 8) for _ in range(4)]
    >>> def off():
    ...     return (model(data[0]).softmax(1) - teacher(data[0]).softmax(1)).abs().mean().item()
    >>> before = off()
    >>> _ = heal(model, teacher, data, stages=("all",), rates={"all": 0.01})
    >>> off() < before / 2, round(ws.prune.sparsity_of(model), 1)
    (True, 0.7)
    """
    unknown = [stage for stage in (*stages, *(rates or {})) if stage not in get_args(Stage)]
    if unknown or isinstance(stages, str) or not stages:
        raise Error(f"heal has the stages {', '.join(get_args(Stage))}, as a sequence; got {unknown or stages!r}")
    if steps < 1 or truth < 0:
        raise Error(f"heal needs at least 1 step and truth from 0, got {steps} and {truth}")
    _alike(model, teacher)
    data = list(batches)
    if not data:
        raise Error("heal needs at least one batch of data, got none")
    found = checked_masks(model, masks)
    for name, mask in found.items():
        model.get_parameter(name).data.masked_fill_(~mask, 0)
    rate = {**RATES, **(rates or {})}
    for stage in stages:
        if stage == "blocks":
            heal_blocks(model, teacher, data, found, steps, rate[stage], blocks, forward, seed)
        else:
            objective = _objective(teacher, data, truth, forward or default_forward, loss or default_loss)
            _through(model, objective, len(data), stage, found, steps, rate[stage], rank, seed)
    return model


def _alike(model: nn.Module, teacher: nn.Module) -> None:
    own, other = ({n: p.shape for n, p in one.named_parameters()} for one in (model, teacher))
    if own != other:
        differing = next(name for name in (*own, *other) if own.get(name) != other.get(name))
        raise Error(f"heal needs a teacher of the same shapes, and they differ in {differing}")


def _through(
    model: nn.Module,
    objective: Any,
    count: int,
    stage: Stage,
    masks: Mapping[str, Tensor],
    steps: int,
    rate: float,
    rank: int,
    seed: int,
) -> None:
    """Train through the whole model what a stage trains."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        if stage == "lora":
            masked_lora(model, masks, rank=rank, seed=seed)
        elif stage == "small":
            for parameter in before:
                parameter.requires_grad_(False)
        if stage != "all":
            for parameter in small_parameters(model, ("biases", "norms")).values():
                parameter.requires_grad_(True)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with progress.task(f"heal: {stage}", steps) as advance:
            held = {} if stage == "lora" else masks
            descend(
                model, learning, lambda number: objective(model, number), count, steps=steps, rate=rate, masks=held,
                seed=seed, advance=advance,
            )  # fmt: skip
    finally:
        if stage == "lora":
            _folded(model, masks)
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def _folded(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Fold what was put on these weights, and only that."""
    for name in masks:
        place, _, leaf = name.rpartition(".")
        owner = model.get_submodule(place)
        if leaf in getattr(owner, "parametrizations", {}):
            unparametrized(owner, leaf)


def _objective(teacher: nn.Module, data: Sequence[Batch], truth: float, forward: Forward, loss: Loss) -> Any:
    def objective(model: nn.Module, number: int) -> Tensor:
        batch = data[number]
        with torch.no_grad(), evaluating(teacher):
            told = forward(teacher, batch)
        logits = forward(model, batch)
        total = divergence(logits, told, batch)
        return total if truth == 0 else total + truth * loss(model, batch) / size(batch)

    return objective


def divergence(logits: Tensor, told: Tensor, batch: Batch) -> Tensor:
    """The mean KL divergence from the teacher a prediction; padded tokens do not count."""
    keep = counted(logits, batch)
    own, other = (functional.log_softmax(predictions(some, batch)[keep], dim=-1) for some in (logits, told))
    return functional.kl_div(own, other, log_target=True, reduction="sum") / keep.sum().clamp(min=1)


def heal_blocks(
    model: nn.Module,
    teacher: nn.Module,
    data: Sequence[Batch],
    masks: Mapping[str, Tensor],
    steps: int,
    rate: float,
    blocks: str | Sequence[str] | None,
    forward: Forward | None,
    seed: int,
) -> None:
    """Train the blocks of a model one after another on what the teacher's give, in place."""
    dense_weights = dict(teacher.state_dict())
    stream: list[Tensor] = []

    def visit(block: Block) -> dict[str, Tensor]:
        nonlocal stream
        inner = {name: name.removeprefix(f"{block.name}.") for name in block.names}
        inputs = list(block.batches)
        if not stream:  # what comes before the first block is not pruned, and is not healed
            stream = [batch["hidden"] for batch in inputs]
        dense = copy.deepcopy(block.module)
        dense.load_state_dict({inner[name]: dense_weights[name] for name in inner}, strict=False)
        with torch.no_grad():
            stream = [
                block.forward(dense, {**batch, "hidden": hidden}) for batch, hidden in zip(inputs, stream, strict=True)
            ]
        del dense
        student = copy.deepcopy(block.module)
        own = {inner[name]: masks[name] for name in inner if name in masks}
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if not any(True for _ in student.parameters()):
            return {}
        fit(student, inputs, stream, block.forward, steps=steps, rate=rate, masks=own, seed=seed)
        state = dict(student.named_parameters())
        return {name: state[inner[name]].detach() for name in inner if inner[name] in state}

    walk(model, data, visit, blocks=blocks, forward=forward).load_into(model)


@card(
    paper="Hinton, Vinyals, Dean 2015, 'Distilling the Knowledge in a Neural Network'",
    needs=("data",),
    unit="model",
    claim="as heal, for checkpoints",
)
def heal_weights(
    weights: Source,
    teacher_weights: Source,
    batches: Iterable[Batch],
    *,
    model: nn.Module | None = None,
    **options: Any,
) -> Weights:
    """`heal` for checkpoints: the models are made, the pruned one is trained, and its weights are given back.

    Args:
        weights: pruned; with a ``config.json`` of a causal language model beside them, unless there is a module.
        teacher_weights: before pruning.
        batches: as for `heal`.
        model: a module that takes these weights; copied, and left as it was. Not needed where one of the others is one.
        options: of `heal`.

    Returns:
        Weights: in memory, in the dtype they had, with the same zeros; computed in float32. Memory: that of `heal`.

    Raises:
        Error: as `heal`, or where no model can be made of the weights.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> pruned = ws.prune.magnitude(net, 0.5)
    >>> healed = heal_weights(pruned, net, [torch.randn(8, 4)], stages=["all"], steps=2)
    >>> float(ws.prune.sparsity_of(healed))
    0.5
    """
    pruned, whole = open(weights), open(teacher_weights)
    if model is None:
        model = next((one for one in (teacher_weights, weights) if isinstance(one, nn.Module)), None)
    if model is None and "config.json" not in pruned.files:
        raise Error(
            "heal_weights needs model=, a module that takes these weights: they carry no config.json to make it by"
        )
    student, teacher = (_built(one, model) for one in (pruned, whole))
    heal(student, teacher, batches, **options)
    state = student.state_dict()
    new = {name: state[name].to(pruned.spec(name).dtype) for name in pruned if name in state}
    for name in pruned:
        if name not in new:
            raise Error(f"the model has no {name}, so what it learned cannot be given back under these names")
    made = Weights.of({name: new[name] for name in pruned})
    return pruned.zip_nodes(lambda name, node: made.node(name), (), "prune.repair.heal_weights", {
        name: value for name, value in options.items() if isinstance(value, int | float | str | tuple | list)
    })  # fmt: skip


def _built(weights: Weights, model: nn.Module | None) -> nn.Module:
    if model is None:
        from weightsmith.language import carried, described, with_weights

        config, _ = described(carried(weights))
        return with_weights(config, weights, torch.float32)
    made = copy.deepcopy(model).float()
    weights.load_into(made)
    return made
