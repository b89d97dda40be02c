"""Do explanations of the whole answer predict true labels better than explanations of the predicted class?

Tumours (ten mean measurements each), with one label in eight wrong, so that predictions can be wrong too. A surrogate
trained with random masks is explained twice with exact Shapley values: of minus the divergence from the full
prediction (SHAP-KL), and of the predicted class's probability (SHAP). The inputs ranked highest are judged by another
predictor, trained with random masks on other data and from another start, by the log-likelihood of the labels.
"""

import torch
from torch import Tensor, nn

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import masked_predictor, masked_score, shap_kl

CLAIM = Claim(
    key="dont-be-fooled",
    statement="the inputs that SHAP-KL ranks highest predict the labels better than those that SHAP of the predicted "
    "class ranks highest",
    method="log-likelihood, SHAP-KL",
    baseline="log-likelihood, SHAP of the class",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
WRONG, TEST = 0.125, 160


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Standardised measurements and labels, shuffled, some labels wrong."""
    from sklearn.datasets import load_breast_cancer

    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs, labels = torch.tensor(inputs[:, :10], dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    wrong = torch.rand(len(labels), generator=generator) < WRONG
    inputs = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0)
    return inputs[order], torch.where(wrong, 1 - labels, labels)[order]


def network(seed: int) -> nn.Sequential:
    """Takes ten measurements and which of them are seen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 2))


def measure(seed: int) -> dict[str, float]:
    """Mean log-likelihoods over growing shares of the inputs, kept and removed, and accuracies."""
    inputs, labels = data(seed)
    test, first, second = inputs.split(
        [TEST, (len(inputs) - TEST) // 2, len(inputs) - TEST - (len(inputs) - TEST) // 2]
    )
    truth, one, other = labels.split([len(test), len(first), len(second)])
    surrogate = masked_predictor(network(seed), first, one, steps=1000, seed=seed)
    judge = masked_predictor(network(seed + 100), second, other, steps=1000, seed=seed + 100)
    scores = {
        "SHAP-KL": shap_kl(surrogate, test),
        "SHAP of the class": shap_kl(surrogate, test, value="class"),
        "chance": torch.rand(test.shape, generator=torch.Generator().manual_seed(seed)),
    }
    found: dict[str, float] = {}
    for name, score in scores.items():
        report = masked_score(judge, score, test, truth, seed=seed)
        found[f"log-likelihood, {name}"] = report["kept"]
        found[f"log-likelihood without, {name}"] = report["removed"]
        found[f"accuracy, {name}"] = report["accuracy, kept"]
    return found
