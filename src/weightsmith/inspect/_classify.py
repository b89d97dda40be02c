"""How well classifiers do on labelled examples, and what changed from the one they were made from.

Two classifiers of one accuracy may err on different examples. What a change has cost shows in the answers that
were right and are wrong now, and in differences taken example by example.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.data import Examples, checked
from weightsmith.errors import Error, listed
from weightsmith.inspect._diversity import flips
from weightsmith.inspect._parts import with_ends
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.evaluation import (
    bootstrap,
    calibration_error,
    log_loss,
    mcnemar,
    paired_interval,
    weighted_f1,
)
from weightsmith.stats.room import restored

Maker = Callable[[], nn.Module]
"""Makes or loads a classifier when its turn has come."""


@card(
    paper="Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'; Yan et al. "
    "2021, 'Positive-Congruent Training: Towards Regression-Free Model Updates' (negative flips)",
    needs=("data",),
    unit="model",
    claim="a difference between models is seen where intervals of the single models hide it",
)
def classification(
    models: Mapping[str, nn.Module | Maker],
    data: Examples | tuple[Any, Any],
    reference: str | None = None,
    *,
    batch: int = 256,
    device: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Report:
    """Accuracy, F1, log loss and calibration of classifiers on the same examples, and their differences.

    Args:
        models: by name: modules that give scores ``[n, classes]``, left as they were, or functions that make them,
            called one after the other.
        data: inputs and labels.
        reference: the name of the one that all others are compared with; the first by default.
        batch: examples at a time.
        device: where to compute with models that are made here; by default on the CPU. Given modules stay where they
            are.
        forward: ``(model, inputs) -> scores``, where calling the model does not do; an output with ``logits`` does.
        confidence: of the intervals, by resampling examples.
        samples: resamples.
        seed: of the resampling.

    Returns:
        Report: a row a model: ``accuracy`` with its ends, ``macro F1``, ``log loss``, ``calibration error``, and with
        several models ``difference`` in accuracy to the reference with its ends, ``p`` of McNemar's test, and the
        shares of answers ``lost`` (right there, wrong here), ``gained`` and ``the same``.

    Raises:
        ValueError: no model, no such reference, scores of a wrong shape, labels beyond the classes.

    >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
    >>> found = classification({"identity": nn.Identity()}, (x, y), samples=50)
    >>> round(found["accuracy"][0], 3)
    0.667
    """
    if not models:
        raise Error("classification needs at least one model")
    first = next(iter(models)) if reference is None else reference
    if first not in models:
        raise Error(f"classification: no model {first!r} to compare with; there are {listed(models)}")
    given = data if isinstance(data, Examples) else checked("examples", *data)
    scores = {}
    with progress.task("models", len(models)) as advance:
        for name, model in models.items():
            scores[name] = _scores(name, model, given, batch, device, forward)
            advance(1)
    options = {"confidence": confidence, "samples": samples, "seed": seed}
    said = {name: one.argmax(dim=1) for name, one in scores.items()}
    right = {name: (one == given.labels).double() for name, one in said.items()}
    table = []
    for name, one in scores.items():
        row: dict[str, Any] = {"model": name, "examples": len(given)}
        row |= with_ends("accuracy", bootstrap(right[name], **options))
        row["macro F1"] = float(weighted_f1(said[name], given.labels, "macro"))
        row |= _forecast(one, given.labels)
        if len(scores) > 1:
            row |= _compared(said[name], said[first], right[name], right[first], given.labels, name == first, options)
        table.append(row)
    notes = [f"Intervals hold with a confidence of {confidence:g}, over {len(given)} examples."]
    if len(scores) > 1:
        notes.append(f"Differences, lost and gained answers are against {first}.")
    notes += [f"{row['model']} gives scores that are not finite." for row in table if row["log loss"] is None]
    return Report(
        f"{len(models)} classifier{'s' * (len(models) > 1)} on {given.name}", {}, table, [_plot(table)], notes
    )


def _forecast(scores: Tensor, labels: Tensor) -> dict[str, float | None]:
    if not bool(scores.isfinite().all()):
        return {"log loss": None, "calibration error": None}
    shares = scores.double().softmax(dim=1)
    return {"log loss": log_loss(shares, labels), "calibration error": calibration_error(shares, labels)}


def _compared(
    said: Tensor, other: Tensor, right: Tensor, other_right: Tensor, labels: Tensor, itself: bool, options: Any
) -> dict[str, Any]:
    if itself:
        return with_ends("difference", None) | dict.fromkeys(("p", "lost", "gained", "the same"))
    turned = flips(other, said, labels)
    return with_ends("difference", paired_interval(right, other_right, **options)) | {
        "p": mcnemar(right, other_right).p_value,
        "lost": turned.negative,
        "gained": turned.positive,
        "the same": float((said == other).double().mean()),
    }


def _plot(table: list[dict[str, Any]]) -> Plot:
    low, high = ([row[f"accuracy {end}"] for row in table] for end in ("low", "high"))
    names, values = [Path(row["model"]).name for row in table], [row["accuracy"] for row in table]
    return Plot("Accuracy", "model", "accuracy", [Line("accuracy", names, values, low, high, style="bars")])


def _scores(
    name: str,
    given: nn.Module | Maker,
    data: Examples,
    batch: int,
    device: str | None,
    forward: Callable[..., Any] | None,
) -> Tensor:
    """``[n, classes]`` on the CPU."""
    made = not isinstance(given, nn.Module)
    model: nn.Module = given().to(device or "cpu") if made else given  # type: ignore[operator, assignment]
    place = next((one.device for one in [*model.parameters(), *model.buffers()]), torch.device(device or "cpu"))
    ask = forward or (lambda model, inputs: model(inputs))
    found = []
    with (
        restored(model),
        progress.task("examples", len(data)) as advance,
        torch.no_grad(),
    ):
        for inputs, labels in data.batches(batch):
            scores = ask(model, inputs.to(place) if isinstance(inputs, Tensor) else inputs)
            scores = getattr(scores, "logits", scores)
            if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(labels):
                shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise Error(f"{name} gives {shape} for {len(labels)} examples; scores [n, classes] are needed")
            if int(labels.max()) >= scores.shape[1]:
                raise Error(f"{name} knows {scores.shape[1]} classes, and {data.name} has label {int(labels.max())}")
            found.append(scores.float().cpu())
            advance(len(labels))
    if made:
        del model
        gc.collect()  # before the next one needs the memory
    return torch.cat(found)
