"""The trained networks as one object, on TensorFlow and on JAX."""

import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import augmentation
import dataset
import generator
import model
import saving
import sharp
from generator import Generator
from run import Run, RunError, project_version
from selector import Selector
from tests import test_devices

POSITIONS = np.arange(3, dtype=np.int32)


def with_random_weights(network: keras.Model) -> keras.Model:
    """Set weights that are all in use; some layers start from zero."""
    random = np.random.default_rng(0)
    network.set_weights([w + 0.1 * random.normal(size=w.shape).astype(w.dtype) for w in network.get_weights()])
    return network


def sharp_decoder(vqvae: model.VQVAE) -> sharp.SharpDecoder:
    """A small sharp decoder with random weights."""
    scales = np.full(sharp.patch_side(vqvae.image_size) ** 2, 0.1)
    return with_random_weights(sharp.SharpDecoder.untrained(vqvae, detail_channels=8, detail_scales=scales))


def make(grids: tuple[int, ...], **settings: Any) -> Generator:
    """Networks with one level of codes; or with two, a code for background, and attention."""
    background = {"background_threshold": 0.05} if len(grids) > 1 else {}
    settings = {"channels": 8, "num_embeddings": 16, "embedding_dim": 4, **background, **settings}
    vqvae = with_random_weights(model.VQVAE(32, grids, **settings))
    for quantizer in vqvae.quantizers if background else []:
        quantizer.embeddings.assign(np.concatenate([np.zeros((1, 4)), quantizer.embeddings[1:]]))
    priors = [
        model.PixelCNN(16, (grid, grid), filters=8, num_blocks=3, coarse_grid_size=coarse, attention=len(grids) - 1)
        for grid, coarse in zip(grids, [None, *[(grid, grid) for grid in grids]], strict=False)
    ]
    return Generator(vqvae, [with_random_weights(prior) for prior in priors], [0, 1, 2], 2)


@pytest.fixture(scope="module", params=[(4,), (4, 8)], ids=["one level", "two levels"])
def made(request) -> Generator:
    return make(request.param)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Noise with a black margin at the left."""
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 1)).astype(np.uint8)
    images[:, :, :8] = 0
    return images


def test_images_become_codes_and_codes_become_images(made, images):
    codes, grids = made.encode(images), made.vqvae.grids
    assert [(level.shape, level.dtype) for level in codes] == [((3, grid, grid), np.int32) for grid in grids]
    reconstructions = made.reconstruct(images)
    assert np.array_equal(reconstructions, made.decode(codes))
    assert reconstructions.shape == (3, 32, 32, 1)
    assert reconstructions.dtype == np.float32
    assert 0 <= reconstructions.min() <= reconstructions.max() <= 1
    if len(grids) > 1:
        assert not reconstructions[:, :, :8].any()


def test_images_may_be_floats_or_lack_the_channel(made, images):
    for same in (images / np.float32(255), images[..., 0]):
        assert all(np.array_equal(a, b) for a, b in zip(made.encode(same), made.encode(images), strict=True))


def test_images_of_another_size_are_refused(made):
    with pytest.raises(ValueError, match=r"must be \(N, 32, 32, 1\)"):
        made.encode(np.zeros((1, 16, 16, 1), np.uint8))


def test_images_are_augmented_before_they_are_encoded(made, images):
    drawn = {name: values.numpy() for name, values in augmentation.draw(3, seed=1, step=2).items()}
    changed = np.asarray(augmentation.apply(dataset.to_float(images), drawn))
    augmented, expected, clean = made.encode(images, drawn), made.encode(changed), made.encode(images)
    for level, codes in enumerate(augmented):
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, expected[level])
    assert not all(np.array_equal(a, b) for a, b in zip(augmented, clean, strict=True))


def test_samples_are_determined_by_the_seed(made):
    images = made.sample([0, 1, 2], seed=1)
    assert images.shape == (3, 32, 32, 1)
    assert np.array_equal(images, made.sample([0, 1, 2], seed=1))
    assert not np.array_equal(made.sample_codes([0, 1, 2], seed=1)[0], made.sample_codes([0, 1, 2], seed=2)[0])


def uniforms_of(made: Generator, monkeypatch, **settings) -> list[np.ndarray]:
    """The random numbers, (12, h · w) per level, that a set of samples is drawn with."""
    drawn = []

    def record(prior, conditioning, uniforms, *arguments, **options):
        drawn.append(uniforms)
        return np.zeros((12, *prior.grid_size), np.int32)

    with monkeypatch.context() as patch:
        patch.setattr(generator.sampling, "sample_codes", record)
        made.sample_codes([0, 1, 2] * 4, **settings)
    return drawn


def test_seeds_purposes_levels_and_the_run_have_independent_random_numbers(made, monkeypatch):
    streams = [*uniforms_of(made, monkeypatch), *uniforms_of(made, monkeypatch, purpose="test samples")]
    streams += [*uniforms_of(made, monkeypatch, seed=1), np.random.default_rng(0).random((12, 16), np.float32)]
    streams += [np.random.default_rng([0, 1]).random((12, 64), np.float32)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            size = min(one.size, other.size)
            assert abs(np.corrcoef(one.ravel()[:size], other.ravel()[:size])[0, 1]) < 0.35


def test_samples_for_different_purposes_differ(made):
    codes = [made.sample_codes([0, 1, 2], purpose=purpose) for purpose in ("samples", "test samples")]
    assert not any(np.array_equal(a, b) for a, b in zip(*codes, strict=True))
    images = made.sample([0, 1, 2], purpose="test samples")
    assert np.array_equal(images, made.decode(codes[1]))


def test_likely_codes_at_a_low_temperature(made):
    likely, varied = (made.sample_codes([1] * 8, temperature=temperature) for temperature in (0.1, 10))
    nats = [sum(level.mean() for level in made.nats_per_code(codes, [1] * 8)) for codes in (likely, varied)]
    assert nats[0] < nats[1]


def test_the_cross_entropy_is_that_of_the_whole_grid(made, images):
    codes = made.encode(images)
    for level, nats in enumerate(made.nats_per_code(codes, POSITIONS)):
        inputs = {"codes": codes[level], "positions": POSITIONS, **({"coarse": codes[level - 1]} if level else {})}
        logits = keras.ops.convert_to_numpy(made.priors[level](inputs))
        log_probabilities = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        chosen = np.take_along_axis(log_probabilities, codes[level][..., None], axis=-1)
        np.testing.assert_allclose(nats, -chosen.mean(axis=(1, 2, 3)), rtol=1e-4)


def test_bits_add_up_over_levels_and_average_over_unknown_positions(made, images):
    codes = made.encode(images)
    expected = sum(
        codes[level][0].size * nats / math.log(2) for level, nats in enumerate(made.nats_per_code(codes, POSITIONS))
    )
    np.testing.assert_allclose(made.bits(images, POSITIONS), expected, rtol=1e-5)
    each = np.stack([made.bits(images, [position] * 3) for position in (0, 1, 2)])
    np.testing.assert_allclose(made.bits(images), -np.log2(np.mean(2.0**-each, axis=0)), rtol=1e-5)


def test_surprise_adds_up_the_deviations_from_what_the_priors_expect(made, images):
    codes, excess, variance = made.encode(images), np.zeros(3), np.zeros(3)
    for level, indices in enumerate(codes):
        inputs = {"codes": indices, "positions": POSITIONS, **({"coarse": codes[level - 1]} if level else {})}
        logits = keras.ops.convert_to_numpy(made.priors[level](inputs)).astype(np.float64)
        nats = np.logaddexp.reduce(logits, axis=-1, keepdims=True) - logits
        own = np.take_along_axis(nats, indices[..., None], axis=-1)[..., 0]
        expected = np.sum(np.exp(-nats) * nats, axis=-1)
        excess += np.sum(own - expected, axis=(1, 2))
        variance += np.sum(np.exp(-nats) * (nats - expected[..., None]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(made.surprise(codes, POSITIONS), excess / np.sqrt(variance), rtol=1e-3, atol=1e-3)


def test_codes_of_the_prior_itself_have_surprise_0_and_shuffled_ones_more():
    own, positions = make((4,)), np.resize(POSITIONS, 300)
    kernel = own.priors[0].logits.kernel
    kernel.assign(8 * kernel)  # Codes depend on their neighbours more than in an untrained network.
    own.batch_size = 100
    codes = own.sample_codes(positions, seed=1)
    surprise = own.surprise(codes, positions)
    assert surprise.shape == (300,)
    assert abs(surprise.mean()) < 0.2
    assert surprise.var() == pytest.approx(1, abs=0.3)
    shuffled = [
        np.random.default_rng(0).permuted(level.reshape(300, -1), axis=1).reshape(level.shape) for level in codes
    ]
    assert own.surprise(shuffled, positions).mean() > 1


# --------------------------------------------------------------------------------------------------- selector


class FewZeros:
    """A selector that prefers grids with few codes 0, by default so much that it leaves nothing to chance."""

    def __init__(self, scale: float = 1e6) -> None:
        self.scale = np.float32(scale)

    def log_weights(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        levels = [inputs[name] for name in inputs if name.startswith("codes")]
        return -self.scale * sum((level == 0).mean(axis=(1, 2)) for level in levels)


def test_the_selector_chooses_among_the_proposals_for_each_position(made):
    chosen = made.replace(selector=FewZeros(), num_candidates=4).sample_codes([0, 2], seed=5)
    proposed = made.propose_codes([0] * 4 + [2] * 4, seed=5)
    zeros = sum((level == 0).mean(axis=(1, 2)) for level in proposed).reshape(2, 4)
    best = np.arange(2) * 4 + zeros.argmin(axis=1)
    assert all(np.array_equal(own, level[best]) for own, level in zip(chosen, proposed, strict=True))


def test_without_a_choice_samples_are_the_proposals(made):
    proposed = made.propose_codes(POSITIONS, seed=5)
    for same in (made, made.replace(selector=FewZeros()), made.replace(num_candidates=4)):
        sampled = same.sample_codes(POSITIONS, seed=5)
        assert all(np.array_equal(a, b) for a, b in zip(sampled, proposed, strict=True))


def test_chosen_samples_do_not_depend_on_those_that_follow(made):
    own = made.replace(selector=FewZeros(10), num_candidates=3)
    few, many = (own.sample_codes(POSITIONS[:count], seed=2) for count in (2, 3))
    assert all(np.array_equal(a, b[:2]) for a, b in zip(few, many, strict=True))


def test_a_compiled_copy_draws_with_the_networks_that_replace_its_own(images):
    own, other = make((4,)), make((4,), channels=16)
    codes, replaced = own.encode(images), {"vqvae": other.vqvae}
    drawn = own.compiled().replace(**replaced).draw(codes)
    np.testing.assert_array_equal(drawn, own.replace(**replaced).draw(codes))
    assert not np.allclose(drawn, own.draw(codes))


def test_proposals_depend_on_the_augmentation(made):
    parameters = np.zeros((3, augmentation.NUM_PARAMETERS), np.float32)
    plain, same, other = (
        made.propose_codes(POSITIONS, seed=1, augmentation=condition)[0]
        for condition in (None, parameters, parameters + 1)
    )
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, other)


def test_bits_saved_by_the_selector_are_few_and_need_one(made, images):
    codes = made.encode(images)
    assert not made.selector_bits(codes, POSITIONS).any()
    saved = made.replace(selector=FewZeros(), num_candidates=4).selector_bits(codes, POSITIONS)
    assert saved.shape == (3,)
    assert saved.max() <= 2 + 1e-6


# ------------------------------------------------------------------------------------------------ run folders


def save(folder: Path, made: Generator) -> None:
    networks = {"vqvae": made.vqvae, **dict(zip(model.prior_names(len(made.vqvae.grids)), made.priors, strict=True))}
    networks |= {"selector": made.selector, "decoder": made.decoder}
    for name, network in networks.items():
        if network:
            saving.save_model(network, folder / f"{name}.keras")


def write_run(folder: Path, made: Generator) -> None:
    """Write what `Generator.load` reads of a finished run."""
    selecting = {"selector_epochs": 1, "num_candidates": made.num_candidates} if made.selector else {}
    drawing = {"decoder_epochs": 1, "sharp_samples": True} if made.decoder else {}
    new = Run(folder, {"data_dir": "slices of mine", **selecting, **drawing}, {"project": project_version()})
    with new.start("data", slice_positions=[0, 1, 2], crop=192):
        save(folder, made)


def test_a_finished_run_is_loaded(made, images, tmp_path):
    write_run(tmp_path, made)
    loaded = Generator.load(str(tmp_path))
    assert (loaded.positions.tolist(), loaded.crop) == ([0, 1, 2], 192)
    assert loaded.level_names == made.level_names
    np.testing.assert_allclose(loaded.reconstruct(images), made.reconstruct(images), atol=1e-5)
    np.testing.assert_allclose(loaded.bits(images), made.bits(images), rtol=1e-4)


def test_the_selector_of_a_run_is_loaded(made, images, tmp_path):
    network = with_random_weights(Selector(16, made.vqvae.grids, embedding_dim=4, filters=8))
    own = made.replace(selector=network, num_candidates=3)
    write_run(tmp_path, own)
    loaded, codes = Generator.load(tmp_path), own.encode(images)
    assert (own.networks, loaded.networks, loaded.candidates) == (["selector"], ["selector"], 3)
    np.testing.assert_allclose(loaded.log_weights(codes, POSITIONS), own.log_weights(codes, POSITIONS), atol=1e-5)


def test_folders_without_a_finished_run_are_named(made, tmp_path):
    with pytest.raises(RunError, match=f"{tmp_path / 'nothing'}: contains no run"):
        Generator.load(tmp_path / "nothing")
    new = Run(tmp_path, {"data_dir": None}, {"project": project_version()})
    with new.start("data", slice_positions=[0, 1, 2], crop=192):
        saving.save_model(made.vqvae, tmp_path / "vqvae.keras")
    with pytest.raises(RunError, match=r"prior\.keras: no such file; finish the run first"):
        Generator.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "crop"}))
    with pytest.raises(RunError, match="contains no run"):
        Generator.load(tmp_path)
    config["versions"]["project"] = "0.4.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"a run of version 0\.4\.0"):
        Generator.load(tmp_path)


def test_samples_are_made_once_and_saved(made, tmp_path, monkeypatch):
    run, positions = Run(tmp_path, {"data_dir": None}, {"project": "1.0.0"}), np.array([0, 2], np.int32)

    def samples() -> generator.Samples:
        return generator.make_samples(run, "codes", made, positions, {"seed": 1}, ["slices"])

    with run.start("data"):
        first = samples()
        monkeypatch.setattr(made, "sample_codes", lambda *given, **options: pytest.fail("they are there already"))
        second = samples()
        run.make(first.files, ["slices"], first.save)
    assert np.array_equal(first.images, second.images)
    assert len(second) == 2
    names = {path.name for path in (tmp_path / "samples").glob("*.png")}
    assert names == {"sample_000_slice_0.png", "sample_001_slice_2.png"}
    assert all((tmp_path / file).exists() for file in generator.code_files("codes", len(made.level_names)))


# ------------------------------------------------------------------------------------------------------- JAX


def answers(folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the saved networks compute, with the backend of this process."""
    names = ("vqvae", "top_prior", "bottom_prior")
    vqvae, *priors = (keras.saving.load_model(folder / f"{name}.keras") for name in names)
    loaded = Generator(vqvae, priors, POSITIONS)
    codes, sampled = loaded.encode(images), loaded.sample_codes(POSITIONS)
    inputs = {"codes": codes[0], "positions": POSITIONS}
    logits = [priors[0](inputs), priors[1]({"codes": codes[1], "positions": POSITIONS, "coarse": codes[0]})]
    arrays = {"reconstructions": loaded.reconstruct(images), "samples": loaded.sample(POSITIONS)}
    arrays |= {"top codes": codes[0], "bottom codes": codes[1], "sampled top": sampled[0], "sampled bottom": sampled[1]}
    arrays |= {"top logits": logits[0], "bottom logits": logits[1], "bits": loaded.bits(images) / 100}
    return {name: keras.ops.convert_to_numpy(array) for name, array in arrays.items()}


def test_networks_saved_on_tensorflow_compute_the_same_on_jax(tmp_path, images):
    pytest.importorskip("jax", reason="JAX is not installed: see requirements-jax.txt")
    save(tmp_path, make((4, 8)))
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np; from pathlib import Path; from tests import test_generator;"
        "folder = Path(sys.argv[1]);"
        "np.savez(folder / 'jax.npz', **test_generator.answers(folder, np.load(folder / 'images.npy')))"
    )
    test_devices.printed(test_devices.start(code, tmp_path, **test_devices.ON_JAX))
    on_tensorflow = answers(tmp_path, images)
    with np.load(tmp_path / "jax.npz") as on_jax:
        for name, expected in on_tensorflow.items():
            np.testing.assert_allclose(on_jax[name], expected, atol=1e-4, err_msg=name)


def test_without_a_sharp_decoder_the_vqvae_draws(made, images):
    codes = made.encode(images)
    assert np.array_equal(made.draw(codes), made.decode(codes))


def test_what_is_drawn_depends_on_seed_and_purpose_and_not_on_the_batch_size(made, images):
    decoder = sharp_decoder(made.vqvae)
    large, small = (Generator(made.vqvae, made.priors, POSITIONS, size, decoder=decoder) for size in (3, 1))
    codes = made.encode(images)
    drawn = large.draw(codes, 1)
    np.testing.assert_allclose(drawn, small.draw(codes, 1), atol=1e-4)
    assert np.array_equal(drawn, large.draw(codes, 1))
    for other in (large.draw(codes, 2), large.draw(codes, 1, "other"), large.decode(codes)):
        assert np.abs(drawn - other).max() > 1e-3
    sampled = large.sample(POSITIONS, 3)
    assert np.array_equal(sampled, large.draw(large.sample_codes(POSITIONS, 3), 3))
