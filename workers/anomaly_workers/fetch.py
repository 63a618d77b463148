"""The bytes behind a task's image value, from wherever Label Studio lets images live."""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, unquote_to_bytes

import httpx

from anomaly_workers.errors import ImageError, LabelStudioError
from anomaly_workers.guard import Blocked, GuardedTransport
from anomaly_workers.settings import Settings
from anomaly_workers.tokens import TokenAuth
from anomaly_workers.types import Connection

MAX_REDIRECTS = 5
ATTEMPTS = 3
PAUSE_SECONDS = 0.3
CONNECTIONS = 16
CLOUD_SCHEMES = frozenset({"s3", "s3s", "gs", "azure-blob", "azure_spi", "azure", "redis", "databricks", "dbfs"})
FILE_PATHS = ("/data/", "/tasks/", "/storage-data/", "/media/", "/static/")  # the only ones that get the token
LOCAL_FILES = "/data/local-files/"
UPLOADS = "/data/upload/"


class Fetcher:
    """Downloads images of one Label Studio's tasks. Safe to share between threads."""

    def __init__(self, connection: Connection | None, settings: Settings) -> None:
        self._base = connection.url if connection else ""
        self._own = httpx.URL(connection.url) if connection else None
        self._auth = TokenAuth(connection.url, connection.token) if connection else None
        self._limit = settings.max_image_bytes
        self._seconds = settings.fetch_timeout
        self._uploads = f"{UPLOADS}{connection.project}/" if connection else ""
        self._uploads_root = Path(settings.uploads_root).resolve() if settings.uploads_root else None
        self._files_root = Path(settings.local_files_root).resolve() if settings.local_files_root else None
        self._allowed = _Allowed.parse(settings.allow_hosts)
        timeout = httpx.Timeout(settings.fetch_timeout, connect=min(settings.fetch_timeout, 10.0))
        limits = httpx.Limits(max_connections=CONNECTIONS)
        headers = {"User-Agent": "label-studio-anomaly", "Accept": "image/*,*/*;q=0.5"}
        self._known = httpx.Client(timeout=timeout, limits=limits, headers=headers)
        self._foreign = httpx.Client(
            timeout=timeout, headers=headers, transport=GuardedTransport(max_connections=CONNECTIONS)
        )

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._known.close()
        self._foreign.close()

    def fetch(self, value: str, *, task_id: int) -> bytes:
        """Return the bytes of an image.

        Args:
            value: what the task's data holds, raw: an upload or local-files path, a cloud or web address, a data URI.
            task_id: the task, through which Label Studio signs cloud addresses.

        Raises:
            ImageError: it cannot be had; the message says why in one line.
        """
        scheme = value.split(":", 1)[0].lower() if ":" in value.split("/", 1)[0] else ""
        if scheme == "data":
            return self._decoded(value)
        local = self._local(value)
        if local is not None:
            return local
        return self._download(self._address(value.strip(), scheme, task_id))

    def _address(self, value: str, scheme: str, task_id: int) -> str:
        if scheme in ("http", "https"):
            return value
        if scheme and scheme not in CLOUD_SCHEMES:
            raise ImageError(f"Images cannot come from {scheme}: addresses. Use an upload, a storage or http(s).")
        if not self._base:
            raise ImageError(f"{_short(value)} is inside Label Studio. Connect the project, or give its address.")
        if scheme:
            signed = base64.urlsafe_b64encode(value.encode()).decode("ascii")
            return f"{self._base}/tasks/{task_id}/presign/?fileuri={signed}"
        path = value if value.startswith("/") else f"/{value}"
        if path.startswith("/upload/"):
            path = f"/data{path}"
        prefix = _parsed(self._base).path.rstrip("/")  # Label Studio under a path of its host
        return self._base.removesuffix(prefix) + path if prefix and path.startswith(f"{prefix}/") else self._base + path

    def _decoded(self, value: str) -> bytes:
        head, comma, text = value.partition(",")
        if len(text) * 3 // 4 > self._limit:
            raise ImageError(_too_large(self._limit))
        try:
            if not comma:
                raise ValueError("no comma")
            return base64.b64decode(unquote(text)) if head.endswith(";base64") else unquote_to_bytes(text)
        except (binascii.Error, ValueError) as error:
            raise ImageError("The task's data URI is damaged. Import the image again.") from error

    def _local(self, value: str) -> bytes | None:
        """The file behind an address inside Label Studio when this machine sees it too, else None."""
        if self._files_root and LOCAL_FILES in f"/{value}":
            url = _parsed(value)
            if f"/{url.path}".endswith(LOCAL_FILES) and (not url.host or self._is_label_studio(url)):
                return self._seen(self._files_root, str(url.params.get("d", "")).lstrip("/"))
        if self._uploads_root and self._uploads and value.startswith(self._uploads):
            own = self._uploads_root / self._uploads.removeprefix(UPLOADS)  # others' need the token
            return self._seen(own, unquote(value.removeprefix(self._uploads)))
        return None

    def _seen(self, root: Path, name: str) -> bytes | None:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ImageError(f"{_short(name)} is outside {root}. Correct the task's data.")
        if not path.is_file():
            return None
        if path.stat().st_size > self._limit:
            raise ImageError(_too_large(self._limit))
        return path.read_bytes()

    def _download(self, address: str) -> bytes:
        deadline = time.monotonic() + self._seconds
        for attempt in range(ATTEMPTS):
            try:
                return self._follow(address, deadline)
            except _Transient as error:
                pause = PAUSE_SECONDS * 2**attempt
                if attempt == ATTEMPTS - 1 or time.monotonic() + pause > deadline:
                    raise ImageError(str(error)) from error
                time.sleep(pause)
        raise AssertionError("the loop returns or raises")

    def _follow(self, address: str, deadline: float) -> bytes:
        """Download, following redirects by hand: each hop is checked, and only Label Studio's own get the token."""
        url = _parsed(address)
        inside = True  # so far every hop was Label Studio
        for _hop in range(MAX_REDIRECTS + 1):
            inside = inside and self._is_label_studio(url)
            with self._opened(url, inside) as response:
                if not response.has_redirect_location:
                    return self._body(response, inside, deadline)
                url = _parsed(str(url.join(_parsed(response.headers["location"]))))
            if inside and "/user/login" in url.path:
                raise ImageError("Label Studio asks for a login. Check the token with `ls-anomaly doctor`.")
        raise ImageError(f"{url.host} redirects more than {MAX_REDIRECTS} times. Correct the task's data.")

    @contextlib.contextmanager
    def _opened(self, url: httpx.URL, inside: bool) -> Iterator[httpx.Response]:
        if url.scheme not in ("http", "https") or not url.host:
            raise ImageError(f"{_short(str(url))} is not a web address. Correct the task's data.")
        known = inside or self._allowed.has(url.host, _port(url))
        client = self._known if known else self._foreign
        auth = self._auth if inside and self._is_file(url.path) else None
        try:
            with client.stream("GET", url, auth=auth, follow_redirects=False) as response:
                yield response
        except Blocked as error:
            raise ImageError(
                f"{url.host} is on a private network ({error}). Add the host to ANOMALY_ALLOW_HOSTS to allow it."
            ) from error
        except httpx.TimeoutException as error:
            raise _Transient(f"{url.host} did not answer within {self._seconds:g} s.") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Transient(f"{url.host} cannot be reached ({_short(str(error))}).") from error
        except LabelStudioError as error:
            raise ImageError(str(error)) from error

    def _body(self, response: httpx.Response, inside: bool, deadline: float) -> bytes:
        if response.status_code != 200:
            raise _refusal(response, inside)
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            raise ImageError(_too_large(self._limit))
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > self._limit:
                raise ImageError(_too_large(self._limit))
            if time.monotonic() > deadline:
                raise ImageError(f"{response.url.host} took longer than ANOMALY_FETCH_TIMEOUT.")
        return bytes(body)

    def _is_label_studio(self, url: httpx.URL) -> bool:
        own = self._own
        return own is not None and (own.scheme, own.host, _port(own)) == (url.scheme, url.host, _port(url))

    def _is_file(self, path: str) -> bool:
        """Whether a path of Label Studio is one of a file, so that no address can make the token call its API."""
        inner = path.removeprefix(self._own.path.rstrip("/")) if self._own else path
        return inner.startswith(FILE_PATHS) and ".." not in unquote(inner).split("/")


class _Transient(Exception):
    """A download failed in a way that trying again can help."""


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Hosts that the settings allow: names, `name:port`, `.domain` suffixes, addresses and networks."""

    names: frozenset[str]
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

    @classmethod
    def parse(cls, text: str) -> _Allowed:
        names, networks = set(), []
        for item in filter(None, (part.strip().lower() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(item, strict=False))
            except ValueError:
                names.add(item.removeprefix("*"))
        return cls(frozenset(names), tuple(networks))

    def has(self, host: str, port: int) -> bool:
        host = host.lower().rstrip(".")
        if host in self.names or f"{host}:{port}" in self.names:
            return True
        if any(name.startswith(".") and host.endswith(name) for name in self.names):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self.networks)


def _refusal(response: httpx.Response, inside: bool) -> Exception:
    status, host = response.status_code, response.url.host
    if inside and status == 500:  # what it says to the address of a deleted upload
        return _Transient("Label Studio answered 500: the upload is gone, or Label Studio's log says what failed.")
    if status in (429, 500, 502, 503, 504):
        return _Transient(f"{host} answered {status}. Try again later.")
    if inside and status in (401, 403):
        return ImageError(f"Label Studio answered {status}. Check the token with `ls-anomaly doctor`.")
    if inside and status == 404:
        return ImageError(
            "Label Studio answered 404: the file is gone, or its storage is not connected to the project."
        )
    return ImageError(f"{host} answered {status}. Check that the worker may read the image.")


def _too_large(limit: int) -> str:
    return f"The image has more than {limit} bytes. Raise ANOMALY_MAX_IMAGE_BYTES, or shrink it."


def _parsed(address: str) -> httpx.URL:
    """Parse an address with the one parser that also connects, so that what is checked is what is asked."""
    try:
        return httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ImageError(f"{_short(address)} is not an address. Correct the task's data.") from error


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _short(text: str) -> str:
    """At most 80 characters, without a query that could hold a signature."""
    return text.split("?", 1)[0].replace("\n", " ")[:80] or "An empty value"
