"""Whether a training run is about to become unstable, and how much it minds its learning rate.

What blows up in a large model at a small learning rate blows up in a small one at a large rate: attention logits
that grow until attention looks at one token alone, output logits that drift away from log-probabilities, gradients so
small that Adam's epsilon swallows them. Each shows in a number long before the loss does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.weights import Pattern, working

LIMIT = 1e4
"""Attention logits above which a run counts as in danger, unless told otherwise (after Wortsman et al. 2023)."""

_LOGITS = 2**22  # attention logits that are held at once


def z_loss(logits: Tensor, *, coefficient: float = 1e-4) -> Tensor:
    r"""A penalty that keeps logits near log-probabilities: softmax alone lets all of them drift together.

    .. math:: c\, \frac1n \sum_i \log^2 Z_i, \qquad Z_i = \sum_j e^{y_{ij}}

    Args:
        logits: ``[..., v]``.
        coefficient: c.

    Returns:
        A number to be added to the mean loss, float32 or wider.

    Wortsman et al. 2023, 'Small-scale proxies for large-scale Transformer training instabilities'.

    >>> z_loss(torch.zeros(2, 1) + 3.0, coefficient=1.0)
    tensor(9.)
    """
    return coefficient * working(logits).logsumexp(dim=-1).square().mean()


@card(
    paper="Wortsman et al. 2023, 'Small-scale proxies for large-scale Transformer training instabilities'",
    covers=("small-scale-proxies-large-scale-transformer",),
    unit="model",
    claim="0 for runs that no learning rate makes worse, and higher the more rates fail",
)
def learning_rate_sensitivity(losses: Mapping[float, float], initial: float) -> float:
    r"""How much worse a run gets, on average, when its learning rate is not the best one.

    .. math:: \mathbb E_{\eta} \left[ \min(\ell(\eta), \ell_0) \right] - \min_\eta \ell(\eta)

    Args:
        losses: final loss by learning rate; rates evenly spaced in their logarithm, so that all count alike. What is
            not finite has diverged and counts as ``initial``.
        initial: :math:`\ell_0`, the loss before training: what a diverged run is no worse than.

    Returns:
        In the unit of the losses; 0 if all rates are as good.

    Raises:
        ValueError: fewer than two rates, a rate not above 0, or an initial loss that is not finite.

    >>> learning_rate_sensitivity({0.001: 3.0, 0.01: 2.0, 0.1: float("nan")}, initial=4.0)
    1.0
    """
    if len(losses) < 2 or not all(math.isfinite(rate) and rate > 0 for rate in losses):
        raise Error(f"learning_rate_sensitivity needs at least 2 learning rates above 0, got {sorted(losses)}")
    if not math.isfinite(initial):
        raise Error(f"the initial loss must be finite, got {initial}")
    held = [_held(loss, initial) for loss in losses.values()]
    return sum(held) / len(held) - min(held)


def _held(loss: float, initial: float) -> float:
    return min(loss, initial) if math.isfinite(loss) else initial


Train = Callable[[float, int], float]
"""``(learning rate, seed) -> final loss``."""


@card(
    paper="Wortsman et al. 2023, 'Small-scale proxies for large-scale Transformer training instabilities'",
    covers=("small-scale-proxies-large-scale-transformer",),
    needs=("data",),
    unit="model",
)
def learning_rate_sweep(
    train: Train, rates: Sequence[float], initial: float, *, seeds: Sequence[int] = (0,), tolerance: float = 0.1
) -> Report:
    """Train at several learning rates, and say how much the rate matters.

    Args:
        train: ``(learning rate, seed) -> final loss``; a run that fails returns NaN or infinity.
        rates: learning rates, evenly spaced in their logarithm, in any order; what comes twice is trained once.
        initial: the loss before training.
        seeds: a run each, at every rate.
        tolerance: rates count as good that are at most this much worse than the best.

    Returns:
        Report: ``sensitivity`` (mean over seeds) with its ``spread`` over seeds, ``best rate``, ``best loss``, and
        ``good span``, the ratio of the largest to the smallest of neighbouring good rates around the best. A row a
        rate: mean ``loss`` (held at the initial one), ``lowest``, ``highest`` and how many runs ``diverged`` (ended
        above the initial loss, or not finite).

    Raises:
        ValueError: fewer than two rates, no seed.

    >>> found = learning_rate_sweep(lambda rate, seed: abs(rate - 0.1) * 10, [0.01, 0.1, 1.0], initial=2.0)
    >>> found["best rate"], round(found["sensitivity"], 4), found["diverged"]
    (0.1, 0.9667, [0, 0, 1])
    """
    places = sorted(set(rates))
    if not seeds:
        raise Error("learning_rate_sweep needs at least one seed")
    learning_rate_sensitivity(dict.fromkeys(places, 0.0), initial)
    losses: dict[float, list[float]] = {rate: [] for rate in places}
    with progress.task("learning rates", len(places) * len(seeds)) as advance:
        for rate in places:
            for seed in seeds:
                losses[rate].append(float(train(rate, seed)))
                advance(1)
    single = [learning_rate_sensitivity({rate: losses[rate][i] for rate in places}, initial) for i in range(len(seeds))]
    rows = []
    for rate in places:
        held = [_held(loss, initial) for loss in losses[rate]]
        rows.append(
            {
                "rate": rate,
                "loss": sum(held) / len(held),
                "lowest": min(held),
                "highest": max(held),
                "diverged": sum(not loss <= initial for loss in losses[rate]),
            }
        )
    best = min(range(len(rows)), key=lambda place: rows[place]["loss"])
    good = [row["loss"] <= rows[best]["loss"] + tolerance for row in rows]
    low = high = best
    while low and good[low - 1]:
        low -= 1
    while high + 1 < len(rows) and good[high + 1]:
        high += 1
    figures = {
        "sensitivity": sum(single) / len(single),
        "spread": max(single) - min(single),
        "best rate": places[best],
        "best loss": rows[best]["loss"],
        "good span": places[high] / places[low],
        "initial loss": initial,
    }
    line = Line("loss", places, [row["loss"] for row in rows], [row["lowest"] for row in rows],
                [row["highest"] for row in rows])  # fmt: skip
    plot = Plot("Loss by learning rate", "learning rate", "final loss, at most the initial one", [line], log="x")
    return Report("Sensitivity to the learning rate", figures, rows, [plot])


def largest_attention_logit(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> float:
    r"""The largest attention logit that is not masked.

    .. math:: \max_{i,j} \frac{q_i \cdot k_j}{\sqrt d}

    Args:
        query: ``[..., t, d]``.
        key: ``[..., s, d]``; fewer heads than the query's where they are shared (the third axis from the end).
        mask: boolean (True is seen) or additive, as `torch.nn.functional.scaled_dot_product_attention` takes it.
        causal: whether position i sees no j > i.
        scale: in place of :math:`1 / \sqrt d`.

    Returns:
        NaN if a logit is NaN; minus infinity if all is masked. Memory: the logits of a few heads, ``t * s`` each.

    Raises:
        ValueError: query and key of different d, or heads that cannot be shared evenly.

    >>> largest_attention_logit(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [-3.0]]))
    2.0
    """
    if query.dim() < 2 or key.dim() < 2 or query.shape[-1] != key.shape[-1]:
        raise Error(f"query [..., t, d] and key [..., s, d] do not fit: {list(query.shape)} and {list(key.shape)}")
    if query.dim() > 2 and key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        if not key.shape[-3] or query.shape[-3] % key.shape[-3]:
            raise Error(f"{query.shape[-3]} heads of the query cannot share {key.shape[-3]} of the key evenly")
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    rows, columns = query.shape[-2], key.shape[-2]
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], (1,))
    queries, keys = (one.detach().expand(*lead, *one.shape[-2:]) for one in (query, key))
    masks = None if mask is None else mask.detach().expand(*lead, rows, columns)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    hidden = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1) if causal else None
    largest = -math.inf
    step = max(_LOGITS // max(rows * columns, 1), 1)
    heads = torch.arange(math.prod(lead), device=query.device)
    for some in heads.split(step):  # by their places, so that what is shared between heads is not copied for all
        part = torch.unravel_index(some, lead)
        logits = working(queries[part]) @ working(keys[part]).mT * factor
        if masks is not None:
            chosen = masks[part]
            logits = logits.masked_fill(~chosen, -math.inf) if chosen.dtype == torch.bool else logits + chosen
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        found = float(logits.max()) if logits.numel() else -math.inf
        if math.isnan(found):
            return found
        largest = max(largest, found)
    return largest


def _nan_first(value: float) -> float:
    """What to sort by, so that NaN counts as the largest: what is no number any more is what a run fails by."""
    return math.inf if math.isnan(value) else value


class _Attention(TorchFunctionMode):
    """Tells of every call of the attention function."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self.tell(_logit_of_call(*args, **named))
        return func(*args, **named)


def _logit_of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> float:
    return largest_attention_logit(query, key, mask=attn_mask, causal=is_causal, scale=scale)


class StabilityMonitor:
    """What blows up first: attention logits, output logits, gradients against Adam's epsilon.

    Args:
        model: its modules are named in the report. While `watching`, its calls of
            `torch.nn.functional.scaled_dot_product_attention` are seen; attention that is written out by hand is
            not (nor that of `torch.nn.MultiheadAttention` where it returns weights), and is told with `attention`.
        epsilon: Adam's.
        pattern: names of the parameters whose gradients are looked at.

    It keeps eight numbers a step.

    In a loop::

        monitor = StabilityMonitor(model, epsilon=1e-8)
        for batch in batches:
            with monitor.watching():
                logits = model(batch)
            loss = ...
            loss.backward()
            monitor.step(loss=loss, logits=logits)     # before the gradients are cleared
            optimizer.step()
        monitor.report()

    Wortsman et al. 2023, 'Small-scale proxies for large-scale Transformer training instabilities'.
    """

    def __init__(self, model: nn.Module, *, epsilon: float = 1e-8, pattern: Pattern = "*") -> None:
        if not epsilon > 0:
            raise Error(f"epsilon is above 0, got {epsilon}")
        self.parameters = parameters_of(model, pattern)
        self.model, self.epsilon = model, epsilon
        self.rows: list[dict[str, Any]] = []
        self.layers: dict[str, float] = {}
        self.gradients: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._inside: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the attention of forward passes inside; the model's hooks are afterwards what they were."""
        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: self._inside.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            with _Attention(lambda value: self.attention(self._inside[-1] if self._inside else "", value)):
                yield
        finally:
            self._inside.clear()
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        if self._inside:
            self._inside.pop()

    def attention(self, layer: str, value: float) -> None:
        """Note the largest attention logit of a layer (`largest_attention_logit`)."""
        self._now[layer] = max(self._now.get(layer, -math.inf), value, key=_nan_first)

    def step(self, *, loss: Tensor | float | None = None, logits: Tensor | None = None) -> None:
        """Note one step, after the backward pass and before gradients are cleared.

        Args:
            loss: to be shown beside.
            logits: ``[..., v]`` outputs, whose drift is followed.
        """
        root_means = {
            name: float(torch.linalg.vector_norm(value.grad.detach(), dtype=torch.float64)) / value.numel() ** 0.5
            for name, value in self.parameters.items()
            if value.grad is not None and value.numel()
        }
        smallest = -max((-value for value in root_means.values()), default=math.nan, key=_nan_first)
        row: dict[str, Any] = {
            "step": len(self.rows),
            "loss": math.nan if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss),
            "attention logit": max(self._now.values(), default=None, key=_nan_first),
            "log Z": math.nan,
            "mean logit": math.nan,
            "smallest gradient": smallest,
            "over epsilon": smallest / self.epsilon,
            "below epsilon": sum(value < self.epsilon for value in root_means.values()),
        }
        if logits is not None:
            wide = working(logits.detach())
            row["log Z"] = float(wide.logsumexp(dim=-1).double().mean())
            row["mean logit"] = float(wide.double().mean())
        self.rows.append(row)
        self.layers, self._now = dict(self._now), {}
        self.gradients = root_means

    def report(self, *, limit: float = LIMIT) -> Report:
        """What was seen, with warnings.

        Args:
            limit: attention logits above which a run is said to be in danger.

        Returns:
            Report: a row a step: ``loss``, the largest ``attention logit`` (None where none was seen), the means of
            ``log Z`` and of logits, the ``smallest gradient`` (root mean square, over parameters) and that ``over
            epsilon``, and how many are ``below epsilon``. The figures speak of the whole run where they say
            "largest" and "drift", else of the last step.

        Raises:
            ValueError: no step was noted.
        """
        if not self.rows:
            raise Error("a report needs at least one step")
        last = self.rows[-1]
        logits = [row["attention logit"] for row in self.rows if row["attention logit"] is not None]
        drift = [row["log Z"] for row in self.rows if not math.isnan(row["log Z"])] or [math.nan]
        largest = max(logits, default=None, key=_nan_first)
        near = sorted(name for name, value in self.gradients.items() if value < 10 * self.epsilon)
        worst = max(self.layers, key=lambda name: _nan_first(self.layers[name]), default=None)
        figures = {
            "steps": len(self.rows),
            "largest attention logit": largest,
            "last attention logit": logits[-1] if logits else None,
            "in layer": worst,
            "last log Z": drift[-1],
            "drift of log Z": drift[-1] - drift[0],
            "last smallest gradient": last["smallest gradient"],
            "gradients near epsilon": near,
        }
        notes = []
        if largest is not None and math.isnan(largest):
            notes.append("Attention logits are not numbers any more: the run has failed.")
        elif largest is not None and largest > limit:
            notes.append(
                f"Attention logits above {limit:g}: attention looks at single tokens; normalise queries and keys."
            )
        if near:
            notes.append("Gradients below 10 epsilon: Adam's steps shrink there; use a smaller epsilon.")
        if abs(drift[-1]) > 10 + abs(drift[0]):
            notes.append("Output logits drift away from log-probabilities: add a z-loss.")
        steps = [row["step"] for row in self.rows]

        def drawn(title: str, column: str, log: bool = False) -> Plot:
            line = Line(column, steps, [math.nan if row[column] is None else row[column] for row in self.rows])
            return Plot(title, "step", column, [line], log="y" if log else "")

        plots = [
            drawn("Attention", "attention logit"),
            drawn("Output", "log Z"),
            drawn("Gradients", "over epsilon", log=True),
        ]
        return Report("Stability of a run", figures, self.rows, plots, notes)


@card(
    paper="Wortsman et al. 2023, 'Small-scale proxies for large-scale Transformer training instabilities'",
    covers=("small-scale-proxies-large-scale-transformer",),
    unit="model",
    claim="the learning rate at which attention logits pass the limit, where their logarithm is straight in its own",
    departs="a straight line in logarithms through all points",
)
def logit_growth(
    scales: Sequence[float],
    logits: Sequence[float],
    *,
    at: Sequence[float] = (),
    limit: float = LIMIT,
    what: str = "learning rate",
) -> Report:
    r"""A power law of the largest attention logit over learning rate or size, to warn before a run that would fail.

    .. math:: \log m = a + b \log x, \qquad x_{\text{limit}} = e^{(\log m_{\text{limit}} - a) / b}

    Args:
        scales: x, learning rates or sizes of the runs that were made, above 0.
        logits: m, the largest attention logit of each, above 0.
        at: where runs are planned.
        limit: of the logits.
        what: x is, in words.

    Returns:
        Report: ``exponent`` b, ``factor`` :math:`e^a`, ``reaches the limit at`` (None where logits do not grow),
        ``largest error`` of the fit as a ratio. A row a scale: ``measured`` (None where planned) and ``fitted``,
        with ``fails`` for those above the limit.

    Raises:
        ValueError: fewer than two different scales, values that are not above 0.

    >>> found = logit_growth([1, 10], [2, 20], at=[1e5])
    >>> round(found["exponent"], 6), round(found["reaches the limit at"], 6), found["fails"]
    (1.0, 5000.0, [False, False, True])
    """
    if len(scales) != len(logits) or len(set(scales)) < 2:
        raise Error(f"logit_growth needs a logit for each of at least 2 scales, got {len(logits)} for {len(scales)}")
    if not all(math.isfinite(value) and value > 0 for value in [*scales, *logits, *at, limit]):
        raise Error("logit_growth takes logarithms: scales, logits and the limit are finite and above 0")
    x = [math.log(value) for value in scales]
    y = [math.log(value) for value in logits]
    centre, height = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - centre) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)
    start = height - slope * centre

    def fitted(value: float) -> float:
        return _exponential(start + slope * math.log(value))

    given = [*zip(scales, logits, strict=True), *((value, None) for value in at)]
    rows = [
        {what: value, "measured": found, "fitted": fitted(value), "fails": (found or fitted(value)) > limit}
        for value, found in given
    ]
    errors = [abs(b - start - slope * a) for a, b in zip(x, y, strict=True)]
    reached = _exponential((math.log(limit) - start) / slope) if slope > 0 else math.inf
    figures = {
        "exponent": slope,
        "factor": _exponential(start),
        "reaches the limit at": reached if math.isfinite(reached) else None,
        "limit": limit,
        "largest error": _exponential(max(errors)),
    }
    places = sorted({*scales, *at})
    lines = [
        Line("measured", list(scales), list(logits), style="points"),
        Line("fitted", places, [fitted(place) for place in places]),
    ]
    plot = Plot("Growth of attention logits", what, "largest attention logit", lines, log="xy")
    planned = [value for value in at if fitted(value) > limit]
    notes = [f"A run at {what} {value:g} would pass the limit." for value in planned]
    return Report("Growth of attention logits", figures, rows, [plot], notes)


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
