"""Block by block gives what the whole model gives; in little memory; and can be continued."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import Block, Gram, gram, hollow, walk

WORDS, WIDTH = 50, 16


class Causal(nn.Module):
    """A small model of my own: a stem, a stack, a head, and a mask that is made in the stem."""

    def __init__(self, layers: int = 3, width: int = WIDTH, wrapped: bool = False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(torch.randn(1, 64, width) * 0.1)
        self.blocks = nn.ModuleList(Attending(width, wrapped) for _ in range(layers))
        self.head = nn.Linear(width, WORDS)
        self.wrapped = wrapped

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids) + self.place[:, : input_ids.shape[1]]
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None].bool()
        for block in self.blocks:
            hidden = block(hidden, mask=mask)
            if self.wrapped:
                hidden = hidden[0]
        return self.head(hidden)


class Attending(nn.Module):
    def __init__(self, width: int, wrapped: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.wrapped = wrapped

    def forward(self, hidden: Tensor, mask: Tensor) -> Any:
        y = self.norm(hidden)
        scores = self.q(y) @ self.k(y).transpose(1, 2) / y.shape[-1] ** 0.5
        hidden = hidden + self.o(scores.masked_fill(~mask, -1e9).softmax(-1) @ self.v(y))
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return (hidden, scores) if self.wrapped else hidden


def causal(layers: int = 3, **options: Any) -> Causal:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Causal(layers, **options).eval()


def tokens(count: int = 3, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(WORDS, (2, 7 + index), generator=generator)} for index in range(count)]
    if padded:
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][1, 4:] = 0
    return batches


def transformers_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="builds the model of a config")
    small = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            config = transformers.LlamaConfig(**small, num_hidden_layers=3, num_key_value_heads=1)
            return transformers.LlamaForCausalLM(config).eval()
        if kind == "gemma":  # full and sliding attention in turns: masks differ from block to block
            config = transformers.Gemma2Config(
                **small, num_hidden_layers=4, num_key_value_heads=1, head_dim=8, sliding_window=3
            )
            return transformers.Gemma2ForCausalLM(config).eval()
        if kind == "gpt2":
            config = transformers.GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32)
            return transformers.GPT2LMHeadModel(config).eval()
        return transformers.BertModel(transformers.BertConfig(**small, num_hidden_layers=3)).eval()


def saved(model: Any, folder: Path) -> ws.weights.Weights:
    """As a folder that carries its config, opened."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    ws.open(model).with_files({"config.json": json.dumps(config).encode()}).save(folder / "model")
    return ws.open(folder / "model")


def grams_of(weights: Any, batches: Any, **options: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def visit(block: Block) -> None:
        found.update(block.statistics["g"].to_dict())

    walk(weights, batches, visit, statistics={"g": Gram()}, **{"propagate": "dense", **options})
    return found


def close(found: dict[str, Tensor], expected: Any) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


# The same as the whole model


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("propagate", ["dense", "changed"])
def test_grams_are_those_of_the_whole_model(wrapped: bool, padded: bool, propagate: str) -> None:
    model, batches = causal(wrapped=wrapped), tokens(padded=padded)
    found = grams_of(model, batches, propagate=propagate)
    expected = gram(model, batches)
    assert set(found) == {name for name in expected if name.startswith("blocks.")}
    assert len(found) == 18
    close(found, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma", "bert"])
@pytest.mark.parametrize("padded", [False, True])
def test_models_of_transformers_from_a_folder(kind: str, padded: bool, tmp_path: Path) -> None:
    model, batches = transformers_model(kind), tokens(padded=padded)
    forward = lambda m, batch: m(**batch)[0]  # noqa: E731 - a base model has no logits
    found = grams_of(saved(model, tmp_path), batches, forward=forward)
    expected = gram(model, batches, forward=forward)
    inside = ".layer" if kind != "bert" else "encoder.layer"
    assert set(found) == {name for name in expected if inside in name}
    close(found, expected)


def test_outputs_of_blocks_are_those_of_the_model(tmp_path: Path) -> None:
    """Also of GPT-2, whose own kind of layer has no Gram matrix: outputs and changes are had all the same."""
    model, batches = transformers_model("gpt2"), tokens()
    seen: list[Tensor] = []

    def visit(block: Block) -> None:
        assert block.name == f"transformer.h.{block.index}"
        assert block.count == 3
        seen.extend(block.outputs())

    walk(saved(model, tmp_path), batches, visit)
    with torch.no_grad():
        states = [model.transformer(**batch, output_hidden_states=True).hidden_states for batch in batches]
    for index in range(2):  # what is recorded last went through the norm after the stack
        for number in range(len(batches)):
            torch.testing.assert_close(seen[3 * index + number], states[number][index + 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(Error, match="in no block"):
        grams_of(model, batches)


def test_names_with_a_prefix_less_or_more(tmp_path: Path) -> None:
    """A checkpoint of the bare model in the model with a head, and the other way round."""
    model, batches = transformers_model("llama"), tokens()
    bare = ws.open(model).select("model.*").rename(lambda name: name.removeprefix("model."))
    found = grams_of(bare, batches, model=model)
    assert "layers.0.self_attn.q_proj.weight" in found
    expected = gram(model, batches)
    close({f"model.{name}": value for name, value in found.items()}, expected)
    more = ws.open(model).rename(lambda name: f"wrapped.{name}")
    close({n.removeprefix("wrapped."): v for n, v in grams_of(more, batches, model=model).items()}, expected)


def test_a_plain_sequence_with_layers_between() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    net[3].running_mean.fill_(0.3)
    batches = [(torch.randn(4, 5), torch.zeros(4)), (torch.randn(3, 5), torch.zeros(3))]
    before = copy.deepcopy(batches)
    visited: list[str] = []

    def visit(block: Block) -> None:
        visited.append(block.name)
        if block.name == "4":
            torch.testing.assert_close(torch.cat(list(block.outputs())), net.eval()(torch.cat([b[0] for b in batches])))

    walk(net, batches, visit)
    assert visited == ["0", "2", "3", "4"]  # what has no tensors is run, not visited
    close(grams_of(net, batches), gram(net, batches))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, before, strict=True))


def test_a_block_may_write_into_its_input() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 2))
    batches, found = [torch.randn(4, 5)], []
    before = batches[0].clone()

    def visit(block: Block) -> None:
        found.append(block.batches[0]["hidden"].clone())
        assert torch.equal(next(block.outputs()), next(block.outputs()))

    walk(net, batches, visit, statistics={"g": Gram()})
    assert torch.equal(batches[0], before)
    assert torch.equal(found[0], before)
    torch.testing.assert_close(found[1], net[0](before.clone()).detach())


def test_buffers_are_those_of_the_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    net[0].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    with hollow():
        empty = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    batches = [torch.randn(4, 3)]
    close(grams_of(net.state_dict(), batches, model=empty), gram(net, batches))
    assert torch.equal(empty[0].running_mean, torch.zeros(3))


def test_blocks_of_several_stages_by_name() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Module()
        net.one = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3))
        net.two = nn.Sequential(nn.Conv2d(4, 2, 3))
        net.forward = lambda x: net.two(net.one(x)).mean((2, 3))  # type: ignore[method-assign]
    batches = [torch.randn(2, 1, 9, 9)]
    with pytest.raises(Error, match="several stacks of blocks: one, two"):
        grams_of(net, batches)
    close(grams_of(net, batches, blocks=["one.0", "one.1", "two.0"]), gram(net, batches))
    assert set(grams_of(net, batches, blocks="one")) == {"one.0.weight", "one.1.weight"}


# Changes


def test_the_next_block_sees_what_the_changed_one_gives() -> None:
    model, batches = causal(), tokens(padded=True)
    found: dict[str, dict[str, Tensor]] = {"changed": {}, "dense": {}}
    for propagate in ("changed", "dense"):

        def visit(block: Block, propagate: str = propagate) -> dict[str, Tensor]:
            found[propagate].update(block.statistics["g"].to_dict())
            return {name: block.weights[name] * 0.5 for name in block.names if name.endswith("down.weight")}

        changed = walk(model, batches, visit, statistics={"g": Gram()}, propagate=propagate)  # type: ignore[arg-type]
        assert torch.equal(changed["blocks.1.down.weight"], 0.5 * model.blocks[1].down.weight)
        assert torch.equal(changed["blocks.1.up.weight"], model.blocks[1].up.weight)
    halved = copy.deepcopy(model)
    changed.load_into(halved)
    # A block's own statistics are of its dense weights: those of its first layers are of the halved network's inputs.
    expected = {name: value for name, value in gram(halved, batches).items() if name.endswith(".q.weight")}
    close({name: found["changed"][name] for name in expected}, expected)
    close(found["dense"], gram(model, batches))
    assert not torch.allclose(found["dense"]["blocks.2.q.weight"], found["changed"]["blocks.2.q.weight"], rtol=0.01)


def test_new_values_are_those_that_the_weights_will_hold() -> None:
    """A bf16 checkpoint: what the next block sees is rounded as what is written."""
    model, batches = causal(2), tokens(1)
    weights = ws.open(model).cast(torch.bfloat16)
    seen: list[Tensor] = []

    def visit(block: Block) -> dict[str, Tensor]:
        seen.append(block.batches[0]["hidden"])
        assert block.weights.spec(block.names[0]).dtype == torch.bfloat16
        assert next(block.module.parameters()).dtype == torch.float32
        return {name: block.weights[name].float() / 3 for name in block.names}

    changed = walk(weights, batches, visit, model=model)
    assert changed.spec("blocks.0.q.weight").dtype == torch.bfloat16
    after = copy.deepcopy(model)
    changed.load_into(after)
    with torch.no_grad():
        hidden = after.embed(batches[0]["input_ids"]) + after.place[:, :7]
        expected = after.blocks[0](hidden, mask=torch.ones(7, 7).bool().tril()[None])
    torch.testing.assert_close(seen[1], expected)


def test_blocks_run_in_the_dtype_that_is_asked_for() -> None:
    model, batches = causal(2), tokens(2)
    dtypes = set()

    def visit(block: Block) -> None:
        dtypes.update(p.dtype for p in block.module.parameters())
        dtypes.update(b["hidden"].dtype for b in block.batches)
        dtypes.update(output.dtype for output in block.outputs())
        assert block.statistics["g"].spec("blocks.0.q.weight".replace("0", str(block.index))).dtype == torch.float32

    walk(model, batches, visit, statistics={"g": Gram()}, dtype="bfloat16")
    assert dtypes == {torch.bfloat16}
    found, expected = grams_of(model, batches, dtype="bfloat16"), gram(model, batches)
    for name, value in found.items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 0.02


# Nothing is left behind


def test_products_are_computed_in_half_the_width() -> None:
    """Weights and hidden states stay as wide as they are, as within `torch.autocast`."""
    model, tokens = causal(2), torch.arange(6)[None]
    given: dict[Any, list[Tensor]] = {}

    def look(compute: str | None) -> Any:
        def visit(block: Block) -> None:
            assert next(block.module.parameters()).dtype == torch.float32
            given.setdefault(compute, []).extend([block.batches[0]["hidden"], *block.outputs()])

        return visit

    for compute in (None, "bfloat16"):
        walk(model, [{"input_ids": tokens}], look(compute), compute=compute)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.embed(tokens) + model.place[:, :6]
        mask = torch.ones(6, 6, dtype=torch.bool).tril()[None]
        expected = [hidden]
        for block in model.blocks:
            expected.extend([hidden := block(hidden, mask=mask)] * 2)
    for found, whole, one in zip(given["bfloat16"], given[None], expected[:4], strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, one)
        assert (found is given["bfloat16"][0]) == torch.equal(found, whole)


def test_the_module_is_what_it_was(tmp_path: Path) -> None:
    model = causal().train()
    model.blocks[1].eval()
    model.head.requires_grad_(False)
    before = {name: (value, value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    def fail(block: Block) -> dict[str, Tensor]:
        if block.index == 1:
            raise KeyError("on the way")
        return {name: torch.zeros_like(block.weights[name]) for name in block.names}

    with pytest.raises(KeyError, match="on the way"):
        walk(model, tokens(), fail, statistics={"g": Gram()})
    walk(model, tokens(), lambda block: None)
    for name, value in model.named_parameters():
        same, copy_, wanted = before[name]
        assert value is same
        assert torch.equal(value, copy_)
        assert value.requires_grad == wanted
        assert value.grad is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_hollow_module_has_its_buffers_and_ties() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.arange(3.0), persistent=False)
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            shared = nn.Parameter(torch.ones(2))
            self.c, self.d = nn.Module(), nn.Module()
            self.c.w = self.d.w = shared

    register = nn.Module.register_parameter
    with hollow():
        made = Turned()
    assert nn.Module.register_parameter is register
    assert all(p.is_meta for p in made.parameters())
    assert torch.equal(made.turn, torch.arange(3.0))
    assert made.a.weight is made.b.weight
    assert made.c.w is made.d.w
    assert made.a.weight is not made.a.bias
    assert made.a.weight.requires_grad


def test_buffers_that_no_checkpoint_holds() -> None:
    model, batches = causal(2), tokens(1)
    with hollow():
        empty = Causal(2)
    for block in empty.blocks:
        block.register_buffer("turn", torch.ones(3), persistent=False)
    close(grams_of(model.state_dict(), batches, model=empty), gram(model, batches))
    assert all(p.is_meta for p in empty.parameters())
    with torch.device("meta"):
        for block in empty.blocks:
            block.register_buffer("turn", torch.ones(3), persistent=False)
    with pytest.raises(Error, match=r"the buffer blocks.0.turn has no values.*hollow"):
        grams_of(model.state_dict(), batches, model=empty)


def test_weights_of_the_stem_that_are_read_from_outside() -> None:
    """Not every module that has a weight is called: here an embedding is only looked into."""

    class Outside(Causal):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            hidden = nn.functional.embedding(input_ids, self.embed.weight)
            for block in self.blocks:
                hidden = block(hidden, mask=torch.ones(1, 1, 1, dtype=torch.bool))
            return hidden

    model = Outside(2)
    with hollow():
        empty = Outside(2)
    close(grams_of(model.state_dict(), tokens(1), model=empty), gram(model, tokens(1)))


# Refusals


def test_refusals(tmp_path: Path) -> None:
    model, batches, quiet = causal(2), tokens(1), lambda block: None
    with pytest.raises(Error, match="propagate"):
        walk(model, batches, quiet, propagate="both")  # type: ignore[arg-type]
    with pytest.raises(Error, match="at least one batch"):
        walk(model, [], quiet)
    with pytest.raises(Error, match=r"no config.json"):
        walk(model.state_dict(), batches, quiet)
    with pytest.raises(Error, match=r"resume=True continues what is in store="):
        walk(model, batches, quiet, resume=True)
    with pytest.raises(Error, match="did you mean 'blocks'"):
        walk(model, batches, quiet, blocks="block")
    with pytest.raises(Error, match="contain one another"):
        walk(model, batches, quiet, blocks=["blocks.0", "blocks.0.up"])
    with pytest.raises(Error, match="has no list or sequence"):
        walk(nn.Linear(2, 2), [torch.ones(1, 2)], quiet)
    with pytest.raises(Error, match=r"do not follow one another directly: what blocks.0.up gives"):
        walk(model, batches, quiet, blocks=["blocks.0.up", "blocks.0.down"])
    with pytest.raises(Error, match=r"blocks.1 comes before blocks.0|comes before"):
        walk(model, batches, quiet, blocks=["blocks.1", "blocks.0"])
    lacking = {name: value for name, value in model.state_dict().items() if "0.up" not in name}
    with pytest.raises(Error, match=r"its blocks need blocks.0.up.weight"):
        walk(lacking, batches, quiet, model=model)
    with pytest.raises(Error, match=r"does not fit blocks.0.up.weight"):
        walk(model.state_dict() | {"blocks.0.up.weight": torch.ones(3)}, batches, quiet, model=model)
    with pytest.raises(Error, match=r"did you mean 'blocks.0.up.weight'"):
        walk(model, batches, lambda block: {"blocks.0.ups.weight": torch.ones(1)})
    with pytest.raises(Error, match=r"returns blocks.0.up.weight as \[1\]"):
        walk(model, batches, lambda block: {f"{block.name}.up.weight": torch.ones(1)})
    with pytest.raises(Error, match=r"in no block.*nothing"):
        walk(model, batches, quiet, statistics={"g": Gram("nothing")})
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with pytest.raises(Error, match=r"one tensor with blocks.1.up.weight"):
        walk(model, batches, lambda block: {n: block.weights[n] for n in block.names})


def test_a_statistic_of_some_blocks_is_empty_in_others() -> None:
    found = []
    walk(causal(), tokens(1), lambda b: found.append(list(b.statistics["g"])), statistics={"g": Gram("blocks.1.up.*")})
    assert found == [[], ["blocks.1.up.weight"], []]


def test_a_residual_outside_of_the_blocks_is_refused() -> None:
    class Outer(Causal):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = hidden + block(hidden, mask=torch.ones(1, 1, 1).bool())
            return hidden

    with pytest.raises(Error, match="do not follow one another"):
        walk(Outer(2), tokens(1), lambda block: None)


# A store


def _step(block: Block) -> dict[str, Tensor]:
    return {n: block.weights[n] / (1 + block.statistics["g"][n].diagonal().mean()) for n in block.statistics["g"]}


@pytest.mark.parametrize("propagate", ["changed", "dense"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_walk_is_continued(tmp_path: Path, propagate: Any, stop: int) -> None:
    model, batches = causal(), tokens(padded=True)
    how: dict[str, Any] = {"statistics": {"g": Gram()}, "propagate": propagate}
    expected = walk(model, batches, _step, **how)
    visited = []

    def stopping(block: Block) -> dict[str, Tensor]:
        if block.index == stop:
            raise KeyboardInterrupt
        return _step(block)

    def counting(block: Block) -> dict[str, Tensor]:
        visited.append(block.index)
        return _step(block)

    with pytest.raises(KeyboardInterrupt):
        walk(model, batches, stopping, store=tmp_path / "a", **how)
    with pytest.raises(Error, match="resume=True"):
        walk(model, batches, counting, store=tmp_path / "a", **how)
    found = walk(causal(), iter(tokens(padded=True)), counting, store=tmp_path / "a", resume=True, **how)
    assert visited == list(range(stop, 3))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list((tmp_path / "a").glob("inputs-*"))
    again = walk(model, batches, counting, store=tmp_path / "a", resume=True, **how)
    assert visited == list(range(stop, 3))
    assert torch.equal(again["blocks.2.up.weight"], expected["blocks.2.up.weight"])


def test_a_store_of_another_walk_is_refused(tmp_path: Path) -> None:
    model, batches, store = causal(2), tokens(1), tmp_path / "a"
    how: dict[str, Any] = {"statistics": {"g": Gram()}, "store": store, "resume": True}
    walk(model, batches, _step, settings={"strength": 1}, **how)
    for changed, word in (
        ({"settings": {"strength": 2}}, "settings"),
        ({"propagate": "dense"}, "propagate"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"statistics": {"g": Gram("*up*")}}, "statistics"),
    ):
        with pytest.raises(Error, match=f"another walk: {word} differ"):
            walk(model, batches, _step, **{"settings": {"strength": 1}, **how, **changed})
    with pytest.raises(Error, match="another walk: batches differ"):
        walk(model, tokens(2), _step, settings={"strength": 1}, **how)
    with pytest.raises(Error, match="another walk: weights differ"):
        walk(Causal(2), batches, _step, settings={"strength": 1}, **how)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("mine")
    with pytest.raises(Error, match="something else"):
        walk(model, batches, _step, store=tmp_path / "b")


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_walk import Gram, _step, causal, tokens, walk

def slowly(block):
    if block.index == 2:
        print("there", flush=True)
        time.sleep(60)
    return _step(block)

walk(causal(), tokens(padded=True), slowly, statistics={"g": Gram()}, store=sys.argv[1])
"""


def test_a_walk_that_was_killed_is_continued(tmp_path: Path) -> None:
    place = str(tmp_path / "a")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, place, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "there"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    how: dict[str, Any] = {"statistics": {"g": Gram()}}
    expected = walk(causal(), tokens(padded=True), _step, **how)
    found = walk(causal(), tokens(padded=True), _step, store=place, resume=True, **how)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Memory


class Counting:
    """Bytes of parameters that have values, at the most at one time."""

    def __init__(self, model: nn.Module):
        self.model, self.most = model, 0

    def look(self, *_: Any) -> None:
        there = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.is_meta)
        self.most = max(self.most, there)


@pytest.mark.parametrize("stored", [False, True])
def test_memory_does_not_grow_with_the_depth(tmp_path: Path, stored: bool) -> None:
    most = {}
    for layers in (2, 6):
        model = causal(layers, width=32)
        path = tmp_path / f"{layers}.safetensors"
        ws.open(model).save(path)
        with hollow():
            empty = Causal(layers, width=32)
        watch = Counting(empty)
        for module in empty.modules():
            module.register_forward_hook(watch.look)

        def visit(block: Block, watch: Counting = watch) -> dict[str, Tensor]:
            watch.look()
            return {name: block.weights[name] for name in block.names}

        options: dict[str, Any] = {"store": tmp_path / f"s{layers}"} if stored else {}
        walk(ws.open(path), tokens(), visit, model=empty, statistics={"g": Gram()}, **options)
        most[layers] = watch.most
        block = sum(p.numel() * 4 for p in model.blocks[0].parameters())
        stem = (model.embed.weight.numel() + model.place.numel()) * 4  # without the head, which never runs
        assert most[layers] == max(block, stem)
    assert most[2] == most[6]


def test_hidden_states_go_as_the_next_ones_come() -> None:
    model, there, alive = causal(2), [], []

    def visit(block: Block) -> None:
        if block.index == 0:
            there.extend(weakref.ref(batch["hidden"]) for batch in block.batches)

    model.blocks[0].register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in there)))
    walk(model, tokens(5), visit)
    assert alive[5:] == [5, 4, 3, 2, 1]  # the first five calls only note how it is called
    assert not any(ref() is not None for ref in there)


RESIDENT = """
import sys
import torch
torch.set_num_threads(1)
import weightsmith as ws
from torch import nn

with ws.stats.hollow():
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))

def halve(block):
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
    return {name: block.weights[name] / 2 for name in block.names}

statistics = {"g": ws.stats.Gram()}
ws.stats.walk(ws.open(sys.argv[1]), [torch.ones(64, 1024)], halve, model=net, statistics=statistics, store=sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_does_not_grow_from_block_to_block(tmp_path: Path) -> None:
    """A checkpoint of 64 MiB: pages of its file may stay as long as there is room, its tensors may not."""
    tensors = {f"{n}.weight": torch.zeros(1024, 1024) for n in range(16)}
    ws.open(tensors | {f"{n}.bias": torch.zeros(1024) for n in range(16)}).save(tmp_path / "w.safetensors")
    said = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path / "w.safetensors"), str(tmp_path / "store")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kilobytes = [int(line) for line in said.stdout.split()]
    assert len(kilobytes) == 16
    assert min(kilobytes[-4:]) - min(kilobytes[1:5]) < 12 * 1024  # 11 blocks apart, each of 4 MiB
