"""The same files through mergekit and through us: every method, gradients, filters, slices, several documents."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import weightsmith as ws
from weightsmith.recipe import _mergekit
from weightsmith.recipe._yaml import load

REASON = 'needs mergekit: pip install "weightsmith[peers]"'
pytest.importorskip("mergekit.merge_methods", reason=REASON, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=REASON)

LAYERS = 4
HISTOGRAM: Counter[int] = Counter()

ZOO = {
    "linear": """
merge_method: linear
models: [{model: M1, parameters: {weight: 1}}, {model: M2, parameters: {weight: 3}}]
""",
    "linear, not normalized": """
merge_method: linear
models: [{model: M1, parameters: {weight: "0.25"}}, {model: M2, parameters: {weight: 5e-1}}]
parameters: {normalize: false}
""",
    "linear, a base that is merged as well": """
merge_method: linear
base_model: BASE
models: [{model: M1, parameters: {weight: 1}}, {model: M2}]
parameters: {weight: 3}
""",
    "karcher": "{merge_method: karcher, models: [{model: M1}, {model: M2}, {model: M3}], parameters: {max_iter: 20}}",
    "karcher with a base": "{merge_method: karcher, base_model: BASE, models: [{model: M1}, {model: M2}]}",
    "slerp by depth and name": """
merge_method: slerp
base_model: M1
slices:
  - sources: [{model: M1, layer_range: [0, 4]}, {model: M2, layer_range: [0, 4]}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
""",
    "slerp, base second": """
merge_method: slerp
base_model: BASE
models: [{model: M1}, {model: BASE}]
parameters: {t: [0.1, 0.9]}
""",
    "slerp, base absent": "{merge_method: slerp, base_model: BASE, models: [{model: M1}], parameters: {t: 0.3}}",
    "nuslerp": """
merge_method: nuslerp
models: [{model: M1, parameters: {weight: 1}}, {model: M2, parameters: {weight: [1, 3]}}]
""",
    "nuslerp of task vectors": """
merge_method: nuslerp
base_model: BASE
models: [{model: M1, parameters: {weight: 1}}, {model: M2, parameters: {weight: 0.4}}]
""",
    "nuslerp by row": """
merge_method: nuslerp
models: [{model: M1, parameters: {weight: 1}}, {model: M2, parameters: {weight: 0.4}}]
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "nuslerp by column": """
merge_method: nuslerp
base_model: BASE
models: [{model: M1, parameters: {weight: 1}}, {model: M2, parameters: {weight: 0.4}}]
parameters: {nuslerp_flatten: false}
""",
    "multislerp": """
merge_method: multislerp
models:
  - {model: M1, parameters: {weight: 1}}
  - {model: M2, parameters: {weight: 2}}
  - {model: M3, parameters: {weight: 0.5}}
""",
    "multislerp of task vectors": """
merge_method: multislerp
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: [0.5, 1], normalize_weights: false}
""",
    "task arithmetic": """
merge_method: task_arithmetic
base_model: BASE
models:
  - {model: BASE, parameters: {weight: 5}}
  - {model: M1, parameters: {weight: [0, 1]}}
  - {model: M2, parameters: {weight: [{filter: mlp, value: [1, 0]}, {value: 0.5}]}}
parameters: {lambda: "0.5"}
""",
    "task arithmetic, negated and normalized": """
merge_method: task_arithmetic
base_model: BASE
models: [{model: M1, parameters: {weight: -0.5}}, {model: M2, parameters: {weight: 1.5}}]
parameters: {normalize: true, int8_mask: true}
""",
    "ties": """
merge_method: ties
base_model: BASE
models:
  - {model: M1, parameters: {weight: 1, density: [1, 0.7, 0.1]}}
  - {model: M2, parameters: {weight: [0, 0.3, 0.7, 1]}}
  - {model: M3, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0}], density: 0.33}}
parameters: {density: 0.5, normalize: true, int8_mask: true}
""",
    "ties, added and rescaled": """
merge_method: ties
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: 0.7, density: 0.4, normalize: false, rescale: true, lambda: 1.3}
""",
    "dare_linear without dropping": """
merge_method: dare_linear
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: 0.5, normalize: true}
""",
    "dare_ties without dropping": """
merge_method: dare_ties
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: [0.2, 0.9], density: 1.0}
""",
    "della without dropping": """
merge_method: della
base_model: BASE
models: [{model: M1}, {model: M2, parameters: {weight: 2}}]
parameters: {weight: 1, density: 1}
""",
    "della_linear without dropping": """
merge_method: della_linear
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: 1}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: BASE
models: [{model: M1, parameters: {gamma: 0.05}}, {model: M2}]
parameters: {weight: 0.6, density: [0.9, 0.5]}
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: 0.6, density: 0.8, gamma: 0.03, rescale: true}
""",
    "model_stock": "{merge_method: model_stock, base_model: BASE, models: [{model: N1}, {model: N2}, {model: N3}]}",
    "model_stock by filter": """
merge_method: model_stock
base_model: BASE
models: [{model: N1}, {model: N2}]
parameters: {filter_wise: true}
""",
    "nearswap": "{merge_method: nearswap, base_model: BASE, models: [{model: M1}], parameters: {t: 0.01}}",
    "arcee_fusion": "{merge_method: arcee_fusion, base_model: BASE, models: [{model: M1}]}",
    "sce": "{merge_method: sce, base_model: BASE, models: [{model: M1}, {model: M2}], parameters: {select_topk: 0.5}}",
    "ram": "{merge_method: ram, base_model: BASE, models: [{model: S1}, {model: S2}], parameters: {epsilon: 1e-5}}",
    "ramplus_tl": """
merge_method: ramplus_tl
base_model: BASE
models: [{model: S1}, {model: S2}]
parameters: {r: 0.3, alpha: 0.4}
""",
    "passthrough": "{merge_method: passthrough, models: [{model: M1}]}",
    "a stack": """
merge_method: passthrough
slices:
  - sources: [{model: M1, layer_range: [0, 3]}]
  - sources: [{model: M2, layer_range: [1, 4]}]
""",
    "a stack with silenced layers": """
merge_method: passthrough
slices:
  - sources: [{model: M1, layer_range: [0, 3]}]
  - sources:
      - model: M1
        layer_range: [2, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: [0.5, 0.25]}
            - {value: 1.0}
  - sources: [{model: M1, layer_range: [3, 4]}]
""",
    "empty slices at the ends": """
merge_method: passthrough
slices:
  - sources: [{model: M1, layer_range: [0, 0]}]
  - sources: [{model: M2, layer_range: [1, 3]}]
  - sources: [{model: M3, layer_range: [0, 0]}]
""",
    "slices of different models": """
merge_method: linear
slices:
  - sources:
      - {model: M1, layer_range: [0, 1], parameters: {weight: [0.2, 0.8]}}
      - {model: M2, layer_range: [0, 1], parameters: {weight: [0.8, 0.2]}}
  - sources:
      - {model: M1, layer_range: [2, 4], parameters: {weight: [0.2, 0.8]}}
      - {model: M3, layer_range: [1, 3]}
    parameters: {weight: 7}
""",
    "own filters see input names, shared ones output names": """
merge_method: task_arithmetic
base_model: BASE
slices:
  - sources:
      - {model: BASE, layer_range: [0, 2]}
      - {model: M1, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 1}, {value: 0.25}]}}
      - {model: M2, layer_range: [1, 3], parameters: {weight: [{filter: layers.1., value: 0.5}, {value: 2}]}}
parameters: {lambda: [{filter: layers.0., value: 0.5}, {filter: "*", value: 1}]}
""",
    "a base by slice": """
merge_method: task_arithmetic
base_model: BASE
slices:
  - sources: [{model: M1, layer_range: [0, 2]}, {model: M2, layer_range: [0, 2]}]
    base_model: M2
    parameters: {weight: 0.5}
  - sources: [{model: M1, layer_range: [2, 4]}, {model: BASE, layer_range: [2, 4]}]
    parameters: {weight: 0.25}
""",
    "the whole precedence": """
merge_method: task_arithmetic
base_model: BASE
modules:
  default:
    parameters: {weight: {filter: mlp, value: 0.3}}
    slices:
      - sources:
          - {model: BASE, layer_range: [0, 4]}
          - {model: M1, layer_range: [0, 4], parameters: {weight: [{filter: q_proj, value: 0.1}]}}
        parameters: {weight: {filter: self_attn, value: 0.2}}
parameters: {weight: 0.4}
""",
    "yes and no by depth": """
merge_method: linear
models: [{model: M1}, {model: M2}]
parameters: {weight: 1, normalize: [true, false]}
""",
    "tied": "{merge_method: linear, models: [{model: T1}, {model: T2}], parameters: {weight: [1, 0.5]}}",
    "tied slices": """
merge_method: passthrough
slices:
  - sources: [{model: T1, layer_range: [0, 3]}]
  - sources: [{model: T1, layer_range: [1, 4]}]
""",
    "out_dtype": """
merge_method: task_arithmetic
base_model: BASE
models: [{model: M1}, {model: M2}]
parameters: {weight: 0.5}
dtype: float32
out_dtype: bfloat16
""",
    "bfloat16 inputs": """
merge_method: linear
models: [{model: M1}, {model: M2}]
parameters: {weight: 1}
dtype: bfloat16
""",
    "GPT-2": """
merge_method: slerp
base_model: G1
models: [{model: G1}, {model: G2}]
parameters: {t: [{filter: attn, value: [0, 1]}, {filter: mlp, value: [1, 0.2]}, {value: 0.4}]}
""",
    "a stack of GPT-2": """
merge_method: passthrough
slices:
  - sources: [{model: G1, layer_range: [0, 2]}]
  - sources: [{model: G2, layer_range: [0, 3]}]
""",
}

ULPS = 8.0
"""Units in the last place of a tensor's largest element that the two may differ by."""


def _llama(
    path: Path,
    seed: int,
    start: Any = None,
    *,
    tied: bool = False,
    near: float = 0.05,
    share: float = 1.0,
    vocabulary: int = 48,
):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return _saved(transformers.LlamaForCausalLM(config), path, seed, start, near, share)


def _gpt2(path: Path, seed: int):
    config = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    return _saved(transformers.GPT2LMHeadModel(config), path, seed, None, 0.05, 1.0)


def _saved(model: Any, path: Path, seed: int, start: Any, near: float, share: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if start is not None:
                value.copy_(start[name])
            noise = torch.randn(value.shape, generator=generator)
            value.add_(near * noise * (torch.rand(value.shape, generator=generator) < share))
    model.save_pretrained(path)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small checkpoints: fine-tunes M of BASE, sparse ones S, near ones N, tied ones T, GPT-2 ones G."""
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    base = _llama(folder / "BASE", 0)
    common = _llama(folder / "C", 9, base)
    for number in (1, 2, 3):
        _llama(folder / f"M{number}", number, base)
        _llama(folder / f"N{number}", number, common, near=0.01)
    for number in (1, 2):
        _llama(folder / f"S{number}", number, base, share=0.5)
        _llama(folder / f"T{number}", number, tied=True)
        _gpt2(folder / f"G{number}", number)
    logging.disable(logging.CRITICAL)
    yield folder
    logging.disable(logging.NOTSET)
    total = sum(HISTOGRAM.values())
    print("\nunits in the last place between mergekit and weightsmith, float32:")
    for step in sorted(HISTOGRAM):
        print(f"  {'0' if step == 0 else f'up to {2 ** (step - 1)}':>12}: {HISTOGRAM[step] / total:8.4%}")


def _placed(text: str, zoo: Path) -> str:
    return re.sub(r"\b(BASE|[CMNSTGV]\d?)\b(?=[,}\]\s])", lambda found: str(zoo / found[0]), text)


def _theirs(text: str, out: Path, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    options = MergeOptions(quiet=True, copy_tokenizer=tokens, write_model_card=False, allow_crimes=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    tensors: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors, json.loads((out / "config.json").read_text())


def _compare(ours: Tensor, theirs: Tensor, size: Tensor) -> float:
    """The largest difference in units in the last place of the largest input; fills the histogram."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.dtype == torch.float32:
        plain = (ours.double() - theirs.double()).abs() / (
            torch.finfo(torch.float32).eps * theirs.double().abs().clamp(1e-30)
        )
        for value in plain.flatten().tolist():
            HISTOGRAM[0 if value == 0 else max(1, int(torch.tensor(value).log2().ceil()) + 1)] += 1
    unit = torch.finfo(ours.dtype).eps * size.double().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((ours.double() - theirs.double()).abs() / unit).max())


@pytest.mark.parametrize("name", ZOO)
def test_the_same_file(name: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mergekit.sparsify

    # Which of equal magnitudes are kept is arbitrary there; the first are, here.
    monkeypatch.setattr(mergekit.sparsify.torch, "argsort", _stable(torch.argsort))
    text = _placed(ZOO[name], zoo)
    theirs, config = _theirs(text, tmp_path / "theirs")
    plan = _mergekit.read(load(text, "zoo.yaml"), _mergekit.resolve)
    plan.build().save(tmp_path / "ours")
    ours = ws.open(tmp_path / "ours")
    assert set(ours) == set(theirs)
    scale = {n: t.abs().max() for n, t in theirs.items()}
    worst = {n: _compare(ours[n], theirs[n], torch.maximum(theirs[n].abs(), scale[n])) for n in theirs}
    print(f"{name}: at most {max(worst.values()):.2f} units in the last place")
    assert max(worst.values()) <= ULPS, {n: v for n, v in worst.items() if v > ULPS}
    said = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key in ("num_hidden_layers", "n_layer", "tie_word_embeddings", "vocab_size", "dtype", "architectures"):
        assert said.get(key) == config.get(key), key


DOCUMENTS = """
name: first
merge_method: linear
models: [{model: M1}, {model: M2}]
parameters: {weight: [1, 2]}
---
name: second
merge_method: passthrough
slices:
  - sources: [{model: first, layer_range: [0, 3]}]
  - sources: [{model: M3, layer_range: [3, 4]}]
---
merge_method: ties
base_model: BASE
models: [{model: first}, {model: second}]
parameters: {weight: 0.5, density: [0.9, 0.4]}
"""


def test_several_documents(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There every document is written and read by the next; here they are one pass."""
    import mergekit.sparsify

    monkeypatch.setattr(mergekit.sparsify.torch, "argsort", _stable(torch.argsort))
    text = _placed(DOCUMENTS, zoo)
    theirs: dict[str, Tensor] = {}
    later = text
    for number, document in enumerate(yaml.safe_load_all(text)):
        one = later.split("---")[number]
        if name := document.get("name"):
            one = one.replace(f"name: {name}\n", "")
        out = tmp_path / (name or "last")
        theirs, _ = _theirs(one, out)
        later = re.sub(rf"model: {name}\b", f"model: {out}", later) if name else later
    ours = _mergekit.read(load(text, "zoo.yaml"), _mergekit.resolve).build()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert _compare(ours[name], tensor, tensor.abs().max()) <= ULPS, name


VOCABULARIES = """
merge_method: linear
base_model: V1
models: [{model: V1}, {model: V2}]
parameters: {weight: 1}
"""


@pytest.mark.parametrize(
    "more",
    [
        "tokenizer_source: union",
        "tokenizer_source: base",
        "tokenizer_source: V2",
        "tokenizer: {source: union, pad_to_multiple_of: 16}",
        "tokenizer: {source: union, tokens: {cat: {source: {kind: zero}, force: true}, tree: {source: V1}}}",
        "tokenizer: {source: union, tokens: {dog: {source: {kind: model_token, model: V2, token: cat}}}}",
    ],
)
def test_vocabularies(more: str, zoo: Path, tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers", reason=REASON)
    text = _placed(VOCABULARIES + more + "\n", zoo)
    for number, words in ((1, ["cat", "tree"]), (2, ["dog", "cat", "house"])):
        path = zoo / f"V{number}"
        if path.exists():
            continue
        vocabulary = {word: place for place, word in enumerate(["<unk>", *words])}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
        _llama(path, 20 + number, vocabulary=len(vocabulary))
        fast.save_pretrained(path)
    theirs, config = _theirs(text, tmp_path / "theirs", tokens=True)
    ours = _mergekit.read(load(text, "zoo.yaml"), _mergekit.resolve).build()
    ours.save(tmp_path / "ours")
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs").get_vocab()
    here = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab()
    assert here.keys() == there.keys()
    for name, tensor in theirs.items():
        values = ours[name]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows may stand in another order
            assert values.shape == tensor.shape
            order = [there[word] for word in sorted(here)]
            values, tensor = values[[here[word] for word in sorted(here)]], tensor[order]
        assert _compare(values, tensor, tensor.abs().max()) <= ULPS, name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vocab_size"] == config["vocab_size"]


def test_raw_files(zoo: Path, tmp_path: Path):
    """What mergekit-pytorch does with state dicts: the first of a list counts everywhere."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import merge_state_dicts

    states = []
    for number in (1, 2):
        states.append(dict(ws.open(zoo / f"M{number}").to_dict()))
        torch.save(states[-1], tmp_path / f"m{number}.pt")
    text = f"""
merge_method: linear
models:
  - {{model: {tmp_path}/m1.pt, parameters: {{weight: [1, 5]}}}}
  - {{model: {tmp_path}/m2.pt, parameters: {{weight: 3}}}}
"""
    assert MergeConfiguration.model_validate(yaml.safe_load(text))
    theirs = merge_state_dicts(states, "linear", parameters={"weight": [1.0, 3.0]})
    ours = _mergekit.read(load(text, "zoo.yaml"), _mergekit.resolve).build()
    for name, tensor in theirs.items():
        assert _compare(ours[name], tensor, tensor.abs().max()) <= ULPS, name


def _stable(sort: Any) -> Any:
    def stable(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return sort(values, *arguments, **{**options, "stable": True})

    return stable
