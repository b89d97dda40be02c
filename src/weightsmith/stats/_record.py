"""What weights do along a training run: a few figures a tensor, every so many steps.

A run that goes wrong shows it in its weights before it shows it in its loss: a norm that grows without end, an update
that is a millionth of what it moves, signs that no longer flip. `weightsmith.inspect.training` reads such things; this
writes them down, cheaply enough to be left on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, did_you_mean
from weightsmith.stats.room import chosen_names
from weightsmith.weights import Pattern, matches

if TYPE_CHECKING:
    from weightsmith.inspect import Report

FIGURES = ("norm", "gradient norm", "update", "sparsity", "sign flips")
"""Everything that a `Recorder` can write down."""

MOST_LINES = 8
"""Tensors that a plot shows, the largest ones."""


class Recorder:
    r"""Writes down figures of every tensor along a run.

    - ``"norm"``: :math:`\lVert w \rVert`;
    - ``"gradient norm"``: :math:`\lVert \nabla w \rVert` as ``.grad`` has it (after clipping, say); None without one;
    - ``"update"``: :math:`\lVert w_t - w_{t-1} \rVert / \lVert w_{t-1} \rVert`, of the single step just made; None for
      a weight of zeros;
    - ``"sparsity"``: the share of zeros;
    - ``"sign flips"``: the share of entries that are above zero now and were not when last written down, or the other
      way round (at first: when the recorder was made).

    A figure that is not finite is None as well.

    Args:
        model: its parameters are read and left alone.
        every: how many steps lie between two records.
        figures: which ones. ``"update"`` holds a copy of the parameters during the step before each record, and
            ``"sign flips"`` a byte an entry all along; the others hold nothing.
        pattern: names of the parameters.
        path: a file to which every record is added, a line of JSON a tensor, as soon as it is made.

    ``step`` is called after every step of the optimizer, before gradients are cleared. Records are held as plain
    numbers, which a device is asked for once a record. ``state_dict`` and ``load_state_dict`` go with a checkpoint.

    Raises:
        ValueError: no parameter that fits, an unknown figure, ``every`` below 1.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
    >>> recorder = Recorder(layer, figures=("update", "sparsity"))
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[3.0, 0.0]]))
    >>> recorder.step()
    >>> [(row["step"], row["tensor"], round(row["update"], 4), row["sparsity"]) for row in recorder.rows]
    [(1, 'weight', 0.7071, 0.5)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        figures: Sequence[str] = FIGURES,
        pattern: Pattern = "*",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        unknown = [name for name in figures if name not in FIGURES]
        if unknown or not figures:
            said = f"{unknown[0]!r}{did_you_mean(str(unknown[0]), FIGURES)}" if unknown else "nothing"
            raise Error(f"figures= names {said}; known: {', '.join(FIGURES)}")
        if every < 1:
            raise Error(f"every is at least 1, got {every}")
        able = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
        self.parameters = {name: value for name, value in able.items() if matches(pattern, name)}
        chosen_names(able, list(self.parameters), pattern)
        self.every, self.figures = every, tuple(name for name in FIGURES if name in figures)
        self.path = None if path is None else Path(path)
        self.steps = 0
        self.rows: list[dict[str, Any]] = []
        """What was written down: a row a record and tensor."""
        self._signs = self._above() if "sign flips" in self.figures else []
        self._before: list[Tensor] | None = None
        self._keep()

    @torch.no_grad()
    def step(self) -> None:
        """Note that a step was made; every so often, write it down."""
        self.steps += 1
        if self.steps % self.every == 0:
            made = self._record()
            self.rows += made
            if self.path is not None:
                with self.path.open("a") as file:
                    file.writelines(_line(row) for row in made)
        self._keep()

    @torch.no_grad()
    def _keep(self) -> None:
        """The weights before the step that will be written down."""
        self._before = None
        if "update" in self.figures and (self.steps + 1) % self.every == 0:
            self._before = [value.clone() for value in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [value.detach() for value in self.parameters.values()]

    def _above(self) -> list[Tensor]:
        return [value > 0 for value in self._tensors()]

    def _record(self) -> list[dict[str, Any]]:
        tensors = self._tensors()
        columns: dict[str, list[Tensor]] = {}
        if "norm" in self.figures:
            columns["norm"] = _norms(tensors)
        if "gradient norm" in self.figures:
            given = [value.grad for value in self.parameters.values()]
            there = iter(_norms([g.to_dense() if g.is_sparse else g for g in given if g is not None]))
            columns["gradient norm"] = [
                tensors[0].new_full((), math.nan) if gradient is None else next(there) for gradient in given
            ]
        if self._before is not None:
            moved = torch._foreach_sub(tensors, self._before)  # type: ignore[attr-defined]
            columns["update"] = [a / b for a, b in zip(_norms(list(moved)), _norms(self._before), strict=True)]
        if "sparsity" in self.figures:
            columns["sparsity"] = [_share(value == 0) for value in tensors]
        if "sign flips" in self.figures:
            now = self._above()
            columns["sign flips"] = [_share(a != b) for a, b in zip(now, self._signs, strict=True)]
            self._signs = now
        device = tensors[0].device
        table = torch.stack([torch.stack([one.to(device, torch.float64) for one in columns[f]]) for f in self.figures])
        found = table.T.tolist()  # the one place where a device is waited for
        return [
            {"step": self.steps, "tensor": name} | {f: _finite(v) for f, v in zip(self.figures, values, strict=True)}
            for name, values in zip(self.parameters, found, strict=True)
        ]

    def report(self) -> Report:
        """The rows as a table, the last values in the figures, and a plot for each figure of the largest tensors.

        Raises:
            ValueError: nothing was written down yet.
        """
        from weightsmith.inspect import Line, Plot, Report

        if not self.rows:
            raise Error(f"a report needs at least one record; {self.steps} of the {self.every} steps to it were made")
        sizes = {name: value.numel() for name, value in self.parameters.items()}
        shown = sorted(sizes, key=lambda name: -sizes[name])[:MOST_LINES]
        last = [row for row in self.rows if row["step"] == self.rows[-1]["step"]]
        summary: dict[str, Any] = {"steps": self.steps, "tensors": len(sizes)}
        for figure in self.figures:
            summary[f"last {figure}"] = _together(figure, {row["tensor"]: row[figure] for row in last}, sizes)
        plots = []
        for figure in self.figures:
            lines = []
            for name in (one for one in self.parameters if one in shown):
                own = [row for row in self.rows if row["tensor"] == name]
                values = [math.nan if row[figure] is None else row[figure] for row in own]
                lines.append(Line(name, [row["step"] for row in own], values))
            plots.append(Plot(figure.capitalize(), "step", figure, lines))
        return Report("Weights along a run", summary, self.rows, plots)

    def state_dict(self) -> dict[str, Any]:
        """What goes on where it was left, for `torch.save`."""
        return {
            "steps": self.steps,
            "figures": list(self.figures),
            "rows": [dict(row) for row in self.rows],
            "signs": dict(zip(self.parameters, self._signs, strict=False)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run was left; call it when the model's weights are loaded.

        A file at ``path`` is written anew: lines of steps after the checkpoint go.

        Raises:
            ValueError: a state of other figures or other tensors.
        """
        if tuple(state["figures"]) != self.figures:
            raise Error(f"this state is of {', '.join(state['figures'])}; the recorder of {', '.join(self.figures)}")
        signs = state["signs"]
        shapes = {name: value.shape for name, value in self.parameters.items()}
        if self._signs and {name: value.shape for name, value in signs.items()} != shapes:
            raise Error("this state is of another model: its tensors' names or shapes differ")
        self.steps = int(state["steps"])
        self.rows = [dict(row) for row in state["rows"]]
        if self._signs:
            self._signs = [signs[name].to(value.device) for name, value in self.parameters.items()]
        if self.path is not None:
            self.path.write_text("".join(map(_line, self.rows)))
        self._keep()


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Lengths, float32 or wider: squares of halves would leave their range."""
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    for wide in (False, True):
        places = [i for i, tensor in enumerate(tensors) if (tensor.dtype == torch.float64) is wide]
        if places:
            dtype, own = torch.float64 if wide else torch.float32, [tensors[i] for i in places]
            norms = torch._foreach_norm(own, 2, dtype=dtype)  # type: ignore[attr-defined]
            for i, norm in zip(places, norms, strict=True):
                found[i] = norm
    return found


def _share(mask: Tensor) -> Tensor:
    return mask.sum(dtype=torch.float64) / max(mask.numel(), 1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _together(figure: str, values: Mapping[str, float | None], sizes: Mapping[str, int]) -> float | None:
    """A figure of all tensors: norms as one vector's, shares of all entries, ratios as a mean."""
    there = {name: value for name, value in values.items() if value is not None}
    if not there:
        return None
    if figure.endswith("norm"):
        return math.hypot(*there.values())
    if figure == "update":
        return sum(there.values()) / len(there)
    return sum(value * sizes[name] for name, value in there.items()) / max(sum(sizes[name] for name in there), 1)
