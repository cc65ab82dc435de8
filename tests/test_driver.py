"""One small run from end to end, what the run folder promises, and what bad input prints."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import checkpoint
import dataset
import driver
import phantom
import report

ROOT = Path(driver.__file__).parent


def tiny(root: Path, **constants) -> driver.Config:
    settings = {
        "data_dir": root / "slices",
        "run_dir": root / "run",
        "image_size": 32,
        "grids": (4,),
        "channels": 8,
        "num_embeddings": 16,
        "embedding_dim": 4,
        "batch_size": 8,
        "vqvae_epochs": 2,
        "prior_filters": 8,
        "prior_blocks": 2,
        "prior_epochs": 2,
        "num_samples": 3,
    }
    return driver.Config(**{**settings, **constants})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> driver.Config:
    root = tmp_path_factory.mktemp("driver")
    phantom.write_pngs(root / "slices", num_cases=6, num_positions=4, image_size=32)
    config = tiny(root)
    driver.main(config)
    return config


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_every_file(finished):
    folder = finished.run_dir
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "vqvae.keras",
        "prior.keras",
        "history.csv",
        "metrics.json",
        "report.html",
        "images",
        "samples",
        "logs",
        ".lock",
    }
    assert {path.name for path in (folder / "images").iterdir()} == set(driver.picture_names(finished))
    assert len(list((folder / "samples").glob("sample_*_slice_*.png"))) == 3
    assert np.load(folder / "samples" / "codes.npy").shape == (3, 4, 4)
    assert list((folder / "logs").rglob("events*"))


def test_the_configuration_is_saved_with_versions(finished):
    saved = json.loads((finished.run_dir / "config.json").read_text())
    assert saved["constants"]["num_embeddings"] == 16
    assert set(saved["constants"]) == {f.name for f in dataclasses.fields(finished)} - set(driver.PLACE_CONSTANTS)
    assert saved["versions"]["keras"] == keras.__version__
    assert saved["versions"]["devices"] == "1"


def test_history_has_a_row_an_epoch(finished):
    with open(finished.run_dir / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("vqvae", "1"),
        ("vqvae", "2"),
        ("prior", "1"),
        ("prior", "2"),
    ]
    names = list(rows[0])
    assert names.index("reconstruction") < names.index("codebook") < names.index("commitment")
    assert all(float(rows[0][f"val_{name}"]) for name in ("loss", "reconstruction", "ssim", "perplexity"))
    assert all(float(rows[2][name]) for name in ("loss", "val_loss", "bits_per_code", "seconds", "learning_rate"))


def test_metrics_hold_every_number(finished):
    numbers = json.loads((finished.run_dir / "metrics.json").read_text(), parse_constant=pytest.fail)
    plain = {"ssim", "ssim_brain", "ms_ssim", "psnr_db", "mae", "codes_used", "perplexity", "prior_bits_per_code"}
    plain |= {"bits_per_dimension", "prior_bits_per_dimension", "decoder_bits_per_dimension", "half_power_frequency"}
    assert all(isinstance(numbers[name], int | float) for name in plain)
    assert 0 < numbers["codes_used"] <= 1
    assert numbers["prior_bits_per_image"] == pytest.approx(16 * numbers["prior_bits_per_code"])
    assert numbers["prior_bits_per_dimension"] == pytest.approx(numbers["prior_bits_per_image"] / 32**2)
    assert numbers["test_slices"] == numbers["samples"]["count"] == 4
    assert np.load(finished.run_dir / "samples" / "measured_codes.npy").shape == (4, 4, 4)


def test_the_report_shows_every_picture(finished):
    assert set(report.CAPTIONS) == set(driver.picture_names(driver.PRESETS["oasis256"].config))
    page = (finished.run_dir / "report.html").read_text()
    assert page.count("<figure>") == len(driver.picture_names(finished))


def test_samples_are_grey_pngs_of_the_image_size(finished):
    for path in (finished.run_dir / "samples").glob("*.png"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("L", (32, 32))


def test_importing_model_is_all_that_loading_takes(finished):
    code = (
        "import sys, keras, model; v = keras.saving.load_model(sys.argv[1] + '/vqvae.keras');"
        "p = keras.saving.load_model(sys.argv[1] + '/prior.keras'); print(v.grids, p.grid_size)"
    )
    loaded = subprocess.run([sys.executable, "-c", code, finished.run_dir], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "(4,) (4, 4)", loaded.stderr


def test_a_complete_run_is_left_alone(finished, capsys):
    before = files(finished.run_dir)
    driver.main(finished)
    assert files(finished.run_dir) == before
    assert "is complete" in capsys.readouterr().out


def test_only_what_is_missing_is_made_again(finished):
    before = files(finished.run_dir)
    (finished.run_dir / "images" / "codes.png").unlink()
    (finished.run_dir / "metrics.json").unlink()
    driver.main(finished)
    assert files(finished.run_dir) == before


def test_the_same_seed_gives_the_same_bytes(finished, tmp_path):
    again = dataclasses.replace(finished, run_dir=tmp_path / "again")
    driver.main(again)
    first, second = files(finished.run_dir), files(again.run_dir)
    for name in ("metrics.json", "samples/codes.npy", *(n for n in first if n.startswith("samples/"))):
        assert first[name] == second[name], name
    for name in ("vqvae.keras", "prior.keras"):
        one, two = (keras.saving.load_model(c.run_dir / name).get_weights() for c in (finished, again))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)), name


def test_other_training_constants_are_refused_and_nothing_is_lost(finished):
    before = files(finished.run_dir)
    with pytest.raises(checkpoint.RunError, match="num_embeddings was 16, is 32"):
        driver.main(dataclasses.replace(finished, num_embeddings=32))
    assert files(finished.run_dir) == before


def test_other_sampling_constants_draw_again_without_training(finished, tmp_path):
    before = files(finished.run_dir)
    driver.main(dataclasses.replace(finished, num_samples=2, sample_positions=(1, 3)))
    names = sorted(path.name for path in (finished.run_dir / "samples").glob("*.png"))
    assert names == ["sample_000_slice_1.png", "sample_001_slice_3.png"]
    assert (finished.run_dir / "vqvae.keras").read_bytes() == before["vqvae.keras"]
    driver.main(finished)
    after = files(finished.run_dir)
    assert after["samples/codes.npy"] == before["samples/codes.npy"]


def test_a_folder_with_other_things_is_not_written_to(finished, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(checkpoint.RunError, match="holds other things than a run"):
        driver.main(dataclasses.replace(finished, run_dir=tmp_path))


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        (
            {"image_size": 100},
            "grids: (4) is not one or two grids, the coarsest first, each 2, 4, 8, … times smaller than the next and "
            "the last than the image of 100",
        ),
        (
            {"grids": (8, 4)},
            "grids: (8, 4) is not one or two grids, the coarsest first, each 2, 4, 8, … times smaller than the next "
            "and the last than the image of 32",
        ),
        ({"image_size": 8}, "image_size is 8: must be at least 16 (SSIM's window is 11 pixels wide)"),
        ({"num_embeddings": 0}, "num_embeddings is 0: must be at least 1"),
        ({"num_embeddings": 1}, "num_embeddings is 1: must be at least 2"),
        ({"vqvae_learning_rate": -1e-3}, "vqvae_learning_rate is -0.001: must be a positive number"),
        ({"prior_learning_rate": float("nan")}, "prior_learning_rate is nan: must be a positive number"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: must be from 0 to below 1"),
        ({"prior_dropout": -0.1}, "prior_dropout is -0.1: must be from 0 to below 1"),
        ({"batch_size": 0}, "batch_size is 0: must be at least 1"),
        ({"num_samples": 0}, "num_samples is 0: must be at least 1"),
        ({"prior_kernel_size": 4}, "prior_kernel_size is 4: must be odd, and at least 3"),
        ({"temperature": 0.0}, "temperature is 0.0: must be a positive number"),
        ({"top_p": 0.0}, "top_p is 0.0: must be above 0 and at most 1"),
        ({"seed": -1}, "seed is -1: must be 0 or more"),
        ({"devices": 0}, "devices is 0: must be at least 1"),
        ({"coordinator": "node"}, 'coordinator is node: must be HOST:PORT of the first process, "cluster" or None'),
        (
            {"coordinator": "node:99999"},
            'coordinator is node:99999: must be HOST:PORT of the first process, "cluster" or None',
        ),
        ({"coordinator": "cluster"}, "coordinator is cluster: several processes need JAX; set KERAS_BACKEND=jax"),
        ({"num_processes": 2}, "num_processes is 2: needs coordinator, the first one's HOST:PORT"),
        ({"process_index": 1}, "process_index is 1: must be below num_processes, 1"),
        ({"seed": 2**32}, "seed is 4294967296: must be below 4294967296"),
        ({"image_size": 8192}, "image_size is 8192: must be at most 4096"),
        ({"batch_size": 2.5}, "batch_size is 2.5: must be a whole number"),
        ({"num_samples": True}, "num_samples is True: must be a whole number"),
        ({"vqvae_learning_rate": "high"}, "vqvae_learning_rate is high: must be a number"),
        ({"augment": "yes"}, "augment is yes: must be True or False"),
        ({"codebook": "EMA"}, "codebook is EMA: must be one of ema, gradient"),
        ({"grids": 4}, "grids is 4: must be whole numbers in brackets, as in (32, 64)"),
        ({"data_dir": 5}, "data_dir is 5: must be a path or None"),
        ({"name": None}, "name is None: must be text in quotes"),
        (
            {"mse_weight": 0, "l1_weight": 0, "ssim_weight": 0},
            "mse_weight is 0: one of mse_weight, l1_weight and ssim_weight must be positive",
        ),
        (
            {"prior_blocks": 1, "image_size": 96, "grids": (12,)},
            "prior_blocks is 1: 1 blocks are too few to see over a grid of 12: use more",
        ),
        (
            {"sample_positions": (1,), "prior_uses_position": False},
            "sample_positions is set: needs prior_uses_position, else the prior cannot follow it",
        ),
    ],
)
def test_constants_that_cannot_work_are_refused_at_once(tmp_path, constants, message):
    with pytest.raises(driver.ConfigError) as error:
        driver.main(tiny(tmp_path, **constants))
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


def held(count: int, positions: int = 1) -> dataset.Slices:
    images = np.zeros((count, 32, 32, 1), np.uint8)
    return dataset.Slices(images, np.arange(count, dtype=np.int32) % positions, np.array(["a"] * count))


def test_devices_that_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(driver.devices, "names", lambda: ["GPU:0", "GPU:1"])

    def check(config: driver.Config, slices: dict) -> None:
        driver.check_devices(config)
        driver.check_slices(config, slices)

    def refused(config: driver.Config, train: int = 8, validate: int = 8) -> str:
        with pytest.raises(driver.ConfigError) as error:
            check(config, {"train": held(train), "validate": held(validate)})
        return str(error.value)

    two = driver.Config(devices=2)
    assert refused(driver.Config(devices=3)) == "devices is 3: this process has 2; choose no more"
    assert refused(driver.Config(devices=2, batch_size=5)) == (
        "batch_size is 5: must be a multiple of the 2 devices that share it"
    )
    assert refused(two, train=5) == "devices is 2: 2 in all cannot share 5 training slices evenly; choose another"
    assert refused(two, validate=9) == "devices is 2: 2 in all cannot share 9 validation slices evenly; choose another"


def test_a_process_that_is_unlike_the_first_is_refused(monkeypatch):
    def refused(first: driver.Config, fingerprint: str) -> str:
        of_first = driver.json_constants(first) | {"data_dir": None, "devices": first.devices}
        monkeypatch.setattr(driver.devices, "from_first", lambda value: (of_first, fingerprint))
        with pytest.raises((driver.ConfigError, dataset.DataError)) as error:
            driver.check_alike(driver.Config(data_dir="here"), "same")
        return str(error.value)

    assert refused(driver.Config(seed=1), "same") == "seed is 0: the first process has 1; give all processes the same"
    assert refused(driver.Config(data_dir="there"), "other") == (
        "data_dir is here: holds other slices than the first process has; give all processes the same"
    )


def test_paths_may_be_text_and_grids_a_list():
    config = driver.Config(data_dir="slices", run_dir="run", grids=[12])
    driver.check(config)
    assert config == driver.Config(data_dir=Path("slices"), run_dir=Path("run"), grids=(12,))


def test_fewer_slices_than_a_batch_are_used_with_a_warning(capsys):
    slices = dataset.Slices(np.zeros((3, 32, 32, 1), np.uint8), np.zeros(3, np.int32), np.array(["a", "b", "c"]))
    driver.check_slices(driver.Config(batch_size=4), {"train": slices, "validate": slices})
    assert capsys.readouterr().err == (
        "warning: 3 training slices are fewer than batch_size 4: each step takes all of them\n"
    )
    driver.check_slices(driver.Config(batch_size=3), {"train": slices, "validate": slices})
    assert capsys.readouterr().err == ""


def test_another_seed_gives_other_weights_and_samples(finished):
    other = dataclasses.replace(finished, seed=1)
    slices = dataset.load(finished.data_dir, 32, 0)
    drawn = []
    for config in (finished, other):
        prior = driver.make_prior(finished)
        checkpoint.load_weights(prior, finished.run_dir / "prior.keras")
        drawn.append(driver.draw_codes(config, [prior], np.arange(4, dtype=np.int32), "samples")[0])
    assert not np.array_equal(*drawn)
    one, two = (driver.make_vqvae(config, slices["train"]).get_weights() for config in (finished, other))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_saved_models_do_not_depend_on_what_was_made_before(finished, tmp_path):
    train = dataset.load(finished.data_dir, 32, 0)["train"]
    for make in (lambda: driver.make_vqvae(finished, train), lambda: driver.make_prior(finished)):
        for name in ("one", "two"):
            checkpoint.save_model(make(), tmp_path / f"{name}.keras")
        assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "two.keras").read_bytes()


def test_sample_positions_that_were_never_seen_are_refused(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run", sample_positions=(1, 40))
    with pytest.raises(driver.ConfigError, match="sample_positions has 40: the training slices have 0 to 3"):
        driver.main(config)
    assert not config.run_dir.exists()


def test_two_levels_run_from_end_to_end(finished, tmp_path):
    config = dataclasses.replace(
        finished, run_dir=tmp_path / "run", grids=(4, 8), bottom_prior_filters=4, prior_blocks=3
    )
    numbers = driver.main(config)
    assert {path.name for path in (tmp_path / "run" / "images").iterdir()} == set(driver.picture_names(config))
    assert "levels.png" in driver.picture_names(config)
    for name in ("codes_used", "perplexity", "prior_bits_per_code"):
        assert numbers[name].keys() == {"top", "bottom"}
    each = [16 * numbers["prior_bits_per_code"]["top"], 64 * numbers["prior_bits_per_code"]["bottom"]]
    assert numbers["prior_bits_per_image"] == pytest.approx(sum(each))
    assert np.load(tmp_path / "run" / "samples" / "bottom_codes.npy").shape == (3, 8, 8)
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["vqvae"] * 2 + ["top_prior"] * 2 + ["bottom_prior"] * 2
    assert float(rows[0]["top_perplexity"]) > 0
    assert float(rows[0]["val_bottom_codes_used"]) > 0
    before = files(config.run_dir)
    driver.main(config)
    assert files(config.run_dir) == before


def test_mixed_precision_trains_and_saves_float32_models(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=tmp_path / "run", precision="mixed_bfloat16")
    numbers = driver.main(config)
    exact = json.loads((finished.run_dir / "metrics.json").read_text())
    assert numbers["ssim"] == pytest.approx(exact["ssim"], abs=0.05)
    assert numbers["prior_bits_per_code"] == pytest.approx(exact["prior_bits_per_code"], rel=0.1)
    loaded = keras.saving.load_model(config.run_dir / "vqvae.keras")
    assert loaded.encoders[0].layers[0].compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("name", driver.PRESETS)
def test_presets_are_sound_and_named_for_what_they_are(name):
    config = driver.PRESETS[name].config
    driver.check(config)
    assert config.name == name
    assert f"{config.image_size}" in name
    assert driver.run_folder(config) == Path("runs") / f"{name}-synthetic"


def test_the_default_preset_is_the_default_configuration():
    assert driver.PRESETS["oasis96"].config == driver.Config()


def test_synthetic_runs_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom, "NUM_CASES", 6)
    monkeypatch.setattr(phantom, "NUM_POSITIONS", 4)
    titles = []
    monkeypatch.setattr(driver.plots, "_figure", _recording(driver.plots._figure, titles))
    driver.main(tiny(tmp_path, data_dir=None, vqvae_epochs=1, prior_epochs=1))
    assert "SYNTHETIC" in capsys.readouterr().out.splitlines()[0]
    assert len(titles) == len(driver.picture_names(driver.Config()))
    assert all("SYNTHETIC" in note for note in titles)


def _recording(make_figure, notes):
    def figure(width, height, title, note):
        notes.append(note)
        return make_figure(width, height, title, note)

    return figure


def command(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, ROOT / "driver.py", *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_bad_input_ends_with_one_line_and_status_2(tmp_path):
    ended = command("--data-dir", tmp_path / "nowhere", "--run-dir", tmp_path / "run")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last == f"error: {tmp_path / 'nowhere'}: no such folder; set data_dir to the folder with the PNG slices"
    assert not (tmp_path / "run").exists()


def parse(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit status and all that is printed of a command line that does not come to running anything."""
    monkeypatch.setattr(sys, "argv", ["driver.py", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        driver.command_line()
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


def ended(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit status and what is printed on stderr of a command line."""
    monkeypatch.setattr(sys, "argv", ["driver.py", *map(str, arguments)])
    monkeypatch.setattr(checkpoint, "stop_on_signals", lambda: None)
    return driver.command_line(), capsys.readouterr().err


def test_constants_that_there_are_not_end_with_status_2(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, "--colour", "red") == (
        2,
        "error: --colour: no such constant; see python driver.py --help\n",
    )
    assert ended(monkeypatch, capsys, "--presett", "oasis96") == (
        2,
        "error: --presett: no such constant; did you mean --preset?\n",
    )
    assert ended(monkeypatch, capsys, "--bacth-size", "8") == (
        2,
        "error: --bacth-size: no such constant; did you mean --batch-size?\n",
    )


def test_slices_that_cannot_be_read_are_left_out_if_asked(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.data_dir, tmp_path / "slices")
    broken = next((tmp_path / "slices" / "keras_png_slices_test").iterdir())
    broken.write_bytes(b"")
    arguments = ["--data-dir", tmp_path / "slices", "--run-dir", tmp_path / "run", "--image-size", "32", "--grids", "4"]
    status, printed = ended(monkeypatch, capsys, *arguments)
    assert (status, printed) == (
        2,
        f"error: {broken}: is empty; replace or remove it, or leave such files out: --skip-broken-slices\n",
    )
    assert not (tmp_path / "run").exists()

    def stop(config, run, slices):
        raise checkpoint.Stopped(signal.SIGINT)

    monkeypatch.setattr(driver, "train_vqvae", stop)
    assert ended(monkeypatch, capsys, *arguments, "--skip-broken-slices") == (
        130,
        f"warning: left out: {broken}: is empty\n\nstopped; the same command goes on after the last finished epoch or "
        f"step of {tmp_path / 'run'}\n",
    )


def test_a_preset_sets_the_defaults_of_the_other_options(monkeypatch, capsys):
    assert "32 64" in parse(monkeypatch, capsys, "--preset", "oasis256", "--help")[1]
    status, printed = parse(monkeypatch, capsys, "--preset", "oasis97")
    assert status == 2
    assert "invalid choice: 'oasis97'" in printed


def test_help_shows_the_constants_with_their_comments(monkeypatch, capsys):
    status, printed = parse(monkeypatch, capsys, "--help")
    assert status == 0
    assert "--preset hierarchical256" in printed
    assert "--num-embeddings" in printed
    assert "codes in the codebook" in printed
