"""LoRA adapters made, saved and merged by peft itself, and bundles that load them."""

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

from glm4export import cli as command_line
from tests.helpers import checkpoints

WEIGHTS = "adapter_model.safetensors"
CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "narrow": {
        "r": 2,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
}


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


def cli(*argv: object) -> int:
    return command_line.main([str(argument) for argument in argv])


class AdaptedModel:
    """A model, adapters of it, and bundles of it with slots; each is built once."""

    def __init__(self, folder: Path) -> None:
        self.model, self.folder = checkpoints.random_model(max_position_embeddings=256), folder
        self.checkpoint = checkpoints.save(self.model, folder / "checkpoint")
        self.adapters = {
            name: train(self.model, folder / name, seed, **config)
            for seed, (name, config) in enumerate(CONFIGS.items())
        }
        self.bundle = self.build("fp32")
        self.files = {name: self.convert(path) for name, path in self.adapters.items()}

    def build(self, precision: str, *options: object) -> Path:
        out = self.folder / "-".join([precision, *map(str, options)])
        if not out.exists():
            common = ("--target", "cpu", "--precision", precision, "--lora-slots", 3, "--lora-rank", 4)
            assert cli("build", self.checkpoint, "-o", out, *common, *options) == 0
        return out

    def convert(self, adapter: Path) -> Path:
        out = self.folder / f"{adapter.name}.adapter"
        assert cli("adapter", self.bundle, adapter, "-o", out) == 0
        return out

    def reference(self, name: str | None) -> Any:
        return self.model if name is None else apply(self.model, [(self.adapters[name], 1.0)])
