"""Can data that a fine-tune was trained on be found from its weights alone?

A network trained on upright digits is fine-tuned on 200 digits that lie on their side. From both checkpoints, 60 of
a pool of 900 other digits are chosen, of which one in nine lies on its side, with labels given by the fine-tune; the
base is then trained on these. The baselines get 60 at random, and the 60 whose gradients alone are most like the
difference (no greedy sum). Judged on test digits on their side.

A first version summed gradients as they are, and what it chose was worse than random: at most a third of it lay on
its side, the rest being upright digits whose tiny gradients left the direction of the sum alone. Since then gradients
are brought to one length, here and by default; and what is chosen is trained on for 100 epochs in place of 20, since
60 examples taught nothing in 40 steps.
"""

import copy

import torch
from _digits import Data, accuracy, mlp, split, train
from torch import Tensor

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import training_data

CLAIM = Claim(
    key="data-from-weights",
    statement="a base trained on examples chosen by their gradients' sum is better at the fine-tune's task than one "
    "trained on as many random ones",
    method="accuracy, chosen",
    baseline="accuracy, random",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
COUNT, POOL, SHARE = 60, 900, 9


def turned(data: Data) -> Data:
    """The digits on their side."""
    return data[0].reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64), data[1]


def measure(seed: int) -> dict[str, float]:
    """Accuracies on digits on their side, and the share of such digits in what was chosen."""
    first, hidden, pool, test = split(seed, [300, 200, POOL])
    base = mlp(seed)
    train(base, first, torch.optim.Adam(base.parameters(), lr=1e-3), epochs=20, seed=seed)
    expert = tuned(base, turned(hidden), seed)
    lying = torch.arange(POOL) % SHARE == 0
    images = torch.where(lying[:, None], turned(pool)[0], pool[0])
    with torch.no_grad():
        labels = expert(images).argmax(dim=1)
    found = training_data(base, base, expert, [(images, labels)], COUNT, dim=2048, seed=seed)
    drawn = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:COUNT]
    alone = found.alone.topk(COUNT).indices
    plain = training_data(base, base, expert, [(images, labels)], COUNT, dim=2048, seed=seed, equal=False)

    def judged(rows: Tensor) -> float:
        return accuracy(tuned(base, (images[rows], labels[rows]), seed, 100), turned(test))

    return {
        "accuracy, chosen": judged(found.indices),
        "accuracy, random": judged(drawn),
        "accuracy, most alike alone": judged(alone),
        "accuracy, chosen by plain sums": judged(plain.indices),
        "accuracy, base": accuracy(base, turned(test)),
        "accuracy, fine-tune": accuracy(expert, turned(test)),
        "share on their side, chosen": float(lying[found.indices].double().mean()),
        "share on their side, most alike alone": float(lying[alone].double().mean()),
        "share on their side, pool": float(lying.double().mean()),
        "cosine of the sum": float(found.cosines[-1]),
    }


def tuned(base: torch.nn.Module, data: Data, seed: int, epochs: int = 20) -> torch.nn.Module:
    """A fine-tune of the base."""
    model = copy.deepcopy(base)
    train(model, data, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=epochs, seed=seed)
    return model
