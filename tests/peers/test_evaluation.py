"""The same figures as scipy, statsmodels, mlxtend, scikit-learn and error-parity."""

from __future__ import annotations

import numpy
import pytest
import torch

from weightsmith.inspect.evaluation import (
    adjusted,
    bootstrap,
    cochran_q,
    fair_thresholds,
    five_by_two,
    mcnemar,
    paired_t,
    permutation,
    platt,
    wilcoxon,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_tests_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for count in (8, 30, 120):
        a, b = normal(count), normal(count, seed=1) + 0.2
        theirs = stats.ttest_rel(a, b)
        ours = paired_t(a, b)
        assert (ours.statistic, ours.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
        theirs = stats.wilcoxon(a, b, method="exact" if count <= 50 else "approx", correction=False)
        ours = wilcoxon(a, b)
        assert (ours.statistic, ours.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
        rough = (a * 2).round()
        theirs = stats.wilcoxon(rough, (b * 2).round(), method="approx", correction=False)
        assert wilcoxon(rough, (b * 2).round()).p_value == pytest.approx(theirs.pvalue)
    a, b = normal(10), normal(10, seed=1) + 0.3
    theirs = stats.permutation_test(
        (a.numpy(), b.numpy()), lambda x, y: x.mean() - y.mean(), permutation_type="samples", n_resamples=numpy.inf
    )
    assert permutation(a, b).p_value == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
def test_intervals_against_scipy(method: str):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = normal(50).exp()
    ours = bootstrap(values, method=method, samples=20000)
    theirs = stats.bootstrap((values.numpy(),), numpy.mean, method=method, n_resamples=20000, rng=0)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=0.02)
    assert ours.error == pytest.approx(theirs.standard_error, rel=0.03)


def test_tables_against_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is not installed")
    from statsmodels.stats.multitest import multipletests

    right = normal(3, 60) > torch.tensor([[0.0], [-0.3], [-0.6]])
    a, b = right[0], right[1]
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    assert mcnemar(a, b).p_value == pytest.approx(tables.mcnemar(table, exact=True).pvalue)
    for method, correction in (("chi2", True), ("chi2 plain", False)):
        theirs = tables.mcnemar(table, exact=False, correction=correction)
        ours = mcnemar(a, b, method=method)
        assert (ours.statistic, ours.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
    theirs = tables.cochrans_q(right.T.numpy())
    ours = cochran_q(right)
    assert (ours.statistic, ours.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
    p_values = [0.04, 0.001, 0.3, 0.02, 0.02]
    for method in ("holm", "bonferroni"):
        assert adjusted(p_values, method) == pytest.approx(multipletests(p_values, method=method)[1].tolist())


def test_five_by_two_against_mlxtend():
    evaluate = pytest.importorskip("mlxtend.evaluate", reason="mlxtend is not installed")
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_iris(return_X_y=True)
    first, second = LogisticRegression(C=0.01, max_iter=500), DecisionTreeClassifier(max_depth=1, random_state=0)
    generator = numpy.random.RandomState(3)
    differences = []
    for _ in range(5):
        halves = train_test_split(x, y, test_size=0.5, random_state=generator.randint(low=0, high=32767))
        x0, x1, y0, y1 = halves
        row = [
            a.fit(xa, ya).score(xb, yb)
            for xa, ya, xb, yb in ((x0, y0, x1, y1), (x1, y1, x0, y0))
            for a in (first, second)
        ]
        differences.append([row[0] - row[1], row[2] - row[3]])
    theirs = evaluate.combined_ftest_5x2cv(first, second, x, y, random_seed=3)
    ours = five_by_two(differences)
    assert (ours.statistic, ours.p_value) == pytest.approx(theirs)
    theirs = evaluate.paired_ttest_5x2cv(first, second, x, y, random_seed=3)
    ours = five_by_two(differences, statistic="t")
    assert (ours.statistic, ours.p_value) == pytest.approx(theirs)


def test_platt_against_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed")
    scores = normal(200)
    came = (scores + normal(200, seed=1) > 0.3).long()
    theirs = calibration._SigmoidCalibration().fit(scores.numpy(), came.numpy())
    assert platt(scores, came) == pytest.approx((-theirs.a_, -theirs.b_), abs=1e-4)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.2])
def test_thresholds_against_error_parity(tolerance: float):
    parity = pytest.importorskip("error_parity", reason="error-parity is not installed")
    groups = (normal(1500) > 0.4).long()
    labels = (normal(1500, seed=1) > 0.5 * groups).long()
    scores = torch.sigmoid(labels + normal(1500, seed=2) * (1 + 0.5 * groups))
    theirs = parity.RelaxedThresholdOptimizer(
        predictor=lambda x: x[:, 0], constraint="equalized_odds", tolerance=tolerance, seed=0
    )
    theirs.fit(X=scores[:, None].numpy(), y=labels.numpy(), group=groups.numpy())
    ours = fair_thresholds(scores, labels, groups, tolerance=tolerance)
    assert 1 - ours.accuracy == pytest.approx(theirs.cost(), abs=2e-3)
    assert 1 - ours.accuracy <= theirs.cost() + 1e-9
