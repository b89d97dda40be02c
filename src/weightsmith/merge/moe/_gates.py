"""Routers for experts that were never trained together, from texts that each of them is good at.

A router asks by a scalar product which expert a token's state is most like. So the mean state over texts of one kind
is a router's row for the expert of that kind; only its direction is kept.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.errors import Error, missing
from weightsmith.merge._tokenizer import content
from weightsmith.weights import Weights

BY_PROMPTS = ("hidden", "hidden_last", "hidden_avg", "inputs", "cheap_embed")
GATES = (*BY_PROMPTS, "random", "uniform_random", "zeros")

Prompts = tuple[Sequence[str], Sequence[str]]
"""Texts that an expert is for, and texts that it is not for."""

_SMALL = 1e-8
_CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def gates(mode: str, base: Weights, prompts: Sequence[Prompts], layers: int, hidden: int, seed: int) -> Tensor:
    r"""Routers ``[layers, experts, hidden]``, in float32.

    .. math:: r_e = \frac{v_e}{\|v_e\|}, \qquad v_e = \phi(P_e) - \phi(N_e)

    with :math:`\phi` the mean of states over texts, and no second term where there are no negative texts.

    Args:
        mode: one of `GATES`; see `assemble`.
        base: the model that reads the texts, with its ``config.json`` and its tokenizer.
        prompts: for each expert.
        layers, hidden: the shape of random ones.
        seed: of random ones.
    """
    shape = layers, len(prompts), hidden
    generator = torch.Generator().manual_seed(seed)
    if mode == "zeros":
        return torch.zeros(shape)
    if mode == "random":
        return torch.randn(shape, generator=generator)
    if mode == "uniform_random":
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(hidden)
    encode = _encoder(base)
    tokens = [tuple(_encoded(encode, texts, number) for texts in pair) for number, pair in enumerate(prompts)]
    states = _embedded(base) if mode == "cheap_embed" else _read(base, mode, layers)
    found = []
    with progress.task("states of prompts", sum(len(texts) for pair in tokens for texts in pair)) as advance:
        for positive, negative in tokens:
            state = states(positive)
            advance(len(positive))
            if negative:
                state = state - states(negative)
                advance(len(negative))
            found.append(_unit(state))
    result = torch.stack(found, dim=1).expand(shape).contiguous()
    if not result.isfinite().all():
        raise Error(f"assemble: the base gives NaN or infinity for the prompts, so gate={mode!r} has no direction")
    return result


def _unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=-1, keepdim=True).clamp(min=_SMALL)


States = Callable[[Sequence[Tensor]], Tensor]
"""From texts ``[tokens]`` to a state ``[layers or 1, hidden]``."""


def _embedded(base: Weights) -> States:
    """The direction of the sum of all tokens' embeddings."""
    name = next(name for name in base if name.endswith("embed_tokens.weight"))
    table = base[name]

    def states(texts: Sequence[Tensor]) -> Tensor:
        rows = torch.cat(list(texts)).to(table.device)
        return _unit(table[rows].float().sum(0, keepdim=True).cpu())

    return states


def _read(base: Weights, mode: str, layers: int) -> States:
    """The mean over texts of the states before each layer, or of what each MLP reads."""
    model = _model(base)
    seen: list[Tensor] = []
    if mode == "inputs":
        for name, module in model.named_modules():
            if name.endswith(".mlp") and name.rpartition(".")[0].rpartition(".")[2].isdecimal():
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    @torch.no_grad()
    def states(texts: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(())
        for text in texts:
            seen.clear()
            device = next(model.parameters()).device
            told = model(input_ids=text[None].to(device), output_hidden_states=True, use_cache=False)
            every = torch.stack(seen or list(told.hidden_states[:layers]))[:, 0].float().cpu()
            total = total + (every[:, -1] if mode in ("hidden", "hidden_last") else every.mean(dim=1))
        return total / len(texts)

    return states


# The base, as transformers reads it


def _encoded(encode: Callable[[str], Tensor], texts: Sequence[str], number: int) -> list[Tensor]:
    found = [encode(text) for text in texts]
    for text, tokens in zip(texts, found, strict=True):
        if not len(tokens):
            raise Error(f"assemble: the prompt {text!r:.80} of expert {number} has no tokens")
    return found


def _encoder(base: Weights) -> Callable[[str], Tensor]:
    """Text -> tokens, with the mark of the beginning where there is one."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise missing("transformers", "hf", "a gate by prompts") from None
    with _folder(base) as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever comes
            raise Error(f"assemble: transformers cannot use the tokenizer beside the base: {_told(error)}") from None
    begin = tokenizer.bos_token or ""

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(begin + text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    return encode


def _model(base: Weights) -> Any:
    """The base with its weights, in the dtype they have."""
    import transformers

    with _folder(base) as folder:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise Error(f"assemble: transformers cannot use the config.json of the base: {_told(error)}") from None
    state: Mapping[str, Tensor] = base.to_dict()
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    try:
        kind: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        model, told = kind.from_pretrained(
            None, config=config, state_dict=dict(state), output_loading_info=True, dtype=dtype
        )
    except Exception as error:
        raise Error(f"assemble: transformers cannot load the base: {_told(error)}") from None
    if told["missing_keys"] or told["mismatched_keys"]:
        lacking = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
        raise Error(f"assemble: the base does not fit its config.json: {', '.join(lacking[:5])}")
    return model.eval()


def _folder(base: Weights) -> Any:
    """What lies beside the weights, in a folder for a moment."""
    folder = tempfile.TemporaryDirectory(prefix="weightsmith-")
    for name, file in base.files.items():
        if "/" not in name and name.endswith(_CARRIED):
            Path(folder.name, name).write_bytes(content(file))
    return folder


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else type(error).__name__
