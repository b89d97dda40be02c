"""Is it the average over views that makes the covariance operator predict what contrastive learning does to weights?

A network of two layers learns digits by InfoNCE from pairs of augmented views (shifted by a pixel, a quarter of the
pixels dropped, noise). At the start and after some training, operators are built for its first layer from eight views
of each of 48 digits, and their products with the weights are compared with the true gradient of the loss on other
views of other digits. The baseline is the covariance of single views' connections, which keeps what augmentation
changes.
"""

import torch
from _digits import one_thread, split
from torch import Tensor, nn

from weightsmith.claims import Claim
from weightsmith.inspect import training

CLAIM = Claim(
    key="dual-deep-networks",
    statement="the weighted covariance of connections averaged over views predicts the direction of the InfoNCE "
    "gradient on other digits better than the covariance of single views' connections, by a cosine of 0.05 or more",
    method="cosine, averaged over views",
    baseline="cosine, single views",
    margin=0.05,
    needs=("sklearn",),
)
DIGITS, VIEWS, WIDTH, OUT, TEMPERATURE = 48, 8, 24, 6, 0.5


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Cosines with the true gradient after some training, and at the start."""
    learned, first, second = (data[0] for data in split(seed, [800, DIGITS]))
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    start = compared(model, first, second, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(150):
        chosen = learned[torch.randint(len(learned), (64,), generator=generator)]
        views = augmented(chosen, 2, generator)
        outputs = model(views.flatten(0, 1)).view(64, 2, OUT)
        optimizer.zero_grad()
        training.contrastive_loss(outputs, loss="nce", temperature=TEMPERATURE).backward()
        optimizer.step()
    end = compared(model, first, second, generator)
    return {**end, **{f"{name}, at the start": value for name, value in start.items()}}


def compared(model: nn.Module, first: Tensor, second: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Operators of some digits against the gradient on others."""
    views = augmented(first, VIEWS, generator)
    found = training.contrastive_operator(model, views, "0.weight", loss="nce", temperature=TEMPERATURE)
    single = training.contrastive_operator(model, views.flatten(0, 1)[:, None], "0.weight")
    others = augmented(second[:400], 2, generator)
    outputs = model(others.flatten(0, 1)).view(len(others), 2, OUT)
    loss = training.contrastive_loss(outputs, loss="nce", temperature=TEMPERATURE)
    (slope,) = torch.autograd.grad(loss, [model[0].weight])  # type: ignore[index]
    report = found.report()
    return {
        "cosine, averaged over views": cosine(found.predicted, -slope),
        "cosine, single views": cosine(single.predicted, -slope),
        "cosine, exact pairs": cosine(found.exact, -slope),
        "cosine on the same views": report["cosine, covariance"],
        "effective rank of the operator": report["effective rank"],
    }


def cosine(first: Tensor, second: Tensor) -> float:
    """Of two gradients."""
    return float(torch.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0))


def augmented(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Views ``[n, count, 64]``: shifted by up to a pixel, a quarter of the pixels dropped, and noise."""
    many = digits[:, None].expand(-1, count, -1).reshape(-1, 8, 8)
    padded = nn.functional.pad(many, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, len(many), 1, 1), generator=generator)
    rows, columns = torch.arange(8)[:, None] + down, torch.arange(8) + right
    moved = padded[torch.arange(len(many))[:, None, None], rows, columns]
    kept = torch.rand(moved.shape, generator=generator) > 0.25
    noise = 0.1 * torch.randn(moved.shape, generator=generator)
    return (moved * kept + noise).view(len(digits), count, 64)


def network(seed: int) -> nn.Sequential:
    """Two layers without biases, as the theory has them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, OUT, bias=False))
