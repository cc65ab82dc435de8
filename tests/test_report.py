import copy
import re

import numpy as np
import pytest
from PIL import Image

import report

CONSTANTS = {"image_size": 96, "grids": [12], "num_embeddings": 512, "prior": "gated", "data_dir": "/data/<oasis>"}
HISTORY = [
    {"stage": "vqvae", "epoch": 1, "loss": 1.0, "val_loss": 1.0},
    {"stage": "prior", "epoch": 1, "loss": 4.0, "val_loss": 4.1},
    {"stage": "prior", "epoch": 2, "loss": 3.5, "val_loss": 3.7},
    {"stage": "prior", "epoch": 3, "loss": 3.0, "val_loss": 3.8},
]
SET = {
    "precision": 0.8,
    "recall": 0.7,
    "density": 0.9,
    "coverage": 0.9,
    "kernel_distance": 0.01,
    "kernel_distance_error": 0.02,
    "ms_ssim_of_pairs": 0.85,
    "told_from_real": {"accuracy": 0.55, "accuracy_interval": [0.5, 0.6]},
    "nearest_train_pixels": 1.0,
    "nearest_train_features": 1.0,
    "copies_pixels": 0.01,
    "copies_features": 0.01,
}
PICTURES = sorted(report.CAPTIONS.keys() - {"levels.png"})
ROW = {"ssim": 0.9, "ssim_brain": 0.8, "ms_ssim": 0.95, "psnr_db": 25.0, "mae": 0.02}
NUMBERS = {
    "test_slices": 24,
    "test_people": 6,
    **ROW,
    **{f"{name}_interval": [value - 0.01, value + 0.01] for name, value in ROW.items()},
    "worst_slices": [{"index": 3, "case": "case_<b>", "position": 7, **ROW}],
    "half_power_frequency": 0.25,
    "codes_used": 1.0,
    "perplexity": 300.0,
    "independent_bits_per_image": 1200.0,
    "prior_bits_per_code": 5.0,
    "prior_bits_per_image": 720.0,
    "bits_per_dimension": 2.0,
    "prior_bits_per_dimension": 0.1,
    "decoder_bits_per_dimension": 1.9,
    "histogram_bits_per_dimension": 3.0,
    "samples": {
        "count": 24,
        "real_ms_ssim_of_pairs": 0.85,
        "drawn": {**SET, "told_from_reconstructions": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}},
        "reconstructions": SET,
        "train": SET,
    },
}


def found(**drawn) -> dict[str, report.Finding]:
    numbers = copy.deepcopy(NUMBERS)
    numbers["samples"]["drawn"].update(drawn)
    return {finding.title: finding for finding in report.findings(CONSTANTS, numbers, HISTORY)}


def test_good_samples_are_said_to_be_good():
    findings = found()
    assert not findings["New brains: quality"].bad
    assert findings["New brains: variety"].says == "New brains are as varied as real ones."
    assert not findings["New brains: copies"].bad
    assert "0.900 (0.890 to 0.910)" in findings["Reconstruction"].says
    assert "720 bits an image" in findings["Reconstruction"].says


@pytest.mark.parametrize(
    ("drawn", "title", "says"),
    [
        (
            {"told_from_real": {"accuracy": 0.97, "accuracy_interval": [0.9, 1.0]}},
            "New brains: quality",
            "finds them out",
        ),
        (
            {"told_from_reconstructions": {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0]}},
            "New brains: quality",
            "the prior arranges codes in ways that real slices do not",
        ),
        ({"kernel_distance": 0.5}, "New brains: quality", "Kernel distance 0.500 ± 0.020"),
        ({"ms_ssim_of_pairs": 0.9}, "New brains: variety", "0.900 on average, two real slices 0.850"),
        ({"coverage": 0.4}, "New brains: variety", "Coverage 0.40"),
        ({"copies_features": 0.3}, "New brains: copies", "In features, 30.0\u00a0% of new brains"),
    ],
)
def test_what_is_not_good_is_said(drawn, title, says):
    finding = found(**drawn)[title]
    assert any(says in item for item in finding.bad)
    assert not any(says in item for item in finding.good)


def test_a_prior_that_learns_by_heart_is_told_by_its_best_epoch():
    assert any("best epoch of the prior, 2, its loss is 3.50" in item for item in found()["Prior"].bad)


def test_two_levels_are_told_apart():
    both = {name: {"top": NUMBERS[name], "bottom": 0.5} for name in ("codes_used", "perplexity", "prior_bits_per_code")}
    history = [{**row, "stage": f"{level}_prior"} for row in HISTORY[1:] for level in ("top", "bottom")]
    prior = report.findings(CONSTANTS, {**NUMBERS, **both}, history)[1]
    assert "5.00 bits a top code and 0.50 bits a bottom code, 720 bits an image" in prior.says
    assert any("100\u00a0% of 512 top codes" in item for item in prior.good)
    assert any("50\u00a0% of 512 bottom codes" in item for item in prior.bad)


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in PICTURES:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


def write(folder, numbers=NUMBERS, note="") -> str:
    report.write(folder / "report.html", folder.name, CONSTANTS, numbers, HISTORY, note)
    assert not list(folder.glob("*.tmp"))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_is_one_file_that_needs_no_other(run_folder):
    page = write(run_folder)
    assert page.count('src="data:image/png;base64,') == len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "http" not in page


def test_names_cannot_break_the_page(run_folder):
    page = write(run_folder)
    assert "case_&lt;b&gt;" in page
    assert "<oasis>" not in page


def test_the_note_stands_in_the_report(run_folder):
    assert "SYNTHETIC slices" in write(run_folder, note="SYNTHETIC slices, not real brains")
    assert "SYNTHETIC" not in write(run_folder)


def test_numbers_that_could_not_be_measured_leave_a_dash(run_folder):
    numbers = copy.deepcopy(NUMBERS)
    nothing = dict.fromkeys(SET) | {"told_from_real": {"accuracy": None, "accuracy_interval": [None, None]}}
    for name in ("drawn", "reconstructions", "train"):
        kept = {key: value for key, value in SET.items() if "copies" in key or "nearest" in key}
        numbers["samples"][name] = {**nothing, **kept}
    numbers["samples"]["drawn"]["told_from_reconstructions"] = nothing["told_from_real"]
    numbers["samples"]["real_ms_ssim_of_pairs"] = None
    numbers["ssim_brain"] = numbers["worst_slices"][0]["ssim_brain"] = None
    numbers["ssim_brain_interval"] = [None, None]
    page = write(run_folder, numbers)
    assert "–" in page
    assert "None" not in page.split("Every constant")[0]
    assert "Too few people" in page
