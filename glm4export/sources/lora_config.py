"""Reading a LoRA adapter's adapter_config.json, strictly, and which modules it speaks of, by peft's rules.

A key that changes what the merged weights are is read or refused by name, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4export.sources.files import read_json
from glm4runtime.contract import UserError, shown

_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS")  # the others train heads that no GLM-4 has
_BIASES = ("none", "all", "lora_only")
_LARGEST_RANK = 2**16
_LARGEST_LAYER = 2**31 - 1
_MOST_REPEATS = 4  # in a pattern: each multiplies the ways to read a module's name by its length

# They steer training, or say where things came from: the stored tensors hold all that they came to.
_WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "fan_in_fan_out",  # peft turns it off for torch.nn.Linear, and GLM-4 has no other linears
}  # fmt: skip
_READ = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# init_lora_weights: those after which the base model's weights are still the checkpoint's
_PLAIN_INITS = ("eva", "gaussian", "orthogonal")

Matcher = Callable[[str], bool]


class AdapterError(UserError):
    """An adapter that can't be found, is damaged, doesn't fit the checkpoint, or asks for what can't be merged."""


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. Modules are named as in the model that the adapter was trained on."""

    base: str | None  # base_model_name_or_path
    dora: bool
    lora_bias: bool
    bias: str  # whose biases were trained whole: none, all, lora_only
    targets: Matcher  # whether a module has LoRA matrices
    saves: Matcher  # whether a module, or one that it lies in, was trained whole
    rank: Callable[[str], int]
    scaling: Callable[[str], float]  # what B @ A is multiplied by


def read_adapter_config(path: Path) -> AdapterConfig:
    """Raises AdapterError naming key, value and remedy."""
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; an adapter saved by peft's save_pretrained() holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return parse_adapter_config(data, str(path))


def parse_adapter_config(data: dict[str, Any], where: str) -> AdapterConfig:
    """The same from its values; ``where`` names the file in errors."""
    key = _Keys(data, where)
    if data.get("peft_type") != "LORA":
        raise key.refused("peft_type", "supported: LORA")
    if data.get("task_type") not in (None, *_TASKS):
        raise key.refused("task_type", f"supported: {', '.join(_TASKS)}")
    _refuse_others(key)
    init = data.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and init not in _PLAIN_INITS:
        raise key.refused(
            "init_lora_weights",
            "it was trained on base weights that it changed itself; convert it to plain LoRA: save it again with "
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    bias = data.get("bias") or "none"
    if bias not in _BIASES:
        raise key.refused("bias", f"supported: {', '.join(_BIASES)}")
    dora, lora_bias = key.flag("use_dora"), key.flag("lora_bias")
    if dora and lora_bias:
        raise key.refused("lora_bias", "peft knows none with use_dora")
    base = data.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise key.refused("base_model_name_or_path", "expected a name")
    saved = key.names("modules_to_save")
    return AdapterConfig(
        base=base or None,
        dora=dora,
        lora_bias=lora_bias,
        bias=bias,
        targets=_targets(key, saved),
        saves=lambda module: any(part.endswith(tuple(saved)) for part in _with_parents(module)),
        rank=(rank := _rank(key)),
        scaling=_scaling(key, rank),
    )


def _refuse_others(key: _Keys) -> None:
    """Everything else that says something: peft has dozens of ways to compute otherwise."""
    for name in sorted(key.data.keys() - _READ - _WITHOUT_EFFECT):
        value = key.data[name]
        if value is not None and value is not False and value != [] and value != {}:
            raise key.refused(
                name, "it may change what the adapter computes; merge it with peft, and build what merge_and_unload() "
                "gives"
            )  # fmt: skip


def _targets(key: _Keys, saved: list[str]) -> Matcher:
    """peft's check_target_module_exists."""
    name = "target_modules"
    given = key.data.get(name)
    if not isinstance(given, str | list):
        raise key.refused(name, "expected a list of names, a regular expression, or all-linear")
    excluded = _listed(key, "exclude_modules")
    inside_saved = [key.pattern("modules_to_save", rf"(^|.*\.){part}($|\..*)") for part in saved]
    layers, places = _layers(key)
    if isinstance(given, str) and layers is not None:
        raise key.refused("layers_to_transform", "it goes with a list of target_modules")
    if isinstance(given, str) and given.lower() == "all-linear":
        wanted: Matcher = _linear_but_the_head
    else:
        wanted = _listed(key, name)

    def in_layers(module: str) -> bool:
        if layers is None:
            return True
        match = next((match for place in places if (match := place.match(module))), None)
        layer = match and match["layer"]  # None too where a pattern of its own has an alternative without one
        return layer is not None and int(layer) in layers

    def targets(module: str) -> bool:
        if excluded(module) or any(pattern.match(module) for pattern in inside_saved):
            return False
        return wanted(module) and in_layers(module)

    return targets


def _linear_but_the_head(module: str) -> bool:
    return module.endswith("_proj")


def _listed(key: _Keys, name: str) -> Matcher:
    """Modules by a list of names, or of the ends of names, or by a regular expression."""
    given = key.data.get(name)
    if isinstance(given, str) and given:
        pattern = key.pattern(name, given)
        return lambda module: pattern.fullmatch(module) is not None
    names = key.names(name)
    ends = tuple(f".{end}" for end in names)
    return lambda module: module in names or module.endswith(ends)


def _layers(key: _Keys) -> tuple[set[int] | None, list[re.Pattern[str]]]:
    """The layers that are transformed (None: all), and where in a module's name its layer stands."""
    given = key.data.get("layers_to_transform")
    listed = [given] if type(given) is int else given
    if listed is None or listed == []:
        if key.names("layers_pattern", lone=True):
            raise key.refused("layers_pattern", "it goes with layers_to_transform")
        return None, []
    if not isinstance(listed, list) or any(type(n) is not int or not 0 <= n <= _LARGEST_LAYER for n in listed):
        raise key.refused("layers_to_transform", "expected numbers of layers")
    patterns = [rf"(?:^|.*?\.){place}\." for place in key.names("layers_pattern", lone=True)] or [r".*?\.[^.]*\."]
    return set(listed), [key.pattern("layers_pattern", rf"{before}(?P<layer>\d+)\.") for before in patterns]


def _rank(key: _Keys) -> Callable[[str], int]:
    default = key.rank("r", key.data.get("r"))
    given = {name: key.rank(f"rank_pattern[{shown(name)}]", value) for name, value in key.table("rank_pattern")}
    patterns = [(key.end_pattern("rank_pattern", name), value) for name, value in given.items()]
    return lambda module: next((value for pattern, value in patterns if pattern.match(module)), default)


def _scaling(key: _Keys, rank: Callable[[str], int]) -> Callable[[str], float]:
    default = key.alpha("lora_alpha", key.data.get("lora_alpha"))
    given = {name: key.alpha(f"alpha_pattern[{shown(name)}]", value) for name, value in key.table("alpha_pattern")}
    patterns = [(key.end_pattern("alpha_pattern", name), value) for name, value in given.items()]
    stabilized = key.flag("use_rslora")

    def scaling(module: str) -> float:
        alpha = next((value for pattern, value in patterns if pattern.match(module)), default)
        return alpha / (math.sqrt(rank(module)) if stabilized else rank(module))

    return scaling


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


class _Keys:
    """Typed access to the values that names the key and what it holds in its errors."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def refused(self, name: str, why: str) -> AdapterError:
        return AdapterError(f"{self.where}: {shown(name)[1:-1]}={shown(self.data.get(name))} is not supported; {why}")

    def flag(self, name: str) -> bool:
        value = self.data.get(name)
        if not isinstance(value, bool | None):
            raise self.refused(name, "expected true or false")
        return bool(value)

    def names(self, name: str, *, lone: bool = False) -> list[str]:
        """A list of texts; None is empty. ``lone``: a text may stand for a list of it."""
        value = self.data.get(name)
        value = [value] if lone and isinstance(value, str) and value else value or []
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.refused(name, "expected a list of names")
        return value

    def table(self, name: str) -> list[tuple[str, Any]]:
        value = self.data.get(name) or {}
        if not isinstance(value, dict):
            raise self.refused(name, "expected an object")
        return list(value.items())

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
            raise AdapterError(f"{self.where}: {name}={shown(value)} is not a rank; expected 1 to {_LARGEST_RANK}")
        return value

    def alpha(self, name: str, value: Any) -> float:
        number = type(value) in (int, float) and abs(value) <= 2**53 and math.isfinite(value)
        if not number or not value > 0:
            raise AdapterError(f"{self.where}: {name}={shown(value)} is not a number above 0")
        return float(value)

    def pattern(self, name: str, text: str) -> re.Pattern[str]:
        """A regular expression that takes no time to speak of: an adapter's author is a stranger."""
        if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > _MOST_REPEATS:
            raise AdapterError(
                f"{self.where}: {name} repeats a group, or has more than {_MOST_REPEATS} repeats, which may take hours "
                f"to match: {shown(text)}; write it with fewer, or list the modules"
            )
        return self._compiled(name, text)

    def _compiled(self, name: str, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"{self.where}: {name} holds no regular expression ({error}): {shown(text)}") from None

    def end_pattern(self, name: str, text: str) -> re.Pattern[str]:
        """As peft's get_pattern_key: the whole of a module's name, or its last components."""
        self.pattern(name, text)
        return self._compiled(name, rf"(.*\.)?({text})$")
