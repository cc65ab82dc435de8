"""That the page is served, to whom, and that it works in a browser."""

import base64
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import app
import console
import editing
from studio import FIRST_COUNT, Studio
from tests import test_studio
from tests.test_studio import SETTINGS


@pytest.fixture(scope="module")
def studio() -> Studio:
    return test_studio.small_studio()


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


def test_the_page_loads_nothing_from_elsewhere(port):
    status, page = send(port, "GET", "/")
    assert status == 200
    assert page == app.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    status, info = send(port, "GET", "/api/info")
    assert (info["size"], info["grids"], info["positions"], info["sharp"]) == (32, [4], [0, 1, 2], True)
    assert sum(info["unseen"]["counts"]) == 3
    assert (info["unseen"]["edges"][0], info["unseen"]["edges"][-1]) == (10, 30)


def test_the_page_draws_at_first_what_the_studio_has_prepared():
    page = app.PAGE.read_text(encoding="utf-8")
    assert re.search(r'id="count" .*value="(\d+)"', page)[1] == str(FIRST_COUNT)


def test_requests_reach_the_tools_and_their_answers_the_page(port, studio):
    request = {"position": 1, "count": 1, **SETTINGS}
    assert post(port, "draw", request) == (200, studio.draw(request))
    assert post(port, "draw", request | {"count": 0}) == (
        400,
        {"error": "count is 0: must be a whole number from 1 to 48"},
    )


def test_files_reach_the_tools_with_their_names(port):
    def opened(name: str, content: bytes = b"text") -> tuple[int, Any]:
        return post(port, "open", content, X_File_Name=base64.b64encode(name.encode()).decode())

    status, answer = opened("Gehirn ü_slice_2.png", test_studio.png())
    assert (status, answer["position"]) == (200, 2)
    assert opened("../../up.png", b"") == (400, {"error": "up.png: is empty"})
    assert "X-File-Name is missing" in opened("")[1]["error"]


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
    (tmp_path / "case_001_slice_1.png").write_bytes(test_studio.png())
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
