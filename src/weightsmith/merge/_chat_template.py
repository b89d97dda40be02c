"""The template by which a conversation becomes the text that a model reads.

Models that were tuned on conversations understand only the form they were tuned on. A merge of
several has to settle on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.errors import Error, did_you_mean
from weightsmith.merge._tokenizer import content, parsed, written
from weightsmith.merge.room import Source
from weightsmith.weights import Weights, open

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' ~ message['content'] ~ eos_token ~ '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set preface = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set preface = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}"
        "{% for message in turns %}"
        "{% if message['role'] != ('user' if loop.index0 is even else 'assistant') %}"
        "{{ raise_exception('after an optional system message, user and assistant must alternate') }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + (preface if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' ~ message['content'] ~ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "exaone": (
        "{% if not messages or messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}
"""Well-known forms of a conversation, by name."""

_FILE, _CONFIG, _PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"


def chat_template(weights: Source, template: str, models: Sequence[Source] = ()) -> Weights:
    """The weights with another chat template beside them.

    Args:
        weights: a model with its tokenizer.
        template: ``chatml``, ``llama3``, ``alpaca``, ``mistral`` or ``exaone``; a template in Jinja, as
            ``tokenizer.apply_chat_template`` takes it; or ``"auto"``, the commonest among ``models``.
        models: those that ``"auto"`` looks at (the first of equally common ones is taken, so give the base
            first); without them it looks at ``weights``.

    Returns:
        Weights: the same tensors. The template stands in ``tokenizer_config.json`` and, where the folder
        has them, in ``chat_template.jinja`` and ``chat_template.json``. Unchanged if ``"auto"`` finds none.
        The special tokens that a form needs are not added: see `share_vocabulary`.

    Raises:
        Error: no such name, a template that is no Jinja (told where jinja2 is installed), or no tokenizer.

    >>> made = chat_template(Weights.of({}).with_files({"tokenizer_config.json": b"{}"}), "chatml")
    >>> b"<|im_start|>" in made.files["tokenizer_config.json"]
    True
    """
    opened = open(weights)
    if template == "auto":
        found = [text for model in models or (opened,) if (text := _template_of(open(model).files))]
        if not found:
            return opened
        text = Counter(found).most_common(1)[0][0]
    else:
        text = _text(template)
    if not {_CONFIG, "tokenizer.json", _FILE} & opened.files.keys():
        raise Error(f"chat_template: there is no {_CONFIG} beside the weights for the template to stand in")
    return opened.with_files(_with_template(opened.files, text))


def _text(template: str) -> str:
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" not in template and "{%" not in template:
        known = (*TEMPLATES, "auto")
        raise Error(
            f"chat_template: {template[:80]!r} is neither a known name{did_you_mean(template, known)} nor a template "
            f"in Jinja; known: {', '.join(known)}"
        )
    try:
        import jinja2
    except ImportError:
        return template
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        if "generation" not in str(error):  # a tag that transformers adds to the language
            raise Error(f"chat_template: line {error.lineno} of the template is no Jinja: {error.message}") from None
    return template


def _template_of(files: Mapping[str, Any]) -> str | None:
    """The template that transformers would use."""
    if _FILE in files:
        text: Any = content(files[_FILE]).decode(errors="replace")
    else:
        said = (parsed(files, name, "chat_template").get("chat_template") for name in (_CONFIG, _PROCESSOR))
        text = next((one for one in said if one), None)
    if isinstance(text, list):  # named ones
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, Mapping)}
        text = named.get("default")
    return text.strip() or None if isinstance(text, str) else None


def _with_template(files: Mapping[str, Any], text: str) -> dict[str, bytes]:
    """The files that have to change."""
    made = {_FILE: text.encode()} if _FILE in files else {}
    if _PROCESSOR in files:
        made[_PROCESSOR] = written(parsed(files, _PROCESSOR, "chat_template") | {"chat_template": text})
    config = parsed(files, _CONFIG, "chat_template")
    before = config.get("chat_template")
    if before is not None or _FILE not in files:
        new: Any = text
        if isinstance(before, list):
            kept = [entry for entry in before if not (isinstance(entry, Mapping) and entry.get("name") == "default")]
            new = [{"name": "default", "template": text}, *kept]
        made[_CONFIG] = written(config | {"chat_template": new})
    return made
