"""config.json's ``quantization_config``, read strictly: which layouts a quantized checkpoint may hold.

Which linears are quantized, and how, the tensors themselves tell: names and shapes leave no doubt. So the config's
regular expressions (``dynamic``, ``targets``, ``ignore``) are never run; what they may lead to is a layout of this
list, or a linear that lies there as it is. A key that is neither read here nor known to change nothing is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glm4export.sources.config_keys import ConfigError
from glm4export.sources.quantized.layouts import AwqGemm, Compressed, Gptq, Layout
from glm4runtime.contract import shown

HEAD_MODULE = "lm_head"
_LARGEST_GROUP = 2**20

# What tells how a checkpoint was made, or how some package is to run it, and doesn't change what its tensors mean.
_MADE = {
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware", "dataset"),
    *("tokenizer", "batch_size", "nsamples", "seqlen", "iters", "lr", "minmax_lr", "model_seqlen", "max_input_length"),
    *("model_name_or_path", "model_file_base_name", "pad_token_id", "block_name_to_quantize", "provider"),
    *("module_name_preceding_first_block", "modules_in_block_to_quantize", "cache_block_outputs", "meta", "failsafe"),
    *(
        "autoround_version",
        "enable_quanted_input",
        "enable_minmax_tuning",
        "low_gpu_mem_usage",
        "amp",
        "to_quant_block_names",
    ),
    *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "backend", "method", "quant_method"),
}
_GPTQ_KEYS = {
    *("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype", "dynamic", "lm_head"),
    *("is_marlin_format", "data_type", "awq_gemm_checkpoint", "activation"),
}
_AWQ_KEYS = {
    *("bits", "group_size", "zero_point", "version", "format", "checkpoint_format", "modules_to_not_convert", "sym"),
    *("desc_act", "pack_dtype", "data_type", "lm_head", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "dynamic"),
}
_CT_KEYS = {
    *("quant_method", "format", "config_groups", "ignore", "quantization_status", "global_compression_ratio"),
    *("version", "run_compressed", "dequantize", "use_optimized_inference"),
}
_CT_WEIGHT_KEYS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "actorder", "scale_dtype", "zp_dtype"),
    *("observer", "observer_kwargs"),
}
_CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Declared:
    """What a quantization_config says."""

    method: str
    layouts: tuple[Layout, ...]
    unquantized: tuple[str, ...]  # modules that it says aren't quantized, as it names them
    quantized_head: bool  # it says that lm_head is quantized
    activations: str | None  # how inputs were to be quantized, which no bundle does


def parse_quantization(data: object, where: str) -> Declared:
    """What a parsed ``quantization_config`` says; ``where`` names its file. Raises ConfigError naming key and value."""
    keys = _Keys(data, f"{where}: quantization_config")
    method = keys.data.get("quant_method", keys.data.get("method"))
    reader = _METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        why = _REFUSED.get(method) if isinstance(method, str) else None
        raise ConfigError(
            f"{keys.where} has quant_method={shown(method)}, which is not read"
            + (f": {why}" if why else "")
            + f"; read: {', '.join(_METHODS)}. Load it with the package that wrote it, dequantize it there, and build "
            "what that saves, or give the checkpoint it was made from"
        )
    return reader(keys)


class _Keys:
    """Typed access to an object's keys; nothing that isn't asked for may lie in it."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}={shown(data)} must be an object")
        self.data: dict[str, Any] = data
        self.where = where

    def only(self, known: set[str]) -> None:
        """Refuse keys that aren't known, unless they hold nothing."""
        for key, value in self.data.items():
            if key not in known and value not in (None, False, {}, []):
                raise ConfigError(
                    f"{self.where} has {shown(key)[1:-1]}={shown(value)}, which may change what the tensors mean and "
                    "is not read; remove it if it doesn't, or give the checkpoint that this one was made from"
                )

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None, why: str = "") -> Any:
        """The key's value, one of those (null counts as absent). Raises ConfigError for any other."""
        value = self.data.get(key)
        if value is None:
            value = default
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise ConfigError(
                f"{self.where} has {key}={shown(value)}, which is not supported; supported: "
                f"{', '.join(map(str, allowed))}{why}"
            )
        return value

    def group(self, default: Any = None) -> int | None:
        """``group_size``; None for one group of all columns, which is written -1."""
        value = self.data.get("group_size")
        if value is None:
            value = default
        if type(value) is not int or not (value == -1 or 0 < value <= _LARGEST_GROUP):
            raise ConfigError(
                f"{self.where} has group_size={shown(value)}, which is neither -1 nor a number of columns"
            )
        return None if value == -1 else value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings; null counts as empty."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{self.where} has {key}={shown(value)}, which must be a list of names")
        return tuple(value)

    def inside(self, key: str) -> _Keys:
        return _Keys(self.data[key], f"{self.where}.{key}")


def _gptq(keys: _Keys) -> Declared:
    keys.only(_MADE | _GPTQ_KEYS)
    for flag in ("is_marlin_format", "awq_gemm_checkpoint"):
        keys.one_of(flag, (False,), False, "; its weights are packed for one kernel")
    why = "; 2 and 3 bits have no kernel here, and other layouts are for one package's kernels"
    older = keys.data.get("format")
    layout = keys.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq" if older is None else older, why)
    keys.one_of("pack_dtype", ("int32", "torch.int32"), "int32")
    keys.one_of("data_type", ("int",), "int")
    act_order = keys.one_of("desc_act", (True, False), False)
    meta = keys.data.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else None
    quantizers = quantizers if isinstance(quantizers, list) else [quantizers]
    borrows = any(isinstance(name, str) and name.startswith("gptqmodel") for name in quantizers)
    dynamic = keys.data.get("dynamic") or {}
    base = {"bits": keys.data.get("bits"), "group_size": keys.data.get("group_size", 128)}
    layouts = []
    for pattern, override in ({"": {}} | (dynamic if isinstance(dynamic, dict) else {"dynamic": dynamic})).items():
        if pattern.startswith("-:"):
            continue  # linears that lie there as they are
        own = _Keys(override, f"{keys.where}.dynamic[{shown(pattern)}]" if pattern else keys.where)
        own.only(_MADE | {"bits", "group_size", "sym", "desc_act"})
        merged = _Keys({**base, **own.data}, own.where)
        ordered = act_order or merged.data.get("desc_act") is True
        bits = merged.one_of("bits", (4, 8), why=why)
        layouts.append(Gptq(bits, merged.group(), layout == "gptq", borrows, ordered))
    head = keys.one_of("lm_head", (True, False), False)
    inputs = keys.data.get("activation")
    activations = None if inputs is None else shown(inputs)
    return Declared("gptq", tuple(dict.fromkeys(layouts)), (), head, activations)


def _awq(keys: _Keys) -> Declared:
    keys.only(_MADE | _AWQ_KEYS)
    if keys.data.get("backend") == "llm-awq":
        raise ConfigError(f"{keys.where} has backend=llm-awq, whose layout is not read; AWQ's GEMM layout is")
    for key in ("version", "format", "checkpoint_format"):
        keys.one_of(key, ("gemm", "GEMM"), "gemm", "; the others are shuffled for one package's kernels")
    keys.one_of("bits", (4,), 4)
    keys.one_of("zero_point", (True,), True, "; AWQ's GEMM layout has zero points")
    keys.one_of("pack_dtype", ("int32", "torch.int32"), "int32")
    keys.one_of("data_type", ("int",), "int")
    head = keys.one_of("lm_head", (True, False), False)
    return Declared("awq", (AwqGemm(keys.group(128)),), keys.names("modules_to_not_convert"), head, None)


def _compressed(keys: _Keys) -> Declared:
    keys.only(_CT_KEYS | {"sparsity_config"})
    keys.one_of("quantization_status", ("compressed",), why="; the others hold weights that aren't compressed yet")
    if (sparsity := keys.data.get("sparsity_config")) not in (None, {}):
        keys.inside("sparsity_config").one_of("format", ("dense",), why=f"; found {shown(sparsity)}")
    layouts, activations = [], None
    groups = (
        keys.inside("config_groups") if "config_groups" in keys.data else _Keys(None, f"{keys.where}.config_groups")
    )
    for name in groups.data:
        group = groups.inside(name)
        group.only({"targets", "weights", "input_activations", "output_activations", "format"})
        kind = group.data.get("format") or keys.data.get("format")
        inputs = group.data.get("input_activations") or group.data.get("output_activations")
        if inputs is not None:
            bits = _Keys(inputs, f"{group.where}.input_activations").data
            activations = f"{'dynamic' if bits.get('dynamic') else 'static'} {bits.get('type')}{bits.get('num_bits')}"
        if group.data.get("weights") is not None:
            kind = _Keys({"format": kind}, group.where).one_of("format", _CT_FORMATS)
            layouts.append(
                _compressed_weights(group.inside("weights"), kind == "pack-quantized", activations is not None)
            )
    if not layouts:
        raise ConfigError(f"{keys.where}.config_groups quantizes no weights; remove quantization_config")
    head = False  # `ignore` tells
    return Declared("compressed-tensors", tuple(dict.fromkeys(layouts)), keys.names("ignore"), head, activations)


def _compressed_weights(keys: _Keys, packed: bool, activations: bool) -> Compressed:
    keys.only(_CT_WEIGHT_KEYS)
    keys.one_of("dynamic", (False,), False)
    is_float = keys.one_of("type", ("int", "float"), "int") == "float"
    why = "; 4 and 8 bits have kernels here" + (", and of floats fp8" if is_float else "")
    bits = keys.one_of("num_bits", (8,) if is_float else (4, 8), 8, why)
    if is_float and packed:
        keys.one_of("type", ("int",), why=" in pack-quantized")
    group = keys.group(-1)
    default = "group" if group else "channel" if keys.data.get("group_size") == -1 else "tensor"
    strategy = keys.one_of("strategy", ("tensor", "channel", "group"), default)
    if (strategy == "group") != (group is not None):
        raise ConfigError(f"{keys.where} has strategy={strategy} and group_size={shown(keys.data.get('group_size'))}")
    order = keys.one_of("actorder", ("weight", "static", "group", "dynamic", True, False), False)
    return Compressed(
        bits,
        group,
        symmetric=keys.one_of("symmetric", (True,) if is_float else (True, False), True),
        packed=packed,
        is_float=is_float,
        per_tensor=strategy == "tensor",
        activations=activations,
        act_order=order in ("group", "dynamic", True),
    )


_METHODS: Mapping[str, Callable[[_Keys], Declared]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
_REFUSED = {
    "bitsandbytes": "its 4-bit levels are not evenly spaced, so that no kernel of integers holds them, and its 8-bit "
    "weights leave outliers to the run",
}
