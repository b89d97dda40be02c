"""Files of mergekit-moe run as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weightsmith as ws
from weightsmith import recipe as recipes
from weightsmith.cli import main
from weightsmith.errors import Error
from weightsmith.merge.moe import assemble_document

PARTS = ("gate_proj", "up_proj", "down_proj")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64}


def save(folder: Path, seed: int) -> None:
    """A small Llama."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(2):
        place = f"model.layers.{layer}."
        rows = {"q": 8, "k": 4, "v": 4, "o": 8}
        shapes |= {f"{place}self_attn.{name}_proj.weight": (count, 8) for name, count in rows.items()}
        shapes |= {f"{place}mlp.{name}.weight": (12, 8) if name != "down_proj" else (8, 12) for name in PARTS}
        shapes |= {f"{place}{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = json.dumps({"model_type": "llama", "dtype": "float32", **SIZES, **HEADS}).encode()
    ws.Weights.of(tensors).with_files({"config.json": config}).save(folder)


TEXT = """\
base_model: base
gate_mode: random
dtype: bfloat16
experts:
  - source_model: a
    positive_prompts: ["sums"]
  - source_model: b
    positive_prompts: ["rhymes"]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "moe.yaml"
    path.write_text(TEXT)
    return path


def test_it_runs(file: Path, capsys: pytest.CaptureFixture[str]):
    found = recipes.read(file)
    assert isinstance(found, recipes.Foreign)
    assert found.plan.references == ("base", "a", "b")
    assert main(["run", str(file), "-o", "out"]) == 0
    prompts = [
        {"source_model": "a", "positive_prompts": ["sums"]},
        {"source_model": "b", "positive_prompts": ["rhymes"]},
    ]
    document = {"base_model": "base", "gate_mode": "random", "dtype": "bfloat16", "experts": prompts}
    expected, made = assemble_document(document), ws.open("out")
    assert list(made) == list(expected)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert json.loads(Path("out/config.json").read_text())["num_local_experts"] == 2
    assert Path("out/mergekit_config.yml").read_text() == TEXT
    capsys.readouterr()
    assert main(["explain", str(file)]) == 0
    assert "block_sparse_moe.experts.1.w1.weight" in capsys.readouterr().out


def test_an_adapter(file: Path):
    name = "model.layers.0.mlp.up_proj"
    down, up = torch.randn(2, 8), torch.randn(12, 2)
    adapter = ws.open({f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up})
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    adapter.with_files({"adapter_config.json": json.dumps(said).encode()}).save("lora")
    file.write_text(TEXT.replace("source_model: b", "source_model: b+lora").replace("bfloat16", "float32"))
    made = recipes.read(file).build()  # type: ignore[union-attr]
    found = made["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    torch.testing.assert_close(found, ws.open("b")[f"{name}.weight"] + up @ down)


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        (("source_model: b", "source_model: nowhere"), "7:19", "nowhere"),
        (("gate_mode: random", "gate_mode: randm"), "2:12", "random"),
        (("base_model: base\n", ""), "1:1", "base_model"),
        (("dtype:", "dtyp:"), "1:1", "dtype"),
        (("  - source_model: b\n    positive", "  - positive"), "7:5", "source_model"),
        (("dtype: bfloat16", "merge_method: ties"), "", "models"),
    ],
)
def test_what_is_wrong(change: tuple[str, str], place: str, said: str, file: Path):
    file.write_text(TEXT.replace(*change))
    with pytest.raises(Error, match=said) as caught:
        recipes.read(file).build()  # type: ignore[union-attr]
    assert str(caught.value).startswith(f"{file}:{place}"), caught.value
