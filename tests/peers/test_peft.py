"""What PEFT makes of adapters, and what it makes of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.weights import Weights

peft = pytest.importorskip("peft", reason='needs peft: pip install "weightsmith[peers]"', exc_type=ImportError)
transformers = pytest.importorskip(
    "transformers", reason='needs transformers: pip install "weightsmith[peers]"', exc_type=ImportError
)

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(10)[None]


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tied_llama() -> nn.Module:
    return llama(tied=True)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(4, 6, 3)
        self.d = nn.Conv2d(6, 6, 1)
        self.e = nn.Conv1d(3, 4, 3)
        self.f = nn.Conv3d(2, 3, (3, 2, 1))


class Stack(nn.Module):
    """Parameters of one module, two of them stacks of matrices."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(4, 5, 6))
        self.down_proj = nn.Parameter(torch.randn(4, 7, 5))
        self.router = nn.Parameter(torch.randn(3, 9))


def experts(transposed: bool = False) -> nn.Module:
    return nn.ModuleDict({"experts": Stack(transposed)})


def turned_experts() -> nn.Module:
    return experts(transposed=True)


def trained(base: nn.Module, folder: Path, **settings: Any) -> Any:
    """A PEFT model whose adapter is random, saved to ``folder``."""
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 6, "init_lora_weights": False} | settings))
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        learns = ("lora_", "modules_to_save", "trainable_tokens_delta")
        if any(word in name for word in learns) or (name.endswith("bias") and parameter.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    return model


def saved(model: nn.Module, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        Weights.of(model.state_dict()).save(folder)
    return folder


def written(adapter: Weights, folder: Path) -> Path:
    folder.mkdir()
    adapter.save(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(bytes(adapter.files["adapter_config.json"]))  # type: ignore[arg-type]
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


QV = ["q_proj", "v_proj"]
LINEAR = [*QV, "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "lm_head"]
STACKED = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "experts.router"]}

MERGES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "every linear layer": (llama, {"target_modules": LINEAR}, {}),
    "rsLoRA": (llama, {"target_modules": QV, "use_rslora": True}, {}),
    "ranks and alphas by pattern": (
        llama,
        {
            "target_modules": QV,
            "rank_pattern": {"layers.0.self_attn.q_proj": 4, "v_proj": 3},
            "alpha_pattern": {"^model.layers.1.*": 7, "q_proj": 2},
        },
        {},
    ),
    "patterns under rsLoRA": (
        llama,
        {"target_modules": QV, "use_rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 3}},
        {},
    ),
    "DoRA": (llama, {"target_modules": LINEAR, "use_dora": True}, {}),
    "all biases": (llama, {"target_modules": QV, "bias": "all"}, {}),
    "biases of its layers": (llama, {"target_modules": QV, "bias": "lora_only"}, {}),
    "biases of the products": (llama, {"target_modules": QV, "lora_bias": True}, {}),
    "an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "an embedding with DoRA": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}, {}),
    "modules saved whole": (llama, {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}, {}),
    "trained tokens": (llama, {"target_modules": QV, "trainable_token_indices": [3, 31, 0]}, {}),
    "tokens by module": (llama, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [7, 2]}}, {}),
    "tied tokens": (tied_llama, {"target_modules": QV, "trainable_token_indices": [3, 5]}, {}),
    "a tied embedding, kept": (tied_llama, {"target_modules": ["embed_tokens"]}, {"tied": "keep"}),
    "a tied head, kept": (tied_llama, {"target_modules": ["lm_head"]}, {"tied": "keep"}),
    "a tied embedding saved whole": (
        tied_llama,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
        {"tied": "untie"},
    ),
    "tied modules saved as one": (
        tied_llama,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {},
    ),
    "weights the other way round": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, {}),
    "the other way round with DoRA": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
        {},
    ),
    "square weights the other way round": (gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, {}),
    "convolutions": (Convolutions, {"target_modules": ["c", "d", "e", "f"]}, {}),
    "convolutions with DoRA": (Convolutions, {"target_modules": ["c", "d", "e", "f"], "use_dora": True}, {}),
    "convolutions with biases": (Convolutions, {"target_modules": ["c", "d"], "lora_bias": True}, {}),
    "stacked experts": (experts, STACKED | {"rank_pattern": {"experts.down_proj": 3}}, {}),
    "stacked experts the other way round": (turned_experts, STACKED, {}),
}


@pytest.mark.parametrize("kind", MERGES)
def test_merge_and_unload(kind: str, tmp_path: Path):
    make, settings, options = MERGES[kind]
    base = make()
    folder = saved(base, tmp_path / "base")
    theirs = trained(base, tmp_path / "adapter", **settings).merge_and_unload().state_dict()
    before = ws.open(folder)
    ours = ws.adapt.apply(folder, tmp_path / "adapter", **options)
    moved = False
    for name, value in theirs.items():
        if name in ours:
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
            moved |= name in before and not torch.equal(before[name], value)
    assert moved
    tied = "tie_word_embeddings" in json.loads((folder / "config.json").read_text()) if make is tied_llama else False
    assert set(theirs) - set(ours) <= ({"lm_head.weight"} if tied or make is gpt2 else set())


def test_bfloat16_is_rounded_once(tmp_path: Path):
    base = llama().to(torch.bfloat16)
    folder = saved(base, tmp_path / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    theirs = trained(base, tmp_path / "adapter", target_modules=QV).merge_and_unload().state_dict()
    ours = ws.adapt.apply(folder, tmp_path / "adapter")
    exact = ws.adapt.apply({name: value.double() for name, value in before.items()}, tmp_path / "adapter")
    for name in ours:
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], exact[name].to(torch.bfloat16)), name
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
@pytest.mark.parametrize("make", [tied_llama, gpt2])
def test_untied_is_what_was_trained_and_merge_and_unload_is_not(make: Any, targets: list[str], tmp_path: Path):
    targets = ["wte" if make is gpt2 and name == "embed_tokens" else name for name in targets]
    base = make()
    folder = saved(base, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_modules=targets)
    expected = logits(model)
    with pytest.raises(ws.Error, match="tied='keep'"):
        ws.adapt.apply(folder, tmp_path / "adapter")
    ws.adapt.apply(folder, tmp_path / "adapter", tied="untie").save(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    assert (logits(model.merge_and_unload()) - expected).abs().max() > 1


def test_a_tie_that_training_kept(tmp_path: Path):
    """PEFT merges such a delta twice; ours is what it computed before."""
    base = tied_llama()
    folder = saved(base, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    ws.adapt.apply(folder, tmp_path / "adapter").save(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["LoRA", "rsLoRA"])
def test_half_the_amount_is_half_the_scale(settings: dict[str, Any], tmp_path: Path):
    base = llama()
    folder = saved(base, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_modules=QV, **settings)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    theirs = model.merge_and_unload().state_dict()
    ours = ws.adapt.apply(folder, tmp_path / "adapter", 0.5)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_attention_of_pytorch_is_refused(tmp_path: Path):
    base = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    folder = saved(base, tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["a"])
    with pytest.raises(ws.Error, match="MultiheadAttention"):
        ws.adapt.apply(folder, tmp_path / "adapter")


# Combining


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, list[Path], Any]:
    """A base, two adapters, and PEFT's model with both."""
    folder = saved(llama(), tmp_path / "base")
    paths = [tmp_path / "one", tmp_path / "two"]
    targets = [["q_proj", "v_proj", "embed_tokens"], ["q_proj", "down_proj", "embed_tokens"]]
    for seed, (path, target) in enumerate(zip(paths, targets, strict=True)):
        model = trained(llama(), path, target_modules=target, r=3, lora_alpha=5 + seed, use_rslora=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data.copy_(noise)
        model.save_pretrained(path)
    model = peft.PeftModel.from_pretrained(llama(), paths[0], adapter_name="one")
    model.load_adapter(paths[1], adapter_name="two")
    return folder, paths, model


def theirs_combined(model: Any, weight: list[float], combination: str, **options: Any) -> dict[str, Tensor]:
    model.add_weighted_adapter(["one", "two"], weight, "both", combination_type=combination, **options)
    model.set_adapter("both")
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("weight", [[1.0, 1.0], [0.3, 1.7], [0.6, -0.4]], ids=str)
@pytest.mark.parametrize(
    ("combination", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.7, "majority": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
        ("ties_svd", {"density": 0.4, "rank": 4}),
        ("magnitude_prune_svd", {"density": 0.4, "rank": 4}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties_svd", {"density": 1.0, "rank": 4}),
    ],
    ids=str,
)
def test_add_weighted_adapter(pair: Any, combination: str, options: dict[str, Any], weight: list[float]):
    folder, paths, model = pair
    names = {"rank": "svd_rank", "majority": "majority_sign_method"}
    theirs = theirs_combined(model, weight, combination, **{names.get(k, k): v for k, v in options.items()})
    both = ws.adapt.combine(paths, weight, combination, **options)  # type: ignore[arg-type]
    ours = ws.adapt.apply(folder, both)
    assert any(not torch.equal(ws.open(folder)[name], ours[name]) for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_peft_loads_a_combination(pair: Any, combination: Any, tmp_path: Path):
    folder, paths, _ = pair
    both = ws.adapt.combine(paths, [0.5, 2.0], combination)
    ws.adapt.apply(folder, both).save(tmp_path / "merged")
    model = peft.PeftModel.from_pretrained(loaded(folder), written(both, tmp_path / "both")).eval()
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path / "merged")), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(loaded(folder))).abs().max() > 0.1


# Extracting


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"rank": 100}),
        (llama, {"energy": 0.8}),
        (llama, {"rank": {"*.q_proj.*": 3, "*": 2}, "rest": "skip"}),
        (llama, {"rank": 100, "embeddings": True}),
        (tied_llama, {"rank": 100}),
        (tied_llama, {"rank": 100, "embeddings": True}),
        (gpt2, {"rank": 100}),
        (gpt2, {"rank": 2, "rest": "skip"}),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_peft_loads_what_was_extracted(make: Any, options: dict[str, Any], tmp_path: Path):
    model = make()
    base = saved(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    tuned = saved(model, tmp_path / "tuned")
    adapter = ws.adapt.extract(tuned, base, **options)
    ws.adapt.apply(base, adapter).save(tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(loaded(base), written(adapter, tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(loaded(tmp_path / "merged")), rtol=1e-4, atol=1e-4)
    if options.get("rank") == 100:
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


def test_a_saved_folder_is_one_of_peft(tmp_path: Path):
    model = llama()
    base = saved(model, tmp_path / "base")
    tuned = {name: value + 0.1 for name, value in ws.open(base).items()}
    ws.adapt.extract(tuned, base, rank=1).save(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (tmp_path / "adapter").iterdir()
    }
    peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
