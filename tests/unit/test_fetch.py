"""Images from everywhere they may live, and from nowhere else; against real servers on this machine."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from anomaly_workers import fetch, guard
from anomaly_workers.errors import ImageError
from anomaly_workers.fetch import Fetcher
from anomaly_workers.settings import load_settings
from anomaly_workers.types import Connection

IMAGE = b"\x89PNG\r\n\x1a\n the bytes of an image"
TOKEN = "0123456789abcdef"
PRIVATE = """
    127.0.0.1 10.1.1.1 172.16.0.1 192.168.1.1 169.254.1.1 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 198.18.0.1
    240.0.0.1 ::1 :: fe80::1 fc00::1 ff02::1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: fe80::1%eth0
"""


@dataclass
class Server:
    """Answers by path and remembers what it was asked, with which authorization."""

    port: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    failures: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    """Serves for the `Server` that its HTTP server carries."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        about: Server = self.server.about  # type: ignore[attr-defined]
        about.asked.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?", 1)[0]
        if path in about.redirects:
            self.reply(303, b"", Location=about.redirects[path])
        elif path == "/slow.png":
            self.trickle(100, size=1, pause=0.05)
        elif path == "/endless.png":
            self.trickle(100_000, size=10_000, pause=0)
        else:
            self.reply(self.status(about, path), IMAGE)

    def status(self, about: Server, path: str) -> int:
        if path == "/flaky.png" and about.failures > 0:
            about.failures -= 1
            return 503
        if path.startswith("/data/") and not self.headers.get("Authorization"):
            return 401
        return 404 if path.endswith("missing.png") else 200

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def trickle(self, count: int, *, size: int, pause: float) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for _ in range(count):
                self.wfile.write(b"x" * size)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            self.close_connection = True

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[], Server]]:
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start() -> Server:
        server = Server()
        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.about = server  # type: ignore[attr-defined]
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        running.append((http, thread))
        return server

    yield start
    for http, thread in running:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def label_studio(serve: Callable[[], Server]) -> Server:
    return serve()


@pytest.fixture
def fetcher(label_studio: Server) -> Iterator[Callable[..., Fetcher]]:
    made: list[Fetcher] = []

    def make(**options: Any) -> Fetcher:
        settings = load_settings({}, **({"fetch_timeout": 5.0} | options))
        made.append(Fetcher(Connection(label_studio.url, 1, TOKEN), settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[..., Fetcher]


@pytest.mark.parametrize(
    "form", ["/data/upload/1/a.png", "data/upload/1/a.png", "/upload/1/a.png", "{url}/data/upload/1/a.png"]
)
def test_uploads_are_fetched_with_the_token(fetcher: Make, label_studio: Server, form: str) -> None:
    assert fetcher().fetch(form.format(url=label_studio.url), task_id=1) == IMAGE
    assert label_studio.asked == [("/data/upload/1/a.png", f"Token {TOKEN}")]


@pytest.mark.parametrize("address", ["s3://bucket/a b.png", "gs://bucket/ü.png", "azure-blob://c/x.png"])
def test_cloud_addresses_go_through_label_studio(fetcher: Make, label_studio: Server, address: str) -> None:
    assert fetcher().fetch(address, task_id=83) == IMAGE
    [(path, authorization)] = label_studio.asked
    signed = path.removeprefix("/tasks/83/presign/?fileuri=")
    assert base64.urlsafe_b64decode(signed).decode() == address
    assert authorization == f"Token {TOKEN}"


def test_a_signed_address_is_followed_without_the_token(
    fetcher: Make, label_studio: Server, serve: Callable[[], Server]
) -> None:
    bucket = serve()
    label_studio.redirects["/tasks/5/presign/"] = f"{bucket.url}/x.png?signature=1"
    allowed = fetcher(allow_hosts=f"127.0.0.1:{bucket.port}")
    assert allowed.fetch("s3://bucket/x.png", task_id=5) == IMAGE
    assert bucket.asked == [("/x.png?signature=1", None)]


def test_the_token_goes_to_files_only(fetcher: Make, label_studio: Server) -> None:
    fetcher().fetch(f"{label_studio.url}/api/tasks/5", task_id=1)
    fetcher().fetch(f"{label_studio.url}/static/../api/tasks/5", task_id=1)
    assert [authorization for _path, authorization in label_studio.asked] == [None, None]


def test_an_address_that_turns_back_to_label_studio_gets_no_token(
    fetcher: Make, label_studio: Server, serve: Callable[[], Server]
) -> None:
    other = serve()
    other.redirects["/x.png"] = f"{label_studio.url}/data/upload/9/secret.png"
    with pytest.raises(ImageError):
        fetcher(allow_hosts=f"127.0.0.1:{other.port}").fetch(f"{other.url}/x.png", task_id=1)
    assert label_studio.asked == []


def test_private_hosts_are_refused_unless_allowed(fetcher: Make, serve: Callable[[], Server]) -> None:
    private = serve()
    with pytest.raises(ImageError, match="ANOMALY_ALLOW_HOSTS"):
        fetcher().fetch(f"{private.url}/x.png", task_id=1)
    assert private.asked == []
    for allowed in ("127.0.0.1", f"127.0.0.1:{private.port}", "10.0.0.0/8, 127.0.0.0/8"):
        assert fetcher(allow_hosts=allowed).fetch(f"{private.url}/x.png", task_id=1) == IMAGE


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:{port}/x.png",
        "http://127.1:{port}/x.png",
        "http://2130706433:{port}/x.png",
        "http://[::1]:{port}/x.png",
        "http://[::ffff:127.0.0.1]:{port}/x.png",
        "http://0.0.0.0:{port}/x.png",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/x.png",
        "{own}@127.0.0.1:{port}/x.png",
        "{own}\\@127.0.0.1:{port}/x.png",
        "http://[fd00::1]/x.png",
    ],
)
def test_every_spelling_of_a_private_address_is_refused(
    fetcher: Make, serve: Callable[[], Server], label_studio: Server, address: str
) -> None:
    private = serve()
    with contextlib.suppress(ImageError):  # or it asks Label Studio itself, without harm
        fetcher().fetch(address.format(port=private.port, own=label_studio.url), task_id=1)
    assert private.asked == []


def test_redirects_to_private_hosts_are_refused(
    fetcher: Make, serve: Callable[[], Server], label_studio: Server
) -> None:
    private = serve()
    label_studio.redirects["/tasks/5/presign/"] = f"{private.url}/x.png"
    with pytest.raises(ImageError, match="private network"):
        fetcher().fetch("s3://bucket/x.png", task_id=5)
    assert private.asked == []


def test_a_name_is_resolved_once_and_the_checked_address_is_used(
    fetcher: Make, serve: Callable[[], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    private = serve()
    answers = [["93.184.216.34", "127.0.0.1"], ["127.0.0.1"]]
    real = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != "rebind.example":
            return real(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    for _ in range(2):
        with pytest.raises(ImageError, match="private network"):
            fetcher().fetch(f"http://rebind.example:{private.port}/x.png", task_id=1)
    assert private.asked == []


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address: str) -> None:
    assert guard.is_public(address)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_other_addresses_are_not(address: str) -> None:
    assert not guard.is_public(address)


def test_a_public_server_is_reached_through_the_guard(
    fetcher: Make, serve: Callable[[], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "is_public", lambda _address: True)
    public = serve()
    public.redirects["/moved.png"] = "/x.png"
    one = fetcher()
    assert one.fetch(f"{public.url}/moved.png", task_id=1) == IMAGE
    assert one.fetch(f"http://localhost:{public.port}/x.png?a=b", task_id=1) == IMAGE
    assert [path for path, _authorization in public.asked] == ["/moved.png", "/x.png", "/x.png?a=b"]
    with pytest.raises(ImageError, match="cannot be reached"):
        one.fetch("http://127.0.0.1:9/x.png", task_id=1)


def test_endless_redirects_end(fetcher: Make, label_studio: Server) -> None:
    label_studio.redirects["/data/a.png"] = "/data/a.png"
    with pytest.raises(ImageError, match="redirects more"):
        fetcher().fetch("/data/a.png", task_id=1)


def test_a_redirect_to_another_scheme_is_refused(fetcher: Make, label_studio: Server) -> None:
    label_studio.redirects["/data/a.png"] = "file:///etc/passwd"
    with pytest.raises(ImageError, match="not a web address"):
        fetcher().fetch("/data/a.png", task_id=1)


def test_a_login_page_is_no_image(fetcher: Make, label_studio: Server) -> None:
    label_studio.redirects["/data/a.png"] = "/user/login/?next=/data/a.png"
    with pytest.raises(ImageError, match="token"):
        fetcher().fetch("/data/a.png", task_id=1)


@pytest.mark.parametrize("path", ["/endless.png", "/x.png"])
def test_large_downloads_are_cut(
    fetcher: Make, label_studio: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.IMAGE", b"x" * 5000)
    with pytest.raises(ImageError, match="ANOMALY_MAX_IMAGE_BYTES"):
        fetcher(max_image_bytes=2000).fetch(f"{label_studio.url}{path}", task_id=1)


def test_a_slow_download_ends_in_time(fetcher: Make, label_studio: Server) -> None:
    began = time.monotonic()
    with pytest.raises(ImageError, match="ANOMALY_FETCH_TIMEOUT|did not answer"):
        fetcher(fetch_timeout=0.5).fetch(f"{label_studio.url}/slow.png", task_id=1)
    assert time.monotonic() - began < 3


def test_a_passing_failure_is_tried_again(fetcher: Make, label_studio: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.01)
    label_studio.failures = 2
    assert fetcher().fetch(f"{label_studio.url}/flaky.png", task_id=1) == IMAGE
    label_studio.failures = 9
    with pytest.raises(ImageError, match="503"):
        fetcher().fetch(f"{label_studio.url}/flaky.png", task_id=1)


def test_a_missing_file_says_so(fetcher: Make) -> None:
    with pytest.raises(ImageError, match="gone"):
        fetcher().fetch("/data/upload/1/missing.png", task_id=1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("data:image/png;base64," + base64.b64encode(IMAGE).decode(), IMAGE),
        ("data:image/svg+xml,%3Csvg/%3E", b"<svg/>"),
    ],
)
def test_data_addresses_are_decoded(fetcher: Make, value: str, expected: bytes) -> None:
    assert fetcher().fetch(value, task_id=1) == expected


@pytest.mark.parametrize(
    "value",
    [
        "data:image/png;base64",
        "data:image/png;base64,A",
        "file:///etc/passwd",
        "ftp://x/y",
        "http://",
        "http://[x/",
        "",
    ],
)
def test_other_values_are_refused(fetcher: Make, label_studio: Server, value: str) -> None:
    label_studio.redirects["/"] = "/user/login/"
    with pytest.raises(ImageError):
        fetcher().fetch(value, task_id=1)


def test_local_files_are_read_from_the_shared_folder(fetcher: Make, label_studio: Server, tmp_path: Path) -> None:
    (tmp_path / "root/set 1").mkdir(parents=True)
    (tmp_path / "root/set 1/im 0.png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "root/link.png").symlink_to(tmp_path / "secret.png")
    one = fetcher(local_files_root=str(tmp_path / "root"))
    assert one.fetch("/data/local-files/?d=set%201/im%200.png", task_id=1) == IMAGE
    assert one.fetch(f"{label_studio.url}/data/local-files/?d=set%201/im%200.png", task_id=1) == IMAGE
    assert label_studio.asked == []
    for name in ("../secret.png", "set%201/../../secret.png", "link.png"):
        with pytest.raises(ImageError, match="outside"):
            one.fetch(f"/data/local-files/?d={name}", task_id=1)
    with pytest.raises(ImageError, match="MAX_IMAGE_BYTES"):
        fetcher(local_files_root=str(tmp_path / "root"), max_image_bytes=1000).fetch(
            _big(tmp_path / "root/big.png"), task_id=1
        )


def _big(path: Path) -> str:
    path.write_bytes(b"x" * 2000)
    return f"/data/local-files/?d={path.name}"


def test_local_files_elsewhere_come_from_label_studio(fetcher: Make, label_studio: Server, tmp_path: Path) -> None:
    one = fetcher(local_files_root=str(tmp_path))
    assert one.fetch("/data/local-files/?d=a.png", task_id=1) == IMAGE
    assert label_studio.asked == [("/data/local-files/?d=a.png", f"Token {TOKEN}")]


def test_uploads_are_read_from_the_shared_folder(fetcher: Make, label_studio: Server, tmp_path: Path) -> None:
    one = fetcher(uploads_root=str(tmp_path))
    own, other = 1, 2
    for project in (own, other):
        (tmp_path / str(project)).mkdir()
        (tmp_path / f"{project}/1a-im 0.png").write_bytes(b"here")
    assert one.fetch(f"/data/upload/{own}/1a-im%200.png", task_id=1) == b"here"
    assert label_studio.asked == []
    with pytest.raises(ImageError, match="outside"):
        one.fetch(f"/data/upload/{own}/../{other}/1a-im 0.png", task_id=1)
    assert one.fetch(f"/data/upload/{own}/gone.png", task_id=1) == IMAGE
    assert one.fetch(f"/data/upload/{other}/1a-im%200.png", task_id=1) == IMAGE, "Label Studio decides who may see it"
    assert len(label_studio.asked) == 2


def test_without_a_label_studio_only_addresses_work() -> None:
    with Fetcher(None, load_settings({})) as alone:
        with pytest.raises(ImageError, match="Connect"):
            alone.fetch("/data/upload/1/a.png", task_id=1)
        with pytest.raises(ImageError, match="Connect"):
            alone.fetch("s3://bucket/a.png", task_id=1)


def test_many_threads_share_a_fetcher(fetcher: Make) -> None:
    one = fetcher()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: one.fetch(f"/data/upload/1/{place}.png", task_id=1), range(40)))
    assert found == [IMAGE] * 40
