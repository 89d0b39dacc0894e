"""Write a GLM-4-0414 checkpoint as GGUF, tensor by tensor, as llama.cpp reads it (architecture ``glm4``).

    python tools/peers/gguf_writer.py CHECKPOINT OUT.gguf --dtype bf16

Matrices are written as bf16, f16 or f32; quantizing is left to llama.cpp's own quantizer (``peers.llamacpp``). Names
are those of llama.cpp's architecture table, through the ``gguf`` package's own map. glm4 rotates adjacent pairs
(LLAMA_ROPE_TYPE_NORM), as the checkpoint does, so no weight is permuted; ``ffn_up`` holds gate and up together, gate
first. Only one tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType

from glm4export.sources.checkpoint import CONFIG, Checkpoint
from glm4export.sources.config_json import read_config
from glm4export.sources.ledger import expected_tensors
from glm4graphs.config import Glm4Config

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
GGML = {"bf16": GGMLQuantizationType.BF16, "f16": GGMLQuantizationType.F16, "f32": GGMLQuantizationType.F32}
FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "f32": gguf.LlamaFileType.ALL_F32,
}


def write_gguf(folder: Path, out: Path, dtype: str = "bf16") -> None:
    """Write ``out``; it appears under its name only when it is whole."""
    config = read_config(folder / CONFIG)
    if config.rope.scaling or config.hidden_act != "silu":
        raise SystemExit(f"{folder}: only plain rotary embedding and silu are written as GGUF here")
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(config)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "glm4")
    _metadata(writer, config, folder.name)
    writer.add_file_type(FILE_TYPES[dtype])
    _vocabulary(writer, config, folder)
    shapes = {name: shape for name, shape in expected_tensors(config) if name in checkpoint.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4, config.num_hidden_layers)
    for name, shape in shapes.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        kind = _kind(shape, dtype)
        nbytes = TORCH[kind].itemsize * int(np.prod(shape))
        writer.add_tensor_info(target, shape, np.dtype(np.float32), nbytes, GGML[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        data = checkpoint.read(name, tuple((0, size) for size in shape)).to(TORCH[_kind(shape, dtype)])
        writer.write_tensor_data(data.contiguous().view(torch.uint8).numpy())
    writer.close()
    partial.rename(out)


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    return dtype if len(shape) > 1 else "f32"  # llama.cpp wants norms and biases in f32


def _metadata(writer: gguf.GGUFWriter, config: Glm4Config, name: str) -> None:
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)


def _vocabulary(writer: gguf.GGUFWriter, config: Glm4Config, folder: Path) -> None:
    """The tokenizer as llama.cpp's byte-pair vocabulary; ids alone where the checkpoint has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [TokenType.UNUSED] * config.vocab_size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    ids = {}
    for added in tokenizer["added_tokens"]:
        index = ids[added["content"]] = added["id"]
        tokens[index] = added["content"]
        types[index] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(ids["<|endoftext|>"])
    writer.add_eot_token_id(ids["<|user|>"])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=TORCH, default="bf16", help="of matrices (default: %(default)s)")
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.out, arguments.dtype)


if __name__ == "__main__":
    main()
