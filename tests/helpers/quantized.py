"""Small quantized checkpoints: written by compressed-tensors' own code, and in GPTQ's and AWQ's layouts.

GPTQ's and AWQ's writers need CUDA packages; what is written here in their place is compared with their files and
readers in tests/sources/test_quantized.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4ForCausalLM

from tests.helpers import checkpoints

Parts = dict[str, Tensor]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column in each of a word's 4 bits, lowest first
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
BY_ROWS = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float"}
INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Rounded:
    """A weight [rows, columns] in integers: ``(q - zeros) * scales``, by group of columns."""

    q: Tensor  # int64 [rows, columns]
    zeros: Tensor  # int64 [rows, groups]
    scales: Tensor  # float16 [rows, groups]
    groups: Tensor  # int64 [columns]

    @property
    def weight(self) -> Tensor:
        """float32 [rows, columns]."""
        return (self.q - self.zeros[:, self.groups]).float() * self.scales.float()[:, self.groups]


def rounded(weight: Tensor, bits: int, group: int, *, symmetric: bool = True, shuffled: bool = False) -> Rounded:
    """Round to the nearest. shuffled: groups of columns that aren't neighbours, as act-order makes them."""
    columns = weight.shape[1]
    groups = torch.arange(columns) // group
    if shuffled:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    parts = [weight[:, groups == index] for index in range(int(groups.max()) + 1)]
    low, high = (torch.stack([getattr(part, end)(1) for part in parts], 1) for end in ("amin", "amax"))
    if symmetric:
        scales = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
        zeros = (-low.clamp(max=0) / scales).round()
    scales = scales.half()
    q = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
    return Rounded(q.long(), zeros.long(), scales, groups)


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack [n, m] along its columns into int32 [n, m * bits / 32], low bits first."""
    per_word = 32 // bits
    cut = values.numpy().astype(np.uint32).reshape(len(values), -1, per_word)
    packed = sum(cut[..., (order or range(per_word))[i]] << np.uint32(bits * i) for i in range(per_word))
    return torch.from_numpy(np.asarray(packed).astype(np.uint32).view(np.int32).copy())


def gptq(of: Rounded, bits: int = 4, *, v1: bool = True) -> Parts:
    """A linear's tensors in GPTQ's layout; v1 subtracts 1 from every zero point, by whole words."""
    qzeros = words(of.zeros.T.contiguous(), bits)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return {
        "qweight": words(of.q, bits).T.contiguous(),
        "qzeros": qzeros - ones if v1 else qzeros,
        "scales": of.scales.T.contiguous(),
        "g_idx": of.groups.int(),
    }


def awq(of: Rounded) -> Parts:
    """A linear's tensors in the layout of AWQ's GEMM kernel."""
    return {
        "qweight": words(of.q.T.contiguous(), 4, AWQ_ORDER),
        "qzeros": words(of.zeros.T.contiguous(), 4, AWQ_ORDER),
        "scales": of.scales.T.contiguous(),
    }


def linears(model: Glm4ForCausalLM, *, head: bool = False) -> list[str]:
    """The linears of the layers, and the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names if head or name != "lm_head"]


def save(
    model: Glm4ForCausalLM,
    folder: Path,
    quantization: Mapping[str, Any],
    quantize: Callable[[str, Tensor], tuple[Parts, Tensor] | None],
) -> Path:
    """Write a model with its linears quantized, and give the model the weights that those mean.

    quantize: a linear's tensors and its dequantized weight, from its name and weight; None leaves it as it is.
    """
    checkpoints.save_with_tokenizer(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in linears(model, head=True):
        module = model.get_submodule(name)
        made = quantize(name, module.weight.detach())
        if made is not None:
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in made[0].items()}
            with torch.no_grad():
                module.weight.copy_(made[1])
    save_file(tensors, folder / "model.safetensors")
    say(folder, quantization)
    return folder


def say(folder: Path, quantization: Mapping[str, Any]) -> None:
    """Write another quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(quantization)}))


def save_gptq(model: Glm4ForCausalLM, folder: Path, *, group: int = 32, head: bool = False, **options: Any) -> Path:
    """As GPTQ writes it. options: ``bits``, ``symmetric``, ``shuffled``, ``v1``."""
    bits, v1 = options.pop("bits", 4), options.pop("v1", True)
    said = {**GPTQ, "bits": bits, "group_size": group, "sym": options.get("symmetric", True), "lm_head": head}
    said |= {"desc_act": options.get("shuffled", False), "checkpoint_format": "gptq" if v1 else "gptq_v2"}

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor] | None:
        if name == "lm_head" and not head:
            return None
        of = rounded(weight, bits, group, **options)
        return gptq(of, bits, v1=v1), of.weight

    return save(model, folder, {**said, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}, quantize)


def save_awq(model: Glm4ForCausalLM, folder: Path, *, group: int = 32) -> Path:
    """As AutoAWQ writes it."""

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor] | None:
        of = rounded(weight, 4, group, symmetric=False)
        return None if name == "lm_head" else (awq(of), of.weight)

    return save(model, folder, {**AWQ, "group_size": group, "modules_to_not_convert": ["lm_head"]}, quantize)


def save_compressed(
    model: Glm4ForCausalLM, folder: Path, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
) -> Path:
    """As compressed-tensors writes it, by its own compressors. weights, inputs: fields of its QuantizationArgs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=None if inputs is None else QuantizationArgs(**inputs)
    )
    kind = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(kind.value)
    said = QuantizationConfig(
        config_groups={"group_0": scheme}, format=kind.value, quantization_status="compressed", ignore=["lm_head"]
    ).to_dict()

    def quantize(name: str, weight: Tensor) -> tuple[Parts, Tensor] | None:
        if name == "lm_head":
            return None
        grouped = {
            "group": lambda: weight.reshape(len(weight), -1, args.group_size or 1),
            "channel": lambda: weight[:, None],
            "tensor": lambda: weight.reshape(1, 1, -1),
        }[str(args.strategy)]()
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.view(1), zero.view(1)
        scale = scale.to(torch.bfloat16)
        state = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        meant: Tensor = compressor.decompress(dict(stored), scheme)["weight"]  # in float32, as its scale is
        static = {"input_scale": torch.ones(1)} if inputs is not None and not inputs.get("dynamic") else {}
        parts = {part: tensor for part, tensor in stored.items() if part != "weight_g_idx"}
        return {**parts, "weight_scale": scale, **static}, meant

    # the package keeps `weight` under its own name where it isn't packed; `save` drops the old one first
    return save(model, folder, json.loads(json.dumps(said, default=str)), quantize)
