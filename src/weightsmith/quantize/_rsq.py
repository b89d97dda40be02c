"""Let the tokens that others look at count most.

A rounding that keeps a layer's outputs keeps those of all tokens alike. The tokens on which attention rests are few,
and what is lost of them is lost in all that look at them. So each token counts as much as attention it receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from weightsmith import stats
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._sequential import sequential
from weightsmith.quantize.room import Source
from weightsmith.stats import Access, Batch
from weightsmith.weights import Weights


@card(
    paper="Sung, Yadav, Li, Yoon, Bansal 2025, 'RSQ: Learning from Important Tokens Leads to Better Quantized LLMs'",
    covers=("rsq",),
    needs=("data",),
    unit="model",
    claim="a language model loses less than where all tokens count alike",
    departs="the rotation that goes before is a transform of its own, and left to the caller",
)
def rsq(
    weights: Source,
    batches: Iterable[Batch],
    method: str | Callable[..., Coded] = "gptq",
    *,
    low: float = 0.01,
    high: float = 1.0,
    **options: Any,
) -> Weights:
    r"""Quantize block by block, with tokens that count as much as attention they receive in the block.

    .. math:: G = \sum_t r_t\, x_t x_t^\top, \qquad r = \text{mean 1 of } r_{\min} + (r_{\max} - r_{\min})\,
        \frac{a - \min a}{\max a - \min a}, \qquad a_t = \sum_{h, s} A^{(h)}_{st}

    with :math:`A` the attention of a block from token s to t, for each text. `weightsmith.quantize.sequential` with
    these Gram matrices.

    Args:
        weights: what to quantize, as for `sequential`.
        batches: texts, ``[n, t]`` tokens each.
        method: a rounding of `weightsmith.quantize`.
        low: :math:`r_{\min}`, 0 or more; the authors' code tries 0.005 to 0.1.
        high: :math:`r_{\max}`, above 0 and at least ``low``.
        options: as for `sequential`, but for ``gram`` and ``propagate``.

    Returns:
        Weights: as `sequential` gives them. Each block runs once more for each batch; memory also holds one text's
        attention of a block, ``[heads, t, t]``.

    Raises:
        ValueError: a block in which no token attends to others, and what `sequential` raises.

    >>> rsq(torch.nn.Sequential(torch.nn.Linear(2, 2)), [torch.ones(1, 3, 2)])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    weightsmith.errors.Error: no attention between the tokens of a batch was seen; say with ...
    """
    for name in ("gram", "propagate"):
        if name in options:
            raise Error(f"rsq has its own {name}=; call weightsmith.quantize.sequential itself")
    usual = AttentionGram(sums=torch.float32, low=low, high=high)
    return sequential(weights, batches, method, gram=usual, **options)


def received(run: Callable[[], Any], mask: Tensor | None = None) -> Tensor | None:
    """How much attention each token receives while something runs: ``[n, t]``, summed over heads, tokens and layers.

    Seen are `torch.nn.functional.scaled_dot_product_attention`, `torch.nn.MultiheadAttention` and softmaxes of
    ``[n, heads, t, t]``, whatever module calls them.

    Args:
        run: what to look at.
        mask: ``[n, t]``, 0 for padding, which neither attends nor receives.

    Returns:
        ``[n, t]`` float32, or None where no token attended to others.

    >>> eye = torch.eye(2)[None, None]
    >>> received(lambda: functional.scaled_dot_product_attention(eye, eye, eye, is_causal=True, scale=0.0))
    tensor([[1.5000, 0.5000]])
    """
    watch = _Watch(mask)
    with torch.no_grad(), watch:
        run()
    if watch.total is None or mask is None or mask.shape != watch.total.shape:
        return watch.total
    return watch.total * (mask != 0)


def important(received: Tensor, low: float = 0.01, high: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Token weights ``[n, t]`` from what each token receives: along a line from ``low`` to ``high``, of mean 1.

    >>> important(torch.tensor([[1.0, 3.0, 2.0]]), low=0.0, high=1.0)
    tensor([[0., 2., 1.]])
    """
    if not 0 <= low <= high or not 0 < high < float("inf"):
        raise Error(f"low and high are token weights with 0 <= low <= high and high above 0, got {low} and {high}")
    counts = torch.ones_like(received, dtype=torch.bool) if mask is None else mask != 0
    least = received.masked_fill(~counts, torch.inf).amin(1, keepdim=True)
    most = received.masked_fill(~counts, -torch.inf).amax(1, keepdim=True)
    apart = most > least
    share = torch.where(apart, (received - least) / torch.where(apart, most - least, 1), 1.0)
    found = (low + (high - low) * share).masked_fill(~counts, 0)
    return found * counts.sum(1, keepdim=True) / found.sum(1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


@dataclass(frozen=True)
class AttentionGram(stats.Gram):
    """`weightsmith.stats.Gram` whose tokens count as much as attention they receive in the model that is looked at.

    The model runs twice for each batch, so its forward must be free of side effects.
    """

    low: float = 0.01
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        important(torch.ones(1, 1), self.low, self.high)
        if self.tokens is not None:
            raise Error("tokens= are those of attention here; use weightsmith.stats.Gram for others")

    def counter(self, access: Access) -> Any:
        now = _Now()
        plain = stats.Gram(self.pattern, self.form, now.of, self.sums, self.store, self.memory)
        return _Counter(access, plain.counter(access), now, self.low, self.high)


@dataclass
class _Now:
    """The token weights of the batch at hand."""

    weights: Tensor | None = None

    def of(self, batch: Batch) -> Tensor:
        assert self.weights is not None, "they are found before hooks are set"
        return self.weights


@dataclass
class _Counter:
    access: Access
    inner: Any
    now: _Now
    low: float
    high: float

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        found = received(lambda: self.access.forward(self.access.model, batch), mask)
        if found is None:
            raise Error(
                "no attention between the tokens of a batch was seen; say with weightsmith.stats.Gram(tokens=...) how "
                "much each counts, and call weightsmith.quantize.sequential"
            )
        same = mask is not None and mask.shape == found.shape
        self.now.weights = important(found, self.low, self.high, mask if same else None)
        with self.inner.watching(batch):
            yield

    def see(self, batch: Batch) -> None:
        self.inner.see(batch)

    def rows(self) -> Mapping[str, float]:
        return self.inner.rows()

    def result(self) -> dict[str, Tensor]:
        return self.inner.result()


@dataclass
class _Watch(TorchFunctionMode):
    """Sees attention wherever it is computed."""

    mask: Tensor | None = None
    total: Tensor | None = None
    softmaxes: tuple[Any, ...] = (functional.softmax, torch.softmax, Tensor.softmax)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self._scaled(*args, **kwargs)
        if function is functional.multi_head_attention_forward:
            return self._of_heads(*args, **kwargs)
        made = function(*args, **kwargs)
        if function in self.softmaxes and isinstance(made, Tensor) and made.dim() == 4:
            along = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if along in (-1, 3) and made.shape[-1] == made.shape[-2]:
                self._add(torch.stack([self._summed(one, number) for number, one in enumerate(made)]))
        return made

    def _scaled(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        if query.dim() != 4 or query.shape[-2] != key.shape[-2]:
            return  # not between the tokens of one text
        length, heads = query.shape[-2], query.shape[1]
        if enable_gqa:
            key = key.repeat_interleave(heads // key.shape[1], 1)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1) if is_causal else None
        found = []
        for number in range(len(query)):  # one text at a time: [heads, t, t]
            scores = (query[number].float() @ key[number].float().mT) * factor
            if later is not None:
                scores = scores.masked_fill(later, -torch.inf)
            if attn_mask is not None:
                own = attn_mask.expand(len(query), heads, length, length)[number]
                scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
            found.append(self._summed(torch.softmax(scores, -1), number))
        self._add(torch.stack(found))

    def _of_heads(
        self, *args: Any, need_weights: bool = True, average_attn_weights: bool = True, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`torch.nn.MultiheadAttention`, asked for its attention: what it calls inside is not seen."""
        made, attention = functional.multi_head_attention_forward(
            *args, need_weights=True, average_attn_weights=False, **kwargs
        )
        if attention is not None and attention.dim() == 4 and attention.shape[-1] == attention.shape[-2]:
            self._add(torch.stack([self._summed(one, number) for number, one in enumerate(attention)]))
        if attention is None or not need_weights:
            return made, None
        return made, attention.mean(-3) if average_attn_weights else attention

    def _summed(self, attention: Tensor, number: int) -> Tensor:
        """Columns of ``[heads, t, t]``: ``[t]``."""
        columns = attention.detach().float().nan_to_num(0).sum(0)
        if self.mask is not None and self.mask.shape[1] == len(columns) and number < len(self.mask):
            columns = columns * (self.mask[number] != 0).to(columns)[:, None]
        return columns.sum(0)

    def _add(self, found: Tensor) -> None:
        if self.total is None:
            self.total = found
        elif self.total.shape == found.shape:
            self.total = self.total + found
