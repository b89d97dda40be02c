"""Pruned layers that skip their zeros: on a processor by sparse products, on a graphics card by 2:4 kernels.

Fewer multiplications are not less time: a dense product is as fast as the machine, a sparse one waits for the entries
that its indices name. It pays from some sparsity on, which depends on the machine, the batch and on how the weights
that are left lie: whole columns of a block of rows share one look-up of an input. `break_even` measures where.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune.room import by_score
from weightsmith.solve import generator_for
from weightsmith.weights import Pattern, matches

if TYPE_CHECKING:
    from weightsmith.inspect import Report

HEIGHTS = (32, 16, 8, 4)
"""Rows of a block that are tried by ``layout="auto"``, the tallest first."""

SPARE = 1.25
"""Stored over kept entries up to which weights count as lying in blocks."""

GATHERED = 2**18
"""Inputs that are gathered at once: a megabyte of float32, about what stays in the second-level cache."""

FILLED = 2.0
"""Held over needed entries from which blocks are put into one more bucket."""

BUCKETS = 4
"""Runs of blocks at most, sorted by how many columns they keep, that are filled up to one length each."""


class Scattered(nn.Module):
    """A matrix in compressed rows (CSR): products with columns ``[in, b]``."""

    matrix: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            made = weight.detach().to_sparse_csr()
            # Indices of 32 bits are what the kernels take; wider ones would be turned into them at every call.
            width = torch.int32 if made.values().numel() < 2**31 else torch.int64
            parts = made.crow_indices().to(width), made.col_indices().to(width), made.values()
            self.register_buffer("matrix", torch.sparse_csr_tensor(*parts, size=made.shape, check_invariants=True))

    def forward(self, columns: Tensor) -> Tensor:
        _check_inputs(self.matrix.shape[1], columns)
        _check_scattered(self.matrix)
        if not torch.is_autocast_enabled(columns.device.type):
            return self.matrix @ columns
        with torch.autocast(columns.device.type, enabled=False):  # there are no products of halves on a processor
            return self.matrix @ columns.to(self.matrix.dtype)

    def __deepcopy__(self, memory: dict[int, Any]) -> Scattered:
        made = type(self).__new__(type(self))
        memory[id(self)] = made
        if id(self.matrix) not in memory:  # `copy` cannot copy tensors of this layout
            memory[id(self.matrix)] = self.matrix.clone()
        made.__dict__.update(copy.deepcopy(self.__dict__, memory))
        return made

    def dense(self) -> Tensor:
        """``[out, in]``."""
        return self.matrix.to_dense()

    def stored(self) -> int:
        """Values that are held."""
        return self.matrix.values().numel()


def _check_inputs(inputs: int, columns: Tensor) -> None:
    if len(columns) != inputs:
        raise Error(f"a sparse layer of {inputs} inputs got {len(columns)}")


def _check_scattered(values: Tensor) -> None:
    if values.is_cpu and values.dtype in (torch.float16, torch.bfloat16):
        raise Error(f'there is no scattered product for {values.dtype} on a processor; use float32, or layout="auto"')


class BlockRows(nn.Module):
    """A matrix in blocks of rows, each with the columns that any of its rows keeps: products with columns ``[in, b]``.

    Inputs are gathered once a block and multiplied with a small dense matrix. Blocks are sorted by how many columns
    they keep, and filled up with zeros to the length of the longest in their bucket. There are as few buckets as at
    most double what is held (`FILLED`), and no more than `BUCKETS`: each is a product of its own.
    """

    places: Tensor

    def __init__(self, weight: Tensor, height: int):
        super().__init__()
        weight = weight.detach()
        self.out, self.inputs, self.height = weight.shape[0], weight.shape[1], height
        blocks = functional.pad(weight, (0, 0, 0, -self.out % height)).view(-1, height, self.inputs)
        there = (blocks != 0).any(dim=1)
        counts = there.sum(dim=1)
        order = counts.argsort(descending=True, stable=True)
        buckets = _buckets(order, counts)
        if len(buckets) == 1:
            order = torch.arange(len(counts), device=weight.device)
            buckets = [order]
        self.sizes: list[tuple[int, int]] = []
        for number, part in enumerate(buckets):
            longest = max(int(counts[part].max()), 1)
            # The columns that are kept come first; those after them are met by zeros.
            columns = there[part].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
            kept = blocks[part].gather(2, columns[:, None].expand(-1, height, -1))
            self.register_buffer(f"values_{number}", kept.contiguous())
            self.register_buffer(f"columns_{number}", columns.reshape(-1).int())
            self.sizes.append((len(part), longest))
        self.register_buffer("places", order.argsort())

    def forward(self, columns: Tensor) -> Tensor:
        _check_inputs(self.inputs, columns)
        batch, parts = columns.shape[1], []
        for i, (blocks, longest) in enumerate(self.sizes):
            values, wanted = self._values(i), self._columns(i)
            step = max(GATHERED // max(longest * batch, 1), 1)
            for first in range(0, blocks, step):
                last = min(first + step, blocks)
                inputs = columns.index_select(0, wanted[first * longest : last * longest])
                parts.append(torch.bmm(values[first:last], inputs.view(last - first, longest, batch)))
        made = torch.cat(parts) if len(parts) > 1 else parts[0]
        made = made.index_select(0, self.places) if len(self.sizes) > 1 else made  # one bucket is in order
        return made.reshape(len(made) * self.height, batch)[: self.out]

    def _values(self, number: int) -> Tensor:
        return getattr(self, f"values_{number}")

    def _columns(self, number: int) -> Tensor:
        return getattr(self, f"columns_{number}")

    def dense(self) -> Tensor:
        """``[out, in]``."""
        parts = []
        for i, (blocks, longest) in enumerate(self.sizes):
            values = self._values(i)
            where = self._columns(i).view(blocks, 1, longest).expand(-1, self.height, -1).long()
            parts.append(values.new_zeros(blocks, self.height, self.inputs).scatter_(2, where, values))
        return torch.cat(parts).index_select(0, self.places).reshape(-1, self.inputs)[: self.out]

    def stored(self) -> int:
        """Values that are held, with the zeros that fill up."""
        return sum(self._values(i).numel() for i in range(len(self.sizes)))


def _buckets(order: Tensor, counts: Tensor) -> Sequence[Tensor]:
    """Blocks in falling order of their counts, as runs of about one length."""
    parts: Sequence[Tensor] = ()
    for number in range(1, BUCKETS + 1):
        parts = order.split(max(-(-len(order) // number), 1))
        if sum(len(part) * int(counts[part[0]]) for part in parts) <= FILLED * int(counts.sum()):
            break
    return parts


class SparseLayer(nn.Module):
    """A linear layer, or a convolution with kernels of one position, that skips its zeros. Its weight is fixed."""

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d, product: Scattered | BlockRows):
        super().__init__()
        self.product = product
        self.bias = layer.bias
        self.axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        self.stride = () if isinstance(layer, nn.Linear) else tuple(layer.stride)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew; for who looks at it rather than call the layer."""
        found = self.product.dense()
        return found.reshape(*found.shape, *(1,) * self.axes)

    def forward(self, values: Tensor) -> Tensor:
        if not self.axes:
            places = values.shape[:-1]
            made = self.product(values.reshape(places.numel(), values.shape[-1]).T.contiguous()).T
            return (made if self.bias is None else made + self.bias).reshape(*places, made.shape[1])
        single = values.dim() == self.axes + 1
        if not single and values.dim() != self.axes + 2:
            raise Error(f"a sparse convolution along {self.axes} axes got inputs {list(values.shape)}")
        values = values[None] if single else values
        values = values[(..., *(slice(None, None, step) for step in self.stride))]
        images, channels, places = len(values), values.shape[1], values.shape[2:]
        made = self.product(values.transpose(0, 1).reshape(channels, images * places.numel()))
        made = made if self.bias is None else made + self.bias[:, None]
        made = made.view(len(made), images, *places).transpose(0, 1)
        return made[0] if single else made


def sparse_form(weight: Tensor, layout: str = "auto") -> Scattered | BlockRows:
    """A sparse matrix from a dense one ``[out, in]`` with zeros.

    Args:
        weight: ``[out, in]``.
        layout: ``"scattered"`` (compressed rows), blocks such as ``"16x1"`` (of 16 rows and one column; zeros inside of
            them are kept), or ``"auto"``: the tallest blocks of `HEIGHTS` that hold at most a quarter more than what is
            not zero, else scattered.

    Raises:
        ValueError: another layout, or halves that are to lie scattered on a processor, for which there is no product.

    >>> found = sparse_form(torch.tensor([[0.0, 2.0, 0.0], [0.0, 3.0, 0.0]]), "2x1")
    >>> found(torch.tensor([[1.0], [10.0], [100.0]]))
    tensor([[20.],
            [30.]])
    """
    blocks = re.fullmatch(r"(\d+)x1", layout)
    if layout not in ("auto", "scattered") and not (blocks and int(blocks[1])):
        raise Error(f'layout is "auto", "scattered" or blocks of rows such as "16x1"; got {layout!r}')
    if blocks:
        return BlockRows(weight, int(blocks[1]))
    if layout == "auto":
        height = next((h for h in HEIGHTS if _stored(weight, h) <= SPARE * int(weight.count_nonzero())), None)
        half = weight.is_cpu and weight.dtype in (torch.float16, torch.bfloat16)
        if height is not None or half:
            return BlockRows(weight, height or 1)
    _check_scattered(weight)
    return Scattered(weight)


def _stored(weight: Tensor, height: int) -> int:
    """Entries in blocks of so many rows and one column that are not all zero."""
    blocks = functional.pad(weight != 0, (0, 0, 0, -weight.shape[0] % height)).view(-1, height, weight.shape[1])
    return height * int(blocks.any(dim=1).sum())


@card(
    paper="Elsen, Dukhan, Gale, Simonyan 2020, 'Fast Sparse ConvNets'",
    covers=("fast-sparse-convnets",),
    unit="model",
    claim="at high sparsity pruned layers are faster than dense ones, the more so in blocks of rows",
    departs="products are those of PyTorch (compressed rows, or gathered inputs and small dense products a block of "
    "rows), not kernels for phones; linear layers as well as convolutions of one position; inputs are turned to "
    "channels first in every layer",
)
def execute(module: nn.Module, *, layout: str = "auto", least: float = 0.9, pattern: Pattern = "*") -> nn.Module:
    """A model whose pruned layers skip their zeros, with equal outputs but for rounding (for finite inputs).

    Args:
        module: a model with zeros in its weights; left as it was. All tensors but those of the layers that are
            replaced are shared with it.
        layout: as for `sparse_form`; ``"auto"`` looks at each layer.
        least: the share of zeros from which a layer is replaced. `break_even` tells what pays on a machine.
        pattern: names of the weights.

    Returns:
        nn.Module: a copy in which linear layers, and convolutions along one or two axes with kernels of one position
        and without groups or padding, are `SparseLayer`, whose weights are buffers and not trained (inputs and biases
        have gradients). Layers of a class of their own, with hooks, or parametrized ones stay: `fold` them first. It is
        for this machine and process: what is kept is the pruned model, whose weights `weightsmith.open` can read.

    Raises:
        ValueError: no layer with so many zeros fits.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].weight[1:].zero_()
    >>> fast = execute(model, least=0.8)
    >>> torch.allclose(fast(torch.ones(2, 8)), model(torch.ones(2, 8)), atol=1e-6)
    True
    """
    if not 0 <= least <= 1:
        raise Error(f"least is a share of zeros in [0, 1], got {least}")
    able = _able(module)
    if not able:
        raise Error("no layer here can skip its zeros: there is no plain linear layer or convolution of one position")
    chosen = {name: layer for name, layer in able.items() if matches(pattern, f"{name}.weight".lstrip("."))}
    chosen = {name: layer for name, layer in chosen.items() if _zeros(layer.weight) >= least}
    if not chosen:
        raise Error(
            f"no linear layer or convolution of one position that fits {pattern!r} has {least:.0%} zeros; prune first, "
            f"or give least=. There are {listed(list(able))}"
        )
    replaced: dict[int, SparseLayer] = {}
    for layer in chosen.values():
        if id(layer) not in replaced:
            flat = layer.weight.detach().reshape(layer.weight.shape[0], -1)
            replaced[id(layer)] = SparseLayer(layer, sparse_form(flat, layout)).train(layer.training)
    shared: dict[int, Any] = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared | replaced)  # what the memory knows already is not copied, but put in place


def _able(module: nn.Module) -> dict[str, nn.Linear | nn.Conv1d | nn.Conv2d]:
    """Layers that can be replaced: those of a subclass may do more than they say."""
    found: dict[str, nn.Linear | nn.Conv1d | nn.Conv2d] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if not (isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and _is_plain(layer)):
            continue
        if layer.weight.numel() and not layer.weight.is_meta:
            found[name] = layer
    return found


def _is_plain(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d) or any(hooks) or "forward" in vars(layer):
        return False
    if isinstance(layer, nn.Linear):
        return True
    still = layer.padding in ("valid", "same") or not any(layer.padding)
    return set(layer.kernel_size) == {1} and layer.groups == 1 and still


def _zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


def break_even(
    shape: tuple[int, int] = (2048, 2048),
    *,
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    batches: Sequence[int] = (1, 8, 64),
    layouts: Sequence[str] = ("scattered", "4x1", "16x1", "32x1"),
    repeats: int = 9,
    seed: int = 0,
    like: Tensor | None = None,
) -> Report:
    """Measure from which sparsity on a sparse product is faster than the dense one, on this machine, now.

    Args:
        shape: of the weight, ``(out, in)``.
        sparsities: shares of zeros to try. Weights are random; what is removed is random too, in blocks of the layout.
        batches: columns multiplied at once: examples, tokens, or positions of an image.
        layouts: as for `sparse_form`.
        repeats: dense and sparse products are timed in turn so many times, after one that does not count.
        seed: of the weights and inputs.
        like: a tensor of the dtype and device to measure with; float32 on the processor by default.

    Returns:
        Report: a row a sparsity, batch and layout: ``dense`` and ``sparse`` milliseconds (medians), ``speed-up`` (the
        median of the ratios of neighbouring timings) and ``difference``, the largest of an output against the largest
        output. For every layout and batch the figures name the sparsity from which it pays (and at all higher ones that
        were tried), or "nowhere".

    Raises:
        ValueError: an empty or unknown setting.
    """
    from weightsmith.inspect import Line, Plot, Report

    if not (sparsities and batches and layouts) or repeats < 1 or not all(0 <= s <= 1 for s in sparsities):
        raise Error("break_even needs sparsities in [0, 1], batches, layouts, and at least 1 repeat")
    form = torch.empty(0) if like is None else like
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), progress.task("break even", len(sparsities) * len(layouts) * len(batches)) as advance:
        for sparsity in sorted(sparsities):
            for layout in layouts:
                weight = _pruned(shape, sparsity, layout, seed).to(form)
                sparse = sparse_form(weight, layout)
                for batch in batches:
                    inputs = torch.randn(shape[1], batch, generator=generator_for(seed, "inputs", batch)).to(form)
                    row = {"sparsity": sparsity, "batch": batch, "layout": layout}
                    rows.append(row | _timed(weight, sparse, inputs, repeats))
                    advance(1)
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    plots = []
    for batch in batches:
        lines = []
        for layout in layouts:
            own = [row for row in rows if (row["batch"], row["layout"]) == (batch, layout)]
            lines.append(Line(layout, [row["sparsity"] for row in own], [row["speed-up"] for row in own]))
            figures[f"{layout}, batch {batch}: pays from"] = _pays_from(own)
        plots.append(Plot(f"Speed-up, batch {batch}", "share of zeros", "dense time over sparse", lines, log="y"))
    notes = [
        f"{shape[0]} x {shape[1]}, {form.dtype}; another machine, more threads or another load give other figures.",
        "At one sparsity, blocks of rows keep worse weights than scattered ones: compare quality too.",
    ]
    return Report("Where sparse products pay", figures, rows, plots, notes)


def _pruned(shape: tuple[int, int], sparsity: float, layout: str, seed: int) -> Tensor:
    """Random weights of which random ones, in blocks, are zero."""
    generator = generator_for(seed, "weights")
    weight, score = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    structure = "element" if layout in ("auto", "scattered") else layout
    return by_score({"w": weight}, {"w": score}, sparsity, structure=structure)["w"]


def _timed(weight: Tensor, sparse: nn.Module, inputs: Tensor, repeats: int) -> dict[str, float]:
    expected, found = weight @ inputs, sparse(inputs)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    pairs = [(_seconds(lambda: weight @ inputs), _seconds(lambda: sparse(inputs))) for _ in range(repeats)]
    dense, skipped = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"dense": 1e3 * dense, "sparse": 1e3 * skipped, "speed-up": ratio, "difference": difference}


def _seconds(call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    made = call()
    if made.is_cuda:
        torch.cuda.synchronize(made.device)
    return time.perf_counter() - begin


def _pays_from(rows: Sequence[dict[str, Any]]) -> float | str:
    """The lowest sparsity at and above which every one was faster."""
    lowest: float | str = "nowhere"
    for row in sorted(rows, key=lambda row: -row["sparsity"]):
        if not row["speed-up"] > 1:
            break
        lowest = row["sparsity"]
    return lowest


@card(
    paper="Mishra et al. 2021, 'Accelerating Sparse Deep Neural Networks' (the hardware); PyTorch's "
    "torch.sparse.to_sparse_semi_structured (the kernels)",
    unit="model",
    departs="none of its own: it finds the layers, checks them, and says what it left alone",
)
def to_semi_structured(module: nn.Module, *, pattern: Pattern = "*") -> list[str]:
    """Put 2:4 sparse linear layers onto the kernels of graphics cards that skip their zeros, in place.

    Args:
        module: on a CUDA device of compute capability 8.0 or more, in float16 or bfloat16; pruned to ``"2:4"``.
        pattern: names of the weights.

    Returns:
        The names of the weights that were put there: those of linear layers whose every four neighbours along a row
        have at most two that are not zero, and whose sides the kernels take (a row of a multiple of 64, 32 rows). They
        are no longer trained. Other layers stay as they are.

    Raises:
        ValueError: no such device, no layer that fits, or none that is 2:4.
    """
    able = {f"{name}.weight".lstrip("."): layer for name, layer in module.named_modules()}
    chosen = {n: m for n, m in able.items() if isinstance(m, nn.Linear) and _is_plain(m) and matches(pattern, n)}
    if not chosen:
        raise Error(f"no linear layer fits {pattern!r}")
    device = next(iter(chosen.values())).weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise Error(
            f"2:4 kernels need a CUDA device of compute capability 8.0 or more; the model lies on {device}. On a "
            "processor 2:4 brings no speed; see weightsmith.prune.execute for higher sparsity"
        )
    sparse = {name: layer for name, layer in chosen.items() if _is_two_of_four(layer.weight)}
    if not sparse:
        raise Error(f'none of {listed(list(chosen))} is 2:4 in float16 or bfloat16; prune(..., sparsity="2:4") first')
    for layer in sparse.values():
        made = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(made, requires_grad=False)
    return list(sparse)


def _is_two_of_four(weight: Tensor) -> bool:
    rows, inputs = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16) or rows % 32 or inputs % 64 or not weight.numel():
        return False
    return bool(((weight.detach().reshape(-1, 4) != 0).sum(dim=1) <= 2).all())
