import errno
import hashlib
import http.server
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest

import console
import download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves files with ranges; interrupts `cuts` connections after `cut_after` bytes each."""

    files: dict[str, bytes] = {}
    cuts, cut_after = 0, 1000
    requested: list[str] = []

    def do_GET(self):
        name, server = self.path.lstrip("/"), type(self)
        if name not in self.files:
            self.send_error(404)
            return
        content, requested = self.files[name], self.headers.get("Range", "bytes=0-")
        server.requested.append(requested)
        begin = int(requested.removeprefix("bytes=").rstrip("-"))
        if begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            self.wfile.write(content[begin : begin + self.cut_after])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[begin:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(download, "CHUNK_BYTES", 100)
    content = np.random.default_rng(0).bytes(5000)
    Server.files, Server.cuts, Server.requested = {"disc1.tar.gz": content, "disc2.tar.gz": content[::-1]}, 0, []
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def write_table(tmp_path: Path, url: str, names=("disc1.tar.gz", "disc2.tar.gz"), **changes) -> Path:
    """Write a table of served files with their sizes and checksums, except for `changes`."""
    files = [
        {
            "url": f"{url}/{name}",
            "size": 5000,
            "checksum": "sha256:" + hashlib.sha256(Server.files.get(name, b"")).hexdigest(),
            **changes,
        }
        for name in names
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"oasis1": files}))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetch_all(tmp_path: Path, table: Path, **options) -> dict[str, bytes]:
    """Download a collection; returns the content of each file."""
    folder = tmp_path / "downloads"
    download.download_collection(folder, **{"table": table, "accept_terms": True, **options})
    return contents(folder)


def assert_refused(tmp_path: Path, table: Path, *contents: str, **options) -> None:
    """Check that downloading ends in one line that begins with the first of these contents and has the others."""
    with pytest.raises(download.OasisError) as error:
        fetch_all(tmp_path, table, **options)
    message = str(error.value)
    assert "\n" not in console.one_line(message)
    assert message.startswith(contents[0])
    for content in contents:
        assert content in message


def test_a_collection_is_downloaded_once(tmp_path, server, capsys):
    table = write_table(tmp_path, server)
    assert fetch_all(tmp_path, table) == Server.files
    assert "identify or contact a participant" in capsys.readouterr().out
    num_requests = len(Server.requested)
    assert fetch_all(tmp_path, table) == Server.files
    assert len(Server.requested) == num_requests


def test_an_interrupted_connection_is_resumed(tmp_path, server):
    Server.cuts = 3
    assert fetch_all(tmp_path, write_table(tmp_path, server)) == Server.files
    assert Server.requested[:4] == ["bytes=0-", "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_connection_that_is_always_interrupted_can_be_resumed_later(tmp_path, server):
    Server.cuts, Server.cut_after = 5, 100
    table = write_table(tmp_path, server)
    assert_refused(tmp_path, table, f"{server}/disc1.tar.gz: ", "interrupted 5 times", "same command again")
    Server.cut_after = 1000
    assert fetch_all(tmp_path, table) == Server.files
    assert Server.requested[5] == "bytes=500-"


def test_a_file_that_is_complete_but_not_renamed_is_kept(tmp_path, server):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "disc1.tar.gz.part").write_bytes(Server.files["disc1.tar.gz"])
    assert fetch_all(tmp_path, write_table(tmp_path, server)) == Server.files


def test_a_wrong_checksum_is_refused_and_the_file_removed(tmp_path, server):
    table = write_table(tmp_path, server, checksum="md5:" + "0" * 32)
    path = tmp_path / "downloads" / "disc1.tar.gz"
    assert_refused(tmp_path, table, f"{path}: ", "md5:" + "0" * 32, "try again", f"{server}/disc1.tar.gz")
    assert contents(tmp_path / "downloads") == {}


def test_a_wrong_size_is_refused_if_no_checksum_is_known(tmp_path, server):
    table = write_table(tmp_path, server, checksum="", size=4999)
    path = tmp_path / "downloads" / "disc1.tar.gz"
    assert_refused(tmp_path, table, f"{path}: ", "5000 bytes, not 4999", "try again", f"{server}/disc1.tar.gz")
    assert contents(tmp_path / "downloads") == {}


def test_a_file_that_does_not_exist(tmp_path, server):
    table = write_table(tmp_path, server, names=("disc3.tar.gz",))
    assert_refused(tmp_path, table, f"{server}/disc3.tar.gz: ", "404", "check the address")


def test_a_full_disk_keeps_what_was_downloaded(tmp_path, server, monkeypatch):
    table, append = write_table(tmp_path, server), download._append

    def append_until_full(response, part, begin):
        part.write_bytes(response.raw.read(2000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_append", append_until_full)
    assert_refused(tmp_path, table, f"{tmp_path}/downloads: ", "No space left on device", "free some space")
    monkeypatch.setattr(download, "_append", append)
    assert fetch_all(tmp_path, table) == Server.files
    assert Server.requested[1] == "bytes=2000-"


def test_the_terms_must_be_accepted(tmp_path, server, monkeypatch):
    table = write_table(tmp_path, server)
    remedy = ("the terms were not accepted", "--accept-terms")
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))  # not a terminal
    assert_refused(tmp_path, table, *remedy, accept_terms=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    assert_refused(tmp_path, table, *remedy, accept_terms=False)

    def end_of_input(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end_of_input)
    assert_refused(tmp_path, table, *remedy, accept_terms=False)
    assert Server.requested == []
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    assert fetch_all(tmp_path, table, accept_terms=False) == Server.files


def test_an_unknown_collection_is_refused(tmp_path, server):
    table = write_table(tmp_path, server)
    assert_refused(tmp_path, table, "collection is oasis9", "oasis1", collection="oasis9")


@pytest.mark.parametrize("content", ["", "[]", '{"oasis1": [{}]}', '{"oasis1": 3}'])
def test_a_file_that_is_not_a_table_is_refused(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    assert_refused(tmp_path, path, f"{path}: ", "not a table", '"url"', "--table")


def test_the_built_in_table_is_complete():
    assert [len(download.COLLECTIONS[name]) for name in ("oasis1", "neurite")] == [12, 1]
    assert len({file.url for file in download.COLLECTIONS["oasis1"]}) == 12
    assert all(1.2e9 < file.size < 1.5e9 for file in download.COLLECTIONS["oasis1"])
    assert download.COLLECTIONS["oasis1"][0].checksum.startswith("md5:")
