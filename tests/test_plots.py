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

PICTURES = {
    "vqvae_loss": lambda path: plots.vqvae_loss(path, HISTORY, "note"),
    "ssim": lambda path: plots.ssim(path, HISTORY),
    "codebook": lambda path: plots.codebook(path, HISTORY, 16),
    "prior_loss": lambda path: plots.prior_loss(path, HISTORY[:1], 16),
    "reconstructions": lambda path: plots.reconstructions(path, IMAGES, IMAGES[::-1], POSITIONS),
    "codes": lambda path: plots.codes(
        path, IMAGES, RNG.integers(0, 16, (6, 2, 2)), RNG.normal(size=(16, 4)), POSITIONS
    ),
    "samples": lambda path: plots.samples(path, IMAGES, POSITIONS),
    "one sample": lambda path: plots.samples(path, IMAGES[:1], POSITIONS[:1]),
    "samples_by_position": lambda path: plots.samples_by_position(
        path, IMAGES[:3], IMAGES.reshape(3, 2, 16, 16, 1), POSITIONS[:3]
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_drawn_whole(tmp_path, name):
    path = tmp_path / "images" / "picture.png"
    PICTURES[name](path)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as picture:
        assert min(picture.size) > 150
        assert np.asarray(picture.convert("L")).std() > 5


def test_like_codes_have_like_colours():
    embeddings = np.array([[0.0, 0], [0.1, 0], [10, 0], [10.1, 0]])
    colours = plots._code_colours(embeddings)
    assert colours.shape == (4, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    assert np.linalg.norm(colours[0] - colours[1]) < np.linalg.norm(colours[0] - colours[3])
