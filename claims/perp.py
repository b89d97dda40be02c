"""Does a pruned language model come back with few parameters trained as it does with all of them?

A small language model of the words of Python's library loses seven tenths of the weights of its blocks by magnitude
and is trained for 80 more steps: not at all, its norms alone, these and masked changes of rank 4, or all weights that
are left. Each way has two rates to choose from, by a part of the held-out text that does not count after; the rates
were set before any figure was seen; steps and width were then made smaller for time alone. The model is not trained to
its end before it is pruned, so further steps on all weights also learn what it had not learned yet.
"""

import copy

import torch
from _small_language import batches, data, language, loss_of, next_word, train
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="perp",
    statement="after pruning 70 % of a small language model's blocks, 80 steps on norms and masked changes of rank 4 "
    "end within 0.05 nats a word of training all weights that are left",
    method="norms and masked low rank",
    baseline="all weights",
    higher_is_better=False,
    margin=-0.05,
    seeds=(0, 1, 2, 3, 4),
)
RATES = {"norms": (3e-3, 1e-2), "norms and masked low rank": (3e-3, 1e-2), "all weights": (1e-3, 3e-3)}


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text, and the share of the parameters that were trained."""
    training, held_out = data(seed)
    choosing, judging = held_out[:96], held_out[96:]
    model = train(language(seed, width=48, heads=3, neurons=96, layers=3), batches(training, 250, seed))
    figures = {"whole": loss_of(model, judging)}
    blocks = [name for name, value in model.named_parameters() if "blocks." in name and value.dim() > 1]
    pruned = copy.deepcopy(model)
    ws.prune.magnitude(model, 0.7, pattern=blocks).load_into(pruned)
    figures["pruned"] = loss_of(pruned, judging)
    steps = batches(training, 80, seed + 1000)
    for way, rates in RATES.items():
        found = []
        for rate in rates:
            made = copy.deepcopy(pruned)
            share = learning(made, way)
            retrained(made, steps, rate)
            ws.adapt.fold(made)
            assert ws.prune.sparsity_of(made, blocks) >= ws.prune.sparsity_of(pruned, blocks)
            found.append((loss_of(made, choosing), loss_of(made, judging)))
        figures[way] = min(found)[1]
        figures[f"share trained: {way}"] = share
    return figures


def learning(model: nn.Module, way: str) -> float:
    """Choose what learns; the share of the parameters."""
    total = sum(p.numel() for p in model.parameters())
    if way != "all weights":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if "masked" in way:
            ws.prune.repair.masked_lora(model, rank=4)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "parametrizations" not in name:
                parameter.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / total


def retrained(model: nn.Module, steps: list[tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
    """Adam with a rate that falls along a line; the zeros stay."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masks = {name: p.detach() != 0 for name, p in own.items() if "blocks." in name and p.dim() > 1}
    masks = {name: mask for name, mask in masks.items() if "parametrizations" not in name}
    optimizer = torch.optim.Adam(own.values(), lr=rate)
    for step, batch in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(steps))
        optimizer.zero_grad()
        (next_word(model, batch) / len(batch[0])).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                own[name].masked_fill_(~mask, 0)
