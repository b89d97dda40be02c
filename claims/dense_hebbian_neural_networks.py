"""Does a memory of order 4 learn patterns from noisy examples, and does a teacher help?

40 random patterns of 100 units are each seen only in 30 examples with 30 % of the bits wrong. Measured is the overlap
of the pattern with what the memory makes of a copy with 20 % wrong bits, at order 4, with a teacher who says which
examples belong together and without. Order 2 stands beside it, and 40 real digits (8 x 8, cut at each pixel's median).
"""

import torch
from _digits import split

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="dense-hebbian-neural-networks",
    statement="from the same noisy examples of random patterns, a memory of order 4 recalls better with a teacher",
    method="overlap, order 4, teacher",
    baseline="overlap, order 4, no teacher",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
PATTERNS, EXAMPLES, QUALITY = 40, 30, 0.4


def measure(seed: int) -> dict[str, float]:
    """Mean overlaps with the patterns themselves."""
    theory = ws.inspect.theory
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int, chance: float = 0.5) -> torch.Tensor:
        return torch.where(torch.rand(*shape, generator=generator) < chance, 1.0, -1.0)

    images = split(seed, [PATTERNS])[0][0]
    digits = torch.where(images > images.median(dim=0).values, 1.0, -1.0)
    figures = {}
    for name, truth in (("", signs(PATTERNS, 100)), (", digits", digits)):
        seen = truth[:, None] * signs(PATTERNS, EXAMPLES, truth.shape[1], chance=(1 + QUALITY) / 2)
        start = truth * signs(*truth.shape, chance=0.8)
        for order in (2, 4):
            for teacher, supervised in (("teacher", True), ("no teacher", False)):
                stored, weights = theory.hebbian_patterns(seen, supervised)
                reached = theory.retrieve(stored, start, order=order, weights=weights)
                figures[f"overlap, order {order}, {teacher}{name}"] = float((reached * truth).mean())
    return figures
