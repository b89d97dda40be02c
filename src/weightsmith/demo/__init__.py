"""What weights can do, on real data in less than a minute: train, average, prune, repair, quantize.

``weightsmith demo`` trains a small network on scikit-learn's digits, fine-tunes siblings from it,
averages them, prunes and quantizes what comes out, writes every checkpoint to a folder, reads each
back, measures it on held-out pictures, and draws up a report. The pieces can be used by hand::

    from weightsmith import demo

    data = demo.digits(seed=0)
    demo.accuracy(ws.open("weightsmith-demo/soup"), data.test)
"""

from weightsmith.demo._make import QUICK, Made, Settings
from weightsmith.demo._measure import Difference, Share
from weightsmith.demo._run import Outcome, Row, record, run
from weightsmith.demo._task import (
    Digits,
    DigitsNet,
    Examples,
    accuracy,
    digits,
    initial,
    module_of,
    right,
    shift,
    train,
)

__all__ = [
    "QUICK",
    "Difference",
    "Digits",
    "DigitsNet",
    "Examples",
    "Made",
    "Outcome",
    "Row",
    "Settings",
    "Share",
    "accuracy",
    "digits",
    "initial",
    "module_of",
    "record",
    "right",
    "run",
    "shift",
    "train",
]
