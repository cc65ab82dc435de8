"""What the tools of the page answer, and what they refuse."""

import base64
import io
import json
import re
import struct
import zlib
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import app
import phantom
import studio as tools
from studio import BadRequest, Studio
from tests import test_generator

SETTINGS = {"seed": 5, "temperature": 1.0, "top_p": 1.0}


def small_studio() -> Studio:
    """The tools with small networks and three slices of unseen subjects."""
    small = test_generator.make((4,))
    decoder = test_generator.sharp_decoder(small.vqvae)
    return Studio(small.replace(decoder=decoder), "small", np.array([30.0, 10.0, 20.0]))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return small_studio()


def ask(studio: Studio, tool: str, **request: Any) -> dict[str, Any]:
    """The answer of a tool as the page gets it: as JSON."""
    return json.loads(json.dumps(studio.tools[tool](json.loads(json.dumps(request)))))


@pytest.fixture(scope="module")
def brain(studio) -> dict[str, Any]:
    return ask(studio, "draw", position=1, count=2, **SETTINGS)["brains"][0]


def pixels(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)


def png(size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(phantom.slice_image(0, 1, 8, size)).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(*cells: int) -> list[int]:
    return [int(i in cells) for i in range(16)]


# ------------------------------------------------------------------------------------------------- brains


def test_brains_are_reproduced_by_their_seed(studio, brain):
    again = ask(studio, "draw", position=1, count=2, **SETTINGS)["brains"]
    assert again[0] == brain
    assert again[1]["codes"] != brain["codes"]
    codes = studio.generator.sample_codes([1], seed=5)
    assert np.array_equal(brain["codes"][0], codes[0][0])
    expected = (studio.generator.draw(codes, 5)[0, ..., 0] * 255).round()
    assert np.array_equal(pixels(brain["image"]), expected)
    assert ask(studio, "redraw", brain=again[1], count=1, seed=again[1]["noise"])["brains"] == again[1:]


def test_the_last_seed_is_its_own(studio):
    last = {"seed": tools.NUM_SEEDS - 1}
    brains = ask(studio, "draw", position=1, count=2, **SETTINGS | last)["brains"]
    assert [one["noise"] for one in brains] == [tools.NUM_SEEDS - 1, 0]


def test_the_same_codes_are_redrawn_with_other_noise(studio, brain):
    answer = ask(studio, "redraw", brain=brain, count=3, seed=brain["noise"])
    assert answer["brains"][0] == brain
    assert len({one["image"] for one in answer["brains"]}) == 3
    assert pixels(answer["deviation"]).shape == (32, 32, 3)


def test_a_region_gets_other_codes(studio, brain):
    request = {"brain": brain, "drawn": drawn(14, 15), "count": 4, **SETTINGS}
    answer = ask(studio, "vary", **request)
    assert answer["exact"]
    for one in answer["brains"]:
        assert np.array_equal(np.ravel(one["codes"])[:14], np.ravel(brain["codes"])[:14])
        assert one["noise"] == brain["noise"]
    assert len({str(one["codes"]) for one in answer["brains"]}) > 1
    assert not ask(studio, "vary", **request | {"drawn": drawn(0)})["exact"]


def test_an_image_is_completed(studio, brain):
    region = drawn(2, 3, 6, 7, 10, 11, 14, 15)
    answer = ask(studio, "complete", image=brain["image"], position=1, drawn=region, count=2, **SETTINGS)
    assert not answer["exact"]
    for url in answer["images"]:
        assert np.array_equal(pixels(url)[:, :16], pixels(brain["image"])[:, :16])
    assert not np.array_equal(*map(pixels, answer["images"]))


def test_films(studio, brain):
    other = ask(studio, "draw", position=2, count=1, **SETTINGS | {"seed": 9})["brains"][0]
    answer = ask(studio, "walk", first=brain, second=other, steps=4)
    assert answer["images"][0] == brain["image"]
    assert len(set(answer["images"])) == 4
    with Image.open(io.BytesIO(base64.b64decode(answer["film"].partition(",")[2]))) as film:
        assert (film.n_frames, film.size) == (6, (32, 32))  # There and back again, without repeating the ends.
    answer = ask(studio, "positions", **SETTINGS)
    assert answer["positions"] == [0, 1, 2]
    assert len(answer["images"]) == 3


@pytest.mark.parametrize("grids", [(4,), (4, 8)], ids=["one level", "two levels"])
def test_runs_of_any_kind_work_in_every_tool(grids):
    """Without a sharp decoder or slices of unseen people, at another size, and with two levels of codes."""
    plain = Studio(test_generator.make(grids), "plain", np.array([]))
    assert plain.info()["unseen"]["counts"] == []
    brain, other = ask(plain, "draw", position=1, count=2, **SETTINGS)["brains"]
    assert [np.shape(level) for level in brain["codes"]] == [(grid, grid) for grid in grids]
    assert ask(plain, "redraw", brain=brain, count=1, seed=7)["brains"][0]["image"] == brain["image"]
    region = {"drawn": [0] * (grids[-1] ** 2 // 2) + [1] * (grids[-1] ** 2 // 2), "count": 1, **SETTINGS}
    varied = ask(plain, "vary", brain=brain, **region)
    completed = ask(plain, "complete", image=brain["image"], position=1, **region)
    assert varied["exact"] == completed["exact"] == (len(grids) == 1)
    assert np.array_equal(pixels(completed["images"][0])[:16], pixels(brain["image"])[:16])
    assert len(ask(plain, "walk", first=brain, second=other, steps=2)["images"]) == 2
    assert len(ask(plain, "positions", **SETTINGS)["images"]) == 3
    own = ask(plain, "slice", image=brain["image"], position=None)
    assert [pixels(url).shape for url in own["bits_maps"]] == [(32, 32, 3)] * len(grids)
    assert own["fraction_below"] is None


def test_the_networks_that_come_along_are_small_and_draw_brains():
    files = [path for path in app.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
    assert json.loads((app.WEIGHTS / "config.json").read_text())["constants"]["data_dir"] is None
    own = Studio.load(app.WEIGHTS)
    images = own.generator.sample([14, 14], seed=1)
    assert len(own.unseen_bits) == 360
    assert np.all(images.mean(axis=(1, 2, 3)) > 0.1)
    assert not images[:, :4, :4].any()
    assert np.abs(images[0] - images[1]).mean() > 0.01


# ------------------------------------------------------------------------------------------------- files


def test_a_png_is_reconstructed_and_its_position_found(studio):
    opened = studio.open_file("Gehirn ü_slice_2.png", png())
    assert opened["position"] == 2
    own = ask(studio, "slice", image=opened["image"], position=2)
    codes = [np.array(level)[None] for level in own["brain"]["codes"]]
    bits = studio.generator.bits_of_codes(codes, [2])[0]
    assert own["bits"] == pytest.approx(bits, rel=1e-5)
    assert own["fraction_below"] == pytest.approx(np.mean(np.array([10, 20, 30]) < bits))
    assert pixels(own["error"]).shape == pixels(own["bits_maps"][0]).shape == (32, 32, 3)
    found = ask(studio, "slice", image=opened["image"], position=None)
    every = [studio.generator.bits_of_codes(codes, [position])[0] for position in range(3)]
    assert found["brain"]["position"] == int(np.argmin(every))


def volume(tmp_path, affine: np.ndarray) -> bytes:
    """The bytes of a volume with 12 planes."""
    planes = np.stack([phantom.slice_image(0, 1, position, 40) for position in range(12)], axis=-1)
    nib.save(nib.Nifti1Image(planes.astype(np.int16), affine), tmp_path / "v.nii.gz")
    return (tmp_path / "v.nii.gz").read_bytes()


def test_a_volume_is_cut_at_any_height(studio, tmp_path):
    opened = studio.open_file("v.nii.gz", volume(tmp_path, np.diag([4.0, 4, 4, 1])))
    assert opened["is_oriented"]
    cuts = [ask(studio, "slice", **opened, height=height, position=1)["original"] for height in (10, 60)]
    assert cuts[0] != cuts[1]
    with pytest.raises(BadRequest, match="open it again"):
        ask(studio, "slice", volume="gone", height=5, position=1)


def test_a_volume_that_does_not_say_where_its_axes_point_needs_an_orientation(studio, tmp_path):
    content = volume(tmp_path, np.eye(4))
    assert not studio.open_file("v.nii.gz", content)["is_oriented"]
    assert studio.open_file("v.nii.gz", content, "ras")["is_oriented"]
    with pytest.raises(BadRequest, match="orientation is abc"):
        studio.open_file("v.nii.gz", content, "abc")


def test_the_number_of_volumes_in_memory_is_limited(studio, tmp_path):
    content = volume(tmp_path, np.diag([4.0, 4, 4, 1]))
    keys = [studio.open_file("v.nii.gz", content)["volume"] for _ in range(tools.MAX_VOLUMES + 1)]
    assert list(studio.volumes) == keys[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"text", "notes.txt: is neither a PNG nor a NIfTI or MGH volume"),
        ("broken.png", b"text", "broken.png: is not a PNG image in spite of its name"),
        ("broken.nii", b"text", "broken.nii: is not a readable volume"),
        ("brain.hdr", b"text", "brain.hdr: Analyze volumes consist of two files"),
        ("up.png", b"", "up.png: is empty"),
    ],
)
def test_files_that_cannot_be_read_are_named(studio, name, content, message):
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}") as error:
        studio.open_file(name, content)
    assert "/tmp" not in str(error.value)


def test_a_slice_without_a_brain_is_refused(studio):
    with pytest.raises(BadRequest, match="the slice shows no brain"):
        ask(studio, "slice", image=tools._image_url(np.zeros((32, 32, 1))), position=None)


# ------------------------------------------------------------------------------------------------- requests


def png_url(size: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(size)).decode()}"


def huge_png() -> str:
    """A PNG whose header promises more pixels than fit into memory."""
    content = png()
    header = content[12:16] + struct.pack(">II", 50000, 50000) + content[24:29]
    content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


WRONG = [
    ("draw", {"position": 9}, "position is 9: must be a whole number from 0 to 2"),
    ("draw", {"count": 0}, "count is 0"),
    ("draw", {"count": True}, "count is True"),
    ("draw", {"seed": -1}, "seed is -1"),
    ("draw", {"temperature": "hot"}, "temperature is 'hot': must be a number from 0.05 to 5"),
    ("draw", {"temperature": float("nan")}, "temperature is nan"),
    ("draw", {"top_p": 0}, "top_p is 0"),
    ("redraw", {"brain": None}, "brain is missing: draw or open a brain first"),
    ("redraw", {"brain": {"codes": [[[1, 2], [3, 4]]]}}, "brain has codes of another shape than small uses"),
    ("redraw", {"brain": {"codes": [[["a"] * 4] * 4]}}, "brain has codes that are not whole numbers"),
    ("redraw", {"brain": {"codes": [[[0.5] * 4] * 4]}}, "brain has codes that are not whole numbers"),
    ("redraw", {"brain": {"codes": [[[10**30] * 4] * 4]}}, "brain has codes that are not whole numbers"),
    ("redraw", {"brain": {"codes": [[[1], [1, 2]]]}}, "brain has codes of another shape than small uses"),
    ("redraw", {"brain": {"codes": [[[99] * 4] * 4]}}, "brain has codes outside of 0 to 15"),
    ("complete", {"image": "data:image/png;base64,AAAA"}, "image: is not a PNG"),
    ("complete", {"image": "data:image/png;base64,A"}, "image: is not base64"),
    ("complete", {"image": huge_png()}, "image: has 50000 × 50000 pixels, too large"),
    ("complete", {"image": png_url(33)}, "image: has 33 × 33 pixels, must have 32 × 32"),
    ("complete", {"image": None}, "image is missing"),
    ("complete", {"drawn": [0] * 16}, "drawn must be 16 numbers, 0 or 1, and not all 0"),
    ("complete", {"drawn": [[1]] * 16}, "drawn must be 16 numbers"),
    ("walk", {"steps": 1}, "steps is 1"),
]


@pytest.mark.parametrize(("tool", "change", "message"), WRONG)
def test_wrong_requests_are_refused_with_a_message(studio, brain, tool, change, message):
    request = {"position": 1, "count": 1, **SETTINGS, "brain": brain, "first": brain, "second": brain}
    request |= {"steps": 3, "image": brain["image"], "drawn": drawn(3), **change}
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}"):
        ask(studio, tool, **request)
