"""Chat templates: what each of them makes of a conversation, and where it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import chat_template
from weightsmith.merge._chat_template import TEMPLATES
from weightsmith.weights import Weights

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]

SPOKEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n"
    "### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "exaone": "[|system|]Be brief.[|endofturn|]\n"
    "[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}


def render(template: str, messages: list[dict[str, str]], prompt: bool = True, **special: str) -> str:
    """As transformers sets up the language."""
    sandbox = pytest.importorskip("jinja2.sandbox", reason='needs jinja2: pip install "weightsmith[hf]"')

    def raise_exception(text: str) -> None:
        raise ValueError(text)

    language = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    language.globals["raise_exception"] = raise_exception
    return language.from_string(template).render(messages=messages, add_generation_prompt=prompt, **special)


def model(**files: Any) -> Weights:
    """A tensor, and files beside it; ``__`` stands for a dot."""
    raw = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()}
    return Weights.of({"w": torch.ones(2)}).with_files({name.replace("__", "."): data for name, data in raw.items()})


def said(weights: Weights, name: str = "tokenizer_config.json") -> Any:
    return json.loads(weights.files[name])["chat_template"]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_made_of_a_conversation(name):
    template = said(chat_template(model(tokenizer_config__json={}), name))
    assert render(template, ASKED, bos_token="<s>", eos_token="</s>") == SPOKEN[name]
    # Without the prompt it ends where the last message does.
    shorter = render(template, ASKED, prompt=False, bos_token="<s>", eos_token="</s>")
    assert SPOKEN[name].startswith(shorter)
    assert shorter.rstrip().endswith(("Bye", "Bye<|im_end|>", "Bye<|eot_id|>", "Bye [/INST]"))
    # A tokenizer may have no special tokens; nothing of them is told then.
    assert render(template, ASKED) == SPOKEN[name].replace("<s>", "").replace("</s>", "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_a_system_message(name):
    spoken = render(TEMPLATES[name], ASKED[1:], bos_token="<s>", eos_token="</s>")
    assert "Be brief." not in spoken
    assert "Hello" in spoken
    assert spoken.startswith("[|system|][|endofturn|]\n[|user|]Hi") == (name == "exaone")


def test_a_conversation_of_mistral_alternates():
    with pytest.raises(ValueError, match="user and assistant must alternate"):
        render(TEMPLATES["mistral"], [ASKED[1], ASKED[1]])
    with pytest.raises(ValueError, match="user and assistant must alternate"):
        render(TEMPLATES["mistral"], [ASKED[1], ASKED[0]])


@pytest.mark.parametrize("name", TEMPLATES)
def test_through_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "weightsmith[hf]"')
    level = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"}
    tokenizer = {"added_tokens": [], "model": level}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    weights = model(tokenizer__json=tokenizer, tokenizer_config__json=config)
    chat_template(weights, name).save(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == SPOKEN[name]


MINE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_it_is_written_where_the_folder_has_it():
    config = chat_template(model(tokenizer_config__json={"bos_token": "<s>", "chat_template": "{{ 1 }}"}), MINE)
    assert json.loads(config.files["tokenizer_config.json"]) == {"bos_token": "<s>", "chat_template": MINE}
    assert set(config.files) == {"tokenizer_config.json"}
    file = chat_template(model(chat_template__jinja=b"{{ 1 }}", tokenizer_config__json={"bos_token": "<s>"}), MINE)
    assert file.files["chat_template.jinja"] == MINE.encode()
    assert json.loads(file.files["tokenizer_config.json"]) == {"bos_token": "<s>"}
    before = {"chat_template__jinja": b"{{ 1 }}", "chat_template__json": {"chat_template": "{{ 1 }}", "other": 2},
              "tokenizer_config__json": {"chat_template": "{{ 1 }}"}}  # fmt: skip
    everywhere = chat_template(model(**before), MINE)
    assert everywhere.files["chat_template.jinja"] == MINE.encode()
    assert said(everywhere) == said(everywhere, "chat_template.json") == MINE
    assert json.loads(everywhere.files["chat_template.json"])["other"] == 2
    fresh = chat_template(model(tokenizer__json={}), MINE)
    assert said(fresh) == MINE


def test_named_templates_keep_the_others():
    named = [{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 1 }}"}]
    made = said(chat_template(model(tokenizer_config__json={"chat_template": named}), MINE))
    assert made == [{"name": "default", "template": MINE}, {"name": "tool_use", "template": "{{ 2 }}"}]


def test_the_commonest_is_taken_and_the_first_of_equals():
    def having(text: Any) -> Weights:
        return model(tokenizer_config__json={"chat_template": text})

    one, two = "{{ 1 }}", "{{ 2 }}"
    named = [{"name": "default", "template": two}]
    base, models = having(one), [having(one), having(named), having(two + "\n")]
    assert said(chat_template(base, "auto", models)) == two
    assert said(chat_template(base, "auto", [base, having(two)])) == one
    assert said(chat_template(base, "auto", [having(two), base])) == two
    assert said(chat_template(base, "auto")) == one
    assert said(chat_template(base, "auto", [model(), having(two)])) == two
    file = model(chat_template__jinja=b"{{ 3 }}", tokenizer_config__json={"chat_template": one})
    assert said(chat_template(base, "auto", [file])) == "{{ 3 }}"  # transformers prefers the file
    untouched = model(tokenizer_config__json={})
    assert chat_template(untouched, "auto", [untouched, model()]) is untouched


def test_the_tensors_are_the_same_and_files_on_disk_are_read(tmp_path):
    before = model(tokenizer_config__json={"chat_template": "{{ 1 }}"})
    assert chat_template(before, "chatml").node("w") is before.node("w")
    before.save(tmp_path / "one")
    chat_template(tmp_path / "one", MINE).save(tmp_path / "two")
    assert said(chat_template(before, "auto", [tmp_path / "two"])) == MINE
    assert json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())["chat_template"] == MINE
    assert json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())["chat_template"] == "{{ 1 }}"
    assert ws.open(tmp_path / "two")["w"].tolist() == [1, 1]


def test_what_is_refused():
    weights = model(tokenizer_config__json={})
    with pytest.raises(Error, match=r"'chat-ml' is neither a known name \(did you mean 'chatml'"):
        chat_template(weights, "chat-ml")
    with pytest.raises(Error, match=r"there is no tokenizer_config\.json beside the weights"):
        chat_template(model(), "chatml")
    with pytest.raises(Error, match=r"tokenizer_config\.json is no JSON"):
        chat_template(model(tokenizer_config__json=b"{"), "chatml")
    pytest.importorskip("jinja2", reason='needs jinja2: pip install "weightsmith[hf]"')
    with pytest.raises(Error, match="line 2 of the template is no Jinja"):
        chat_template(weights, "{{ 1 }}\n{% for %}")
    assert said(chat_template(weights, "{% generation %}{{ 1 }}{% endgeneration %}")).startswith("{% generation")
