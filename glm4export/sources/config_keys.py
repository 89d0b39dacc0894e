"""Typed access to the keys of a config.json."""

from __future__ import annotations

import math
from typing import Any

from glm4runtime.contract import UserError, shown

LARGEST_SIZE = 2**31 - 1  # of a dim that kernels count with 32 bits


class ConfigError(UserError):
    """A config.json that is missing, malformed, or asks for something that can't be compiled."""


class Keys:
    """Typed access to config keys that names the key, the value and the expected type in its errors."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __call__(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of a key, of that type; a missing key and null mean ``default``."""
        value: Any = self.data.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: key {name!r} is missing")
        if kind is float:
            value = _as_float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{self.where}: {name}={shown(value)} must be a {kind.__name__}")
        return value

    def positive(self, name: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        """A whole number from 1 to ``most``."""
        value: int = self(name, int, default)
        if value < 1:
            raise ConfigError(f"{self.where}: {name}={shown(value)} must be at least 1")
        if value > most:
            raise ConfigError(f"{self.where}: {name}={shown(value)} must be at most {most}")
        return value

    def above(self, name: str, low: float) -> float:
        """A number above ``low``."""
        value: float = self(name, float)
        if not value > low:
            raise ConfigError(f"{self.where}: {name}={value} must be above {low}")
        return value

    def optional(self, name: str) -> float | None:
        """A number above 0; None where the key is missing or null."""
        return None if self.data.get(name) is None else self.above(name, 0)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """So many numbers above 0."""
        values = [_as_float(value) for value in self(name, list)]
        if len(values) != count or not all(type(value) is float and 0 < value < math.inf for value in values):
            raise ConfigError(f"{self.where}: {name}={shown(values)} must be {count} numbers above 0")
        return tuple(values)


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) < 2**53 else value
