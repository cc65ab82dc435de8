"""Presets, the command line, and configurations that are refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import dataset
import driver
import options
from options import ConfigError


def tiny(**constants) -> driver.Config:
    settings = {
        "image_size": 32,
        "grids": (4,),
        "channels": 8,
        "num_embeddings": 16,
        "embedding_dim": 4,
        "batch_size": 8,
        "prior_filters": 8,
        "prior_blocks": 2,
        "prior_attention": 1,
    }
    return driver.Config(**{**settings, **constants})


def refused(check) -> str:
    with pytest.raises((ConfigError, dataset.DataError)) as error:
        check()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", options.PRESETS)
def test_presets_can_work_and_are_named_for_their_size(name):
    config = options.preset(driver.Config, name)
    options.check(config)
    assert config.name == name
    assert name == "synthetic" or str(config.image_size) in name


def test_the_default_configuration_is_oasis96():
    assert options.preset(driver.Config, "oasis96") == driver.Config()


def test_run_folders_are_named_for_the_run_and_say_if_slices_are_synthetic():
    assert options.run_folder(driver.Config()) == Path("runs/oasis96-synthetic")
    assert options.run_folder(driver.Config(data_dir="slices")) == Path("runs/oasis96")
    assert options.run_folder(options.preset(driver.Config, "synthetic")) == Path("runs/synthetic")
    assert options.run_folder(driver.Config(run_dir="here")) == Path("here")


# -------------------------------------------------------------------------------------------- command line


def parse(*arguments: str) -> driver.Config:
    return options.parse(driver.Config, arguments, "What it does.")


def test_without_data_a_small_preset_for_synthetic_slices_is_the_default():
    assert parse() == options.preset(driver.Config, "synthetic")
    assert parse("--seed", "3") == dataclasses.replace(options.preset(driver.Config, "synthetic"), seed=3)
    assert parse("--data-dir", "slices") == driver.Config(data_dir="slices")
    assert parse("--preset", "oasis96") == driver.Config()


def test_options_change_what_a_preset_sets():
    config = parse("--preset", "hierarchical256", "--vqvae-epochs", "1")
    assert (config.grids, config.vqvae_epochs) == ((32, 64), 1)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--colour", "see python driver.py --help"),
        ("--presett", "did you mean --preset?"),
        ("--bacth-size", "did you mean --batch-size?"),
    ],
)
def test_options_that_do_not_exist_are_refused(option, remedy):
    message = refused(lambda: parse(option, "8"))
    assert message.startswith(f"{option}: no such option")
    assert remedy in message


def test_presets_that_do_not_exist_are_refused():
    message = refused(lambda: parse("--preset", "oasis97"))
    assert "--preset oasis97: no such preset" in message
    assert "oasis96" in message


def test_help_shows_presets_and_constants_with_their_comments(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse("--preset", "hierarchical256", "--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--preset hierarchical256" in printed
    assert "--num-embeddings" in printed
    assert "number of codes in each codebook" in printed
    assert "32 64" in printed


def test_a_saved_configuration_is_read_back():
    folders = {"data_dir": Path("slices").resolve(), "start_from": Path("weights").resolve()}
    config = driver.Config(**folders, grids=(32, 64), image_size=256, sample_positions=(1, 2))
    assert driver.Config(**options.to_json(config)) == config
    assert not set(options.RUNTIME_FIELDS) & options.to_json(config).keys()


# -------------------------------------------------------------------------------------------------- checks


LARGE = {"image_size": 256, "prior_blocks": 6, "batch_size": 16}


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"image_size": 100}, "give one or two grids"),
        ({**LARGE, "grids": (64,), "prior_attention": 3}, "prior_attention is 3: on a grid of 64"),
        ({**LARGE, "grids": (64,), "prior": "plain", "prior_attention": 1}, "prior_attention is 1: on a grid of 64"),
        ({**LARGE, "grids": (32, 64), "bottom_prior_attention": 1}, "bottom_prior_attention is 1: on a grid of 64"),
        ({"bottom_prior_filters": 1}, "bottom_prior_filters is 1: must be at least 2"),
        ({"grids": (8, 4)}, "grids: (8, 4) "),
        ({"image_size": 8}, "image_size is 8: must be at least 16"),
        ({"image_size": 8192}, "image_size is 8192: must be at most 4096"),
        ({"synthetic_subjects": 2}, "synthetic_subjects is 2: must be at least 3"),
        ({"num_embeddings": 1}, "num_embeddings is 1: must be at least 2"),
        ({"vqvae_learning_rate": -1e-3}, "vqvae_learning_rate is -0.001: must be a positive number"),
        ({"prior_learning_rate": float("nan")}, "prior_learning_rate is nan: must be a positive number"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: must be from 0 to below 1"),
        ({"prior_dropout": -0.1}, "prior_dropout is -0.1: must be from 0 to below 1"),
        ({"batch_size": 0}, "batch_size is 0: must be at least 1"),
        ({"num_samples": 0}, "num_samples is 0: must be at least 1"),
        ({"prior_kernel_size": 4}, "prior_kernel_size is 4: must be odd"),
        ({"temperature": 0.0}, "temperature is 0.0: must be a positive number"),
        ({"top_p": 0.0}, "top_p is 0.0: must be above 0"),
        ({"seed": -1}, "seed is -1: must be 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296: must be 0 to 4294967295"),
        ({"devices": 0}, "devices is 0: must be at least 1"),
        ({"coordinator": "node"}, "coordinator is node: must be HOST:PORT"),
        ({"coordinator": "node:99999"}, "coordinator is node:99999: must be HOST:PORT"),
        ({"coordinator": "cluster"}, "coordinator is cluster: several processes need JAX; set KERAS_BACKEND=jax"),
        ({"num_processes": 2}, "num_processes is 2: also set coordinator"),
        ({"process_index": 1}, "process_index is 1: must be below num_processes, 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5: must be a whole number"),
        ({"num_samples": True}, "num_samples is True: must be a whole number"),
        ({"vqvae_learning_rate": "high"}, "vqvae_learning_rate is high: must be a number"),
        ({"augment": "yes"}, "augment is yes: must be True or False"),
        ({"codebook": "EMA"}, "codebook is EMA: must be one of ema, gradient"),
        ({"grids": 4}, "grids is 4: must be whole numbers in brackets"),
        ({"data_dir": 5}, "data_dir is 5: must be a path or None"),
        ({"name": None}, "name is None: must be text in quotes"),
        ({"mse_weight": 0, "l1_weight": 0, "ssim_weight": 0}, "at least one of them must be positive"),
        ({"prior_blocks": 1, "image_size": 96, "grids": (12,)}, "prior_blocks is 1: "),
        ({"sample_positions": (1,), "prior_uses_position": False}, "also set prior_uses_position"),
        ({"crop": 5, "data_dir": "slices"}, "crop is 5: must be None, 0, or 16 to 4096 pixels"),
        ({"crop": -16, "data_dir": "slices"}, "crop is -16: must be None, 0, or 16 to 4096 pixels"),
        ({"crop": 4097, "data_dir": "slices"}, "crop is 4097: must be None, 0, or 16 to 4096 pixels"),
        ({"crop": 192}, "crop is 192: synthetic slices are drawn at image_size; set data_dir, or set crop to 0"),
        ({"crop": "all"}, "crop is all: must be a whole number or None"),
        ({"prior_attention": 3}, "prior_attention is 3: must be 0 to prior_blocks, 2"),
        ({"prior_attention": -1}, "prior_attention is -1: must be 0 to prior_blocks, 2"),
        ({"background_code": 1}, "background_code is 1: must be True or False"),
        ({"coding_size": 64}, "coding_size is 64: must be image_size, 32, or smaller by a factor of 2, 4, 8"),
        ({"coding_size": 24}, "coding_size is 24: must be image_size, 32, or smaller by a factor of 2, 4, 8"),
        ({"coding_size": 0}, "coding_size is 0: must be image_size, 32, or smaller by a factor of 2, 4, 8"),
        ({"coding_size": 4}, "the images of 4 × 4 pixels that are encoded"),
        ({"decoder_batch_size": 0}, "decoder_batch_size is 0: must be at least 1"),
        ({"keep": ("vqvae",)}, "keep is vqvae: also set start_from"),
        ({"keep": ("prior",), "start_from": "run"}, "keep is prior: also keep vqvae"),
        ({"keep": ("vqvae", "selector"), "start_from": "run"}, "keep is vqvae selector: also keep the priors"),
        (
            {"keep": ("vqvae", "decoder"), "start_from": "run"},
            "keep has decoder: choose from vqvae, prior, critic, selector",
        ),
    ],
)
def test_configurations_that_cannot_work_are_refused_before_anything_is_written(tmp_path, constants, message):
    config = tiny(run_dir=tmp_path / "run", **constants)
    assert message in refused(lambda: options.check(config))
    with pytest.raises(ConfigError):
        driver.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "constants",
    [
        {"coding_size": 32},
        {"coding_size": 16},
        {"crop": None},
        {"crop": 0},
        {"crop": 16, "data_dir": "slices"},
        {"prior_attention": 0},
        {"prior_attention": 2},
    ],
)
def test_limits_are_allowed(constants):
    options.check(tiny(**constants))


def test_paths_may_be_text_and_grids_a_list():
    config = driver.Config(data_dir="slices", run_dir="run", start_from="weights", grids=[12])
    options.check(config)
    assert config == driver.Config(
        data_dir=Path("slices"), run_dir=Path("run"), start_from=Path("weights"), grids=(12,)
    )


def slices_of(count: int) -> dataset.Slices:
    return dataset.Slices(np.zeros((count, 32, 32, 1), np.uint8), np.zeros(count, np.int32), np.array(["a"] * count))


def test_devices_that_cannot_share_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr(options.devices, "device_names", lambda: ["GPU:0", "GPU:1"])

    def check(config: driver.Config, train: int = 8, validate: int = 8) -> None:
        options.check_devices(config)
        options.check_slices(config, {"train": slices_of(train), "validate": slices_of(validate)})

    two = driver.Config(devices=2)
    assert "devices is 3: this process has 2" in refused(lambda: check(driver.Config(devices=3)))
    message = refused(lambda: check(driver.Config(devices=2, batch_size=5)))
    assert "batch_size is 5: must be a multiple of the 2 devices" in message
    assert "cannot share 5 training slices evenly; choose another" in refused(lambda: check(two, train=5))
    assert "cannot share 9 validation slices evenly; choose another" in refused(lambda: check(two, validate=9))
    message = refused(lambda: check(driver.Config(devices=2, decoder_batch_size=3)))
    assert "decoder_batch_size is 3: must be a multiple of the 2 devices" in message
    check(driver.Config(devices=2, batch_size=4))
    check(driver.Config(devices=2, batch_size=4, decoder_batch_size=3, decoder_epochs=0))


def test_a_process_that_differs_from_the_main_one_is_refused(monkeypatch):
    def message(main: driver.Config, fingerprint: str) -> str:
        main_constants = options.to_json(main) | dict.fromkeys(options.PATH_FIELDS) | {"devices": main.devices}
        monkeypatch.setattr(options.devices, "broadcast_from_main", lambda value: (main_constants, fingerprint))
        return refused(lambda: options.check_same_in_all_processes(driver.Config(data_dir="here"), "same"))

    assert "seed is 0: the main process has 1; use the same" in message(driver.Config(seed=1), "same")
    assert "data_dir is here: contains other slices" in message(driver.Config(data_dir="there"), "other")


def test_fewer_slices_than_a_batch_are_used_with_a_warning(capsys):
    slices = {"train": slices_of(3), "validate": slices_of(3)}
    options.check_slices(driver.Config(batch_size=4), slices)
    assert "only 3 training slices for a batch_size of 4" in capsys.readouterr().err
    options.check_slices(driver.Config(batch_size=3), slices)
    assert capsys.readouterr().err == ""


def test_sample_positions_that_do_not_occur_are_refused():
    slices = {"train": slices_of(30), "validate": slices_of(8)}
    message = refused(lambda: options.check_slices(driver.Config(sample_positions=(0, 40)), slices))
    assert "sample_positions has 40: choose from 0 to 0" in message
