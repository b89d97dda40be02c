"""Evaluators from specs: functions of one's own, and the likelihood of a text."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith import evaluators, language
from weightsmith.errors import Error, MissingPackage
from weightsmith.evaluators import evaluator
from weightsmith.weights import Weights

ONE = Weights.of({"w": torch.tensor([3.0, 4.0])})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an evaluator reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# A function of one's own


@pytest.fixture
def mine(tmp_path: Path):
    """Write a Python file and name a function of it."""

    def write(text: str, name: str = "score") -> str:
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def test_a_function_of_ones_own(mine):
    spec = mine("from beside import scale\ndef score(weights):\n    return scale * float(weights['w'].norm())\n")
    Path(spec.rpartition(":")[0]).with_name("beside.py").write_text("scale = -2\n")
    evaluate = evaluator(spec)
    assert evaluate(ONE) == -10
    assert evaluate(2 * ONE) == -20
    assert str(Path(spec).parent) not in __import__("sys").path


def test_the_file_is_run_once(mine, tmp_path: Path):
    spec = mine(f"open({str(tmp_path / 'log')!r}, 'a').write('x')\ndef score(weights): return 1\n")
    evaluate = evaluator(spec)
    assert [evaluate(ONE), evaluate(ONE)] == [1, 1]
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("1", 1.0),
        ("torch.tensor(0.5)", 0.5),
        ("numpy.float32(2)", 2.0),
        ("torch.ones(1, 1)", 1.0),
        ("-math.inf", -math.inf),
    ],
)
def test_numbers(mine, value: str, number: float):
    found = evaluator(mine(f"import math, numpy, torch\ndef score(weights): return {value}\n"))(ONE)
    assert found == number
    assert type(found) is float


@pytest.mark.parametrize("value", ["None", "'0.5'", "torch.ones(2)", "{}", "True", "[1]"])
def test_what_is_no_number(mine, value: str):
    evaluate = evaluator(mine(f"import torch\ndef score(weights): return {value}\n"))
    with pytest.raises(Error, match=r"mine\.py:score must return one number, higher being better; it returned "):
        evaluate(ONE)


def test_nan(mine):
    evaluate = evaluator(mine("def score(weights): return float('nan')\n"))
    with pytest.raises(Error, match=r"mine\.py:score returned NaN, which no order knows; return float\('-inf'\)"):
        evaluate(ONE)


def test_a_function_that_fails(mine, monkeypatch: pytest.MonkeyPatch):
    evaluate = evaluator(mine("def score(weights):\n    return weights['v'].sum()\n"))
    with pytest.raises(Error, match=r"mine\.py:score failed at line 2: MissingTensor: no tensor 'v'") as caught:
        evaluate(ONE)
    assert caught.value.__cause__ is not None
    monkeypatch.chdir(Path(mine("")).parent)
    relative = mine("def score(weights):\n    1 / 0\n").rpartition("/")[2]
    with pytest.raises(Error, match=r"^mine\.py:score failed at line 2: ZeroDivisionError"):
        evaluator(relative)(ONE)
    with pytest.raises(KeyboardInterrupt):
        evaluator(mine("def score(weights): raise KeyboardInterrupt\n"))(ONE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def scor(weights): return 1\n", r"mine\.py: has no function 'score' \(did you mean 'scor'\?\); it has scor"),
        ("from math import sqrt\n", r"mine\.py: has no function 'score'; it has none"),
        ("score = 3\n", r"mine\.py: has no function 'score'"),
        ("def score(weights:\n", r"mine\.py:1: .*never closed"),
        ("\nimport nothing_of_that_name\n", r"mine\.py: failed at line 2 when it was read: ModuleNotFoundError: No"),
        ("1 / 0\n", r"mine\.py: failed at line 1 when it was read: ZeroDivisionError: division by zero"),
    ],
)
def test_files_that_will_not_do_are_refused_at_once(mine, text: str, message: str):
    with pytest.raises(Error, match=message):
        evaluator(mine(text))


def test_no_such_file(mine):
    spec = mine("")
    with pytest.raises(Error, match=r"mime\.py: no such file \(did you mean 'mine\.py'\?\)"):
        evaluator(spec.replace("mine", "mime"))


@pytest.mark.parametrize("spec", ["", "accuracy", "mine.py", "mine.txt:score", ":score", "nothing:there"])
def test_what_is_no_spec(spec: str):
    with pytest.raises(Error, match=r"is no evaluator; write path/to/file\.py:function, or text:held_out\.txt"):
        evaluator(spec)


# The likelihood of a text

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps"]
TEXT = " ".join(WORDS[(3 * i * i + i) % len(WORDS)] for i in range(300))


def tokenizer(folder: Path, first: str = "") -> None:
    """A tokenizer with one token a word, and some in front of each text if so wanted."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if first:
        words.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[("<s>", 0), ("?", 1)]
        )
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="?").save_pretrained(folder)


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    """A tiny Llama on disk, with its tokenizer."""
    pytest.importorskip("transformers", reason="builds Hugging Face models")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llama")
    tokenizer(tmp_path / "llama")
    (tmp_path / "held_out.txt").write_text(TEXT)
    return model.eval()


def ids() -> list[int]:
    return [2 + WORDS.index(word) for word in TEXT.split()]


def by_transformers(model: Any, windows: list[list[int]]) -> float:
    """The mean of transformers' own losses over windows of one length."""
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss for w in windows]
    return -float(torch.stack(losses).double().mean())


def test_the_loss_of_transformers(llama, tmp_path: Path):
    weights = ws.open(tmp_path / "llama")
    found = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=20&windows=100")(weights)
    windows = [ids()[start : start + 20] for start in range(0, 300, 20)]
    assert found == pytest.approx(by_transformers(llama, windows), abs=1e-4)
    assert found < -1
    few = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=20&windows=3")(weights)
    spread = [windows[index] for index in (2, 7, 12)]
    assert few == pytest.approx(by_transformers(llama, spread), abs=1e-4)
    # What the model takes at most, where nothing is said.
    usual = evaluator(f"text:{tmp_path / 'held_out.txt'}")(weights)
    assert usual == pytest.approx(by_transformers(llama, [ids()[s : s + 64] for s in range(0, 256, 64)]), abs=1e-4)


def test_a_short_text_is_one_window(llama, tmp_path: Path):
    (tmp_path / "short.txt").write_text("the quick brown fox")
    found = evaluator(f"text:{tmp_path / 'short.txt'}")(ws.open(tmp_path / "llama"))
    assert found == pytest.approx(by_transformers(llama, [[2, 3, 4, 5]]), abs=1e-4)


def test_a_token_in_front_of_every_window(llama, tmp_path: Path):
    """It is read, and not predicted; the first word is."""
    tokenizer(tmp_path / "llama", first="<s>")
    found = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=21&windows=100")(ws.open(tmp_path / "llama"))
    windows = [[0, *ids()[start : start + 20]] for start in range(0, 300, 20)]
    assert found == pytest.approx(by_transformers(llama, windows), abs=1e-4)


def test_two_tokens_in_front_are_both_not_of_the_text(llama, tmp_path: Path):
    tokenizer(tmp_path / "llama", first="<s> ?")
    (tmp_path / "short.txt").write_text("the quick brown fox")
    found = evaluator(f"text:{tmp_path / 'short.txt'}")(ws.open(tmp_path / "llama"))
    window, labels = torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[-100, -100, 2, 3, 4, 5]])
    with torch.no_grad():
        assert found == pytest.approx(-float(llama(input_ids=window, labels=labels).loss), abs=1e-4)


def test_many_positions_are_counted_in_pieces(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = f"text:{tmp_path / 'held_out.txt'}?length=30"
    whole = evaluator(spec)(ws.open(tmp_path / "llama"))
    monkeypatch.setattr(language, "ROWS", 7)
    assert evaluator(spec)(ws.open(tmp_path / "llama")) == pytest.approx(whole, rel=1e-6)


def test_other_weights_in_the_model_that_is_there(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Built once; every answer is that of a model of its own, and what was given is not written to."""
    built = []
    original = language.with_weights
    monkeypatch.setattr(language, "with_weights", lambda *given: built.append(1) or original(*given))
    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=20")
    weights = ws.open(tmp_path / "llama")
    held = Weights.of(weights.to_dict()).with_files(weights.files)
    before = {name: value.clone() for name, value in held.items()}
    other = 0.5 * weights
    first, second, third = evaluate(held), evaluate(other), evaluate(weights)
    assert len(built) == 1
    assert first == third != second
    assert all(torch.equal(held[name], value) for name, value in before.items())
    other.load_into(llama)
    assert second == pytest.approx(by_transformers(llama, [ids()[s : s + 20] for s in range(0, 300, 20)]), abs=1e-4)


def test_another_architecture_is_built_anew(llama, tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=20")
    first = evaluate(ws.open(tmp_path / "llama"))
    torch.manual_seed(1)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=32)).eval()
    gpt.save_pretrained(tmp_path / "gpt")
    tokenizer(tmp_path / "gpt")
    weights = ws.open(tmp_path / "gpt")  # its head is tied, and not in the file
    assert "lm_head.weight" not in weights
    windows = [ids()[start : start + 20] for start in range(0, 300, 20)]
    assert evaluate(weights) == pytest.approx(by_transformers(gpt, windows), abs=1e-4)
    with torch.no_grad():
        gpt.transformer.wte.weight.mul_(2)
    assert evaluate(weights | {"transformer.wte.weight": 2 * weights["transformer.wte.weight"]}) == pytest.approx(
        by_transformers(gpt, windows), abs=1e-4
    )
    assert evaluate(ws.open(tmp_path / "llama")) == first
    tokenizer(tmp_path / "llama", first="<s>")  # the same shapes, read in another way
    assert evaluate(ws.open(tmp_path / "llama")) != first


def test_tensors_that_transformers_fuses(llama, tmp_path: Path):
    """Experts are single matrices on disk and one tensor in the model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(2)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, max_position_embeddings=32, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "mixtral")
    tokenizer(tmp_path / "mixtral")
    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=20")
    weights = ws.open(tmp_path / "mixtral")
    windows = [ids()[start : start + 20] for start in range(0, 300, 20)]
    expected = by_transformers(model, windows)
    assert evaluate(weights) == pytest.approx(expected, abs=1e-4)
    assert evaluate(0.5 * weights) != pytest.approx(expected, abs=1e-3)
    assert evaluate(weights) == pytest.approx(expected, abs=1e-4)


def test_computed_in_float32_unless_told(llama, tmp_path: Path):
    narrow = ws.open(tmp_path / "llama").cast("bfloat16")
    spec = f"text:{tmp_path / 'held_out.txt'}?length=20"
    narrow.load_into(llama)
    expected = by_transformers(llama, [ids()[s : s + 20] for s in range(0, 300, 20)])
    assert evaluator(spec)(narrow) == pytest.approx(expected, abs=1e-4)
    rough = evaluator(f"{spec}&dtype=bfloat16&device=cpu")(narrow)
    assert rough == pytest.approx(expected, abs=0.2)
    assert rough != pytest.approx(expected, abs=1e-6)


def test_weights_that_give_no_number_are_the_worst(llama, tmp_path: Path):
    weights = ws.open(tmp_path / "llama")
    broken = weights | {"lm_head.weight": torch.full(weights.spec("lm_head.weight").shape, float("nan"))}
    assert evaluator(f"text:{tmp_path / 'held_out.txt'}")(broken) == -math.inf


def test_models_that_predict_no_next_token(llama, tmp_path: Path):
    from transformers import BertConfig, T5Config, ViTConfig

    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}")
    files = dict(ws.open(tmp_path / "llama").files)
    for config, message in (
        (BertConfig(), "needs a causal language model, .*; bert is an encoder, which fills in words"),
        (T5Config(), "; t5 translates one sequence into another"),
        (ViTConfig(), "; transformers knows none of the type vit"),
    ):
        told = ONE.with_files(files | {"config.json": config.to_json_string().encode()})
        with pytest.raises(Error, match=message):
            evaluate(told)


def test_what_the_weights_must_carry(llama, tmp_path: Path):
    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}")
    weights = ws.open(tmp_path / "llama")
    config = {"config.json": weights.files["config.json"]}
    with pytest.raises(Error, match=r"is built from the config\.json beside its weights, and these carry none"):
        evaluate(Weights.of(weights))
    with pytest.raises(Error, match="needs the tokenizer beside the weights"):
        evaluate(Weights.of(weights).with_files(config))
    for name, data, message in (
        ("config.json", b'{"model_type": "no_such"}', r"transformers cannot use the config\.json of these weights"),
        ("config.json", b"{", r"transformers cannot use the config\.json"),
        ("tokenizer.json", b"{", "transformers cannot use the tokenizer beside these weights"),
    ):
        with pytest.raises(Error, match=message):
            evaluate(weights.with_files({name: data}))


def test_quantized_weights_are_not_read(llama, tmp_path: Path):
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    weights = ws.open(tmp_path / "llama").with_files({"config.json": json.dumps(config).encode()})
    with pytest.raises(Error, match="takes float weights, and these are quantized"):
        evaluator(f"text:{tmp_path / 'held_out.txt'}")(weights)


def test_code_beside_the_weights_is_not_run(llama, tmp_path: Path):
    (tmp_path / "llama" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}, "model_type": "mine"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Error, match=r"transformers cannot use the config\.json"):
        evaluator(f"text:{tmp_path / 'held_out.txt'}")(ws.open(tmp_path / "llama"))
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_their_config(llama, tmp_path: Path):
    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}")
    weights = ws.open(tmp_path / "llama")
    for first in (True, False):  # with no model there, and with one
        with pytest.raises(Error, match=r"do not fit LlamaForCausalLM: they lack model\.norm\.weight"):
            evaluate(weights.drop("model.norm.weight"))
        with pytest.raises(Error, match=r"they have beside what it needs score\.weight"):
            evaluate(weights | {"score.weight": torch.ones(2, 16)})
        with pytest.raises(Error, match="transformers cannot load these weights into llama"):
            evaluate(weights | {"model.norm.weight": torch.ones(5)})
        if first:
            evaluate(weights)


def test_a_tokenizer_with_more_words_than_the_model(llama, tmp_path: Path):
    weights = ws.open(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"vocab_size": 9}
    small = {name: weights[name][:9] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(Error, match=r"the tokenizer gives the token 13, but the model has embeddings for 9 only"):
        evaluator(f"text:{tmp_path / 'held_out.txt'}")(
            (weights | small).with_files({"config.json": json.dumps(config).encode()})
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lenght=3", r"no option 'lenght' \(did you mean 'length'\?\); there are length, windows, device, dtype"),
        ("length=many", "length is a number of tokens, got 'many'"),
        ("windows=-1", "windows is a number of windows, got '-1'"),
        ("length=1", "length must be at least 2, got 1"),
        ("windows=0", "windows must be at least 1, got 0"),
        ("dtype=float31", "float31"),
        ("device=abacus", "cannot compute on device=abacus: "),
    ],
)
def test_options_are_checked_at_once(tmp_path: Path, options: str, message: str):
    pytest.importorskip("transformers", reason="the evaluator needs it")
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(Error, match=message):
        evaluator(f"text:{tmp_path / 't.txt'}?{options}")


def test_windows_longer_than_the_model_takes(llama, tmp_path: Path):
    with pytest.raises(Error, match="length=65, but the model takes 64 tokens at most"):
        evaluator(f"text:{tmp_path / 'held_out.txt'}?length=65")(ws.open(tmp_path / "llama"))


def test_texts_that_will_not_do(llama, tmp_path: Path):
    with pytest.raises(Error, match=r"none\.txt: cannot be read as text: No such file"):
        evaluator(f"text:{tmp_path / 'none.txt'}")
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(Error, match=r"t\.txt: is empty"):
        evaluator(f"text:{tmp_path / 't.txt'}")
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Error, match=r"t\.txt: cannot be read as text"):
        evaluator(f"text:{tmp_path / 't.txt'}")
    (tmp_path / "t.txt").write_text("fox")
    with pytest.raises(Error, match="1 tokens are too few for a window"):
        evaluator(f"text:{tmp_path / 't.txt'}")(ws.open(tmp_path / "llama"))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "t.txt").write_text(TEXT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r'pip install "weightsmith\[hf\]"'):
        evaluator(f"text:{tmp_path / 't.txt'}")


def test_in_a_search(llama, tmp_path: Path):
    """The whole way: checkpoints on disk, a text, and a combination that reads it better."""
    weights = ws.open(tmp_path / "llama")
    for step, factor in ((9, 1.0), (10, 0.7), (11, 0.5)):
        (factor * weights).save(tmp_path / f"checkpoint-{step}")
    evaluate = evaluator(f"text:{tmp_path / 'held_out.txt'}?length=20&windows=4")
    best = ws.average.lcsc(sorted(tmp_path.glob("checkpoint-*")), evaluate, budget=16)
    assert evaluate(best) == pytest.approx(best.lineage.options["score"], abs=1e-6)
    assert best.lineage.options["score"] > evaluate(weights)


# Other things of a file


def test_values_and_results_of_functions(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("data = [1, 2]\ndef made(): return {'a': 1}\ndef wrong(): return 1 / 0\n")
    assert evaluators.from_file(f"{file}:data") == [1, 2]
    assert evaluators.from_file(f"{file}:made") == {"a": 1}
    for spec, said in [
        ("made", "file.py:name"),
        (f"{file}:mad", "did you mean 'made'"),
        (f"{file}x.py:made", "no such"),
    ]:
        with pytest.raises(Error, match=said):
            evaluators.from_file(spec)
    with pytest.raises(Error, match="wrong failed at line 3: ZeroDivisionError"):
        evaluators.from_file(f"{file}:wrong")
