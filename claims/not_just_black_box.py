"""Do DeepLIFT's parts point at pixels that matter more than gradient times input does?

Measured as for integrated gradients: the fall of the right class's logit, against the mean logit, when the pixels that
speak most for it are set to the reference. Both cost one backward pass.
"""

from _deletion import fall, trained

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import deeplift, input_gradients, integrated_gradients

CLAIM = Claim(
    key="not-just-black-box",
    statement="removing the pixels with the largest DeepLIFT parts lowers the right logit more than removing those "
    "with the largest gradient times input",
    method="fall, DeepLIFT",
    baseline="fall, gradient x input",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Mean falls of the logit, and the largest gap of DeepLIFT over the mean change of the output."""
    model, (images, labels) = trained(seed)
    found = deeplift(model, images, target=labels)
    gradient = input_gradients(model, images, target=labels)
    integrated = integrated_gradients(model, images, target=labels, steps=32)
    return {
        "fall, DeepLIFT": fall(model, (images, labels), found.values),
        "fall, gradient x input": fall(model, (images, labels), images * gradient),
        "fall, gradient": fall(model, (images, labels), gradient),
        "fall, integrated gradients": fall(model, (images, labels), integrated.values),
        "relative gap, DeepLIFT": float(found.gap.abs().max() / found.change.abs().mean()),
    }
