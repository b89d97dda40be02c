"""Is the median of a pool of forecasts among its best?

The forecasts are of diabetes progression a year on, for 142 patients: twenty-five regressions (linear, trees,
neighbours) on random parts of the measurements and of 300 other patients, and five that are broken: they answer with
the target of a random patient, on a scale that is off by up to five times. The baseline is the best single forecast of
the thirty, known only afterwards; the third best stands beside it.
"""

import numpy
import torch

from weightsmith.claims import Claim
from weightsmith.inspect.evaluation import forecast_pool

CLAIM = Claim(
    key="alzheimers-disease-prediction-longitudinal",
    statement="the median of thirty forecasts, five of them broken, errs no more than the best of the thirty",
    method="error, median",
    baseline="error, best",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Mean absolute errors, and the median's rank among the thirty."""
    said, truth = pool(seed)
    found = forecast_pool(said, truth, samples=200)
    errors = dict(zip(found["forecaster"], found["error"], strict=True))
    single = sorted(error for name, error in errors.items() if not name.startswith("consensus"))
    return {
        "error, median": errors["consensus: median"],
        "error, best": single[0],
        "error, third": single[2],
        "error, mean": errors["consensus: mean"],
        "error, trimmed": errors["consensus: trimmed"],
        "rank of the median": 1.0 + sum(error < errors["consensus: median"] for error in single),
        "rank of the mean": 1.0 + sum(error < errors["consensus: mean"] for error in single),
    }


def pool(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forecasts ``[30, 142]`` and what came."""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Ridge
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.tree import DecisionTreeRegressor

    x, y = load_diabetes(return_X_y=True)
    generator = numpy.random.default_rng(seed)
    order = generator.permutation(len(y))
    train, test = order[:300], order[300:]
    rows = []
    for index in range(25):
        columns = generator.choice(10, 6, replace=False)
        seen = generator.choice(train, 200)
        model = [Ridge(0.1), DecisionTreeRegressor(max_depth=4, random_state=index), KNeighborsRegressor(8)][index % 3]
        rows.append(model.fit(x[seen][:, columns], y[seen]).predict(x[test][:, columns]))
    for _ in range(5):
        rows.append(generator.choice(y, len(test)) * generator.uniform(1, 5))
    return torch.tensor(numpy.array(rows)), torch.tensor(y[test])
