"""The signature of repairs, and the one loop that takes them over whole checkpoints."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.lifting import dressed, example, options_of, per_tensor_options, tried
from weightsmith.prune.room import Source, Sparsity, allocated, chosen_targets, masks_for, of_targets
from weightsmith.weights import Lazy, Pattern, Weights, apply, open
from weightsmith.weights import resolve as resolved


class Repair(Protocol):
    """What a user calls."""

    kernel: Callable[..., Tensor]

    @overload
    def __call__(
        self,
        weights: Source,
        mask: Source | None = None,
        *,
        stats: Source,
        sparsity: Sparsity | None = None,
        pattern: Pattern | None = None,
        **options: Any,
    ) -> Weights: ...

    @overload
    def __call__(self, weights: Tensor, *given: Any, **options: Any) -> Tensor: ...


_KINDS = inspect.Parameter
_PARAMETERS = (
    _KINDS("weights", _KINDS.POSITIONAL_OR_KEYWORD, annotation="Source"),
    _KINDS("mask", _KINDS.POSITIONAL_OR_KEYWORD, default=None, annotation="Source | None"),
    _KINDS("stats", _KINDS.KEYWORD_ONLY, annotation="Source"),
    _KINDS("pattern", _KINDS.KEYWORD_ONLY, default=None, annotation="Pattern | None"),
)
_SPARSITY = _KINDS("sparsity", _KINDS.KEYWORD_ONLY, default=None, annotation="PerTensor[float | str] | None")


def lift(kernel: Callable[..., Tensor]) -> Any:
    """``(weights, mask, *, stats, ...) -> Weights`` from a repair ``(weight [out, in], gram, mask) -> [out, in]``.

    The public function takes the weights *before* pruning and, beside the repair's own options (each possibly
    `PerTensor`): ``mask``, booleans under the names of the tensors to repair, true for what is kept; or, where the
    repair can choose by itself, ``sparsity``, and ``pattern`` for the tensors (default `weightsmith.prune.prunable`);
    ``stats``, the Gram matrices of their inputs. Convolutions are repaired as matrices ``[out, in * kernel]``.
    Tensors that are not repaired stay as they are. Called with a tensor it is the kernel.
    """
    method, chooses = kernel.__name__, "sparsity" in options_of(kernel)

    def repair(weights: Any, *given: Any, **options: Any) -> Any:
        if isinstance(weights, Tensor):
            return kernel(weights, *given, **options)
        if len(given) + ("mask" in options) > 1:
            raise Error(f"{method} takes weights and one mask; all else goes by name")
        mask = given[0] if given else options.pop("mask", None)
        stats, sparsity, pattern = (options.pop(name, None) for name in ("stats", "sparsity", "pattern"))
        opened = open(weights)
        masks: Mapping[str, Lazy] = {}
        if mask is not None:
            _not_both(method, sparsity, pattern)
            masks = _masks(opened, mask)
            targets = list(masks)
        else:
            _able(method, chooses, sparsity)
            targets = chosen_targets(opened, pattern)
            allocated({name: opened.node(name) for name in targets}, sparsity, "tensor")
        grams = of_targets(stats, "stats.gram", opened, targets, method)
        _full(method, grams)
        chosen = per_tensor_options(kernel, options, targets)
        tried(kernel, chosen.values(), example(2, 2), torch.eye(2), torch.ones(2, 2, dtype=torch.bool))
        if sparsity is not None:
            for name, share in resolved(sparsity, targets, "sparsity").items():
                chosen[name]["sparsity"] = share

        def build(name: str, node: Lazy) -> Lazy:
            if name not in chosen:
                return node
            given = [masks[name]] if name in masks else []
            how = functools.partial(_as_matrix, kernel)
            return apply(how, node, grams[name], *given, unit="tensor", spec=node.spec, options=chosen[name])

        said = options if sparsity is None else {"sparsity": sparsity, **options}
        return opened.zip_nodes(build, (), f"prune.repair.{method}", said)

    return dressed(repair, kernel, (*_PARAMETERS, *((_SPARSITY,) if chooses else ())))


def _as_matrix(
    kernel: Callable[..., Tensor], weight: Tensor, gram: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """A repair of a tensor ``[out, ...]``, whose axes after the first are its inputs."""
    rows = weight.flatten(1)
    return kernel(rows, gram, None if mask is None else mask.flatten(1), **options).reshape(weight.shape)


def _not_both(method: str, sparsity: object, pattern: object) -> None:
    for name, value in (("sparsity", sparsity), ("pattern", pattern)):
        if value is not None:
            raise Error(f"{method}: mask= says what is kept and in which tensors; it does not go with {name}=")


def _able(method: str, chooses: bool, sparsity: object) -> None:
    if not chooses:
        raise Error(
            f"{method} needs mask=, what is kept: it does not choose by itself. One is made by, say, "
            'weightsmith.prune.wanda(weights, 0.5, stats=stats, action="mask")'
        )
    if sparsity is None:
        raise Error(f"{method} needs mask=, what is kept, or sparsity=, such as 0.5 or '2:4', to choose by itself")


def _masks(weights: Weights, mask: Source) -> dict[str, Lazy]:
    masks = masks_for(weights, open(mask))
    if not masks:
        raise Error("a repair needs the mask of at least 1 tensor, got none")
    for name in masks:
        if len(weights.spec(name).shape) < 2:
            raise Error(f"the mask of {name} is {list(weights.spec(name).shape)}; repairs are of matrices [out, ...]")
    return masks


def _full(method: str, grams: Mapping[str, Any]) -> None:
    """An error where only the diagonals of Gram matrices are there."""
    for name, gram in grams.items():
        if len(gram.node.spec.shape) < 2:
            raise Error(
                f"{method} needs how inputs go together, and of {name} stats hold only the diagonal: "
                "gather whole Gram matrices, or blocks of them, with weightsmith.stats.gram(...)"
            )
