"""The installed flavours of TensorRT: their Python modules, versions and log."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from glm4runtime.contract import UserError, installing
from glm4runtime.contract.engine_spec import FLAVOURS


def import_flavour(flavour: str) -> Any:
    """The module that is the API of ``flavour``, a key of FLAVOURS, which is also the name of the pip extra.

    Raises UserError where it isn't installed or its libraries don't load.
    """
    try:
        return import_module(FLAVOURS[flavour])
    except ModuleNotFoundError as error:
        if error.name != FLAVOURS[flavour]:
            raise
        raise UserError(f"{FLAVOURS[flavour]} is not installed; {installing(flavour)}") from None
    except (ImportError, OSError) as error:  # its shared libraries
        raise UserError(f"{FLAVOURS[flavour]} cannot be loaded: {error}") from None


def version_of(module: Any) -> str:
    """The version of a flavour that engines are built by, such as ``1.7.1.116``."""
    return str(module.__version__)


def error_log(module: Any) -> Any:
    """A logger for the flavour's objects: silent, its ``text`` is the first line of the first error since the start."""

    class ErrorLog(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.text = ""

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(module.ILogger.Severity.ERROR) and not self.text:
                self.text = message.splitlines()[0]

    return ErrorLog()
