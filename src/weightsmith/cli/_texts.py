"""Texts that a command calibrates and judges on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._output import clean

if TYPE_CHECKING:
    from weightsmith.calibration import Texts
    from weightsmith.weights import Weights


def check_texts(given: Mapping[str, Any]) -> None:
    """Texts of ``--calibrate`` and ``--evaluate`` that cannot be read are found now."""
    from weightsmith.language import read_text

    for text in (*given["calibrate"], *given["evaluate"]):
        read_text(text)


def windows(before: Weights, given: Mapping[str, Any]) -> Texts:
    """Windows of the texts of ``--calibrate``; a warning for a text that is judged on as well."""
    from weightsmith import calibration

    found = calibration.texts(
        before, list(given["calibrate"]), samples=given["samples"], length=given["length"], seed=given["seed"]
    )
    for text in given["evaluate"]:
        if (share := found.overlap(text)) > calibration.MOST_SHARED:
            said = f"warning: {share:.0%} of {text} is calibrated on as well, so it flatters the result"
            click.echo(clean(said), err=True)
    return found
