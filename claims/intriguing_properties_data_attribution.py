"""Does D-TRAK rank the losses of retrained denoisers better than the gradient of the trained loss does?

A small network learns to tell the noise in noisy digits (a diffusion model's task, with 200 training images and a
cosine schedule). It is trained anew on 32 random halves of the data; each query's loss, over fixed noise and times, is
ranked by the sums of scores over the half. Both score the same checkpoint with the same projection and damping; only
the output whose gradient is taken differs: the loss, or the squared norm of the network's output. With damping 0.1,
better for both, the difference was gone (0.563 against 0.568 and 0.500 against 0.501, on two other seeds with half as
many subsets): what holds here holds at the small damping of this protocol.
"""

import copy
import math

import torch
from _digits import one_thread, split
from torch import Tensor, nn

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import dtrak, gradient_cosines, lds

CLAIM = Claim(
    key="intriguing-properties-data-attribution",
    statement="gradients of the squared norm of a denoiser's output give a higher linear datamodeling score than "
    "gradients of its loss",
    method="LDS, D-TRAK",
    baseline="LDS, TRAK",
    seeds=(0, 1, 2, 3),
    needs=("sklearn",),
)
TRAINING, QUERIES, SUBSETS, STEPS, TIMES = 200, 60, 32, 400, 8


class Denoiser(nn.Module):
    """Tells the noise from a noisy image and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(72, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 64))

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        waves = times[:, None] * math.pi * torch.tensor([1.0, 2, 4, 8])
        return self.layers(torch.cat([images, waves.sin(), waves.cos()], dim=1))


def noised(images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """A cosine schedule, from the image at time 0 to noise at time 1."""
    angle = times[:, None] * math.pi / 2
    return angle.cos() * images + angle.sin() * noise


TIME = (torch.arange(TIMES) + 0.5) / TIMES
NOISE = torch.randn(TIMES, 64, generator=torch.Generator().manual_seed(99))


def told(model, images: Tensor) -> Tensor:
    """What is said to each image with the fixed noise, ``[n, times, 64]``."""
    each = images[:, None].expand(-1, TIMES, -1).reshape(-1, 64)
    times, noise = TIME.repeat(len(images)), NOISE.repeat(len(images), 1)
    return model(noised(each, times, noise), times).reshape(len(images), TIMES, 64)


def trained_loss(model, images: Tensor) -> Tensor:
    """Sum over images of the mean loss over times."""
    return (told(model, images) - NOISE).square().mean(dim=(1, 2)).sum()


def norms(model, images: Tensor) -> Tensor:
    """Sum over images of the mean squared norm over times."""
    return told(model, images).square().mean(dim=(1, 2)).sum()


@one_thread()
def trained(start: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """A denoiser of these images."""
    model = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (256,), generator=generator)
        times, noise = torch.rand(256, generator=generator), torch.randn(256, 64, generator=generator)
        loss = (model(noised(images[rows], times, noise), times) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def measure(seed: int) -> dict[str, float]:
    """Linear datamodeling scores."""
    (images, _), (queries, _), _ = split(seed, [TRAINING, QUERIES])
    images, queries = 2 * images - 1, 2 * queries - 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = Denoiser()
    generator = torch.Generator().manual_seed(seed)
    subsets = torch.rand(SUBSETS, TRAINING, generator=generator).argsort(dim=1) < TRAINING // 2
    outputs = []
    for index, subset in enumerate(subsets):
        model = trained(start, images[subset], 1000 * seed + index)
        with torch.no_grad():
            outputs.append(-(told(model, queries) - NOISE).square().mean(dim=(1, 2)))
    whole = trained(start, images, 1000 * seed + 999)
    found = {}
    for name, output in (("LDS, D-TRAK", norms), ("LDS, TRAK", trained_loss)):
        scores = dtrak(whole, [images], [queries], output=output, dim=1024, damping=1e-2, seed=seed)
        found[name] = lds(scores, subsets, torch.stack(outputs))["lds"]
    cosines = gradient_cosines(whole, [images], [queries], loss=trained_loss, seed=seed)
    return {**found, "LDS, cosines of gradients": lds(cosines, subsets, torch.stack(outputs))["lds"]}
