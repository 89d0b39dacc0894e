"""Errors that the user can mend, and the remedy that many of them share."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: shown as one message, without a traceback, with exit status 2."""


class BundleError(UserError):
    """A bundle that is missing, damaged, or not of a format that this version reads."""


def installing(*extras: str) -> str:
    """The command that installs these extras of pyproject.toml: the package is on no index, so from its repository."""
    return f"pip install '.[{','.join(extras)}]' in a clone of glm4export's repository"
