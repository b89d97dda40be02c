"""Names that the examples in docstrings use without importing them."""

import pytest
import torch

import weightsmith


@pytest.fixture(autouse=True)
def _names_for_examples(doctest_namespace):
    doctest_namespace["torch"] = torch
    doctest_namespace["ws"] = weightsmith
    doctest_namespace["Weights"] = weightsmith.Weights
