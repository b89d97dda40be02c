"""Keep the outputs of a layer most where the loss of the whole network hangs on them.

A rounding that keeps a layer's outputs takes every token and every output for as important as the next. With Gram
matrices whose rows count as much as the loss depends on the outputs that they make, the same rounding keeps the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from weightsmith import progress, stats
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._layout import parts_of, with_codes
from weightsmith.quantize._sequential import kernel_of
from weightsmith.quantize.room import Source, largest_divisor, planned, rounded
from weightsmith.stats import Batch, Loss
from weightsmith.weights import Held, Pattern, Step, Weights, open


@card(
    paper="Kim, El Halabi, Park, Song 2025, 'GuidedQuant: Large Language Model Quantization via Exploiting End Loss "
    "Guidance'",
    covers=("guidedquant",),
    needs=("data",),
    unit="model",
    claim="the loss of a network rises less than with the same rounding on plain Gram matrices",
    departs="gradients are those of the whole network, once for all layers; layers whose outputs the groups do not "
    "divide have fewer groups",
)
def guidedquant(
    model: nn.Module,
    batches: Iterable[Batch],
    method: str | Callable[..., Coded] = "lnq",
    *,
    weights: Source | None = None,
    groups: int = 4,
    at_once: int | None = None,
    pattern: Pattern | None = None,
    action: Literal["codes", "values"] = "codes",
    loss: Loss | None = None,
    **options: Any,
) -> Weights:
    r"""Round the weights of a network with Gram matrices that know its loss.

    .. math:: \sum_k \sum_{j \in J_k} (w_j - v_j)\, H_k\, (w_j - v_j)^\top, \qquad
        H_k = X^\top \operatorname{diag}\Bigl( \frac{1}{|J_k|} \sum_{j \in J_k}
        \Bigl( \frac{\partial \ell}{\partial z_j} \Bigr)^{\!2} \Bigr)\, X

    with :math:`J_k` the k-th run of the outputs of a layer: `weightsmith.stats.guided_gram`, and then a rounding that
    takes a Gram matrix for each run of rows (`gptq`, `lnq`, `coordinate_descent`, `leanquant`).

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``(inputs, labels)`` or mappings, as for `weightsmith.stats.guided_gram`.
        method: the rounding, by its name or as a kernel.
        weights: what is rounded and given back with what it carries, under the names of the model's; None for the
            model's own.
        groups: runs of the outputs of each layer, of one size; the most that divide them and are not more than this.
        at_once: layers whose matrices are gathered together, one pass over the data each time; None for all layers in
            one pass.
        pattern: which tensors; by default matrices and convolutions without embeddings and the head.
        action: ``"codes"``, or the ``"values"`` that they stand for.
        loss: ``(model, batch) -> number``, the sum of the examples' losses; the default is cross-entropy.
        options: of the method and of its grid (``bits``, ``group``, ``grid``, ...), possibly by tensor.

    Returns:
        Weights: as the method gives them. Memory: ``groups x [in, in]`` in float64 for each layer at once and their
        inputs of one batch, then the codes.

    Raises:
        ValueError: unknown methods or options, layers that the loss does not depend on, and what
            `weightsmith.stats.guided_gram` raises.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))]
    >>> guidedquant(net, data, "gptq", groups=2, bits=3)["2.weight_packed"].shape
    torch.Size([2, 1])
    """
    if action not in ("codes", "values"):
        raise Error(f"action is 'codes' or 'values', got {action!r}")
    for name, count in (("groups", groups), ("at_once", at_once)):
        if (count is not None or name == "groups") and (
            not isinstance(count, int) or isinstance(count, bool) or count < 1
        ):
            raise Error(f"{name} is a whole number from 1, got {count!r}")
    opened, kernel = open(model if weights is None else weights), kernel_of(method)
    plans = planned(kernel, opened, {**options, "pattern": pattern})
    names = list(plans)
    runs = {name: largest_divisor(max(opened.spec(name).shape[0], 1), groups) for name in names}
    size = at_once or max(len(names), 1)
    held = batches if size >= len(names) else list(batches)
    made: dict[str, dict[str, Any]] = {}
    with progress.task("guided layers", len(names)) as advance:
        for start in range(0, len(names), size):
            some = names[start : start + size]
            grams = stats.guided_gram(model, held, groups={name: runs[name] for name in some}, pattern=some, loss=loss)
            _check_known(some, grams)
            for name in some:
                weight, plan = opened[name], plans[name]
                found = rounded(kernel, plan.layout, plan.options, weight, grams[name].to(weight.device))
                if action == "codes":
                    made[name] = {key: Held(value) for key, value in parts_of(found, plan.layout).items()}
                    made[name]["_shape"] = Held(torch.tensor(plan.layout.shape))
                else:
                    values = found.values()[:, : plan.layout.inputs].reshape(weight.shape).to(weight.dtype)
                    made[name] = {"": Held(values)}
                advance(1)
    said = {"method": kernel.__name__, "groups": groups, "pattern": pattern, **options}
    step = Step("quantize.guidedquant", said, (opened.lineage,))
    if action == "values":
        ties = opened.ties
        nodes = {name: made[own][""] if (own := ties.get(name, name)) in made else opened.node(name) for name in opened}
        return Weights(nodes, step, opened.files, opened.metadata)
    return with_codes(opened, made, {name: plan.layout for name, plan in plans.items()}, step)


def _check_known(names: list[str], grams: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in grams]
    if unknown:
        raise Error(
            f"the loss does not depend on the outputs of {listed(unknown)}, or no row that counts reached them; leave "
            "them out with pattern="
        )
