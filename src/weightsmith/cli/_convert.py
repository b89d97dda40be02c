"""``weightsmith convert``: the same weights in another format, dtype or choice."""

from __future__ import annotations

from typing import Any

import click

from weightsmith.cli._manual import PATH, SAVING, Manual, drop_option, input_options, option, pattern_option
from weightsmith.cli._save import check_output, save, save_options

_CODING = "Coding"


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
            ("weightsmith convert model/ -o small/ --encode exponents", "The same values in fewer bytes."),
            ("weightsmith convert small/ -o model/ --decode", "And back, equal to the bit."),
        ],
        status=SAVING,
    )
    @click.argument("path", type=PATH)
    @pattern_option
    @drop_option
    @option(
        "--encode",
        type=click.Choice(["exponents"]),
        section=_CODING,
        help="Fewer bytes that only weightsmith reads; no bit is lost.",
    )
    @option("--decode", is_flag=True, section=_CODING, help="What --encode or weightsmith share made small, as it was.")
    @input_options
    def convert(
        path: str,
        pattern: tuple[str, ...],
        drop: tuple[str, ...],
        encode: str | None,
        decode: bool,
        at: str | None,
        input_format: str | None,
        **given: Any,
    ) -> None:
        """Write the weights of PATH to another place, in another format, dtype or shard size.

        Values are read and written piece by piece, so a checkpoint may be larger than memory. Configuration,
        tokenizer and other small files of a folder are carried along. Tied tensors are written once.

        What is to be encoded is read twice before it is written. The config.json of what is encoded is put aside as
        config.decoded.json, so that other programs do not load codes for weights.

        PATH is never written to.
        """
        from weightsmith import open as open_weights

        if encode and decode:
            raise click.UsageError("--encode and --decode are the way there and the way back; give one")
        weights = open_weights(path, at=at, format=input_format)
        if decode:
            from weightsmith import share

            weights = share.decode(weights)
        if pattern:
            weights = weights.select(list(pattern))
        if drop:
            weights = weights.drop(list(drop))
        if encode:
            from weightsmith import share

            check_output(given)  # before the tensors are read twice
            if dtype := given.pop("dtype"):
                weights = weights.cast(dtype)  # codes cannot be cast any more
            weights = share.encode(weights, encode, threads=given["threads"])  # type: ignore[arg-type]
        save(weights, given)

    convert.params += save_options()
    return convert
