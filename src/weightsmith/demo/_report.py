"""The demo's report: what was done, what came out, and how to do each step by hand.

Every figure and every judgement in it is computed from the outcome; the words around them hold
whatever comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from weightsmith import page
from weightsmith.demo import _plots
from weightsmith.demo._make import siblings_of
from weightsmith.demo._measure import RESAMPLES
from weightsmith.page import Cell, Section

if TYPE_CHECKING:
    from weightsmith.demo._measure import Difference, Share
    from weightsmith.demo._run import Outcome, Row

LAYER = "hidden.weight"  # the largest tensor; its values are shown before and after


def report(outcome: Outcome) -> str:
    """The whole page."""
    return page.page(
        "What weights can do",
        _lead(outcome),
        [
            Section("results", "What came out", _results(outcome)),
            Section("done", "What was done", _done(outcome)),
            Section("drawings", "Accuracy, size and zeros", _drawings(outcome)),
            Section("between", "Between two siblings", _between(outcome)),
            Section("checkpoints", "Each checkpoint, and how to make it", _checkpoints(outcome)),
            Section("reading", "How to read the figures", _reading(outcome)),
        ],
        page.paragraph(_made_with(outcome)),
    )


def findings(outcome: Outcome) -> list[str]:
    """What can be said of the run, one sentence each."""
    averaged = [row for row in outcome.rows if row.made.kind == "averaged"]
    smaller = [row for row in outcome.rows if row.made.kind in ("pruned", "quantized")]
    return [_finding(outcome, row) for row in averaged] + [_smaller(outcome, row) for row in smaller]


def _finding(outcome: Outcome, row: Row) -> str:
    reference = outcome.row(row.made.reference).made.title
    plain, shifted = _against(row.against), _against(row.against_shifted)
    return f"{_capital(row.made.title)} against {reference}: {plain}; on shifted pictures {shifted}."


def _smaller(outcome: Outcome, row: Row) -> str:
    reference = outcome.row(row.made.reference)
    return (
        f"{_capital(row.made.title)} against {reference.made.title}: {_against(row.against)}; "
        f"{_percent(row.share_of_zeros)} zeros, {_percent(row.nbytes / reference.nbytes)} of the bytes."
    )


def _against(found: Difference | None) -> str:
    if found is None:
        return "the same checkpoint"
    return f"{points(found)} ({found.verdict})"


def _lead(outcome: Outcome) -> str:
    best = outcome.row("best")
    text = (
        f"One small network was trained on {outcome.sizes['start']} pictures of digits and fine-tuned in "
        f"{_count(outcome, 'sibling')} ways. Their weights were averaged, pruned, repaired and quantized; each of the "
        f"{len(outcome.rows)} checkpoints was written to a folder, read back, and measured on "
        f"{outcome.sizes['test']} pictures that no step had seen. "
        f"The best single fine-tune, chosen on validation pictures, is {best.made.title} "
        f"with {_percent(best.test.value)} of the test pictures right."
    )
    return page.paragraph(text, "lead")


def _count(outcome: Outcome, kind: str) -> int:
    return sum(row.made.kind == kind for row in outcome.rows)


# What came out


def _results(outcome: Outcome) -> str:
    caption = f"Seed {outcome.seed}, {outcome.sizes['test']} test pictures"
    above = (
        "Under each accuracy stands its 95 % Wilson interval. The difference is in percentage points on the same test "
        "pictures, under it the 95 % paired bootstrap interval and what it is the difference to."
    )
    compared = sum(found is not None for row in outcome.rows for found in (row.against, row.against_shifted))
    columns = ["checkpoint", "test", "shifted test", "difference", "bytes on disk", "zeros", "seconds"]
    return "\n".join(
        [
            page.paragraph(above),
            page.table("table-results", caption, columns, [_table_row(outcome, row) for row in outcome.rows]),
            page.paragraph(
                "Pruning does not save bytes by itself: the zeros are stored like any other value (dense storage), "
                "so only quantizing makes the files smaller here.",
                "note",
            ),
            "<h3>In words</h3>",
            page.bullets(findings(outcome)),
            page.paragraph(_fairness(outcome)),
            page.paragraph(
                f"This is one run with one seed and {compared} comparisons: a difference that is shown here "
                "may be gone with another seed.",
                "note",
            ),
        ]
    )


def _fairness(outcome: Outcome) -> str:
    siblings = [row for row in outcome.rows if row.made.kind == "sibling"]
    strongest = max(siblings, key=lambda row: row.shifted.value)
    kind = next(one.augmentation for one in siblings_of(outcome.settings) if one.key == outcome.best)
    return (
        f"The best sibling was chosen on pictures as they are; it was trained on {kind}. Half of the siblings, and so "
        "every average of all, have seen shifted pictures, which helps on the shifted test whatever averaging does: "
        f"{strongest.made.title} has {_percent(strongest.shifted.value)} there, the most of all siblings, and "
        f"{_percent(strongest.test.value)} on pictures as they are."
    )


def _table_row(outcome: Outcome, row: Row) -> list[Cell]:
    title = row.made.title + (" (best on validation)" if row.made.key == outcome.best else "")
    reference = outcome.row(row.made.reference).made.title
    found = row.against
    return [
        Cell(title, row.made.key + "/"),
        _share_cell(row.test),
        _share_cell(row.shifted),
        Cell(_signed(found.value), f"{_interval(found)} to {reference}") if found else Cell("–"),
        Cell(f"{row.nbytes:,}"),
        Cell(_percent(row.share_of_zeros)),
        Cell(f"{row.made.seconds:.2f}"),
    ]


def _share_cell(found: Share) -> Cell:
    low, high = found.interval
    return Cell(_percent(found.value), f"{100 * low:.1f} – {100 * high:.1f}")


# What was done


def _done(outcome: Outcome) -> str:
    sizes, settings = outcome.sizes, outcome.settings
    members = ", ".join(outcome.row(key).made.title for key in outcome.members)
    lines = [
        f"Data: the {sizes['training'] + sizes['validation'] + sizes['test']} digits of scikit-learn, 8 by 8 pixels, "
        f"split at random: {sizes['training']} for training, {sizes['validation']} for choosing, {sizes['test']} for "
        "the test. The shifted test has the same test pictures, each moved by up to one pixel each way.",
        f"Start: a network of two convolutions and two linear layers with {_parameters(outcome):,} parameters, trained "
        f"on {sizes['start']} of the training pictures.",
        f"Siblings: fine-tuned from the start on all {sizes['training']} training pictures with "
        f"{len(settings.rates)} learning rates ({', '.join(f'{rate:g}' for rate in settings.rates)}), each with plain "
        "and with shifted pictures.",
        f"Averages: the uniform soup, the greedy soup (made of {members}) and Model Stock.",
        f"Smaller: the greedy soup with the smallest {100 * settings.sparsity:g}\N{NO-BREAK SPACE}% of each matrix and "
        "convolution set to zero, with and without repair; rounded to "
        f"{_listed([str(bits) for bits in settings.bits])} bits; and pruned, repaired and rounded.",
        "Measured: each checkpoint was opened from its folder; nothing in this report comes from memory.",
    ]
    return page.bullets(lines)


def _parameters(outcome: Outcome) -> int:
    return sum(count for _, count in outcome.row("start").zeros.values())


# Drawings


def _drawings(outcome: Outcome) -> str:
    chosen = _chosen(outcome)
    soup = outcome.row("greedy-soup")
    small = outcome.row(f"{outcome.settings.small_bits}-bit")
    repaired = outcome.row("repaired")
    both = outcome.row(f"repaired-{outcome.settings.small_bits}-bit")
    drawn = [
        _drawn(
            "plot-accuracy",
            "Share of test pictures that are right, with 95 % Wilson intervals. The best sibling was chosen on "
            "other pictures than these.",
            _plots.accuracies(outcome, chosen, "plot-accuracy"),
        ),
        _drawn(
            "plot-size",
            "Size of the weight files against accuracy with its 95 % interval; lines join one model at different "
            "numbers of bits. Pruned checkpoints are as large as before, for zeros take room too.",
            _plots.sizes(outcome, "plot-size"),
        ),
        _drawn(
            "plot-zeros",
            "Share of values that are exactly zero in every matrix and convolution. Rounding makes zeros too: "
            "what is smaller than half a step.",
            _plots.zeros(outcome, [outcome.row("pruned"), repaired, small, both], "plot-zeros"),
        ),
        _drawn(
            "plot-values",
            f"Values of {LAYER} before and after. Rounding leaves few different ones, each a code times the scale "
            "of its row.",
            _plots.histograms(outcome, [soup, repaired, small], LAYER, "plot-values"),
        ),
    ]
    return page.figures(drawn)


def _chosen(outcome: Outcome) -> list[Row]:
    return [row for row in outcome.rows if row.made.kind != "sibling" or row.made.key == outcome.best]


def _drawn(key: str, caption: str, drawn: _plots.Drawn) -> str:
    drawing, alternative = drawn
    return page.figure(drawing, key, caption, alternative)


def _between(outcome: Outcome) -> str:
    first, second = outcome.ends
    text = (
        f"Sibling {first.number} learnt from {first.augmentation}, sibling {second.number} from "
        f"{second.augmentation}, both at the learning rate {first.rate:g}. Every point on the line is a network whose "
        "weights are a mixture of both, made while it was read: (1 - t) * first + t * second. Without a deep dip "
        "between the ends the two lie in one valley of the loss, which is what averaging rests on."
    )
    lowest = min(outcome.line, key=lambda point: point.test)
    ends = min(outcome.line[0].test, outcome.line[-1].test)
    dip = (
        "Nowhere on the line is the test accuracy lower than at the worse end."
        if lowest.test >= ends
        else f"The lowest test accuracy on the line is {_percent(lowest.test)}, "
        f"{100 * (ends - lowest.test):.1f} points under the worse end."
    )
    caption = f"Accuracy at {len(outcome.line)} places on the straight line between two siblings."
    drawn = _drawn("plot-between", caption, _plots.line(outcome, "plot-between"))
    return "\n".join([page.paragraph(text), page.paragraph(dip), drawn])


# Checkpoints


def _checkpoints(outcome: Outcome) -> str:
    opening = f"import weightsmith as ws\nfrom weightsmith import demo\n\ndata = demo.digits(seed={outcome.seed})"
    measure = 'demo.accuracy(ws.open("soup"), data.test), demo.accuracy(ws.open("soup"), data.shifted)'
    parts = [
        page.paragraph(
            "Every folder holds model.safetensors and a config.json that names the network (put aside under another "
            "name where the weights are codes). "
            "The lines below, run in order in an empty folder, make all of them again. They start with:"
        ),
        page.code(opening),
        page.paragraph("The accuracy of one on the test pictures, plain and shifted:"),
        page.code(measure),
        page.paragraph(
            "The lineage under each is what the checkpoint says of itself; weightsmith show prints it for any file."
        ),
    ]
    return "\n".join(parts + [_checkpoint(row) for row in outcome.rows])


def _checkpoint(row: Row) -> str:
    return "\n".join(
        [
            f"<h3>{escape(_capital(row.made.title))}</h3>",
            page.paragraph(row.made.about),
            page.code(row.made.python),
            page.folded(f"Lineage of {row.made.key}/", page.code(row.lineage)),
        ]
    )


# How to read


def _reading(outcome: Outcome) -> str:
    return page.bullets(
        [
            "Accuracy is the share of test pictures that are right. The Wilson interval says how far the share could "
            "be off by the choice of test pictures; it says nothing of other seeds for training.",
            f"The difference compares two checkpoints on the same pictures; its interval is from {RESAMPLES:,} "
            "paired bootstrap resamples. Better or worse is said only where it leaves out zero.",
            "Bytes on disk is the size of the weight files in the folder. Zeros are counted in the values that the "
            "network computes with, for quantized ones after unpacking.",
            "Seconds is what the step itself took with reading and writing, on the machine of this run. The siblings' "
            "time is not added to that of their averages. It alone differs from run to run.",
            "The repaired checkpoint was trained longer than any sibling; they too might have gained by it.",
            "Settings are the same for every seed and are in demo.json. "
            f"Again with: weightsmith demo --seed {outcome.seed}",
        ]
    )


def _made_with(outcome: Outcome) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    return f"Made by weightsmith demo --seed {outcome.seed} in {outcome.seconds:.0f} seconds with {versions}."


# Words


def points(found: Difference) -> str:
    """A difference in percentage points with its interval."""
    return f"{_signed(found.value)} points [{_interval(found)}]"


def _interval(found: Difference) -> str:
    return f"{_signed(found.low)}, {_signed(found.high)}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
