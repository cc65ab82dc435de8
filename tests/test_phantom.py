import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import console
import dataset
import phantom


def test_a_slice_is_a_function_of_its_arguments():
    first = phantom.slice_image(1, 2, 3)
    assert np.array_equal(first, phantom.slice_image(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(first, phantom.slice_image(*other))


@pytest.mark.parametrize("image_size", [96, 256])
@pytest.mark.parametrize("position", [0, 8, 15])
def test_a_slice_looks_like_a_brain(image_size, position):
    image = phantom.slice_image(0, 1, position, image_size)
    assert image.shape == (image_size, image_size)
    assert image.dtype == np.uint8
    inside = image > 12
    assert 0.03 < inside.mean() < 0.45  # a brain on black, smaller at the top
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert not border.any()
    assert image[inside].max() > 180  # white matter
    assert image[inside].std() > 20  # more than one tissue


def test_ventricles_open_and_close_with_the_position():
    def dark_fraction_of_centre(position):
        centre = phantom.slice_image(0, 5, position)[32:64, 38:58]
        return (centre < 70).mean()

    assert dark_fraction_of_centre(8) > 2 * max(dark_fraction_of_centre(1), dark_fraction_of_centre(15))


def test_positions_outside_the_head_are_refused():
    with pytest.raises(ValueError, match="position 16"):
        phantom.slice_image(0, 1, 16)


def test_written_slices_can_be_loaded(tmp_path):
    phantom.write_pngs(tmp_path, num_subjects=5, num_positions=2, image_size=48, seed=3)
    slices = dataset.load(tmp_path, image_size=48, seed=0)
    assert {split: len(split_slices) for split, split_slices in slices.items()} == {
        "train": 6,
        "validate": 2,
        "test": 2,
    }
    assert np.array_equal(slices["train"].images[1, :, :, 0], phantom.slice_image(3, 1, 1, 48, 2))
    with Image.open(next(tmp_path.glob("*_train/*.png"))) as png:
        assert png.mode == "L"


@pytest.mark.parametrize(
    ("arguments", "contents"),
    [
        ({"num_subjects": 2}, ("num_subjects is 2", "at least 3")),
        ({"num_positions": 0}, ("num_positions is 0", "at least 1")),
        ({"image_size": 0}, ("image_size is 0", "at least 1")),
        ({"image_size": 4097}, ("image_size is 4097", "at most 4096")),
        ({"seed": -1}, ("seed is -1", "at least 0")),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, arguments, contents):
    with pytest.raises(console.UserError) as error:
        phantom.write_pngs(tmp_path / "new", **arguments)
    assert all(content in str(error.value) for content in contents)
    assert not (tmp_path / "new").exists()


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, phantom.__file__, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def test_the_command_writes_slices(tmp_path):
    done = run(tmp_path / "new", "--num-subjects", 3, "--num-positions", 1, "--image-size", 8)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [f"case_00{i}_slice_0.nii.png" for i in (1, 2, 3)]


def test_the_command_accepts_any_name_in_an_ascii_locale(tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(tmp_path / "größe 脑", "--num-subjects", 3, "--num-positions", 1, "--image-size", 8, **ascii_locale)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "größe 脑").rglob("*.png"))) == 3
    (tmp_path / "ö").write_text("")
    done = run(tmp_path / "ö", **ascii_locale)
    assert done.returncode == 2
    assert "\\xf6: " in done.stderr


def test_the_command_refuses_bad_input_in_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for arguments, contents in (
        ((tmp_path / "new", "--num-subjects", 2), ("num_subjects", "at least 3")),
        ((file,), (str(file), "another folder")),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert all(content in done.stderr for content in contents)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "ascii", "C"],
)
def test_help_can_be_printed_on_any_console(environment):
    done = run("--help", **environment)
    assert done.returncode == 0
    assert "--num-subjects" in done.stdout
    assert done.stderr == ""
