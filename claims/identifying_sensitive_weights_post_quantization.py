"""Do scores along the whole way of rounding tell what rounding does to the loss, better than a Taylor series?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to the
nearest of 4 evenly spaced points in groups of 32. What that does to the loss of 128 pieces of its training text is told
from gradients at 8 points of the way, and from the gradient and the squared gradients (Fisher information) at its
beginning. The figures are how far each is off, as a share of the true change.
"""

import copy

import torch
from _digits import one_thread
from _small_language import batches, data, language, next_word, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="identifying-sensitive-weights-post-quantization",
    statement="with 2 bits the integral of gradients along the way tells the change of a small language model's loss "
    "with a smaller error than a Taylor series at the weights before",
    method="integral",
    baseline="Taylor series",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Errors of the change that is told, as shares of the true one."""
    training, _ = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    pieces = batches(training, 4, seed + 1000)
    names = [name for name in ws.prune.prunable(ws.open(model)) if name.startswith("blocks.")]
    common = {"bits": 2, "group": 32, "symmetric": False, "pattern": names, "action": "values"}
    rounded = ws.quantize.rtn(model, **common)
    copied = copy.deepcopy(model)
    rounded.load_into(copied)
    count = sum(len(words) for words, _ in pieces)
    with torch.no_grad():
        before, after = (float(sum(next_word(one, piece) for piece in pieces)) / count for one in (model, copied))
    true = after - before
    scores = ws.quantize.damage(model, rounded, pieces, points=8, loss=next_word)
    moves = {name: rounded[name].double() - ws.open(model)[name].double() for name in names}
    slopes = ws.stats.gradients(model, pieces, loss=next_word)
    curves = ws.stats.fisher(model, pieces, labels="given", loss=next_word)
    first = float(sum((slopes[name].double() * move).sum() for name, move in moves.items()))
    second = float(sum((curves[name].double() * move.square()).sum() for name, move in moves.items())) / 2
    told = float(sum(scores[name].double().sum() for name in names))
    return {
        "integral": abs(told - true) / abs(true),
        "Taylor series": abs(first + second - true) / abs(true),
        "first-order Taylor series": abs(first - true) / abs(true),
        "change of the loss": true,
    }
