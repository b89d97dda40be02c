"""Do input gradients of a plainly trained network point outside of what can be learned from?

Pictures of two blocks: a digit, and a frame that never changes, in random order. The share of the squared input
gradient (of the true class's loss) that lies in the digit's block is measured for a network trained plainly, and one
trained on adversarial inputs (squared norm, radius 0.75, 5 steps). Half lies there by chance.
"""

import torch
from _digits import Data, accuracy, mlp, one_thread, split, train
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import block_pictures, diffroar, input_gradients

CLAIM = Claim(
    key="input-gradients-highlight-discriminative",
    statement="adversarial training brings more of the input gradient into the block that holds the signal",
    method="share in the signal, adversarial",
    baseline="share in the signal, plain",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
RADIUS, STEPS = 0.75, 5


def blocks(data: Data, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures ``[n, 128]``, labels, and where the signal is."""
    pictures, places = block_pictures(data[0].reshape(-1, 1, 8, 8), seed=seed)
    return pictures.flatten(1), data[1], places.flatten(1)


def network(seed: int) -> nn.Sequential:
    """Like that for digits, for pictures twice as large."""
    made = mlp(seed, width=128)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made[0] = nn.Linear(128, 128)
    return made


def attacked(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Adversarial inputs within a ball."""
    start, moved = images, images
    for _ in range(STEPS):
        point = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(point), labels, reduction="sum"), point)
        moved = point.detach() + 2 * RADIUS / STEPS * functional.normalize(slope, dim=1)
        away = moved - start
        moved = start + away * (RADIUS / away.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return moved.detach()


@one_thread()
def robust(model: nn.Module, data: Data, seed: int) -> None:
    """Adversarial training."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(30):
        for part in torch.randperm(len(labels), generator=generator).split(64):
            inputs = attacked(model, images[part], labels[part])
            loss = functional.cross_entropy(model(inputs), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def measure(seed: int) -> dict[str, float]:
    """Shares of the gradient in the signal, accuracies, and DiffROAR of both networks' gradients."""
    training, test = split(seed, [1200])
    images, labels, _ = blocks(training, seed)
    test_images, test_labels, places = blocks(test, seed + 100)
    plain, hardened = network(seed), network(seed)
    train(plain, (images, labels), torch.optim.Adam(plain.parameters(), lr=2e-3), epochs=30, seed=seed, batch=64)
    robust(hardened, (images, labels), seed)

    def attribute(model: nn.Module):
        def scores(inputs: Tensor, truth: Tensor) -> Tensor:
            def cost(logits: Tensor) -> Tensor:
                return functional.cross_entropy(logits, truth, reduction="none")

            return input_gradients(model, inputs, target=cost, at_once=len(inputs)).abs()

        return scores

    def share(model: nn.Module) -> float:
        sizes = attribute(model)(test_images, test_labels).square()
        kept = sizes.sum(dim=1) > 0  # a loss of 0 has no gradient
        return float(((sizes * places).sum(dim=1) / sizes.sum(dim=1).clamp(min=1e-30))[kept].mean())

    def fit(inputs: Tensor, truth: Tensor):
        model = network(seed + 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        train(model, (inputs, truth), optimizer, epochs=10, seed=seed, batch=64)
        return lambda given: model(given).detach()

    both = (images, labels), (test_images, test_labels)
    found = {"share in the signal, adversarial": share(hardened), "share in the signal, plain": share(plain)}
    for name, model in (("plain", plain), ("adversarial", hardened)):
        found[f"accuracy, {name}"] = accuracy(model, both[1])
        found[f"DiffROAR, {name}"] = diffroar(attribute(model), *both, fit, shares=(0.05, 0.15), seed=seed)["mean"]
    return found
