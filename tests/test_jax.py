"""What TensorFlow has saved gives the same numbers on JAX; test_devices.py runs the driver there."""

from pathlib import Path

import keras
import numpy as np
import pytest

import checkpoint
import model
import sampling
from tests import test_devices

pytest.importorskip("jax", reason="JAX is not installed: see requirements-jax.txt")
POSITIONS = np.arange(3, dtype=np.int32)


def answers(folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the saved models make of images (3, 32, 32, 1), and new codes drawn from the priors."""
    vqvae, *priors = (keras.saving.load_model(folder / f"{name}.keras") for name in ("vqvae", "top", "bottom"))
    codes = vqvae.encode(images)
    top = sampling.draw(priors[0], POSITIONS, seed=0)
    arrays = {
        "reconstructions": vqvae(images),
        "top codes": codes[0],
        "bottom codes": codes[1],
        "top logits": priors[0]((codes[0], POSITIONS)),
        "bottom logits": priors[1]((codes[1], POSITIONS, codes[0])),
        "drawn top": top,
        "drawn bottom": sampling.draw(priors[1], POSITIONS, seed=1, coarse=top),
    }
    return {name: keras.ops.convert_to_numpy(array) for name, array in arrays.items()}


def stirred(network: keras.Model) -> keras.Model:
    """With weights that are all at work; some layers begin at zero."""
    random = np.random.default_rng(0)
    network.set_weights([w + 0.1 * random.normal(size=w.shape).astype(w.dtype) for w in network.get_weights()])
    return network


def test_what_tensorflow_has_saved_gives_the_same_numbers_on_jax(tmp_path):
    networks = {
        "vqvae": model.VQVAE(32, (4, 8), channels=8, num_embeddings=16, embedding_dim=4),
        "top": model.PixelCNN(16, (4, 4), filters=8, num_blocks=2),
        "bottom": model.PixelCNN(16, (8, 8), filters=8, num_blocks=3, coarse_grid_size=(4, 4)),
    }
    for name, network in networks.items():
        checkpoint.save_model(stirred(network), tmp_path / f"{name}.keras")
    images = np.random.default_rng(1).random((3, 32, 32, 1), np.float32)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np; from pathlib import Path; from tests import test_jax; folder = Path(sys.argv[1]);"
        "np.savez(folder / 'jax.npz', **test_jax.answers(folder, np.load(folder / 'images.npy')))"
    )
    test_devices.printed(test_devices.start(code, tmp_path, **test_devices.ON_JAX))
    on_tensorflow = answers(tmp_path, images)
    with np.load(tmp_path / "jax.npz") as there:
        for name, expected in on_tensorflow.items():
            np.testing.assert_allclose(there[name], expected, atol=1e-4, err_msg=name)
