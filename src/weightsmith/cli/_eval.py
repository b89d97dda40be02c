"""``weightsmith eval``: how good models are, on texts and on labelled examples, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._inspect import check_report, report_options
from weightsmith.cli._manual import PATH, Manual, json_option, option
from weightsmith.cli._output import clean, echo_json

if TYPE_CHECKING:
    from weightsmith.inspect import Report

_ON, _AGAINST, _HOW = "On what", "Against what", "How"


def command() -> click.Command:
    """The ``eval`` command."""

    @click.command(
        "eval",
        cls=Manual,
        short_help="How good models are: perplexity, KL to a reference, accuracy.",
        examples=[
            ("weightsmith eval small/ --text near.txt --text far.txt --reference base/", "What compression has cost."),
            ("weightsmith eval run_a/ run_b/ soup/ --text held_out.txt -o report.html", "Several, side by side."),
            ("weightsmith eval a/ b/ --classify reviews.csv", "Classifiers of texts, on text and label."),
            ("weightsmith eval a.pt b.pt --classify digits --module net.py:build", "Checkpoints of your own module."),
            ("weightsmith eval a/ b/", "Results of lm-eval that lie in the folders."),
        ],
    )
    @click.argument("models", type=PATH, nargs=-1, required=True, metavar="MODEL...")
    @option("--text", "texts", type=PATH, multiple=True, section=_ON, help="A held-out text. Take at least two kinds.")
    @option(
        "--classify",
        metavar="EXAMPLES",
        section=_ON,
        help="Labelled examples: digits, fashion-mnist, x.npz (x and y), x.csv (text and label), or file.py:function.",
    )
    @option("--limit", type=click.IntRange(1), metavar="N", section=_ON, help="Only the first N examples.")
    @option("--lm-eval", "harness", type=PATH, multiple=True, section=_ON, help="Results of lm-eval; a file a model.")
    @option(
        "--reference",
        type=PATH,
        section=_AGAINST,
        help="The model that all are compared with, token by token.  [default: the first]",
    )
    @option(
        "--cache", type=PATH, section=_AGAINST, help="Keep what the reference says in this folder, for the next time."
    )
    @option("--length", type=click.IntRange(2), metavar="N", section=_HOW, help="Tokens of a window.  [default: 512]")
    @option("--windows", type=click.IntRange(0), metavar="N", default=16, show_default=True, section=_HOW,
            help="Windows of each text, evenly spread; 0 reads all of it.")  # fmt: skip
    @option("--module", metavar="FILE.PY:FUNCTION", section=_HOW, help="Makes the module that a checkpoint belongs to.")
    @option("--device", default="cpu", show_default=True, section=_HOW, help="Where to compute.")
    @option("--dtype", default="float32", show_default=True, section=_HOW, help="In what to compute.")
    @option("--seed", type=int, default=0, show_default=True, section=_HOW, help="Of the resampling for intervals.")
    @report_options
    @json_option
    def evaluate(models: tuple[str, ...], output: str | None, overwrite: bool, as_json: bool, **given: Any) -> None:
        """Measure each MODEL on texts, on labelled examples, or both, and compare them.

        On a text: perplexity, bits per byte, and, with --reference, the divergence (KL) from it and how often both find
        the same token likeliest. These two tell what a change has cost with far fewer tokens than a perplexity does.
        All figures come with a 95 % interval over the windows, and ratios are of the same windows.

        On examples: accuracy, F1, log loss and calibration, with what was lost and gained against the first model.
        """
        from weightsmith.inspect._report import page_of
        from weightsmith.page import written

        check_report(output, overwrite)
        reports = _reports(list(models), output, **given)
        if output is not None and len(reports) > 1:
            written(output, page_of(reports, "Evaluation"))
        elif output is not None:
            reports[0].save(output)
        if as_json:
            echo_json([one.to_json() for one in reports])
            return
        for line in "\n\n".join(map(str, reports)).splitlines():
            click.echo(clean(line))
        if output is not None:
            click.echo(f"report: {clean(output)}")

    return evaluate


def _reports(
    models: list[str],
    output: str | None,
    texts: tuple[str, ...],
    classify: str | None,
    limit: int | None,
    harness: tuple[str, ...],
    reference: str | None,
    cache: str | None,
    length: int | None,
    windows: int,
    module: str | None,
    device: str,
    dtype: str,
    seed: int,
) -> list[Report]:
    from weightsmith.errors import OutputError
    from weightsmith.inspect._harness import beside, harness_results
    from weightsmith.inspect._language import language

    if (module or limit) and not classify:
        raise click.UsageError(f"--{'module' if module else 'limit'} is for --classify")
    if cache and not (texts and reference):
        raise click.UsageError("--cache keeps what a --reference says of a --text")
    if harness and len(harness) != len(models):
        raise click.UsageError(f"--lm-eval needs a file for each of the {len(models)} models, got {len(harness)}")
    found = dict(zip(models, harness, strict=True)) if harness else beside(models)
    if not (texts or classify or found):
        raise click.UsageError("nothing to measure on: add --text FILE, --classify EXAMPLES, or results of lm-eval")
    count = bool(texts) + bool(classify) + bool(found)
    if output is not None and count > 1 and not output.endswith(".html"):
        raise OutputError(f"{output}: {count} tables fit into an .html page only")
    reports = []
    if texts:
        reports.append(
            language(
                models, list(texts), reference, length=length, windows=windows or None, device=device, dtype=dtype,
                cache=cache, seed=seed,
            )
        )  # fmt: skip
    if classify:
        reports.append(_classified(models, classify, limit, reference, module, device, dtype, seed))
    if found:
        reports.append(harness_results(found))
    return reports


def _classified(
    models: list[str],
    spec: str,
    limit: int | None,
    reference: str | None,
    module: str | None,
    device: str,
    dtype: str,
    seed: int,
) -> Report:
    from weightsmith import open as open_weights
    from weightsmith.data import examples
    from weightsmith.evaluators import from_file
    from weightsmith.inspect._classify import classification
    from weightsmith.weights import as_dtype

    data, floats = examples(spec, limit), as_dtype(dtype)
    names: list[str] = list(dict.fromkeys([reference, *models] if reference else models))
    opened = {name: open_weights(name) for name in names}
    texts = isinstance(data.inputs, list)
    if not module and not texts:
        raise click.UsageError(f"{spec} holds numbers, so the module must be named: --module FILE.PY:FUNCTION")
    tokenizers: dict[int, Any] = {}

    def maker(name: str) -> Any:
        def make() -> Any:
            if module:
                made = from_file(module)
                opened[name].load_into(made)
                return made.to(floats)
            from weightsmith.language import classifier

            made, tokenizers[id(made)] = classifier(opened[name], floats)
            return made

        return make

    def ask(model: Any, inputs: Any) -> Any:
        if not texts or module:
            return model(inputs)
        tokenizer = tokenizers[id(model)]
        encoded = tokenizer(inputs, return_tensors="pt", padding=True, truncation=True)
        return model(**{name: value.to(model.device) for name, value in encoded.items()})

    return classification(
        {name: maker(name) for name in names}, data, names[0], device=device, forward=ask, seed=seed,
        batch=32 if texts else 256,
    )  # fmt: skip
