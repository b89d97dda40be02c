"""Mixtures of experts from dense models: loaded and run by transformers, and against a layer by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge.moe import Expert, assemble, assemble_document
from weightsmith.merge.moe._document import _architecture
from weightsmith.merge.moe._targets import COMMON, DEFAULTS, ROPE, TARGETS

PARTS = ("gate_proj", "up_proj", "down_proj")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64}


def dense(seed: int = 0, kind: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> ws.Weights:
    """The tensors of a small Llama, Mistral, Qwen2 or Qwen3, with its settings."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": (11, 8)}
    for layer in range(2):
        place = f"model.layers.{layer}."
        rows = {"q": 8, "k": 4, "v": 4, "o": 8}
        tensors |= {f"{place}self_attn.{name}_proj.weight": (count, 8) for name, count in rows.items()}
        if kind == "qwen2":
            tensors |= {f"{place}self_attn.{name}_proj.bias": (rows[name],) for name in "qkv"}
        if kind == "qwen3":
            tensors |= {f"{place}self_attn.{name}_norm.weight": (4,) for name in "qk"}
        tensors |= {f"{place}mlp.{name}.weight": (12, 8) if name != "down_proj" else (8, 12) for name in PARTS}
        tensors |= {f"{place}{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    tensors |= {"model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) / 2 for name, shape in tensors.items()}
    config = {"model_type": kind, **SIZES, **HEADS, **config}
    return ws.Weights.of(made).with_files({"config.json": json.dumps(config).encode()})


def config_of(weights: ws.Weights) -> dict[str, Any]:
    return json.loads(bytes(weights.files["config.json"]))  # type: ignore[arg-type]


def mlp(model: ws.Weights, layer: int, x: Tensor) -> Tensor:
    gate, up, down = (model[f"model.layers.{layer}.mlp.{name}.weight"] for name in PARTS)
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def logits(weights: ws.Weights, folder: Path, tokens: Tensor) -> Tensor:
    """What transformers computes with a folder; every tensor must find its place."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers to load the model", exc_type=ImportError
    )
    weights.save(folder)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert model.generate(
        tokens[:1, :3], min_new_tokens=2, max_new_tokens=2, do_sample=False, pad_token_id=0
    ).shape == (1, 5)
    return model.eval()(tokens).logits.detach()


TOKENS = torch.randint(0, 11, (2, 20), generator=torch.Generator().manual_seed(5))

LOADED = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", {"tie_word_embeddings": True}),
    ("llama", "mixtral", {"rope_theta": 500.0, "rms_norm_eps": 1e-3}),
    ("mistral", "mixtral", {"sliding_window": 5}),
    ("mistral", "mixtral", {"sliding_window": None}),
    ("llama", "qwen2_moe", {}),
    ("mistral", "qwen2_moe", {"sliding_window": 5}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", "qwen3_moe", {}),
    ("qwen3", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
]


@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize(("kind", "architecture", "config"), LOADED, ids=str)
def test_equal_experts_are_the_dense_model(kind: str, architecture: str, config: dict[str, Any], layout: Any, tmp_path):
    base = dense(1, kind, **config)
    if config.get("tie_word_embeddings"):
        base = base.drop("lm_head.weight")
    shared = Expert(base, residual_scale=0.0) if architecture == "qwen2_moe" else None
    mixed = assemble(
        [base] * 3, base, architecture=architecture, gate="random", experts_per_token=2, shared=shared, layout=layout
    )
    wanted = logits(base, tmp_path / "dense", TOKENS)
    torch.testing.assert_close(logits(mixed, tmp_path / "sparse", TOKENS), wanted, rtol=1e-4, atol=1e-5)
    assert config_of(mixed)["model_type"] == architecture


@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_layer_is_what_the_formula_says(kind: str, layout: Any, tmp_path: Path):
    """Several experts, a router of its own for every layer, and transformers computes with what was put together."""
    transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
    base, *models = (dense(seed, kind) for seed in range(4))
    gate = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    assemble(models, base, gate=gate, experts_per_token=2, layout=layout).save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(2))
    for layer in range(2):
        found = loaded.model.layers[layer].mlp(x).detach()
        for position in range(7):
            state = x[0, position]
            scores = [float(gate[layer, e] @ state) for e in range(3)]
            best = sorted(range(3), key=lambda e: -scores[e])[:2]
            shares = torch.tensor([scores[e] for e in best]).softmax(0)
            wanted = sum(share * mlp(models[e], layer, state) for share, e in zip(shares, best, strict=True))
            torch.testing.assert_close(found[0, position], wanted, rtol=1e-4, atol=1e-5)


def test_all_experts_by_equal_shares_are_their_mean(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
    models = [dense(seed) for seed in range(3)]
    assemble(models, models[0], gate="zeros", experts_per_token=3).save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    wanted = sum(mlp(model, 1, x) for model in models) / 3
    torch.testing.assert_close(loaded.model.layers[1].mlp(x).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_a_shared_expert_is_added_by_its_gate(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
    base, *models, common = (dense(seed, "qwen2") for seed in range(4))
    gate = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    assemble(models, base, gate=gate, experts_per_token=1, shared=Expert(common, residual_scale=0.5)).save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randn(8, generator=torch.Generator().manual_seed(2))
    chosen = models[int(gate[0, 1] @ x > gate[0, 0] @ x)]
    wanted = mlp(chosen, 0, x) + torch.sigmoid(gate[0, 2] @ x) * 0.5 * mlp(common, 0, x)
    torch.testing.assert_close(loaded.model.layers[0].mlp(x[None, None])[0, 0].detach(), wanted, rtol=1e-4, atol=1e-5)


def test_the_names_of_deepseek():
    base, *models = (dense(seed) for seed in range(3))
    mixed = assemble(models, base, architecture="deepseek", gate="zeros", experts_per_token=1, shared=Expert(base))
    for part in PARTS:
        wanted = [*models, base]
        names = [*(f"experts.{e}" for e in range(2)), "shared_experts"]
        for model, name in zip(wanted, names, strict=True):
            found = mixed[f"model.layers.1.mlp.{name}.{part}.weight"]
            assert torch.equal(found, model[f"model.layers.1.mlp.{part}.weight"])
    config = config_of(mixed)
    assert (config["n_routed_experts"], config["n_shared_experts"], config["first_k_dense_replace"]) == (2, 1, 0)
    assert "shared_expert_gate.weight" not in " ".join(mixed)


# What the configuration says


@pytest.mark.parametrize("kind", list(DEFAULTS))
def test_what_is_left_out_is_what_the_class_has(kind: str):
    transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    for key, value in (COMMON | DEFAULTS[kind]).items():
        assert theirs[key] == value, key
    assert theirs["rope_parameters"]["rope_theta"] == ROPE
    if kind == "llama":  # as many as there are heads
        assert theirs["num_key_value_heads"] == theirs["num_attention_heads"]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_defaults_of_the_dense_model_are_written_out(kind: str):
    base = dense(0, kind)
    bare = base.with_files({"config.json": json.dumps({"model_type": kind, "num_attention_heads": 2}).encode()})
    config = config_of(assemble([bare, bare], bare, gate="zeros"))
    assert config["rope_theta"] == 10000.0
    assert config["rms_norm_eps"] == 1e-6
    assert config["vocab_size"] == 11
    assert config["intermediate_size"] == 12
    assert config["hidden_size"] == 8
    assert config["num_hidden_layers"] == 2
    assert config["num_key_value_heads"] == (2 if kind == "llama" else 8)
    assert config["sliding_window"] == (None if kind == "llama" else 4096)


def test_rope_is_kept_in_either_spelling():
    old = dense(rope_theta=5.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config_of(assemble([old] * 2, old, gate="zeros"))["rope_scaling"]["factor"] == 2.0
    new = dense(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    config = config_of(assemble([new] * 2, new, gate="zeros"))
    assert config["rope_parameters"]["rope_theta"] == 5.0
    assert "rope_theta" not in config


# What is computed


def test_nothing_is_read_before_it_is_asked_for():
    base = ws.Weights.of({n: torch.empty(s.shape, device="meta") for n, s in dense().specs.items()})
    base = base.with_files(dense().files)
    mixed = assemble([base] * 2, base, gate="random")
    assert mixed.spec("model.layers.0.block_sparse_moe.experts.1.w1.weight").shape == (12, 8)
    fused = assemble([base] * 2, base, gate="random", layout="fused")
    assert fused.spec("model.layers.0.mlp.experts.gate_up_proj").shape == (2, 24, 8)


def test_one_model_twice_is_two_tensors(tmp_path: Path):
    base = dense()
    mixed = assemble([base, base], base, gate="zeros")
    assert not mixed.ties
    mixed.save(tmp_path / "out.safetensors")
    assert len(ws.open(tmp_path / "out.safetensors")) == len(mixed)


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_saved_in_small_pieces_it_is_the_same(layout: Any, tmp_path: Path, small_pieces: None):
    base, *models = (dense(seed, dtype=torch.bfloat16) for seed in range(3))
    strided = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in models[1].items()}
    strange = ws.Weights.of(strided).with_files(base.files)
    assert not strange["model.layers.0.mlp.up_proj.weight"].is_contiguous()
    experts = [Expert(models[0], residual_scale=0.3, noise_scale=0.1), strange, 1.0 * models[1]]
    mixed = assemble(experts, base, gate="random", layout=layout, seed=3)
    mixed.save(tmp_path / "out.safetensors", threads=3)
    for name, tensor in ws.open(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, mixed[name]), name


def test_residual_scale_and_noise():
    base = dense()
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w{part}.weight" for e in range(3) for part in (1, 2)]
    experts = [Expert(base, residual_scale=0.25), Expert(base, noise_scale=0.1), Expert(base, noise_scale=0.1)]
    one, two = (assemble(experts, base, gate="zeros", seed=seed) for seed in (0, 1))
    gate, down = (base[f"model.layers.0.mlp.{name}.weight"] for name in ("gate_proj", "down_proj"))
    assert torch.equal(one[names[0]], gate)
    assert torch.equal(one[names[1]], down / 4)
    noise = torch.stack([torch.cat([(one[n] - w).flatten() for n, w in zip(names[k:], (gate, down), strict=False)])
                         for k in (2, 4)])  # fmt: skip
    assert abs(noise.std() - 0.1) < 0.02
    assert abs(noise.mean()) < 0.03
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.4
    assert not torch.equal(one[names[2]], two[names[2]])
    assert torch.equal(one[names[2]], assemble(experts, base, gate="zeros", seed=0)[names[2]])


def test_dtypes():
    base, other = dense(dtype=torch.bfloat16), dense(1)
    mixed = assemble([base, other], base, gate="random")
    assert {spec.dtype for spec in mixed.specs.values()} == {torch.bfloat16}
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert torch.equal(mixed[name], other["model.layers.0.mlp.up_proj.weight"].bfloat16())
    mixed = assemble([base, other], base, gate="random", dtype="float16", layout="fused")
    assert {spec.dtype for spec in mixed.specs.values()} == {torch.float16}
    assert config_of(mixed)["torch_dtype"] == "float16"


def test_tied_tensors_stay_tied():
    base = dense(tie_word_embeddings=True)
    nodes = {name: base.node(name) for name in base} | {"lm_head.weight": base.node("model.embed_tokens.weight")}
    base = ws.Weights(nodes, files=base.files)
    for dtype in (None, "bfloat16"):
        mixed = assemble([base] * 2, base, gate="zeros", dtype=dtype)
        assert mixed.ties == {"lm_head.weight": "model.embed_tokens.weight"}
        assert config_of(mixed)["tie_word_embeddings"] is True


def test_gates_given():
    base = dense()
    name = "model.layers.{}.block_sparse_moe.gate.weight"
    gate = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for given in (gate, {0: gate[0], 1: gate[1]}):
        mixed = assemble([base] * 3, base, gate=given)
        assert all(torch.equal(mixed[name.format(layer)], gate[layer]) for layer in range(2))
    mixed = assemble([base] * 3, base, gate=gate[0])
    assert torch.equal(mixed[name.format(1)], gate[0])
    mixed = assemble([base] * 3, base, gate=gate[:, :3], shared=base, architecture="qwen2_moe")
    assert not mixed["model.layers.0.mlp.shared_expert_gate.weight"].any()
    assert mixed.spec("model.layers.0.mlp.shared_expert_gate.weight").shape == (1, 8)


# Refusals


def renamed(old: str, new: str, model: ws.Weights) -> ws.Weights:
    return model.rename(lambda name: name.replace(old, new))


def with_tokens(model: ws.Weights, *words: str) -> ws.Weights:
    level = {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(words)}, "unk_token": words[0]}
    return model.with_files({"tokenizer.json": json.dumps({"model": level, "added_tokens": []}).encode()})


BASE = dense()
MISTRAL = dense(kind="mistral")
UP, TABLE = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"


def mixed(*models: Any, base: Any = BASE, gate: Any = "zeros", **options: Any) -> Any:
    return lambda: assemble(models or [BASE] * 2, base, gate=gate, **options)


REFUSED: list[tuple[str, Any]] = [
    ("list of models", lambda: assemble(BASE, BASE)),  # pyright: ignore[reportArgumentType]
    ("list of models", lambda: assemble([], BASE)),
    ("experts_per_token is 3, and there are 2", mixed(experts_per_token=3)),
    ("experts_per_token is 0", mixed(experts_per_token=0)),
    ("no architecture 'mixtrall' .did you mean 'mixtral'", mixed(architecture="mixtrall")),
    ("qwen3_moe is made from qwen3, and the base is 'llama'", mixed(architecture="qwen3_moe")),
    ("needs shared=", mixed(architecture="qwen2_moe")),
    ("mixtral has no shared expert; qwen2_moe would do", mixed(architecture="mixtral", shared=BASE)),
    ("no config.json that says", mixed(base={"w": torch.ones(1)})),
    ("made from llama, mistral, qwen2, qwen3, and the base is 'gpt2'", mixed(base=dense(kind="gpt2"))),
    ("expert 1 is a model of type 'qwen3'", mixed(BASE, dense(kind="qwen3"))),
    ("no place for .*q_proj.bias", mixed(base=dense(kind="qwen2").with_files(BASE.files))),
    ("expert 0 has no model.layers.1", mixed(*[BASE.drop("model.layers.1.*")] * 2)),
    ("expert 1 has model.layers.2", mixed(BASE, BASE | renamed("layers.1", "layers.2", BASE))),
    ("expert 1 has .*up_proj.bias", mixed(BASE, BASE | {"model.layers.0.mlp.up_proj.bias": torch.ones(12)})),
    ("has no model.layers.0.mlp.up_proj", mixed(base=BASE.drop(UP))),
    ("is it a dense model", mixed(base=BASE.drop("*.mlp.*"))),
    ("no place for model.layers.1.mlp.experts", mixed(base=renamed("1.mlp.", "1.mlp.experts.0.", BASE))),
    ("expert 1 and the base differ in shape", mixed(BASE, BASE | {UP: torch.ones(5, 8)})),
    ("are int8; experts are made of floats", mixed(BASE | {UP: torch.ones(12, 8, dtype=torch.int8)}, BASE)),
    ("computes with gelu", mixed(BASE, dense(hidden_act="gelu"))),
    ("13 tokens, the base 11; .*share_vocabulary", mixed(BASE, BASE | {TABLE: torch.ones(13, 8)})),
    (
        "other tokens than the base: 'b', 'c'; .*share_vocabulary",
        mixed(BASE, with_tokens(BASE, "a", "c"), base=with_tokens(BASE, "a", "b")),
    ),
    ("no gate 'hiden' .did you mean 'hidden'", mixed(gate="hiden")),
    ("needs prompts for every expert, and expert 1 has none", mixed(Expert(BASE, ["a"]), BASE, gate="hidden")),
    ("list of texts, got 'a'", mixed(Expert(BASE, "a"), BASE)),
    ("all experts have the same prompts", mixed(*[Expert(BASE, ["a"])] * 2, gate="hidden")),
    (r"gate must be \[2, 2, 8\]", mixed(gate=torch.ones(3, 8))),
    ("every layer from 0 to 1", mixed(gate={0: torch.ones(2, 8)})),
    ("differ in shape", mixed(gate={0: torch.ones(2, 8), 1: torch.ones(3, 8)})),
    ("NaN", mixed(gate=torch.full((2, 8), torch.nan))),
    ("noise_scale >= 0", mixed(Expert(BASE, noise_scale=-1.0), BASE)),
    ("layout is", mixed(layout="flat")),
    ("separate experts alone", mixed(architecture="deepseek", layout="fused")),
    ("looks at all tokens", mixed(*[MISTRAL] * 2, base=MISTRAL, architecture="deepseek")),
]


@pytest.mark.parametrize(("said", "asked"), REFUSED, ids=[said for said, _ in REFUSED])
def test_refusals(said: str, asked: Any):
    with pytest.raises(Error, match=said):
        asked()


def test_the_base_s_vocabulary_can_be_taken_for_all():
    other = with_tokens(BASE | {"model.embed_tokens.weight": torch.ones(13, 8)}, "a", "c")
    mixed = assemble([other] * 2, with_tokens(BASE, "a", "b"), gate="zeros", vocabulary="base")
    assert mixed.spec("model.embed_tokens.weight").shape == (11, 8)


# Documents


def document(**more: Any) -> dict[str, Any]:
    experts = [{"source_model": "one", "positive_prompts": ["a"]}, {"source_model": "two", "positive_prompts": ["b"]}]
    return {"base_model": "base", "gate_mode": "random", "experts": experts, **more}


def test_a_document_is_a_call():
    models = {"base": dense(0, torch_dtype="bfloat16"), "one": dense(1), "two": dense(2)}
    plain = document(experts_per_token=1, seed=7)
    plain["experts"][0] |= {"residual_scale": 0.5, "noise_scale": None}
    found = assemble_document(plain, models.__getitem__)
    experts = [Expert(models["one"], residual_scale=0.5), models["two"]]
    wanted = assemble(experts, models["base"], gate="random", experts_per_token=1, seed=7, dtype="bfloat16")
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert config_of(found) == config_of(wanted)


@pytest.mark.parametrize(
    ("said", "kind", "prompts", "name"),
    [
        (None, "llama", None, "mixtral"),
        ("deepseek", "llama", None, "deepseek"),
        ("Qwen", "qwen3", None, "qwen3_moe"),
        ("qwen", "llama", ["a"], "qwen2_moe"),
        (None, "llama", [], "deepseek"),
        (None, "llama", ["a"], "deepseek"),
        (None, "qwen2", ["a"], "qwen2_moe"),
    ],
)
def test_the_architecture_of_a_document(said: str | None, kind: str, prompts: list[str] | None, name: str):
    plain = document(gate_mode="random")
    if said:
        plain["architecture"] = said
    if prompts is not None:
        plain["shared_experts"] = [{"source_model": "base", "positive_prompts": prompts}]
    assert config_of(assemble_document(plain, lambda _: dense(kind=kind)))["model_type"] == name


def test_a_shared_expert_with_prompts_has_a_gate_in_a_document():
    """Without prompts it has none, and so it is another architecture; here prompts are read by nobody."""
    shared = [Expert(BASE, ["a"])], [Expert(BASE)]
    found = [_architecture(None, "llama", one, gate) for gate in ("hidden", "random") for one in shared]
    assert found == ["qwen2_moe", "deepseek", "deepseek", "deepseek"]


def test_a_document_takes_the_vocabulary_of_the_base():
    other = with_tokens(BASE, "a", "c")
    models = {"base": with_tokens(BASE, "a", "b"), "one": other, "two": other}
    assert assemble_document(document(), models.__getitem__).spec("lm_head.weight").shape == (11, 8)
    with pytest.raises(Error, match="other tokens than the base"):
        assemble_document(document(vocabulary="check"), models.__getitem__)


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_other_processes_can_put_it_together(executor: Any, tmp_path: Path):
    folders = [tmp_path / f"model{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        dense(seed).save(folder)
    experts = [Expert(folders[0], noise_scale=0.1), folders[1]]
    mixed = assemble(experts, folders[0], gate="random", layout="fused")
    mixed.save(tmp_path / "out", executor=executor, workers=None if executor == "threads" else 2)
    for name, value in ws.open(tmp_path / "out").items():
        assert torch.equal(value, mixed[name]), name


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("no key 'expert'", {"expert": []}),
        (r"experts\[0\] has no key 'prompts'", {"experts": [{"prompts": []}]}),
        ("needs source_model", {"experts": [{"positive_prompts": ["a"]}]}),
        ("must be a list of texts", {"experts": [{"source_model": "one", "positive_prompts": "a"}]}),
        ("must be a number", {"experts": [{"source_model": "one", "residual_scale": "0.1"}]}),
        ("must be a list, got", {"experts": "one"}),
        ("at least one entry", {"experts": []}),
        ("no architecture has more than one", {"shared_experts": [{"source_model": "one"}] * 2}),
        ("gate_mode: must be one of", {"gate_mode": "rand"}),
        ("architecture: must be one of", {"architecture": "gpt"}),
        ("whole number", {"experts_per_token": "2"}),
        ("needs base_model", {"base_model": None}),
        ("must be a mapping", {"experts": ["one"]}),
    ],
)
def test_documents_that_are_refused(said: str, more: dict[str, Any]):
    with pytest.raises(Error, match=said):
        assemble_document(document(**more), lambda _: BASE)


def test_every_architecture_is_known_by_the_class_that_is_named():
    transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)
    for name, target in TARGETS.items():
        assert name == "deepseek" or transformers.AutoConfig.for_model(name).model_type == name
        assert name == "deepseek" or hasattr(transformers, target.class_name)
