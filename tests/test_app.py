"""What the page can do, what it refuses, and that it works in a browser."""

import base64
import http.client
import io
import json
import re
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import app
import console
import editing
import phantom
import sharp
from tests import test_generator

SETTINGS = {"seed": 5, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def studio() -> app.Studio:
    small = test_generator.make((4,))
    decoder = test_generator.with_random_weights(sharp.SharpDecoder.untrained(small.vqvae, detail_channels=8))
    return app.Studio(small.replace(decoder=decoder), "small", np.array([30.0, 10.0, 20.0]))


@pytest.fixture(scope="module")
def port(studio) -> Iterator[int]:
    server = app.make_server(studio, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def send(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Send a request; returns the status, and the answer's JSON or text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, content, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if response.headers["Content-Type"] == "application/json" else text


def post(port: int, name: str, body: Any, **headers: str) -> tuple[int, Any]:
    return send(port, "POST", f"/api/{name}", body, {k.replace("_", "-"): v for k, v in headers.items()})


def open_file(port: int, name: str, content: bytes, **headers: str) -> tuple[int, Any]:
    return post(port, "open", content, X_File_Name=base64.b64encode(name.encode()).decode(), **headers)


def pixels(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)


def png(size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(phantom.slice_image(0, 1, 8, size)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def brain(port) -> dict[str, Any]:
    status, answer = post(port, "draw", {"position": 1, "count": 2, **SETTINGS})
    assert status == 200
    return answer["brains"][0]


def plain(brain: dict[str, Any]) -> dict[str, Any]:
    return {name: brain[name] for name in ("codes", "noise", "position")}


def drawn(*cells: int) -> list[int]:
    return [int(i in cells) for i in range(16)]


def test_the_page_loads_nothing_from_elsewhere(port):
    status, page = send(port, "GET", "/")
    assert status == 200
    assert page == app.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    status, info = send(port, "GET", "/api/info")
    assert (info["size"], info["grids"], info["positions"], info["sharp"]) == (32, [4], [0, 1, 2], True)
    assert sum(info["unseen"]["counts"]) == 3
    assert (info["unseen"]["edges"][0], info["unseen"]["edges"][-1]) == (10, 30)


def test_brains_are_reproduced_by_their_seed(port, studio, brain):
    again = post(port, "draw", {"position": 1, "count": 2, **SETTINGS})[1]["brains"]
    assert again[0] == brain
    assert again[1]["codes"] != brain["codes"]
    codes = studio.generator.sample_codes([1], seed=5)
    assert np.array_equal(brain["codes"][0], codes[0][0])
    expected = (studio.generator.draw(codes, 5)[0, ..., 0] * 255).round()
    assert np.array_equal(pixels(brain["image"]), expected)
    alone = post(port, "redraw", {"brain": plain(again[1]), "count": 1, "seed": again[1]["noise"]})[1]["brains"]
    assert alone == again[1:]


def test_the_last_seed_is_its_own(port, brain):
    last = {"seed": app.NUM_SEEDS - 1}
    brains = post(port, "draw", {"position": 1, "count": 2, **SETTINGS, **last})[1]["brains"]
    assert [one["noise"] for one in brains] == [app.NUM_SEEDS - 1, 0]


def test_the_same_codes_are_redrawn_with_other_noise(port, brain):
    status, answer = post(port, "redraw", {"brain": plain(brain), "count": 3, "seed": brain["noise"]})
    assert status == 200
    assert answer["brains"][0] == brain
    assert len({one["image"] for one in answer["brains"]}) == 3
    assert pixels(answer["deviation"]).shape == (32, 32, 3)


def test_a_region_gets_other_codes(port, brain):
    request = {"brain": plain(brain), "drawn": drawn(14, 15), "count": 4, **SETTINGS}
    status, answer = post(port, "vary", request)
    assert (status, answer["exact"]) == (200, True)
    for one in answer["brains"]:
        assert np.array_equal(np.ravel(one["codes"])[:14], np.ravel(brain["codes"])[:14])
        assert one["noise"] == brain["noise"]
    assert len({str(one["codes"]) for one in answer["brains"]}) > 1
    assert not post(port, "vary", request | {"drawn": drawn(0)})[1]["exact"]


def test_an_image_is_completed(port, brain):
    request = {
        "image": brain["image"],
        "position": 1,
        "drawn": drawn(2, 3, 6, 7, 10, 11, 14, 15),
        "count": 2,
        **SETTINGS,
    }
    status, answer = post(port, "complete", request)
    assert (status, answer["exact"]) == (200, False)
    for url in answer["images"]:
        assert np.array_equal(pixels(url)[:, :16], pixels(brain["image"])[:, :16])
    assert not np.array_equal(*map(pixels, answer["images"]))


def test_films(port, brain):
    other = post(port, "draw", {"position": 2, "count": 1, **SETTINGS, "seed": 9})[1]["brains"][0]
    images = post(port, "walk", {"first": plain(brain), "second": plain(other), "steps": 4})[1]["images"]
    assert images[0] == brain["image"]
    assert len(set(images)) == 4
    answer = post(port, "walk", {"first": plain(brain), "second": plain(other), "steps": 4})[1]
    with Image.open(io.BytesIO(base64.b64decode(answer["film"].partition(",")[2]))) as film:
        assert (film.n_frames, film.size) == (6, (32, 32))  # There and back again, without repeating the ends.
    answer = post(port, "positions", SETTINGS)[1]
    assert answer["positions"] == [0, 1, 2]
    assert len(answer["images"]) == 3


def test_a_png_is_reconstructed_and_its_position_found(port, studio):
    status, opened = open_file(port, "Gehirn ü_slice_2.png", png())
    assert (status, opened["position"]) == (200, 2)
    own = post(port, "slice", {"image": opened["image"], "position": 2})[1]
    codes = [np.array(level)[None] for level in own["brain"]["codes"]]
    bits = studio.generator.bits_of_codes(codes, [2])[0]
    assert own["bits"] == pytest.approx(bits, rel=1e-5)
    assert own["fraction_below"] == pytest.approx(np.mean(np.array([10, 20, 30]) < bits))
    assert pixels(own["error"]).shape == pixels(own["bits_maps"][0]).shape == (32, 32, 3)
    found = post(port, "slice", {"image": opened["image"], "position": None})[1]
    every = [studio.generator.bits_of_codes(codes, [position])[0] for position in range(3)]
    assert found["brain"]["position"] == int(np.argmin(every))


def test_a_volume_is_cut_at_any_height(port, tmp_path):
    planes = [phantom.slice_image(0, 1, position, 40) for position in range(12)]
    nib.save(
        nib.Nifti1Image(np.stack(planes, axis=-1).astype(np.int16), np.diag([4.0, 4, 4, 1])), tmp_path / "v.nii.gz"
    )
    status, opened = open_file(port, "v.nii.gz", (tmp_path / "v.nii.gz").read_bytes())
    assert status == 200
    cuts = [post(port, "slice", {**opened, "height": height, "position": 1})[1]["original"] for height in (10, 60)]
    assert cuts[0] != cuts[1]
    status, _ = open_file(port, "v.nii.gz", (tmp_path / "v.nii.gz").read_bytes(), X_Orientation="lia")
    assert status == 200
    assert opened["is_oriented"]
    nib.save(nib.Nifti1Image(np.stack(planes, axis=-1).astype(np.int16), np.eye(4)), tmp_path / "w.nii.gz")
    for letters, is_oriented in (("", False), ("RAS", True)):
        content = (tmp_path / "w.nii.gz").read_bytes()
        assert open_file(port, "w.nii.gz", content, X_Orientation=letters)[1]["is_oriented"] == is_oriented
    status, answer = open_file(port, "v.nii.gz", (tmp_path / "v.nii.gz").read_bytes(), X_Orientation="abc")
    assert status == 400
    assert "orientation is abc" in answer["error"]
    assert "open it again" in post(port, "slice", {"volume": "gone", "height": 5, "position": 1})[1]["error"]


def test_the_number_of_volumes_in_memory_is_limited(port, studio, tmp_path):
    nib.save(
        nib.Nifti1Image(np.eye(8, dtype=np.int16)[..., None].repeat(8, 2), np.diag([4.0, 4, 4, 1])), tmp_path / "v.nii"
    )
    keys = [
        open_file(port, "v.nii", (tmp_path / "v.nii").read_bytes())[1]["volume"] for _ in range(app.MAX_VOLUMES + 1)
    ]
    assert list(studio.volumes) == keys[1:]


def test_a_slice_without_a_brain_is_refused(port):
    black = app._image_url(np.zeros((32, 32, 1)))
    status, answer = post(port, "slice", {"image": black, "position": None})
    assert (status, answer["error"][:24]) == (400, "the slice shows no brain")


@pytest.mark.parametrize("grids", [(4,), (4, 8)], ids=["one level", "two levels"])
def test_runs_of_any_kind_work_in_every_tool(grids):
    """Without a sharp decoder or slices of unseen people, at another size, and with two levels of codes."""
    plain_studio = app.Studio(test_generator.make(grids), "plain", np.array([]))
    assert plain_studio.info()["unseen"]["counts"] == []
    brain, other = plain_studio.draw({"position": 1, "count": 2, **SETTINGS})["brains"]
    assert [np.shape(level) for level in brain["codes"]] == [(grid, grid) for grid in grids]
    assert plain_studio.redraw({"brain": brain, "count": 1, "seed": 7})["brains"][0]["image"] == brain["image"]
    region = {"drawn": [0] * (grids[-1] ** 2 // 2) + [1] * (grids[-1] ** 2 // 2), "count": 1, **SETTINGS}
    varied = plain_studio.vary({"brain": brain, **region})
    completed = plain_studio.complete({"image": brain["image"], "position": 1, **region})
    assert varied["exact"] == completed["exact"] == (len(grids) == 1)
    assert np.array_equal(pixels(completed["images"][0])[:16], pixels(brain["image"])[:16])
    assert len(plain_studio.walk({"first": brain, "second": other, "steps": 2})["images"]) == 2
    assert len(plain_studio.positions(SETTINGS)["images"]) == 3
    own = plain_studio.slice({"image": brain["image"], "position": None})
    assert [pixels(url).shape for url in own["bits_maps"]] == [(32, 32, 3)] * len(grids)
    assert own["fraction_below"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", b"text", "X-File-Name is missing"),
        ("notes.txt", b"text", "notes.txt: is neither a PNG nor a NIfTI or MGH volume"),
        ("broken.png", b"text", "broken.png: is not a PNG image in spite of its name"),
        ("broken.nii", b"text", "broken.nii: is not a readable volume"),
        ("brain.hdr", b"text", "brain.hdr: Analyze volumes consist of two files"),
        ("../../up.png", b"", "up.png: is empty"),
    ],
)
def test_files_that_cannot_be_read_are_named(port, name, content, message):
    status, answer = open_file(port, name, content)
    assert status == 400
    assert answer["error"].startswith(message)
    assert "/tmp" not in answer["error"]


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
def test_wrong_requests_get_status_400_and_a_message(port, brain, tool, change, message):
    request = {
        "position": 1,
        "count": 1,
        **SETTINGS,
        "brain": plain(brain),
        "first": plain(brain),
        "second": plain(brain),
    }
    request |= {"steps": 3, "image": brain["image"], "drawn": drawn(3), **change}
    status, answer = post(port, tool, request)
    assert status == 400
    assert answer["error"].startswith(message)


def test_what_is_not_json_is_refused(port):
    for content in (b"{", b"[" * 100_000, b"\xff"):
        assert post(port, "draw", content) == (400, {"error": "the request is not JSON"})
    assert post(port, "draw", [1])[1]["error"] == "the request is not a JSON object"
    assert send(port, "POST", "/api/erase", {})[0] == 404
    assert send(port, "GET", "/etc/passwd")[0] == 404


@pytest.mark.parametrize("length", [str(2**20 + 1), "-1", "9" * 5000, "many"])
def test_large_requests_are_refused_before_they_are_read(port, monkeypatch, length):
    monkeypatch.setattr(app, "MAX_BODY", 2**20)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 400
    assert "larger than 1 MB" in json.loads(response.read())["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80", "Origin": "http://evil.example"},
        {"Origin": "https://evil.example"},
    ],
)
def test_other_sites_cannot_use_the_server(port, headers):
    for method, path in (("GET", "/"), ("GET", "/api/info"), ("POST", "/api/draw")):
        status, answer = send(port, method, path, {} if method == "POST" else None, headers)
        assert status == 403
        assert "open the page at the address" in answer["error"]


@pytest.mark.parametrize(
    ("asked", "host", "port", "expected"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, True),
        ("localhost:8000", "127.0.0.1", 8000, True),
        ("127.0.0.1:8001", "127.0.0.1", 8000, False),
        ("127.0.0.1", "127.0.0.1", 8000, False),
        ("127.0.0.1", "127.0.0.1", 80, True),
        ("192.168.0.7:8000", "127.0.0.1", 8000, False),
        ("192.168.0.7:8000", "192.168.0.7", 8000, True),
        ("192.168.0.7:8000", "0.0.0.0", 8000, True),
        ("evil.example:8000", "0.0.0.0", 8000, False),
        (f"{socket.gethostname()}:8000", "0.0.0.0", 8000, True),
        ("", "0.0.0.0", 8000, False),
    ],
)
def test_a_request_must_name_the_server(asked, host, port, expected):
    assert app.is_own(asked, host, port) == expected


def test_a_page_that_is_closed_leaves_no_traceback(port, studio, monkeypatch, capfd):
    begun, release = threading.Event(), threading.Event()

    def slow(request: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        release.wait(60)
        return {"long": "x" * 10_000_000}

    monkeypatch.setitem(studio.tools, "draw", slow)
    with socket.create_connection(("127.0.0.1", port)) as closing:
        closing.sendall(f"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        assert begun.wait(60)
    release.set()
    assert send(port, "GET", "/api/info")[0] == 200
    time.sleep(0.5)
    assert capfd.readouterr().err == ""


def test_a_slow_request_does_not_block_the_page(port, studio, monkeypatch):
    begun, release = threading.Event(), threading.Event()

    def slow(request: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        release.wait(60)
        return {}

    monkeypatch.setitem(studio.tools, "draw", slow)
    waiting = threading.Thread(target=post, args=(port, "draw", {}))
    waiting.start()
    assert begun.wait(60)
    assert send(port, "GET", "/")[0] == 200
    release.set()
    waiting.join(60)


def test_an_error_in_a_tool_does_not_end_the_server(port, studio, monkeypatch, capsys):
    def fail(request: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("oops")

    monkeypatch.setitem(studio.tools, "draw", fail)
    assert post(port, "draw", {})[0] == 500
    assert "ZeroDivisionError: oops" in capsys.readouterr().err
    assert send(port, "GET", "/api/info")[0] == 200


def test_a_port_in_use_and_a_folder_without_a_run_end_with_one_line(port, studio, tmp_path, monkeypatch, capsys):
    with pytest.raises(console.UserError, match=f"--port {port}: cannot listen on 127.0.0.1"):
        app.make_server(studio, "127.0.0.1", port)
    monkeypatch.setattr("sys.argv", ["app.py", str(tmp_path)])
    assert app.command_line() == 2
    assert "contains no run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium from the system's package manager")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def reproduced(browser: Any, page: Any, selector: str) -> None:
    """Assert that a new page at the same address shows the same pictures."""
    sources = f"[...document.querySelectorAll('{selector}')].map((image) => image.src)"
    expected, other = page.evaluate(sources), browser.new_page()
    other.goto(page.url)
    other.locator(selector).nth(len(expected) - 1).wait_for(timeout=300_000)
    other.locator("#bar:not(.on)").wait_for(state="attached", timeout=300_000)
    assert other.evaluate(sources) == expected
    other.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_tool_works_in_a_browser(browser, port, tmp_path, width):
    (tmp_path / "case_001_slice_1.png").write_bytes(png())
    page, messages = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))

    def done() -> None:
        page.locator("#status", has_text=re.compile(r"^Done")).wait_for(timeout=300_000)
        page.locator("#bar:not(.on)").wait_for(state="attached", timeout=300_000)

    def click(selector: str) -> None:
        page.evaluate("document.getElementById('status').textContent = ''")
        page.click(selector)
        done()

    def pictures(gallery: str) -> int:
        return page.locator(f"{gallery} figure").count()

    page.goto(f"http://127.0.0.1:{port}/#draw?position=2&count=3&seed=11")
    done()
    assert pictures("#drawn") == 3
    assert "slice 2" in page.locator("#drawn figure").first.text_content()
    assert "seed=11" in page.evaluate("location.hash")
    page.evaluate("document.getElementById('status').textContent = ''")
    page.fill("#seed", "12")
    page.locator("#seed").dispatch_event("change")
    done()
    assert "seed=12" in page.evaluate("location.hash")
    click("[data-run=draw]")
    page.locator("#drawn img").nth(1).click()
    assert page.locator("#drawn figure.chosen").count() == 1
    assert page.locator("#drawn a").first.get_attribute("download").endswith(".png")

    page.click("nav [data-tool=vary]")
    click("[data-run=redraw]")
    assert pictures("#varied") == 4  # The last one is the deviation.
    page.click("[data-region=bottom]")
    click("[data-run=vary]")
    assert pictures("#varied") == 3
    assert page.text_content("#varied-note").startswith("Exact")
    reproduced(browser, page, "#varied img")

    page.click("nav [data-tool=slice]")
    page.evaluate("document.getElementById('status').textContent = ''")
    page.set_input_files("#file", tmp_path / "case_001_slice_1.png")
    done()
    assert pictures("#own") == 5
    assert "slice position1" in page.text_content("#facts")

    page.click("nav [data-tool=complete]")
    page.click("[data-region=none]")
    box = page.locator("#painter").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"], steps=8)
    page.mouse.up()
    click("[data-run=complete]")
    assert pictures("#completed") == 3
    assert page.text_content("#completed-note").startswith("Approximate")

    page.click("nav [data-tool=walk]")
    click("[data-run=walk]")
    assert page.get_attribute("#save-film", "href").startswith("data:image/png")
    click("[data-run=positions]")
    page.locator("#frame", has_text="slice").wait_for(timeout=60_000)

    page.click("nav [data-tool=complete]")
    page.click("[data-region=none]")
    page.click("[data-run=complete]")
    page.locator("#status.error", has_text="mark a region first").wait_for(timeout=60_000)
    page.focus("#painter")
    for key in ("ArrowRight", " "):
        page.keyboard.press(key)
    assert page.evaluate("region().reduce((sum, cell) => sum + cell, 0)") == 1
    page.focus("nav [data-tool=complete]")
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("nav [data-tool=vary]", "aria-selected") == "true"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((image) => image.alt)")
    assert messages == []
    page.close()


def test_every_control_has_a_name():
    page = app.PAGE.read_text(encoding="utf-8")
    assert not [tag for tag in re.findall(r"<canvas[^>]*>", page) if "aria-label" not in tag and "unseen" not in tag]
    for tag in re.findall(r"<(?:input|select)[^>]*>", page):
        name = re.search(r'id="([^"]+)"', tag)[1]
        assert "aria-label" in tag or re.search(rf'<label[^>]*>(?:(?!</label>).)*id="{name}"', page, re.DOTALL), tag


def test_the_page_names_every_tool(studio):
    page = Path(app.PAGE).read_text(encoding="utf-8")
    assert all(f'call("{name}"' in page for name in studio.tools)
    assert set(editing.HALVES) <= set(re.findall(r'data-region="(\w+)"', page))


def test_the_networks_that_come_along_are_small_and_draw_brains():
    files = [path for path in app.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
    assert json.loads((app.WEIGHTS / "config.json").read_text())["constants"]["data_dir"] is None
    studio = app.Studio.load(app.WEIGHTS)
    images = studio.generator.sample([14, 14], seed=1)
    assert len(studio.unseen_bits) == 360
    assert np.all(images.mean(axis=(1, 2, 3)) > 0.1)
    assert not images[:, :4, :4].any()
    assert np.abs(images[0] - images[1]).mean() > 0.01
