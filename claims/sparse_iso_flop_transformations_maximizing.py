"""Is sparse and wide better than dense and narrow, for as many multiplications?

A narrow network of two hidden layers learns clothes (Fashion-MNIST at 14 x 14 pixels). The Sparse-Wide network has
twice as many hidden units and, layer by layer, as many weights that are there; RigL moves them for three quarters of
the run. Beside that: the same with masks that stay, and the three other families. All learn from the same 10,000
images for as many steps, with a learning rate that falls along a cosine.
"""

import torch
from _digits import one_thread
from _fashion import THERE, held_out, split
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="sparse-iso-flop-transformations-maximizing",
    statement="a Sparse-Wide network at sparsity 0.75 trained by RigL has a test loss at most that of the dense "
    "network with as many multiplications",
    method="wide",
    baseline="dense",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4, 5),
)
SPARSITY, WIDTH, EPOCHS, BATCH, RATE = 0.75, 24, 8, 100, 3e-3


def measure(seed: int) -> dict[str, float]:
    """Losses and accuracies on 2000 test images."""
    if not THERE:
        raise ws.Error("the images of Debian's package dataset-fashion-mnist are needed; FASHION_MNIST says where")
    (data,) = split(seed, [10_000])
    test = held_out(seed)
    sparse, stop = ws.prune.sparse, EPOCHS * 100 * 3 // 4
    figures: dict[str, float] = {}
    figures["dense"], figures["accuracy, dense"] = learnt(data, test, seed, narrow(seed), None)
    example = small(test[0][:1])
    for name in ("wide", "parallel", "factorised", "doped"):
        made = sparse.iso_flop(narrow(seed), SPARSITY, name, example=example, seed=seed)
        found = learnt(data, test, seed, made.module, sparse.rigl(every=25, stop=stop), made.densities)
        figures[name], figures[f"accuracy, {name}"] = found
        figures[f"multiplications, {name}"] = made.after / made.before
    made = sparse.iso_flop(narrow(seed), SPARSITY, "wide", example=example, seed=seed)
    found = learnt(data, test, seed, made.module, sparse.static(), made.densities)
    figures["wide, fixed masks"], figures["accuracy, wide, fixed masks"] = found
    return figures


def narrow(seed: int) -> nn.Sequential:
    """196 inputs, two hidden layers, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(196, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def small(images: Tensor) -> Tensor:
    """14 x 14 pixels in a row, around zero."""
    return (functional.avg_pool2d(images, 2).flatten(1) - 0.286) / 0.33


@one_thread()
def learnt(
    data: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seed: int,
    model: nn.Module,
    rule: ws.prune.sparse.Rule | None,
    densities: object = None,
) -> tuple[float, float]:
    """Test loss and accuracy after training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    if rule is not None:
        ws.prune.sparse.control(model, optimizer, rule, densities=densities, seed=seed)  # type: ignore[arg-type]
    images, labels = small(data[0]), data[1]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-len(labels) // BATCH))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        logits = model(small(test[0]))
        right = float((logits.argmax(1) == test[1]).float().mean())
        return float(functional.cross_entropy(logits, test[1])), right
