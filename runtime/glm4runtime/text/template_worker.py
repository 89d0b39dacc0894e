"""The process that chat templates run in: started by :mod:`glm4runtime.text.template_process`, never imported by it.

A template comes with a download. Jinja's sandbox keeps it from Python's internals, but not from a loop without end or a
string of gigabytes, not even while it is compiled: Jinja folds constants. So all of it happens here, under limits that
the kernel keeps. Standard library and Jinja only; run as a script.

Compiling and rendering follow ``transformers.utils.chat_template_utils`` (same environment, filters and globals), so
that prompts are byte for byte those that the model was trained on.
"""

from __future__ import annotations

import json
import marshal
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from typing import Any

sys.path.extend(sys.argv[4:])

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

# An answer: its kind, its length in bytes, its UTF-8. Requests come in marshal's form, which keeps tuples and int keys.
HEADER = struct.Struct("!cQ")
LENGTH = struct.Struct("!Q")
OK, FAILED, TOO_MUCH_MEMORY = b"k", b"f", b"m"


def main() -> None:
    """Answer the first request, a template's source, with the names in it; each further one, variables, with text."""
    seconds, memory, longest = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asked
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the parent does with it, blocks or ignores
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    template: jinja2.Template | None = None
    with socket.socket(fileno=0) as parent:
        while True:
            request = _receive(parent)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time; the kernel ends the process with SIGPROF
            try:
                if template is None:
                    environment = _environment()
                    template = environment.from_string(request)
                    kind, text = OK, json.dumps(_names(environment, request))
                else:
                    kind, text = OK, template.render(request)
                    if len(text) > longest:
                        raise MemoryError
                answer = text.encode("utf-8", "surrogatepass")
            except MemoryError:
                kind, answer = TOO_MUCH_MEMORY, b""
            except Exception as error:  # a template is a program: it may divide by zero or add None to a string
                kind, answer = FAILED, _describe(error, template is None).encode("utf-8", "replace")
            signal.setitimer(signal.ITIMER_PROF, 0)
            parent.sendall(HEADER.pack(kind, len(answer)) + answer)
            if template is None or kind == TOO_MUCH_MEMORY:
                return


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _receive(parent: socket.socket) -> Any:
    return marshal.loads(_bytes(parent, LENGTH.unpack(_bytes(parent, LENGTH.size))[0]))


def _bytes(parent: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = parent.recv_into(view)
        if not got:
            os._exit(0)  # the parent is done with the template, or gone
        view = view[got:]
    return data


def _names(environment: jinja2.Environment, source: str) -> list[str]:
    """Everything that the template may look up by name or compare with: attributes, keys, and strings."""
    tree = environment.parse(source)
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return sorted(attributes | strings)


def _describe(error: Exception, compiling: bool) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f", line {error.lineno}: {error.message}"
    if compiling and isinstance(error, RecursionError | SyntaxError):  # SyntaxError: Python's limit on nested blocks
        return f": nested too deeply: {error}"
    if isinstance(error, RecursionError):
        return ": messages, tools or the template's own macros nest without end"
    # Jinja rewrites tracebacks so that the template's own lines are in them, in the file "<template>".
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    message = str(error.message) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return f", line {lines[-1]}: {message}" if lines else f": {message}"


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``, which training frameworks use to mark the assistant's own tokens.

    To a prompt it makes no difference, but the body must be rendered as transformers does: as a scope of its own.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` that refuses underscored names: a template has no business with Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may write namespace(self=...)
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscored(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscored(name)
        super().__setitem__(name, value)


def _refuse_underscored(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}: names can't begin with an underscore")


class _Dict:
    """The ``dict`` of templates: callable as the type is, but not the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as `transformers.utils.chat_template_utils` sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ', which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


if __name__ == "__main__":
    main()
