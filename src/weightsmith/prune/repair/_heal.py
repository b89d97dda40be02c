"""Bring a smaller model back: block by block first, then as a whole, with the dense model as its teacher.

Pruning leaves each block slightly wrong, and the errors add up on the way. Each block is first trained to give what the
dense one gave, from what it is really given now; what is left is then trained through the whole model, on the
teacher's probabilities, which say more of each token than its label.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress
from weightsmith.adapt import unparametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.repair._lora import carried_masks, checked_masks, low_rank
from weightsmith.prune.repair._reconstruct import descend, evaluating, fit
from weightsmith.prune.repair._small import small_parameters
from weightsmith.prune.room import Source, prunable
from weightsmith.stats import Batch, Block, Forward, Loss, walk
from weightsmith.stats.room import counted, default_forward, default_loss, mapped, predictions
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
    claim="the outputs come closer to the dense model's than pruning left them, and not one zero is lost",
    departs="no temperature; block outputs before logits; weights that were pruned stay zero",
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
    r"""Train a pruned or a cut model to give what the dense one gives; what was pruned stays zero.

    .. math:: \operatorname{KL}(p_{\text{teacher}} \,\Vert\, p) + \tau \cdot \text{loss}

    a prediction, for the stages through the whole model; for blocks see `reconstruct`, whose targets are here what the
    dense blocks give after one another, so that a block makes up for the loss of those before it too.

    A model that was cut (`weightsmith.prune.structured`: fewer neurons, heads or layers than the teacher) has nothing
    to hold at zero, and all of it learns: with ``"lora"`` its biases, norms and matrices, but not embeddings and head.
    Where its blocks are fewer than the teacher's or give something of another width, the stage ``"blocks"`` is left
    out, with a warning.

    Args:
        model: trained in place, so best in float32; in evaluation mode meanwhile (no dropout, batch norm stands still).
            Parameters that need no gradients stand still in ``"blocks"`` and ``"all"``.
        teacher: the dense model; unchanged. It has the parameters of the model, as large or larger.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; held in memory. One batch a step.
        masks: boolean by the names of weights, true for what is kept; default: the zeros that the weights hold. With
            ``{}`` none are held.
        steps: of each block, and of each stage after; both cost about as much.
        stages: what is trained, in order; see `Stage`.
        rates: of Adam by stage, where `RATES` do not fit; they fall along a line to zero.
        truth: what the loss on the labels counts beside the teacher.
        rank: of ``"lora"``; of a pruned model it is put on the weights that have other zeros than the teacher's.
        blocks: the modules that follow one another, as in `weightsmith.stats.walk`; default: the one stack there is.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        loss: ``(model, batch) -> number``, summed, where the default does not fit and ``truth`` is not 0.
        seed: of the order of batches and of what is drawn.

    Returns:
        The model. Memory: the teacher; one block four times and the hidden states of all batches three times, in
        float32; then gradients and Adam's two numbers of what is trained, and the logits of a batch about ten times.

    Raises:
        Error: unknown stages, no zeros and no masks, masks that do not fit, no batch, a teacher without the model's
            parameters or with smaller ones, or blocks that are the only stage and do not pair.

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
    if not steps >= 1 or not truth >= 0:
        raise Error(f"heal needs at least 1 step and truth from 0, got {steps} and {truth}")
    if rank < 1:
        raise Error(f"heal: the rank of changes must be at least 1, got {rank}")
    cut = _smaller(model, teacher)
    data = list(batches)
    if not data:
        raise Error("heal needs at least one batch of data, got none")
    held = _held(model, masks, cut)
    learning = _low_rank_names(model, teacher, held, cut) if "lora" in stages else []
    if cut and "blocks" in stages:
        stages = _pairing(model, teacher, data[0], stages, blocks, forward)
    for name, mask in held.items():
        model.get_parameter(name).data.masked_fill_(~mask, 0)
    rate = {**RATES, **(rates or {})}
    objective = _objective(teacher, data, truth, forward or default_forward, loss or default_loss)
    if cut and set(stages) != {"blocks"}:  # what it gives may not fit either
        with torch.no_grad(), evaluating(model):
            objective(model, 0)
    for stage in stages:
        if stage == "blocks":
            heal_blocks(model, teacher, data, held, steps, rate[stage], blocks, forward, seed)
            continue
        with _learning(model, stage, learning, held, rank, seed), progress.task(f"heal: {stage}", steps) as advance:
            descend(
                model, [parameter for parameter in model.parameters() if parameter.requires_grad],
                lambda number: objective(model, number), len(data), steps=steps, rate=rate[stage],
                masks={} if stage == "lora" else held, seed=seed, advance=advance,
            )  # fmt: skip
    return model


def _smaller(model: nn.Module, teacher: nn.Module) -> bool:
    """Whether the model was cut: it has some of the teacher's parameters, or smaller ones; an error for others."""
    own, other = ({n: tuple(p.shape) for n, p in one.named_parameters()} for one in (model, teacher))
    for name, shape in own.items():
        whole = other.get(name, ())
        if len(whole) != len(shape) or any(ours > theirs for ours, theirs in zip(shape, whole, strict=True)):
            there = f"{list(shape)} and {list(whole)}" if name in other else "which the teacher lacks"
            raise Error(
                f"heal needs a teacher with the parameters of the model, as large or larger; they differ in {name}, "
                f"{there}. Are the two swapped?"
            )
    return own != other


def _held(model: nn.Module, masks: Mapping[str, Tensor] | None, cut: bool) -> dict[str, Tensor]:
    """Of which weights which places stay zero."""
    if masks is not None:
        return checked_masks(model, masks) if masks else {}
    found = carried_masks(model)
    if not found and not cut:
        raise Error("no weight of the model holds zeros; prune it first, give masks=, or with masks={} hold none")
    return found


def _low_rank_names(model: nn.Module, teacher: nn.Module, masks: Mapping[str, Tensor], cut: bool) -> list[str]:
    """The weights that learn changes of low rank: those that were pruned, or all matrices of a model that was cut."""
    if cut or not masks:
        return prunable(open(model))
    dense = dict(teacher.named_parameters())
    pruned = [name for name, mask in masks.items() if not torch.equal(dense[name].detach().to(mask.device) != 0, mask)]
    return pruned or list(masks)


def _pairing(
    model: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    stages: Sequence[Stage],
    blocks: str | Sequence[str] | None,
    forward: Forward | None,
) -> list[Stage]:
    """The stages of a model that was cut: without its blocks, where they do not go with the teacher's."""
    own, other = (_outline(one, batch, blocks, forward) for one in (model, teacher))
    if own == other:
        return list(stages)
    why = "after a block they give another width"
    if len(own) != len(other):
        why = f"the model has {len(own)} and the teacher {len(other)}"
    others: list[Stage] = [stage for stage in stages if stage != "blocks"]
    if not others:
        raise Error(f"the blocks cannot be healed one by one: {why}; heal with stages=('lora',) or ('all',)")
    warnings.warn(f"heal leaves the stage 'blocks' out: {why}", stacklevel=3)
    return others


def _outline(
    model: nn.Module, batch: Batch, blocks: str | Sequence[str] | None, forward: Forward | None
) -> list[tuple[int, str, torch.Size]]:
    """Each block that has tensors, and the shape of what it gives."""
    found: list[tuple[int, str, torch.Size]] = []

    def visit(block: Block) -> None:
        found.append((block.index, block.name, next(block.outputs()).shape))

    with progress.silent():
        walk(model, [batch], visit, blocks=blocks, forward=forward)
    return found


@contextlib.contextmanager
def _learning(
    model: nn.Module, stage: Stage, names: Sequence[str], masks: Mapping[str, Tensor], rank: int, seed: int
) -> Any:
    """Inside, what a stage trains needs gradients; outside, what did before."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        if stage == "lora":
            low_rank(model, names, masks, rank=rank, seed=seed)
        elif stage == "small":
            for parameter in before:
                parameter.requires_grad_(False)
        if stage != "all":
            for parameter in small_parameters(model, ("biases", "norms")).values():
                parameter.requires_grad_(True)
        yield
    finally:
        if stage == "lora":
            _folded(model, names)
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def _folded(model: nn.Module, names: Iterable[str]) -> None:
    """Fold what was put on these weights, and only that."""
    for name in names:
        place, _, leaf = name.rpartition(".")
        owner = model.get_submodule(place)
        if leaf in getattr(owner, "parametrizations", {}):
            unparametrized(owner, leaf)


def _objective(teacher: nn.Module, data: Sequence[Batch], truth: float, forward: Forward, loss: Loss) -> Any:
    def objective(model: nn.Module, number: int) -> Tensor:
        own, other = (_on(data[number], one) for one in (model, teacher))
        with torch.no_grad(), evaluating(teacher):
            told = forward(teacher, other)
        logits = forward(model, own)
        told = told.to(logits.device)
        if told.shape != logits.shape:
            raise Error(f"the model gives logits {list(logits.shape)}, and its teacher {list(told.shape)}")
        total = divergence(logits, told, own)
        return total if truth == 0 else total + truth * loss(model, own) / counted(logits, own).sum().clamp(min=1)

    return objective


def _on(batch: Batch, module: nn.Module) -> Batch:
    """A batch where a module is."""
    place = next((parameter.device for parameter in module.parameters()), None)
    return batch if place is None else mapped(lambda value: value.to(place), batch)


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
    done, stream = _before_blocks(model, data, blocks, forward)

    def visit(block: Block) -> None:
        nonlocal done
        place = block.batches[0]["hidden"].device
        inputs = [{**batch, "hidden": hidden} for batch, hidden in zip(block.batches, stream, strict=True)]

        def ask(module: Any, batch: Batch) -> Tensor:
            return block.forward(module, {**batch, "hidden": batch["hidden"].to(place)})

        def go(module: nn.Module) -> None:
            with torch.no_grad(), evaluating(module):
                for number, batch in enumerate(inputs):
                    stream[number] = batch["hidden"] = ask(module, batch).cpu()

        for name in _names(model, block, blocks)[done : block.index]:  # without tensors, and so not visited
            go(model.get_submodule(name))
        own = model.get_submodule(block.name)
        student = copy.deepcopy(own).float().to(place)
        if any(parameter.requires_grad for parameter in student.parameters()):
            held = {name: masks[full] for name, full in _full_names(block.name, own) if full in masks}
            targets = [found.cpu() for found in block.outputs()]
            fit(student, inputs, targets, ask, steps=steps, rate=rate, masks=held, seed=seed)
            with torch.no_grad():
                for mine, trained in zip(own.parameters(), student.parameters(), strict=True):
                    trained.copy_(mine.copy_(trained))  # as they are rounded
        go(student)
        done = block.index + 1

    walk(teacher, data, visit, propagate="dense", blocks=blocks, forward=forward)


def _full_names(path: str, module: nn.Module) -> list[tuple[str, str]]:
    """Names of parameters in a module and in the model."""
    return [(name, f"{path}.{name}" if path else name) for name, _ in module.named_parameters()]


def _names(model: nn.Module, block: Block, blocks: str | Sequence[str] | None) -> list[str]:
    """The names of all blocks, those without tensors too."""
    if blocks is not None and not isinstance(blocks, str):
        return list(blocks)
    holder = block.name.rpartition(".")[0]
    return [f"{holder}.{name}" if holder else name for name, _ in model.get_submodule(holder).named_children()]


class _Enough(Exception):
    """Ends a walk."""


def _before_blocks(
    model: nn.Module, data: Sequence[Batch], blocks: str | Sequence[str] | None, forward: Forward | None
) -> tuple[int, list[Tensor]]:
    """The first block that has tensors, and what it is given in each batch."""
    index, found = 0, []

    def visit(block: Block) -> None:
        nonlocal index, found
        index, found = block.index, [batch["hidden"].cpu() for batch in block.batches]
        raise _Enough

    with progress.silent(), contextlib.suppress(_Enough):
        walk(model, data, visit, blocks=blocks, forward=forward)
    return index, found


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
    """`heal` for checkpoints: the models are made, the smaller one is trained, and its weights are given back.

    Each is made by the module that it is, by ``model``, or by the ``config.json`` beside it.

    Args:
        weights: pruned or cut.
        teacher_weights: before it.
        batches: as for `heal`.
        model: a module that takes these weights; copied, and left as it was. Not needed where ``weights`` are a module
            or a causal language model with its ``config.json`` and tokenizer, or where they have the shapes of a
            teacher that is a module.
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
    like = teacher_weights if isinstance(teacher_weights, nn.Module) else None
    student = _made("weights", weights, pruned, model or (None if "config.json" in pruned.files else like))
    state = student.state_dict()
    lacking = next((name for name in pruned if name not in state), None)
    if lacking is not None:
        raise Error(f"the model has no {lacking}, so what it learned cannot be given back under these names")
    teacher = like or _made("teacher_weights", None, whole, None if "config.json" in whole.files else model)
    heal(student, teacher, batches, **options)
    state = student.state_dict()
    ties = pruned.ties
    new = {name: state[name].detach().to(pruned.spec(name).dtype) for name in pruned if name not in ties}
    made = Weights.of({name: new[ties.get(name, name)] for name in pruned})
    return pruned.zip_nodes(lambda name, node: made.node(name), (), "prune.repair.heal_weights", {
        name: value for name, value in options.items() if isinstance(value, int | float | str | tuple | list)
    })  # fmt: skip


def _made(what: str, source: Any, weights: Weights, model: nn.Module | None) -> nn.Module:
    """A module in float32 with these weights: a copy of one, or what their config.json describes."""
    like = source if isinstance(source, nn.Module) else model
    if like is not None:
        made = copy.deepcopy(like).float()
        weights.load_into(made)
        return made
    if "config.json" not in weights.files:
        raise Error(
            f"heal_weights needs model=, a module that takes these weights: {what} carry no config.json to make it by"
        )
    from weightsmith.language import carried, described, with_weights

    config, _ = described(carried(weights))
    return with_weights(config, weights, torch.float32)
