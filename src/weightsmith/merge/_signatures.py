"""What makes a model robust is a small difference of weights that can be put on and taken off.

Two runs from one start learn the same task, one on clean and one on disturbed data. What the robust run learned
beside the task is the part of its update that is at right angles to the clean run's. It lies mostly in the first
layers, takes little room, and can be added to other models of the same start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge._parts import delta_gram, learned, wide
from weightsmith.merge.room import Source, check_alike
from weightsmith.quantize import dequantize
from weightsmith.weights import (
    Inputs,
    Lazy,
    Pattern,
    PerTensor,
    Reduction,
    Spec,
    Stack,
    Step,
    Weights,
    apply,
    depth_of,
    open,
    promote,
    resolve,
    single,
    working_dtype,
)


def common_part(gram: Tensor) -> float:
    """How much of the clean update is in the robust one, from their inner products ``[2, 2]``, robust first."""
    if not gram.isfinite().all():
        raise Error("signature: a model holds NaN or infinity; weightsmith.inspect.verify finds where")
    length = float(gram[1, 1])
    return float(gram[0, 1]) / length if length > 0 else 0.0


@card(
    paper="Cai, Zhang, Wang 2023, 'Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?'",
    covers=("robust-weight-signatures",),
    needs=("base",),
    unit="model",
    reduce=delta_gram,
    solve=common_part,
    claim="a clean model with a signature is more accurate under the signature's disturbance than without",
    departs="a tensor that the clean run did not move gives the whole robust update; the parameters of batch norm are "
    "projected like all others, and its running statistics left out, to be estimated anew "
    "(the paper's code takes both from the robust models, and estimates them anew for residual networks)",
)
def signature(robust: Source, clean: Source, base: Source, *, pattern: Pattern = "*", depth: float = 1.0) -> Weights:
    r"""What a robust run learned beside the task, tensor by tensor: a difference to add with `patch`.

    .. math:: s = d - \frac{d \cdot c}{\lVert c \rVert^2}\, c, \qquad d = w_r - w_0, \quad c = w_c - w_0

    Args:
        robust: :math:`w_r`, trained from ``base`` on disturbed data; anything that `weightsmith.open` opens.
        clean: :math:`w_c`, trained from ``base`` on clean data.
        base: :math:`w_0`, what both were started from.
        pattern: which tensors are kept. Batch norm's running statistics are in no signature.
        depth: only tensors up to here, between 0, the first layer, and 1, all (`weightsmith.weights.depth_of`).

    Returns:
        Weights: lazy, of the tensors that are kept, in float32 or wider (small differences vanish in bfloat16).
        It can be saved, or quantized first (`weightsmith.quantize.rtn`): `patch` reads it all the same.

    Raises:
        ValueError: models of different architectures, or no tensor that fits; when computed, NaN or infinity.

    >>> base, clean = {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 0.0])}
    >>> signature({"w": torch.tensor([3.0, 1.0])}, clean, base)["w"]
    tensor([0., 1.])
    """
    if not 0 <= depth <= 1:
        raise Error(f"signature: depth lies between 0 (the first layer) and 1 (all), got {depth}")
    first, second, start = open(robust), open(clean), open(base)
    check_alike([first, second], start, "signature")
    places = depth_of(first)
    names = {name for name in learned(first, pattern, "signature") if places[name] <= depth}
    if not names:
        raise Error(f"signature: no tensor that fits pattern={pattern!r} lies at depth {depth} or before")

    def build(name: str, node: Lazy, plain: Lazy, origin: Lazy) -> Lazy:
        arguments = (Stack((node, plain)), origin)
        dtype = promote(*(working_dtype(one.spec.dtype) for one in (node, plain, origin)))
        reduction = Reduction([Inputs(arguments, "element")], partial(single, delta_gram, common_part))
        return apply(_beside, *arguments, spec=Spec(node.spec.shape, dtype), reduction=reduction)

    kept = [weights.select(names.__contains__) for weights in (first, second, start)]
    made = kept[0].zip_nodes(build, (kept[1], kept[2]), "merge.signature", {})
    lineages = (first.lineage, second.lineage, start.lineage)
    said = getattr(pattern, "__name__", "test") if callable(pattern) else pattern
    # No files: a difference is no model, and config.json would say it is one.
    nodes = {name: made.node(name) for name in made}
    return Weights(nodes, Step("merge.signature", {"pattern": said, "depth": depth}, lineages))


def _beside(models: Tensor, base: Tensor, *, solved: float) -> Tensor:
    wider, start = wide(models, base)
    robust, clean = wider - start
    return robust.sub_(clean, alpha=solved)


@card(
    paper="Cai, Zhang, Wang 2023, 'Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?'",
    unit="model",
    claim="what was added can be taken off again",
    departs="every signature is scaled once (the paper's code scales it twice, before and after the projection)",
)
def patch(
    model: Source,
    signatures: Sequence[Source],
    *,
    amount: PerTensor[float] | Sequence[PerTensor[float]] = 1.0,
) -> Weights:
    r"""A model with differences of weights put on.

    .. math:: w' = w + \sum_i a_i s_i

    A negative amount takes a signature off again.

    Args:
        model: what to patch; anything that `weightsmith.open` opens.
        signatures: of `signature`, or any differences under the model's names; a tensor that is not in one is zero
            there. A quantized one is read back (`weightsmith.quantize.dequantize`).
        amount: :math:`a_i`, one number for all or one for each; each may differ by tensor.

    Returns:
        Weights: lazy, in the dtypes of ``model``; computed in float32 or wider. Tensors that no signature speaks
        of, and those without floats, are the model's own.

    Raises:
        ValueError: a signature of other tensors or shapes, a wrong number of amounts, or ones that are not finite.

    >>> model, s = ws.Weights.of({"w": torch.tensor([2.0, 0.0]), "b": torch.ones(1)}), {"w": torch.tensor([0.0, 1.0])}
    >>> patched = patch(model, [s], amount=0.5)
    >>> patched["w"], patch(patched, [s], amount=-0.5)["w"]
    (tensor([2.0000, 0.5000]), tensor([2., 0.]))
    """
    if isinstance(signatures, Weights) or not isinstance(signatures, Sequence) or isinstance(signatures, str):
        raise Error(f"patch takes a list of signatures, got one {type(signatures).__name__}")
    opened, own = [_read_back(one) for one in signatures], open(model)
    if not opened:
        raise Error("patch needs at least 1 signature, got 0")
    amounts: list[Any] = list(amount) if isinstance(amount, list | tuple) else [amount] * len(opened)
    if len(amounts) != len(opened):
        raise Error(f"amount needs one number for each of the {len(opened)} signatures, got {len(amounts)}")
    found = [_found(own, one, f"signature {number + 1}") for number, one in enumerate(opened)]
    scales = [resolve(value, list(own.names(floating=True)), "amount") for value in amounts]
    wrong = [value for scale in scales for value in scale.values() if not math.isfinite(value)]
    if wrong:
        raise Error(f"patch: amount must be finite, got {wrong[0]}")

    def build(name: str, node: Lazy) -> Lazy:
        on = [(delta[id(node)], scale[name]) for delta, scale in zip(found, scales, strict=True) if id(node) in delta]
        on = [(delta, float(value)) for delta, value in on if value]
        if not on:
            return node
        deltas, values = zip(*on, strict=True)
        return apply(_patched, node, *deltas, spec=node.spec, options={"amounts": values})

    def apart(name: str) -> object:
        return tuple(scale.get(name) for scale in scales)

    made = own.zip_nodes(build, (), "merge.patch", {"amount": amount}, apart)
    step = Step("merge.patch", {"amount": amount}, (own.lineage, *(one.lineage for one in opened)))
    return Weights({name: made.node(name) for name in made}, step, own.files, own.metadata)


def _patched(weight: Tensor, *deltas: Tensor, amounts: Sequence[float]) -> Tensor:
    weight, *wider = wide(weight, *deltas)
    total = weight.clone()
    for delta, amount in zip(wider, amounts, strict=True):
        total.add_(delta, alpha=amount)
    return total


def _read_back(signature: Source) -> Weights:
    opened = open(signature)
    return dequantize(opened) if any(name.endswith("_packed") for name in opened) else opened


def _found(model: Weights, signature: Weights, who: str) -> dict[int, Lazy]:
    """Node of the model (by identity) -> its difference. Names of one tensor may stand under any of them."""
    unknown = [name for name in signature if name not in model]
    if unknown:
        raise Error(
            f"patch: the model has no {listed(unknown)}, of which {who} speaks{did_you_mean(unknown[0], model)}"
        )
    found: dict[int, Lazy] = {}
    for name in signature:
        node, delta = model.node(name), signature.node(name)
        if not node.spec.dtype.is_floating_point:
            continue
        if node.spec.shape != delta.spec.shape:
            raise Error(f"patch: {name} is {list(node.spec.shape)}, but {list(delta.spec.shape)} in {who}")
        if found.setdefault(id(node), delta) is not delta:
            raise Error(f"patch: {name} is tied to another tensor of the model, but {who} changes them differently")
    return found
