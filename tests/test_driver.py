"""One small run from end to end, what the run folder promises, and what bad input prints."""

import ast
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import comparison
import console
import controls
import dataset
import driver
import metrics
import options
import phantom
import pictures
import plots
import saving
import stages
import two_sample
from benchmarks import kill
from generator import Generator
from run import RunError

ROOT = Path(driver.__file__).parent


def tiny(root: Path, **constants) -> driver.Config:
    settings = {
        "data_dir": root / "slices",
        "run_dir": root / "run",
        "image_size": 32,
        "grids": (4,),
        "channels": 8,
        "residual_blocks": 0,
        "num_embeddings": 16,
        "embedding_dim": 4,
        "batch_size": 8,
        "vqvae_epochs": 2,
        "prior_filters": 8,
        "prior_blocks": 1,
        "prior_attention": 1,
        "prior_epochs": 2,
        "selector_epochs": 1,
        "num_candidates": 2,
        "decoder_epochs": 1,
        "decoder_channels": 8,
        "previews": 0,
        "num_samples": 3,
    }
    return driver.Config(**{**settings, **constants})


@pytest.fixture(scope="module", autouse=True)
def _fast_evaluation():
    """Pictures are small, and classifiers, which have too few slices to learn from, are trained for one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_sample, "CLASSIFIER_MAX_EPOCHS", 1)
        patch.setattr(plots, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> driver.Config:
    root = tmp_path_factory.mktemp("driver")
    phantom.write_pngs(root / "slices", num_subjects=6, num_positions=4, image_size=32)
    config = tiny(root)
    driver.main(config)
    return config


@pytest.fixture
def compared(finished, monkeypatch) -> None:
    """Comparisons have the numbers of the finished run, for tests of what is made again and not of what it contains."""
    numbers = json.loads((finished.run_dir / "metrics.json").read_text())
    names = ("compared_slices", "samples", "references", "controls", "failed_controls")
    monkeypatch.setattr(comparison, "compare", lambda *given: {name: numbers[name] for name in names})


@pytest.fixture
def eagerly() -> Iterator[None]:
    """TensorFlow builds no graphs, which takes longer than the few steps of training and sampling in these tests."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def picture_files(num_levels: int = 1, networks: Sequence[str] = ("selector", "decoder")) -> set[str]:
    return {f"{picture.name}.png" for picture in pictures.of_run(num_levels, networks)}


# ------------------------------------------------------------------------------------------ the run folder


def test_a_run_writes_every_file(finished):
    folder = finished.run_dir
    networks = {"vqvae.keras", "prior.keras", "selector.keras", "decoder.keras", "critic.keras"}
    names = {"config.json", "history.csv", "metrics.json", "test_slices.csv", "blind_test_key.csv", "report.html"}
    others = {"images", "samples", "logs", ".lock", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == networks | names | others
    assert {path.name for path in (folder / "images").iterdir()} == picture_files()
    assert len(list((folder / "samples").glob("sample_*_slice_*.png"))) == 3
    assert np.load(folder / "samples" / "codes.npy").shape == (3, 4, 4)
    assert list((folder / "logs").rglob("events*"))


def test_the_key_of_the_blind_test_is_in_a_file_and_in_the_report(finished):
    rows = list(csv.DictReader((finished.run_dir / "blind_test_key.csv").open(encoding="utf-8")))
    page = (finished.run_dir / "report.html").read_text(encoding="utf-8")
    assert {row["kind"] for row in rows} == {"real", "faithful reconstruction", "sharp reconstruction", "generated"}
    for row in rows:
        assert f"<td>{row['number']}</td><td>{row['kind']}</td><td>{row['position']}</td>" in page


def test_the_configuration_is_saved_with_versions(finished):
    saved = json.loads((finished.run_dir / "config.json").read_text())
    assert saved["constants"]["num_embeddings"] == 16
    assert set(saved["constants"]) == {f.name for f in dataclasses.fields(finished)} - set(options.RUNTIME_FIELDS)
    assert saved["versions"]["keras"] == keras.__version__
    assert saved["versions"]["devices"] == "1"
    assert saved["slice_positions"] == [0, 1, 2, 3]
    assert saved["crop"] == 0  # The brains fill the slices.


def test_the_history_has_a_row_per_epoch(finished):
    with open(finished.run_dir / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stages = [(row["stage"], row["epoch"]) for row in rows]
    epochs = {"vqvae": 2, "prior": 2, "selector": 1, "decoder": 1, "critic": 1}
    assert stages == [(stage, str(epoch + 1)) for stage, count in epochs.items() for epoch in range(count)]
    names = list(rows[0])
    assert names.index("reconstruction") < names.index("codebook") < names.index("commitment")
    assert all(float(rows[0][f"val_{name}"]) for name in ("loss", "reconstruction", "ssim", "perplexity"))
    assert all(float(rows[2][name]) for name in ("loss", "val_loss", "bits_per_code", "seconds", "learning_rate"))


def test_metrics_contain_every_number(finished):
    numbers = json.loads((finished.run_dir / "metrics.json").read_text(), parse_constant=pytest.fail)
    plain = {"ssim", "ssim_brain", "ms_ssim", "psnr_db", "mae", "codes_used", "perplexity", "prior_bits_per_code"}
    plain |= {"prior_nats_per_code", "bits_per_dimension", "prior_bits_per_dimension", "decoder_bits_per_dimension"}
    assert all(isinstance(numbers[name], int | float) for name in plain | {"half_power_frequency"})
    assert 0 < numbers["codes_used"] <= 1
    assert numbers["prior_bits_per_image"] == pytest.approx(16 * numbers["prior_bits_per_code"])
    assert numbers["prior_bits_per_dimension"] == pytest.approx(numbers["prior_bits_per_image"] / 32**2)
    assert numbers["test_slices"] == numbers["samples"]["count"] == 4
    assert numbers["frame_size"] == 32
    assert np.load(finished.run_dir / "samples" / "test_codes.npy").shape == (4, 4, 4)
    assert np.load(finished.run_dir / "samples" / "train_codes.npy").shape == (16, 4, 4)
    assert numbers["controls"].keys() == controls.DESCRIPTIONS.keys()


def test_the_report_shows_every_picture(finished):
    page = (finished.run_dir / "report.html").read_text()
    assert page.count("<figure>") == len(picture_files())


def test_samples_are_grey_pngs_of_the_image_size(finished):
    for path in (finished.run_dir / "samples").glob("*.png"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("L", (32, 32))


def test_a_finished_run_is_loaded_in_a_python_shell(finished):
    code = (
        "import sys; from generator import Generator; generator = Generator.load(sys.argv[1]);"
        "print(generator.sample([1, 3]).shape)"
    )
    loaded = subprocess.run([sys.executable, "-c", code, finished.run_dir], cwd=ROOT, capture_output=True, text=True)
    assert (loaded.stdout.strip(), loaded.stderr) == ("(2, 32, 32, 1)", "")


def test_a_loaded_run_draws_the_samples_that_the_run_saved(finished):
    generator = Generator.load(finished.run_dir, batch_size=finished.batch_size)
    slices = dataset.load(finished.data_dir, 32, 0)
    codes = generator.sample_codes(driver.sample_positions(finished, slices), seed=finished.seed)
    assert np.array_equal(codes[0], np.load(finished.run_dir / "samples" / "codes.npy"))


def test_a_complete_run_is_left_alone(finished, capsys):
    before = files(finished.run_dir)
    driver.main(finished)
    assert files(finished.run_dir) == before
    assert "is complete" in capsys.readouterr().out


@pytest.mark.usefixtures("compared")
def test_only_what_is_missing_or_damaged_is_made_again(finished, capsys):
    before, folder = files(finished.run_dir), finished.run_dir
    png = next((folder / "samples").glob("*.png"))
    png.write_bytes(png.read_bytes()[:-10])
    (folder / "images" / "codes.png").unlink()
    (folder / "metrics.json").write_text("{}")
    driver.main(finished)
    assert files(folder) == before
    printed = capsys.readouterr().out
    assert "images/codes.png, metrics.json, samples/" in printed
    assert "training vqvae" not in printed


def test_a_damaged_network_is_named(finished, monkeypatch, capsys):
    before = files(finished.run_dir)
    with open(finished.run_dir / "vqvae.keras", "ab") as file:
        file.write(b"x")
    monkeypatch.setattr(console, "stop_on_signals", lambda: None)
    monkeypatch.setattr(options, "parse", lambda *given: finished)
    assert driver.command_line() == 2
    error = capsys.readouterr().err
    assert f"{finished.run_dir / 'vqvae.keras'}: is damaged" in error
    assert error.count("\n") == 1
    (finished.run_dir / "vqvae.keras").write_bytes(before["vqvae.keras"])
    assert files(finished.run_dir) == before


def test_a_network_that_is_removed_is_trained_again_and_nothing_else_changes(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run")
    shutil.copytree(finished.run_dir, config.run_dir)
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.glob("*.keras")}
    (config.run_dir / "vqvae.keras").unlink()
    driver.main(config)
    assert kill.differences(finished.run_dir, config.run_dir) == []
    prior = config.run_dir / "prior.keras"
    assert prior.stat().st_mtime_ns == before[prior]


@pytest.mark.usefixtures("compared", "eagerly")
def test_another_network_invalidates_everything_made_from_it(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run")
    shutil.copytree(finished.run_dir, config.run_dir)
    (config.run_dir / "vqvae.keras").unlink()
    make_vqvae = stages.make_vqvae
    monkeypatch.setattr(
        stages, "make_vqvae", lambda config, variance: make_vqvae(dataclasses.replace(config, seed=1), variance)
    )
    driver.main(config)
    before, after = files(finished.run_dir), files(config.run_dir)
    assert {name for name in before.keys() - after.keys() if not name.startswith("logs")} == set()
    for name in ("prior.keras", "metrics.json", "images/reconstructions.png", "report.html"):
        assert before[name] != after[name]
    # Priors that are hardly trained may draw the same codes, so their content does not show that they are drawn again.
    times = [(folder / "samples" / "codes.npy").stat().st_mtime_ns for folder in (finished.run_dir, config.run_dir)]
    assert times[0] != times[1]
    names = [row["stage"] for row in csv.DictReader(after["history.csv"].decode().splitlines())]
    assert names == ["vqvae"] * 2 + ["prior"] * 2 + ["selector", "decoder", "critic"]


def test_a_finished_run_refuses_other_slices(finished, tmp_path):
    before = files(finished.run_dir)
    phantom.write_pngs(tmp_path / "slices", num_subjects=7, num_positions=4, image_size=32)
    with pytest.raises(RunError) as error:
        driver.main(dataclasses.replace(finished, data_dir=tmp_path / "slices"))
    assert f"data_dir is {tmp_path / 'slices'}: contains other slices" in str(error.value)
    assert str(finished.run_dir) in str(error.value)
    assert "choose another run_dir" in str(error.value)
    assert files(finished.run_dir) == before


def test_a_data_folder_may_be_moved(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run", data_dir=tmp_path / "moved")
    shutil.copytree(finished.run_dir, config.run_dir)
    shutil.copytree(finished.data_dir, config.data_dir)
    driver.main(config)
    assert json.loads((config.run_dir / "config.json").read_text())["constants"]["data_dir"] == str(config.data_dir)
    assert str(config.data_dir) in (config.run_dir / "report.html").read_text()
    changed = {"config.json", "manifest.json", "report.html"}
    assert set(kill.differences(finished.run_dir, config.run_dir)) == changed


@pytest.mark.usefixtures("eagerly")
def test_a_run_starts_from_the_networks_of_another(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "evaluate", lambda *given: {})
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(finished.run_dir / "vqvae.keras", weights)
    config = dataclasses.replace(
        finished, run_dir=tmp_path / "run", start_from=weights, vqvae_epochs=1, vqvae_learning_rate=1e-9
    )
    driver.main(config)
    assert "contains no prior.keras: this network is trained from scratch" in capsys.readouterr().out
    texts = [(folder / "history.csv").read_text() for folder in (finished.run_dir, config.run_dir)]
    rows = [list(csv.DictReader(text.splitlines())) for text in texts]
    best = min(float(row["val_reconstruction"]) for row in rows[0] if row["stage"] == "vqvae")
    assert float(rows[1][0]["val_reconstruction"]) == pytest.approx(best, rel=0.05)
    shutil.rmtree(weights)
    (config.run_dir / "prior.keras").unlink()
    driver.main(config)  # The folder is no longer needed.
    assert (config.run_dir / "prior.keras").exists()


def test_networks_of_another_architecture_are_refused_before_anything_is_written(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run", start_from=finished.run_dir, prior_filters=16)
    with pytest.raises(RunError) as error:
        driver.main(config)
    assert f"start_from is {finished.run_dir}: prior.keras has another architecture" in str(error.value)
    assert "filters is 8 there, 16 here" in str(error.value)
    config = dataclasses.replace(config, prior_filters=finished.prior_filters, prior_uses_position=False)
    with pytest.raises(RunError, match="use_position is True there, False here"):  # The shapes are the same.
        driver.main(config)
    assert not config.run_dir.exists()


def test_a_different_configuration_is_refused_and_nothing_is_lost(finished):
    before = files(finished.run_dir)
    with pytest.raises(RunError, match="num_embeddings was 16, is 32"):
        driver.main(dataclasses.replace(finished, num_embeddings=32))
    assert files(finished.run_dir) == before


@pytest.mark.usefixtures("compared")
def test_other_sampling_options_sample_again_without_training(finished, tmp_path):
    config, before = dataclasses.replace(finished, run_dir=tmp_path / "run"), files(finished.run_dir)
    shutil.copytree(finished.run_dir, config.run_dir)
    driver.main(dataclasses.replace(config, num_samples=2, sample_positions=(1, 3)))
    names = sorted(path.name for path in (config.run_dir / "samples").glob("*.png"))
    assert names == ["sample_000_slice_1.png", "sample_001_slice_3.png"]
    assert (config.run_dir / "vqvae.keras").read_bytes() == before["vqvae.keras"]
    driver.main(config)
    after = files(config.run_dir)
    assert after["samples/codes.npy"] == before["samples/codes.npy"]


def test_a_folder_with_other_files_is_not_written_to(finished, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="contains files that are not a run's"):
        driver.main(dataclasses.replace(finished, run_dir=tmp_path))
    assert os.listdir(tmp_path) == ["thesis.txt"]


# ------------------------------------------------------------------------------------------------- the steps


def test_another_seed_gives_other_weights_and_samples(finished):
    other = dataclasses.replace(finished, seed=1)
    one, two = (stages.make_vqvae(config, 0.1).get_weights() for config in (finished, other))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    generator = Generator.load(finished.run_dir)
    codes = [generator.sample_codes(range(4), **options.sampling_arguments(config))[0] for config in (finished, other)]
    assert not np.array_equal(*codes)


def test_saved_models_do_not_depend_on_what_was_made_before(finished, tmp_path):
    for make in (lambda: stages.make_vqvae(finished, 0.1), lambda: stages.make_prior(finished)):
        for name in ("one", "two"):
            saving.save_model(make(), tmp_path / f"{name}.keras")
        assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "two.keras").read_bytes()


def test_sample_positions_that_do_not_occur_are_refused_before_anything_is_written(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run", sample_positions=(1, 40))
    with pytest.raises(options.ConfigError, match="sample_positions has 40"):
        driver.main(config)
    assert not config.run_dir.exists()


def test_two_levels_of_cropped_slices_run_end_to_end(tmp_path, capsys):
    phantom.write_pngs(tmp_path / "slices", num_subjects=6, num_positions=4, image_size=48)
    config = tiny(tmp_path, crop=40, image_size=16, grids=(2, 4), bottom_prior_filters=4)
    numbers = driver.main(config)
    assert "using the central 40 × 40 pixels of each slice" in capsys.readouterr().out
    assert json.loads((config.run_dir / "config.json").read_text())["crop"] == 40
    assert numbers["frame_size"] == round(48 * 16 / 40)
    assert {path.name for path in (tmp_path / "run" / "images").iterdir()} == picture_files(2)
    assert "levels.png" in picture_files(2) - picture_files(1)
    for name in ("codes_used", "perplexity", "prior_bits_per_code"):
        assert numbers[name].keys() == {"top", "bottom"}
    each = [4 * numbers["prior_bits_per_code"]["top"], 16 * numbers["prior_bits_per_code"]["bottom"]]
    assert numbers["prior_bits_per_image"] == pytest.approx(sum(each))
    assert np.load(tmp_path / "run" / "samples" / "bottom_codes.npy").shape == (3, 4, 4)
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = {"vqvae": 2, "top_prior": 2, "bottom_prior": 2, "selector": 1, "decoder": 1}
    epochs |= {"top_critic": 1, "bottom_critic": 1}
    assert [row["stage"] for row in rows] == [stage for stage, count in epochs.items() for _ in range(count)]
    assert float(rows[0]["top_perplexity"]) > 0
    assert float(rows[0]["val_bottom_codes_used"]) > 0
    before = files(config.run_dir)
    driver.main(config)
    assert files(config.run_dir) == before


def test_mixed_precision_trains_and_saves_float32_models(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "evaluate", lambda config, run, results, made_from: metrics.measure(results)[0])
    config = dataclasses.replace(finished, run_dir=tmp_path / "run", precision="mixed_bfloat16")
    numbers = driver.main(config)
    exact = json.loads((finished.run_dir / "metrics.json").read_text())
    assert numbers["ssim"] == pytest.approx(exact["ssim"], abs=0.05)
    assert numbers["prior_bits_per_code"] == pytest.approx(exact["prior_bits_per_code"], rel=0.1)
    loaded = Generator.load(config.run_dir)
    assert loaded.vqvae.encoders[0].layers[0].compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.usefixtures("eagerly")
def test_synthetic_runs_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom, "NUM_POSITIONS", 4)
    notes, make_figure = [], plots._figure

    def figure(width, height, title, note):
        notes.append(note)
        return make_figure(width, height, title, note)

    monkeypatch.setattr(plots, "_figure", figure)
    driver.main(
        tiny(
            tmp_path,
            data_dir=None,
            synthetic_subjects=6,
            vqvae_epochs=1,
            prior_epochs=1,
            selector_epochs=0,
            decoder_epochs=0,
        )
    )
    assert "SYNTHETIC" in capsys.readouterr().out.splitlines()[0]
    assert len(notes) == len(picture_files(networks=()))
    assert all("SYNTHETIC" in note for note in notes)


# ---------------------------------------------------------------------------------------- the command line


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "driver.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})


def test_bad_input_ends_with_one_line_and_status_2(tmp_path):
    ended = command("--data-dir", tmp_path / "nowhere", "--run-dir", tmp_path / "run")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"error: {tmp_path / 'nowhere'}: no such folder; set data_dir" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_help_is_printed_on_a_console_that_is_not_utf_8():
    ended = command("--help", PYTHONIOENCODING="cp1252")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--vqvae-epochs" in ended.stdout


def test_slices_that_cannot_be_read_are_left_out_if_asked(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.data_dir, tmp_path / "slices")
    broken = next((tmp_path / "slices" / "keras_png_slices_test").iterdir())
    broken.write_bytes(b"")
    arguments = ["--data-dir", tmp_path / "slices", "--run-dir", tmp_path / "run", "--image-size", "32", "--grids", "4"]
    monkeypatch.setattr(console, "stop_on_signals", lambda: None)

    def ended(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["driver.py", *map(str, arguments)])
        return driver.command_line(), capsys.readouterr().err

    status, printed = ended(*arguments)
    assert status == 2
    assert f"{broken}: is empty" in printed
    assert "--skip-broken-slices" in printed
    assert not (tmp_path / "run").exists()

    def stop(config, run, slices):
        raise console.Stopped(signal.SIGINT)

    monkeypatch.setattr(driver, "train_vqvae", stop)
    status, printed = ended(*arguments, "--skip-broken-slices")
    assert status == 130
    assert f"{broken}: is empty" in printed
    assert "the same command continues after the last finished epoch or step" in printed


def command_of(config: driver.Config) -> list[str]:
    """The command that runs the driver with a configuration."""
    defaults, line = vars(driver.Config()), [sys.executable, str(ROOT / "driver.py")]
    for name, value in vars(config).items():
        if value != defaults[name]:
            values = value if isinstance(value, tuple) else (value,)
            line += [f"--{name.replace('_', '-')}", *map(str, values)]
    return line


def test_a_run_that_was_stopped_and_killed_ends_bitwise_identical(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run")
    moments = [
        ("checkpoint/vqvae_epoch_0001.npz", signal.SIGTERM, 143),
        ("checkpoint/prior_epoch_0001.npz", signal.SIGKILL, -signal.SIGKILL),
        ("samples", signal.SIGINT, 130),
        ("checkpoint/*.npy", signal.SIGKILL, -signal.SIGKILL),  # drawn slices
    ]
    for name, number, status in moments:
        process = subprocess.Popen(command_of(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not any(config.run_dir.glob(name)):
            time.sleep(0.01)
        process.send_signal(number)
        _, printed = process.communicate(timeout=600)
        assert process.returncode == status
        assert "Traceback" not in printed
        assert number == signal.SIGKILL or "the same command continues" in printed
    driver.main(config)
    assert kill.differences(finished.run_dir, config.run_dir) == []
    history = config.run_dir / "history.csv"
    history.write_text("stage\n")
    assert kill.differences(finished.run_dir, config.run_dir) == ["history.csv"]


# -------------------------------------------------------------------------------------------- architecture


def imports(path: Path) -> set[str]:
    """Names of this project's modules that a module imports, anywhere in it."""
    modules = {module.stem for module in ROOT.glob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & modules


def test_modules_do_not_import_each_other_in_circles_and_none_imports_the_driver():
    graph = {path.stem: imports(path) for path in ROOT.glob("*.py")}
    assert [name for name, imported in graph.items() if "driver" in imported] == []
    while graph:
        leaves = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert leaves, f"import circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]
