"""A pruned model is brought back, and not one zero is lost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.repair import heal, heal_weights
from weightsmith.prune.repair._heal import _objective, divergence


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 12), nn.ModuleList(Block() for _ in range(2))
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.drop(x))


def pair() -> tuple[Net, Net]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Net()
    model = copy.deepcopy(teacher)
    ws.prune.magnitude(teacher, 0.6, pattern=["*up.weight", "*down.weight"]).load_into(model)
    return model, teacher


def data(count: int = 4, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 32, 6, generator=torch.Generator().manual_seed(seed)))


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() == 0 for name, value in model.named_parameters() if "weight" in name}


def apart(model: nn.Module, teacher: nn.Module) -> float:
    model.eval()
    teacher.eval()
    (unseen,) = data(1, seed=9)
    with torch.no_grad():
        return float(divergence(model(unseen), teacher(unseen), unseen))


@pytest.mark.parametrize("stages", [("blocks",), ("small",), ("lora",), ("all",), ("blocks", "lora")])
def test_every_stage_helps_and_the_zeros_stay(stages: tuple[Any, ...]):
    model, teacher = pair()
    before, gone = apart(model, teacher), zeros(model)
    whole = {name: value.clone() for name, value in teacher.state_dict().items()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rates = {"blocks": 3e-3, "small": 1e-2, "lora": 1e-2, "all": 3e-3}
    assert heal(model, teacher, data(), steps=40, stages=stages, rates=rates) is model  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert apart(model, teacher) < 0.8 * before
    assert all(torch.equal(value, gone[name]) for name, value in zeros(model).items())
    assert all(torch.equal(value, whole[name]) for name, value in teacher.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_the_same_every_time():
    found = []
    for _ in range(2):
        model, teacher = pair()
        heal(model, teacher, data(), steps=3)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_each_stage_trains_what_it_says():
    for stages, changed in (
        (("small",), {"stem.bias", "out.bias"}),
        (("lora",), {"stem.bias", "out.bias", "blocks.0.up.weight", "blocks.1.down.weight"}),
        (("all",), {"stem.weight", "out.weight", "stem.bias"}),
    ):
        model, teacher = pair()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        heal(model, teacher, data(), steps=2, stages=stages)  # type: ignore[arg-type]
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
        assert changed <= moved
        if stages != ("all",):
            assert not {"stem.weight", "out.weight"} & moved
        if stages == ("small",):
            assert not any(name.endswith("up.weight") for name in moved)
    model, teacher = pair()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    heal(model, teacher, data(), steps=2, stages=("blocks",))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if name.startswith("blocks.")}


def test_a_block_makes_up_for_those_before_it():
    model, teacher = pair()
    for parameter in model.blocks[1].parameters():  # only the first block is pruned
        parameter.data.copy_(dict(teacher.blocks[1].named_parameters())[_name(model.blocks[1], parameter)])
    second = copy.deepcopy(model.blocks[1])
    masks = {name: value for name, value in zeros(model).items() if value.any()}
    heal(model, teacher, data(), stages=("blocks",), steps=5, masks={name: ~value for name, value in masks.items()})
    assert not torch.equal(model.blocks[1].up.weight, second.up.weight)


def _name(module: nn.Module, parameter: Tensor) -> str:
    return next(name for name, own in module.named_parameters() if own is parameter)


def test_masks_that_are_given_are_put_on_first():
    model, teacher = pair()
    mask = torch.zeros(24, 12, dtype=torch.bool)
    mask[:3] = True
    heal(model, teacher, data(), steps=2, stages=("all",), masks={"blocks.0.up.weight": mask})
    assert not model.blocks[0].up.weight[3:].any()
    assert (model.blocks[1].up.weight != 0).all()


def test_divergence_by_hand_without_padding():
    logits, told = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    total = 0.0
    for place in (0, 1):  # what comes after tokens 0 and 1; token 3 is padding
        p, q = told[0, place].softmax(0), logits[0, place].softmax(0)
        total += float((p * (p / q).log()).sum())
    assert float(divergence(logits, told, batch)) == pytest.approx(total / 2)


def test_the_truth_counts_where_it_is_asked_for():
    found = []
    for truth in (0.0, 5.0):
        model, teacher = pair()
        labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in data()]
        heal(model, teacher, labelled, steps=20, stages=("all",), truth=truth, rates={"all": 1e-2})
        found.append(functional.cross_entropy(model.eval()(data()[0]), labelled[0][1]).item())
    assert found[1] < found[0] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints(tmp_path: Path, dtype: torch.dtype):
    model, teacher = pair()
    before = apart(model, teacher)
    ws.open(model).cast(dtype).save(tmp_path / "pruned")
    made = Net()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    healed = heal_weights(
        tmp_path / "pruned", teacher, data(), model=made, steps=40, stages=("all",), rates={"all": 3e-3}
    )
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    pruned = ws.open(tmp_path / "pruned")
    for name in pruned:
        assert healed[name].dtype == dtype
        if len(pruned.spec(name).shape) > 1:
            assert not healed[name][pruned[name] == 0].any()
    healed.cast("float32").load_into(model)
    assert apart(model, teacher) < 0.8 * before
    assert "prune.repair.heal_weights" in str(healed.lineage)
    with pytest.raises(Error, match="heal_weights needs model="):
        heal_weights(pruned, ws.open(teacher.state_dict()), data())


def test_a_language_model_from_its_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = transformers.LlamaForCausalLM(config)
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(32, (2, 12), generator=generator)} for _ in range(2)]
    ws.prune.magnitude(dense, 0.5).load_into(model)
    gone = zeros(model)
    before = divergence(model(**batches[0]).logits, dense(**batches[0]).logits, batches[0]).item()
    heal(model, dense, batches, steps=10)
    after = divergence(model(**batches[0]).logits, dense(**batches[0]).logits, batches[0]).item()
    assert after < before
    assert all(torch.equal(value, gone[name]) for name, value in zeros(model).items() if gone[name].any())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": "all"}, "as a sequence"),
        ({"stages": ("everything",)}, "everything"),
        ({"rates": {"quick": 1.0}}, "quick"),
        ({"steps": 0}, "at least 1 step"),
        ({"batches": []}, "at least one batch"),
        ({"teacher": nn.Linear(2, 2)}, "differ in"),
        ({"masks": {"stem.wight": torch.ones(12, 6).bool()}}, "did you mean 'stem.weight'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str):
    model, teacher = pair()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Error, match=says):
        heal(model, **({"teacher": teacher, "batches": data()} | change))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(Error, match="holds zeros"):
        heal(copy.deepcopy(teacher), teacher, data())


def test_blocks_without_tensors_stand_between_those_that_have_some():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Dropout(), nn.Linear(6, 12), nn.Tanh(), nn.Dropout(), nn.Linear(12, 6), nn.Tanh())
    model = copy.deepcopy(teacher)
    masks = {"4.weight": torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.5}
    heal(model, teacher, data(), steps=300, stages=("blocks",), masks=masks, rates={"blocks": 1e-2})
    # The first block was whole; the second has a least squares problem with what tanh gives.
    torch.testing.assert_close(model[1].weight, teacher[1].weight, rtol=0, atol=2e-2)
    with torch.no_grad():
        hidden = torch.cat([teacher[1](x).tanh() for x in data()])
        wanted = teacher[4](hidden)
        given = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
        least = 0.0
        for row, keep in enumerate(masks["4.weight"]):
            columns = given[:, torch.cat([keep, torch.ones(1).bool()])]
            target = wanted[:, row : row + 1]
            least += (columns @ torch.linalg.lstsq(columns, target).solution - target).square().sum().item()
        assert (model[4](hidden) - wanted).square().sum() < 1.1 * least


def test_biases_of_weights_with_changes_of_low_rank_are_trained_too():
    model, teacher = pair()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    heal(model, teacher, data(), steps=2, stages=("lora",))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert {name for name in start if name.endswith("bias")} <= moved


def test_zeros_that_the_teacher_has_too_stay_and_learn_no_changes_of_low_rank():
    model, teacher = pair()
    for one in (model, teacher):
        one.stem.weight.data[0, :3] = 0
    start = model.stem.weight.detach().clone()
    heal(model, teacher, data(), steps=2, stages=("lora",))
    assert torch.equal(model.stem.weight, start)
    heal(model, teacher, data(), steps=2, stages=("all",))
    assert not model.stem.weight[0, :3].any()
    assert model.stem.weight[1].ne(start[1]).all()


def test_frozen_parameters_stand_still():
    model, teacher = pair()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].up.bias.requires_grad_(False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    heal(model, teacher, data(), steps=2, stages=("blocks", "all"))
    still = {name for name, value in model.state_dict().items() if torch.equal(value, start[name])}
    assert still == {name for name in start if name.startswith("blocks.0.")} | {"blocks.1.up.bias"}


def test_the_truth_counts_a_prediction_as_the_teacher_does():
    model, teacher = pair()
    texts = [{"input_ids": torch.tensor([[1, 2, 3, 0], [2, 2, 1, 3]])}]
    table = torch.eye(6)[:4]

    def forward(net: Any, batch: Any) -> Tensor:
        return net(table[batch["input_ids"]])

    def loss(net: Any, batch: Any) -> Tensor:  # summed over the 6 predictions
        logits, labels = forward(net, batch)[:, :-1], batch["input_ids"][:, 1:]
        return functional.cross_entropy(logits.reshape(-1, 4), labels.reshape(-1), reduction="sum")

    model.eval()
    kl = divergence(forward(model, texts[0]), forward(teacher.eval(), texts[0]), texts[0])
    found = _objective(teacher, texts, 2.0, forward, loss)(model, 0)
    torch.testing.assert_close(found, kl + 2 * loss(model, texts[0]) / 6)


def cut_pair() -> tuple[nn.Module, Net]:
    """Two thirds of the neurons of each block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Net().eval()
    graph = ws.graph.trace(teacher, torch.zeros(2, 6))
    spaces = [name for name, space in graph.spaces.items() if space.size == 24]
    assert len(spaces) == 2
    model = copy.deepcopy(teacher)
    ws.graph.take_(model, graph, {name: torch.arange(16) for name in spaces})
    return model, teacher


@pytest.mark.parametrize("stages", [("blocks",), ("small",), ("lora",), ("all",)])
def test_a_model_that_was_cut(stages: tuple[Any, ...], recwarn: pytest.WarningsRecorder):
    model, teacher = cut_pair()
    before, start = apart(model, teacher), {name: value.clone() for name, value in model.state_dict().items()}
    rates = {"blocks": 3e-3, "small": 1e-2, "lora": 1e-2, "all": 3e-3}
    heal(model, teacher, data(), steps=40, stages=stages, rates=rates)  # type: ignore[arg-type]
    assert apart(model, teacher) < 0.7 * before
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    vectors = {name for name, value in start.items() if value.dim() == 1}
    inner = {name for name in start if name.startswith("blocks.")}
    expected = {"blocks": inner, "small": vectors, "lora": set(start), "all": set(start)}
    assert moved == expected[stages[0]]
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in start.items()}
    assert not any("leaves the stage" in str(one.message) for one in recwarn)


def test_a_cut_model_that_holds_zeros_too_keeps_them_and_learns_everywhere():
    model, teacher = cut_pair()
    model.blocks[0].up.weight.data[0] = 0  # type: ignore[union-attr, index]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    heal(model, teacher, data(), steps=2, stages=("lora",))
    now = model.state_dict()
    assert not now["blocks.0.up.weight"][0].any()
    assert not any(torch.equal(now[name], start[name]) for name in start)


def test_a_cut_model_whose_blocks_do_not_pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model.load_state_dict({name: value[tuple(slice(n) for n in model.state_dict()[name].shape)]
                           for name, value in teacher.state_dict().items()})  # fmt: skip
    before = apart(model, teacher)
    with pytest.raises(Error, match=r"cannot be healed one by one: .*another width"):
        heal(model, teacher, data(), stages=("blocks",))
    with pytest.warns(UserWarning, match="'blocks' out: after a block they give another width"):
        heal(model, teacher, data(), steps=40, stages=("blocks", "all"), rates={"all": 1e-2})
    assert apart(model, teacher) < 0.5 * before
    shallow = copy.deepcopy(cut_pair()[1])
    ws.graph.keep_layers_(shallow, [0], path="blocks")
    with pytest.warns(UserWarning, match="the model has 1 and the teacher 2"):
        heal(shallow, cut_pair()[1], data(), steps=1)
    with pytest.raises(Error, match=r"which the teacher lacks\. Are the two swapped"):
        heal(cut_pair()[1], shallow, data(), steps=1)
    with pytest.raises(Error, match="Are the two swapped"):
        heal(teacher, model, data(), steps=1)
    other = copy.deepcopy(model)
    other[2] = nn.Linear(8, 3)
    with pytest.raises(Error, match=r"logits \[32, 3\], and its teacher \[32, 4\]"):
        heal(other, teacher, data(), steps=1, stages=("all",))


def test_a_cut_language_model_from_its_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = transformers.LlamaForCausalLM(config).eval()
    graph = ws.graph.of(ws.open(dense).with_files({"config.json": config.to_json_string().encode()}))
    weights = ws.open(dense).with_files({"config.json": config.to_json_string().encode()})
    small = ws.prune.structured.cut(weights, graph, 0.7)
    own = transformers.LlamaConfig.from_dict(json.loads(content(small.files["config.json"])))
    assert own.num_key_value_heads < 2 or own.intermediate_size < 24
    student = transformers.LlamaForCausalLM(own).eval()
    small.load_into(student)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(32, (8, 12), generator=generator)} for _ in range(6)]
    (unseen,) = [{"input_ids": torch.randint(32, (8, 12), generator=generator)}]

    def off(model: nn.Module) -> float:
        return divergence(model(**unseen).logits, dense(**unseen).logits, unseen).item()

    before = off(student)
    found = heal_weights(small, dense, batches, model=student, steps=40, stages=("blocks", "all"),
                         rates={"blocks": 1e-2, "all": 1e-2})  # fmt: skip
    assert off(student) == before
    found.load_into(student)
    assert off(student) < 0.8 * before
    assert {name: found.spec(name) for name in found} == {name: small.spec(name) for name in small}
    assert found.ties == small.ties
    assert "num_key_value_heads" in content(found.files["config.json"])


def content(file: Any) -> str:
    from weightsmith.weights._files import content_of

    return content_of(file).decode()
