"""The addresses of the page and of the chat server, over what serve/desk.py does.

    app = create_app(Server(log, pairs, {engine.name: engine}, training))
    serve_on(listening("127.0.0.1", 8000), app)          runs until Ctrl-C

Every answer is JSON but that of `/`, which is serve/page.html. Work that waits for a disk, a lock or a model
runs in threads.
"""
import asyncio
import contextlib
import json
import pathlib
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from runtime.options import UserError
from serve.desk import Desk
from serve.fields import Wrong, annotator_of, finite, read_json, without_paths
from serve.log import NotSaved
from serve.safety import MOST_HEADER_BYTES, Guard, Problem, Rules
from serve.training import Running

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise UserError("the server needs starlette and uvicorn: python -m pip install -r requirements-extra.txt"
                    ) from error
from serve import api

PAGE = pathlib.Path(__file__).resolve().parent / "page.html"
# What the page may do: run its own script and style, ask this server, show images that are in it.
POLICY = ("default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
MOST_CONNECTIONS = 400
HEADERS_S = 10.0  # for a request line and its headers to arrive
Handler = Callable[[Request], Awaitable[Response]]


class Server(Desk):
    """The log, the pairs, the engines and the training of a page, and the rules of who may ask."""

    def __init__(self, *parts: Any, rules: Rules | None = None, page: pathlib.Path = PAGE, **more: Any):
        """parts, more: as for Desk. page: the HTML file, with {{nonce}} and {{token}} in it."""
        super().__init__(*parts, **more)
        self.rules = rules or Rules()
        try:
            self.page = page.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{page}: the page cannot be read: {error.strerror or error}; restore the file") from None


# ---- answers -------------------------------------------------------------------------------------

@contextlib.contextmanager
def as_problems() -> Iterator[None]:
    """Within this block errors that a request caused are answers to it, without any path."""
    try:
        yield
    except NotSaved as error:
        raise Problem(507, f"not saved: {without_paths(error.reason)}") from error
    except Wrong as error:
        raise Problem(error.status, str(error)) from error
    except Running as error:
        raise Problem(409, str(error)) from error
    except (ValueError, UserError) as error:
        raise Problem(400, without_paths(str(error))) from error


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request; {} without a body."""
    content = await request.body()
    value = read_json(content) if content else {}
    if not isinstance(value, dict):
        raise ValueError("the body must be a JSON object")
    return value


def posted(work: Callable[[dict], dict]) -> Handler:
    """An address that reads a JSON object, and answers with one."""
    async def endpoint(request: Request) -> Response:
        with as_problems():
            return JSONResponse(finite(await run_in_threadpool(work, await body_of(request))))
    return endpoint


def asked(work: Callable[[Request], dict]) -> Handler:
    """An address that is only read."""
    async def endpoint(request: Request) -> Response:
        with as_problems():
            return JSONResponse(finite(await run_in_threadpool(work, request)))
    return endpoint


def either(reading: Handler, writing: Handler) -> Handler:
    """One address that is read and posted to."""
    async def endpoint(request: Request) -> Response:
        return await (writing if request.method == "POST" else reading)(request)
    return endpoint


def create_app(server: Server) -> Starlette:
    """The application: the page, /api, /v1."""
    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = server.page.replace("{{nonce}}", nonce).replace("{{token}}", server.rules.page_token)
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY.format(nonce=nonce)})

    async def export(request: Request) -> Response:
        with as_problems():
            name, content, lost = await run_in_threadpool(server.export, request.query_params.get("to", "trl"))
        kind = "application/zip" if name.endswith(".zip") else "application/jsonl"
        return Response(content, media_type=kind, headers={
            "Content-Disposition": f'attachment; filename="{name}"', "X-Left-Out": json.dumps(lost)})

    async def take_in(request: Request) -> Response:
        with as_problems():
            name = annotator_of({"annotator": request.query_params.get("annotator") or "import"})
            return JSONResponse(await run_in_threadpool(server.take_in, await request.body(), name))

    posts = {"next": server.next, "answer": server.answer, "undo": server.undo, "thumb": server.thumb,
             "train/stop": lambda _: server.stop()}
    routes = [Route("/", page), Route("/api/export", export), Route("/api/import", take_in, methods=["POST"]),
              Route("/api/state", asked(lambda request: server.state(request.query_params.get("annotator", "")))),
              Route("/api/records", asked(lambda request: server.records(request.query_params))),
              *(Route(f"/api/{name}", posted(work), methods=["POST"]) for name, work in posts.items()),
              Route("/api/train", either(asked(lambda _: server.progress()), posted(server.train)),
                    methods=["GET", "POST"]),
              *api.routes(server.engines)]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, rules=server.rules)],
                    exception_handlers={HTTPException: refused})
    app.router.redirect_slashes = False
    return app


async def refused(request: Request, error: Exception) -> Response:
    """The answer where there is no such address, or none for this method. It repeats nothing of the request."""
    status = getattr(error, "status_code", 500)
    text = {404: "there is nothing at this address", 405: "this address is not asked in that way"}.get(
        status, "the request is not understood")
    allowed = (getattr(error, "headers", None) or {}).get("Allow")
    return Problem(status, text, **({"Allow": allowed} if allowed else {})).response(request.scope["path"])


# ---- connections ---------------------------------------------------------------------------------

class Connection(H11Protocol):
    """A connection that is closed if a request's headers do not arrive in time; of too many connections the one
    that has done nothing for longest makes room."""

    headers_s = HEADERS_S
    waiting: asyncio.TimerHandle | None = None
    used = 0.0  # when something came last

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.used = self.loop.time()
        if len(self.connections) > MOST_CONNECTIONS:
            idle = [other for other in self.connections if other.is_idle and other is not self]
            min(idle, key=lambda other: other.used, default=self).transport.abort()
        self._watch()

    @property
    def is_idle(self) -> bool:
        """Is no request being answered or read?"""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def data_received(self, data: bytes) -> None:
        self.used = self.loop.time()
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting:
            self.waiting.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the clock run from the first moment at which headers are waited for."""
        if self.conn.their_state is not h11.IDLE:
            if self.waiting:
                self.waiting.cancel()
            self.waiting = None
        elif self.waiting is None:
            self.waiting = self.loop.call_later(self.headers_s, self._close)

    def _close(self) -> None:
        self.waiting = None
        if self.is_idle:
            self.transport.close()


def config_of(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves this application. Proxies' headers are not believed: whoever can connect could
    write any address there."""
    return uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_level="critical", access_log=False,
                          server_header=False, proxy_headers=False, timeout_keep_alive=15,
                          timeout_graceful_shutdown=3, h11_max_incomplete_event_size=MOST_HEADER_BYTES)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at this address, at any free port for 0; UserError if it is taken, or none of this
    machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        place = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # there it would let two servers share the port
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
            place.listen(256)
        except BaseException:
            place.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: nothing can listen there: "
                        f"{getattr(error, 'strerror', None) or error}; give another --port or --host, or stop the "
                        "program that is there") from None
    return place


class Announcing(uvicorn.Server):
    """uvicorn's server; it says when it answers."""

    def __init__(self, config: uvicorn.Config, begun: Callable[[], object]):
        super().__init__(config)
        self.begun = begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.begun()


def serve_on(place: socket.socket, app: Starlette, begun: Callable[[], object] = lambda: None) -> None:
    """Answer at a listening socket until SIGINT or SIGTERM. begun is called once requests are answered."""
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn gives the signal back after it has closed
        Announcing(config_of(app), begun).run(sockets=[place])
