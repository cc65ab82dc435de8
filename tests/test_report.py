import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import plots
import report

CONSTANTS = {"image_size": 96, "grids": [12], "num_embeddings": 512, "prior": "gated", "data_dir": "/data/<oasis>"}
HISTORY = [
    {"stage": "vqvae", "epoch": 1, "loss": 1.0, "val_loss": 1.0},
    {"stage": "prior", "epoch": 1, "loss": 4.0, "val_loss": 4.1},
    {"stage": "prior", "epoch": 2, "loss": 3.5, "val_loss": 3.7},
    {"stage": "prior", "epoch": 3, "loss": 3.0, "val_loss": 3.8},
]
SET = {
    "c2st_real": {"accuracy": 0.55, "accuracy_interval": [0.5, 0.6]},
    "precision": 0.8,
    "recall": 0.7,
    "density": 0.9,
    "coverage": 0.9,
    "mmd2": 0.01,
    "mmd2_error": 0.02,
    "ms_ssim_of_pairs": 0.85,
    "nn_distance_ratio_pixels": 1.0,
    "nn_distance_ratio_features": 1.0,
    "near_duplicate_rate_pixels": 0.01,
    "near_duplicate_rate_features": 0.01,
}
ROW = {"ssim": 0.9, "ssim_brain": 0.8, "ms_ssim": 0.95, "psnr_db": 25.0, "mae": 0.02}
NUMBERS = {
    "test_slices": 24,
    "test_subjects": 6,
    **ROW,
    **{f"{name}_interval": [value - 0.01, value + 0.01] for name, value in ROW.items()},
    "worst_slices": [{"index": 3, "subject": "case_<b>", "position": 7, **ROW}],
    "half_power_frequency": 0.25,
    "codes_used": 1.0,
    "perplexity": 300.0,
    "marginal_entropy_bits_per_image": 1200.0,
    "prior_bits_per_code": 5.0,
    "prior_bits_per_image": 720.0,
    "bits_per_dimension": 2.0,
    "prior_bits_per_dimension": 0.1,
    "decoder_bits_per_dimension": 1.9,
    "histogram_bits_per_dimension": 3.0,
    "samples": {"count": 24, **SET, "c2st_reconstructions": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}},
    "references": {"reconstructions": SET, "other_subjects": SET, "real_ms_ssim_of_pairs": 0.85},
}


def findings_by_title(numbers=NUMBERS, **samples) -> dict[str, report.Finding]:
    numbers = {**numbers, "samples": {**numbers["samples"], **samples}}
    return {finding.title: finding for finding in report.findings(CONSTANTS, numbers, HISTORY)}


def test_good_samples_have_good_findings():
    findings = findings_by_title()
    assert not findings["Samples: quality"].bad
    assert "as varied as" in findings["Samples: variety"].summary
    assert not findings["Samples: memorisation"].bad
    assert "0.900 (0.890 to 0.910)" in findings["Reconstruction"].summary
    assert "720 bits per image" in findings["Reconstruction"].summary


@pytest.mark.parametrize(
    ("samples", "title", "words"),
    [
        ({"c2st_real": {"accuracy": 0.97, "accuracy_interval": [0.9, 1.0]}}, "Samples: quality", "small classifier"),
        (
            {"c2st_reconstructions": {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0]}},
            "Samples: quality",
            "the prior arranges codes differently",
        ),
        ({"mmd2": 0.5}, "Samples: quality", "0.500 ± 0.020"),
        ({"ms_ssim_of_pairs": 0.9}, "Samples: variety", "0.900"),
        ({"coverage": 0.4}, "Samples: variety", "coverage 0.40"),
        ({"near_duplicate_rate_features": 0.3}, "Samples: memorisation", "In features, 30.0\u00a0%"),
    ],
)
def test_weaknesses_are_listed_as_bad(samples, title, words):
    finding = findings_by_title(**samples)[title]
    assert any(words in sentence for sentence in finding.bad)
    assert not any(words in sentence for sentence in finding.good)


def test_blur_is_listed_as_bad():
    assert any("Blur: details smaller than 2.0 pixels" in item for item in findings_by_title()["Reconstruction"].bad)
    sharp = findings_by_title({**NUMBERS, "half_power_frequency": 0.5})["Reconstruction"]
    assert not any("Blur" in item for item in sharp.bad)


def test_overfitting_of_the_prior_is_judged_by_its_best_epoch():
    bad = [item for item in findings_by_title()["Prior"].bad if "overfit" in item]
    assert len(bad) == 1
    assert "epoch (2)" in bad[0]
    assert "3.50 nats per code" in bad[0]


def test_findings_of_two_levels_name_the_level():
    both = {name: {"top": NUMBERS[name], "bottom": 0.5} for name in ("codes_used", "perplexity", "prior_bits_per_code")}
    history = [{**row, "stage": f"{level}_prior"} for row in HISTORY[1:] for level in ("top", "bottom")]
    prior = report.findings(CONSTANTS, {**NUMBERS, **both}, history)[1]
    assert "5.00 bits per top code and 0.50 bits per bottom code" in prior.summary
    assert "720 bits per image" in prior.summary
    assert any("100\u00a0% of the 512 top codes" in item for item in prior.good)
    assert any("50\u00a0% of the 512 bottom codes" in item for item in prior.bad)


def draw_blank_pictures(folder, num_levels):
    (folder / "images").mkdir()
    for picture in plots.pictures(num_levels):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "images" / f"{picture.name}.png")


@pytest.fixture
def run_folder(tmp_path):
    draw_blank_pictures(tmp_path, num_levels=1)
    return tmp_path


def write(folder, numbers=NUMBERS, note="", constants=CONSTANTS, history=HISTORY) -> str:
    results = SimpleNamespace(numbers=numbers, history=history, note=note)
    report.write(folder / "report.html", folder.name, constants, results)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report_is_self_contained(run_folder):
    page = write(run_folder)
    assert page.startswith("<!doctype html>")
    assert page.count('src="data:image/png;base64,') == len(plots.pictures(1))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "http" not in page


def test_report_shows_the_captions_in_order_samples_first(run_folder):
    page = write(run_folder)
    escaped = [picture.caption.replace("'", "&#39;") for picture in plots.pictures(1)]
    places = [page.index(caption) for caption in escaped]
    assert places == sorted(places)
    names = [picture.name for picture in plots.PICTURES[: report.LEADING_PICTURES]]
    assert names == ["samples_by_position", "samples", "reconstructions"]
    first_finding = page.index("Samples: quality")
    assert places[report.LEADING_PICTURES - 1] < first_finding < places[report.LEADING_PICTURES]


def test_report_of_two_levels_has_all_pictures(tmp_path):
    draw_blank_pictures(tmp_path, num_levels=2)
    keys = ("codes_used", "perplexity", "prior_bits_per_code")
    numbers = {**NUMBERS, **{name: {"top": 1.0, "bottom": 1.0} for name in keys}}
    history = [{**row, "stage": stage} for row in HISTORY for stage in ("vqvae", "top_prior", "bottom_prior")]
    page = write(tmp_path, numbers, constants={**CONSTANTS, "grids": [16, 32]}, history=history)
    assert page.count('src="data:image/png;base64,') == len(plots.PICTURES)
    assert "16\u00a0×\u00a016 and 32\u00a0×\u00a032" in page
    assert "(top prior)" in page


def test_names_are_escaped(run_folder):
    page = write(run_folder)
    assert "case_&lt;b&gt;" in page
    assert "<oasis>" not in page


def test_note_is_shown(run_folder):
    assert "SYNTHETIC slices" in write(run_folder, note="SYNTHETIC slices, not real brains")
    assert "SYNTHETIC" not in write(run_folder)


def test_undefined_numbers_become_dashes(run_folder):
    numbers = copy.deepcopy(NUMBERS)
    undefined = {key: None for key in SET if not key.startswith(("nn_", "near_"))}
    undefined["c2st_real"] = {"accuracy": None, "accuracy_interval": [None, None]}
    for measured in (
        numbers["samples"],
        *(numbers["references"][name] for name in ("reconstructions", "other_subjects")),
    ):
        measured.update(undefined)
    numbers["samples"]["c2st_reconstructions"] = undefined["c2st_real"]
    numbers["references"]["real_ms_ssim_of_pairs"] = None
    numbers["ssim_brain"] = numbers["worst_slices"][0]["ssim_brain"] = None
    numbers["ssim_brain_interval"] = [None, None]
    page = write(run_folder, numbers)
    assert "–" in page
    assert "None" not in page.split("<summary>Configuration")[0]
    assert "too few test subjects" in page
