"""What generate.py writes, and what it refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import console
import generate
import phantom
import saving
import sharp
from generator import Generator
from selector import Selector
from tests import test_generator


@pytest.fixture(scope="module")
def made() -> Generator:
    """Small networks with a sharp decoder."""
    small = test_generator.make((4,))
    return small.replace(decoder=test_generator.sharp_decoder(small.vqvae))


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """Runs generate.py with some options on the small networks; returns the output folder."""

    def run(**options) -> Path:
        generate.main(generate.Options(tmp_path / "run", tmp_path / "output", **options))
        return tmp_path / "output"

    monkeypatch.setattr(Generator, "load", lambda folder: made)
    return run


@pytest.fixture
def slices(tmp_path) -> Path:
    folder = tmp_path / "slices" / "inner"
    folder.mkdir(parents=True)
    for position in (0, 1, 7):
        Image.fromarray(phantom.slice_image(0, 1, 8 + position, 40)).save(folder / f"case_001_slice_{position}.png")
    return folder.parent


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_samples_are_drawn_at_the_positions_in_turn(run, made):
    folder = run(num_samples=3, positions=(2, 0), seed=5, temperature=0.7)
    table = rows(folder / "samples.csv")
    assert [row["file"] for row in table] == [f"sample_{i}_slice_{p}.png" for i, p in enumerate((2, 0, 2))]
    expected = made.sample([2, 0, 2], seed=5, temperature=0.7)
    for image, row in zip(expected, table, strict=True):
        assert np.array_equal(pixels(folder / row["file"]), (image[..., 0] * 255).round())
    bits = made.bits_of_codes(made.sample_codes([2, 0, 2], seed=5, temperature=0.7), [2, 0, 2])
    np.testing.assert_allclose([float(row["bits"]) for row in table], bits, atol=0.06)


def test_the_selector_chooses_among_as_many_grids_as_asked_for(run, made, monkeypatch):
    selecting = made.replace(selector=test_generator.FewZeros(), num_candidates=2)
    monkeypatch.setattr(Generator, "load", lambda folder: selecting)
    folder = run(num_samples=1, positions=(1,), num_candidates=5)
    expected = selecting.replace(num_candidates=5).sample([1])[0, ..., 0]
    assert np.array_equal(pixels(folder / "sample_0_slice_1.png"), (expected * 255).round())
    assert not np.array_equal(expected, selecting.sample([1])[0, ..., 0])


def test_the_sharp_decoder_can_be_left_out(run, made):
    folder = run(num_samples=1, positions=(1,), sharp=False)
    expected = made.replace(decoder=None).sample([1])[0, ..., 0]
    assert np.array_equal(pixels(folder / "sample_0_slice_1.png"), (expected * 255).round())
    assert not np.array_equal(expected, made.sample([1])[0, ..., 0])


def test_completions_share_a_half_with_the_slice(run, slices):
    folder = run(complete=slices / "inner" / "case_001_slice_1.png", keep="right", num_samples=2)
    original, *completions = (pixels(folder / f"{n}.png") for n in ("original", "completion_000", "completion_001"))
    assert original.shape == (32, 32)
    for completion in completions:
        assert np.array_equal(completion[:, 16:], original[:, 16:])
    assert not np.array_equal(*completions)


def test_reconstructions_come_with_their_quality_and_bits(run, made, slices):
    folder = run(reconstruct=slices)
    table = rows(folder / "reconstructions.csv")
    assert [row["file"] for row in table] == [f"inner/case_001_slice_{position}.png" for position in (0, 1, 7)]
    for kind in ("faithful", "sharp"):
        assert all(-1 <= float(row[f"{kind}_ssim"]) < 1 for row in table)
        assert all(pixels(folder / kind / row["file"]).shape == (32, 32) for row in table)
    bits = [float(row["bits"]) for row in table]
    originals = np.stack([np.asarray(Image.open(path).resize((32, 32), 3)) for path in sorted(slices.rglob("*.png"))])
    expected = [*made.bits(originals[:2], [0, 1]), *made.bits(originals[2:])]  # Position 7 does not occur.
    np.testing.assert_allclose(bits, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "--num-samples 0: must be at least 1"),
        ({"num_candidates": 0}, "--num-candidates 0: must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be a positive number"),
        ({"top_p": 1.5}, "--top-p 1.5: must be above 0 and at most 1"),
        ({"positions": (9,)}, "--positions 9: no training slice has this position; choose from 0 to 2"),
        ({"complete": Path("nowhere.png")}, "--complete nowhere.png: no such file; give a PNG of a slice"),
        (
            {"complete": Path(__file__), "positions": (1, 2)},
            r"--positions \(1, 2\): must be a single one with --complete",
        ),
        ({"reconstruct": Path("nowhere")}, "--reconstruct nowhere: no such file or folder"),
        ({"complete": Path(__file__), "reconstruct": Path("b")}, "--complete and --reconstruct: give one of them only"),
        ({"export": Path("brains")}, "--export brains: must end in .onnx"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(run, tmp_path, options, message):
    with pytest.raises(console.UserError, match=message):
        run(**options)
    assert not (tmp_path / "output").exists()
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("option", ["output", "compact", "export"])
def test_nothing_is_written_to_the_run_folder(tmp_path, option):
    inside = tmp_path / "inner" / "brains.onnx"
    with pytest.raises(generate.GenerateError, match=f"--{option} .*: is in the run folder, which is only read"):
        generate.main(generate.Options(tmp_path, **{option: inside}))
    assert not list(tmp_path.iterdir())


def test_a_slice_to_complete_needs_a_position_that_occurs(run, slices):
    with pytest.raises(generate.GenerateError, match="give --positions, from 0 to 2"):
        run(complete=slices / "inner" / "case_001_slice_7.png")
    run(complete=slices / "inner" / "case_001_slice_7.png", positions=(2,), num_samples=1)


@pytest.mark.parametrize(("grids", "is_sharp"), [((4,), False), ((4, 8), True)])
def test_exported_networks_compute_the_same(tmp_path, monkeypatch, grids, is_sharp):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    generator = test_generator.make(grids)
    if is_sharp:
        decoder = test_generator.sharp_decoder(generator.vqvae)
        generator = generator.replace(decoder=decoder)
    monkeypatch.setattr(Generator, "load", lambda folder: generator)
    generate.main(generate.Options(tmp_path / "run", export=tmp_path / "brains.onnx"))
    encoder, decoder = (runtime.InferenceSession(path) for path in generate.exported_files(tmp_path / "brains.onnx"))
    random = np.random.default_rng(0)
    images, noise = random.random((3, 32, 32, 1), np.float32), random.normal(size=(3, 32, 32, 1)).astype(np.float32)
    codes = encoder.run(None, {"images": images})
    assert all(np.array_equal(a, b) for a, b in zip(codes, generator.encode(images), strict=True))
    inputs = {f"codes_{level}": indices for level, indices in enumerate(codes)}
    inputs |= {"noise": noise} if is_sharp else {}
    expected = generator.decoder(inputs) if is_sharp else generator.decode(codes)
    np.testing.assert_allclose(decoder.run(None, inputs)[0], expected, atol=1e-4)
    with pytest.raises(generate.GenerateError, match="exists already"):
        generate.main(generate.Options(tmp_path / "run", export=tmp_path / "brains.onnx"))


def test_rounded_weights_differ_by_less_than_half_a_percent():
    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    rounded = generate.rounded(weights)
    np.testing.assert_allclose(rounded, weights, rtol=0.5**generate.MANTISSA_BITS / 2 * 1.01)
    assert len(np.unique(rounded.view(np.uint32) & 0xFFFF)) == 1
    assert np.array_equal(generate.rounded(np.arange(3)), np.arange(3))


@pytest.mark.parametrize("grids", [(4,), (4, 8)])
def test_a_compact_copy_is_read_like_the_run(tmp_path, grids):
    folder = tmp_path / "run"
    selector = test_generator.with_random_weights(Selector(16, grids, embedding_dim=4, filters=8))
    test_generator.write_run(folder, test_generator.make(grids).replace(selector=selector, num_candidates=2))
    (folder / "test_slices.csv").write_text("subject,position,nats\nsomebody,3,70.5\n")
    generate.main(generate.Options(folder, compact=tmp_path / "small"))
    original, copy = Generator.load(folder), Generator.load(tmp_path / "small")
    codes = original.sample_codes([0, 1, 2])
    both = [generator.log_weights(codes, [0, 1, 2]) for generator in (copy, original)]
    np.testing.assert_allclose(*both, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(copy.decode(codes), original.decode(codes), atol=0.1)
    assert [prior.settings for prior in copy.priors] == [prior.settings for prior in original.priors]
    assert (tmp_path / "small" / "test_slices.csv").read_text() == "position,nats\n3,70.5\n"
    for path in folder.glob("*.keras"):
        assert (tmp_path / "small" / path.name).stat().st_size < 0.8 * path.stat().st_size
    assert "slices of mine" not in (tmp_path / "small" / "config.json").read_text()


def test_a_compact_copy_stores_what_both_decoders_share_once(tmp_path):
    generator = test_generator.make((4,))
    decoder = test_generator.sharp_decoder(generator.vqvae)
    decoder.copy_decoders(generator.vqvae)
    test_generator.write_run(tmp_path / "run", generator.replace(decoder=decoder))
    generate.main(generate.Options(tmp_path / "run", compact=tmp_path / "small"))
    stored = saving.load_model(tmp_path / "small" / "decoder.keras", sharp.SharpDecoder)
    assert not any(weights.any() for part in stored.decoders for weights in part.get_weights())
    original, copy = Generator.load(tmp_path / "run"), Generator.load(tmp_path / "small")
    codes = original.sample_codes([0, 1, 2])
    np.testing.assert_allclose(copy.draw(codes, seed=1), original.draw(codes, seed=1), atol=0.1)


def test_a_compact_copy_can_do_without_the_sharp_decoder(tmp_path):
    generator = test_generator.make((4,))
    decoder = test_generator.sharp_decoder(generator.vqvae)
    test_generator.write_run(tmp_path / "run", generator.replace(decoder=decoder))
    generate.main(generate.Options(tmp_path / "run", compact=tmp_path / "small", sharp=False))
    assert Generator.load(tmp_path / "small").decoder is None


def test_broken_slices_are_refused_or_left_out(run, slices, tmp_path):
    (slices / "inner" / "broken_slice_0.png").write_bytes(b"no PNG")
    with pytest.raises(console.UserError, match=r"broken_slice_0.png: is not a PNG image"):
        run(reconstruct=slices)
    assert not (tmp_path / "output").exists()
    assert len(rows(run(reconstruct=slices, skip_broken_slices=True) / "reconstructions.csv")) == 3


def test_a_folder_with_files_is_not_written_to(run, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("mine")
    with pytest.raises(generate.GenerateError, match="contains files already"):
        run(num_samples=1)
    assert (tmp_path / "output" / "mine.txt").read_text() == "mine"


def test_a_folder_without_a_run_ends_with_one_line(tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr("sys.argv", ["generate.py", str(empty), "--output", str(tmp_path / "output")])
    assert generate.command_line() == 2
    printed = capsys.readouterr().err
    assert "contains no run" in printed
    assert printed.count("\n") == 1
