from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import pictures
import plots
from dataset import Slices
from generator import Results, Samples
from tests.randomness import RNG

_RANDOM = np.random.default_rng(0)
IMAGES = _RANDOM.random((6, 16, 16, 1))
POSITIONS = np.arange(6)
CURVES = ("loss", "reconstruction", "codebook", "commitment", "ssim", "codes_used", "perplexity")
LEVELS = ("top", "bottom")
HISTORY = [
    {
        "epoch": epoch,
        **{f"{level}{name}": 1 / epoch for level in ("", "top_", "bottom_") for name in CURVES},
        **{f"val_{level}{name}": 1.1 / epoch for level in ("", "top_", "bottom_") for name in CURVES},
    }
    for epoch in (1, 2, 3)
]
CODES = [_RANDOM.integers(0, 9, (6, 2, 2)), _RANDOM.integers(0, 16, (6, 4, 4))]
EMBEDDINGS = [_RANDOM.normal(size=(16, 4)), _RANDOM.normal(size=(16, 4))]
RATES = [
    {"name": f"grid{grid}", "prior_bits_per_image": 6 * grid, "ssim_brain": 0.8, "c2st_reconstructions": c2st}
    | {"ms_ssim_of_pairs": 0.8, "ms_ssim_of_reconstructed_pairs": 0.75}
    for grid, c2st in ((6, 0.6), (12, None))
]

DRAWINGS = {
    "VQ-VAE loss of one level": lambda path: plots.vqvae_loss(path, HISTORY, ("",), "note"),
    "prior loss of one epoch": lambda path: plots.prior_loss(path, {"prior": HISTORY[:1]}, 16),
    "one reconstruction": lambda path: plots.reconstructions(path, IMAGES[:1], IMAGES[1:2], ["a"], "", "title"),
    "one sample": lambda path: plots.samples(path, IMAGES[:1], POSITIONS[:1]),
    "one code map": lambda path: plots.codes(path, IMAGES, CODES[:1], EMBEDDINGS[:1], ("",), list("abcdef")),
    "one codebook": lambda path: plots.codebook(path, CODES[:1], IMAGES, 16),
    "rate_distortion": lambda path: plots.rate_distortion(path, RATES),
}


def assert_is_picture(path):
    with Image.open(path) as picture:
        assert min(picture.size) > 150
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_functions_write_a_png(tmp_path, name):
    path = tmp_path / "picture.png"
    DRAWINGS[name](path)
    assert_is_picture(path)


def test_similar_codes_have_similar_colours():
    embeddings = np.array([[0.0, 0], [0.1, 0], [10, 0], [10.1, 0]])
    colours = plots._code_colours(embeddings)
    assert colours.shape == (4, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    assert np.linalg.norm(colours[0] - colours[1]) < np.linalg.norm(colours[0] - colours[3])


def test_codebook_tiles_show_the_decoded_pixels_at_the_occurrences_of_a_code(tmp_path, monkeypatch):
    indices = np.array([[[0, 1], [1, 1]]])  # Code 1 occurs three times and comes first.
    images = np.zeros((1, 16, 16, 1))
    images[0, :8, :8] = 0.25
    shown = []
    monkeypatch.setattr(
        plots, "_save", lambda figure, path: shown.append(np.asarray(figure.axes[0].images[0].get_array()))
    )
    plots.codebook(tmp_path / "x.png", [indices], images, 4)
    sheet = shown[0]
    middle = slice(6, 10)
    assert sheet[middle, middle] == pytest.approx(0)  # Code 1.
    size = 16 + 2
    assert sheet[middle, size + 6 : size + 10] == pytest.approx(0.25)  # Code 0.


# ------------------------------------------------------------------------------------------- the registry


class StubQuantizer:
    num_embeddings = 16

    def __init__(self, embeddings):
        self.embeddings = embeddings.astype(np.float32)

    def lookup(self, indices):
        return self.embeddings[indices]


class StubVQVAE:
    """A decoder that shows the mean of the vectors of all levels."""

    def __init__(self, num_levels):
        self.quantizers = [StubQuantizer(vectors) for vectors in EMBEDDINGS[:num_levels]]

    def decode(self, quantized):
        images = []
        for vectors in quantized:
            cell = 16 // vectors.shape[1]
            images.append(np.abs(vectors.mean(axis=-1, keepdims=True)).repeat(cell, 1).repeat(cell, 2))
        return np.clip(np.mean(images, axis=0), 0, 1).astype(np.float32)


class StubGenerator:
    num_embeddings = 16
    background_code = False

    def __init__(self, num_levels):
        self.vqvae = StubVQVAE(num_levels)
        self.level_names = ("",) if num_levels == 1 else LEVELS
        self.sampled = []

    def decode(self, codes):
        return RNG.random((len(codes[0]), 16, 16, 1), np.float32)

    def draw(self, codes, seed, purpose):
        return self.decode(codes)

    def sample(self, positions, seed=0, temperature=1.0, top_k=0, top_p=1.0, purpose="samples"):
        self.sampled.append((np.asarray(positions).tolist(), seed, temperature, top_k, top_p, purpose))
        return np.random.default_rng(seed).random((len(positions), 16, 16, 1), np.float32)


def make_results(num_levels: int, is_sharp: bool = False, note: str = "") -> Results:
    images = RNG.integers(0, 256, (6, 16, 16, 1)).astype(np.uint8)
    slices = Slices(images, POSITIONS, np.repeat(["a", "b", "c"], 2))
    codes = CODES[2 - num_levels :] if num_levels == 1 else CODES
    decoded = RNG.random((6, 16, 16, 1), np.float32)
    quality = {"ssim": 0.9, "ms_ssim": 0.9, "psnr_db": 20}
    stages = ("vqvae", "prior") if num_levels == 1 else ("vqvae", "top_prior", "bottom_prior")
    stages += ("selector", *(["decoder"] if is_sharp else []))
    numbers = {
        "worst_slices": [
            {"index": 3, "subject": "b", "position": 3, "ssim_brain": 0.5},
            {"index": 1, "subject": "a", "position": 1, "ssim_brain": None},
        ],
        "by_position": [{"position": p, **quality, "ssim_brain": None if p else 0.8} for p in range(3)],
        "half_power_frequency": 0.3,
        "samples": {"nearest_to_training": [{"index": 2, "train_index": 5, "distance": 0.1}]},
    }
    samples = Samples(255 - images, codes, POSITIONS)
    return Results(
        generator=StubGenerator(num_levels),
        slices=dict.fromkeys(("train", "validate", "test"), slices),
        codes=dict.fromkeys(("train", "validate", "test"), codes),
        reconstructions=dict.fromkeys(("validate", "test"), decoded),
        critic=None,
        samples=samples,
        compared=dict.fromkeys(("train", "validate", "test"), POSITIONS),
        compared_samples=dict.fromkeys(("train", "validate", "test"), samples),
        sampling={"seed": 7, "temperature": 0.9, "top_k": 3, "top_p": 0.8},
        history=[{"stage": stage, **row} for stage in stages for row in HISTORY],
        numbers=numbers,
        sharp_reconstructions=decoded if is_sharp else None,
        note=note,
    )


def test_pictures_have_unique_names_and_a_caption():
    names = [picture.name for picture in pictures.PICTURES]
    assert len(set(names)) == len(names)
    assert all(picture.caption.strip().endswith(".") for picture in pictures.PICTURES)


def test_levels_and_networks_are_only_shown_if_there_are_any():
    def names(*run) -> set[str]:
        return {picture.name for picture in pictures.of_run(*run)}

    assert names(2, ()) - names(1, ()) == {"levels"}
    assert names(1, ["decoder"]) - names(1, ()) == {"sharp_reconstructions", "invented_detail", "decoder_loss"}
    assert names(1, ["selector"]) - names(1, ()) == {"selector_loss"}
    assert names(2, ["selector", "decoder"]) == {picture.name for picture in pictures.PICTURES}


@pytest.mark.parametrize(("num_levels", "is_sharp"), [(1, True), (2, False)])
def test_every_picture_is_drawn_with_the_note(tmp_path, monkeypatch, num_levels, is_sharp):
    notes, make_figure = [], plots._figure

    def figure(width, height, title, note):
        notes.append(note)
        return make_figure(width, height, title, note)

    monkeypatch.setattr(plots, "_figure", figure)
    shown = pictures.of_run(num_levels, ["selector", *(["decoder"] if is_sharp else [])])
    results = make_results(num_levels, is_sharp, "SYNTHETIC slices")
    for picture in shown:
        path = tmp_path / f"{picture.name}.png"
        picture.draw(path, results)
        assert_is_picture(path)
    assert notes == ["SYNTHETIC slices"] * len(shown)


def test_samples_by_position_use_the_sampling_options(tmp_path):
    results = make_results(1)
    picture = next(picture for picture in pictures.PICTURES if picture.name == "samples_by_position")
    picture.draw(tmp_path / "x.png", results)
    (sampled,) = results.generator.sampled
    assert sampled[:-1] == (np.repeat(POSITIONS, 4).tolist(), 7, 0.9, 3, 0.8)
    assert sampled[-1] != "samples"  # Otherwise the picture would show the samples in samples/ again.


@pytest.mark.parametrize("is_sharp", [True, False])
def test_the_blind_test_has_as_many_of_each_kind_and_no_slice_twice(monkeypatch, is_sharp):
    results, each = make_results(1, is_sharp), 2
    monkeypatch.setattr(pictures, "NUM_BLIND", each * (4 if is_sharp else 3))
    images, key = pictures.blind_test(results)
    assert [row["number"] for row in key] == list(range(1, len(images) + 1))
    kinds = [row["kind"] for row in key]
    assert {kinds.count(kind) for kind in kinds} == {each}
    shown = [row["position"] for row in key if row["kind"] != "generated"]  # Each position has one test slice.
    assert len(set(shown)) == len(shown) == len(kinds) - each
    test = results.slices["test"]
    for image, row in zip(images, key, strict=True):
        is_real = np.array_equal(image, test.images[row["position"]] / np.float32(255))
        assert is_real == (row["kind"] == "real")
        assert (row["subject"] == "") == (row["kind"] == "generated")
    again, same = pictures.blind_test(results)
    assert np.array_equal(again, images)
    assert same == key


def test_nearest_training_slices_are_those_of_the_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "comparison", lambda path, *arguments: drawn.append(arguments))
    results = make_results(1)
    picture = next(picture for picture in pictures.PICTURES if picture.name == "nearest_training_slices")
    picture.draw(tmp_path / "x.png", results)
    sets, labels, *_ = drawn[0]
    images, nearest = sets.values()
    assert np.array_equal(images, results.compared_samples["test"].images[[2]] / np.float32(255))
    assert np.array_equal(nearest, results.slices["train"].images[[5]] / np.float32(255))
    assert labels == ["slice 2, RMSE 0.100"]


@pytest.mark.parametrize("background_code", [False, True])
def test_single_level_is_decoded_with_the_mean_vector_of_the_other(background_code):
    generator = SimpleNamespace(vqvae=StubVQVAE(2), background_code=background_code)
    images = pictures._decode_single_level(generator, CODES, 0, np.array([1, 4]))
    top, bottom = EMBEDDINGS
    mean = bottom[CODES[1]].mean(axis=(0, 1, 2)).astype(np.float32)
    expected = generator.vqvae.decode([top[CODES[0][[1, 4]]], np.broadcast_to(mean, (2, 4, 4, 4))])
    if background_code:
        side = expected.shape[1] // 4
        background = np.repeat(np.repeat(CODES[1][[1, 4]] == 0, side, axis=1), side, axis=2)
        expected = np.where(background[..., None], 0, expected)
        assert background.any()
    assert images == pytest.approx(expected, abs=1e-6)
