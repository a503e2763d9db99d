"""Singular values of experts that are known."""

import pytest
import torch

from malora.analysis import Spectrum, spectra
from tests.malora.analysis.helpers import adapted


def test_orthonormal_experts_have_a_flat_spectrum():
    model = adapted("molora", r=4, lora_alpha=8)
    with torch.no_grad():
        for layer in model.base_model.malora_layers:
            A, B = layer.malora_A["default"], layer.malora_B["default"]
            A.copy_(torch.linalg.qr(torch.randn(A.shape[-1], 32)).Q.T.reshape(A.shape))
            B.copy_(B[:1].expand_as(B))  # eight equal experts, of rank 4 together
    for spectrum in spectra(model):
        assert len(spectrum.values) == 32
        if spectrum.projection == "A":
            assert spectrum.values == pytest.approx([1] * 32, rel=1e-5)
            assert spectrum.share_above(0.9) == 1 and spectrum.share_above(1.1) == 0
            assert spectrum.stable_rank == pytest.approx(32) and spectrum.effective_rank == pytest.approx(32)
        else:
            assert spectrum.share_above(1e-6) == 4 / 32 and spectrum.effective_rank <= 4


def test_a_spectrum_in_numbers():
    spectrum = Spectrum("m", "A", [2.0, 1.0, 1.0, 0.0])
    assert spectrum.stable_rank == 6 / 4
    assert spectrum.effective_rank == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: 1.5 bits
    assert spectrum.share_above(1.0) == 1 / 4
    zero = Spectrum("m", "B", [0.0, 0.0])
    assert zero.stable_rank is None and zero.effective_rank is None and zero.share_above(0) == 0


def test_a_shared_subspace_bounds_the_spectrum():
    for spectrum in spectra(adapted()):
        if spectrum.projection == "A":  # N·r = 96 rows of 64 coordinates, in 32 dimensions
            assert len(spectrum.values) == 64 and spectrum.share_above(1e-9) == 1 / 2
