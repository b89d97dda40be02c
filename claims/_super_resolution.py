"""Digits of 8 x 8 pixels made of 4 x 4 ones by a small convolutional network: what claims on restoring measure with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from _digits import Data, one_thread
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws

EPOCHS, BATCH, RATE = 40, 64, 2e-3


def steps_of(data: Data) -> int:
    """Steps of a run."""
    return EPOCHS * -(-len(data[1]) // BATCH)


def compared(data: Data, test: Data, seed: int, rules: Mapping[str, ws.prune.sparse.Rule | None]) -> dict[str, float]:
    """What networks trained by rules reach."""
    figures: dict[str, float] = {}
    for name, rule in rules.items():
        figures[name], flips, spread = restored(data, test, seed, rule)
        if flips:
            quarter = len(flips) // 4
            figures[f"changes a step, first quarter, {name}"] = sum(flips[1:quarter]) / (quarter - 1)
            figures[f"changes a step, last quarter, {name}"] = sum(flips[-quarter - 1 : -1]) / quarter
        figures[f"spread of gradient norms, {name}"] = spread
    return figures


@one_thread()
def restored(data: Data, test: Data, seed: int, rule: ws.prune.sparse.Rule | None) -> tuple[float, list[int], float]:
    """What a network trained by a rule reaches; how often masks changed; how uneven its gradients were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_of(data))
    masks = rule and ws.prune.sparse.control(model, optimizer, rule, densities="uniform", pattern="[24].weight")
    generator = torch.Generator().manual_seed(seed)
    flips, norms, last = [], [], 0
    for _ in range(EPOCHS):
        for part in torch.randperm(len(data[1]), generator=generator).split(BATCH):
            large, small = pair(data[0][part])
            optimizer.zero_grad()
            functional.l1_loss(model(small), large).backward()
            gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.stack(gradients).norm()))
            optimizer.step()
            schedule.step()
            if rule and masks and rule.shrink and masks.info.step > last:
                last = masks.info.step
                flips.append(sum(masks.info.grown.values()))
    with torch.no_grad():
        large, small = pair(test[0])
        error = float((model(small).clamp(0, 1) - large).square().mean())
    late = torch.tensor(norms[len(norms) // 2 :])
    return -10 * math.log10(error), flips, float(late.std() / late.mean())


def pair(images: Tensor) -> tuple[Tensor, Tensor]:
    """Digits, and the same with a quarter of the pixels."""
    large = images.reshape(-1, 1, 8, 8)
    return large, functional.avg_pool2d(large, 2)
