"""Serve a page on which brains are drawn, changed and completed with a finished run.

    python app.py runs/oasis96      then open the address that it prints
    python app.py                   the same with the networks that come with the project

The page and everything on it come from this process, and files that are opened on the page are sent only to it. The run
folder is only read.
"""

import console

if __name__ == "__main__":
    console.start()
console.import_tensorflow()

import base64
import ipaddress
import json
import socket
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tyro

from studio import BadRequest, Studio

PAGE = Path(__file__).with_name("app.html")
WEIGHTS = Path(__file__).with_name("weights") / "oasis192"  # A compact copy of a run; see generate.py.
LOCAL = ("127.0.0.1", "localhost")
ANY = ("0.0.0.0", "")  # All addresses of the machine.
MAX_BODY = 128 * 2**20  # bytes of a request: a compressed volume with 1 mm voxels has about 10 MB
BUSY = 2  # requests that compute at the same time; others wait


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    run_dir: tyro.conf.Positional[Path] = WEIGHTS  # folder of a finished run
    port: int = 8000  # port to listen on; 0 chooses a free one
    host: str = "127.0.0.1"  # address to listen on; any other lets other machines use the page


# -------------------------------------------------------------------------------------------------- server


def make_server(studio: Studio, host: str, port: int) -> ThreadingHTTPServer:
    """Make a server of the page.

    Raises:
        UserError: The address or port cannot be used.
    """
    computing, page = threading.BoundedSemaphore(BUSY), PAGE.read_bytes()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing if the page was closed before it got its answer."""
            if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
                super().handle_error(request, client_address)

    class Handler(BaseHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", 60

        def do_GET(self) -> None:
            if not self._is_ours():
                return
            if self.path == "/":
                self._send(200, page, "text/html; charset=utf-8")
            elif self.path == "/api/info":
                self._send_json(200, studio.info())
            else:
                self._refuse(404, f"{self.path}: no such page")

        def do_POST(self) -> None:
            if not self._is_ours():
                return
            try:
                name = self.path.removeprefix("/api/")
                if name != "open" and name not in studio.tools:
                    self.close_connection = True
                    self._refuse(404, f"{self.path}: no such tool")
                    return
                body = self._body()
                with computing:
                    if name == "open":
                        answer = studio.open_file(self._file_name(), body, self.headers.get("X-Orientation", ""))
                    else:
                        answer = studio.tools[name](_parse(body))
                self._send_json(200, answer)
            except BadRequest as error:
                self._refuse(400, str(error))
            except (ConnectionError, TimeoutError):
                raise  # The page was closed.
            except Exception as error:  # The server must survive whatever a request makes fail.
                console.warn(f"{self.path}: {type(error).__name__}: {error}")
                self._refuse(500, "the server could not answer; see its output")

        def _is_ours(self) -> bool:
            """Whether the request is made to this address, by this page. Other sites must not reach it."""
            asked, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            if is_own(asked, host, server.server_port) and origin in (None, f"http://{asked}"):
                return True
            self.close_connection = True
            self._refuse(403, "open the page at the address that app.py has printed")
            return False

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not (length.isdecimal() and len(length) < 16 and int(length) <= MAX_BODY):
                self.close_connection = True
                raise BadRequest(f"the request is larger than {MAX_BODY // 2**20} MB, or does not say how large it is")
            return self.rfile.read(int(length))

        def _file_name(self) -> str:
            """The name of an uploaded file, which the page sends as base64 because headers are not Unicode."""
            try:
                name = Path(base64.b64decode(self.headers.get("X-File-Name", "")).decode()).name
            except ValueError as error:
                raise BadRequest("X-File-Name is not base64") from error
            if not name:
                raise BadRequest("X-File-Name is missing: send the name of the file as base64")
            return name

        def _refuse(self, status: int, message: str) -> None:
            self._send_json(status, {"error": console.one_line(message)})

        def _send_json(self, status: int, content: dict[str, Any]) -> None:
            self._send(status, json.dumps(content).encode(), "application/json")

        def _send(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline'; frame-ancestors 'none'",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Print nothing for each request."""

    try:
        server = Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise console.UserError(f"--port {port}: cannot listen on {host} ({reason}); choose another --port") from error
    return server


def is_own(asked: str, host: str, port: int) -> bool:
    """Whether the Host header of a request names this server. If it did not matter, other sites could reach it.

    Another site can let its own name point to this machine, but not an IP address. So a server that listens on all
    addresses answers to each of them, and to the name of the machine.

    Args:
        asked: The header.
        host: Address to listen on.
        port: Port to listen on. Browsers leave out port 80.
    """
    name = asked.removesuffix(f":{port}")
    if name == asked and port != 80:
        return False
    if name.lower() in (host.lower(), *LOCAL):
        return True
    if host not in ANY:
        return False
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name.lower() == socket.gethostname().lower()


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request is not JSON") from error
    if not isinstance(request, dict):
        raise BadRequest("the request is not a JSON object")
    return request


def main(options: Options) -> None:
    """Load the run and serve the page until Ctrl-C."""
    studio = Studio.load(options.run_dir)
    server = make_server(studio, options.host, options.port)
    if options.host not in LOCAL:
        console.warn(f"--host {options.host}: whoever can reach it can use the page; the connection is not encrypted")
    print(f"preparing {studio.name}", flush=True)
    studio.prepare()
    with server:
        name = socket.gethostname() if options.host in ANY else options.host
        print(f"open http://{name}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def command_line() -> int:
    """Run the command and return its exit status; see `console.run_command`."""
    return console.run_command(lambda: main(tyro.cli(Options, description=__doc__)), "the page is closed")


if __name__ == "__main__":
    sys.exit(command_line())
