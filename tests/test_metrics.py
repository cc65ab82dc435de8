import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics
import phantom

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def brains() -> np.ndarray:
    return np.stack([phantom.slice_image(0, case, 8)[..., None] / np.float32(255) for case in range(4)])


@pytest.fixture(scope="module")
def noisy(brains) -> np.ndarray:
    return np.clip(brains + RNG.normal(0, 0.05, brains.shape), 0, 1).astype(np.float32)


def test_numbers_are_scikit_images(brains, noisy):
    found = metrics.reconstruction_metrics(brains, noisy)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = [(x[..., 0], y[..., 0]) for x, y in zip(brains, noisy, strict=True)]
    assert found["ssim"] == pytest.approx(np.mean([structural_similarity(x, y, **wang) for x, y in pairs]), abs=1e-5)
    psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in pairs])
    assert found["psnr_db"] == pytest.approx(psnr, abs=1e-3)


def test_brain_ssim_looks_at_the_brain_only(brains):
    dimmed = brains * 0.9  # the black background stays perfect
    found = metrics.reconstruction_metrics(brains, dimmed)
    assert found["ssim_brain"] < found["ssim"]
    speckled = np.where(brains > metrics.BRAIN, brains, 0.04).astype(np.float32)
    found = metrics.reconstruction_metrics(np.where(brains > metrics.BRAIN, brains, 0), speckled)
    assert found["ssim_brain"] > found["ssim"]


def test_perfect_reconstructions(brains):
    found = metrics.reconstruction_metrics(brains, brains)
    assert found == {"ssim": pytest.approx(1), "ssim_brain": pytest.approx(1), "psnr_db": pytest.approx(100)}


def test_images_are_clipped_first(brains):
    found = metrics.reconstruction_metrics(brains, np.where(brains == 0, -5, brains).astype(np.float32))
    assert found["ssim"] == pytest.approx(1)


def test_slices_without_brain_are_left_out_of_brain_ssim(brains, noisy):
    black = np.zeros_like(brains[:1])
    with_black = metrics.reconstruction_metrics(np.concatenate([brains, black]), np.concatenate([noisy, black]))
    assert with_black["ssim_brain"] == metrics.reconstruction_metrics(brains, noisy)["ssim_brain"]
    assert math.isnan(metrics.reconstruction_metrics(black, black)["ssim_brain"])


def test_codes_used_and_perplexity():
    codes = np.array([[[0, 0], [1, 1]], [[2, 2], [3, 3]]])
    assert metrics.code_metrics(codes, 8) == {"codes_used": 0.5, "perplexity": pytest.approx(4)}
    assert metrics.code_metrics(np.zeros((1, 2, 2), int), 8) == {"codes_used": 0.125, "perplexity": pytest.approx(1)}


def test_nats_and_bits():
    assert metrics.prior_metrics(math.log(512), 144) == {
        "prior_nats_per_code": pytest.approx(6.238, abs=1e-3),
        "prior_bits_per_code": pytest.approx(9),
        "prior_bits_per_image": pytest.approx(9 * 144),
    }
