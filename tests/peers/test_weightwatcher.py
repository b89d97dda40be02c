"""The tail of a spectrum is the one that powerlaw and weightwatcher find."""

from __future__ import annotations

import warnings

import pytest
import torch

from weightsmith.inspect import power_law, spectra


@pytest.mark.parametrize("seed", range(3))
def test_the_same_law_as_powerlaw(seed):
    peer = pytest.importorskip("powerlaw", reason="powerlaw is not installed")
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(60, 90, generator=generator, dtype=torch.float64) * torch.rand(60, 1, generator=generator) ** 2
    values = torch.linalg.svdvals(matrix).square()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = peer.Fit(values.numpy(), verbose=False)
    found = power_law(values)
    assert found.least == pytest.approx(float(fit.xmin))
    assert found.exponent == pytest.approx(float(fit.power_law.alpha), rel=1e-6)


def test_the_same_exponents_as_weightwatcher():
    peer = pytest.importorskip("weightwatcher", reason="weightwatcher is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(120, 100), torch.nn.Linear(100, 80))
        with torch.no_grad():
            for layer in model:  # heavier tails than noise has
                layer.weight.mul_(torch.rand(len(layer.weight), 1) ** 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        details = peer.WeightWatcher(model=model).analyze()
    found = {row["tensor"]: row for row in spectra(model).table}
    for name, row in zip(("0.weight", "1.weight"), details.to_dict("records"), strict=True):
        assert found[name]["alpha"] == pytest.approx(row["alpha"], rel=1e-3)
        assert found[name]["stable rank"] == pytest.approx(row["stable_rank"], rel=1e-3)
