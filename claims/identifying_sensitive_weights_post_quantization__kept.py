"""Are the weights that rounding harms most, by gradients along the whole way, the ones to keep?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to the
nearest of 4 evenly spaced points in groups of 32. One in a hundred of these weights is kept in full beside the codes:
those of most damage along the way, in two rounds; the largest; those that Fisher information at the weights before
finds most harmed; or random ones. Damage and Fisher information are of 256 pieces of the training text. The figures
are nats a word on held-out text. On seed 0 keeping those of most damage with its sign lost to keeping none; damage has
counted by its size since, for which the paper's tables speak and digits as well.
"""

import copy

import torch
from _digits import one_thread
from _small_language import batches, data, language, loss_of, next_word, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="identifying-sensitive-weights-post-quantization",
    variant="kept",
    statement="of a small language model with 2 bits, keeping one weight in a hundred by its damage along the way "
    "loses less than keeping those of most squared error times Fisher information",
    method="damage",
    baseline="Fisher information",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
SHARE = 0.01


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    pieces = batches(training, 8, seed + 1000)
    weights = ws.open(model)
    names = [name for name in ws.prune.prunable(weights) if name.startswith("blocks.")]
    given = {"bits": 2, "group": 32, "symmetric": False, "pattern": names}
    rounded = dict(ws.quantize.rtn(model, action="values", **given))
    curves = ws.stats.fisher(model, pieces, labels="given", loss=next_word)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "largest": {name: weights[name].abs() for name in names},
        "Fisher information": {name: (rounded[name] - weights[name]).square() * curves[name] for name in names},
        "random": {name: torch.rand(weights[name].shape, generator=generator) for name in names},
    }
    found = ws.quantize.requant(
        model, pieces, outliers=0.0, kept=SHARE, points=4, loss=next_word, bits=2, group=32, symmetric=False,
        pattern=names,
    )  # fmt: skip
    made = {"none": rounded, "damage": dict(ws.quantize.with_kept(found))}
    for word, score in scores.items():
        every = torch.cat([score[name].flatten() for name in names])
        least = every.topk(round(SHARE * len(every))).values[-1]
        kept = {name: torch.where(score[name] >= least, weights[name], rounded[name]) for name in names}
        made[word] = rounded | kept
    figures = {"whole": loss_of(model, held_out)}
    copied = copy.deepcopy(model)
    for word, values in made.items():
        copied.load_state_dict({name: value.float() for name, value in values.items()})
        figures[word] = loss_of(copied, held_out)
    return figures
