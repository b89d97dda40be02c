"""A model with an adapter merged into it, as a view: nothing is added up before it is read.

LoRA says what fine-tuning changed as a product of two thin matrices. The product belongs to the rows of
the weight one by one, so a run of rows of the merged weight needs the same rows of the base and of one
factor, and the other factor whole: base and adapter stream through, whatever their size.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from weightsmith.adapt import _kernels
from weightsmith.adapt._config import FILE
from weightsmith.adapt._layout import implied, names_by_tensor, names_of, untied_files, way_round, ways_round
from weightsmith.adapt._transposed import Transposed
from weightsmith.adapt.room import Adapter, Delta, Source, checked_rank, opened
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.weights import (
    Entire,
    Inputs,
    Lazy,
    Output,
    PerTensor,
    Reduction,
    Spec,
    Step,
    Weights,
    Work,
    open,
    resolve,
    single,
)
from weightsmith.weights import apply as applied

Edit = Callable[[Lazy, float], Lazy]
"""``(the tensor so far, amount) -> the tensor after``."""


@card(
    paper="Hu et al. 2022, 'LoRA: Low-Rank Adaptation of Large Language Models' (Section 4.1); with rsLoRA "
    "(Kalajdzievski 2023, 'A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA') and DoRA (Liu et al. 2024, "
    "'DoRA: Weight-Decomposed Low-Rank Adaptation', Equation 5)",
    unit="model",
    departs="computed in float32 and rounded once; amount scales the whole change, not the product alone",
)
def apply(
    model: Source,
    adapter: Source,
    amount: PerTensor[float] = 1.0,
    *,
    tied: Literal["keep", "untie"] | None = None,
) -> Weights:
    r"""The model with a LoRA adapter merged into its weights.

    .. math:: W' = W + \lambda\,\frac{\alpha}{r}\,B A

    with :math:`\alpha / \sqrt r` under rsLoRA, and :math:`W' = W + \lambda\,(m\,V / \lVert V \rVert - W)`,
    :math:`V = W + \frac{\alpha}{r} B A`, under DoRA. Linear layers either way round, embeddings,
    convolutions, stacked experts, biases, trained tokens and modules saved whole are all understood.

    Args:
        model: the base; anything that `weightsmith.open` opens.
        adapter: a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors`` or ``.bin``), or a
            `Weights` with that file in ``files``.
        amount: :math:`\lambda`, how much of the change; 1 is what training found, 0 the base. By the name of a
            tensor of the model. What the adapter replaces whole goes that share of the way.
        tied: what becomes of one tensor under two names (embedding and head) where the adapter changes one of
            them: ``"keep"`` changes both, as PEFT's ``merge_and_unload`` does with a LoRA on either;
            ``"untie"`` writes two tensors, which computes what the adapter computed while it was trained.

    Returns:
        Weights: lazy, with the names, dtypes and files of the model.

    Raises:
        Error: a setting or tensor of the adapter that cannot be merged, by name; modules that the model does not
            have; shapes that do not fit; a tied tensor without ``tied=``.

    >>> model = {"fc.weight": torch.eye(2)}
    >>> adapter = ws.Weights.of({
    ...     "base_model.model.fc.lora_A.weight": torch.tensor([[1.0, 0.0]]),
    ...     "base_model.model.fc.lora_B.weight": torch.tensor([[0.0], [3.0]]),
    ... }).with_files({"adapter_config.json": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2}'})
    >>> apply(model, adapter)["fc.weight"]
    tensor([[1., 0.],
            [6., 1.]])
    """
    if tied not in (None, "keep", "untie"):
        raise Error(f"tied is 'keep', 'untie' or None, got {tied!r}")
    base, found = open(model), opened(adapter)
    change = _naming(found, base)
    edits: dict[str, list[Edit]] = {}
    new: dict[str, Lazy] = {}
    for name, node in found.copies.items():
        _add(edits, _target(change(name), base, node.spec.shape), _replacing(node, change(name), found, copy=True))
    for name, node in found.saved.items():
        target = _target(change(name), base, node.spec.shape)
        if target is not None:
            _add(edits, target, _replacing(node, target, found))
        elif _is_saved(name, found):
            new[change(name)] = node  # a head that the base does not have
        else:
            raise Error(f"{found.where}: has {name}, and the model has no {change(name)}")
    rows = {f"{change(module)}.weight": module for module in found.tokens}
    for name, module in rows.items():
        _add(edits, name, _tokens(module, found.tokens[module], found))
    modules: dict[str, list[Delta]] = {}
    for delta in found.deltas:
        modules.setdefault(delta.module, []).append(delta)
    aimed, ways = _aimed(found, base), ways_round(base)
    for module, deltas in modules.items():
        _merge(module, change(module), deltas, aimed, ways, found, base, edits)
    tensors = names_by_tensor(base)
    groups = {name: names_of(name, base, tensors) for name in edits}
    shared = {
        name for name, group in groups.items() if len(group) == 1 or _keeps(name, group, edits, rows, found, tied)
    }
    return _edited(base, found, edits, new, groups, shared, amount, tied)


def _add(edits: dict[str, list[Edit]], name: str | None, edit: Edit) -> None:
    if name is not None:
        edits.setdefault(name, []).append(edit)


def _is_saved(name: str, found: Adapter) -> bool:
    return any(re.search(rf"(^|\.){re.escape(word)}\.", name) for word in found.config.words("modules_to_save"))


# Which tensor of the model a name of the adapter means


def _naming(found: Adapter, base: Weights) -> Callable[[str], str]:
    """From the adapter's names to the model's: the same, or with another start if just one start fits all."""
    modules = list(dict.fromkeys([*(delta.module for delta in found.deltas), *found.tokens]))
    heads = {delta.module for delta in found.deltas if implied(f"{delta.module}.weight", base)}
    known = {name.rpartition(".")[0] for name in base}
    wanted = [module for module in modules if module not in heads] or [
        name.rpartition(".")[0] for name in found.saved if not _is_saved(name, found)
    ]
    unknown = [module for module in wanted if module not in known]
    if not unknown:
        return lambda name: name
    starts = _starts(unknown[0], known)
    fitting = [pair for pair in starts if all(_moved(module, pair) in known for module in wanted)]
    if len(fitting) == 1:
        pair = fitting[0]
        return lambda name: _moved(name, pair) or name
    why = f"they would fit under {listed([repr(new) for _, new in fitting])}; rename one side" if fitting else ""
    raise Error(
        f"{found.where}: {len(unknown)} of {len(wanted)} modules are not in the model ({listed(unknown)}); the model "
        f"has {listed(sorted(known))}" + (f"; {why}" if why else "")
    )


def _starts(module: str, known: set[str]) -> list[tuple[str, str]]:
    """Pairs (start of ``module``, what stands there in the model), for the longest end that the model has."""
    parts = module.split(".")
    for cut in range(len(parts)):
        end = ".".join(parts[cut:])
        found = [name for name in sorted(known) if name == end or name.endswith("." + end)]
        if found:
            old = ".".join(parts[:cut])
            return [(old + "." if old else "", name.removesuffix(end)) for name in found]
    return []


def _moved(name: str, pair: tuple[str, str]) -> str | None:
    old, new = pair
    return new + name.removeprefix(old) if name.startswith(old) else None


def _target(name: str, base: Weights, shape: tuple[int, ...]) -> str | None:
    """The name if the model has it, or if it is a head that stands in the model as its embedding."""
    if name in base:
        return name
    embedding = implied(name, base)
    return name if embedding is not None and base.spec(embedding).shape == shape else None


# What happens to it


def _replacing(new: Lazy, name: str, found: Adapter, copy: bool = False) -> Edit:
    def edit(node: Lazy, amount: float) -> Lazy:
        if new.spec.shape != node.spec.shape:
            raise Error(
                f"{found.where}: replaces {name} {list(node.spec.shape)} by {list(new.spec.shape)}; give the model the "
                "adapter's vocabulary first"
            )
        if copy or amount == 1:
            return Weights({"": new}).cast(node.spec.dtype).node("")
        return applied(_kernels.blended, node, new, spec=node.spec, options={"amount": amount})

    return edit


def _tokens(module: str, rows: Lazy, found: Adapter) -> Edit:
    setting = found.config.record.get("trainable_token_indices")
    if isinstance(setting, Mapping):
        fitting = [value for key, value in setting.items() if module == key or module.endswith(f".{key}")]
        setting = fitting[0] if len(fitting) == 1 else None
    if not isinstance(setting, list) or len(setting) != rows.spec.shape[0]:
        raise Error(
            f"{found.where}: {module} has {rows.spec.shape[0]} trained tokens, "
            f"but trainable_token_indices is {setting!r}"
        )
    indices = [int(index) for index in setting]

    def edit(node: Lazy, amount: float) -> Lazy:
        if node.spec.shape[1:] != rows.spec.shape[1:] or not all(0 <= i < node.spec.shape[0] for i in indices):
            raise Error(f"{found.where}: the trained tokens of {module} do not fit its weight {node.spec}")
        options = {"indices": indices, "amount": amount}
        return applied(_kernels.some_rows, node, Entire(rows), unit="row", spec=node.spec, options=options)

    return edit


def _aimed(found: Adapter, base: Weights) -> dict[str, list[str]]:
    """Module of the model -> those of its parameters that the settings name one by one."""
    # The names in the settings are those of the model it was trained on: what ends alike is meant.
    words = {word.rpartition(".")[2] for word in found.config.words("target_parameters")}
    aimed: dict[str, list[str]] = {}
    for name in base if words else ():
        module, _, leaf = name.rpartition(".")
        if leaf in words:
            aimed.setdefault(module, []).append(name)
    return aimed


def _merge(
    module: str,
    place: str,
    deltas: list[Delta],
    aimed: Mapping[str, list[str]],
    ways: Mapping[str, bool],
    found: Adapter,
    base: Weights,
    edits: dict[str, list[Edit]],
) -> None:
    """The edits of one module: its weight, or several parameters of it, and its bias."""
    parameters = aimed.get(place, [])
    for delta in deltas:
        if parameters and f"{place}.weight" not in parameters:
            name, turned = _parameter(delta, parameters, found, base)
            key = f"{module}.{name.rpartition('.')[2]}"
            _add(edits, name, _experts(delta, key, turned, found))
            continue
        if len(deltas) > 1:
            raise Error(f"{found.where}: {module} has {len(deltas)} deltas, which only target_parameters explains")
        name = f"{place}.weight"
        if name not in base and f"{place}.in_proj_weight" in base:
            raise Error(
                f"{found.where}: {module} is a MultiheadAttention, where PEFT adds the change of out_proj twice; what "
                "such an adapter means depends on the PEFT that trained it, so it is not merged"
            )
        if name not in base and implied(name, base) is None:
            raise Error(f"{found.where}: has a delta for {module}, and the model has no {name}")
        _add(edits, name, _product(delta, name, found, ways))
        if delta.bias is not None:
            bias = name.removesuffix("weight") + "bias"
            if bias not in base:
                raise Error(f"{found.where}: {module} has a lora_B.bias, and the model has no {bias} to add it to")
            _add(edits, bias, _shift(delta, found))


def _shift(delta: Delta, found: Adapter) -> Edit:
    vector, scale = delta.bias, found.config.scale_of(delta.module)

    def edit(node: Lazy, amount: float) -> Lazy:
        return applied(_kernels.added_vector, node, vector, spec=node.spec, options={"scale": scale * amount})

    return edit


def _product(delta: Delta, name: str, found: Adapter, ways: Mapping[str, bool]) -> Edit:
    checked_rank(found, delta, delta.module)
    scale = found.config.scale_of(delta.module)

    def edit(node: Lazy, amount: float) -> Lazy:
        turned = _is_turned(delta, name, node.spec, found, ways)
        lead, rest = (Transposed(delta.a), Transposed(delta.b)) if turned else (delta.b, delta.a)
        if delta.magnitude is None:
            options = {"scale": scale * amount}
            return applied(
                _kernels.added_product, node, lead, Entire(rest), unit="row", spec=node.spec, options=options
            )
        out = delta.b.spec.shape[0]
        if delta.magnitude.spec.numel != out:
            raise Error(
                f"{found.where}: the magnitudes of {delta.module} are {delta.magnitude.spec}, not {out} numbers"
            )
        inputs = Inputs([node, lead, Entire(rest), Entire(delta.magnitude)], "row")
        options = {"scale": scale, "amount": amount}
        if not turned:
            return Output(Work(_kernels.row_magnitudes, inputs, {"": node.spec}, options))
        squares = functools.partial(_kernels.column_squares, scale=scale)
        lengths = Reduction([inputs], functools.partial(single, squares, torch.sqrt))
        return Output(Work(_kernels.column_magnitudes, inputs, {"": node.spec}, options, lengths))

    return edit


def _is_turned(delta: Delta, name: str, spec: Spec, found: Adapter, ways: Mapping[str, bool]) -> bool:
    """Whether a weight is stored ``[in, out]``: told by its shape, then by biases around it, then by the settings."""
    out, into = delta.b.spec.shape[0], delta.a.spec.shape[1:]
    straight, turned = (out, *into), (*into, out)
    if delta.embedding:
        straight = ()
    elif len(spec.shape) != 2:
        turned = ()
    if spec.shape not in (straight, turned) or any(size != 1 for size in delta.b.spec.shape[2:]):
        raise Error(
            f"{found.where}: the factors of {delta.module} make {list(turned if delta.embedding else straight)}, "
            f"but {name} is {list(spec.shape)}"
        )
    if straight == turned:
        told = way_round(name, ways)
        return found.config.transposed if told is None else told
    return spec.shape == turned


def _parameter(delta: Delta, names: list[str], found: Adapter, base: Weights) -> tuple[str, bool]:
    """Which parameter of a module a delta is for, and whether it is ``[experts, in, out]``: told by shapes."""
    out, into = delta.b.spec.shape[0], delta.a.spec.shape[1]
    fitting: list[tuple[str, bool]] = []
    for name in names:
        shape = base.spec(name).shape
        fitting += [(name, False)] if shape[-2:] == (out, into) else []
        fitting += [(name, True)] if len(shape) == 3 and shape[-2:] == (into, out) else []
    if len(fitting) != 1:
        raise Error(
            f"{found.where}: the factors of {delta.module} make {[out, into]} or {[into, out]}, which fits "
            f"{len(fitting)} ways: {listed([f'{name} {list(base.spec(name).shape)}' for name in names])} "
            "(target_parameters)"
        )
    return fitting[0]


def _experts(delta: Delta, key: str, turned: bool, found: Adapter) -> Edit:
    scale = found.config.scale_of(key)

    def edit(node: Lazy, amount: float) -> Lazy:
        count = node.spec.shape[0] if len(node.spec.shape) == 3 else 1
        checked_rank(found, delta, key, count)
        if len(node.spec.shape) == 2:
            options: dict[str, Any] = {"scale": scale * amount}
            kernel, arguments = _kernels.added_product, (delta.b, Entire(delta.a))
        else:
            options = {"scale": scale * amount, "experts": count, "transposed": turned}
            kernel, arguments = _kernels.added_products, (Entire(delta.a), Entire(delta.b))
        return applied(kernel, node, *arguments, unit="row", spec=node.spec, options=options)

    return edit


# The model after it


def _edited(
    base: Weights,
    found: Adapter,
    edits: Mapping[str, list[Edit]],
    new: Mapping[str, Lazy],
    groups: Mapping[str, list[str]],
    shared: set[str],
    amount: PerTensor[float],
    tied: str | None,
) -> Weights:
    """The model with its edited tensors; those of one group stay one tensor where they are ``shared``."""
    for name in (name for name in edits if name in base):
        dtype = base.spec(name).dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise Error(f"{name} is {base.spec(name)}: an adapter is added to floats; dequantize the model first")
    amounts = resolve(amount, [*base, *(name for name in edits if name not in base)], "amount")
    for name, value in amounts.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Error(f"amount is a finite number, got {value!r} for {name}")
    nodes = {name: base.node(name) for name in base}
    files = {name: file for name, file in base.files.items() if name != FILE}
    done: set[str] = set()
    for name, group in groups.items():
        if name in done:
            continue
        source = base.node(name if name in base else group[0])
        if name in shared:
            # Where embedding and head were trained as one, both have the same change: it is made once.
            node = _after(source, edits[name], amounts[name])
            nodes |= {one: node for one in group if one in base}
        else:
            nodes |= {one: _after(source, edits.get(one, []), amounts.get(one, 1.0)) for one in group}
            files |= untied_files(base)
        done.update(group)
    options = {"amount": amount, "scale": _said(found)} | ({"tied": tied} if tied else {})
    step = Step("adapt.apply", options, (base.lineage, found.weights.lineage))
    return Weights(nodes | dict(new), step, files, base.metadata)


def _after(node: Lazy, edits: list[Edit], amount: float) -> Lazy:
    return functools.reduce(lambda node, edit: edit(node, amount), edits, node) if amount else node


def _keeps(
    name: str,
    group: list[str],
    edits: Mapping[str, list[Edit]],
    rows: Mapping[str, str],
    found: Adapter,
    tied: str | None,
) -> bool:
    """Whether a tensor with several names stays one."""
    changed = [one for one in group if one in edits]
    if found.config.ties and len(changed) == len(group):  # PEFT keeps ties of some models only, and then saves both
        return True
    if tied == "keep" and len(changed) > 1:
        raise Error(
            f"{found.where}: changes {listed(changed)} apart, which are one tensor; only tied='untie' can do both"
        )
    if tied is not None:
        return tied == "keep"
    if len(changed) == 1 and changed[0] in rows and len(edits[changed[0]]) == 1:
        return True  # single tokens are trained under all names of a tensor
    raise Error(
        f"{found.where}: changes {name}, which is one tensor with {listed([one for one in group if one != name])}. Say "
        "tied='keep' to change both, as PEFT's merge_and_unload does, or tied='untie' to write two tensors, which "
        "computes what the adapter computed in training"
    )


def _said(found: Adapter) -> float | list[float]:
    scales = sorted({found.config.scale_of(delta.module) for delta in found.deltas})
    return scales[0] if len(scales) == 1 else scales
