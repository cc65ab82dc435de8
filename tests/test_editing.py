"""Completing slices: what is kept stays, what is hidden is not used, and the choice among candidates is right."""

import itertools

import numpy as np
import pytest

import editing
import sampling
from generator import Generator
from tests import test_generator

SIZE = 32


@pytest.fixture(scope="module", params=[(4,), (4, 8)], ids=["one level", "two levels"])
def made(request) -> Generator:
    return test_generator.make(request.param)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random((SIZE, SIZE, 1), np.float32)


@pytest.mark.parametrize("name", editing.HALVES)
def test_halves_are_halves_and_only_the_upper_one_comes_first(made, name):
    kept = editing.half(name, SIZE)
    assert kept.mean() == 0.5
    assert editing.is_exact(made, kept) == (name == "top" and len(made.priors) == 1)
    assert [level.mean() for level in editing.kept_cells(made, kept)] == [0.5] * len(made.priors)


def test_a_code_is_kept_if_all_of_its_pixels_are(made):
    kept = np.ones((SIZE, SIZE), bool)
    kept[9, 3] = False
    for level, cells in enumerate(editing.kept_cells(made, kept)):
        side = SIZE // made.vqvae.grids[level]
        assert np.argwhere(~cells).tolist() == [[9 // side, 3 // side]]
    assert not editing.is_exact(made, kept)
    assert editing.is_exact(made, np.zeros((SIZE, SIZE), bool))


@pytest.mark.parametrize("name", ["left", "right", "top"])
def test_kept_pixels_stay_and_the_others_are_drawn_several_times(made, image, name):
    kept = editing.half(name, SIZE)
    images = editing.complete(made, image, kept, position=1, count=3, seed=1)
    assert images.shape == (3, SIZE, SIZE, 1)
    assert np.array_equal(images[:, kept], np.repeat(image[None, kept], 3, axis=0))
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(images, editing.complete(made, image, kept, position=1, count=3, seed=1))


@pytest.mark.parametrize("name", [*editing.HALVES, "middle", "all"])
def test_what_is_hidden_is_not_used(made, image, name):
    kept = editing.half(name, SIZE) if name in editing.HALVES else np.zeros((SIZE, SIZE), bool)
    if name == "middle":  # On both sides of the midline.
        kept[:8] = kept[24:] = True
    changed = np.where(kept[..., None], image, 1 - image)
    one, other = (editing.complete(made, shown, kept, position=1, seed=1) for shown in (image, changed))
    assert np.array_equal(one, other)


def test_kept_codes_stay(made, image):
    codes, kept = made.encode(image[None]), editing.half("bottom", SIZE)
    completed = editing.complete_codes(made, codes, kept, position=2, count=2)
    for own, new, cells in zip(codes, completed, editing.kept_cells(made, kept), strict=True):
        assert np.array_equal(new[:, cells], np.repeat(own[:, cells], 2, axis=0))
    assert not all(np.array_equal(own, new[:1]) for own, new in zip(codes, completed, strict=True))


def test_completions_approach_the_distribution_given_later_codes(monkeypatch):
    """On a grid of two codes, the first one given the second is compared with Bayes' rule."""
    joint = np.array([[0.05, 0.45], [0.30, 0.20]])  # p(first, second)
    expected = joint[:, 1] / joint[:, 1].sum()

    class Pair:
        """A generator of grids of 1 × 2 codes with this distribution."""

        candidates = 1

        def propose_codes(self, positions, seed, temperature, top_k, top_p, purpose, known):
            first = np.random.default_rng(seed).random(len(positions)) < joint[1].sum()
            return [np.where(known[0] >= 0, known[0], first[:, None, None])]

        def log_weights(self, codes, positions):
            return np.zeros(len(positions))

        def nats_of_codes(self, codes, positions):
            marginal, conditional = joint.sum(axis=1), joint / joint.sum(axis=1, keepdims=True)
            first, second = codes[0][:, 0, 0], codes[0][:, 0, 1]
            return [-np.log(np.stack([marginal[first], conditional[first, second]], axis=-1))[:, None]]

    monkeypatch.setattr(editing, "kept_cells", lambda generator, kept: [np.array([[False, True]])])
    monkeypatch.setattr(editing, "NUM_CANDIDATES", 50)
    (completed,) = editing.complete_codes(Pair(), [np.array([[[0, 1]]])], np.zeros((1, 2), bool), 0, count=4000)
    assert set(completed[:, 0, 1]) == {1}
    assert completed[:, 0, 0].mean() == pytest.approx(expected[1], abs=0.04)


def test_completions_that_begin_with_kept_codes_are_not_chosen_among_candidates(image, monkeypatch):
    made, counts = test_generator.make((4,)), []
    sample = sampling.sample_codes

    def record(prior, conditioning, *arguments, **options):
        counts.append(len(conditioning["positions"]))
        return sample(prior, conditioning, *arguments, **options)

    monkeypatch.setattr(sampling, "sample_codes", record)
    for name in ("top", "bottom"):
        editing.complete(made, image, editing.half(name, SIZE), position=0, count=2)
    # A draft fills the hidden half first.
    assert counts == [1, 2, editing.NUM_CANDIDATES, 2 * editing.NUM_CANDIDATES]


def test_a_walk_leads_from_one_slice_to_the_other(made, image):
    codes = made.encode(np.stack([image, image[::-1]]))
    first, second = ([level[i : i + 1] for level in codes] for i in (0, 1))
    images = made.walk(first, second, steps=5, seed=3)
    ends = [made.draw(end, 3)[0] for end in (first, second)]
    np.testing.assert_allclose(images[[0, -1]], ends, atol=1e-5)
    lengths = [np.abs(after - before).mean() for before, after in itertools.pairwise(images)]
    assert min(lengths) > 0
    assert max(lengths) < np.abs(ends[1] - ends[0]).mean()


def test_the_selector_chooses_completions(image):
    made, kept = test_generator.make((4,)), editing.half("top", SIZE)
    selecting = made.replace(selector=test_generator.FewZeros(), num_candidates=6)
    codes = made.encode(image[None])
    plain, chosen = (
        editing.complete_codes(own, codes, kept, position=1, count=20, seed=2)[0] for own in (made, selecting)
    )
    assert np.array_equal(chosen[:, :2], plain[:, :2])
    assert (chosen == 0).sum() < (plain == 0).sum()


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_common_random_numbers_give_the_same_slice_at_the_same_position(made, num_candidates):
    made = made.replace(selector=test_generator.FewZeros(), num_candidates=num_candidates)
    codes = made.sample_codes([1, 1, 2], seed=4, is_common=True)
    images = made.draw(codes, seed=4, is_common=True)
    assert np.array_equal(images[0], images[1])
