"""The naive Bayes head against scikit-learn's, whose variances are of each class until they are made one."""

from __future__ import annotations

import numpy
import pytest
import torch

from weightsmith.inspect.theory import logistic_head, naive_bayes_head

pytest.importorskip("sklearn", reason="parity with scikit-learn")


def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    keep = images.std(axis=0) > 1
    return images[:, keep], labels


def test_posterior_of_gaussian_naive_bayes():
    from sklearn.naive_bayes import GaussianNB

    images, labels = digits()
    peer = GaussianNB(var_smoothing=0).fit(images, labels)
    shares = numpy.bincount(labels) / len(labels)
    peer.var_[:] = (shares[:, None] * peer.var_).sum(axis=0)
    head = naive_bayes_head(torch.tensor(images), torch.tensor(labels), smoothing=0.0)
    found = head(torch.tensor(images)).softmax(dim=1).detach().numpy()
    assert numpy.allclose(found, peer.predict_proba(images), atol=1e-8)


def test_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    images, labels = digits()
    images = (images - images.mean(0)) / images.std(0)
    decay = 0.01
    peer = LogisticRegression(C=1 / (decay * len(labels)), tol=1e-8, max_iter=2000).fit(images, labels)
    head = logistic_head(torch.tensor(images), torch.tensor(labels), decay=decay)
    assert numpy.allclose(head.weight.detach().numpy(), peer.coef_, atol=1e-3)
