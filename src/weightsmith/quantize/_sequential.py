"""Quantize block by block, so that each block is quantized for what it will really be given.

The inputs of a layer change as the blocks before it are quantized. Going forward through the network, the statistics of
each block are gathered with what the quantized blocks before it give. Only one block is in memory at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith import stats
from weightsmith.card import card, card_of
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.quantize import _rtn
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._gptq import shared_factor
from weightsmith.quantize._layout import parts_of, with_codes
from weightsmith.quantize.room import Plan, Source, planned, rounded, takes_gram
from weightsmith.stats import Batch, Forward
from weightsmith.stats.room import UNDERSTOOD, NoneFits
from weightsmith.weights import Held, Pattern, Step, Weights, open


@card(
    paper="Frantar, Ashkboos, Hoefler, Alistarh 2022, 'GPTQ: Accurate Post-Training Quantization for Generative "
    "Pre-trained Transformers'",
    needs=("data",),
    unit="model",
    departs="the order of work alone: which rounding is used on which grid is the caller's choice",
)
def sequential(
    weights: Source,
    batches: Iterable[Batch],
    method: str | Callable[..., Coded] = "gptq",
    *,
    propagate: Literal["changed", "dense"] = "changed",
    pattern: Pattern | None = None,
    action: Literal["codes", "values"] = "codes",
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    gram: stats.Gram | None = None,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Weights:
    """Quantize the blocks of a model one after another, each by the inputs that it is given by those before it.

    Memory is that of `weightsmith.stats.walk`, the Gram matrices of one block, and the codes made so far (with
    ``store`` these lie on disk).

    Args:
        weights: what to quantize, with a ``config.json`` of transformers beside them, or a module, which is left as
            it was.
        batches: calibration data: ``inputs``, ``(inputs, labels)`` or mappings, such as
            `weightsmith.calibration.texts` makes.
        method: a rounding of `weightsmith.quantize`, or a kernel ``(weight [out, in], gram [in, in], *, grid) ->
            Coded``.
        propagate: what the next block is given: what the quantized block gives (``"changed"``), or the whole one.
        pattern: which tensors; by default matrices and convolutions without embeddings and the head. Those outside
            of the blocks stay as they are.
        action: ``"codes"``, or the ``"values"`` that they stand for.
        gram: how Gram matrices are gathered (token weights, say); their names are filled in.
        model, blocks, dtype, device, forward, store, resume: as in `weightsmith.stats.walk`.
        options: of the method and of its grid (``bits``, ``group``, ``grid``, ...), possibly by tensor.

    Returns:
        Weights: as `gptq` and its like give them. A layer that no token reached (an expert) is rounded to nearest,
        with a warning; so are experts that are fused into one tensor, of whose inputs nothing is gathered.

    Raises:
        ValueError: unknown methods or options, weights that are tied or whose layer's inputs do not say all about
            them, and what `weightsmith.stats.walk` raises.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> coded = sequential(net, [torch.ones(3, 4)], "gptq", bits=3)
    >>> coded["2.weight_packed"].shape, coded["2.weight_scale"].shape
    (torch.Size([2, 1]), torch.Size([2, 1]))
    """
    if action not in ("codes", "values"):
        raise Error(f"action is 'codes' or 'values', got {action!r}")
    opened = open(weights)
    kernel = kernel_of(method)
    work = _Visitor(kernel, planned(kernel, opened, {**options, "pattern": pattern}), action == "codes", gram, store)
    tied = [first for first in opened.ties.values() if first in work.plans]
    if tied:
        raise Error(f"{listed(tied)} have several names (tied weights); leave them out with pattern=")
    said = {"method": kernel.__name__, "propagate": propagate, "pattern": pattern, "dtype": dtype, **options}
    module = weights if model is None and isinstance(weights, nn.Module) else model
    try:
        found = stats.walk(
            opened, batches, work.visit, model=module, blocks=blocks, statistics=work.statistics, propagate=propagate,
            dtype=dtype, device=device, forward=forward, store=store, resume=resume, keep=action == "values",
            settings={**said, "targets": list(work.plans), "action": action},
        )  # fmt: skip
    except NoneFits:
        raise Error(
            f"none of {listed(work.plans)} is {UNDERSTOOD} in a block; say which tensors with pattern=, or with "
            "blocks= which modules are walked"
        ) from None
    step = Step("quantize.sequential", said, (opened.lineage,))
    if action == "values":
        done = {name for name in work.plans if found.node(name) is not opened.node(name)}
    else:
        coded = work.coded(opened)
        done = set(coded)
    _check_outside(work.plans, done, pattern)
    if action == "values":
        return Weights({name: found.node(name) for name in found}, step, opened.files, opened.metadata)
    return with_codes(opened, coded, {name: work.plans[name].layout for name in coded}, step)


def kernel_of(method: str | Callable[..., Any]) -> Callable[..., Coded]:
    """A rounding as a kernel."""
    from weightsmith.quantize import METHODS

    if isinstance(method, str):
        usable = [name for name in METHODS if hasattr(METHODS[name], "kernel")]
        if method not in METHODS:
            raise Error(f"there is no rounding {method!r}{did_you_mean(method, usable)}; known: {', '.join(usable)}")
        if method not in usable:
            raise Error(f"{method} is no rounding of one layer at a time; call weightsmith.quantize.{method} itself")
        return METHODS[method].kernel
    kernel = getattr(method, "kernel", method)
    if hasattr(kernel, "card"):
        return kernel
    return card(paper="", needs=("stats.gram",), unit="tensor")(kernel)


def asks(kernel: Callable[..., Coded], plans: Mapping[str, Plan]) -> bool:
    """Whether a rounding makes use of what inputs are like."""
    clipped = any(plan.options.get("clip") for plan in plans.values())
    # To the nearest of points that are fitted to the weights alone: nothing is to be asked.
    idle = kernel is _rtn.rtn and not clipped
    return "stats.gram" in card_of(kernel).needs or (takes_gram(kernel) and not idle)


def _check_outside(plans: Mapping[str, Plan], done: set[str], pattern: Pattern | None) -> None:
    outside = [name for name in plans if name not in done]
    if outside and pattern is not None:
        warnings.warn(f"sequential leaves {listed(outside)} as they are: they stand in no block", stacklevel=3)
    if len(outside) == len(plans):
        raise Error(f"none of {listed(plans)} stands in a block; say with blocks= which modules are walked")


class _Visitor:
    """What is done in every block, checked before any work."""

    def __init__(
        self, kernel: Callable[..., Coded], plans: Mapping[str, Plan], codes: bool, gram: stats.Gram | None,
        store: str | os.PathLike[str] | None,
    ):  # fmt: skip
        self.kernel, self.plans, self.codes = kernel, plans, codes
        self.folder = None if store is None else Path(store)
        own = frozenset(plans)
        self.asks = asks(kernel, plans)
        self.statistics: dict[str, Any] = {}
        if self.asks:
            from dataclasses import replace

            # Sums of whole matrices in float32 are good to 1e-6, and half as large.
            usual = stats.Gram(sums=torch.float32) if gram is None else gram
            self.statistics["gram"] = replace(usual, pattern=own.__contains__)
        self.made: dict[str, dict[str, Tensor]] = {}

    def visit(self, block: stats.Block) -> dict[str, Tensor]:
        """The values that stand for a block's tensors from now on; their codes are kept."""
        own = [name for name in block.names if name in self.plans]
        if not own:
            return {}
        grams = block.statistics.get("gram", {})
        lacking = [name for name in own if name not in grams] if self.asks else []
        self._check_lacking(block, lacking)
        place = next(block.module.parameters()).device
        new: dict[str, Tensor] = {}
        coded: dict[str, dict[str, Tensor]] = {}
        factors: dict[str, Any] = {}
        for name in own:
            plan, weight = self.plans[name], block.weights[name].to(place)
            if name in lacking:
                found = rounded(_rtn.rtn, plan.layout, {}, weight, None)
            else:
                with shared_factor(factors):
                    found = rounded(self.kernel, plan.layout, plan.options, weight, grams[name] if self.asks else None)
            if self.codes:
                coded[name] = {key: value.cpu() for key, value in parts_of(found, plan.layout).items()}
            new[name] = found.values()[:, : plan.layout.inputs].reshape(weight.shape)
        self._keep(block.index, coded)
        return new

    def _keep(self, index: int, coded: dict[str, dict[str, Tensor]]) -> None:
        if self.folder is None:
            self.made |= coded
        elif coded:
            flat = {name + ending: part for name, parts in coded.items() for ending, part in parts.items()}
            Weights.of(flat).save(self.folder / f"codes-{index:05d}.safetensors", overwrite=True)

    def coded(self, weights: Weights) -> dict[str, dict[str, Any]]:
        """Tensor -> ending -> node, of all blocks, also of those that an earlier run has made."""
        found: dict[str, dict[str, Any]] = {
            name: {ending: Held(part) for ending, part in parts.items()} for name, parts in self.made.items()
        }
        for path in sorted(self.folder.glob("codes-*.safetensors")) if self.folder is not None else []:
            shard = open(path)
            for name, plan in self.plans.items():
                if f"{name}_packed" in shard:
                    endings = ("_packed", *(f"_{key}" for key in plan.grid.stored()))
                    found[name] = {ending: shard.node(name + ending) for ending in endings}
        for name, parts in found.items():
            parts["_shape"] = Held(torch.tensor(self.plans[name].layout.shape))
        return found

    def _check_lacking(self, block: stats.Block, lacking: Sequence[str]) -> None:
        """Layers that were not reached are no error; those that cannot be understood are."""
        fused = [name for name in lacking if self.plans[name].layout.experts > 0]
        if fused:
            warnings.warn(
                f"{listed(fused)}: experts in one tensor are no layer whose inputs could be gathered, so they are "
                f"rounded to nearest; with Gram matrices of your own use quantize.{self.kernel.__name__}(stats=...)",
                stacklevel=4,
            )
        lacking = [name for name in lacking if name not in fused]
        block.check_understood(lacking)
        if lacking:
            warnings.warn(
                f"no token reached {listed(lacking)}: rounded to nearest; more calibration data may reach them",
                stacklevel=4,
            )
