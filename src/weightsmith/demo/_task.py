"""What the demo learns: small pictures of digits, a small network, and training that repeats exactly.

The digits come with scikit-learn (1797 pictures of 8 by 8 pixels), so that nothing is fetched. Few
are used for training, so that models differ and there is something to see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightsmith import errors, quantize
from weightsmith.weights import Step, Weights
from weightsmith.weights import open as open_weights

START, TRAINING, VALIDATION = 150, 300, 400
"""Pictures the shared start sees (they are among those for training), for training, for choosing."""

BATCH = 32
SIDE = 10  # pixels, with a frame of one pixel so that a shift by one loses nothing


@dataclass(frozen=True)
class Examples:
    """Pictures and what they show.

    Attributes:
        pixels: ``[n, 1, 10, 10]`` float32 in [0, 1].
        labels: ``[n]`` int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Examples:
        return Examples(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Digits:
    """The pictures of a run, each in one part (those of ``start`` are also in ``training``).

    ``shifted`` are the test pictures, each moved by at most one pixel each way.
    """

    start: Examples
    training: Examples
    validation: Examples
    test: Examples
    shifted: Examples


def digits(seed: int = 0) -> Digits:
    """scikit-learn's digits, split at random.

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise errors.missing("scikit-learn", "demo", "the demo's data") from None
    images, labels = load_digits(return_X_y=True)
    pixels = F.pad(torch.from_numpy(images).reshape(-1, 8, 8).float() / 16, (1, 1, 1, 1))[:, None]
    every = Examples(pixels, torch.from_numpy(labels).long())
    every = every[torch.randperm(len(every), generator=generator(seed, "split"))]
    held_out = every[slice(TRAINING + VALIDATION, None)]
    moved = shift(held_out.pixels, generator(seed, "shifted test"))
    return Digits(
        start=every[slice(START)],
        training=every[slice(TRAINING)],
        validation=every[slice(TRAINING, TRAINING + VALIDATION)],
        test=held_out,
        shifted=Examples(moved, held_out.labels),
    )


def shift(pixels: Tensor, source: torch.Generator) -> Tensor:
    """Each picture of ``[n, 1, side, side]`` moved by -1, 0 or 1 pixel each way, at random."""
    count, side = len(pixels), pixels.shape[-1]
    offset = torch.randint(0, 3, (count, 2), generator=source)
    place = torch.arange(side)
    framed = F.pad(pixels[:, 0], (1, 1, 1, 1))
    rows, columns = offset[:, :1] + place, offset[:, 1:] + place
    return framed[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers; 56,714 parameters. ``[n, 1, 10, 10] -> [n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 5 * 5, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = F.relu(self.conv2(F.relu(self.conv1(pixels))))
        return self.head(F.relu(self.hidden(maps.flatten(1))))


CONFIG = {
    "architectures": [DigitsNet.__name__],
    "model_type": "weightsmith-demo-digits",
    "library": "weightsmith.demo",
    "input": [1, SIDE, SIDE],
    "classes": 10,
    "dtype": "float32",
}


def initial(seed: int = 0) -> Weights:
    """The network before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_number(seed, "initial"))
        weights = open_weights(DigitsNet())
    return weights.with_files({"config.json": (json.dumps(CONFIG, indent=2) + "\n").encode()})


def train(
    start: Weights,
    examples: Examples,
    *,
    epochs: int,
    rate: float,
    shifted: float = 0.0,
    seed: int = 0,
    mask: Weights | None = None,
) -> Weights:
    """Weights that were trained from ``start`` (Adam, cross-entropy, batches of 32).

    Args:
        start: where to begin; it is not changed.
        examples: what to learn from.
        epochs: passes over ``examples``.
        rate: the learning rate.
        shifted: the share of pictures that are moved by up to a pixel, newly in each epoch.
        seed: of the order and the shifts.
        mask: booleans under the names of the weights; what is False stays zero, whatever the
            optimizer does. Names that are not there are trained freely.
    """
    net = module_of(start)
    held = [(parameter, mask[name]) for name, parameter in net.named_parameters() if mask is not None and name in mask]
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    source = generator(seed, "train")
    with one_thread():
        for _ in range(epochs):
            for batch in torch.randperm(len(examples), generator=source).split(BATCH):
                pixels = _some_shifted(examples.pixels[batch], shifted, source)
                optimizer.zero_grad()
                F.cross_entropy(net(pixels), examples.labels[batch]).backward()
                optimizer.step()
                _apply(held)  # Adam moves what has a history even where the gradient is zero
    return _trained(net, start, epochs=epochs, rate=rate, shifted=shifted, seed=seed, masked=bool(held))


def _some_shifted(pixels: Tensor, share: float, source: torch.Generator) -> Tensor:
    if share <= 0:
        return pixels
    chosen = torch.rand(len(pixels), generator=source) < share
    return torch.where(chosen[:, None, None, None], shift(pixels, source), pixels)


def _apply(held: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, keep in held:
            parameter.mul_(keep)


def _trained(net: nn.Module, start: Weights, **options: float) -> Weights:
    weights = Weights.of({name: tensor.detach() for name, tensor in net.state_dict().items()})
    weights.lineage = Step("demo.train", options, (start.lineage,))
    return weights.with_files(start.files)


def module_of(weights: Weights) -> DigitsNet:
    """The network with these weights; packed ones are unpacked first."""
    with torch.device("meta"):  # no values yet, so that no randomness is used up
        net = DigitsNet()
    net.to_empty(device="cpu")
    unpacked(weights).load_into(net)
    return net.eval()


def unpacked(weights: Weights) -> Weights:
    """Weights to compute with: those of a quantized checkpoint are dequantized, others are as they are."""
    return quantize.dequantize(weights) if weights.names("*_packed") else weights


def right(weights: Weights, examples: Examples) -> Tensor:
    """``[n]`` bool: which examples the network with these weights gets right."""
    net = module_of(weights)
    with one_thread(), torch.inference_mode():
        return net(examples.pixels).argmax(1) == examples.labels


def accuracy(weights: Weights, examples: Examples) -> float:
    """The share of examples that the network with these weights gets right."""
    return right(weights, examples).double().mean().item()


def generator(seed: int, purpose: str) -> torch.Generator:
    """A source of randomness for one purpose; those of two purposes have nothing in common."""
    return torch.Generator().manual_seed(_number(seed, purpose))


def _number(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=7).digest(), "big")


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out in one order, so that the same seed gives the same figures on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
