"""The signature of averaging along a run, and how a loop with a memory looks in this library.

State (what the next step needs) stands apart from information (what a person wants to see).
`init` makes the state, `step` returns the next one; `Average` is a thin shell for plain loops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.lifting import checked_options, dressed, options_of
from weightsmith.weights import Step, Weights, open, same_names, working_dtype

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class State:
    """What the next step needs."""

    count: int
    kept: Mapping[str, Tensor]
    """float32 (or wider) shadows of the float tensors, and the latest of the others; tied names share one."""
    dtypes: Mapping[str, torch.dtype]
    """Of the model, for what comes out."""


@dataclass(frozen=True)
class Info:
    """What a person wants to see."""

    count: int
    moved: float
    """Distance that the average moved in this step."""


def init(model: Source) -> State:
    """The first moment, alone."""
    weights = open(model)
    made: dict[int, Tensor] = {}
    for name in weights:
        node = weights.node(name)
        if id(node) not in made:
            made[id(node)] = weights[name].detach().to(working_dtype(node.spec.dtype), copy=True)
    kept = {name: made[id(weights.node(name))] for name in weights}
    return State(1, kept, {name: spec.dtype for name, spec in weights.specs.items()})


def step(kernel: Kernel, state: State, model: Source, **options: Any) -> tuple[State, Info]:
    """Fold the next moment in. The state that went in is not changed."""
    weights = open(model)
    same_names(state.kept, weights, f"{kernel.__name__} needs the same tensors at every step")
    made: dict[int, Tensor] = {}
    moved = 0.0
    for name, old in state.kept.items():
        if id(old) in made:
            continue
        latest = weights[name].detach().to(old.device)
        if latest.shape != old.shape:
            raise Error(f"{name} was {list(old.shape)} and is {list(latest.shape)} now")
        if old.is_floating_point():
            made[id(old)] = kernel(old, latest.to(old.dtype), state.count, **options)
            moved += float((made[id(old)] - old).double().square().sum())
        else:
            made[id(old)] = latest.clone()
    kept = {name: made[id(old)] for name, old in state.kept.items()}
    return State(state.count + 1, kept, state.dtypes), Info(state.count + 1, moved**0.5)


class Average:
    """An average that grows along a run.

    >>> average = ws.average.swa()
    >>> for value in (1.0, 2.0, 6.0):
    ...     info = average.update({"w": torch.tensor([value])})
    >>> average.weights()["w"]
    tensor([3.])
    """

    def __init__(self, kernel: Kernel, **options: Any):
        checked_options(kernel, options)
        self.kernel, self.options = kernel, options
        self.state: State | None = None

    def update(self, model: Source) -> Info:
        """Fold in the model as it is now."""
        if self.state is None:
            self.state = init(model)
            return Info(1, 0.0)
        self.state, info = step(self.kernel, self.state, model, **self.options)
        return info

    def weights(self, dtype: torch.dtype | str | None = None) -> Weights:
        """The average as `Weights`.

        Args:
            dtype: of the floats; those of the model by default. ``"float32"`` keeps all that was added up.
        """
        if self.state is None:
            raise Error("there is no average yet: call update(model) first")
        dtypes = self.state.dtypes
        found = Weights.of(self.state.kept).cast((lambda name: dtypes[name]) if dtype is None else dtype)
        said = {"count": self.state.count, **options_of(self.kernel), **self.options}
        found.lineage = Step(f"average.{self.kernel.__name__}", said)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        if self.state is None:
            return {}
        return {"count": self.state.count, "kept": dict(self.state.kept), "dtypes": dict(self.state.dtypes)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.state = State(saved["count"], dict(saved["kept"]), dict(saved["dtypes"])) if saved else None


def lift(kernel: Kernel) -> Callable[..., Average]:
    """A function that starts an `Average`, from a kernel on tensors.

    Called with tensors the public function is the kernel.
    """

    def average(*tensors: Tensor, **options: Any) -> Any:
        return kernel(*tensors, **options) if tensors else Average(kernel, **options)

    return dressed(average, kernel, ())
