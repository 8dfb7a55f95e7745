"""Who may talk to the server, and how much: checked before any address is looked at.

    a page of another site   its Origin or Sec-Fetch-Site is not ours, or it lacks the token that only our
                             page can read, in X-Mosslet-Token: 403
    a name that points here  (DNS rebinding) is no Host of ours: 403
    another computer         needs --token, as a bearer or as the cookie that /?token=… sets: 401
    too much, too slow       413, 431, 408, and 429 beyond so many requests a second

All answers carry a Content-Security-Policy under which no script runs but the page's own.
"""
import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import sys
import time
import traceback
import urllib.parse
from typing import Any

from runtime.options import UserError

try:
    from h11 import LocalProtocolError
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise UserError("the server needs starlette and uvicorn: python -m pip install -r requirements-extra.txt"
                    ) from error

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("", "0.0.0.0", "::")  # what --host may say for all of the machine's addresses
SHORTEST_TOKEN = 16
MOST_HEADERS, MOST_HEADER_BYTES, LONGEST_TARGET = 100, 2**15, 2**12
GUESS = 25  # requests that a wrong token counts as
ALWAYS = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
          "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
          "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
          "Cache-Control": "no-store"}
ENTERED = "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content='0; url=/'><title>Mosslet</title>"


class Problem(Exception):
    """A request that is answered with an error: its status, and one line."""

    def __init__(self, status: int, text: str, **headers: str):
        super().__init__(text.encode("utf-8", "backslashreplace").decode())
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self, path: str) -> JSONResponse:
        """The answer; under /v1 in OpenAI's shape."""
        text: Any = str(self)
        if path.startswith("/v1/"):
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
            text = {"message": text, "type": kind, "param": None, "code": None}
        return JSONResponse({"error": text}, self.status, self.headers)


# ---- rules ---------------------------------------------------------------------------------------

@dataclasses.dataclass
class Rules:
    """What a server allows. token: asked for at every request if it is not empty."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    page_token: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(24))
    body: int = 2**20  # bytes; of an import:
    import_body: int = 2**25
    seconds: float = 20.0  # for a body to arrive
    rate: float = 50.0  # requests a second of one client, on average
    burst: int = 400  # and at once

    def __post_init__(self) -> None:
        """UserError for an address that others reach without a token."""
        if self.token and (len(self.token) < SHORTEST_TOKEN or not re.fullmatch(r"[\w.~-]+", self.token, re.ASCII)):
            raise UserError(f"--token: give {SHORTEST_TOKEN} or more letters and digits, for example "
                            f"{secrets.token_hex(12)}")
        if not self.token and not is_loopback(self.host):
            raise UserError(f"--host {self.host} lets other computers in: give a --token, too, for example "
                            f"--token {secrets.token_hex(12)}")

    @property
    def cookie(self) -> tuple[str, str]:
        """(name, value) of the cookie of whoever came with the token, which does not hold the token."""
        return f"mosslet-{self.port}", hashlib.sha256(f"mosslet cookie {self.token}".encode()).hexdigest()

    def is_ours(self, host: str) -> bool:
        """Is this value of a Host header a name of this server? Any port is: `ssh -L 9000:localhost:8000` makes
        another one, and who may send a request is told by its origin, which has to have the same."""
        found = HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found[1].strip("[]")
        if name in LOOPBACK or name == self.host.lower():
            return True
        # An address cannot be rebound to another one, as a name can.
        return self.host in EVERYWHERE and (is_address(name) or name == socket.gethostname().lower())


def is_address(name: str) -> bool:
    """Is this an IP address?"""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Does this --host stand for this computer alone?"""
    return host == "localhost" or is_address(host) and ipaddress.ip_address(host).is_loopback


def same(first: str, second: str) -> bool:
    """Equality in a time that tells nothing."""
    return hmac.compare_digest(first.encode("utf-8", "surrogateescape"), second.encode())


class Rates:
    """How many requests each client may still send: `burst`, of which `rate` a second come back."""

    MOST_CLIENTS = 4096

    def __init__(self, rate: float, burst: int):
        self.rate, self.burst = rate, burst
        self.clients: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def take(self, client: str, cost: int = 1) -> bool:
        """Count a request; False if the client has to wait."""
        now = time.monotonic()
        left, before = self.clients.pop(client, (float(self.burst), now))
        left = min(self.burst, left + (now - before) * self.rate)
        allowed = left >= 1
        self.clients[client] = max(left - cost, -self.burst) if allowed else left, now
        if len(self.clients) > self.MOST_CLIENTS:
            self.clients.popitem(last=False)
        return allowed


# ---- the checks of a request -----------------------------------------------------------------------

class Guard:
    """Pure ASGI middleware: checks a request, takes its body, and makes every answer safe to show."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules, self.rates = app, rules, Rates(rules.rate, rules.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = False

        async def hardened(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, headers = True, MutableHeaders(scope=message)
                for name, value in ALWAYS.items():
                    headers.setdefault(name, value)
            await send(message)

        async def tell(problem: Problem) -> None:
            # Where the body's form was wrong, uvicorn has answered already, and takes nothing more.
            with contextlib.suppress(LocalProtocolError):
                await problem.response(scope["path"])(scope, receive, hardened)

        try:
            headers = Headers(scope=scope)
            try:
                self.check(scope, headers)
                body = b"" if self.enters(scope) else await self.body(scope, headers, receive)
            except Problem as problem:  # what is left of the body is not read
                problem.headers["Connection"] = "close"
                return await tell(problem)
            app = self.entered() if self.enters(scope) else self.app
            await app(scope, replayed(body, receive), hardened)
        except ClientDisconnect:
            return
        except Exception as error:
            if not isinstance(error, Problem):
                traceback.print_exc(file=sys.stderr)
                error = Problem(500, "the server failed at this request; the terminal where it runs says why")
            if not started:
                await tell(error)

    def check(self, scope: Scope, headers: Headers) -> None:
        """`Problem` unless this request may be answered."""
        self.check_form(scope, headers)
        reading, path = scope["method"] in ("GET", "HEAD"), scope["path"]
        self.check_origin(headers, reading, path)
        client = scope["client"][0] if scope.get("client") else ""
        if not self.rates.take(client):
            raise Problem(429, "too many requests: wait a moment", Retry_After="1")
        if self.rules.token and not self.enters(scope) and not self.knows_token(headers):
            if "authorization" in headers or b"token=" in scope["query_string"]:
                self.rates.take(client, GUESS)
            raise Problem(401, "this server asks for its token: open its address with /?token=…, or send it as a "
                               "bearer token", WWW_Authenticate="Bearer")
        if not reading and not path.startswith("/v1/") and not same(headers.get("x-mosslet-token", ""),
                                                                    self.rules.page_token):
            raise Problem(403, "this request does not come from the server's page as it is now: reload the page")

    def check_form(self, scope: Scope, headers: Headers) -> None:
        """`Problem` for a request whose length, address or host are not clear, or too long."""
        if len(scope["headers"]) > MOST_HEADERS or sum(
                len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            raise Problem(431, "too many headers")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_TARGET:
            raise Problem(414, "the address is too long")
        lengths = headers.getlist("content-length")
        if len(lengths) > 1 or lengths and "transfer-encoding" in headers or not all(
                length.isascii() and length.isdigit() and len(length) < 16 for length in lengths):
            raise Problem(400, "the length of the body is not clear")
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise Problem(400, "one Host header is needed")
        if not self.rules.is_ours(hosts[0]):
            raise Problem(403, "this server has no such name: open it by the address that it prints at its start")
        if scope["method"] == "POST" and scope["path"] != "/api/import" and (
                "transfer-encoding" in headers or int(lengths[0] if lengths else 0)):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(415, "the body must be application/json")

    def check_origin(self, headers: Headers, reading: bool, path: str) -> None:
        """`Problem` for a request that a page of another origin sends."""
        origins, site = headers.getlist("origin"), headers.get("sec-fetch-site", "")
        ours = [f"{scheme}://{headers['host'].lower()}" for scheme in ("http", "https")]
        foreign = [origin for origin in origins if origin.lower() not in ours]
        if foreign or len(origins) > 1 or site not in ("", "same-origin", "none") and path != "/":
            raise Problem(403, "requests of other pages are not answered")
        if not reading and not origins and not path.startswith("/v1/"):
            raise Problem(403, "an Origin header is needed here")

    # ---- the token of --token --------------------------------------------------------------------

    def enters(self, scope: Scope) -> bool:
        """Does this request open the page with the right token?"""
        given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        return bool(self.rules.token) and scope["path"] == "/" and same(given[0], self.rules.token)

    def entered(self) -> HTMLResponse:
        """Sets the cookie, and opens the page: by a step of its own, as a browser that came from elsewhere
        sends no strict cookie with a redirection."""
        response, (name, value) = HTMLResponse(ENTERED), self.rules.cookie
        response.set_cookie(name, value, httponly=True, samesite="strict", path="/", max_age=30 * 86400)
        return response

    def knows_token(self, headers: Headers) -> bool:
        """Does the request carry the token, or its cookie?"""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), self.rules.token):
            return True
        name, value = self.rules.cookie
        return any(key.strip() == name and same(got.strip(), value) for key, _, got in (
            part.partition("=") for part in headers.get("cookie", "").split(";")))

    # ---- the body ----------------------------------------------------------------------------------

    async def body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The whole body; `Problem` if it is too long or takes too long."""
        limit = self.rules.import_body if scope["path"] == "/api/import" else self.rules.body
        too_long = Problem(413, f"the body is longer than {limit} bytes")
        if int(headers.get("content-length", "0")) > limit:
            raise too_long
        parts: list[bytes] = []

        async def read() -> None:
            total, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                total, more = total + len(parts[-1]), message.get("more_body", False)
                if total > limit:
                    raise too_long

        try:
            await asyncio.wait_for(read(), self.rules.seconds * (1 + limit // 2**22))
        except asyncio.TimeoutError:
            raise Problem(408, "the body did not arrive in time") from None
        return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, and then what comes."""
    parts = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": parts.pop(), "more_body": False} if parts else await receive()

    return replay
