"""The rotary keys of a config.json: two spellings, six types, and what no table can hold.

Each type takes the keys that transformers' ``modeling_rope_utils`` reads for it; another key is refused, since a reader
that knows it would compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glm4export.sources.config_keys import ConfigError, Keys
from glm4graphs.config import (
    DynamicScaling,
    Glm4Config,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Rope,
    Scaling,
    YarnScaling,
)
from glm4graphs.rope import inverse_frequencies, rotary_tables
from glm4runtime.contract import shown

MOST_POSITIONS = 2**24  # the angle of a position is computed in float32, which holds no further whole number
SPELLINGS = ("rope_scaling", "rope_parameters")  # older, and transformers 5's
TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

_COMMON = ("rope_type", "rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = {  # by rope_type, besides those that all have
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        _ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_FLOAT16 = torch.finfo(torch.float16)


def read_rope(data: dict[str, Any], where: str, max_positions: int, head_dim: int) -> Rope:
    """Read both spellings: ``rope_parameters`` (transformers 5), or top-level keys with ``rope_scaling`` (older).

    Raises ConfigError naming key, value and remedy.
    """
    key = Keys(_rope_keys(data, where), where)
    if key.data.get("partial_rotary_factor") is None:
        raise ConfigError(
            f"{where}: partial_rotary_factor is given neither at the top level nor in rope_parameters; "
            "GLM-4-0414 uses 0.5. Add it: a wrong factor is a wrong model"
        )
    factor = key("partial_rotary_factor", float)
    if not 0 < factor <= 1:
        raise ConfigError(f"{where}: partial_rotary_factor={factor} is not in (0, 1]")
    theta = key.above("rope_theta", 1)
    kind = _kind(key)
    given = [name for name, value in key.data.items() if value is not None]
    for name in given:
        if name not in (*_COMMON, *ROPE_KEYS[kind]):
            takes = ", ".join(ROPE_KEYS[kind]) or "no further key"
            raise ConfigError(
                f"{where}: rope_type={kind!r} does not go with {shown(name)[1:-1]}={shown(key.data[name])}; it takes "
                f"{takes}. Give the rope_type that is meant, or take the key out"
            )
    if kind == "default":
        return Rope(theta, factor)
    return Rope(theta, factor, _SCALINGS[kind](key, max_positions, int(head_dim * factor)))


def with_yarn(data: dict[str, Any], where: str, factor: float) -> dict[str, Any]:
    """A parsed config.json with YaRN over its own positions, as GLM-4-0414's model cards ask for beyond them.

    Raises ConfigError where it is scaled already.
    """
    keys = _rope_keys(data, where)
    if (kind := _kind(Keys(keys, where))) != "default":
        raise ConfigError(
            f"{where}: rope_type={kind!r} is its own scaling already; leave --rope-scaling out, or give a checkpoint "
            "with plain rope"
        )
    rest = {name: value for name, value in data.items() if name not in (*SPELLINGS, *TOP_LEVEL)}
    yarn = {"rope_type": "yarn", "factor": factor, _ORIGINAL: data.get("max_position_embeddings")}
    return {**rest, "rope_parameters": {**keys, **yarn}}


def check_rotary(config: Glm4Config, where: str) -> None:
    """Refuse values whose rotary tables aren't finite, leave float16's range, or can't tell positions apart."""
    rope = config.rope
    values = {"rope_theta": rope.theta, **(vars(rope.scaling) if rope.scaling else {})}
    given = ", ".join(
        f"{name}={shown(value)}" for name, value in values.items() if value is not None and name != "rope_type"
    )
    last = config.max_positions - 1
    try:
        inverse, scale = inverse_frequencies(config)
        first_row, last_row = (
            torch.cat(rotary_tables(config, row + 1, row), -1).to(torch.float16) for row in (0, last)
        )
    except (ArithmeticError, ValueError) as error:  # a logarithm of 0, an exponent beyond a float's
        raise ConfigError(f"{where}: {given} can't be computed with ({error})") from None
    finite = torch.isfinite(inverse) & (inverse > 0)
    largest = float(inverse.max()) * last  # radians
    if not finite.all():
        found = f"give an inverse frequency of {float(inverse[~finite][0])}"
    elif not _FLOAT16.tiny <= scale <= _FLOAT16.max:
        found = f"scale cos and sin by {scale:.3g}, which float16 doesn't hold"
    elif largest > MOST_POSITIONS:
        found = f"turn position {last} by {largest:.3g} radians, of which float32 holds no fraction"
    elif last and torch.equal(first_row, last_row):
        found = f"turn position {last} by {largest:.3g} radians, as good as none"
    else:
        return
    raise ConfigError(f"{where}: {given} {found}; is it this model's config?")


def _linear(key: Keys, max_positions: int, columns: int) -> LinearScaling:
    factor = key.above("factor", 0)
    _check_stretched(key.where, factor, "max_position_embeddings", max_positions)
    return LinearScaling(factor)


def _dynamic(key: Keys, max_positions: int, columns: int) -> DynamicScaling:
    return DynamicScaling(key.above("factor", 0))


def _yarn(key: Keys, max_positions: int, columns: int) -> YarnScaling:
    original = key.positive(_ORIGINAL, default=max_positions)
    factor = _factor(key, max_positions, original)
    _check_stretched(key.where, factor, _ORIGINAL, original)
    return YarnScaling(
        factor,
        original,
        attention_factor=key.optional("attention_factor"),
        beta_fast=key.optional("beta_fast") or YarnScaling.beta_fast,
        beta_slow=key.optional("beta_slow") or YarnScaling.beta_slow,
        mscale=key.optional("mscale"),
        mscale_all_dim=key.optional("mscale_all_dim"),
        truncate=key("truncate", bool, default="truncate" not in key.data),  # transformers takes null for false
    )


def _longrope(key: Keys, max_positions: int, columns: int) -> LongropeScaling:
    original = key.positive(_ORIGINAL, default=max_positions)
    short, _ = (key.numbers(name, columns // 2) for name in ("short_factor", "long_factor"))
    return LongropeScaling(_factor(key, max_positions, original), original, short, key.optional("attention_factor"))


def _llama3(key: Keys, max_positions: int, columns: int) -> Llama3Scaling:
    low, high = key.above("low_freq_factor", 0), key.above("high_freq_factor", 0)
    if not high > low:
        raise ConfigError(f"{key.where}: high_freq_factor={high} must be above low_freq_factor={low}")
    return Llama3Scaling(key.above("factor", 0), low, high, key.positive(_ORIGINAL, default=max_positions))


_SCALINGS: dict[str, Callable[[Keys, int, int], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def _kind(key: Keys) -> str:
    kind = key.data.get("rope_type")
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ConfigError(
            f"{key.where}: rope_type={shown(kind)} is not supported; supported: {', '.join(ROPE_KEYS)} "
            "(GLM-4's model cards ask for yarn beyond 32768 tokens)"
        )
    return kind


def _factor(key: Keys, max_positions: int, original: int) -> float:
    """Where it is left out, how far the model's positions go beyond its original ones, if these are given."""
    if key.data.get("factor") is None and key.data.get(_ORIGINAL) is not None:
        return max_positions / original
    return key.above("factor", 0)


def _check_stretched(where: str, factor: float, name: str, positions: int) -> None:
    if not factor * positions <= MOST_POSITIONS:
        raise ConfigError(f"{where}: factor={factor} times {name}={positions} is more than {MOST_POSITIONS} positions")


def _rope_keys(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of both spellings together; a file may hold both, but they must not disagree. Null stays null."""
    top = {name: data[name] for name in TOP_LEVEL if data.get(name) is not None}
    nested = {name: data.get(name) or {} for name in SPELLINGS}
    merged: dict[str, Any] = {}
    for spelling, keys in (("top level", top), *nested.items()):
        if not isinstance(keys, dict):
            raise ConfigError(f"{where}: {spelling}={shown(keys)} must be an object")
        for key, value in keys.items():
            name = "rope_type" if key == "type" else key
            if merged.get(name) is None:
                merged[name] = value
            elif value is not None and _differ(merged[name], value):
                raise ConfigError(
                    f"{where}: {shown(name)[1:-1]} is given twice, as {shown(merged[name])} and as {shown(value)}; "
                    "keep the right one"
                )
    scaling, parameters = nested.values()
    for name in parameters if scaling else ():  # transformers reads rope_scaling in their place
        if parameters[name] is not None and scaling.get(name) is None and top.get(name) is None:
            raise ConfigError(
                f"{where}: {shown(name)[1:-1]} is given in rope_parameters alone, and transformers reads rope_scaling "
                "where both are given; keep one of the two"
            )
    return merged


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except RecursionError:  # lists in lists in lists
        return True
