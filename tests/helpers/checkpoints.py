"""Random GLM-4 checkpoints written by Hugging Face's own classes: the reference that parity is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Glm4Config, Glm4ForCausalLM

Model = TypeVar("Model", bound=torch.nn.Module)

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": [1, 2, 3],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def random_model(seed: int = 0, **overrides: Any) -> Glm4ForCausalLM:
    """A float32 model of a small geometry, its norms and biases moved away from 1 and 0 so that they matter."""
    torch.manual_seed(seed)
    return scatter(Glm4ForCausalLM(Glm4Config(**{**SMALL, **overrides})).eval())


def scatter(model: Model) -> Model:
    """Give a model's parameters random values, in place."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.normal_(std=0.3)
            else:
                tensor.normal_(std=0.15)
    return model


def save_with_tokenizer(model: Glm4ForCausalLM, folder: Path) -> Path:
    """The same with a tokenizer of as many tokens as the model has: bytes, as far as they go. Builds can calibrate."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[: model.config.vocab_size]
    raw = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    save(model, folder)
    raw.save(str(folder / "tokenizer.json"))
    return folder


def save(model: Glm4ForCausalLM, folder: Path, **kwargs: Any) -> Path:
    """Write a model in Hugging Face layout; ``max_shard_size`` shards it."""
    model.save_pretrained(folder, **kwargs)
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set or (None) drop tensors of a single-file checkpoint; ``__`` stands for a dot."""
    file = folder / "model.safetensors"
    data = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        data.pop(name.replace("__", "."), None)
        if tensor is not None:
            data[name.replace("__", ".")] = tensor
    save_file(data, file)
