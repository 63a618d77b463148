"""Label Studio's tokens: which kind one is, and how a request carries it."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Generator
from typing import Any

import httpx

from anomaly_workers.errors import Unauthorized

EARLY_SECONDS = 20.0  # an access token is renewed this long before it ends


def kind_of(token: str) -> str:
    """Return "personal" (a PAT, exchanged for access tokens), "access" (one of those) or "legacy"."""
    claims = _claims(token)
    if claims is None:
        return "legacy"
    return "access" if claims.get("token_type") == "access" else "personal"


class TokenAuth(httpx.Auth):
    """Puts a token of any kind on requests; a personal one is exchanged, and exchanged again before it ends."""

    requires_response_body = True

    def __init__(self, url: str, token: str) -> None:
        self._refresh_url = f"{url}/api/token/refresh/"
        self._token = token
        self._kind = kind_of(token)
        self._access = token if self._kind == "access" else ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request with the token; renew it once when Label Studio says 401."""
        if self._kind == "personal" and _ending(self._access):
            yield from self._renew()
        request.headers["Authorization"] = self._header()
        response = yield request
        if response.status_code == 401 and self._kind == "personal":
            yield from self._renew()
            request.headers["Authorization"] = self._header()
            yield request

    def _header(self) -> str:
        return f"Token {self._token}" if self._kind == "legacy" else f"Bearer {self._access}"

    def _renew(self) -> Generator[httpx.Request, httpx.Response, None]:
        response = yield httpx.Request("POST", self._refresh_url, json={"refresh": self._token})
        if response.status_code in (401, 403):
            raise Unauthorized(
                "Label Studio refused the personal access token. Make a new one under Account & Settings.",
                status=response.status_code,
            )
        if response.is_success:  # else the request itself gets its 401, or the retry its chance
            self._access = str(response.json().get("access", ""))


def _claims(token: str) -> dict[str, Any] | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    return claims if isinstance(claims, dict) else None


def _ending(access: str) -> bool:
    claims = _claims(access) or {}
    ends = claims.get("exp")
    return not isinstance(ends, int | float) or ends - time.time() < EARLY_SECONDS
