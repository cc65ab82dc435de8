import numpy as np
import pytest
from PIL import Image

import plots

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 16, 16, 1))
POSITIONS = np.arange(6)
CURVES = ("loss", "reconstruction", "codebook", "commitment", "ssim", "codes_used", "perplexity")
HISTORY = [
    {"epoch": epoch, **dict.fromkeys(CURVES, 1 / epoch), **{f"val_{name}": 1.1 / epoch for name in CURVES}}
    for epoch in (1, 2, 3)
]

LEVELS = ("top", "bottom")
LEVELS_HISTORY = [
    {**row, **{f"{at}{level}_{name}": 1.0 for at in ("", "val_") for level in LEVELS for name in CURVES}}
    for row in HISTORY
]
CODES = [RNG.integers(0, 9, (6, 2, 2)), RNG.integers(0, 16, (6, 4, 4))]
EMBEDDINGS = [RNG.normal(size=(16, 4)), RNG.normal(size=(16, 4))]

PICTURES = {
    "vqvae_loss": lambda path: plots.vqvae_loss(path, HISTORY, ("",), "note"),
    "vqvae_loss of two levels": lambda path: plots.vqvae_loss(path, LEVELS_HISTORY, LEVELS),
    "ssim": lambda path: plots.ssim(path, HISTORY),
    "code_usage": lambda path: plots.code_usage(path, HISTORY, ("",), 16),
    "code_usage of two levels": lambda path: plots.code_usage(path, LEVELS_HISTORY, LEVELS, 16),
    "codebook": lambda path: plots.codebook(path, CODES[:1], IMAGES, 16),
    "codebook of two levels": lambda path: plots.codebook(path, CODES, IMAGES, 16, LEVELS),
    "prior_loss": lambda path: plots.prior_loss(path, {"prior": HISTORY[:1]}, 16),
    "two priors": lambda path: plots.prior_loss(path, {"top_prior": HISTORY, "bottom_prior": HISTORY}, 16),
    "reconstructions": lambda path: plots.reconstructions(path, IMAGES, IMAGES[::-1], list("abcdef")),
    "one reconstruction": lambda path: plots.reconstructions(path, IMAGES[:1], IMAGES[1:2], ["a"], "", "title"),
    "by_position": lambda path: plots.by_position(
        path, [{"position": p, "ssim": 0.9, "ssim_brain": None, "ms_ssim": 0.9, "psnr_db": 20 + p} for p in (1, 2)]
    ),
    "power_spectrum": lambda path: plots.power_spectrum(path, {"real": np.ones(8), "new": np.ones(8) / 2}, 0.3),
    "rate_distortion": lambda path: plots.rate_distortion(
        path,
        [
            {
                "grid": g,
                "num_embeddings": k,
                "prior_bits_per_image": g * k,
                "ssim": 0.9,
                "ssim_brain": 0.8,
                "psnr_db": 9,
            }
            for g in (6, 12)
            for k in (64, 512)
        ],
    ),
    "copies": lambda path: plots.copies(path, IMAGES, IMAGES[::-1], list("abcdef")),
    "codes": lambda path: plots.codes(path, IMAGES, CODES[:1], EMBEDDINGS[:1], ("",), list("abcdef")),
    "codes of two levels": lambda path: plots.codes(path, IMAGES, CODES, EMBEDDINGS, LEVELS, list("abcdef")),
    "levels": lambda path: plots.levels(path, IMAGES, IMAGES, [IMAGES, IMAGES[::-1]], LEVELS, list("abcdef")),
    "samples": lambda path: plots.samples(path, IMAGES, POSITIONS),
    "one sample": lambda path: plots.samples(path, IMAGES[:1], POSITIONS[:1]),
    "samples_by_position": lambda path: plots.samples_by_position(
        path, IMAGES[:3], IMAGES.reshape(3, 2, 16, 16, 1), POSITIONS[:3]
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_drawn(tmp_path, name):
    path = tmp_path / "picture.png"
    PICTURES[name](path)
    with Image.open(path) as picture:
        assert min(picture.size) > 150
        assert np.asarray(picture.convert("L")).std() > 5


def test_like_codes_have_like_colours():
    embeddings = np.array([[0.0, 0], [0.1, 0], [10, 0], [10.1, 0]])
    colours = plots._code_colours(embeddings)
    assert colours.shape == (4, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    assert np.linalg.norm(colours[0] - colours[1]) < np.linalg.norm(colours[0] - colours[3])


def test_a_code_is_shown_as_what_is_decoded_where_it_stands(tmp_path, monkeypatch):
    indices = np.array([[[0, 1], [1, 1]]])  # code 1 three times, so it comes first
    images = np.zeros((1, 16, 16, 1))
    images[0, :8, :8] = 0.25
    shown = []
    monkeypatch.setattr(
        plots, "_save", lambda figure, path: shown.append(np.asarray(figure.axes[0].images[0].get_array()))
    )
    plots.codebook(tmp_path / "x.png", [indices], images, 4)
    sheet = shown[0]
    middle = slice(6, 10)
    assert sheet[middle, middle] == pytest.approx(0)  # code 1
    size = 16 + 2
    assert sheet[middle, size + 6 : size + 10] == pytest.approx(0.25)  # code 0
