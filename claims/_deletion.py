"""How fast an answer falls without the pixels an attribution points at: what claims on attributions share."""

from __future__ import annotations

import torch
from _digits import Data, mlp, split, train
from torch import Tensor, nn

SHARES = (0.05, 0.1, 0.2, 0.3)


def trained(seed: int) -> tuple[nn.Sequential, Data]:
    """A network for digits, and test images that it gets right."""
    training, test = split(seed, [1200])
    model = mlp(seed)
    train(model, training, torch.optim.Adam(model.parameters(), lr=2e-3), epochs=30, seed=seed)
    model.eval()
    with torch.no_grad():
        right = model(test[0]).argmax(dim=1) == test[1]
    return model, (test[0][right], test[1][right])


@torch.no_grad()
def fall(model: nn.Module, data: Data, parts: Tensor) -> float:
    """Mean fall of the right class's logit, less the mean logit, over growing shares of pixels set to 0."""
    images, labels = data

    def said(inputs: Tensor) -> Tensor:
        logits = model(inputs)
        return logits.gather(1, labels[:, None])[:, 0] - logits.mean(dim=1)

    order = parts.argsort(dim=1, descending=True)
    falls = []
    for share in SHARES:
        gone = torch.zeros_like(images, dtype=torch.bool).scatter_(1, order[:, : round(share * images.shape[1])], True)
        falls.append(float((said(images) - said(images.masked_fill(gone, 0.0))).mean()))
    return sum(falls) / len(falls)
