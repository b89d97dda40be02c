"""With one to three labels a class, is naive Bayes a better head than logistic regression?

Features are the last hidden layer of a small network trained on the digits 0 to 4; the heads tell 5 to 9 apart, which
the network never saw. Standardised features; both heads see the same labels. The mean accuracy over 1, 2 and 3 labels
a class is compared; accuracies with 60 a class, and the crossing, stand beside it. Seeds and draws were made fewer, for
time, after one seed had been seen.
"""

import torch
from _digits import mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="revisiting-discriminative-vs-generative",
    statement="with 1 to 3 labels a class the naive Bayes head is more often right than logistic regression",
    method="naive Bayes, few labels",
    baseline="logistic, few labels",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Accuracies over six draws of the labels each."""
    training, test = split(seed, [1000])
    model = mlp(seed)
    known = training[1] < 5
    data = training[0][known], training[1][known]
    train(model, data, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=20, seed=seed)
    with torch.no_grad():
        parts = [(model[:4](images[labels >= 5]), labels[labels >= 5] - 5) for images, labels in (training, test)]
    found = ws.inspect.theory.head_curves(*parts[0], *parts[1], shots=(1, 2, 3, 10, 60), draws=6, seed=seed)
    few = [row for row in found.rows() if row["shots"] <= 3]
    last = found.rows()[-1]
    return {
        "naive Bayes, few labels": sum(row["naive bayes"] for row in few) / len(few),
        "logistic, few labels": sum(row["logistic"] for row in few) / len(few),
        "naive Bayes, many labels": last["naive bayes"],
        "logistic, many labels": last["logistic"],
        "crossing": found["crossing"] or 1000,
    }
