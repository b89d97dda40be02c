"""What each single example would do to the weights, whole or squeezed into a few random numbers.

The gradients of n examples are n times as large as the model. Inner products between them survive a random
projection into a few hundred dimensions (Johnson and Lindenstrauss 1984), and inner products are all that most uses
need. The random signs are made block by block from a seed, used, and forgotten: the same seed makes the same
projection for every example, every checkpoint and every difference of checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from weightsmith import progress
from weightsmith.errors import Error, listed
from weightsmith.stats.room import Batch, Loss, chosen_names, default_loss, mapped, restored, size
from weightsmith.weights import Pattern, matches, open, working

BLOCK = 4096
"""Values of a gradient that are projected together; a block's signs take ``4 * BLOCK * dim`` bytes."""


def example_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    dim: int | None = None,
    seed: int = 0,
    pattern: Pattern = "*",
    weights: Any = None,
    at_once: int = 64,
    loss: Loss | None = None,
) -> Tensor:
    r"""The gradient of every example, exact or randomly projected.

    .. math:: g_i = \nabla_\theta\, \ell(\theta; x_i), \qquad \phi_i = P^\top g_i, \quad
        P_{jk} = \pm 1 / \sqrt{d}

    Args:
        model: asked in evaluation mode and left as it was; frozen parameters count as well.
        batches: ``inputs``, ``(inputs, labels)`` or mappings.
        dim: the length d of a projected gradient; None for exact gradients.
        seed: of the projection. `project` with the same seed makes the same one.
        pattern: names of the parameters.
        weights: a checkpoint to run the model with in place of its own weights; held in memory for as long.
        at_once: examples whose exact gradients are held together. Each such group makes the signs anew, so more
            is faster.
        loss: ``(model, batch) -> number``, summed over examples; any number whose gradient is wanted. The default
            is cross-entropy.

    Returns:
        ``[n, parameters]`` (tensors flattened, in the model's order, tied ones once) or ``[n, dim]``, float32
        (float64 for such).

    Raises:
        ValueError: no batch, no parameter that fits, a loss of several numbers, weights of another model.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> found = example_gradients(layer, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], loss=lambda m, x: m(x).sum())
    >>> found
    tensor([[1., 2.],
            [3., 4.]])
    """
    if dim is not None and dim < 1:
        raise Error(f"dim is at least 1, got {dim}")
    if at_once < 1:
        raise Error(f"at_once is at least 1, got {at_once}")
    asked = _Asked(model, pattern, weights, loss or default_loss)
    total = len(batches) if isinstance(batches, Sequence) else 0
    rows: list[Tensor] = []
    with restored(model), progress.task("example gradients", total) as advance:
        for batch in batches:
            for start in range(0, size(batch), at_once):
                part = mapped(lambda value, start=start: value[start : start + at_once], batch)
                found = asked.gradients(part)
                rows.append(flattened(found) if dim is None else project(found, dim, seed))
            advance(1)
    if not rows:
        raise Error("example_gradients needs at least one example, got none")
    return torch.cat(rows)


def flattened(tensors: Mapping[str, Tensor]) -> Tensor:
    """``[n, *shape]`` each to ``[n, values of all]``."""
    return torch.cat([_rows(value) for value in tensors.values()], dim=1)


def _rows(value: Tensor) -> Tensor:
    return working(value).unsqueeze(-1).flatten(1)  # also of scalars, which are [n]


def project(tensors: Mapping[str, Tensor], dim: int, seed: int = 0) -> Tensor:
    r"""Vectors that are spread over named tensors, randomly projected: lengths and angles nearly stay.

    The signs of a tensor depend on ``seed``, on its name and on the place, so that a gradient and a difference of
    checkpoints, of which one has more tensors, still fit together. Inner products have an error of about
    :math:`1 / \sqrt{\mathrm{dim}}` of the product of the lengths. Every value costs ``dim`` signs and ``n * dim``
    multiplications: with 10^8 values and more, project some tensors only.

    Args:
        tensors: ``[n, *shape]`` each, by name.
        dim: the length of what comes out.
        seed: of the signs.

    Returns:
        ``[n, dim]``, float32 (float64 if the first tensor is).

    Raises:
        ValueError: no tensor, dim below 1, tensors of different n.

    >>> vectors = {"w": torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))}
    >>> short = project(vectors, 400)
    >>> bool((short.norm(dim=1) / vectors["w"].norm(dim=1) - 1).abs().max() < 0.15)
    True
    """
    if not tensors:
        raise Error("project needs at least one tensor, got none")
    if dim < 1:
        raise Error(f"dim is at least 1, got {dim}")
    first = working(next(iter(tensors.values())))
    total = first.new_zeros(len(first), dim)
    for name, value in tensors.items():
        flat = _rows(value).to(total)
        if len(flat) != len(total):
            raise Error(f"project needs as many vectors of every tensor: {name!r} has {len(flat)}, others {len(total)}")
        for index, block in enumerate(flat.split(BLOCK, dim=1)):
            total += block @ _signs(block.shape[1], dim, f"{seed}/{name}/{index}").to(total)
    return total / dim**0.5


def _signs(rows: int, columns: int, word: str) -> Tensor:
    """Random -1 and 1, the same for a word wherever they are made."""
    digest = hashlib.sha256(word.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    words = torch.empty(-(-rows * columns // 64), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    # Eight signs from each byte, by a table: several times as fast as shifting bits out.
    signs = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1) * 2.0 - 1
    return signs.index_select(0, words.view(torch.uint8).int()).flatten()[: rows * columns].reshape(rows, columns)


class _Asked:
    """A model's parameters, its loss, and how to get several examples' gradients."""

    def __init__(self, model: nn.Module, pattern: Pattern, weights: Any, loss: Loss):
        own = {name: value.detach() for name, value in model.named_parameters()}  # tied ones once
        floating = {name: value for name, value in own.items() if value.is_floating_point()}
        self.fixed = dict(own) | {name: buffer.detach() for name, buffer in model.named_buffers()}
        if weights is not None:
            self.fixed |= {name: value for name, value in fitted(model, weights).items() if name in self.fixed}
        self.moving = {name: self.fixed.pop(name) for name in floating if matches(pattern, name)}
        chosen_names(floating, list(self.moving), pattern)
        self.model, self.loss, self.together = model, loss, True

    def gradients(self, part: Batch) -> dict[str, Tensor]:
        """``[n, *shape]`` by name."""
        if self.together:
            try:
                ones = mapped(lambda value: value[:, None], part)  # each example is a batch of one
                return vmap(grad(self._number), in_dims=(None, _axes(ones)))(self.moving, ones)
            except Exception:
                # Not every model can be vectorised. One by one is slower, and shows what is really wrong.
                self.together = False
        single = [
            grad(self._number)(self.moving, mapped(lambda value, i=i: value[i : i + 1], part))
            for i in range(size(part))
        ]
        return {name: torch.stack([one[name] for one in single]) for name in self.moving}

    def _number(self, moving: dict[str, Tensor], one: Batch) -> Tensor:
        def called(*inputs: Any, **named: Any) -> Any:
            fixed = {name: value.clone() for name, value in self.fixed.items()}  # some models write to buffers
            return functional_call(self.model, moving | fixed, inputs, named)

        found = self.loss(called, one)
        if found.numel() != 1:
            raise Error(f"loss= must return one number, got {list(found.shape)}")
        return found.sum()


def fitted(model: nn.Module, weights: Any) -> dict[str, Tensor]:
    """A checkpoint's tensors as a model would hold them: by its names, each tied one once, in its dtypes and places.

    Args:
        model: parameters and buffers that it saves must be there.
        weights: anything that `weightsmith.open` opens.

    Returns:
        dict: name to tensor, for `torch.func.functional_call`.

    Raises:
        ValueError: tensors that are missing or of another shape; what the model does not know is passed over.

    >>> fitted(torch.nn.Linear(1, 1), {"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    {'weight': tensor([[1.]]), 'bias': tensor([0.])}
    """
    given = open(weights)
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tied: dict[int, list[str]] = {}
    for name, value in own.items():
        tied.setdefault(id(value), []).append(name)
    chosen = {names[0]: next((name for name in names if name in given), "") for names in tied.values()}
    lacking = [name for name, source in chosen.items() if not source]
    if lacking:
        raise Error(f"the weights do not fit the model: they lack {listed(lacking)}")
    wrong = [
        f"{name} {list(given.spec(source).shape)} into {list(own[name].shape)}"
        for name, source in chosen.items()
        if given.spec(source).shape != tuple(own[name].shape)
    ]
    if wrong:
        raise Error(f"the weights do not fit the model: {listed(wrong)}")
    return {name: given[source].to(own[name].device, own[name].dtype) for name, source in chosen.items()}


def _axes(part: Batch) -> Any:
    """Along which axis the examples of each value of a batch lie."""
    if isinstance(part, Mapping):
        return {name: _axes(value) for name, value in part.items()}
    if isinstance(part, tuple):
        return tuple(_axes(value) for value in part)
    return 0 if isinstance(part, Tensor) and part.dim() else None
