"""Sparse training in the loops of others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.prune.sparse import callbacks

RULE = ws.prune.sparse.rigl(0.75, every=2, stop=8)


class Net(nn.Module):
    """Takes what a Trainer gives and returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randint(3, (), generator=generator)}
        for _ in range(count)
    ]


def trained(folder: Path, steps: int, resume: bool = False, **more: Any) -> tuple[Net, Any]:
    transformers = pytest.importorskip("transformers", reason="Hugging Face's Trainer")
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    callback = callbacks.trainer(RULE, seed=1)
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "save_steps": 5,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "seed": 3,
        **more,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_training_stop |= state.global_step >= steps

    model = Net()
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        callbacks=[callback, Stop()],  # type: ignore[arg-type]
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    return model, callback


def test_a_trainer_trains_sparsely_and_goes_on(tmp_path: Path):
    whole, callback = trained(tmp_path / "whole", 10)
    masks = callback.masks
    assert masks.step == 10
    assert masks.sparsity == pytest.approx(0.75)
    assert masks.info.step == 8
    for name, mask in masks.masks.items():
        assert not whole.state_dict()[name][~mask].any()
    assert (tmp_path / "whole" / "checkpoint-5" / callbacks.FILE).exists()
    trained(tmp_path / "parts", 5)
    again, resumed = trained(tmp_path / "parts", 10, resume=True)
    assert resumed.masks.step == 10
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    (tmp_path / "parts" / "checkpoint-10" / callbacks.FILE).unlink()
    with pytest.raises(ws.Error, match=callbacks.FILE):
        trained(tmp_path / "parts", 12, resume=True, max_steps=12)


def test_accumulation_counts_steps_of_the_optimizer(tmp_path: Path):
    _, callback = trained(tmp_path, 3, gradient_accumulation_steps=2)
    assert callback.masks.step == 3


def test_without_the_packages_the_error_says_which(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ws.errors.MissingPackage, match="transformers"):
        callbacks.trainer(RULE)
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ws.errors.MissingPackage, match="lightning"):
        callbacks.lightning(RULE)


def test_lightning_by_its_protocol(monkeypatch: pytest.MonkeyPatch):
    """What Lightning calls, in its order, with the smallest stand-in for it; the real one is below."""
    import types

    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    made = types.ModuleType("lightning.pytorch.callbacks")
    made.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", made)

    def begun(saved: dict[str, Any] | None) -> tuple[nn.Module, Any, Any]:
        model = Net()
        trainer = types.SimpleNamespace(optimizers=[torch.optim.SGD(model.parameters(), lr=0.1)])
        callback = callbacks.lightning(RULE)
        if saved is not None:
            callback.load_state_dict(saved)
        callback.on_train_start(trainer, model)
        return model, trainer, callback

    model, trainer, callback = begun(None)
    for row in rows(3):
        model(row["x"][None], row["labels"][None])["loss"].backward()
        trainer.optimizers[0].step()
    saved = callback.state_dict()
    callback.on_train_end(trainer, model)
    _, _, again = begun(saved)
    assert again.masks.step == 3
    assert all(torch.equal(again.masks.masks[name], callback.masks.masks[name]) for name in saved["masks"])


def test_lightning_itself(tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def fitted(steps: int, path: str | None = None) -> tuple[Any, Any, Any]:
        callback = callbacks.lightning(RULE)
        trainer = lightning.Trainer(
            max_steps=steps,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module()
        data = torch.utils.data.DataLoader(rows(4) * 5, batch_size=4)  # type: ignore[arg-type]  # batches are alike
        trainer.fit(module, data, ckpt_path=path, **({"weights_only": True} if path else {}))
        return module, callback, trainer

    whole, callback, _ = fitted(10)
    assert callback.masks.step == 10
    assert callback.masks.sparsity == pytest.approx(0.75)
    _, _, trainer = fitted(5)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again, resumed, _ = fitted(10, str(tmp_path / "half.ckpt"))
    assert resumed.masks.step == 10
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in again.state_dict().items())
