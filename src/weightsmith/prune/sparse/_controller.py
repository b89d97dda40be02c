"""A rule put on an optimizer: the training loop stays as it is, and weights outside the masks stay exactly zero.

Two hooks do it. Before a step, gradients of weights that are not there are set to zero, so that nothing the optimizer
remembers grows where no weight is; what a rule wants to know of them is kept aside first. After a step, masks move if
they are due, and whatever momentum or decay did to weights outside is undone. The hooks run where ``optimizer.step()``
runs, so gradients may be accumulated, scaled, clipped and reduced over processes as before, and a step that a gradient
scaler skips does not count.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, listed
from weightsmith.prune.room import chosen_targets
from weightsmith.prune.sparse._exchange import apportioned, highest
from weightsmith.prune.sparse._rules import Moment, Rule, drawn, updated
from weightsmith.weights import Pattern, Weights, open

Densities = Literal["erk", "uniform"] | Mapping[str, float]

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "step_size")
"""What optimizers divide by: a new weight begins with the mean of the others; from zero its steps would be huge."""


@dataclass(frozen=True)
class Info:
    """What the last change of the masks did."""

    step: int
    sparsity: float
    """Share outside the masks."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> weights that are there."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> weights that were there and are not."""
    grown: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> weights that were not there and are."""


def control(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rule: Rule,
    *,
    densities: Densities = "erk",
    masks: Mapping[str, Tensor] | None = None,
    pattern: Pattern | None = None,
    seed: int = 0,
    rescale: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Controller:
    """Let a rule of sparse training stand on an optimizer; ``loss.backward(); optimizer.step()`` stay as they are.

    Weights outside the masks are zero from now on, whatever momentum and weight decay want. Gradients that reach the
    optimizer are masked too, but for `sparse_momentum` and while `soft_shrinkage` shrinks, which need them dense. To
    clip gradients by the norm of those that count, call `Controller.mask_gradients` before. Processes that see the same
    averaged gradients (``DistributedDataParallel``) move their masks alike. Of sharded parameters (``fully_shard``
    before, then this) each process holds masks of its own shard, and whole tensors meet one at a time at a change.
    Optimizers that ask for a closure (LBFGS) go with `static` alone. For the loops of Hugging Face and Lightning see
    ``weightsmith.prune.sparse.callbacks``. A copy (``copy.deepcopy``) of the three together goes its own way; without
    the controller the copy of an optimizer has no masks.

    A byte a weight is held, and a step passes over gradients and weights once more. A change of the masks takes 12
    bytes a weight of the largest tensor (of all, of scope ``"global"``), and a copy of the gradients if the rule asks
    for them.

    Args:
        model: trained by ``optimizer``; its weights outside the masks are set to zero at once. Names are those of the
            module inside ``DistributedDataParallel`` or ``torch.compile``.
        optimizer: any of PyTorch's kind. Parameters that are added to it later are not controlled.
        rule: such as ``rigl(0.9, every=100, stop=10_000)``.
        densities: how the weights are shared among tensors: ``"erk"`` (small tensors keep more), ``"uniform"``, or
            tensor -> share kept in the end (`weightsmith.prune.allocation` returns shares removed: one less each).
            A rule of scope ``"global"`` asks for it at the start alone.
        masks: boolean, to begin with, instead of random ones; also `Weights`. For a model that is trained already:
            ``ws.prune.magnitude(model, 0.9, action="mask")``.
        pattern: which parameters; by default matrices and convolutions, but not embeddings and heads
            (`weightsmith.prune.prunable`, by their usual names), of those that the optimizer trains, or those of
            ``masks`` or of densities by tensor. Tied ones count once.
        seed: of random masks and of random growth; the same in all processes.
        rescale: divide weights that are there at the start by the root of their tensor's density, so that values are
            about as large as in the dense network. For fresh weights: without it, or layers that normalise, a network
            that begins very sparse may learn next to nothing.
        state: of `Controller.state_dict`, to go on from; weights are then as they were and nothing is drawn.

    Returns:
        Controller: ``masks``, ``sparsity``, ``info``, ``state_dict()``, ``close()``.

    Raises:
        Error: no parameter to prune, masks or densities that do not fit, momentum that the optimizer has not, tensors
            that a controller on this optimizer holds already, weights that a parametrization computes.

    >>> model = nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> masks = control(model, optimizer, ws.prune.sparse.rigl(0.75, every=2, stop=6))
    >>> for step in range(8):
    ...     model(torch.ones(2, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> int((model.weight != 0).sum()), masks.sparsity, masks.info.step
    (8, 0.75, 6)
    """
    if not isinstance(model, nn.Module) or not isinstance(rule, Rule):
        raise Error(
            "control takes a module, its optimizer and a rule such as rigl(0.9, every=100, stop=10_000); got "
            f"{type(model).__name__} and {rule!r}"
        )
    model, optimizer = _unwrapped(model), _innermost(optimizer)
    _check_optimizer(optimizer, rule)
    given = masks if masks is not None else densities
    if pattern is None and isinstance(given, Mapping):
        pattern = _names_of(model, given)
    parameters = _controlled(model, optimizer, pattern)
    _check_alone(optimizer, parameters)
    rule, shares = _planned(rule, densities, masks, parameters, state)
    made = Controller(parameters, optimizer, rule, shares, seed)
    if state is not None:
        made.load_state_dict(state)
    else:
        made.set_masks(made.first_masks() if masks is None else masks)
        if rescale:
            made.rescale()
    made.attach()
    return made


class Controller:
    """Masks that follow a rule, on an optimizer; made by `control`.

    Attributes:
        step: steps of the optimizer so far, without those that were skipped.
        info: of the last change.
        rule: what it follows.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        shares: Callable[[float], Mapping[str, float]],
        seed: int,
    ):
        self.step, self.rule, self.seed = 0, rule, seed
        self._parameters, self._optimizer, self._shares = dict(parameters), optimizer, shares
        self._out = {
            name: torch.zeros(local(p).shape, dtype=torch.bool, device=p.device) for name, p in parameters.items()
        }
        self._gradients: dict[str, Tensor] = {}
        self.info = Info(0, 0.0)
        self._hooks: list[Any] = []

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: hooks go on the copied optimizer, which has lost those of the original."""
        self.__dict__.update(state, _hooks=[])
        if state["_hooks"]:
            self.attach()

    def __repr__(self) -> str:
        return f"Controller({self.rule.name}, step={self.step}, sparsity={self.sparsity:.4g})"

    @property
    def masks(self) -> Weights:
        """True where a weight is there (of `soft_shrinkage`, until it ends: where it does not shrink)."""
        return Weights.of({name: ~mask for name, mask in self._whole_out().items()})

    @property
    def sparsity(self) -> float:
        """Share outside the masks, of all tensors together."""
        out = sum(int(mask.sum()) for mask in self._whole_out().values())
        return out / max(sum(p.numel() for p in self._parameters.values()), 1)

    def attach(self) -> None:
        """Put the hooks on; `control` does."""
        if not self._hooks:
            self._hooks = [
                self._optimizer.register_step_pre_hook(self._before),
                self._optimizer.register_step_post_hook(self._after),
            ]

    def close(self) -> None:
        """Take the hooks off; weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._gradients = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step needs; tensors and plain values, so ``torch.save`` and a safe load will do.

        Of sharded parameters, masks are gathered: all processes call it.
        """
        whole = {name: (~mask).clone() for name, mask in self._whole_out().items()}
        return {"rule": self.rule.name, "step": self.step, "seed": self.seed, "masks": whole}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; weights outside the masks become zero.

        The optimizer has a state of its own. `control` without ``state=`` has set weights outside its first masks to
        zero: load the model's weights after it, or give it ``state=``.
        """
        if saved.get("rule") != self.rule.name:
            raise Error(f"this is the state of {saved.get('rule')!r}; the rule is {self.rule.name!r}")
        self.step, self.seed = int(saved["step"]), int(saved["seed"])
        self.set_masks(saved["masks"])

    def mask_gradients(self) -> None:
        """Set gradients of weights that are not there to zero; done before each step in any case.

        Called after ``scaler.unscale_`` and before ``clip_grad_norm_``, the norm is that of what the optimizer sees.
        """
        if self._skipped():
            return
        rule, next_step = self.rule, self.step + 1
        keep = rule.grow == "gradient" and rule.due(next_step) and rule.fraction_at(next_step) > 0
        for name, parameter in self._parameters.items():
            gradient, out = parameter.grad, self._out_of(name)
            if gradient is None:
                self._gradients.pop(name, None)
                continue
            if gradient.layout != torch.strided:
                raise Error(f"the gradient of {name} is sparse (Embedding(sparse=True)?): leave it out of pattern=")
            own = local(gradient.detach())
            # Zeros everywhere outside, and known already: this was called before in the same step. Those of a fused
            # optimizer may still be scaled; only their order counts.
            if keep and (name not in self._gradients or bool((own[out] != 0).any())):
                self._gradients[name] = gradient.detach().clone()
            if not (rule.dense_momentum or rule.soft(next_step)):
                own.masked_fill_(out, 0)

    def first_masks(self) -> dict[str, Tensor]:
        """Random masks with exactly as many weights as the rule begins with."""
        first = self.rule.initial if self.rule.initial is not None else self.rule.sparsity
        if self.rule.shrink:
            first = 0.0
        numels = {name: p.numel() for name, p in self._parameters.items()}
        total = sum(numels.values())
        counts = apportioned(self._shares(first or 0.0), total - round((first or 0.0) * total), numels)
        shapes = {name: p.shape for name, p in self._parameters.items()}
        return {
            name: highest(drawn(shapes[name], self.seed, name, 0), counts[name])
            if counts[name] < numels[name]
            else torch.ones(shapes[name], dtype=torch.bool)
            for name in numels
        }

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Other masks from now on, ``[*shape]`` bool; weights outside become zero.

        Raises:
            Error: a tensor without mask, a mask without tensor, another shape or dtype.
        """
        check_masks(masks, self._parameters)
        for name, parameter in self._parameters.items():
            self._out[name] = ~shard_like(masks[name].to(parameter.device), parameter)
        if not self.rule.soft(self.step):
            self._hold(1.0)
        self._tell(dict.fromkeys(self._parameters, 0), dict.fromkeys(self._parameters, 0))

    @torch.no_grad()
    def rescale(self) -> None:
        """Divide the weights of each tensor by the root of its density; `control` does, with ``rescale=True``."""
        for name, count in self.info.kept.items():
            if count:
                self._parameters[name].mul_(math.sqrt(self._parameters[name].numel() / count))

    # What the hooks do

    def _skipped(self) -> bool:
        """Whether a gradient scaler found infinities and lets a fused optimizer do nothing."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _before(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.mask_gradients()
            return None

        def masked() -> Any:
            loss = closure()
            self.mask_gradients()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": masked}
        return (args[0], masked, *args[2:]), kwargs

    @torch.no_grad()
    def _after(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._skipped():
            return
        self.step += 1
        if self.rule.due(self.step):
            self._move()
        self._gradients = {}
        self._hold(self.rule.shrink if self.rule.soft(self.step) else 1.0)

    def _out_of(self, name: str) -> Tensor:
        """Where weights are not there; follows a model that was moved to another device."""
        out = self._out[name] = self._out[name].to(self._parameters[name].device)
        return out

    def _hold(self, amount: float) -> None:
        """Weights outside the masks: zero, or a little smaller."""
        for name, parameter in self._parameters.items():
            own, out = local(parameter.detach()), self._out_of(name)
            if amount >= 1:
                own.masked_fill_(out, 0)
            else:
                own.copy_(torch.where(out, own * (1 - amount), own))

    def _move(self) -> None:
        """A change of the masks, and of what the optimizer remembers of weights that went or came."""
        before = _Whole({name: ~shard(out, self._parameters[name]) for name, out in self._out.items()})
        momenta = self._momenta() if self.rule.dense_momentum else {}
        moment = Moment(
            self.step, _Whole(self._parameters), before, _Whole(self._gradients), _Whole(momenta), self.seed
        )
        masks = updated(self.rule, moment, self._shares(self.rule.sparsity_at(self.step)))
        dropped, grown = {}, {}
        for name, mask in masks.items():
            was, parameter = before[name], self._parameters[name]
            dropped[name], grown[name] = int((was & ~mask).sum()), int((mask & ~was).sum())
            came = shard_like(mask & ~was, parameter)
            self._out[name] = ~shard_like(mask, parameter)
            if not (self.rule.dense_momentum or self.rule.shrink):
                self._forget(name, came)
        self._tell(dropped, grown)

    def _forget(self, name: str, came: Tensor) -> None:
        """Nothing is remembered of weights that went, and of those that came only how steep others are."""
        parameter = self._parameters[name]
        own, out = local(parameter), self._out[name]
        for key, value in self._optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape or not own.dim():
                continue
            value, stayed = local(value), ~(out | came)
            value.masked_fill_(out | came, 0)
            if key in SECOND_MOMENTS:
                mean = (value.sum(dtype=torch.float32) / stayed.sum().clamp(min=1)).to(value.dtype)
                value.copy_(torch.where(came, mean, value))

    def _momenta(self) -> dict[str, Tensor]:
        found = {name: momentum_of(self._optimizer.state.get(p, {})) for name, p in self._parameters.items()}
        stepped = any(self._optimizer.state.get(p) for p in self._parameters.values())
        if stepped and all(momentum is None for momentum in found.values()):
            raise Error(
                f"{self.rule.name} asks where the momentum is large, but {type(self._optimizer).__name__} remembers "
                "none; take an optimizer with momentum, or rigl, which asks for gradients"
            )
        return {name: momentum for name, momentum in found.items() if momentum is not None}

    def _whole_out(self) -> Mapping[str, Tensor]:
        return _Whole({name: shard(out, self._parameters[name]) for name, out in self._out.items()})

    def _tell(self, dropped: Mapping[str, int], grown: Mapping[str, int]) -> None:
        kept = {name: int((~out).sum()) for name, out in self._whole_out().items()}
        total = max(sum(p.numel() for p in self._parameters.values()), 1)
        self.info = Info(self.step, 1 - sum(kept.values()) / total, kept, dropped, grown)


# Parts of the whole


class _Whole(Mapping[str, Tensor]):
    """Tensors by name, those that are spread over processes gathered when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor.full_tensor() if _sharded(tensor) else tensor  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds: a view."""
    return tensor.to_local() if _sharded(tensor) else tensor


def shard(own: Tensor, like: Any) -> Tensor:
    """A part as that of a tensor that is spread as another one is."""
    if not _sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that every process has whole."""
    if not _sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def momentum_of(state: Mapping[str, Any]) -> Tensor | None:
    """What an optimizer remembers of a parameter's gradients, divided by their size where it knows that too."""
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    if isinstance(first, Tensor) and isinstance(second, Tensor) and second.shape == first.shape:
        return first / (second.sqrt() + 1e-8)
    if isinstance(first, Tensor):
        return first
    found = state.get("momentum_buffer")
    return found if isinstance(found, Tensor) else None


# What is checked before anything is changed


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside wrappers that have no hooks of their own."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that only put a word before its names; masks and seeds go by its own."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def _names_of(model: nn.Module, given: Mapping[str, Any]) -> Pattern:
    """Where something is said by tensor, those are the tensors."""
    known = dict(model.named_parameters(remove_duplicate=False))
    alien = [name for name in given if name not in known]
    if alien or not given:
        raise Error(
            f"there is no parameter {listed(alien)}; densities= and masks= go by the names of model's parameters"
        )
    return frozenset(given).__contains__


def _check_optimizer(optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty and rule.every:
        raise Error(
            f"{type(optimizer).__name__} calls its closure several times a step and remembers whole directions; masks "
            "that move would not fit them: use static, or another optimizer"
        )
    if rule.dense_momentum and all(not ("betas" in g or g.get("momentum")) for g in optimizer.param_groups):
        raise Error(
            f"{rule.name} asks where the momentum is large, but {type(optimizer).__name__} has none: give it "
            "momentum=0.9, or take rigl, which asks for gradients"
        )


def _check_alone(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Two controllers on one tensor would each undo what the other grows."""
    own = {id(p): name for name, p in parameters.items()}
    for hook in optimizer._optimizer_step_post_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, Controller) and any(id(p) in own for p in other._parameters.values()):
            both = [own[id(p)] for p in other._parameters.values() if id(p) in own]
            raise Error(f"{other!r} holds {listed(both)} already: close() it first, or leave them out of pattern=")


def _controlled(model: nn.Module, optimizer: torch.optim.Optimizer, pattern: Pattern | None) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    names = chosen_targets(open(model), pattern)
    computed = [name for name in names if "parametrizations." in name]
    if pattern is None and computed:
        raise Error(
            f"weights are computed from {listed(computed)} by a parametrization; take it off "
            "(weightsmith.adapt.fold) before, or say with pattern= what to prune"
        )
    found = {name: parameters[name] for name in names if name in parameters and id(parameters[name]) in trained}
    if not found:
        raise Error(f"the optimizer trains none of {listed(names)}; is it of this model, and made after it was moved?")
    if pattern is not None and len(found) < len(names):
        left = [name for name in names if name not in found]
        raise Error(f"the optimizer does not train {listed(left)}, or they are frozen; leave them out of pattern=")
    return found


def _planned(
    rule: Rule,
    densities: Densities,
    masks: Mapping[str, Tensor] | None,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Any] | None,
) -> tuple[Rule, Callable[[float], dict[str, float]]]:
    """The rule with its sparsity, and ``sparsity -> {tensor: weights there}``."""
    numels = {name: p.numel() for name, p in parameters.items()}
    total = sum(numels.values())
    if masks is None and state is not None and not isinstance(densities, Mapping) and rule.sparsity is None:
        masks = state["masks"]
    if masks is not None:
        check_masks(masks, parameters)
        counts = {name: float(masks[name].sum()) for name in parameters}
        implied = 1 - sum(counts.values()) / max(total, 1)
        ends = {name: counts[name] / max(numels[name], 1) for name in parameters}
        if rule.initial is not None:
            if rule.sparsity is not None and implied > rule.sparsity:
                raise Error(f"masks= leaves out {implied:.4g}, more than sparsity={rule.sparsity:g} in the end")
            rule = dataclasses.replace(rule, initial=implied)
        else:
            rule = _agreed(rule, implied, "masks=")
            return rule, _towards(ends, numels, implied)
    if isinstance(densities, Mapping):
        ends = _checked_densities(densities, parameters)
        implied = 1 - sum(ends[name] * numels[name] for name in numels) / max(total, 1)
        rule = _agreed(rule, implied, "densities=")
        return rule, _towards(ends, numels, implied)
    if densities not in ("erk", "uniform"):
        raise Error(f"densities is 'erk', 'uniform' or tensor -> share kept, got {densities!r}")
    rule.sparsity_at(0)  # says what is missing
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if p.numel()}

    def shares(sparsity: float) -> dict[str, float]:
        if densities == "uniform":
            return {name: (1 - sparsity) * count for name, count in numels.items()}
        from weightsmith.prune.structured import erk_densities

        found = erk_densities(shapes, 1 - sparsity)
        return {name: found.get(name, 0.0) * count for name, count in numels.items()}

    return rule, shares


def _towards(ends: Mapping[str, float], numels: Mapping[str, int], last: float) -> Callable[[float], dict[str, float]]:
    """On the way to given densities, each tensor has lost the same part of what it will lose."""

    def shares(sparsity: float) -> dict[str, float]:
        part = sparsity / last if last > 0 else 0.0
        return {name: (1 - part * (1 - ends[name])) * count for name, count in numels.items()}

    return shares


def _agreed(rule: Rule, implied: float, option: str) -> Rule:
    if rule.sparsity is not None and not math.isclose(rule.sparsity, implied, abs_tol=0.005):
        turned = option == "densities=" and math.isclose(rule.sparsity, 1 - implied, abs_tol=0.005)
        raise Error(
            f"{option} leaves out {implied:.4g} of the weights, the rule {rule.sparsity:g}; leave sparsity out "
            f"({rule.name}(None, ...)), or make them agree"
            + ("; are these shares removed? densities are one less each" if turned else "")
        )
    if implied >= 1:
        raise Error(f"{option} leaves no weight at all")
    return dataclasses.replace(rule, sparsity=implied)


def _checked_densities(densities: Mapping[str, float], parameters: Mapping[str, Any]) -> dict[str, float]:
    left = [name for name in parameters if name not in densities]
    if left or any(name not in parameters for name in densities):
        other = [name for name in densities if name not in parameters]
        raise Error(f"densities= and the tensors do not fit: {listed(left or other)}; say which with pattern=")
    wrong = [name for name, share in densities.items() if not 0 <= share <= 1]
    if wrong:
        raise Error(f"densities of {listed(wrong)}: shares kept are from 0 to 1")
    return {name: float(densities[name]) for name in parameters}


def check_masks(masks: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> None:
    """An error where masks are not boolean tensors of exactly these names and shapes."""
    left = [name for name in parameters if name not in masks] or [name for name in masks if name not in parameters]
    if left:
        raise Error(f"masks and the tensors do not fit: {listed(left)}; say which with pattern=")
    for name, parameter in parameters.items():
        if masks[name].dtype != torch.bool or masks[name].shape != parameter.shape:
            raise Error(
                f"the mask of {name} is {masks[name].dtype} {list(masks[name].shape)}; needed is a boolean one of "
                f"{list(parameter.shape)}"
            )
