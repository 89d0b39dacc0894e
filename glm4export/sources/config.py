"""Reading a checkpoint's config.json and generation_config.json, strictly.

A key that changes what the model computes is read or refused, never guessed: a silent default is a wrong model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from glm4export.sources.files import read_json
from glm4graphs.config import Glm4Config, Rope, YarnScaling
from glm4graphs.rope import inverse_frequencies, rotary_tables
from glm4runtime.contract import TokenIds, UserError, shown

ARCHITECTURE = "Glm4ForCausalLM"
SUPPORTED_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")
SUPPORTED_ROPE = ("default", "linear", "yarn")

_LARGEST_SIZE = 2**31 - 1  # of a dim that kernels count with 32 bits
_LARGEST_HEAD = 2**16  # a hundred times what attention kernels take
_MOST_POSITIONS = 2**24  # the angle of a position is computed in float32, which holds no further whole number
_FLOAT16 = torch.finfo(torch.float16)


class ConfigError(UserError):
    """A config.json that is missing, malformed, or asks for something that can't be compiled."""


def read_config(path: Path) -> Glm4Config:
    """The model geometry of a checkpoint's config.json. Raises ConfigError naming key, value and remedy."""
    return parse_config(_read_json(path), str(path))


def parse_config(data: dict[str, Any], where: str) -> Glm4Config:
    """The model geometry of a parsed config.json; ``where`` names it in errors."""
    architectures = data.get("architectures") or []
    if architectures != [ARCHITECTURE]:
        raise ConfigError(f"{where}: architectures={shown(architectures)} is not supported; supported: {ARCHITECTURE}")
    if data.get("quantization_config") is not None:
        raise ConfigError(f"{where}: the checkpoint is already quantized; give the original bf16, fp16 or fp32 one")
    key = _Keys(data, where)
    act = key("hidden_act", str)
    if act not in SUPPORTED_ACTIVATIONS:
        raise ConfigError(
            f"{where}: hidden_act={shown(act)} is not supported; supported: {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    sizes = {
        name: key.positive(name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    }
    positions = key.positive("max_position_embeddings", most=_MOST_POSITIONS)
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads:
        raise ConfigError(f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    config = Glm4Config(
        **sizes,
        max_position_embeddings=positions,
        head_dim=key.positive("head_dim", default=sizes["hidden_size"] // heads, most=_LARGEST_HEAD),
        hidden_act=act,
        rms_norm_eps=_eps(key),
        attention_bias=key("attention_bias", bool, default=True),
        tie_word_embeddings=key("tie_word_embeddings", bool, default=False),
        rope=_rope(data, where, positions),
    )
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        raise ConfigError(
            f"{where}: head_dim={config.head_dim} and partial_rotary_factor={config.rope.partial_rotary_factor} give "
            f"{config.rotary_dim} rotary columns; an even number of at least 2 is needed"
        )
    _check_rotary(config, where)
    return config


def sequence_limit(config: Glm4Config, wanted: int | None) -> int:
    """The bundle's cache length. Raises ConfigError past the positions that the model was made for."""
    limit = config.max_positions
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise ConfigError(
            f"--max-seq-len {wanted} is not in 1..{limit}, the model's positions; "
            "for longer texts GLM-4's model cards ask for YaRN: add rope_scaling to config.json"
        )
    return wanted


def read_token_ids(folder: Path) -> TokenIds:
    """Stop, padding and start ids: generation_config.json's where it has them, else config.json's.

    GLM-4 stops on a *list*; the tokenizer's single eos would let it talk on as the user.
    """
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    merged = {**config, **{name: value for name, value in generation.items() if value is not None}}
    eos = merged.get("eos_token_id")
    eos_ids: list[Any] = eos if isinstance(eos, list) and eos else [eos]
    pad, bos = merged.get("pad_token_id"), merged.get("bos_token_id")
    vocab = _Keys(config, str(folder / "config.json")).positive("vocab_size")
    optional = [(name, value) for name, value in (("pad_token_id", pad), ("bos_token_id", bos)) if value is not None]
    for name, value in (*(("eos_token_id", value) for value in eos_ids), *optional):
        if type(value) is not int or not 0 <= value < vocab:
            raise ConfigError(f"{folder}: {name}={shown(value)} is not a token id below vocab_size={vocab}")
    return TokenIds(eos=tuple(eos_ids), pad=pad, bos=bos)


def _rope(data: dict[str, Any], where: str, max_positions: int) -> Rope:
    """Read both spellings: ``rope_parameters`` (transformers 5), or top-level keys with ``rope_scaling`` (older)."""
    key = _Keys(_rope_keys(data, where), where)
    if "partial_rotary_factor" not in key.data:
        raise ConfigError(
            f"{where}: partial_rotary_factor is given neither at the top level nor in rope_parameters; "
            "GLM-4-0414 uses 0.5. Add it: a wrong factor is a wrong model"
        )
    factor = key("partial_rotary_factor", float)
    if not 0 < factor <= 1:
        raise ConfigError(f"{where}: partial_rotary_factor={factor} is not in (0, 1]")
    theta = key.above("rope_theta", 1)
    kind = key.data.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE:
        raise ConfigError(
            f"{where}: rope_type={shown(kind)} is not supported; supported: {', '.join(SUPPORTED_ROPE)} "
            "(GLM-4's model cards ask for yarn beyond 32768 tokens)"
        )
    if kind == "default":
        return Rope(theta, factor)
    if kind == "linear":
        return Rope(theta, factor, linear_factor=key.above("factor", 0))
    optional = {
        name: key.above(name, 0)
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        if name in key.data
    }
    yarn = YarnScaling(
        factor=key.above("factor", 0),
        original_max_position_embeddings=key.positive("original_max_position_embeddings", default=max_positions),
        truncate=key("truncate", bool, default=True),
        **optional,
    )
    if not yarn.factor * yarn.original_max_position_embeddings <= _MOST_POSITIONS:
        raise ConfigError(
            f"{where}: factor={yarn.factor} times original_max_position_embeddings="
            f"{yarn.original_max_position_embeddings} is more than {_MOST_POSITIONS} positions"
        )
    return Rope(theta, factor, yarn=yarn)


def _eps(key: _Keys) -> float:
    """The norms' eps. Graphs hold it in float32; float16 kernels may round it to float16."""
    eps = key.above("rms_norm_eps", 0)
    least, most = torch.finfo(torch.float32).tiny, _FLOAT16.max
    if not least <= eps <= most:
        raise ConfigError(
            f"{key.where}: rms_norm_eps={eps} is not in {least:.2g} to {most:.0f}, what a norm can compute with"
        )
    return eps


def _check_rotary(config: Glm4Config, where: str) -> None:
    """Refuse values whose rotary tables aren't finite, leave float16's range, or can't tell positions apart."""
    rope = config.rope
    values = {"rope_theta": rope.theta}
    if rope.linear_factor != 1:
        values["factor"] = rope.linear_factor
    if rope.yarn is not None:
        values |= {name: value for name, value in vars(rope.yarn).items() if value is not None}
    given = ", ".join(f"{name}={value}" for name, value in values.items())
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
    elif largest > _MOST_POSITIONS:
        found = f"turn position {last} by {largest:.3g} radians, of which float32 holds no fraction"
    elif last and torch.equal(first_row, last_row):
        found = f"turn position {last} by {largest:.3g} radians, as good as none"
    else:
        return
    raise ConfigError(f"{where}: {given} {found}; is it this model's config?")


def _rope_keys(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of both spellings together; a file may hold both, but they must not disagree."""
    top = {name: data.get(name) for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")}
    nested = {name: data.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    merged: dict[str, Any] = {}
    for spelling, keys in (("top level", top), *nested.items()):
        if not isinstance(keys, dict):
            raise ConfigError(f"{where}: {spelling}={shown(keys)} must be an object")
        for key, value in keys.items():
            name = "rope_type" if key == "type" else key
            if value is not None and _differ(merged.setdefault(name, value), value):
                raise ConfigError(
                    f"{where}: {shown(name)[1:-1]} is given twice, as {shown(merged[name])} and as {shown(value)}; "
                    "keep the right one"
                )
    return merged


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except RecursionError:  # lists in lists in lists
        return True


class _Keys:
    """Typed access to config keys that names the key, the value and the expected type in its errors."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __call__(self, name: str, kind: type, default: Any = None) -> Any:
        value: Any = self.data.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: key {name!r} is missing")
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{self.where}: {name}={shown(value)} must be a {kind.__name__}")
        return value

    def positive(self, name: str, default: int | None = None, most: int = _LARGEST_SIZE) -> int:
        value: int = self(name, int, default)
        if value < 1:
            raise ConfigError(f"{self.where}: {name}={shown(value)} must be at least 1")
        if value > most:
            raise ConfigError(f"{self.where}: {name}={shown(value)} must be at most {most}")
        return value

    def above(self, name: str, low: float) -> float:
        value: float = self(name, float)
        if not value > low:
            raise ConfigError(f"{self.where}: {name}={value} must be above {low}")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a checkpoint folder in Hugging Face layout holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
