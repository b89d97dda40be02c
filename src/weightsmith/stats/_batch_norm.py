"""What batch norm would have to know of the data, where its running statistics are no longer true.

A batch norm layer remembers the mean and the variance of its inputs. After a merge (or pruning, or averaging along
a run) these are mixtures of what other networks' layers saw, and the network behind the layer is fed values of the
wrong size. One pass over data without labels sets that right. Unlike the other statistics this one is gathered with
batch norm in training mode, where every layer already sees what the corrected layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from weightsmith import progress
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.stats.room import Batch, Forward, default_forward, restored
from weightsmith.weights import Pattern, Step, Weights, matches, working


def batch_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weights: Mapping[str, Tensor] | None = None,
    pattern: Pattern = "*",
    forward: Forward | None = None,
) -> Weights:
    r"""The running statistics of batch norm layers, estimated anew; to be laid over the weights.

    .. math:: \mu = \frac{\sum_b n_b\, \mu_b}{\sum_b n_b}, \qquad
        \sigma^2 = \frac{\sum_b n_b\, \sigma_b^2}{\sum_b n_b}

    with :math:`n_b` the values a channel in batch :math:`b`, :math:`\mu_b` their mean and :math:`\sigma_b^2` their
    variance (over :math:`n_b - 1`). With batches of one size that is `torch.optim.swa_utils.update_bn`; here a
    smaller last batch counts for less, sums are float64, and dropout is off, as it is when the network is used.

    Args:
        model: a network with ``BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm``, left as it was: weights, buffers,
            modes and momentum, also after an error. Those without running statistics are passed over.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; at least two values a channel in each.
        weights: run the model with these in place of its own (a merge that is not computed yet, say); they are held
            in memory for as long. The model may then lie on the meta device.
        pattern: names of the running statistics; layers that it leaves out keep theirs, and use them.
        forward: ``(model, batch) -> anything``, where the default does not fit.

    Returns:
        Weights: ``running_mean``, ``running_var`` and ``num_batches_tracked`` of each layer, under the model's names
        and in its dtypes. Layers that were never called have none. ``merged | batch_norm(...)`` is the merge with them.

    Raises:
        ValueError: no batch, no layer that fits, weights of another model, or a batch with one value a channel.

    >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    >>> found = batch_norm(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
    >>> found["0.running_mean"], found["0.running_var"]             # means 2 and 7, variances 2 and 8
    (tensor([4.5000]), tensor([5.]))
    >>> merged = ws.merge.mean([net, net])
    >>> (merged | ws.stats.batch_norm(net, [torch.ones(4, 1)], weights=merged))["0.running_mean"]
    tensor([1.])
    """
    layers = _layers(model, pattern)
    ask: Callable[..., Any] = model if weights is None else _with(model, weights)
    seen = {layer: _Seen() for layer in layers}
    total = len(batches) if isinstance(batches, Sequence) else 0
    calls = 0
    with restored(model), _noting(layers, seen), torch.no_grad(), progress.task("batch norm", total) as advance:
        for batch in batches:
            (forward or default_forward)(ask, batch)
            calls += 1
            advance(1)
    if not calls:
        raise Error("batch_norm needs at least one batch of data, got none")
    source = weights.lineage if isinstance(weights, Weights) else Step("memory")
    found = {name: value for layer, names in layers.items() for name, value in _said(layer, names, seen[layer]).items()}
    plain = Weights.of(found)
    return Weights({name: plain.node(name) for name in plain}, Step("stats.batch_norm", {"batches": calls}, (source,)))


@dataclass
class _Seen:
    """What one layer was shown."""

    values: int = 0
    calls: int = 0
    mean: Tensor | None = None
    """Sum over batches of values times mean, ``[c]`` float64; so is the variance."""
    variance: Tensor | None = None

    def add(self, name: str, inputs: Tensor) -> None:
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        count = inputs.numel() // max(inputs.shape[1], 1)
        if count < 2:
            raise Error(
                f"batch_norm: {name} is shown a batch of {count} value{'s' * (count != 1)} a channel, which has no "
                "variance; use larger batches, or leave the last one out"
            )
        variance, mean = torch.var_mean(working(inputs), axes)
        mean, variance = mean.double() * count, variance.double() * count
        self.mean = mean if self.mean is None else self.mean + mean
        self.variance = variance if self.variance is None else self.variance + variance
        self.values, self.calls = self.values + count, self.calls + 1


def _layers(model: nn.Module, pattern: Pattern) -> dict[_BatchNorm, list[str]]:
    """The layers that have running statistics, with their prefixes (several where a layer is used under several)."""
    able: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            able.setdefault(module, []).append(f"{name}." if name else "")
    if not able:
        raise Error("batch_norm: the model has no batch norm with running statistics")
    chosen = {layer: names for layer, names in able.items() if any(matches(pattern, f"{n}running_mean") for n in names)}
    if not chosen:
        every = [f"{name}running_mean" for names in able.values() for name in names]
        raise Error(f"batch_norm: no running statistics fit {pattern!r}{did_you_mean(str(pattern), every)}")
    return chosen


@contextmanager
def _noting(layers: Mapping[_BatchNorm, Sequence[str]], seen: Mapping[_BatchNorm, _Seen]) -> Iterator[None]:
    """The layers normalise by each batch and note what they are shown, and change nothing that they remember."""
    with ExitStack() as undo:
        for layer in layers:

            def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], layer: Any = layer) -> None:
                seen[layer].add(layers[layer][0] + "running_mean", given[0] if given else named["input"])

            undo.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            undo.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
            layer.track_running_stats = False
            layer.training = True
        yield


def _said(layer: _BatchNorm, names: Sequence[str], seen: _Seen) -> dict[str, Tensor]:
    """The new statistics of a layer, under each of its names."""
    if seen.mean is None or seen.variance is None or layer.running_mean is None or layer.running_var is None:
        return {}
    found = {
        "running_mean": (seen.mean / seen.values).to(layer.running_mean.dtype),
        "running_var": (seen.variance / seen.values).to(layer.running_var.dtype),
    }
    if layer.num_batches_tracked is not None:
        found["num_batches_tracked"] = torch.tensor(seen.calls, device=seen.mean.device)
    return {name + key: value for name in names for key, value in found.items()}


def _with(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model as a function of its inputs alone, with other weights in place of its own."""
    given = weights if isinstance(weights, Weights) else Weights.of(weights)
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tied: dict[int, list[str]] = {}
    for name, value in own.items():
        tied.setdefault(id(value), []).append(name)
    lacking = [names[0] for names in tied.values() if not any(name in given for name in names)]
    unknown = [name for name in given if name not in own]
    if lacking or unknown:
        parts = [f"they lack {listed(lacking)}"] * bool(lacking) + [f"it has no {listed(unknown)}"] * bool(unknown)
        raise Error(f"batch_norm: the weights do not fit the model: {'; '.join(parts)}")
    wrong = [
        f"{name} {list(given.spec(name).shape)} into {list(own[name].shape)}"
        for name in given
        if given.spec(name).shape != tuple(own[name].shape)
    ]
    if wrong:
        raise Error(f"batch_norm: the weights do not fit the model: {listed(wrong)}")
    chosen = [next(name for name in names if name in given) for names in tied.values()]
    values = {name: _as(given[name], own[name]) for name in chosen}
    return lambda *arguments, **named: functional_call(model, values, arguments, named)


def _as(value: Tensor, like: Tensor) -> Tensor:
    """In the dtype and on the device of the model's own."""
    return value.to(like.dtype) if like.is_meta else value.to(like.device, like.dtype)
