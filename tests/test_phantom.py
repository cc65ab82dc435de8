import numpy as np
import pytest
from PIL import Image

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
    assert image[inside].std() > 20  # is not one grey


def test_ventricles_open_and_close_with_the_position():
    def dark_centre(position):
        centre = phantom.slice_image(0, 5, position)[32:64, 38:58]
        return (centre < 70).mean()

    assert dark_centre(8) > 2 * max(dark_centre(1), dark_centre(15))


def test_positions_outside_the_head_are_refused():
    with pytest.raises(ValueError, match="position 16"):
        phantom.slice_image(0, 1, 16)


def test_written_slices_pass_through_the_loader(tmp_path):
    phantom.write_pngs(tmp_path, num_cases=5, num_positions=2, image_size=48, seed=3)
    slices = dataset.load(tmp_path, image_size=48, seed=0)
    assert {split: len(held) for split, held in slices.items()} == {"train": 6, "validate": 2, "test": 2}
    assert np.array_equal(slices["train"].images[1, :, :, 0], phantom.slice_image(3, 1, 1, 48, 2))
    with Image.open(next(tmp_path.glob("*_train/*.png"))) as picture:
        assert picture.mode == "L"


def test_too_few_people_for_three_splits(tmp_path):
    with pytest.raises(ValueError, match="num_cases is 2"):
        phantom.write_pngs(tmp_path, num_cases=2)
