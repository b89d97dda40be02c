"""Do DeepLIFT's contributions tell which hidden units can go?

Three quarters of the units of both hidden layers of a network for digits are set to 0 without repair, those with the
smallest importance first. The baseline is the mean size of activation times gradient of the right logit (a Taylor
expansion), which costs the same; mean activations stand beside it. Importances come from training data.
"""

import torch
from _digits import accuracy, mlp, split, train
from torch import Tensor, nn

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import input_gradients, unit_importance

CLAIM = Claim(
    key="not-just-black-box",
    variant="units",
    statement="without the three quarters of units that DeepLIFT finds least important accuracy is higher than without "
    "those of the smallest activation times gradient",
    method="accuracy, DeepLIFT",
    baseline="accuracy, activation x gradient",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)
GONE = 0.75


def measure(seed: int) -> dict[str, float]:
    """Accuracies without the units."""
    training, test = split(seed, [1200])
    model = mlp(seed)
    train(model, training, torch.optim.Adam(model.parameters(), lr=2e-3), epochs=30, seed=seed)
    model.eval()
    report = unit_importance(model, [training], ["1", "3"])
    parts = [torch.tensor([row["importance"] for row in report.rows() if row["layer"] == name]) for name in ("1", "3")]
    return {
        "accuracy, DeepLIFT": without(model, parts, test),
        "accuracy, activation x gradient": without(model, taylor(model, training), test),
        "accuracy, activation": without(model, activations(model, training[0]), test),
        "accuracy, whole": accuracy(model, test),
    }


@torch.no_grad()
def activations(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Mean activations of both hidden layers."""
    return [model[:2](images).mean(dim=0), model[:4](images).mean(dim=0)]


def taylor(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Mean sizes of activation times gradient."""
    found = []
    for cut in (2, 4):
        with torch.no_grad():
            hidden = model[:cut](data[0])
        found.append((hidden * input_gradients(model[cut:], hidden, target=data[1])).abs().mean(dim=0))
    return found


def without(model: nn.Sequential, importance: list[Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy with the least important units of both layers at 0."""
    masks = []
    for one in importance:
        mask = torch.ones_like(one)
        mask[one.argsort()[: round(GONE * len(one))]] = 0
        masks.append(mask)

    class Cut(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model[4:](model[2:4](model[:2](images) * masks[0]) * masks[1])

    return accuracy(Cut(), test)
