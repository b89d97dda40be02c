"""GGUF: values, ranges, names and row orders against the gguf package and transformers; and files that lie."""

from __future__ import annotations

import json
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.errors import Error, FormatError, MissingPackage
from weightsmith.weights import _gguf, _gguf_header, _gguf_names
from weightsmith.weights._files import LocalFile
from weightsmith.weights._gguf import Packed, companions, read
from weightsmith.weights._lazy import Scratch, convert, materialize
from weightsmith.weights._open import open as open_weights

gguf = pytest.importorskip("gguf", reason="GGUF files are unpacked by the package gguf")

Kind = gguf.GGMLQuantizationType
QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
UNPACKABLE = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)


class Memory:
    """A file in memory, which notes the ranges that are read."""

    def __init__(self, data: bytes, name: str = "tiny.gguf"):
        self.data, self.name, self.size = data, name, len(data)
        self.asked: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.asked.append((offset, len(buffer)))
        found = self.data[offset : offset + len(buffer)]
        if len(found) < len(buffer):
            raise FormatError(f"{self.name}: ends early")
        if found:
            buffer[:] = found

    def view(self, offset: int, nbytes: int) -> Tensor:
        values = bytearray(nbytes)
        self.read_into(offset, memoryview(values))
        return torch.frombuffer(values, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)

    def identity(self) -> object:
        return [self.name, hash(self.data)]


def write(path: Path, architecture: str, tensors: dict[str, Any], words: dict[str, Any] | None = None) -> Path:
    """A GGUF file by the package's own writer. A tensor is an array, or (bytes, type) already packed."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (words or {}).items():
        key = key.replace("{}", architecture)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(kind: Any, rows: int = 6, blocks: int = 3, seed: int = 0) -> np.ndarray:
    """Packed rows with finite values: quantized where the package can, else random codes with sane scales."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    if kind.name in QUANTIZABLE:
        return gguf.quants.quantize(random.standard_normal((rows, blocks * block), dtype=np.float32), kind)
    codes = random.integers(0, 256, (rows * blocks * nbytes,), dtype=np.uint8).reshape(-1, nbytes)
    # Whatever lies where, no half-precision scale made of these bytes is infinite or no number.
    return (codes & 0x3B).reshape(rows, blocks * nbytes)


def everything(contents: Any) -> dict[str, Tensor]:
    return {name: materialize(node) for name, node in contents.nodes.items()}


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# Values


@pytest.mark.parametrize("name", [*QUANTIZABLE, *UNPACKABLE])
def test_packed_values_are_those_of_the_package(tmp_path, name):
    kind = Kind[name]
    data = packed(kind)
    path = write(tmp_path / "a.gguf", "unheard-of", {"w": (data, kind)})
    node = read(LocalFile(path)).nodes["w"]
    expected = gguf.quants.dequantize(data, kind)
    assert node.spec.shape == expected.shape
    assert node.spec.dtype == torch.float32
    assert torch.equal(materialize(node), torch.from_numpy(expected))
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 0, "the test needs values that differ"


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K", "IQ4_XS"])
def test_ranges_are_parts_of_the_whole_and_read_no_more(tmp_path, name):
    kind = Kind[name]
    file = Memory(write(tmp_path / "a.gguf", "x", {"w": (packed(kind), kind)}).read_bytes())
    node = read(file).nodes["w"]
    assert isinstance(node, Packed)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    assert node.grain == block
    whole = materialize(node).view(-1)
    for first, last in [(0, 1), (1, 4), (5, 18), (17, 18), (0, 18), (4, 4)]:
        file.asked.clear()
        values = node.read(first * block, last * block, Scratch())
        assert torch.equal(values, whole[first * block : last * block])
        assert sum(length for _, length in file.asked) == (last - first) * nbytes


def test_plain_types_keep_their_dtype(tmp_path):
    floats = numbers(0, 3, 8)
    brain = torch.from_numpy(floats).to(torch.bfloat16)
    tensors = {
        "f32": floats,
        "f16": floats.astype(np.float16),
        "bf16": (brain.view(torch.uint8).numpy(), Kind.BF16),
        "f64": floats.astype(np.float64),
        "i8": np.arange(-4, 4, dtype=np.int8),
        "i32": np.arange(8, dtype=np.int32),
        "i64": np.arange(8, dtype=np.int64) << 40,
    }
    found = everything(read(LocalFile(write(tmp_path / "a.gguf", "x", tensors))))
    for name, array in tensors.items():
        expected = brain if name == "bf16" else torch.from_numpy(array)
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_a_wanted_dtype_is_for_floats_only(tmp_path):
    data = packed(Kind.Q8_0)
    tensors = {"q": (data, Kind.Q8_0), "f": numbers(1, 4, 4), "i": np.arange(5, dtype=np.int32)}
    contents = read(LocalFile(write(tmp_path / "a.gguf", "x", tensors)), None, "bfloat16")
    assert {name: node.spec.dtype for name, node in contents.nodes.items()} == {
        "q": torch.bfloat16,
        "f": torch.bfloat16,
        "i": torch.int32,
    }
    expected = torch.from_numpy(gguf.quants.dequantize(data, Kind.Q8_0)).bfloat16()
    assert torch.equal(materialize(contents.nodes["q"]), expected)


def test_what_the_package_cannot_unpack_is_refused_by_name(tmp_path):
    _, nbytes = gguf.GGML_QUANT_SIZES[Kind.Q8_K]
    path = write(tmp_path / "a.gguf", "x", {"odd.weight": (np.zeros((1, nbytes), np.uint8), Kind.Q8_K)})
    with pytest.raises(Error, match=r"tensor 'odd.weight' is packed as Q8_K"):
        read(LocalFile(path))


def test_infinite_scales_are_values_like_any_others(tmp_path, recwarn):
    data = np.full((1, 34), 0xFF, np.uint8)
    data[:, :2] = np.array([np.inf], np.float16).view(np.uint8)
    contents = read(LocalFile(write(tmp_path / "a.gguf", "x", {"w": (data, Kind.Q8_0)})))
    assert torch.equal(materialize(contents.nodes["w"]), torch.full((1, 32), -torch.inf))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_gguf_is_optional(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", "x", {"w": numbers(0, 4)})
    _gguf_header.kind_of.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"weightsmith\[gguf\]"):
        read(LocalFile(path))


# Names and orders


@pytest.mark.parametrize("architecture", _gguf_names.FAMILIES)
def test_names_agree_with_the_packages_own_table(architecture):
    """The package maps checkpoint names to GGUF names; ours go the other way, so both together are the identity."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, 12)
    family = _gguf_names.FAMILIES[architecture]
    allowed = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{}") for tensor in gguf.MODEL_TENSORS[number]}
    for stem, theirs in family.names.items():
        if stem == "output":
            continue
        assert stem in allowed, f"{architecture} has no tensor {stem}"
        for block in (0, 11):
            name, stacked = _gguf_names.renamed(family, stem.format(block) + ".weight")
            assert not stacked
            assert name == theirs.format(block) + ".weight"
            # The converter of BLOOM names tensors from inside the "transformer" of a checkpoint.
            known = [table.get_name(n) for n in (name[:-7], name[:-7].removeprefix("transformer."))]
            assert stem.format(block) in known
    for stem, theirs in family.experts.items():
        name, stacked = _gguf_names.renamed(family, stem.format(3) + ".weight")
        assert stacked
        assert name.format(5) == theirs.format(3, 5) + ".weight"
        merged = name.removesuffix(".weight").replace("experts.{}", "experts")
        assert table.get_name(merged) == stem.format(3)


def rotary_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order that converters write, by a slow loop: in each head, row i of both halves side by side."""
    size = len(rows) // heads
    out = []
    for head in range(heads):
        for i in range(size // 2):
            out += [rows[head * size + i], rows[head * size + size // 2 + i]]
    return np.stack(out)


def test_llama_rows_return_to_halves(tmp_path):
    heads, kv, size, width = 6, 2, 8, 64
    q, k = numbers(0, heads * size, width), numbers(1, kv * size, width)
    bias = numbers(2, kv * size)
    tensors = {
        "blk.3.attn_q.weight": rotary_pairs(q, heads),
        "blk.3.attn_k.weight": rotary_pairs(k, kv),
        "blk.3.attn_k.bias": rotary_pairs(bias, kv),
        "blk.3.attn_v.weight": k,
    }
    words = {"{}.attention.head_count": heads, "{}.attention.head_count_kv": kv}
    found = everything(read(LocalFile(write(tmp_path / "a.gguf", "llama", tensors, words))))
    prefix = "model.layers.3.self_attn"
    assert torch.equal(found[f"{prefix}.q_proj.weight"], torch.from_numpy(q))
    assert torch.equal(found[f"{prefix}.k_proj.weight"], torch.from_numpy(k))
    assert torch.equal(found[f"{prefix}.k_proj.bias"], torch.from_numpy(bias))
    assert torch.equal(found[f"{prefix}.v_proj.weight"], torch.from_numpy(k))


def test_without_a_count_of_its_own_k_has_the_heads_of_q(tmp_path):
    k = numbers(1, 24, 8)
    path = write(
        tmp_path / "a.gguf", "llama", {"blk.0.attn_k.weight": rotary_pairs(k, 3)}, {"{}.attention.head_count": 3}
    )
    found = everything(read(LocalFile(path)))
    assert torch.equal(found["model.layers.0.self_attn.k_proj.weight"], torch.from_numpy(k))


@pytest.mark.parametrize("words", [{}, {"{}.attention.head_count": 0}, {"{}.attention.head_count": 5}])
def test_heads_that_do_not_fit_are_refused(tmp_path, words):
    path = write(tmp_path / "a.gguf", "llama", {"blk.0.attn_q.weight": numbers(1, 24, 8)}, words)
    with pytest.raises(FormatError, match=r"tensor 'blk.0.attn_q.weight'.*heads"):
        read(LocalFile(path))


def test_changed_values_can_be_read_in_ranges(tmp_path):
    """Every node of a file, cut at every multiple of its grain that is tried, gives parts of the whole."""
    q = gguf.quants.quantize(numbers(0, 32, 64), Kind.Q4_0)
    qkv = gguf.quants.quantize(numbers(1, 3 * 32, 32), Kind.Q8_0)
    cases = {
        "llama": {"blk.0.attn_q.weight": (q, Kind.Q4_0), "token_embd.weight": numbers(2, 6, 32)},
        "bloom": {"blk.0.attn_qkv.weight": (qkv, Kind.Q8_0), "blk.0.attn_qkv.bias": numbers(3, 96)},
        "gpt2": {"blk.0.ffn_up.weight": (q, Kind.Q4_0)},
        "gemma2": {"output_norm.weight": numbers(4, 64)},
        "mamba": {"blk.0.ssm_conv1d.weight": numbers(5, 16, 4), "blk.0.ssm_a": -np.exp(numbers(6, 16, 4))},
    }
    for architecture, tensors in cases.items():
        path = write(tmp_path / f"{architecture}.gguf", architecture, tensors, {"{}.attention.head_count": 4})
        for name, node in read(LocalFile(path)).nodes.items():
            whole = materialize(node).view(-1)
            assert whole.numel() == node.spec.numel
            steps = range(0, node.spec.numel, node.grain)
            parts = [
                convert(node.read(first, min(first + node.grain, node.spec.numel), Scratch()), node.spec.dtype)
                for first in steps
            ]
            assert torch.equal(torch.cat(parts), whole), name
            assert node.identity() == node.identity()
            json.dumps(node.identity())


def test_the_other_changes_are_undone(tmp_path):
    """Each by its formula: norms lose their one, GPT-2's matrices turn, mamba's A goes back to its logarithm."""
    norm, matrix, a, kernel = numbers(0, 16), numbers(1, 8, 24), numbers(2, 16, 4), numbers(3, 16, 4)
    gemma = everything(read(LocalFile(write(tmp_path / "1", "gemma3", {"blk.0.attn_q_norm.weight": norm + 1}))))
    torch.testing.assert_close(gemma["model.layers.0.self_attn.q_norm.weight"], torch.from_numpy(norm))
    gpt2 = everything(read(LocalFile(write(tmp_path / "2", "gpt2", {"blk.0.attn_qkv.weight": matrix}))))
    assert torch.equal(gpt2["transformer.h.0.attn.c_attn.weight"], torch.from_numpy(matrix.T))
    tensors = {"blk.0.ssm_a": -np.exp(a), "blk.0.ssm_conv1d.weight": kernel}
    mamba = everything(read(LocalFile(write(tmp_path / "3", "mamba", tensors))))
    torch.testing.assert_close(mamba["backbone.layers.0.mixer.A_log"], torch.from_numpy(a))
    assert torch.equal(mamba["backbone.layers.0.mixer.conv1d.weight"], torch.from_numpy(kernel)[:, None])


def test_bloom_heads_are_put_together_again(tmp_path):
    heads, size, width = 4, 8, 32
    fused = numbers(0, heads * 3 * size, width)
    split = np.concatenate(
        [fused[(h * 3 + part) * size : (h * 3 + part + 1) * size] for part in range(3) for h in range(heads)]
    )
    path = write(tmp_path / "a.gguf", "bloom", {"blk.0.attn_qkv.weight": split}, {"{}.attention.head_count": heads})
    found = everything(read(LocalFile(path)))
    assert torch.equal(found["transformer.h.0.self_attention.query_key_value.weight"], torch.from_numpy(fused))


def test_stacked_experts_are_told_apart(tmp_path):
    rows = packed(Kind.Q4_0, rows=3 * 4, blocks=2)
    tensors = {
        "blk.1.ffn_up_exps.weight": (rows.reshape(3, 4, -1), Kind.Q4_0),
        "blk.1.ffn_gate_inp.weight": numbers(0, 3, 64),
        "blk.1.ffn_gate_inp_shexp.weight": numbers(1, 64),
    }
    contents = read(LocalFile(write(tmp_path / "a.gguf", "qwen2moe", tensors)))
    whole = torch.from_numpy(gguf.quants.dequantize(rows, Kind.Q4_0)).view(3, 4, 64)
    assert list(contents.nodes) == [
        *(f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(3)),
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
    ]
    for expert in range(3):
        node = contents.nodes[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        assert torch.equal(materialize(node), whole[expert])
    assert contents.nodes["model.layers.1.mlp.shared_expert_gate.weight"].spec.shape == (1, 64)


def test_the_output_layer_is_the_embedding_where_the_file_has_none(tmp_path):
    embedding = numbers(0, 6, 32)
    tied = read(LocalFile(write(tmp_path / "a", "qwen2", {"token_embd.weight": embedding})))
    assert tied.nodes["lm_head.weight"] is tied.nodes["model.embed_tokens.weight"]
    both = {"token_embd.weight": embedding, "output.weight": embedding + 1}
    apart = read(LocalFile(write(tmp_path / "b", "qwen2", both)))
    assert torch.equal(materialize(apart.nodes["lm_head.weight"]), torch.from_numpy(embedding + 1))
    encoder = read(LocalFile(write(tmp_path / "c", "bert", {"token_embd.weight": embedding})))
    assert list(encoder.nodes) == ["embeddings.word_embeddings.weight"]


def test_unknown_families_keep_their_names_and_say_so(tmp_path):
    contents = read(LocalFile(write(tmp_path / "a.gguf", "unheard-of", {"blk.0.attn_q.weight": numbers(0, 4, 32)})))
    assert list(contents.nodes) == ["blk.0.attn_q.weight"]
    assert (
        "no table of names for the architecture 'unheard-of'"
        in json.loads(contents.metadata["weightsmith.gguf"])["names"]
    )


def test_what_a_family_does_not_know_is_listed(tmp_path):
    tensors = {"rope_freqs.weight": numbers(0, 32), "blk.0.strange.weight": numbers(1, 32)}
    contents = read(LocalFile(write(tmp_path / "a.gguf", "llama", tensors)))
    report = json.loads(contents.metadata["weightsmith.gguf"])
    assert list(contents.nodes) == ["blk.0.strange.weight"]
    assert report["left out"] == ["rope_freqs.weight"]
    assert report["names unknown"] == ["blk.0.strange.weight"]


def test_metadata_is_json_and_short(tmp_path):
    words: dict[str, Any] = {
        "general.name": "Tiny",
        "{}.context_length": 128,
        "{}.eps": 0.5,
        "{}.nan": float("nan"),
        "flag": True,
        "few": [1, 2, 3],
        "tokens": [f"<{n}>" for n in range(5000)],
        "types": list(range(5000)),
        "template": "x" * 100_000,
    }
    found = read(LocalFile(write(tmp_path / "a.gguf", "llama", {"output_norm.weight": numbers(0, 32)}, words))).metadata
    values = {key: json.loads(value, parse_constant=lambda word: pytest.fail(word)) for key, value in found.items()}
    assert values["general.name"] == "Tiny"
    assert values["llama.context_length"] == 128
    assert values["llama.eps"] == 0.5
    assert values["llama.nan"] == "nan"
    assert values["flag"] is True
    assert values["few"] == [1, 2, 3]
    assert values["tokens"]["count"] == values["types"]["count"] == 5000
    assert values["tokens"]["first"][:2] == ["<0>", "<1>"]
    assert len(found["template"]) < 70_000


def test_a_split_model_is_read_with_the_names_of_its_first_file(tmp_path):
    words = {"split.count": 2, "{}.attention.head_count": 2}
    q = numbers(0, 8, 32)
    write(tmp_path / "m-00001-of-00002.gguf", "llama", {"token_embd.weight": numbers(1, 6, 32)}, words)
    later = write(
        tmp_path / "tmp", "llama", {"blk.0.attn_q.weight": rotary_pairs(q, 2), "output.weight": numbers(2, 6, 32)}
    )
    # Later files of a split say nothing of the model; the package's writer would put the architecture there.
    raw = later.read_bytes().replace(b"general.architecture", b"general.architectura")
    count = struct.pack("<Q", 2)
    split = struct.pack("<Q", 11) + b"split.count" + struct.pack("<IH", 2, 2)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(shifted(raw, count, split))
    later.unlink()
    weights = open_weights(tmp_path)
    assert set(weights) == {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(q))
    assert torch.equal(weights["lm_head.weight"], torch.from_numpy(numbers(2, 6, 32)))
    part = (tmp_path / "m-00002-of-00002.gguf").read_bytes()
    with pytest.raises(FormatError, match="one of 2 files of a split model"):
        read(Memory(part))


def shifted(raw: bytes, keys: bytes, extra: bytes) -> bytes:
    """The file with another count of keys and one more key in front; values stay aligned."""
    header = gguf.GGUFReader  # its parse tells where the values begin
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(raw)
        file.flush()
        start = header(file.name).data_offset
    last = max(field.offset + sum(int(p.nbytes) for p in field.parts) for field in fields_of(raw))
    front = raw[:16] + keys + extra + raw[24:last]
    return front.ljust(-(-len(front) // 32) * 32, b"\0") + raw[start:]


def fields_of(raw: bytes) -> list[Any]:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(raw)
        file.flush()
        reader = gguf.GGUFReader(file.name)
        return [tensor.field for tensor in reader.tensors]


def test_companions_without_transformers_are_none(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", "llama", {"output_norm.weight": numbers(0, 32)})
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert companions(path) == {}


def test_companions_of_an_unknown_family_are_none(tmp_path):
    pytest.importorskip("transformers", reason="asked for companions")
    path = write(tmp_path / "a.gguf", "unheard-of", {"w": numbers(0, 32)})
    assert companions(path) == {}


# Files that lie


def tiny(tmp: Path | None = None) -> bytes:
    """A small valid file with every part a file can have."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        tensors = {
            "token_embd.weight": (packed(Kind.Q4_0, rows=4, blocks=1), Kind.Q4_0),
            "blk.0.attn_q.weight": numbers(0, 8, 32),
            "blk.0.ffn_up_exps.weight": numbers(1, 2, 4, 32),
            "output_norm.weight": numbers(2, 32).astype(np.float16),
        }
        words = {"{}.attention.head_count": 2, "tokens": ["a", "b", "c"] * 4, "types": [1, 2, 3], "flag": True}
        return write(Path(place, "a.gguf"), "llama", tensors, words).read_bytes()


TINY = tiny()


def test_the_tiny_file_is_valid():
    found = everything(read(Memory(TINY)))
    assert len(found) == 6
    assert all(tensor.isfinite().all() for tensor in found.values())


def header(*parts: Any, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    """A header from its parts: bytes stay, str becomes a counted string, int a 64-bit, (form, value) is packed."""
    raw = b"GGUF" + struct.pack("<IQQ", version, tensors, keys)
    for part in parts:
        if isinstance(part, bytes):
            raw += part
        elif isinstance(part, str):
            raw += struct.pack("<Q", len(part.encode())) + part.encode()
        elif isinstance(part, int):
            raw += struct.pack("<Q", part)
        else:
            raw += struct.pack("<" + part[0], part[1])
    return raw


def tensor_info(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    raw = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return raw + b"".join(struct.pack("<Q", n) for n in shape) + struct.pack("<IQ", kind, offset)


def filled(raw: bytes, nbytes: int = 256) -> bytes:
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(nbytes)


HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "only the magic": (b"GGUF", "not a GGUF file"),
    "another magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "too many tensors": (header(tensors=2**60), "claims"),
    "too many keys": (header(keys=2**40), "claims"),
    "key without end": (header(2**62, keys=1), "the name of a key"),
    "key that is no text": (header(2, b"\xff\xfe", ("I", 7), b"\1", keys=1), "no text"),
    "text without end": (header("a", ("I", 8), 2**62, keys=1), "truncated in its header"),
    "array without end": (header("a", ("I", 9), ("I", 5), 2**61, keys=1), "truncated in its header"),
    "strings without end": (header("a", ("I", 9), ("I", 8), 2**60, keys=1), "truncated in its header"),
    "unknown type": (header("a", ("I", 77), keys=1), "unknown type 77"),
    "unknown type in an array": (header("a", ("I", 9), ("I", 77), 1, bytes(8), keys=1), "unknown type 77"),
    "deep arrays": (header("a", ("I", 9), struct.pack("<IQ", 9, 1) * 50, keys=1), "nested too deep"),
    "two of a key": (header("a", ("I", 7), b"\1", "a", ("I", 7), b"\1", keys=2), "stands twice"),
    "odd alignment": (header("general.alignment", ("I", 4), ("I", 24), keys=1), "no power of two"),
    "no alignment": (header("general.alignment", ("I", 4), ("I", 0), keys=1), "no power of two"),
    "alignment of text": (header("general.alignment", ("I", 8), "32", keys=1), "not an unsigned"),
    "five axes": (filled(header(tensor_info("t", [1] * 5, 0, 0), tensors=1)), "5 axes"),
    "unknown packing": (filled(header(tensor_info("t", [4], 999, 0), tensors=1)), "type 999"),
    "removed packing": (filled(header(tensor_info("t", [4], 4, 0), tensors=1)), "type 4"),
    "rows that cannot be packed": (filled(header(tensor_info("t", [33], 2, 0), tensors=1)), "rows of 33"),
    "scalar that cannot be packed": (filled(header(tensor_info("t", [], 2, 0), tensors=1)), "rows of 1"),
    "values beyond the end": (filled(header(tensor_info("t", [65], 0, 0), tensors=1)), "truncated"),
    "offset beyond the end": (filled(header(tensor_info("t", [4], 0, 2**60), tensors=1)), "truncated"),
    "a huge shape": (filled(header(tensor_info("t", [2**63, 2**63], 0, 0), tensors=1)), "truncated"),
    "offset off the grid": (filled(header(tensor_info("t", [4], 0, 4), tensors=1)), "not aligned"),
    "two of a name": (
        filled(header(tensor_info("t", [4], 0, 0), tensor_info("t", [4], 0, 32), tensors=2)),
        "stands twice",
    ),
    "an overlap": (
        filled(header(tensor_info("t", [16], 0, 0), tensor_info("u", [4], 0, 32), tensors=2)),
        "overlaps 't'",
    ),
    "two names for one": (
        filled(
            header(
                *("general.architecture", ("I", 8), "mamba"),
                *(tensor_info("blk.0.ssm_d", [4], 0, 0), tensor_info("backbone.layers.0.mixer.D", [4], 0, 32)),
                tensors=2,
                keys=1,
            )
        ),
        "are both 'backbone.layers.0.mixer.D'",
    ),
    "experts without end": (
        filled(
            header(
                *("general.architecture", ("I", 8), "llama"),
                tensor_info("blk.0.ffn_up_exps.weight", [0, 4, 2**50], 0, 0),
                tensors=1,
                keys=1,
            )
        ),
        "experts",
    ),
    "heads of a wrong kind": (
        filled(
            header(
                *("general.architecture", ("I", 8), "llama", "llama.attention.head_count", ("I", 8), "four"),
                tensor_info("blk.0.attn_q.weight", [4, 4], 0, 0),
                tensors=1,
                keys=2,
            )
        ),
        "head_count is four",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_lies_are_named(name):
    raw, says = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=rf"tiny\.gguf.*({says})"):
            read(Memory(raw))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_every_cut_is_noticed():
    """The last bytes may be padding; anything shorter lacks something that the header promises."""
    needed = max(e.offset + e.nbytes for e in _gguf_header.read_header(Memory(TINY)).entries.values())
    for length in range(0, needed, 7):
        with pytest.raises(FormatError):
            read(Memory(TINY[:length]))


def test_a_header_of_many_words_is_walked_with_a_window(monkeypatch):
    monkeypatch.setattr(_gguf_header, "WINDOW", 4096)
    words = b"".join(struct.pack("<Q", n % 30) + b"x" * (n % 30) for n in range(20_000))
    file = Memory(header("tokens", ("I", 9), ("I", 8), 20_000, words, "end", ("I", 4), ("I", 7), keys=2))
    found = _gguf_header.read_header(file).words
    assert found["end"] == 7
    assert found["tokens"] == _gguf_header.Summary(20_000, ["x" * n for n in range(8)])
    assert max(length for _, length in file.asked) <= 4096


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [
        ("MOST_WORDS", 100, "more than 100 words"),
        ("LARGEST_KEPT", 100, "more than 100 bytes"),
        ("LARGEST_HEADER", 500, "over 500"),
    ],
)
def test_limits_hold(monkeypatch, limit, value, says):
    monkeypatch.setattr(_gguf_header, limit, value)
    words = b"".join(struct.pack("<Q", 20) + b"x" * 20 for _ in range(200))
    with pytest.raises(FormatError, match=says):
        read(Memory(header("tokens", ("I", 9), ("I", 8), 200, words, keys=1)))


def test_expert_and_tensor_counts_are_limited_together(monkeypatch):
    monkeypatch.setattr(_gguf, "MOST_NAMES", 1)
    with pytest.raises(FormatError, match=r"more than 1 tensors|holds 2 experts"):
        read(Memory(TINY))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    raw = bytearray(TINY)
    for _ in range(draw(st.integers(1, 4))):
        # Most damage goes to the header, where it can deceive.
        place = draw(st.one_of(st.integers(0, 700), st.integers(0, len(raw) - 1))) % max(len(raw), 1)
        match draw(st.sampled_from(["flip", "set", "wide", "cut", "insert", "remove"])):
            case "flip":
                raw[place] ^= 1 << draw(st.integers(0, 7))
            case "set":
                raw[place] = draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
            case "wide":
                number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1]))
                raw[place : place + 8] = struct.pack("<Q", number)
            case "cut":
                del raw[place:]
            case "insert":
                raw[place:place] = draw(st.binary(min_size=1, max_size=16))
            case "remove":
                del raw[place : place + draw(st.integers(1, 16))]
        if not raw:
            break
    return bytes(raw)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_damage_is_an_error_or_still_readable(raw):
    tracemalloc.start()
    try:
        contents = read(Memory(raw))
        for node in contents.nodes.values():
            assert node.spec.nbytes <= 64 * len(raw)
            if node.spec.numel:
                step = min(node.grain, node.spec.numel)
                assert node.read(0, step, Scratch()).numel() == step
        assert all(isinstance(json.loads(value), object) for value in contents.metadata.values())
    except Error:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * 2**20
