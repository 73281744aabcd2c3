"""What the server of a page answers: in front of Gradio, which would answer much more.

Only the routes in `_ROUTES` exist. Gradio's own for files, uploads, proxies and its API are closed: images travel
within requests, and a client names no path. Every answer needs the token, if there is one; without one the server is
for this machine alone, and refuses other names for it (a page elsewhere that rebinds its own to this address).
"""

import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 2**25  # bytes of a request: an image of `asked.MAX_FILE` in base64, and what the page keeps
COOKIE = "lcm_jax_token"  # what its name begins with
_ROUTES = re.compile(
    r"GET /|GET /(config|theme\.css|favicon\.ico|manifest\.json)|GET /(assets|static)/.+"
    r"|GET /gradio_api/(startup-events|heartbeat/\w+)|POST /gradio_api/run/predict"
)
_HEADERS = {
    # No other host, whatever Gradio's page would load; its components need eval, inline styles and scripts.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

Scope = dict
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class Guard:
    """An ASGI application before another one."""

    def __init__(self, app: Callable, token: str | None = None):
        """token: that every request needs, as ?token= once, then as a cookie; None: this machine alone."""
        self._app, self._token = app, token
        # Cookies belong to a host, whatever the port: two pages on one machine have cookies of different names.
        self.cookie = f"{COOKIE}_{hashlib.sha256((token or '').encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # a websocket: Gradio has none
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._refused(scope, headers):
            return await _answer(send, *refused)
        if self._token and "token" in parse_qs(scope["query_string"].decode("latin-1")):
            cookie = f"{self.cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
            return await _answer(send, 303, "the token is a cookie now", [("location", "/"), ("set-cookie", cookie)])
        if scope["method"] == "POST":
            body, receive = await _read(receive)
            if not _plain(body):
                return await _answer(send, 400, "values are texts and numbers")
        await self._app(scope, receive, _dressed(send))

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, message) of a request that gets no further."""
        host = headers.get("host", "")
        if self._token is None and _name(f"//{host}") not in LOOPBACK:
            return 403, f"this server is for this machine alone: open http://{LOOPBACK[0]}, or start it with --host"
        if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            return 403, "requests come from the page itself"
        if self._token is not None and not self._known(scope, headers):
            return 401, "open the address with ?token= that the program has printed"
        if not _ROUTES.fullmatch(f"{scope['method'].replace('HEAD', 'GET')} {scope['path']}"):
            return 404, "no such page"
        length = headers.get("content-length", "")
        if scope["method"] == "POST" and ("transfer-encoding" in headers or not length.isdecimal()):
            return 411, "the request does not say its length"
        if scope["method"] == "POST" and (
            len(length) > 18 or int(length) > MAX_BODY
        ):  # Python reads 4300 digits at most
            return 413, f"more than {MAX_BODY // 2**20} MiB; choose a smaller image"
        return None

    def _known(self, scope: Scope, headers: dict[str, str]) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            cookie = None
        given += [cookie.value] if cookie else []
        return any([hmac.compare_digest(one.encode(), self._token.encode()) for one in given])


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The body, and what gives it again."""
    parts, more, given = [], True, False
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)

    async def again() -> dict:
        nonlocal given
        if given:
            return await receive()  # that the client is gone
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return body, again


def _plain(body: bytes) -> bool:
    """Whether all values are texts and numbers. Gradio takes objects for files, here or elsewhere, and reads them."""
    try:
        values = json.loads(body)["data"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(values, list) and all(isinstance(one, str | int | float | None) for one in values)


def _dressed(send: Send) -> Send:
    """`send` with `_HEADERS`."""

    async def dressed(message: dict) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await send(message)

    return dressed


def _name(url: str) -> str | None:
    """The host of an address, without its port; None for one that is not well formed."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _answer(send: Send, status: int, message: str, headers: list[tuple[str, str]] = ()) -> None:
    own = {**_HEADERS, "content-type": "application/json"}
    every = [(name.encode(), value.encode()) for name, value in [*own.items(), *headers]]
    await send({"type": "http.response.start", "status": status, "headers": every})
    await send({"type": "http.response.body", "body": json.dumps({"error": message}).encode()})
