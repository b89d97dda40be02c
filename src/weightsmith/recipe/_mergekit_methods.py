"""mergekit's merge methods in our words: which of ours each is, what it takes, and its defaults.

The defaults are mergekit's and not ours, so every option is passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""In place of a default."""


@dataclass(frozen=True)
class Option:
    """A parameter of mergekit and the option of ours that it is."""

    ours: str | None
    """None: it has no effect here."""
    kind: type[float] | type[bool] | type[int] = float
    default: Any = REQUIRED
    note: str = ""
    """Why it has no effect, for a warning."""


@dataclass(frozen=True)
class Method:
    """What a ``merge_method:`` needs."""

    ours: str
    """A name in `weightsmith.merge`."""
    base: Literal["needed", "optional", "merged"]
    """``"merged"``: a base model is one of the models."""
    least: int = 1
    """Models beside the base."""
    most: int | None = None
    shared: Mapping[str, Option] = field(default_factory=dict)
    """One value for a tensor."""
    each: Mapping[str, Option] = field(default_factory=dict)
    """One value for a tensor of each model, but not the base."""
    random: bool = False
    first: bool = False
    """The base is the first of the models."""

    @property
    def parameters(self) -> dict[str, Option]:
        """All by name."""
        return {**self.shared, **self.each}


_WEIGHT = {"weight": Option("weight")}
_MASK = {"int8_mask": Option(None, bool, False, "no masks are kept in memory here")}


def _task_vectors(
    ours: str, *, normalize: bool = False, rescale: bool = False, random: bool = False, **each: float
) -> Method:
    """A method of the family of task arithmetic. ``each`` are defaults of what is cut from the task vectors."""
    cut = {name: Option(name, float, default) for name, default in each.items()}
    idle = "nothing is cut from the task vectors"
    shared = {
        **_MASK,
        "normalize": Option("normalize", bool, normalize),
        "rescale": Option("rescale" if cut else None, bool, rescale, idle),
        "lambda": Option("amount", float, 1.0),
    }
    density = {} if cut else {"density": Option(None, float, 1.0, idle)}
    return Method(ours, "needed", shared=shared, each={**_WEIGHT, **density, **cut}, random=random)


METHODS: dict[str, Method] = {
    "linear": Method("mean", "merged", shared={"normalize": Option("normalize", bool, True)}, each=_WEIGHT),
    "passthrough": Method("passthrough", "merged", most=1, each={"scale": Option("scale", float, None)}),
    "karcher": Method(
        "karcher",
        "merged",
        shared={"max_iter": Option("max_iter", int, 10), "tol": Option("tol", float, 1e-5)},
    ),
    "slerp": Method("slerp", "needed", most=1, shared={"t": Option("t")}, first=True),
    "nuslerp": Method(
        "nuslerp",
        "optional",
        least=2,
        shared={
            "nuslerp_flatten": Option("flatten", bool, True),
            "nuslerp_row_wise": Option("row_wise", bool, False),
        },
        each=_WEIGHT,
    ),
    "multislerp": Method(
        "multislerp",
        "optional",
        shared={"normalize_weights": Option("normalize", bool, True), "eps": Option("eps", float, 1e-8)},
        each=_WEIGHT,
    ),
    "task_arithmetic": _task_vectors("task_arithmetic"),
    "ties": _task_vectors("ties", normalize=True, density=1.0),
    "dare_linear": _task_vectors("dare_linear", rescale=True, random=True, density=1.0),
    "dare_ties": _task_vectors("dare_ties", rescale=True, random=True, density=1.0),
    "della": _task_vectors("della", normalize=True, rescale=True, random=True, density=1.0, epsilon=0.15),
    "della_linear": _task_vectors("della_linear", rescale=True, random=True, density=1.0, epsilon=0.15),
    "breadcrumbs": _task_vectors("breadcrumbs", density=1.0, gamma=0.01),
    "breadcrumbs_ties": _task_vectors("breadcrumbs_ties", density=1.0, gamma=0.01),
    "model_stock": Method("model_stock", "needed", least=2, shared={"filter_wise": Option("filter_wise", bool, False)}),
    "arcee_fusion": Method("arcee_fusion", "needed", most=1),
    "nearswap": Method("nearswap", "needed", most=1, shared={"t": Option("t")}),
    "sce": Method("sce", "needed", shared={**_MASK, "select_topk": Option("select_topk", float, 1.0)}),
    "ram": Method("ram", "needed", shared={"epsilon": Option("epsilon", float, 1e-5)}),
    "ramplus_tl": Method(
        "ramplus_tl",
        "needed",
        shared={
            "r": Option("r", float, 0.1),
            "alpha": Option("alpha", float, 0.2),
            "epsilon": Option("epsilon", float, 1e-5),
        },
    ),
}
