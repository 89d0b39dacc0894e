"""The chat page at ``/``: static files of ours, which talk to ``/v1/chat/completions`` like any other client."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/view.js": ("view.js", "text/javascript"),
    "/page/stream.js": ("stream.js", "text/javascript"),
    "/page/markdown.js": ("markdown.js", "text/javascript"),
}

#: Served without a key: the page asks for one itself.
PATHS = frozenset(_FILES)

# Whatever a model writes, nothing but our own files runs, and nothing is asked of other machines. Trusted types make
# a browser refuse to read text as HTML.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def _add(path: str, file: str, media_type: str) -> None:
    content = resources.files(__name__).joinpath(file).read_bytes()

    async def serve() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_HEADERS)

    router.add_api_route(path, serve, methods=["GET"])


for _path, (_file, _type) in _FILES.items():
    _add(_path, _file, _type)
