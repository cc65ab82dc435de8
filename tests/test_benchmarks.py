import importlib
import json
import math
import resource
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import dataset
import driver
import layers
import model
import phantom
from benchmarks import blocks, common, kill, loading, priors, sampling

MODULES = sorted(path.stem for path in Path(kill.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_imports_and_has_a_description(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__.strip()


# ------------------------------------------------------------------------------------------------- kill.py


def write_run(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_csv", ".csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_differences_ignores_logs_and_seconds(tmp_path):
    one = write_run(tmp_path / "one", history_csv="epoch,seconds,loss\n1,2.0,0.5\n", logs__events="a", report="r")
    other = write_run(tmp_path / "other", history_csv="epoch,seconds,loss\n1,3.0,0.5\n", logs__events="b", report="r")
    assert kill.differences(one, other) == []


def test_differences_names_changed_missing_and_additional_files(tmp_path):
    one = write_run(tmp_path / "one", history_csv="epoch,loss\n1,0.5\n", images__codes="a", only_here="x")
    other = write_run(tmp_path / "other", history_csv="epoch,loss\n1,0.6\n", images__codes="b", only_there="x")
    assert kill.differences(one, other) == ["history.csv", str(Path("images/codes")), "only_here", "only_there"]


def test_current_step_follows_the_files_of_the_run_folder(tmp_path):
    found = [kill.current_step(tmp_path)]
    for name in kill.STEPS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        found.append(kill.current_step(tmp_path))
    assert found == [*kill.STEPS.values(), "after the report was written"]


def test_a_process_finishes_is_killed_or_fails():
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert not kill.finishes(sleeping, 0.1)
    assert kill.finishes([sys.executable, "-c", ""], None)
    with pytest.raises(RuntimeError, match="status 3: wrong"):
        kill.finishes([sys.executable, "-c", "import sys; print('wrong', file=sys.stderr); sys.exit(3)"], None)


# ----------------------------------------------------------------------------------------------- common.py


def test_the_closing_line_is_valid_json(capsys):
    common.print_json({"seconds": math.nan, "rows": [{"ssim": 0.5}, (1, math.nan)], "method": "a"})
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert json.loads(output) == {"seconds": None, "rows": [{"ssim": 0.5}, [1, None]], "method": "a"}


def test_one_run_does_not_count():
    runs = []
    assert len(common.time_runs(lambda: runs.append(1), 3)) == 3
    assert len(runs) == 4


def test_peak_memory_is_in_bytes():
    reported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 0.2 * reported < common.peak_memory() < 1.05 * reported


def test_operations_of_a_convolution_and_a_product():
    network = keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Conv2D(4, 3, padding="same")])
    network.add(keras.layers.Dense(5))
    network.compile(loss="mse")
    x, y = np.zeros((3, 8, 8, 2), np.float32), np.zeros((3, 8, 8, 5), np.float32)
    convolution, product = 2 * 3 * 8 * 8 * 9 * 2 * 4, 2 * 3 * 8 * 8 * 4 * 5
    # Forward, backward to the weights, and backward to the inputs.
    assert common.step_operations(network, x, y) == 3 * convolution + 3 * product


# ------------------------------------------------------------------------------------------ single benchmarks


def test_all_loading_methods_yield_all_slices(tmp_path):
    phantom.write_pngs(tmp_path, num_subjects=10, num_positions=1, image_size=16)
    for method in loading.METHODS:
        numbers = loading.measure(method, tmp_path, 16, num_slices=7)
        assert numbers["slices"] == 7
        assert numbers["seconds"] > 0


def test_all_sampling_methods_sample_the_same_codes():
    prior = model.PixelCNN(16, (4, 4), filters=8, num_blocks=1, attention=1)
    inputs = sampling.make_inputs(prior, 3)
    expected = sampling.one_call_per_position(prior, *inputs, 16)
    np.testing.assert_array_equal(sampling.full_passes(prior, *inputs, 16), expected)
    np.testing.assert_array_equal(sampling.cached_sampling(prior, 3)(), expected)
    assert sampling.operations_per_grid(prior) > 0


def test_soft_targets_favour_the_nearest_codes():
    targets = priors.soften(np.arange(8.0)[:, None], 0.1)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[0], [0.9, *4 * [0.025], 0, 0, 0])


def test_input_noise_replaces_inputs_but_not_targets():
    codes = np.zeros((64, 4, 4), np.int32)
    variant = priors.Variant(driver.Config(), lambda: None, input_noise=0.25)
    batches = priors.add_noise(variant, lambda epoch: dataset.input_batches({"codes": codes}, "codes", 64), 0)
    ((inputs, targets),) = batches
    assert 0.15 < np.mean(inputs["codes"] != 0) < 0.35
    np.testing.assert_array_equal(targets, codes)


def test_the_average_is_validated_and_training_continues_with_the_weights():
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    average = priors.WeightAverage(0.5)
    average.set_model(network)
    for value in (2.0, 4.0):
        network.set_weights([np.array([[value]])])
        average.on_train_batch_end(0)
    average.on_test_begin()
    assert network.get_weights()[0] == 3.0
    average.on_epoch_begin(1)
    assert network.get_weights()[0] == 4.0


@pytest.mark.parametrize("block", blocks.BLOCKS.values())
def test_residual_blocks_keep_the_shape(block):
    layer = block(4)
    assert layer(np.ones((2, 8, 8, 4), np.float32)).shape == (2, 8, 8, 4)


def test_the_residual_block_of_the_vqvae_is_replaced_only_while_it_is_made():
    config = driver.Config(image_size=32, grids=(4,), channels=4, num_embeddings=8, embedding_dim=4)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)
    slices = {"train": dataset.Slices(images, np.zeros(4, np.int32), np.array(["case"] * 4))}
    network = blocks.make_network(blocks.BareBlock, config, slices)
    kinds = {type(layer) for layer in network._flatten_layers()}
    assert blocks.BareBlock in kinds
    assert layers.ResidualBlock not in kinds
    assert model.ResidualBlock is layers.ResidualBlock
