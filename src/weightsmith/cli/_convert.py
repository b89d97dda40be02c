"""``weightsmith convert``: the same weights in another format, dtype or choice."""

from __future__ import annotations

from typing import Any

import click

from weightsmith.cli._manual import PATH, SAVING, Manual, drop_option, input_options, pattern_option
from weightsmith.cli._save import save, save_options


def command() -> click.Command:
    """The ``convert`` command."""

    @click.command(
        "convert",
        cls=Manual,
        short_help="Write weights in another format, dtype or shard size.",
        examples=[
            ("weightsmith convert model.gguf -o model/ --dtype bfloat16", "A GGUF file as a folder of safetensors."),
            ("weightsmith convert run.ckpt --at state_dict -o run.safetensors", "The model of a training checkpoint."),
            ("weightsmith convert big/ -o small/ --max-shard-size 1GB", "The same in smaller files."),
            ("weightsmith convert model/ -o part.npz -p '*.norm.*'", "Some of the tensors, for NumPy."),
        ],
        status=SAVING,
    )
    @click.argument("path", type=PATH)
    @pattern_option
    @drop_option
    @input_options
    def convert(
        path: str,
        pattern: tuple[str, ...],
        drop: tuple[str, ...],
        at: str | None,
        input_format: str | None,
        **given: Any,
    ) -> None:
        """Write the weights of PATH to another place, in another format, dtype or shard size.

        Values are read and written piece by piece, so a checkpoint may be larger than memory. Configuration,
        tokenizer and other small files of a folder are carried along. Tied tensors are written once.

        PATH is never written to.
        """
        from weightsmith import open as open_weights

        weights = open_weights(path, at=at, format=input_format)
        if pattern:
            weights = weights.select(list(pattern))
        if drop:
            weights = weights.drop(list(drop))
        save(weights, given)

    convert.params += save_options()
    return convert
