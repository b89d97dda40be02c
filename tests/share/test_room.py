"""`encode`, `decode` and `sizes` on whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.share import METADATA, decode, encode, grouped_codebooks, sizes
from weightsmith.weights import Weights

CONFIG = {"model_type": "llama", "hidden_size": 64}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def checkpoint() -> Weights:
    head = normal(50, 64).bfloat16()
    tensors = {
        "embed.weight": head,
        "layer.weight": normal(80, 64, seed=1).bfloat16(),
        "norm.weight": torch.ones(64).bfloat16(),
        "steps": torch.tensor(7),
        "lm_head.weight": head,
    }
    return Weights.of(tensors).with_files({"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}"})


def test_what_becomes_of_a_checkpoint():
    weights = checkpoint()
    encoded = encode(weights)
    ends = ("stream", "rest", "sizes", "table", "shape")
    assert list(encoded) == [
        *(f"embed.weight_{end}" for end in ends),
        *(f"layer.weight_{end}" for end in ends),
        "norm.weight",  # too small to gain
        "steps",
        *(f"lm_head.weight_{end}" for end in ends),
    ]
    assert encoded.ties["lm_head.weight_stream"] == "embed.weight_stream"
    assert json.loads(encoded.metadata[METADATA])["layer.weight"] == {"codec": "exponents", "dtype": "bfloat16"}
    assert encoded.nbytes < weights.nbytes
    assert encoded.lineage.method == "share.encode"


@pytest.mark.parametrize("shards", [None, 4000])
def test_there_and_back_through_a_folder(shards: int | None, tmp_path: Path):
    weights = checkpoint()
    encode(weights).save(tmp_path / "small", max_shard_size=shards)
    assert not (tmp_path / "small" / "config.json").exists()  # transformers would fill in random numbers
    assert (tmp_path / "small" / "tokenizer.json").exists()
    back = decode(tmp_path / "small")
    assert list(back) == list(weights) or sorted(back) == sorted(weights)
    assert back.specs == {name: weights.spec(name) for name in back}
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert back.ties
    assert METADATA not in back.metadata
    back.save(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == CONFIG
    assert not (tmp_path / "whole" / "config.decoded.json").exists()


def test_a_model_of_transformers_answers_as_before(shared_llama: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="loads Hugging Face models")
    encode(shared_llama, pattern="*proj.weight").save(tmp_path / "small")
    decode(tmp_path / "small").save(tmp_path / "back")
    words = torch.tensor([[1, 2, 3, 4]])
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)(words).logits
        for folder in (shared_llama, tmp_path / "back")
    )
    assert torch.equal(one, other)


def test_decoded_weights_are_weights_like_others():
    weights = checkpoint()
    twice = 2 * decode(encode(weights)).select("layer.weight")
    assert torch.equal(twice["layer.weight"], (2 * weights)["layer.weight"])
    pruned = ws.prune.magnitude(decode(encode(weights)), 0.5)
    assert torch.equal(pruned["layer.weight"], ws.prune.magnitude(weights, 0.5)["layer.weight"])
    module = torch.nn.Linear(64, 80, bias=False, dtype=torch.bfloat16)
    decode(encode({"weight": weights["layer.weight"]})).load_into(module)
    assert torch.equal(module.weight.detach(), weights["layer.weight"])


def test_what_goes_in_stays_as_it_was():
    weights = checkpoint()
    before = {name: tensor.clone() for name, tensor in weights.to_dict().items()}
    decode(encode(weights)).to_dict()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert METADATA not in weights.metadata


def test_codecs_one_after_the_other():
    weights = checkpoint()
    first = grouped_codebooks(weights, bits=4, groups=2)  # the layer alone: the head and the embedding are left out
    both = encode(first, pattern="embed.weight")
    told = json.loads(both.metadata[METADATA])
    assert told["layer.weight"]["codec"] == "grouped_codebooks"
    assert told["embed.weight"]["codec"] == told["lm_head.weight"]["codec"] == "exponents"
    back = decode(both)
    assert torch.equal(back["embed.weight"], weights["embed.weight"])
    assert torch.equal(back["layer.weight"], decode(first)["layer.weight"])
    assert back.files["config.json"] == weights.files["config.json"]


def test_what_is_encoded_is_not_encoded_again():
    weights = {"w": normal(200, 300), "v": normal(80, 90, seed=1)}
    first = grouped_codebooks(weights, pattern="w", bits=8, groups=16, steps=0, sweeps=0)
    assert first.spec("w_codebooks").nbytes == 16 * 256 * 4  # large enough to gain
    both = encode(first)
    assert "v_stream" in both
    assert torch.equal(decode(both)["w"], decode(first)["w"])
    assert "w_codebooks" in grouped_codebooks(first, bits=2, steps=0, sweeps=0)
    for again in (encode, grouped_codebooks):
        with pytest.raises(Error, match="w_codebooks belongs to w, which is encoded already"):
            again(first, pattern="*books")


def test_by_default_what_gets_smaller_and_by_name_whatever():
    drawn = torch.randint(-(2**15), 2**15, (9000,), generator=torch.Generator().manual_seed(0))
    weights = {"noise": drawn.to(torch.int16).view(torch.float16), "w": normal(90, 90).half()}
    assert "noise" in encode(weights)
    assert "noise_stream" in encode(weights, pattern="noise")
    with pytest.raises(Error, match="gets smaller"):
        encode({"noise": weights["noise"]})


@pytest.mark.parametrize(
    ("weights", "options", "told"),
    [
        ({"w": torch.ones(5000)}, {"codec": "exponent"}, "did you mean 'exponents'"),
        ({"w": torch.ones(5000)}, {"pattern": "v"}, "no tensor to encode fits"),
        ({"w": torch.arange(5000)}, {}, "no tensor to encode fits"),
        ({"w": torch.arange(5000)}, {"pattern": "w"}, "floats"),
        ({"w": torch.ones(0)}, {"pattern": "w"}, "at least one"),
        ({"w": torch.ones(5000), "w_rest": torch.ones(1)}, {"pattern": "w"}, "a tensor called w_rest already"),
    ],
)
def test_what_cannot_be_encoded(weights: dict[str, Tensor], options: dict[str, Any], told: str):
    with pytest.raises(Error, match=told):
        encode(weights, **options)


def told_otherwise(words: str | None, **tensors: Tensor) -> Weights:
    encoded = encode({"w": normal(90, 90)})
    nodes = {**encoded._nodes, **Weights.of(tensors)._nodes}
    return Weights(nodes, metadata={} if words is None else {METADATA: words})


@pytest.mark.parametrize(
    "words",
    ["", "[]", "3", "{", '{"w": 3}', '{"w": {}}', '{"w": {"codec": "zip", "dtype": "float32"}}', "[" * 100_000,
     '{"w": {"codec": "exponents", "dtype": ["float32"]}}',
     '{"w": {"codec": "grouped_codebooks", "dtype": "float32", "bits": "4"}}'],
)  # fmt: skip
def test_headers_that_lie(words: str):
    with pytest.raises(FormatError):
        decode(told_otherwise(words))


def test_what_cannot_be_decoded():
    with pytest.raises(Error, match="nothing here is encoded"):
        decode(told_otherwise(None))
    words = '{"w": {"codec": "exponents", "dtype": "float32"}}'
    with pytest.raises(FormatError, match="there encoded and as it is"):
        decode(told_otherwise(words, w=torch.ones(3)))
    encoded = encode({"w": normal(90, 90)})
    with pytest.raises(FormatError, match="w_table is missing"):
        decode(encoded.drop("w_table"))


def test_sizes():
    weights = checkpoint()
    encoded = encode(weights)
    found = sizes(encoded)
    assert found["tensor"] == ["embed.weight", "layer.weight"]
    assert found["before"] == [50 * 64 * 2, 80 * 64 * 2]
    own = [sum(encoded.spec(name).nbytes for name in encoded if name.startswith(start)) for start in ("embed", "layer")]
    assert found["after"] == own
    assert found["bits"] == pytest.approx([8 * own[0] / 3200, 8 * own[1] / 5120])
    assert found["bytes before"] == weights.nbytes
    assert found["bytes after"] == encoded.nbytes
    with pytest.raises(Error, match="nothing here is encoded"):
        sizes(weights)
