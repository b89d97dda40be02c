"""Sizes, operations and bytes: against counts by hand, against real modules, and the choice for a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import (
    Cost,
    Shape,
    best_for_time,
    body_size,
    given,
    performance_features,
    shape_of,
    step_cost,
    training_flops,
)

SHAPE = {"layers": 2, "width": 16, "batch": 3, "context": 5, "vocabulary": 11}


def llama(layers=3, width=12, ffn=20, keys=6, vocabulary=30, fused=False):
    up = {"gate_up_proj": (2 * ffn, width)} if fused else {"gate_proj": (ffn, width), "up_proj": (ffn, width)}
    mlp = up | {"down_proj": (width, ffn)}
    attention = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
    made = {"model.embed_tokens.weight": torch.zeros(vocabulary, width), "model.norm.weight": torch.zeros(width)}
    for i in range(layers):
        for name, shape in attention.items():
            made[f"model.layers.{i}.self_attn.{name}.weight"] = torch.zeros(shape)
        for name, shape in mlp.items():
            made[f"model.layers.{i}.mlp.{name}.weight"] = torch.zeros(shape)
        made[f"model.layers.{i}.input_layernorm.weight"] = torch.zeros(width)
    return made


@pytest.mark.parametrize("fused", [False, True])
def test_the_shape_of_a_folder_of_tensors(fused):
    found = shape_of(llama(fused=fused))
    body = 3 * (2 * 144 + 2 * 72 + 3 * 240 + 12) + 12
    assert found == Shape(parameters=body + 360, embedding=360, layers=3, width=12, ffn=20)
    assert found.body == body


def test_the_shape_of_a_module_with_a_tied_head():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(40, 8)
            self.h = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True) for _ in range(4))
            self.head = nn.Linear(8, 40, bias=False)
            self.head.weight = self.wte.weight

    model = Model()
    found = shape_of(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.embedding, found.layers, found.width, found.ffn) == (320, 4, 8, 32)
    assert sum(p.numel() for p in model.h.parameters()) == found.body


def test_no_layers_no_shape():
    with pytest.raises(Error, match="numbered layers"):
        shape_of({"weight": torch.zeros(3, 3)})


def test_body_size_is_twelve_n_d_squared_and_what_a_module_has():
    assert body_size(5, 32) == 12 * 5 * 32**2
    layer = nn.TransformerEncoderLayer(32, 4, 100, bias=False)
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert body_size(1, 32, 100) == matrices
    assert body_size(2, 12, 20, gated=True) == 2 * (4 * 144 + 3 * 240)


def test_training_flops():
    assert training_flops(7e9, 1e12) == 6 * 7e9 * 1e12
    assert training_flops(10, 3, layers=2, width=4, context=8) == 6 * (10 + 64) * 3
    assert scaling.COMPUTE.spent(7e9, 1e12) == training_flops(7e9, 1e12)


def test_features_from_a_config_and_from_tensors_agree():
    config = {"num_hidden_layers": 3, "hidden_size": 12, "intermediate_size": 20, "model_type": "llama"}
    assert performance_features(config, 1e9) == performance_features(llama(), 1e9)
    assert performance_features(config, 1e9)["tokens"] == 1e9
    assert performance_features(config, 1e9, saturation=5e8)["tokens"] == 5e8
    assert performance_features(config, 1e9, saturation=5e10)["tokens"] == 1e9
    old = {"n_layer": 2, "n_embd": 8, "n_inner": None}
    assert performance_features(old, 1e9, discount=0.5) == {
        "depth": 2.0, "width": 8.0, "ffn": 32.0, "tokens": 1e9, "discount": 0.5,
    }  # fmt: skip
    with pytest.raises(Error, match="none of hidden_size"):
        performance_features({"n_layer": 2}, 1e9)
    with pytest.raises(Error, match="discount"):
        performance_features(config, 1e9, discount=0.0)


def test_the_bytes_of_a_step_by_hand():
    heads, ffn, width, tokens, maps = 2, 64, 16, 15, 2 * 5
    each = [
        (width, width), (width, 3 * width), (2 * width, maps), (maps, maps), (maps + width, width), (width, width),
        (2 * width, width), (width, width), (width, ffn), (ffn, ffn), (ffn, width), (2 * width, width),
    ]  # fmt: skip
    activations = tokens * (2 * sum(map(sum, each)) + (width + 11) + 2 * 11 + 2 * width)
    parameters = 12 * 2 * width * width + 11 * width
    cost = step_cost(**SHAPE, heads=heads)
    assert isinstance(cost, Cost)
    assert cost.parameters == parameters
    assert cost.tokens == tokens
    assert cost.bytes == 4 * (3 * (parameters + activations) + 7 * parameters)
    assert cost.flops == 6 * tokens * (parameters + 2 * 2 * width * 5)
    assert step_cost(**SHAPE, heads=heads, element=2).bytes == cost.bytes / 2
    assert step_cost(**SHAPE, heads=heads, optimizer=0).bytes == cost.bytes - 4 * 7 * parameters


def test_the_operations_of_a_step_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    d, t, b, v = 16, 5, 3, 11
    x, w, head = torch.randn(b, t, d), torch.randn(3, 4, d, d), torch.randn(v, d)
    with FlopCounterMode(display=False) as counter:
        q, k, value = (x @ w[0, i] for i in range(3))
        y = ((q @ k.transpose(1, 2)) @ value) @ w[0, 3]
        y = (y @ torch.randn(d, 4 * d)) @ torch.randn(4 * d, d)
        y @ head.T
    one = step_cost(layers=1, width=d, batch=b, context=t, vocabulary=v)
    assert one.flops == 3 * counter.get_total_flops()


def test_wider_moves_fewer_bytes_than_deeper_at_one_size():
    wide = step_cost(layers=2, width=64, batch=8, context=64, vocabulary=50)
    deep = step_cost(layers=8, width=32, batch=8, context=64, vocabulary=50)
    assert body_size(2, 64) == body_size(8, 32)
    assert wide.bytes < deep.bytes


def test_the_best_for_a_time_is_the_lowest_loss_by_hand():
    law = given("chinchilla", E=1.0, A=50.0, B=300.0, alpha=0.3, beta=0.35)
    clock = given("step-time", fixed=1e-3, per_byte=1e-9, per_flop=1e-12)
    candidates = [SHAPE | {"layers": layers, "width": width} for layers in (1, 2, 4) for width in (16, 64, 128)]
    made = best_for_time(law, clock, candidates, 60.0)
    by_hand = []
    for settings in candidates:
        cost = step_cost(**settings)
        tokens = 15 * 60 / (1e-3 + 1e-9 * cost.bytes + 1e-12 * cost.flops)
        by_hand.append(1 + 50 / cost.parameters**0.3 + 300 / tokens**0.35)
    assert made["loss"] == pytest.approx(sorted(by_hand))
    assert made["best candidate"] == by_hand.index(min(by_hand))
    assert best_for_time(law, clock, candidates, 1e9)["best candidate"] == 8  # with time enough, the largest


def test_refusals():
    law = given("chinchilla", E=1.0, A=50.0, B=300.0, alpha=0.3, beta=0.35)
    clock = given("step-time", fixed=1e-3, per_byte=1e-9, per_flop=1e-12)
    with pytest.raises(Error, match="1 or more"):
        step_cost(**SHAPE | {"layers": 0})
    with pytest.raises(Error, match="at least one candidate"):
        best_for_time(law, clock, [], 3.0)
    with pytest.raises(Error, match="same settings"):
        best_for_time(law, clock, [SHAPE, SHAPE | {"heads": 2}], 3.0)
