import importlib
import inspect
import json
import math
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest

import console
import dataset
import driver
import layers
import model
import options
import phantom
from benchmarks import blocks, common, kill, loading, priors, rate, sampling

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


# ----------------------------------------------------------------------------------------- an earlier run


@dataclass(frozen=True)
class SomeOptions:
    data_dir: Path | None = None
    grids: tuple[int, ...] = (1, 2)


FIGURES = {
    "prior": {"images_per_second": 100.0},
    "peak_mb": 50.0,
    "rows": [{"name": "large", "seconds": 3.0}],
    "kills": 4,
}
AT_PEAK = {"convolution_peak_gflops": 200.0}


def run(monkeypatch, capsys, numbers: dict, *arguments: object) -> tuple[int, str, str]:
    """Run a benchmark that measures these numbers; returns the exit status, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    monkeypatch.setattr(console, "stop_on_signals", lambda: None)
    status = 0
    try:
        common.run_benchmark(lambda options: {**common.machine(), **AT_PEAK, **numbers}, SomeOptions, "A benchmark.")
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.fixture
def earlier(tmp_path, monkeypatch, capsys) -> Path:
    path = tmp_path / "earlier.txt"
    path.write_text("a table\n" + run(monkeypatch, capsys, FIGURES)[1], encoding="utf-8")
    return path


def test_an_equal_run_passes_and_shows_all_figures(earlier, monkeypatch, capsys):
    status, output, errors = run(monkeypatch, capsys, FIGURES, "--compare", earlier)
    assert (status, errors) == (0, "")
    for name in ("prior: images_per_second", "peak_mb", "rows large: seconds"):
        (row,) = [line for line in output.splitlines() if line.startswith(name)]
        assert row.split()[-2:] == ["1.00", "1.00"]
    assert "kills" not in output.rpartition("\n{")[0]
    assert json.loads(output.splitlines()[-1])["kills"] == 4


@pytest.mark.parametrize(
    ("changes", "worst"),
    [
        ({"peak_mb": 56.0}, '"peak_mb" is worse by 12%, 56 instead of 50'),
        ({"peak_mb": 54.0}, None),
        ({"peak_mb": 5.0}, None),
        ({"prior": {"images_per_second": 88.0}}, '"prior: images_per_second" is worse by 12%'),
        ({"prior": {"images_per_second": 200.0}}, None),
        ({"prior": {"images_per_second": 80.0}, "peak_mb": 70.0}, '"peak_mb" is worse by 40%'),
        ({"prior": {"images_per_second": 50.0}, "peak_mb": 70.0}, '"prior: images_per_second" is worse by 50%'),
        ({"rows": [{"name": "large", "seconds": 6.0}]}, '"rows large: seconds" is worse by 100%'),
        ({"rows": [{"name": "large", "seconds": math.nan}]}, '"rows large: seconds"'),
        ({"rows": []}, '"rows large: seconds"'),
    ],
)
def test_the_worst_figure_beyond_the_tolerance_is_named(earlier, monkeypatch, capsys, changes, worst):
    status, output, errors = run(monkeypatch, capsys, FIGURES | changes, "--compare", earlier)
    json.loads(output.splitlines()[-1])
    if worst is None:
        assert (status, errors) == (0, "")
    else:
        assert status == 1
        assert errors.startswith(f"error: {earlier}: ")
        assert worst in errors
        assert errors.count("\n") == 1


def test_the_tolerance_is_an_option(earlier, monkeypatch, capsys):
    slower = FIGURES | {"peak_mb": 56.0}
    assert run(monkeypatch, capsys, slower, "--compare", earlier, "--tolerance", 0.15)[0] == 0
    status, _, errors = run(monkeypatch, capsys, slower, "--compare", earlier, "--tolerance", -1)
    assert status == 2
    assert "--tolerance is -1" in errors


def test_times_and_speeds_are_scaled_to_the_same_peak_but_memory_is_not(earlier, monkeypatch, capsys):
    slow_machine = {"convolution_peak_gflops": 100.0, "prior": {"images_per_second": 50.0}}
    slow_machine["rows"] = [{"name": "large", "seconds": 6.0}]
    status, output, errors = run(monkeypatch, capsys, FIGURES | slow_machine, "--compare", earlier)
    assert status == 0
    assert "0.50 times" in errors  # A warning: the machine is in another state.
    ratios = {line[:4]: line.split()[-2:] for line in output.splitlines()}
    assert (ratios["prio"], ratios["rows"]) == (["0.50", "1.00"], ["2.00", "1.00"])
    slow_machine["peak_mb"] = 100.0
    assert run(monkeypatch, capsys, FIGURES | slow_machine, "--compare", earlier)[0] == 1
    # A measured peak that is too high by chance does not make an equal figure worse.
    assert run(monkeypatch, capsys, FIGURES | {"convolution_peak_gflops": 300.0}, "--compare", earlier)[0] == 0


@pytest.mark.parametrize(
    ("fact", "value"), [("processor", "another one"), ("threads", "77"), ("backend", "another one")]
)
def test_another_machine_is_refused_before_anything_is_measured(earlier, monkeypatch, capsys, fact, value):
    table, line = earlier.read_text().splitlines()
    earlier.write_text("\n".join([table, json.dumps(json.loads(line) | {fact: value})]))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--compare", str(earlier)])
    with pytest.raises(SystemExit) as end:
        common.run_benchmark(lambda options: pytest.fail("it was run"), SomeOptions, "A benchmark.")
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert all(part in errors for part in (str(earlier), fact, value))


def test_other_options_are_refused_but_folders_may_be_moved(earlier, tmp_path, monkeypatch, capsys):
    status, _, errors = run(monkeypatch, capsys, FIGURES, "--compare", earlier, "--grids", 3)
    assert status == 2
    assert "grids = (1, 2), not (3,)" in errors
    assert run(monkeypatch, capsys, FIGURES, "--compare", earlier, "--data-dir", tmp_path)[0] == 2
    earlier.write_text(run(monkeypatch, capsys, FIGURES, "--data-dir", tmp_path / "one")[1])
    assert run(monkeypatch, capsys, FIGURES, "--compare", earlier, "--data-dir", tmp_path / "other")[0] == 0


@pytest.mark.parametrize("content", [None, "", "a table", "[1]", '{"seconds": 3}'])
def test_a_file_that_is_no_output_of_a_benchmark_is_refused(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_text(content)
    status, _, errors = run(monkeypatch, capsys, FIGURES, "--compare", path)
    assert status == 2
    assert errors.startswith(f"error: {path}: ")
    assert errors.count("\n") == 1


def test_figures_are_better_in_one_direction_only():
    lower = ["seconds", "microseconds_a_position_12x12_batch_20", "ms_per_grid", "seconds_to_ssim", "peak_mb"]
    higher = ["images_per_second", "vqvae_images_per_s", "share_of_peak", "speedup_12x12", "ssim", "sooner_by"]
    neither = ["kills", "identical", "runs", "weights", "sessions", "convolution_peak_gflops", "ms_ssim_of_pairs"]
    for names, wanted in ((lower, (True, False)), (higher, (False, True)), (neither, (False, False))):
        for name in names:
            kinds = (common.LOWER_IS_BETTER, common.HIGHER_IS_BETTER)
            assert tuple(re.fullmatch(kind, name) is not None for kind in kinds) == wanted, name


def test_the_peak_stands_in_every_benchmark():
    for name in MODULES:
        assert name == "common" or "common.report_machine(" in inspect.getsource(
            importlib.import_module(f"benchmarks.{name}")
        ), name


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


# ------------------------------------------------------------------------------------------------- rate.py


@pytest.mark.parametrize("changes", rate.VARIANTS.values(), ids=rate.VARIANTS)
def test_every_variant_is_a_configuration_that_can_work(changes):
    options.check(driver.Config(**changes))


def test_an_unknown_variant_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "report_machine", lambda: pytest.fail("it was measured"))
    with pytest.raises(console.UserError, match="grid7.*grid6"):
        rate.main(rate.Options(folder=tmp_path, variants=("grid6", "grid7")))
