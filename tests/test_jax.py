"""On JAX: what TensorFlow has saved gives the same numbers, and the driver runs from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import checkpoint
import model
import phantom
import sampling
from benchmarks import kill

pytest.importorskip("jax", reason="JAX is not installed: see requirements-jax.txt")
ROOT = Path(model.__file__).parent
POSITIONS = np.arange(3, dtype=np.int32)


def on_jax(arguments: list) -> subprocess.CompletedProcess:
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


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
    ended = on_jax(["-c", code, tmp_path])
    assert ended.returncode == 0, ended.stderr
    on_tensorflow = answers(tmp_path, images)
    with np.load(tmp_path / "jax.npz") as there:
        for name, expected in on_tensorflow.items():
            np.testing.assert_allclose(there[name], expected, atol=1e-4, err_msg=name)


def test_the_driver_runs_from_end_to_end_on_jax(tmp_path):
    phantom.write_pngs(tmp_path / "slices", num_cases=6, num_positions=4, image_size=32)
    arguments = [kill.DRIVER, "--data-dir", tmp_path / "slices", "--run-dir", tmp_path / "run", *kill.CONSTANTS]
    arguments += ["--vqvae-epochs", "1", "--prior-epochs", "1"]
    ended = on_jax(arguments)
    assert ended.returncode == 0, ended.stderr
    numbers = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(numbers["ssim"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["versions"]["backend"] == "jax"
    assert (tmp_path / "run" / "report.html").exists()
