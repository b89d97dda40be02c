"""Neurons beside snntorch's: without a leak it is the same when a spike is taken away, at once or a moment later."""

from __future__ import annotations

import pytest
import torch

from weightsmith.quantize.spiking import Neuron

snntorch = pytest.importorskip("snntorch", reason="spiking neurons")


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_the_same_spikes(reset: str):
    inputs = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.3
    words = {"soft": "subtract", "hard": "zero"}
    peer = snntorch.Leaky(beta=1.0, threshold=1.0, reset_mechanism=words[reset])
    potential, spikes = peer.init_leaky(), []
    for now in inputs:
        spike, potential = peer(now, potential)
        spikes.append(spike)
    found = Neuron(1.0, reset=reset, threshold=1.0)(inputs)  # type: ignore[arg-type]
    if reset == "soft":
        assert torch.equal(found, torch.stack(spikes))
    else:  # the peer loses what comes in while it is reset
        assert float(found.sum()) >= float(torch.stack(spikes).sum())
