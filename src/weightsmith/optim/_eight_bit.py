"""What an optimizer remembers of every weight, in a byte instead of four.

An optimizer needs its states for a moment only, while it moves the parameter they belong to. Between two such moments
they are kept as codes: blocks of 2048 values that share one scale, on a table whose values lie closer the smaller they
are. Any optimizer that keeps tensors of its parameters' shapes works unchanged inside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.codecs import BlockCodec, Blocks

NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "step_size")
"""States that are at least 0, as PyTorch's optimizers and those that follow them call them: a table without a sign."""

WHOLE = ("ax",)
"""States that are weights themselves (an average of them), of which a byte is too little."""

ENDINGS = (".codes", ".scale", ".offset", ".dtype")
"""What stands in the state dict for a state, each behind its name; the last, empty, only where its dtype differs from
the parameter's."""

TOGETHER = 2**22
"""Values of parameters that one inner step moves together, unless one parameter alone has more."""

KEPT, CODED = "whole_states", "coded_states"
"""Under these words a group says which of its parameters' states stay whole and, in a state dict, how others are coded.
"""


@card(
    paper="Dettmers, Lewis, Shleifer, Zettlemoyer 2022, '8-bit Optimizers via Block-wise Quantization'",
    covers=("8-bit-optimizers-block-wise-quantization",),
    unit="model",
    claim="a language model trained with states of 8 bits ends within 1 % of the loss of one with states of 32",
    departs="works around any optimizer instead of being one, so a state is decoded and coded again a few parameters "
    "at a time, not a block at a time; ties go to the lower value",
)
def eight_bit(
    optimizer: Optimizer,
    *,
    codec: BlockCodec | None = None,
    smallest: int = 4096,
    keep: Iterable[Tensor] = (),
    keep_states: Iterable[str] = WHOLE,
    never_negative: Iterable[str] = NEVER_NEGATIVE,
) -> Optimizer:
    r"""Let an optimizer keep its states as codes: ``eight_bit(torch.optim.AdamW(model.parameters()))``.

    Per block of a state :math:`s` and for a table :math:`q` between -1 and 1

    .. math:: c_i = \arg\min_j \Big| q_j - \frac{s_i}{\max_k |s_k|} \Big|, \qquad s_i \approx q_{c_i} \max_k |s_k|

    Param groups, schedulers, hooks, ``GradScaler``, ``foreach`` and ``fused`` work as before; make schedulers
    afterwards. ``state_dict`` holds plain tensors, ``state.codes`` and ``state.scale`` for each ``state``, and a run
    goes on from it bit for bit; it takes states that are not coded as well, and codes them. `whole_states` leads back.
    Of sharded parameters (``fully_shard`` before) each process codes its own shard, and ``state_dict`` holds the states
    decoded, so that they can be sharded otherwise.

    While a step runs, states of `TOGETHER` values, or of one parameter if that has more, are there as numbers.

    Args:
        optimizer: changed in place: its class becomes one that derives from its own. Its states are coded at once.
        codec: ``BlockCodec()`` where None: 8 bits, dynamic table, blocks of 2048. Others: ``BlockCodec(bits=4,
            block=128)``. ``signed`` is set as a state needs it; one that rounds at random draws from PyTorch's own
            generator.
        smallest: parameters of fewer values keep their states whole.
        keep: parameters that do, too; the paper keeps those of embeddings: ``keep=embeddings(model)``. A tensor that
            the optimizer does not move is passed over.
        keep_states: names of states that stay whole.
        never_negative: names of states that are at least 0.

    Returns:
        The same optimizer.

    Raises:
        Error: LBFGS, whose states are not a parameter's alone; ``differentiable=True``; an optimizer that is coded
            already or that a scheduler holds; ``keep`` is not tensors.

    >>> layer = torch.nn.Linear(64, 64)
    >>> optimizer = eight_bit(torch.optim.AdamW(layer.parameters(), lr=1e-3))
    >>> layer(torch.ones(1, 64)).sum().backward()
    >>> optimizer.step()
    >>> type(optimizer).__name__, isinstance(optimizer, torch.optim.AdamW)
    ('EightBitAdamW', True)
    >>> list(optimizer.state[layer.weight])
    ['step', 'exp_avg.codes', 'exp_avg.scale', 'exp_avg_sq.codes', 'exp_avg_sq.scale']
    >>> optimizer.state[layer.weight]["exp_avg.codes"].dtype
    torch.uint8
    """
    _check(optimizer)
    given = list(keep)
    if not all(isinstance(one, Tensor) for one in given):
        raise Error("eight_bit: keep is a list of parameters, such as embeddings(model)")
    kept = {id(one) for one in given}
    settings = (codec or BlockCodec(), int(smallest), tuple(keep_states), tuple(never_negative))
    changed = cast(Any, optimizer)
    changed.__class__ = _coded_class(type(optimizer), *settings)
    if kept:
        for group in optimizer.param_groups:
            group[KEPT] = [id(parameter) in kept for parameter in group["params"]]
    changed._patch_step_function()  # hooks of a step run around the whole of it
    changed.code_states()
    return optimizer


def whole_states(optimizer: Optimizer) -> Optimizer:
    """The way back: states as numbers and the class that the optimizer had; in place.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> type(whole_states(eight_bit(optimizer))).__name__
    'SGD'
    """
    if not isinstance(optimizer, EightBit):
        raise Error(f"whole_states needs an optimizer that eight_bit changed, got {type(optimizer).__name__}")
    for parameter, state in optimizer.state.items():
        optimizer.decode_states(parameter, state)
    for group in optimizer.param_groups:
        group.pop(KEPT, None)
    cast(Any, optimizer).__class__ = optimizer.inner
    return optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that an optimizer remembers; of sharded ones those of this process.

    >>> state_bytes(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    0
    """
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(_local(tensor).nbytes for tensor in tensors)


class EightBit(Optimizer):
    """What `eight_bit` adds to a class of optimizers; never made by hand."""

    inner: type[Optimizer]
    codec: BlockCodec
    smallest: int
    keep_states: tuple[str, ...]
    never_negative: tuple[str, ...]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:  # type: ignore[override]
        """One step of the optimizer inside, a few parameters at a time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in (groups := self.param_groups):
            parameters, before = group["params"], dict(group)
            whole = self._whole(group)
            try:
                self.param_groups = [group]
                for few in _together(parameters):
                    group.update(before)  # what a group counts, it counts once a step
                    group["params"] = few
                    for parameter in few:
                        self.decode_states(parameter, self.state.get(parameter, {}))
                    _unhooked(self.inner.step)(self, **options)
                    for parameter in few:
                        if id(parameter) not in whole:
                            self._code(parameter, self.state.get(parameter, {}))
            finally:
                group["params"], self.param_groups = parameters, groups
        return loss

    def code_states(self) -> None:
        """Code whatever states should be codes and are not."""
        for group in self.param_groups:
            whole = self._whole(group)
            for parameter in group["params"]:
                if parameter in self.state and id(parameter) not in whole:
                    self._code(parameter, self.state[parameter])

    def decode_states(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Numbers for the codes in a parameter's state, in place."""
        for name in [name.removesuffix(".codes") for name in state if name.endswith(".codes")]:
            codes, scale = state.pop(f"{name}.codes"), state.pop(f"{name}.scale")
            offset, dtype = state.pop(f"{name}.offset", None), state.pop(f"{name}.dtype", parameter).dtype
            local = _local(parameter)
            found = self._codec(name).decode(Blocks(codes, scale, offset, tuple(local.shape), dtype))
            if not local.is_contiguous():  # the order in memory is that of the parameter
                found = torch.empty_like(local, dtype=dtype).copy_(found)
            state[name] = _sharded(found, parameter)

    def state_dict(self) -> dict[str, Any]:
        """As ever, and in each group how states are coded; states of sharded parameters decoded."""
        made = super().state_dict()
        live = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in made["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, live, strict=True):
            if key in made["state"] and _is_sharded(parameter):
                made["state"][key] = dict(made["state"][key])
                self.decode_states(parameter, made["state"][key])
        for group in made["param_groups"]:
            group[CODED] = repr(self.codec)
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """From what `state_dict` gave, or that of the optimizer inside."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            if (told := group.pop(CODED, repr(self.codec))) != repr(self.codec):
                raise Error(f"these states were coded by {told}; this optimizer codes by {self.codec}")
        coded, plain = _divided(state_dict["state"])
        kept = [group.get(KEPT) for group in self.param_groups]
        keys = [key for group in groups for key in group["params"]]
        live = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(keys) == len(live):  # else the optimizer inside says so
            self._check_codes({key: (coded.get(key, {}), one) for key, one in zip(keys, live, strict=True)})
        super().load_state_dict({**state_dict, "state": plain, "param_groups": groups})
        for key, parameter in zip(keys, live, strict=True):
            for name, value in coded.get(key, {}).items():
                self.state[parameter][name] = value.detach().to(_local(parameter).device, copy=True)
        for group, flags in zip(self.param_groups, kept, strict=True):
            group.pop(KEPT, None)
            group.update({} if flags is None else {KEPT: flags})
        self.code_states()

    def __reduce_ex__(self, protocol: Any) -> Any:
        settings = (self.codec, self.smallest, self.keep_states, self.never_negative)
        return _blank, (self.inner, *settings), self.__getstate__()

    def _check_codes(self, coded: Mapping[Any, tuple[Mapping[str, Tensor], Tensor]]) -> None:
        for key, (state, parameter) in coded.items():
            for name in (name.removesuffix(".codes") for name in state if name.endswith(".codes")):
                parts = [state.get(f"{name}{ending}") for ending in (".codes", ".scale", ".offset")]
                found = sum(part.nbytes for part in parts if part is not None)
                if parts[1] is None or found != self.codec.nbytes(_local(parameter).numel()):
                    raise Error(f"state {name} of parameter {key} holds no codes of {list(parameter.shape)}")

    def _codec(self, name: str) -> BlockCodec:
        return dataclasses.replace(self.codec, signed=name not in self.never_negative)

    def _whole(self, group: Mapping[str, Any]) -> set[int]:
        """The parameters of a group whose states stay as they are."""
        flags = group.get(KEPT) or [False] * len(group["params"])
        small = (_local(parameter).numel() < self.smallest for parameter in group["params"])
        return {id(one) for one, flag, few in zip(group["params"], flags, small, strict=True) if flag or few}

    def _code(self, parameter: Tensor, state: dict[str, Any]) -> None:
        for name, value in list(state.items()):
            if name in self.keep_states or not isinstance(value, Tensor) or name.endswith(ENDINGS):
                continue
            if value.shape != parameter.shape or not value.is_floating_point():
                continue
            blocks = self._codec(name).encode(_local(value), check=False)
            del state[name]
            state |= {f"{name}.codes": blocks.codes, f"{name}.scale": blocks.scale}
            if blocks.offset is not None:
                state[f"{name}.offset"] = blocks.offset
            if value.dtype != parameter.dtype:
                state[f"{name}.dtype"] = blocks.scale.new_empty(0, dtype=value.dtype)


def _check(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise Error(f"eight_bit needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, EightBit):
        raise Error(f"the states of this {type(optimizer).__name__} are coded already; whole_states leads back")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise Error("eight_bit needs states that belong to one parameter each; those of LBFGS belong to all")
    if optimizer.defaults.get("differentiable"):
        raise Error("eight_bit cannot pass gradients through codes: differentiable=True")
    if "step" in vars(optimizer):
        raise Error("a scheduler holds this optimizer's step already: call eight_bit before making schedulers")


@functools.lru_cache(maxsize=64)
def _coded_class(inner: type[Optimizer], *settings: Any) -> type[Optimizer]:
    """One class for one kind of optimizer and settings, so that copies share it."""
    names = ("codec", "smallest", "keep_states", "never_negative")
    return type(
        f"EightBit{inner.__name__}", (EightBit, inner), {"inner": inner, **dict(zip(names, settings, strict=True))}
    )


def _blank(inner: type[Optimizer], *settings: Any) -> Optimizer:
    """An optimizer without anything, for copies and pickles."""
    made = _coded_class(inner, *settings)
    return made.__new__(made)


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step inside the hooks, which run once a step and not once a few parameters."""
    return cast(Any, step).__wrapped__ if getattr(step, "hooked", False) else step


def _together(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those that have a gradient, in runs of at most `TOGETHER` values or one parameter."""
    few: list[Tensor] = []
    count = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        numel = _local(parameter).numel()
        if few and count + numel > TOGETHER:
            yield few
            few, count = [], 0
        few.append(parameter)
        count += numel
    if few:
        yield few


def _divided(states: Mapping[Any, Any]) -> tuple[dict[Any, dict[str, Tensor]], dict[Any, Any]]:
    """What is codes and what is not; PyTorch casts all that it loads to the parameter's dtype."""
    coded, plain = {}, {}
    for key, state in states.items():
        named = state if isinstance(state, Mapping) else {}
        coded[key] = {name: value for name, value in named.items() if str(name).endswith(ENDINGS)}
        plain[key] = {n: v for n, v in named.items() if n not in coded[key]} if named else state
    return coded, plain


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _sharded(value: Tensor, like: Any) -> Tensor:
    """A part as the part of a tensor that is sharded as another is."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
