"""Whole layers: how much each residual block matters, and a network without some of them.

A block that adds to a stream can be left out: the stream goes by. What it adds may be little (its output points where
its input does), may not reach the answer, or may be learned by the others when it is gone from the start.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune._autograd import called_loss, free_parameters
from weightsmith.stats.room import Batch, Forward, Loss, default_forward, default_loss, restored, size
from weightsmith.weights import Weights, working

Criterion = Literal["cosine", "output", "loss", "grasp"]


@card(
    paper="Jordao et al. 2023, 'When Layers Play the Lottery, all Tickets Win at Initialization'; Men et al. 2024, "
    "'ShortGPT: Layers in Large Language Models are More Redundant Than You Expect'",
    covers=("when-layers-play-lottery",),
    needs=("data",),
    unit="model",
    claim="without the blocks of the lowest scores, trained from the start, no worse than the whole network",
    departs="of the criteria that the first paper tries at the start, GraSP's, summed over a block",
)
def layer_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    by: Criterion = "cosine",
    stack: str | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> Weights:
    r"""How much each block of a stack matters.

    .. math:: s_{\text{cosine}} = 1 - \overline{\cos(x, f(x))}, \qquad
        s_{\text{output}} = \frac{\|y - y_{-f}\|^2}{\|y\|^2}, \qquad
        s_{\text{loss}} = L_{-f} - L, \qquad s_{\text{grasp}} = \sum_{\theta \in f} \theta \cdot H g

    with :math:`x` what a block is given, :math:`y` the model's outputs, and :math:`y_{-f}` those without the
    block. The last is what the squared norm of the gradient would lose (half of it, to first order) without it, and
    needs no trained network.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: listed if they cannot be read again; unlabelled ones do for ``"cosine"`` and ``"output"``.
        by: the criterion. ``"output"`` and ``"loss"`` take one pass for each block.
        stack: the name of the module that holds the blocks, such as ``"model.layers"``; by default the longest run of
            parts of one kind.
        forward: ``(model, batch) -> logits``, where the default does not fit.
        loss: ``(model, batch) -> number``, where the default (cross-entropy, summed) does not fit.

    Returns:
        Weights: stack -> ``[blocks]`` float32; infinite for blocks whose output has another shape than their input,
        which cannot be left out.

    Raises:
        Error: no such stack or criterion, no batch, or no block that can be left out.

    >>> class Block(torch.nn.Linear):
    ...     def forward(self, x): return x + super().forward(x)
    >>> model = torch.nn.Sequential(Block(2, 2, bias=False), Block(2, 2, bias=False))
    >>> model[0].weight.data, model[1].weight.data = torch.zeros(2, 2), torch.eye(2).flip(0)
    >>> layer_scores(model, [torch.tensor([[1.0, 0.0]])])[""].round(decimals=3)
    tensor([0.0000, 0.2930])
    """
    if by not in get_args(Criterion):
        raise Error(f"by is one of {', '.join(get_args(Criterion))}; got {by!r}")
    name, blocks = _blocks(model, stack)
    batches = batches if isinstance(batches, list | tuple) else list(batches)
    if not batches:
        raise Error("layer_scores needs at least one batch of data, got none")
    fits, cosines = _watched(model, blocks, batches if by == "cosine" else batches[:1], forward or default_forward)
    if not any(fits):
        raise Error(f"no block of {name or 'the model'} has an output of the shape of its input")
    if by == "cosine":
        found = [1 - cosine for cosine in cosines]
    elif by == "grasp":
        found = _grasp(model, blocks, batches, loss)
    else:
        found = _skipped(model, blocks, fits, batches, by, forward or default_forward, loss or default_loss)
    scores = torch.tensor([value if fit else math.inf for value, fit in zip(found, fits, strict=True)])
    if scores.isnan().any():
        raise Error(f"the score of block {int(scores.isnan().nonzero()[0])} is not a number; are the weights finite?")
    return Weights.of({name: scores.float()})


def drop_layers(model: Any, scores: Mapping[str, Tensor], keep: int) -> Any:
    """A copy without the blocks of the lowest scores.

    Args:
        model: a module, which is left as it is, or what `weightsmith.open` opens.
        scores: stack -> ``[blocks]``, of `layer_scores`; of one stack.
        keep: how many blocks are left.

    Returns:
        A module, or `Weights`, lazily; see `weightsmith.graph.keep_layers`.

    Raises:
        Error: see `kept_layers`.

    >>> model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU(), torch.nn.Tanh())
    >>> drop_layers(model, {"": torch.tensor([0.2, 0.1, 0.3])}, 2)
    Sequential(
      (0): Tanh()
      (1): Tanh()
    )
    """
    from weightsmith.graph import keep_layers, keep_layers_

    kept = kept_layers(scores, keep)
    ((name, found),) = scores.items()
    if not isinstance(model, nn.Module):
        return keep_layers(model, kept, prefix=f"{name}." if name else "")
    made = copy.deepcopy(model)
    blocks = len(list(made.get_submodule(name).children()))
    if blocks != len(found):
        raise Error(f"{name or 'the model'} has {blocks} blocks, but {len(found)} scores")
    keep_layers_(made, kept, path=name)
    return made


def kept_layers(scores: Mapping[str, Tensor], keep: int) -> list[int]:
    """The blocks that are left, ascending; of equal scores the earlier.

    Raises:
        Error: scores of several stacks, or fewer blocks asked for than must stay, or more than there are.

    >>> kept_layers({"layers": torch.tensor([0.2, 0.1, 0.3])}, 2)
    [0, 2]
    """
    if len(scores) != 1:
        raise Error(f"layers are dropped from one stack, got scores of {listed(scores) or 'none'}")
    ((name, found),) = scores.items()
    if not 1 <= keep <= len(found):
        raise Error(f"{name or 'the model'} has {len(found)} blocks; keep from 1 to all of them, not {keep}")
    if keep < int(found.isposinf().sum()):
        raise Error(f"{int(found.isposinf().sum())} blocks of {name} cannot be left out, so {keep} cannot be kept")
    return sorted(found.argsort(descending=True, stable=True)[:keep].tolist())


def _blocks(model: nn.Module, stack: str | None) -> tuple[str, list[nn.Module]]:
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1}
    if stack is not None:
        if stack not in stacks:
            raise Error(f"no stack of blocks {stack!r}; there are {listed(map(repr, stacks)) or 'none'}")
        return stack, list(stacks[stack])
    alike = {name: list(m) for name, m in stacks.items() if len({type(part) for part in m}) == 1}
    if not alike:
        raise Error(f"no stack of blocks of one kind; name one with stack=: {listed(map(repr, stacks)) or 'none'}")
    name = max(alike, key=lambda name: len(alike[name]))
    return name, alike[name]


def _stream(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    return arguments[0] if arguments else next(v for v in keywords.values() if isinstance(v, Tensor))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooks(blocks: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    handles = [
        block.register_forward_hook(lambda m, a, k, out, i=i: hook(i, _stream(a, k), out), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watched(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch], forward: Forward
) -> tuple[list[bool], list[float]]:
    """Whether each block keeps the shape, and the mean cosine of its input and output."""
    fits, sums, counts = [False] * len(blocks), [0.0] * len(blocks), [0] * len(blocks)
    mask: Tensor | None = None

    def see(i: int, before: Tensor, output: Any) -> None:
        after = _first(output)
        fits[i] = before.shape == after.shape
        if not fits[i]:
            return
        # Along the features: the last axis of tokens, the channels of an image.
        cosine = functional.cosine_similarity(working(before), working(after), dim=1 if before.dim() == 4 else -1)
        if mask is not None and cosine.shape == mask.shape:
            cosine = cosine[mask.bool()]
        sums[i] += float(cosine.double().sum())
        counts[i] += cosine.numel()

    with restored(model), torch.no_grad(), _hooks(blocks, see):
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            forward(model, batch)
    return fits, [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _skipped(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    fits: Sequence[bool],
    batches: Sequence[Batch],
    by: Criterion,
    forward: Forward,
    loss: Loss,
) -> list[float]:
    """What changes without each block."""

    def go_by(i: int, before: Tensor, output: Any) -> Any:
        return (before, *output[1:]) if isinstance(output, tuple) else before

    found = [0.0] * len(blocks)
    with restored(model), torch.no_grad(), progress.task("layers", len(batches) * len(blocks)) as advance:
        examples = whole = 0.0
        for batch in batches:
            outputs = working(forward(model, batch)) if by == "output" else None
            base = float(loss(model, batch)) if by == "loss" else 0.0
            examples += size(batch)
            whole += float(outputs.double().square().sum()) if outputs is not None else 0.0
            for i, block in enumerate(blocks):
                if fits[i]:
                    with _hooks([block], go_by):
                        if outputs is not None:
                            changed = working(forward(model, batch))
                            found[i] += float((changed - outputs).double().square().sum())
                        else:
                            found[i] += float(loss(model, batch)) - base
                advance(1)
    return [value / max(whole if by == "output" else examples, 1e-30) for value in found]


def _grasp(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch], loss: Loss | None) -> list[float]:
    """The sum of ``theta * (H g)`` over the parameters of each block, of the mean loss over all batches' examples."""
    names = {id(p): name for name, p in model.named_parameters()}
    parts = [[names[id(p)] for p in block.parameters() if id(p) in names] for block in blocks]
    found = [0.0] * len(blocks)
    batches = list(batches)
    with free_parameters(model, names.values()) as parameters:
        given, total = list(parameters.values()), sum(size(batch) for batch in batches)

        def gradient(batch: Batch, keep: bool) -> tuple[Tensor, ...]:
            value = called_loss(model, parameters, batch, loss) / total
            return torch.autograd.grad(value, given, create_graph=keep, materialize_grads=True)

        slopes = [gradient(batch, False) for batch in batches]
        slope = [sum(each) for each in zip(*slopes, strict=True)]
        for batch in batches:
            again = gradient(batch, True)
            # The Hessian times the whole gradient, which is held still.
            inner = sum((a * s.detach()).sum() for a, s in zip(again, slope, strict=True))  # type: ignore[union-attr]
            products = torch.autograd.grad(inner, given, materialize_grads=True)  # type: ignore[arg-type]
            flows = {n: float((p.detach() * h).sum()) for (n, p), h in zip(parameters.items(), products, strict=True)}
            for i, part in enumerate(parts):
                found[i] += sum(flows[name] for name in part)
    return found
