"""The same controller in loops that are not yours: Hugging Face's ``Trainer`` and Lightning.

A plain loop needs none of this. A callback is given what `control` is given, but for the model and the optimizer, which
it finds when training begins; masks are saved beside checkpoints, and a run that goes on finds them there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from weightsmith.errors import Error, missing
from weightsmith.prune.sparse._controller import Controller, control
from weightsmith.prune.sparse._rules import Rule

FILE = "sparse_training.pt"


def trainer(rule: Rule, **options: Any) -> Any:
    """A callback of Hugging Face's ``Trainer`` that trains sparsely: ``Trainer(..., callbacks=[trainer(rule)])``.

    Masks are saved in each checkpoint's folder as ``sparse_training.pt``. A run that goes on looks for them in
    ``output_dir/checkpoint-<step>``, where ``Trainer`` saves, or in ``args.resume_from_checkpoint``.

    Args:
        rule: such as ``rigl(0.9, every=100, stop=10_000)``; steps are those of the optimizer.
        options: of `control`: ``densities``, ``masks``, ``pattern``, ``seed``.

    Returns:
        transformers.TrainerCallback: its ``masks`` is the `Controller` once training has begun.

    Raises:
        MissingPackage: transformers is not installed.
        Error: while training begins, where a run goes on from a checkpoint that has no masks.

    >>> callback = trainer(ws.prune.sparse.rigl(0.9, every=10, stop=100), densities="uniform")  # doctest: +SKIP
    >>> callback.masks is None  # doctest: +SKIP
    True
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise missing("transformers", "hf", "a callback of its Trainer") from None

    class SparseTraining(TrainerCallback):
        masks: Controller | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.masks is not None:
                self.masks.close()
            saved = _saved(args, int(state.global_step)) if state.global_step else None
            self.masks = _controlled(given["model"], given["optimizer"], rule, options, saved)

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.masks is None:
                return
            found = self.masks.state_dict()  # all processes take part where parameters are sharded
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                _write(found, folder / FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.masks is not None:
                self.masks.close()

    return SparseTraining()


def lightning(rule: Rule, **options: Any) -> Any:
    """A callback of Lightning's ``Trainer`` that trains sparsely; its state is saved in Lightning's checkpoints.

    Args:
        rule: such as ``rigl(0.9, every=100, stop=10_000)``; steps are those of the first optimizer.
        options: of `control`: ``densities``, ``masks``, ``pattern``, ``seed``.

    Returns:
        lightning.pytorch.Callback: its ``masks`` is the `Controller` once training has begun.

    Raises:
        MissingPackage: neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    Callback = _lightning_callback()

    class SparseTraining(Callback):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.masks: Controller | None = None
            self.saved: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if self.masks is not None:
                self.masks.close()
            self.masks = _controlled(pl_module, trainer.optimizers[0], rule, options, self.saved)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.masks is not None:
                self.masks.close()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.masks is None else self.masks.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.saved = dict(state_dict) or None

    return SparseTraining()


def _lightning_callback() -> Any:
    try:
        from lightning.pytorch.callbacks import Callback  # type: ignore[import-not-found]
    except ImportError:
        try:
            from pytorch_lightning.callbacks import Callback  # type: ignore[import-not-found]
        except ImportError:
            raise missing("lightning", "lightning", "a callback of its Trainer") from None
    return Callback


def _controlled(model: Any, optimizer: Any, rule: Rule, options: dict[str, Any], saved: Any) -> Controller:
    return control(model, optimizer, rule, **options, state=saved)


def _saved(args: Any, step: int) -> dict[str, Any]:
    """The masks of the checkpoint that a run goes on from."""
    told = getattr(args, "resume_from_checkpoint", None)
    folders = [Path(told)] if isinstance(told, str) and os.path.isdir(told) else []
    folders.append(Path(args.output_dir) / f"checkpoint-{step}")
    for folder in folders:
        if (folder / FILE).exists():
            return torch.load(folder / FILE, weights_only=True, map_location="cpu")
    raise Error(
        f"the run goes on from step {step}, but there is no {FILE} in {folders[-1]}; copy it there, or begin anew with "
        "masks=ws.prune.mask_of(model)"
    )


def _write(found: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".part")
    torch.save(found, temporary)
    os.replace(temporary, path)
