"""Every number in metrics.json."""

import math
from collections.abc import Iterable

import numpy as np
from skimage.metrics import structural_similarity

BRAIN = 0.05  # a pixel brighter than this in the original belongs to the brain


def ssim_map(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Structural similarity at each pixel of two (H, W) images in [0, 1] (Wang et al. 2004): (H, W).

    Gaussian window of sigma 1.5, data range 1, population covariance, by scikit-image.
    """
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return structural_similarity(original, reconstruction, full=True, **wang)[1]


def reconstruction_metrics(originals: Iterable[np.ndarray], reconstructions: Iterable[np.ndarray]) -> dict[str, float]:
    """How near reconstructions are to their originals, as means over slices.

    Args:
        originals, reconstructions: (H, W, 1) float32 images, as many of one as of the other; clipped to [0, 1].

    Returns:
        ssim: over the whole slice, without the 5 pixels at the edges (scikit-image's mean).
        ssim_brain: mean of the SSIM map over the brain, where the original is above 0.05; slices without
            brain are left out. Seven tenths of a slice are black and flatter `ssim`.
        psnr_db: peak signal-to-noise ratio with peak 1, in dB; the mean squared error is taken as at least
            1e-10, so that identical images count 100 dB.
    """
    whole, brain, psnr = [], [], []
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        original, reconstruction = (np.clip(image[..., 0], 0, 1) for image in (original, reconstruction))
        similarity = ssim_map(original, reconstruction)
        whole.append(similarity[5:-5, 5:-5].mean())
        if (original > BRAIN).any():
            brain.append(similarity[original > BRAIN].mean())
        squared_error = np.mean(np.square(original - reconstruction, dtype=np.float64))
        psnr.append(-10 * math.log10(max(squared_error, 1e-10)))
    return {
        "ssim": float(np.mean(whole)),
        "ssim_brain": float(np.mean(brain)) if brain else math.nan,
        "psnr_db": float(np.mean(psnr)),
    }


def code_metrics(codes: np.ndarray, num_embeddings: int) -> dict[str, float]:
    """How a set of code indices (N, h, w) uses the codebook.

    Returns:
        codes_used: share of the codes that occur at all.
        perplexity: exp of the entropy of a code on its own; at most `num_embeddings`.
    """
    counts = np.bincount(codes.ravel(), minlength=num_embeddings)
    share = counts[counts > 0] / counts.sum()
    return {
        "codes_used": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(-np.sum(share * np.log(share)))),
    }


def prior_metrics(nats_per_code: float, codes_per_image: int) -> dict[str, float]:
    """The prior's cross-entropy, in nats and bits a code and in bits an image."""
    bits = nats_per_code / math.log(2)
    return {
        "prior_nats_per_code": nats_per_code,
        "prior_bits_per_code": bits,
        "prior_bits_per_image": bits * codes_per_image,
    }
