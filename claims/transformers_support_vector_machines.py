"""Do trained attention weights point where the support vector machine over tokens points?

Four sequences of five tokens, ten wide; the score of one token in each is to be high. The weights (as one matrix, and
as keys and queries) are trained by gradient descent with steps of one length, until attention is so sharp that the
gradient is lost in rounding. (A first trial of one seed went on beyond that, in float32, and wandered off, to a
correlation of 0.13; since then it is float64, a stop, and a smaller step, with five seeds in place of eight.) The
correlation of the single matrix with the machine that chooses the tokens it ended with is compared with 0.95; for keys
and queries, nuclear norms for one unit of margin are told.
"""

import torch

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="transformers-support-vector-machines",
    statement="after training the correlation with the attention machine is at least 0.95",
    method="correlation, one matrix",
    baseline="0.95",
    seeds=(0, 1, 2, 3, 4),
    needs=("scipy",),
)


def measure(seed: int) -> dict[str, float]:
    """Correlations with both machines, and nuclear norms a margin, of both ways to train."""
    generator = torch.Generator().manual_seed(seed)
    tokens, queries = torch.randn(4, 5, 10, generator=generator), torch.randn(4, 10, generator=generator)
    head = torch.randn(10, generator=generator)
    marks = torch.where(torch.rand(4, generator=generator) < 0.5, -1.0, 1.0)
    single = descend([0.01 * torch.randn(10, 10, generator=generator)], tokens, queries, head, marks)
    pair = descend([0.1 * torch.randn(10, 10, generator=generator) for _ in range(2)], tokens, queries, head, marks)
    whole = ws.inspect.theory.attention_margin(single[0], tokens, queries, nuclear=True)
    product = ws.inspect.theory.attention_margin((pair[0], pair[1]), tokens, queries, nuclear=True)
    return {
        "correlation, one matrix": whole["correlation"],
        "0.95": 0.95,
        "correlation, keys and queries": product["correlation"],
        "correlation with the nuclear machine, keys and queries": product["correlation, nuclear"],
        "nuclear norm a margin, one matrix": whole["nuclear norm a margin"] or 1e3,
        "nuclear norm a margin, keys and queries": product["nuclear norm a margin"] or 1e3,
        "effective rank, one matrix": whole["effective rank"],
        "effective rank, keys and queries": product["effective rank"],
    }


def descend(weights, tokens, queries, head, marks, steps: int = 3000, rate: float = 0.01):
    """Normalised gradient descent on the logistic loss of one number a sequence."""
    weights = [one.double().requires_grad_() for one in weights]
    tokens, queries, head, marks = tokens.double(), queries.double(), head.double(), marks.double()
    for _ in range(steps):
        matrix = weights[0] if len(weights) == 1 else weights[0].T @ weights[1]
        attention = torch.einsum("ntd,de,ne->nt", tokens, matrix, queries).softmax(dim=1)
        said = torch.einsum("nt,ntd,d->n", attention, tokens, head)
        loss = torch.nn.functional.softplus(-marks * said).mean()
        slopes = torch.autograd.grad(loss, weights)
        length = torch.stack([slope.norm() for slope in slopes]).norm()
        if length < 1e-11:
            break
        with torch.no_grad():
            for one, slope in zip(weights, slopes, strict=True):
                one -= rate * slope / length
    return [one.detach() for one in weights]
