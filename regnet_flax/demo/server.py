"""--mode demo: serves a page that shows how a trained network sees a photo."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import ipaddress
import logging
import pathlib
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from regnet_flax.errors import ConfigError, DataError, UsageError, one_line

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route
except ImportError as error:
    raise UsageError("--mode demo needs Starlette and uvicorn: pip install 'regnet_flax[demo]'") from error

from regnet_flax.command_line import Options
from regnet_flax.config.check import check_config
from regnet_flax.demo.answer import Answers
from regnet_flax.trained import Trained, with_config
from regnet_flax.training.display import working

PAGE = pathlib.Path(__file__).with_name("page.html")
MAX_BYTES = 32 * 2**20
CONNECTIONS = 16

logger = logging.getLogger("regnet_flax")


def build_app(answer: Callable[[bytes], dict[str, Any]], words: Mapping[str, str], host: str = "") -> Starlette:
    """Builds an ASGI application with two routes: GET / returns the page, POST /look returns the answer to a file.

    Files may have up to MAX_BYTES, and are processed one at a time. Errors are {"error": one line}.

    Args:
      answer: maps a file's contents to its answer; see `Answers`.
      words: the page's text about the network; see `describe`.
      host: a name for the page besides localhost and addresses.
    """
    turn = asyncio.Lock()
    text = PAGE.read_text(encoding="utf-8")
    for name, value in {**words, "max_bytes": str(MAX_BYTES)}.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(value))

    async def page(_: Request) -> HTMLResponse:
        return HTMLResponse(text)

    async def look(request: Request) -> JSONResponse:
        length = request.headers.get("content-length", "0")
        data = bytearray()
        if not length.isdecimal() or int(length) <= MAX_BYTES:
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BYTES:
                    break
            else:
                async with turn:
                    return await run_in_threadpool(_answer, answer, bytes(data))
        return _error(413, f"the file has more than {MAX_BYTES >> 20} MB: make the image smaller")

    guard = Middleware(_Guard, names=("localhost", host.lower()), policy=_policy(text))
    return Starlette(routes=[Route("/", page), Route("/look", look, methods=["POST"])], middleware=[guard])


def _answer(answer: Callable[[bytes], dict[str, Any]], data: bytes) -> JSONResponse:
    try:
        return JSONResponse(answer(data))
    except DataError as error:
        return _error(400, str(error))
    except Exception as error:
        logger.exception("the network failed on an image")
        return _error(500, f"the network failed on this image ({one_line(error)}): see the terminal")


def _error(status: int, line: str) -> JSONResponse:
    return JSONResponse({"error": line}, status)


def _policy(text: str) -> str:
    """Returns the page's Content-Security-Policy, which allows its own style, script and requests and data: URLs."""
    hashes = {}
    for kind in ("style", "script"):
        (inside,) = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        hashes[kind] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Guard:
    """Refuses requests that other sites cause in a browser, and adds the security headers.

    In DNS rebinding, an attacker's own name points to this machine. It is neither an address nor one of `names`.
    """

    def __init__(self, app: Any, names: tuple[str, ...], policy: str):
        self._app, self._names = app, names
        self._headers = {
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        headers = Headers(scope=scope)
        host = headers.get("host", "")
        own = self._is_own(host) and headers.get("origin", f"http://{host}") == f"http://{host}"
        app = self._app if own else _error(403, "the page is only available as localhost, an address or demo.host")
        await app(scope, receive, send_with_headers)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def describe(trained: Trained) -> dict[str, str]:
    """Returns the page's text about a network: "model" and "about"."""
    height, width, channels = trained.image_shape
    of = "grey " if channels == 1 else ""
    names = trained.class_names
    known = f"{len(names)} classes" + (f" ({', '.join(names)})" if len(names) <= 20 else "")
    about = f"{trained.source} · {known} · sees {of}images of {width}×{height} pixels"
    return {"model": trained.config.model.name, "about": about}


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket.

    Raises:
      ConfigError: the address or port is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"demo.host is {host!r} and demo.port {port}, which are not available ({why}): set another "
            "--config.demo.port, or 0 for any free one, or leave demo.host alone"
        ) from error
    return listening


def run(config: Any, options: Options) -> None:
    """Serves the page until a signal ends the program.

    Raises:
      ConfigError: a value is wrong, or the address or port is not available.
      WorkdirError, CheckpointError, WeightsError: see `with_config`.
    """
    check_config(config)
    with listen(config.demo.host, config.demo.port) as listening:
        working("reading the network")
        trained = with_config(config, options.workdir)
        answers = Answers(trained)
        logger.info("compiling %s, so that the first answer is quick", config.model.name)
        working("compiling")
        answers.compile()
        working("")
        _serve(trained, answers, config.demo.host, listening)


def _serve(trained: Trained, answers: Answers, host: str, listening: socket.socket) -> None:
    address, port = listening.getsockname()[:2]
    if not ipaddress.ip_address(address).is_loopback:
        logger.warning("demo.host is %s: anyone who can reach this machine can use the page", host)
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("%s, %s: open %s; Ctrl-C ends it", trained.config.model.name, trained.source, place)
    settings = uvicorn.Config(
        build_app(answers, describe(trained), host),
        log_config=None,
        log_level="critical",  # the page shows the errors
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(settings).run(sockets=[listening])
