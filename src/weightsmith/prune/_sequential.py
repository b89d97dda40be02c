"""Prune block by block, so that each block is pruned for what it will really be given.

The inputs of a layer change as the blocks before it are pruned. Going forward through the network, the statistics of
each block are gathered with what the pruned blocks before it give; a repair then makes up for their loss as well as
for its own. Only one block is in memory at a time.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith import stats
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.lifting import checked_options, example, options_of, per_tensor_options, tried
from weightsmith.prune._select import pooled, whole_of
from weightsmith.prune.room import (
    Scope,
    Source,
    Sparsity,
    allocated,
    chosen_targets,
    lift,
    masked,
    needed,
)
from weightsmith.stats import Batch, Forward
from weightsmith.stats.room import UNDERSTOOD, NoneFits
from weightsmith.weights import Pattern, PerTensor, Step, Weights, open, resolve


@card(
    paper="Frantar, Alistarh 2023, 'SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot'",
    needs=("data",),
    unit="model",
    departs="the order of work alone: which score and which repair are used is the caller's choice",
)
def sequential(
    weights: Source,
    batches: Iterable[Batch],
    sparsity: Sparsity = 0.5,
    *,
    score: str | Callable[..., Any] | None = "wanda",
    repair: str | Callable[..., Tensor] | None = None,
    scope: Scope | None = None,
    structure: PerTensor[str] = "element",
    propagate: Literal["changed", "dense"] = "changed",
    pattern: Pattern | None = None,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Weights:
    """Prune the blocks of a model one after another, each by the inputs that it is given by those before it.

    For every block: the statistics of its inputs, with its weights as they were (all of its layers at once); the
    masks of the score; the repair of what they keep; then its outputs, which are the next block's inputs. Memory is
    that of `weightsmith.stats.walk` and one block's Gram matrices (only their diagonals, where that is enough).

    Args:
        weights: what to prune, with a ``config.json`` of transformers beside them, or a module, which is left as
            it was.
        batches: calibration data: ``inputs``, ``(inputs, labels)`` or mappings, such as
            `weightsmith.calibration.texts` makes.
        sparsity: the share to remove or an N:M pattern, possibly by tensor.
        score: a method of `weightsmith.prune` that needs inputs (``stats.gram``, ``stats.activations``) or nothing, or
            a kernel ``(weight, stats) -> score``; None where the repair chooses what to remove.
        repair: a method of `weightsmith.prune.repair`, or a kernel ``(weight [out, in], gram [in, in], mask) ->
            weight``; None to leave what is kept as it is.
        scope: among what a budget is shared, ``"tensor"`` or ``"row"``; default: the score's own.
        structure: what is removed as one.
        propagate: what the next block is given: what the pruned block gives (``"changed"``), or the whole one
            (``"dense"``).
        pattern: which tensors; default `prunable`. Those outside of the blocks stay as they are.
        model, blocks, dtype, device, forward, store, resume: as in `weightsmith.stats.walk`.
        options: of the repair and of the score, possibly by tensor.

    Returns:
        Weights: lazy, with the pruned tensors in their places. A layer that no token reached (an expert) is
        pruned by magnitude and not repaired, with a warning.

    Raises:
        ValueError: unknown methods or options, a score that needs more than inputs, weights that are tied or whose
            layer's inputs do not say all about them, and what `weightsmith.stats.walk` raises.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> pruned = sequential(net, [torch.ones(3, 4)], 0.5)
    >>> [int((pruned[name] == 0).sum()) for name in ("0.weight", "2.weight")]
    [8, 4]
    """
    opened = open(weights)
    plan = _Plan(opened, sparsity, score, repair, scope, structure, pattern, options)
    said = {
        "sparsity": sparsity, "score": _name(score), "repair": _name(repair), "scope": scope, "structure": structure,
        "propagate": propagate, "pattern": pattern, "dtype": dtype, **options,
    }  # fmt: skip
    module = weights if model is None and isinstance(weights, nn.Module) else model
    try:
        found = stats.walk(
            opened, batches, plan.visit, model=module, blocks=blocks, statistics=plan.statistics, propagate=propagate,
            dtype=dtype, device=device, forward=forward, store=store, resume=resume,
            settings={**said, "targets": plan.targets, "shares": plan.shares},
        )  # fmt: skip
    except NoneFits:
        raise Error(
            f"none of {listed(plan.targets)} is {UNDERSTOOD} in a block; say which tensors with pattern=, or with "
            "blocks= which modules are walked"
        ) from None
    outside = [name for name in plan.targets if found.node(name) is opened.node(name)]
    if outside and pattern is not None:
        warnings.warn(f"sequential leaves {listed(outside)} as they are: they stand in no block", stacklevel=2)
    if len(outside) == len(plan.targets):
        raise Error(f"none of {listed(plan.targets)} stands in a block; say with blocks= which modules are walked")
    nodes = {name: found.node(name) for name in found}
    return Weights(nodes, Step("prune.sequential", said, (opened.lineage,)), opened.files, opened.metadata)


class _Plan:
    """What is done in every block, checked before any work."""

    def __init__(
        self,
        weights: Weights,
        sparsity: Sparsity,
        score: str | Callable[..., Any] | None,
        repair: str | Callable[..., Tensor] | None,
        scope: Scope | None,
        structure: PerTensor[str],
        pattern: Pattern | None,
        options: Mapping[str, Any],
    ):
        if scope == "global":
            raise Error(
                'sequential sees one block at a time, so scope="global" cannot be had; find shares for each tensor '
                "with weightsmith.prune.allocation and give them as sparsity="
            )
        if score is None and repair is None:
            raise Error("sequential needs score=, or a repair= that chooses what to remove")
        self.targets = chosen_targets(weights, pattern)
        tied = [first for first in weights.ties.values() if first in self.targets]
        if tied:
            raise Error(f"{listed(tied)} have several names (tied weights); leave them out with pattern=")
        nodes = {name: weights.node(name) for name in self.targets}
        allocated(nodes, sparsity, scope or "tensor")
        self.shares = resolve(sparsity, self.targets, "sparsity")
        self.structures = resolve(structure, self.targets, "structure")
        for name, word in self.structures.items():
            pooled(nodes[name], whole_of(word, name), name)
        if score is None and (scope is not None or set(self.structures.values()) != {"element"}):
            raise Error("scope= and structure= are of scores; with score=None the repair chooses what to remove")
        self.scope = {} if scope is None else {"scope": scope}
        self.method = None if score is None else _scoring(score)
        self.fix = None if repair is None else _repairing(repair, chooses=score is None)
        self._with_options(options)
        self._needs(score)

    def _with_options(self, options: Mapping[str, Any]) -> None:
        """To each its own; what both know goes to both."""
        known = {kind: options_of(kernel) for kind, kernel in self._kernels().items()}
        for name in options:
            if not any(name in own for own in known.values()):
                every = sorted({option for own in known.values() for option in own})
                raise Error(f"neither score nor repair has an option {name!r}{did_you_mean(name, every)}")
        self.options = {kind: {k: v for k, v in options.items() if k in own} for kind, own in known.items()}
        for kind, kernel in self._kernels().items():
            if kind == "score":
                checked_options(kernel, self.options[kind])
        self.repair_options: dict[str, dict[str, Any]] = {}
        if self.fix is not None:
            kernel, own = self.fix, dict(self.options["repair"])
            if self.method is None:
                own["sparsity"] = self.shares.__getitem__
            self.repair_options = per_tensor_options(kernel, own, self.targets)
            groups = [int(str(s).partition(":")[2]) for s in self.shares.values() if isinstance(s, str)]
            width = 4 * max(groups, default=4)
            given = None if self.method is None else torch.ones(2, width, dtype=torch.bool)
            tried(kernel, self.repair_options.values(), example(2, width), torch.eye(width), given)

    def _kernels(self) -> dict[str, Callable[..., Any]]:
        found: dict[str, Any] = {} if self.method is None else {"score": self.method.kernel}
        return found if self.fix is None else {**found, "repair": self.fix}

    def _needs(self, score: Any) -> None:
        """The statistics that score and repair need: of Gram matrices the whole only where the diagonal will not do."""
        own = frozenset(self.targets)
        self.statistic = None if self.method is None else needed(self.method)
        self.statistics = {}
        if self.statistic == "stats.activations":
            self.statistics["score"] = stats.Activations(pattern=own.__contains__)
        elif self.statistic not in (None, "stats.gram"):
            raise Error(
                f"{_name(score)} needs weightsmith.{self.statistic}, which takes a pass through all of the model; "
                "gather it so and call the method itself"
            )
        if self.fix is not None or self.statistic == "stats.gram":
            score_kernel = self._kernels().get("score")
            whole = self.fix is not None or not _diagonal_will_do(score_kernel, self.options["score"])
            # Sums of whole matrices in float32 are good to 1e-6, and half as large.
            sums = torch.float32 if whole else torch.float64
            form = "full" if whole else "diagonal"
            self.statistics["gram"] = stats.Gram(own.__contains__, form=form, sums=sums)

    def visit(self, block: stats.Block) -> dict[str, Tensor]:
        """The new tensors of a block."""
        own = [name for name in block.names if name in self.shares]
        if not own:
            return {}
        lacking = sorted({name for found in block.statistics.values() for name in own if name not in found})
        self._check_lacking(block, lacking)
        seen = [name for name in own if name not in lacking]
        place = next(block.module.parameters()).device
        weights = block.weights.select(own.__contains__).to(place)
        masks = self._masks(weights, block.statistics, seen, lacking)
        new: dict[str, Tensor] = {}
        for name in own:
            weight, mask = weights[name], masks.get(name)
            if self.fix is None or name in lacking:
                assert mask is not None
                new[name] = masked(weight, mask)
                continue
            gram, rows = block.statistics["gram"][name], weight.flatten(1)
            flat = None if mask is None else mask.to(place).flatten(1)
            new[name] = self.fix(rows, gram, flat, **self.repair_options[name]).reshape(weight.shape)
        return new

    def _masks(
        self, weights: Weights, found: Mapping[str, Weights], seen: Sequence[str], lacking: Sequence[str]
    ) -> dict[str, Tensor]:
        """True where a weight is kept."""
        from weightsmith.prune import METHODS

        how = {
            "structure": self.structures.__getitem__,
            "action": "mask",
            **self.scope,
        }
        masks: dict[str, Tensor] = {}
        if self.method is not None and seen:
            told = {}
            if self.statistic is not None:
                told["stats"] = found["score" if self.statistic == "stats.activations" else "gram"].to("cpu")
            made = self.method(
                weights, self.shares.__getitem__, pattern=list(seen), **how, **told, **self.options["score"]
            )
            masks |= made.to_dict()
        if lacking:
            masks |= METHODS["magnitude"](weights, self.shares.__getitem__, pattern=list(lacking), **how).to_dict()
        return masks

    def _check_lacking(self, block: stats.Block, lacking: Sequence[str]) -> None:
        """Layers that were not reached are no error; those that cannot be understood are."""
        block.check_understood(lacking)
        if lacking:
            warnings.warn(
                f"no token reached {listed(lacking)}: pruned by magnitude and not repaired; more calibration data may "
                "reach them",
                stacklevel=4,
            )


def _scoring(score: str | Callable[..., Any]) -> Any:
    """A score as a method on weights."""
    from weightsmith.prune import METHODS

    if isinstance(score, str):
        if score not in METHODS:
            raise Error(f"there is no score {score!r}{did_you_mean(score, METHODS)}")
        if not hasattr(METHODS[score], "kernel"):
            raise Error(f"{score} needs the whole model at once; call weightsmith.prune.{score} itself")
        return METHODS[score]
    if hasattr(score, "kernel"):
        return score
    if hasattr(score, "card"):
        return lift(score)
    given = [p for p in inspect.signature(score).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if len(given) not in (1, 2):
        raise Error(f"score={_name(score)} must take a weight, or a weight and its Gram matrix")

    @card(paper="", needs=("stats.gram",), unit="tensor")
    @functools.wraps(score)
    def with_gram(weight: Tensor, stats: Tensor, **options: Any) -> Tensor:
        return score(weight, stats, **options)

    @card(paper="", unit="tensor")
    @functools.wraps(score)
    def alone(weight: Tensor, **options: Any) -> Tensor:
        return score(weight, **options)

    return lift(with_gram if len(given) == 2 else alone)


def _repairing(repair: str | Callable[..., Any], chooses: bool) -> Callable[..., Tensor]:
    """A repair as a kernel."""
    from weightsmith.prune.repair import METHODS

    if isinstance(repair, str):
        if repair not in METHODS:
            raise Error(f"there is no repair {repair!r}{did_you_mean(repair, METHODS)}; known: {', '.join(METHODS)}")
        if not hasattr(METHODS[repair], "kernel"):
            raise Error(f"{repair} is no repair of one layer at a time; call weightsmith.prune.repair.{repair} itself")
        repair = METHODS[repair]
    kernel = getattr(repair, "kernel", repair)
    if chooses and "sparsity" not in inspect.signature(kernel).parameters:
        raise Error(f"repair={_name(repair)} does not choose what to remove: it needs a score=")
    return kernel


def _diagonal_will_do(kernel: Any, options: Mapping[str, Any]) -> bool:
    """Whether a score is content with the sums of squares of inputs: it refuses them else."""
    plain = {name: value for name, value in options.items() if not isinstance(value, Mapping) and not callable(value)}
    try:
        kernel(example(2, 2), example(2), **plain)
    except (Error, RuntimeError, IndexError):
        return False
    return True


def _name(method: Any) -> Any:
    return getattr(method, "__name__", method)
