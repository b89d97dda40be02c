"""Quantize block by block, and let each block learn to give what it gave in floats.

What matters of a block is what comes out of it. Its layers learn together, by gradients through the block itself, on
what the quantized blocks before it give; so errors of one layer are made up for by the next, and those of earlier
blocks by later ones. Where a window holds several blocks, they learn together too.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax

from weightsmith import progress, stats
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.quantize import _rtn
from weightsmith.quantize._layout import parts_of, with_codes
from weightsmith.quantize._learners import RATES, Learner, Train, learner
from weightsmith.quantize.room import Plan, Source, planned
from weightsmith.solve import generator_for, seed_for
from weightsmith.stats import Batch, Forward
from weightsmith.weights import Held, Lazy, Pattern, Step, Weights, as_dtype, open

Propagate = Literal["changed", "dense", "both"]
"""On which inputs blocks learn: on those that quantized blocks give, to give what the whole network gave there; on
those that whole blocks give; or on both, each time to give what whole blocks would have given for the same inputs."""


@card(
    paper="Ding et al. 2023, 'CBQ: Cross-Block Quantization for Large Language Models' (windows, both inputs, thin "
    "sliders); Chen et al. 2024, 'EfficientQAT: Efficient Quantization-Aware Training for Large Language Models' "
    "(weights, steps and zeros by block); Cheng et al. 2023, 'Optimize Weight Rounding via Signed Gradient Descent "
    "for the Quantization of LLMs' (signed rounding)",
    covers=("cbq", "efficientqat"),
    needs=("data",),
    unit="model",
    claim="blocks give more nearly what they gave in floats than with GPTQ, on text that was not seen",
    departs="a window that ends no better than it began, on the calibration data, stays as it began; else what it ends "
    "with is kept, not the best on the way; weights are moved in "
    "units of their steps, ranges by their width and place; thin sliders begin at the weights and grow steeper "
    "together, and their codes lie on the grid as it was at first; inputs are not quantized",
)
def reconstruct(
    weights: Source,
    batches: Iterable[Batch],
    train: Literal[
        "rounding", "low-rank rounding", "signed rounding", "division", "weights and steps"
    ] = "signed rounding",
    *,
    steps: int = 200,
    lr: float | None = None,
    range_lr: float | None = None,
    window: int = 1,
    overlap: int = 0,
    propagate: Propagate = "changed",
    pull: float = 1.0,
    rank: int = 5,
    divergence: float = 0.0,
    clip: int = 0,
    compute: torch.dtype | str | None = None,
    seed: int = 0,
    pattern: Pattern | None = None,
    action: Literal["codes", "values"] = "codes",
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **grid: Any,
) -> Weights:
    r"""Quantize the blocks of a model one after another, each learning to give what it gave.

    .. math:: \min_\theta \; \frac{\lVert B_\theta(\hat X) - B(X) \rVert^2}{e}

    with :math:`\hat X` what the quantized blocks before give, :math:`X` what the whole ones give, and :math:`e` the
    error of the window as it begins, which most often is rounded to nearest. One of the batches, at random, makes up a
    step.

    Memory is that of `weightsmith.stats.walk`; the hidden states of all batches, on the CPU, three times more, and but
    for ``"changed"`` once for each further block of a window; of a window its weights about eight times, and what a
    batch leaves behind for its gradients; and the codes made so far (with ``store`` these lie on disk).

    Args:
        weights: what to quantize, with a ``config.json`` of transformers beside them, or a module, which is left as
            it was.
        batches: calibration data, small ones: ``inputs``, ``(inputs, labels)`` or mappings, such as
            `weightsmith.calibration.texts` makes. Tokens whose ``attention_mask`` is 0 do not count.
        train: what learns: ``"rounding"``, ``"low-rank rounding"``, ``"signed rounding"``,
            ``"division"`` or ``"weights and steps"``.
        steps: of the optimizer (Adam; for signed rounding descent along signs), for each window. Its rates fall to
            zero along a line.
        lr: of what moves weights, in steps of the grid (for sliders and divisors as they are); None for what is usual
            for what learns.
        range_lr: of steps and zeros, as a share; None for what is usual. 0 lets the grid stand.
        window: blocks that learn together.
        overlap: how many of them learn again with the next window; less than ``window``.
        propagate: which inputs blocks learn on: ``"changed"``, ``"dense"`` or ``"both"``.
        pull: of ``"rounding"``: how strongly sliders are drawn to their ends.
        rank: of ``"low-rank rounding"``: width of the thin matrices.
        divergence: how much of the Kullback-Leibler divergence between hidden states (as if logits, along their last
            axis) is added, in units of that with which the window begins.
        clip: how many narrower ranges are tried for where each group begins, by the error of its weights.
        compute: ``"bfloat16"`` for products in half the width (autocast); what learns stays in float32.
        seed: of the order of batches and of thin matrices.
        pattern, action, model, blocks, dtype, device, forward: as in `weightsmith.quantize.sequential`.
        store, resume: as in `weightsmith.stats.walk`; with windows of one block.
        grid: ``bits``, ``group``, ``grid``, ``symmetric``, ``scale_dtype``, ``indivisible``, possibly by tensor.

    Returns:
        Weights: as `weightsmith.quantize.rtn` gives them.

    Raises:
        ValueError: options out of their range, tied weights, no tensor in a block, and what `weightsmith.stats.walk`
            raises.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> coded = reconstruct(net, [torch.ones(3, 4)], bits=3, steps=5)
    >>> coded["2.weight_packed"].shape, coded["2.weight_scale"].shape
    (torch.Size([2, 1]), torch.Size([2, 1]))
    """
    settings = Settings(
        train, steps, lr, range_lr, window, overlap, propagate, pull, rank, divergence, clip,
        None if compute is None else as_dtype(compute), seed,
    )  # fmt: skip
    if action not in ("codes", "values"):
        raise Error(f"action is 'codes' or 'values', got {action!r}")
    if store is not None and window > 1:
        raise Error(f"store= keeps finished blocks, and those of a window finish together: window={window} and a store")
    opened = open(weights)
    plans = planned(_rtn.rtn, opened, {**grid, "pattern": pattern})
    tied = [first for first in opened.ties.values() if first in plans]
    if tied:
        raise Error(f"{listed(tied)} have several names (tied weights); leave them out with pattern=")
    module = weights if model is None and isinstance(weights, nn.Module) else model
    work = _Visitor(plans, settings, action == "values", None if store is None else Path(store))
    said = {**settings.said(), "pattern": pattern, "dtype": dtype, **grid}
    stats.walk(
        opened, batches, work.visit, model=module, blocks=blocks, propagate="dense", dtype=dtype, device=device,
        forward=forward, store=store, resume=resume, settings={**said, "targets": list(plans), "action": action},
        keep=False, empty=True, compute=settings.compute,
    )  # fmt: skip
    made = work.nodes()
    if not made:
        raise Error(f"none of {listed(plans)} stands in a block; say with blocks= which modules are walked")
    outside = [name for name in plans if name not in made]
    if outside and pattern is not None:
        warnings.warn(f"reconstruct leaves {listed(outside)} as they are: they stand in no block", stacklevel=2)
    step = Step("quantize.reconstruct", said, (opened.lineage,))
    if action == "values":
        nodes = {name: made[name][""] if name in made else opened.node(name) for name in opened}
        return Weights(nodes, step, opened.files, opened.metadata)
    coded = {name: parts | {"_shape": Held(torch.tensor(plans[name].layout.shape))} for name, parts in made.items()}
    return with_codes(opened, coded, {name: plans[name].layout for name in coded}, step)


def check_options(options: Mapping[str, Any]) -> None:
    """An error for options that `reconstruct` would not take, before what comes before it has taken its time."""
    known = inspect.signature(reconstruct).parameters
    for name in options:
        if name not in known:
            raise Error(f"reconstruct has no option {name!r}{did_you_mean(name, known)}")
    usual = {one.name: known[one.name].default for one in fields(Settings)}
    Settings(**usual | {name: value for name, value in options.items() if name in usual})


@dataclass(frozen=True)
class Settings:
    """How blocks learn."""

    train: Train
    steps: int
    lr: float | None
    range_lr: float | None
    window: int
    overlap: int
    propagate: Propagate
    pull: float
    rank: int
    divergence: float
    clip: int
    compute: torch.dtype | None
    seed: int

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            raise Error(f"train is one of {', '.join(map(repr, get_args(Train)))}; got {self.train!r}")
        if self.propagate not in get_args(Propagate):
            raise Error(f"propagate is 'changed', 'dense' or 'both', got {self.propagate!r}")
        if self.steps < 1 or self.window < 1 or not 0 <= self.overlap < self.window or self.rank < 1:
            raise Error(
                "reconstruct needs steps, window and rank of 1 or more and an overlap from 0 to less than window; got "
                f"steps={self.steps}, window={self.window}, overlap={self.overlap}, rank={self.rank}"
            )
        rates = [rate for rate in (self.lr, self.range_lr) if rate is not None]
        if not all(rate >= 0 for rate in (*rates, self.pull, self.divergence)):
            raise Error("learning rates, pull and divergence are 0 or more")

    def said(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "compute": None if self.compute is None else str(self.compute).removeprefix("torch.")}

    def rates(self) -> tuple[float, float]:
        usual = (1 / self.steps,) * 2 if self.train == "signed rounding" else RATES[self.train]
        return usual[0] if self.lr is None else self.lr, usual[1] if self.range_lr is None else self.range_lr


@dataclass
class _Member:
    """A block of a window: its tensors as they are, and what learns in them."""

    block: stats.Block
    tensors: dict[str, Tensor]
    learners: dict[str, Learner]
    plans: dict[str, Plan]
    place: torch.device
    dense: list[Tensor] = field(default_factory=list)

    def run(self, batch: Any, hidden: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """What the block gives with some values in the place of its own."""
        tensors, hidden = {**self.tensors, **values}, hidden.to(self.place)

        def called(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block.module, tensors, args, kwargs)

        return self.block.forward(called, {**batch, "hidden": hidden})

    def soft(self, progress: float) -> dict[str, Tensor]:
        return {name: self.shaped(name, one.values(progress)) for name, one in self.learners.items()}

    @torch.no_grad()
    def hard(self) -> dict[str, Tensor]:
        return {name: self.shaped(name, one.coded().values()) for name, one in self.learners.items()}

    def shaped(self, name: str, rows: Tensor) -> Tensor:
        tensor = self.tensors[name]
        return rows[:, : self.plans[name].layout.inputs].reshape(tensor.shape).to(tensor.dtype)


class _Visitor:
    """The window of blocks that learn, and what quantized blocks have given so far.

    Hidden states wait on the CPU.
    """

    def __init__(self, plans: Mapping[str, Plan], settings: Settings, values: bool, folder: Path | None):
        self.plans, self.settings, self.as_values, self.folder = plans, settings, values, folder
        self.members: list[_Member] = []
        self.batches: list[Any] = []
        self.changed: list[Tensor] = []
        self.ahead: list[Tensor] | None = None
        """What the only block of a window gives with the codes that it has learned, where that is known already."""
        self.made: dict[str, dict[str, Tensor]] = {}

    def visit(self, block: stats.Block) -> None:
        member = self.member(block)
        # Which call a batch is, and what counts of it; its hidden state goes when the next block is visited.
        self.batches = [{name: value for name, value in one.items() if name != "hidden"} for one in block.batches]
        if self.settings.propagate != "changed":
            member.dense = [batch["hidden"].cpu() for batch in block.batches]
        if self.settings.propagate != "dense" and not self.changed:
            self.changed = self.given(block)
        self.members.append(member)
        last = block.index + 1 == block.count
        if len(self.members) < self.settings.window and not last:
            return
        self.learn(block)
        done = len(self.members) if last else self.settings.window - self.settings.overlap
        for one in self.members[:done]:
            self.finish(one)
        self.members = self.members[done:]
        for one in (each for member in self.members for each in member.learners.values()):
            one.reopened()

    def member(self, block: stats.Block) -> _Member:
        """A block with what learns in it."""
        own = dict(block.module.named_parameters(remove_duplicate=False))
        tensors = {name: value.detach() for name, value in own.items()}
        tensors |= {name: value.detach().clone() for name, value in block.module.named_buffers()}
        learners, plans = {}, {}
        options = {"rank": self.settings.rank, "clip": self.settings.clip}
        for name in block.names:
            if name in self.plans:
                inner = name.removeprefix(f"{block.name}.") if block.name else name
                plan = plans[inner] = self.plans[name]
                rows = plan.layout.matrix(tensors[inner])
                generator = generator_for(seed_for(self.settings.seed, name))
                learners[inner] = learner(self.settings.train, rows, plan.grid, generator=generator, **options)
        return _Member(block, tensors, learners, plans, block.batches[0]["hidden"].device)

    def finish(self, member: _Member) -> None:
        """Keep a block's codes, and hand what it gives to the next."""
        name = member.block.name
        hard = member.hard()
        made: dict[str, dict[str, Tensor]] = {}
        for inner, one in member.learners.items():
            full = f"{name}.{inner}" if name else inner
            if self.as_values:
                made[full] = {"": hard[inner].to("cpu", member.block.weights.spec(full).dtype)}
            else:
                made[full] = {key: value.cpu() for key, value in parts_of(one.coded(), self.plans[full].layout).items()}
        if self.ahead is not None:
            self.changed, self.ahead = self.ahead, None
        else:
            with torch.no_grad():
                for number, given in enumerate(self.changed):
                    self.changed[number] = member.run(self.batches[number], given, hard).cpu()
        self.keep(member.block.index, made)

    def keep(self, index: int, made: dict[str, dict[str, Tensor]]) -> None:
        """Codes or values of a block; in a folder also what the next is given."""
        if self.folder is None:
            self.made |= made
            return
        if self.changed:
            given = {str(number): value for number, value in enumerate(self.changed)}
            Weights.of(given).save(self.folder / f"given-{index + 1:05d}.safetensors", overwrite=True)
            (self.folder / f"given-{index - 1:05d}.safetensors").unlink(missing_ok=True)  # this block may come again
        if made:
            flat = {name + ending: part for name, parts in made.items() for ending, part in parts.items()}
            Weights.of(flat).save(self.folder / f"codes-{index:05d}.safetensors", overwrite=True)

    def given(self, block: stats.Block) -> list[Tensor]:
        """What quantized blocks give a block: the first the same as whole ones, others where a run was broken off."""
        if self.folder is None or block.index == 0:
            return [batch["hidden"].cpu() for batch in block.batches]
        kept = open(self.folder / f"given-{block.index:05d}.safetensors")
        return [kept[str(number)] for number in range(len(block.batches))]

    def nodes(self) -> dict[str, dict[str, Lazy]]:
        """Tensor -> ending -> node, of all blocks, also of those that an earlier run has made."""
        found: dict[str, dict[str, Lazy]] = {
            name: {ending: Held(part) for ending, part in parts.items()} for name, parts in self.made.items()
        }
        for path in sorted(self.folder.glob("codes-*.safetensors")) if self.folder is not None else []:
            shard = open(path)
            for name, plan in self.plans.items():
                endings = ("",) if self.as_values else ("_packed", *(f"_{key}" for key in plan.grid.stored()))
                if name + endings[0] in shard:
                    found[name] = {ending: shard.node(name + ending) for ending in endings}
        return found

    @torch.enable_grad()
    def learn(self, block: stats.Block) -> None:
        """Let the blocks of the window learn together."""
        settings = self.settings
        learners = [one for member in self.members for one in member.learners.values()]
        if not learners:
            return
        leaves = [leaf for one in learners for leaf in (*one.moves, *one.ranges)]
        begun = [leaf.detach().clone() for leaf in leaves]
        pairs = self.pairs(block)
        usual = self.errors(pairs)
        shares = (1.0, settings.divergence)
        scale = [share / float(one) if one > 0 else share for share, one in zip(shares, usual, strict=False)]
        step = _steps(learners, settings)
        generator = generator_for(seed_for(settings.seed, block.name, "order"))
        with progress.task(block.name or "block", settings.steps) as advance:
            order: list[int] = []
            for number in range(settings.steps):
                order = order or torch.randperm(len(pairs), generator=generator).tolist()
                at = number / settings.steps
                loss = self.loss(pairs[order.pop()], [member.soft(at) for member in self.members], scale)
                pulls = [one for one in (each.penalty(at) for each in learners) if one is not None]
                if pulls:
                    loss = loss + settings.pull * torch.stack(pulls).sum()
                if not loss.requires_grad:
                    return  # none of these layers has a say in what comes out
                step(torch.autograd.grad(loss, leaves, allow_unused=True), 1 - at)
                advance(1)
        alone = len(self.members) == 1 and settings.propagate == "changed"
        given: list[Tensor] | None = [] if alone else None
        after = self.errors(pairs, given)
        total = [sum(float(one) * by for one, by in zip(each, scale, strict=True)) for each in (usual, after)]
        if total[1] < total[0]:
            self.ahead = given
            return
        with torch.no_grad():
            for leaf, value in zip(leaves, begun, strict=True):
                leaf.copy_(value)

    def pairs(self, block: stats.Block) -> list[tuple[Any, Tensor, Tensor]]:
        """Batch, hidden state before the window, and what should come out of it."""
        kind, first = self.settings.propagate, self.members[0]
        batches, targets = self.batches, [output.cpu() for output in block.outputs()]
        if kind == "dense":
            return list(zip(batches, first.dense, targets, strict=True))
        if kind == "changed":
            return list(zip(batches, self.changed, targets, strict=True))
        found = list(zip(batches, first.dense, targets, strict=True))
        for batch, hidden in zip(batches, self.changed, strict=True):
            with torch.no_grad():
                found.append((batch, hidden, self.through(batch, hidden, [{} for _ in self.members]).cpu()))
        return found

    def through(self, batch: Any, hidden: Tensor, values: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The hidden state after the window."""
        for member, own in zip(self.members, values, strict=True):
            hidden = member.run(batch, hidden, own)
        return hidden

    def loss(self, pair: Any, values: Sequence[Mapping[str, Tensor]], scale: Sequence[float]) -> Tensor:
        apart = self.apart(pair, values)
        return sum((one * by for one, by in zip(apart[1:], scale[1:], strict=True)), apart[0] * scale[0])

    def apart(self, pair: Any, values: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        batch, hidden, target = pair
        return self.judged(batch, self.through(batch, hidden, values), target)

    def judged(self, batch: Any, found: Tensor, target: Tensor) -> list[Tensor]:
        """The mean squared error of a batch, and the divergence if it counts."""
        found = found.float()
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        counts = None
        if mask is not None and mask.numel() * found.shape[-1] == found.numel():
            counts = mask.reshape(found.shape[:-1]).to(found) / mask.sum().clamp(min=1)
        target = target.to(found)

        def mean(each: Tensor) -> Tensor:
            return each.mean() if counts is None else (each.mean(-1) * counts).sum()

        losses = [mean((found - target).square())]
        if self.settings.divergence:
            each = kl_div(log_softmax(found, -1), log_softmax(target, -1), log_target=True, reduction="none")
            losses.append(mean(each))
        return losses

    @torch.no_grad()
    def errors(self, pairs: Sequence[Any], given: list[Tensor] | None = None) -> list[Tensor]:
        """Means over all batches, with codes as they stand; what comes out is put into ``given``."""
        hard = [member.hard() for member in self.members]
        every = []
        for batch, hidden, target in pairs:
            found = self.through(batch, hidden, hard)
            every.append(torch.stack(self.judged(batch, found, target)))
            if given is not None:
                given.append(found.cpu())
        return list(torch.stack(every).mean(0))


def _steps(learners: Sequence[Learner], settings: Settings) -> Callable[[Sequence[Tensor | None], float], None]:
    """A step of the optimizer, with gradients of all leaves."""
    moving, ranging = settings.rates()
    leaves = [(leaf, rate) for one in learners for part, rate in ((one.moves, moving), (one.ranges, ranging))
              for leaf in part]  # fmt: skip
    signed = settings.train == "signed rounding"
    adam = torch.optim.Adam([{"params": [leaf], "lr": rate} for leaf, rate in leaves], betas=(0.9, 0.99), eps=1e-12)

    def step(gradients: Sequence[Tensor | None], factor: float) -> None:
        with torch.no_grad():
            for (leaf, rate), group, gradient in zip(leaves, adam.param_groups, gradients, strict=True):
                if signed:
                    if gradient is not None:
                        leaf.sub_(gradient.sign(), alpha=rate * factor)
                else:
                    leaf.grad, group["lr"] = gradient, rate * factor
            if not signed:
                adam.step()
                adam.zero_grad()
            for one in learners:
                one.held()

    return step
