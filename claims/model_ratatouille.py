"""Does an average gain by members that took a detour over other tasks?

A small network is trained on clothes. Four copies are fine-tuned on auxiliary tasks, four ways to pair the ten kinds
into five classes. Then every copy, under one head that was fitted to the first network, is fine-tuned on the target:
all ten kinds. Their average is compared with the average of four runs that were all fine-tuned on the target from the
first network itself, as long as both stages together. Test pictures are turned by 25 degrees.
"""

import copy

import torch
from _fashion import accuracy, cnn, held_out, split, train, turned
from fusing import trunk, with_trunk

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="model-ratatouille",
    statement="the average of four runs over different auxiliary tasks is at least as accurate under shift as that of "
    "four runs from one start",
    method="ratatouille",
    baseline="soup from one start",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
)
MEMBERS = 4


def measure(seed: int) -> dict[str, float]:
    """Accuracies on turned test pictures."""
    first, other, target = split(seed, [4000, 2000, 2000])
    plain = held_out(seed)
    test = (turned(plain[0], 25), plain[1])
    start = cnn(seed)
    train(start, first, 2, seed)
    over, direct = [], []
    for number in range(MEMBERS):
        member = 100 * seed + number
        detour = with_trunk(cnn(member, classes=5), trunk(start))
        pairs = torch.randperm(10, generator=torch.Generator().manual_seed(member)) // 2
        train(detour, (other[0], pairs[other[1]]), 2, member, rate=1e-3)
        model = with_trunk(copy.deepcopy(start), trunk(detour))  # under the head of the start
        train(model, target, 2, member, rate=1e-3)
        over.append(model)
        plainly = copy.deepcopy(start)
        train(plainly, target, 4, member, rate=1e-3)
        direct.append(plainly)
    scratch = copy.deepcopy(start)
    figures = {"start": accuracy(start, test)}
    for name, members in (("ratatouille", over), ("soup from one start", direct)):
        ws.merge.mean(members).load_into(scratch)
        figures[name] = accuracy(scratch, test)
        figures[f"{name}, mean member"] = sum(accuracy(member, test) for member in members) / MEMBERS
        figures[f"{name}, spread"] = ws.inspect.locality(members, start).spread
    return figures
