"""A page of runs while they train: it reads their folders, and pushes what is new.

It listens on 127.0.0.1 alone, and answers only who knows the token in its address, under a Host
that is this machine (a name that somebody points here by DNS is none). There is nothing to write
to, and no path to ask for: a run is named by what the page was offered. Looking at the disk takes
at most a hundredth of a core's time, and none where no page is open.
"""

import asyncio
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import UserError
from engine.paths import written_path
from engine.serve import address, listening
from engine.train.live import GLYPHS
from tools.report import style
from tools.report.curves import Shown, Stamp, read_run, runs_in, stamp_of

LOOK_S = 0.5
"""Between two looks at the disk, at least."""
SHARE = 0.01
"""Of a core, that looking may take."""
MOST_CHOSEN = 8
"""Runs on a page, as many as there are colours."""
HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


class Guard:
    """Answers whoever may look; others get a number and no body."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        token = scope["path"].removeprefix("/").partition("/")[0]
        is_known = secrets.compare_digest(token.encode(), self._token.encode())
        host = request.headers.get("host", "")
        if not is_known or (host.rpartition(":")[0] or host) not in HOSTS:
            await Response(status_code=403)(scope, receive, send)
        elif request.method != "GET":
            await Response(status_code=405)(scope, receive, send)
        else:
            await self._app(scope, receive, self._with_headers(send))

    @staticmethod
    def _with_headers(send: Send) -> Send:
        pairs = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *pairs]
            await send(message)

        return sending


class Live:
    """The page, its events, and the pictures of glyphs.

    Args:
        folders: runs, or folders with runs in them: those that are shown at first.
        beside: likewise, those that are offered too.
    """

    def __init__(self, folders: Sequence[Path], beside: Sequence[Path], token: str) -> None:
        self._folders, self._beside = folders, beside
        self._read: dict[str, tuple[Stamp, Shown]] = {}
        self.is_over = asyncio.Event()
        """Whoever looks gets a last look, and is told so."""
        routes = [
            Route("/{token}/", self._page),
            Route("/{token}/events", self._events),
            Route("/{token}/glyphs", self._glyphs),
        ]
        self.app = Guard(Starlette(routes=routes), token)

    async def _page(self, _: Request) -> Response:
        nonce = secrets.token_urlsafe()
        policy = {"Content-Security-Policy": POLICY.format(nonce)}
        page = style.render("live.html", nonce=nonce, series=len(style.SERIES))
        return HTMLResponse(page, headers=policy)

    async def _glyphs(self, request: Request) -> Response:
        run = self._offered().get(request.query_params.get("run", ""))
        if run is None or not (run / GLYPHS).is_file():
            return Response(status_code=404)
        return FileResponse(run / GLYPHS, media_type="image/png")

    async def _events(self, request: Request) -> Response:
        chosen = request.query_params.getlist("run")[:MOST_CHOSEN]
        return StreamingResponse(self._news(chosen), media_type="text/event-stream")

    async def _news(self, chosen: list[str]) -> AsyncIterator[str]:
        """Events: `runs` whenever there are others, `run` whenever one has changed, `end`."""
        sent: dict[str, object] = {}
        while True:
            is_last, start_s = self.is_over.is_set(), time.perf_counter()
            offered = self._offered()
            names = chosen or list(runs_in(self._folders))[:MOST_CHOSEN]
            state = {"offered": list(offered), "chosen": [n for n in names if n in offered]}
            if sent.get("") != state:
                sent[""] = state
                yield _event("runs", state)
            for name in state["chosen"]:
                shown, stamp = self._shown(name, offered[name])
                if sent.get(name) != stamp:
                    sent[name] = stamp
                    yield _event("run", asdict(shown))
            if is_last:
                yield _event("end", {})
                return
            yield ":\n\n"  # finds out whether anybody still listens
            pause_s = max(LOOK_S, (time.perf_counter() - start_s) / SHARE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.is_over.wait(), pause_s)

    def _offered(self) -> dict[str, Path]:
        return runs_in([*self._folders, *self._beside])

    def _shown(self, name: str, run: Path) -> tuple[Shown, Stamp]:
        """What there is to show of a run, read again if its files have changed."""
        stamp = stamp_of(run)
        if name not in self._read or self._read[name][0] != stamp:
            self._read[name] = stamp, read_run(name, run, stamp)
        return self._read[name][1], stamp


def _event(kind: str, content: object) -> str:
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n"


def _server(live: Live) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            live.app,
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            lifespan="off",
            http="h11",
            ws="none",
            loop="asyncio",
            limit_concurrency=100,
            timeout_graceful_shutdown=1,
        )
    )


def show_runs(folders: Sequence[Path], port: int) -> None:
    """Serve runs, or folders with runs in them, until Ctrl-C.

    Raises:
        UserError: one of them is neither, or the port is not free.
    """
    for folder in folders:
        if not runs_in([folder]):
            remedy = "name the folder of a run, or one in which runs lie"
            raise UserError(f"{folder}: is no run's folder, and holds none; {remedy}")
    token = secrets.token_urlsafe()
    with listening(port) as listener:
        click.echo(f"page: {address(listener, token)}  (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            asyncio.run(_serve(listener, Live(folders, (), token)))


async def _serve(listener: socket.socket, live: Live, lifeline: int | None = None) -> None:
    """Serve until a signal, or until what `lifeline` reads from ends."""
    server = _server(live)

    def end() -> None:
        asyncio.get_running_loop().remove_reader(lifeline or 0)
        live.is_over.set()
        server.should_exit = True

    if lifeline is not None:
        asyncio.get_running_loop().add_reader(lifeline, end)
    await server.serve(sockets=[listener])


def main() -> None:
    """The process of a run (engine/serve.py): its port's descriptor and folder are the arguments.

    The token comes by the standard input, whose end is that of the run.
    """
    handle, run = sys.argv[1:]
    os.nice(10)  # it takes what training leaves
    with open(0, "rb", buffering=0, closefd=False) as lifeline:
        token = lifeline.readline().decode().strip()
    out = written_path(run).absolute()
    with socket.socket(fileno=int(handle)) as listener:
        asyncio.run(_serve(listener, Live([out], [out.parent], token), lifeline=0))


if __name__ == "__main__":
    main()
