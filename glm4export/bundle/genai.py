"""genai_config.json: what onnxruntime-genai needs to run a bundle's decode graph as it is."""

from __future__ import annotations

import json

from glm4graphs.config import Glm4Config
from glm4runtime.contract import ATTENTION_MASK, DECODE, INPUT_IDS, LOGITS, TokenIds

FILE = "genai_config.json"
# genai has an onnxruntime of its own. Older ones' CUDA kernel for residual and norm sums squares in fp16, which a deep
# model's overflow; strict mode sums in fp32, and later releases pass it over
# (https://github.com/microsoft/onnxruntime/pull/28682 and 29388).
_CUDA = {"enable_skip_layer_norm_strict_mode": "1"}


def genai_config(config: Glm4Config, tokens: TokenIds, target: str, max_seq_len: int) -> str:
    """The file's text. ``past_present_share_buffer`` gives genai the same in-place cache as our own runtime."""
    providers: list[dict[str, dict[str, str]]] = [{"cuda": _CUDA}] if target == "cuda" else []
    pad = tokens.eos[0] if tokens.pad is None else tokens.pad
    data = {
        "model": {
            "type": "decoder",
            "bos_token_id": pad if tokens.bos is None else tokens.bos,
            "eos_token_id": list(tokens.eos),
            "pad_token_id": pad,
            "context_length": max_seq_len,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": f"{DECODE}.onnx",
                "session_options": {"provider_options": providers},
                "num_hidden_layers": config.num_hidden_layers,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": max_seq_len, "past_present_share_buffer": True},
    }
    return json.dumps(data, indent=2) + "\n"
