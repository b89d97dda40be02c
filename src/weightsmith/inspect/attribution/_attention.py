"""Which words speak for an answer and which against it, by attention and its gradient.

A token that is attended to matters as far as the answer would change with the attention. Others keep only where it
would rise; the fall is what tells a word that does not belong: a caption's wrong noun, a review's one complaint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect.attribution._parts import Target, chosen, frozen
from weightsmith.stats.room import Batch, Forward, default_forward


@card(
    paper="Nam, Im, Kim, Kil 2025, 'Extract Free Dense Misalignment from CLIP'",
    covers=("extract-free-dense-misalignment",),
    needs=("data",),
    unit="model",
    claim="a token that speaks against the answer has the lowest score, where scores cut at 0 miss it",
)
def attention_attribution(
    model: nn.Module,
    batch: Batch,
    *,
    target: Target = None,
    row: int | Tensor | None = -1,
    layers: int | None = 3,
    signed: bool = True,
    forward: Forward | None = None,
) -> Tensor:
    r"""The signed part of each token in an answer: attention times its gradient.

    .. math:: r_j = \frac{1}{|L| H} \sum_{l \in L} \sum_h
        \frac{\partial F}{\partial A^{(l,h)}_{ij}}\, A^{(l,h)}_{ij}

    with i the position that is read (the end of the text, or the class token) and L the last layers.

    Args:
        model: whose attention is a softmax over the last axis (eager code), a
            ``scaled_dot_product_attention`` or a ``torch.nn.MultiheadAttention``; left as it was.
        batch: anything that the model takes.
        target: the output F that is meant, as for `integrated_gradients`.
        row: the query position i, one for each example ``[n]``, or None for the mean of all.
        layers: how many of the last attention maps count; None for all. The paper takes the last three of CLIP's
            text encoder.
        signed: False keeps only what speaks for the answer (gradients below 0 count as 0), as others do.
        forward: ``(model, batch) -> outputs [n, ...]``, where the default does not fit.

    Returns:
        ``[n, tokens]`` float32 or wider.

    Raises:
        ValueError: no attention found, maps of different shapes among the chosen layers, a softmax that is no
            attention.

    >>> class Mean(torch.nn.Module):                               # one query attends to two tokens of worth 3 and -3
    ...     def forward(self, keys):
    ...         attention = torch.softmax(keys[:, None], dim=-1)
    ...         return (attention @ torch.tensor([[3.0], [-3.0]]))[:, 0]
    >>> attention_attribution(Mean(), torch.zeros(1, 2))
    tensor([[ 1.5000, -1.5000]])
    """
    if layers is not None and layers < 1:
        raise Error(f"layers is at least 1, got {layers}")
    maps = _Maps()
    with frozen(model), torch.enable_grad():
        with maps:
            outputs = (forward or default_forward)(model, batch)
        found = chosen(outputs, target)
        if not maps.found:
            raise Error("the model showed no attention: no softmax over rows of tokens, nor a fused attention")
        torch.autograd.grad(found.sum(), [one.leaf for one in maps.found], allow_unused=True)
    last = maps.found[-layers:] if layers is not None else maps.found
    total = sum(_read(one, len(outputs), signed, row) for one in _alike(last))
    assert isinstance(total, Tensor)
    return total / len(last)


@card(
    paper="Nam, Im, Kim, Kil 2025, 'Extract Free Dense Misalignment from CLIP': F-CLIPScore",
    covers=("extract-free-dense-misalignment",),
    unit="model",
    claim="ranks captions with one wrong word below those without, where similarity alone barely tells",
    departs="the formula is that of the authors' evaluation code: a product, not a sum",
)
def f_clipscore(
    attributions: Tensor, similarity: Tensor, *, threshold: float = -5e-5, mask: Tensor | None = None
) -> Tensor:
    r"""How well a text fits, by its words that speak against it and by how unlike the whole is.

    .. math:: \Bigl(\sum_{j:\, r_j < \epsilon} r_j\Bigr) \bigl(1 - \max(\cos, 0)\bigr)

    Args:
        attributions: ``[n, tokens]`` of `attention_attribution` (words of several tokens averaged, where wanted).
        similarity: ``[n]`` cosines of text and image.
        threshold: :math:`\epsilon`: above it a score counts as noise.
        mask: ``[n, tokens]`` bool: the tokens that count, without template, padding and marks.

    Returns:
        ``[n]``, at most 0; the lower, the worse.

    Raises:
        ValueError: shapes that do not fit.

    >>> f_clipscore(torch.tensor([[0.2, -0.1]]), torch.tensor([0.5]))
    tensor([-0.0500])
    """
    if attributions.dim() != 2 or similarity.shape != attributions.shape[:1]:
        raise Error(
            f"attributions are [n, tokens] and similarity [n]; got {list(attributions.shape)} and "
            f"{list(similarity.shape)}"
        )
    counts = attributions < threshold
    if mask is not None:
        if mask.shape != attributions.shape:
            raise Error(f"mask {list(mask.shape)} does not fit attributions {list(attributions.shape)}")
        counts = counts & mask
    return attributions.where(counts, 0).sum(dim=1) * (1 - similarity.clamp(min=0))


class _Map:
    """One attention map; ``slope`` is there once gradients were asked for at ``leaf``."""

    def __init__(self, values: Tensor, leaf: Tensor):
        self.values, self.leaf = values.detach(), leaf
        self.slope: Tensor | None = None

    def note(self, slope: Tensor) -> None:
        self.slope = slope.detach() if self.slope is None else self.slope + slope.detach()


class _Maps(TorchFunctionMode):
    """Notes attention maps of any kind of code, with zeros added at which their gradients are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Map] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        word = getattr(function, "__name__", "")
        if word == "scaled_dot_product_attention":
            return self._fused(*arguments, **named)
        if word == "multi_head_attention_forward":
            return self._heads(function, arguments, named)
        made = function(*arguments, **named)
        if word == "softmax" and isinstance(made, Tensor) and made.dim() >= 3:
            axis = named.get("dim", arguments[1] if len(arguments) > 1 else None)
            if axis in (-1, made.dim() - 1):
                return self._noted(made)
        return made

    def _noted(self, attention: Tensor) -> Tensor:
        zeros = torch.zeros_like(attention, requires_grad=True)
        one = _Map(attention, zeros)
        self.found.append(one)
        zeros.register_hook(one.note)
        return attention + zeros

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, dim=-3), value.repeat_interleave(times, dim=-3)
        logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return self._noted(logits.softmax(dim=-1)) @ value

    def _heads(self, function: Any, arguments: Any, named: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        # The weights that this function returns lie beside the way to its output. Their gradient is what arrives at
        # the softmax that they are a view of; the query is given zeros, so that there is something to ask for.
        asked, averaged = named.get("need_weights", True), named.get("average_attn_weights", True)
        zeros = torch.zeros_like(arguments[0], requires_grad=True)
        named |= {"need_weights": True, "average_attn_weights": False}
        made, weights = function(arguments[0] + zeros, *arguments[1:], **named)
        node = weights.grad_fn
        while node is not None and "Softmax" not in node.name():
            node = node.next_functions[0][0] if node.next_functions else None
        if node is None:
            raise Error("this version of PyTorch computes multi-head attention in another way than is known here")
        one = _Map(weights, zeros)
        self.found.append(one)
        node.register_prehook(lambda slopes: one.note(slopes[0].reshape(weights.shape)))
        return made, (weights.mean(dim=1) if averaged else weights) if asked else None


def _alike(maps: list[_Map]) -> list[_Map]:
    """The maps, if they have one number of tokens."""
    shapes = {one.values.shape[-2:] for one in maps}
    if len(shapes) > 1:
        raise Error(f"the chosen attention maps have different shapes {sorted(map(list, shapes))}; take fewer layers=")
    return maps


def _read(one: _Map, examples: int, signed: bool, row: int | Tensor | None) -> Tensor:
    """``[n, tokens]`` of one map."""
    values = one.values
    if values.shape[0] != examples:
        raise Error(f"an attention map has {list(values.shape)}, where the outputs have {examples} examples first")
    slope = torch.zeros_like(values) if one.slope is None else one.slope
    wide = torch.promote_types(values.dtype, torch.float32)
    product = (slope if signed else slope.clamp(min=0)).to(wide) * values.to(wide)
    product = product.reshape(examples, -1, *values.shape[-2:]).mean(dim=1)
    if row is None:
        return product.mean(dim=1)
    if isinstance(row, Tensor):
        return product[torch.arange(examples, device=product.device), row.to(product.device)]
    return product[:, row]
