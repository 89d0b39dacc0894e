"""LoRA adapters made, saved and merged by peft itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def train(model: PreTrainedModel, folder: Path, seed: int = 0, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """Save an adapter of that LoraConfig, everything that it trains moved at random, stored in ``dtype``."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.05)
    adapted.save_pretrained(folder)
    if dtype is not None:
        save_file({name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


def apply(model: PreTrainedModel, adapters: Sequence[tuple[Path, float]]) -> PeftModel:
    """A copy of the model with these adapters active, each times its scale."""
    names = [f"adapter{index}" for index in range(len(adapters))]
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), adapters[0][0], adapter_name=names[0])
    for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
        adapted.load_adapter(folder, adapter_name=name)
    adapted.base_model.set_adapter(names)
    for module in adapted.modules():
        for name, (_, scale) in zip(names, adapters, strict=True):
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.set_scale(name, scale)
    return adapted.eval()


def merge(model: PreTrainedModel, adapters: Sequence[tuple[Path, float]]) -> PreTrainedModel:
    """A copy of the model with these adapters merged, one after another."""
    return apply(model, adapters).merge_and_unload()
