"""Errors that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: shown as one message, without a traceback, with exit status 2."""


class BundleError(UserError):
    """A bundle that is missing, damaged, or not of a format that this version reads."""
