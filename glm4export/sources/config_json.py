"""Reading a checkpoint's config.json and generation_config.json, strictly.

A key that changes what the model computes is read or refused, never guessed: a silent default is a wrong model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glm4export.sources.config_keys import ConfigError, Keys
from glm4export.sources.files import read_json
from glm4export.sources.rope import MOST_POSITIONS, SPELLINGS, TOP_LEVEL, check_rotary, read_rope, with_yarn
from glm4graphs.activations import ACTIVATIONS
from glm4graphs.config import DynamicScaling, Glm4Config, LongropeScaling
from glm4runtime.contract import (
    CAUSAL_LM,
    FEATURES,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    TaskName,
    TokenIds,
    shown,
)

ARCHITECTURES: dict[str, TaskName] = {  # transformers' classes and their tasks
    "Glm4ForCausalLM": CAUSAL_LM,
    "Glm4Model": FEATURES,
    "Glm4ForSequenceClassification": SEQUENCE_CLASSIFICATION,
    "Glm4ForTokenClassification": TOKEN_CLASSIFICATION,
}
MODEL_TYPE = "glm4"

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_READ = frozenset(
    (
        *("architectures", "model_type", "quantization_config", *_SIZES, "max_position_embeddings", "head_dim"),
        *("hidden_act", "rms_norm_eps", "attention_bias", "tie_word_embeddings", *SPELLINGS, *TOP_LEVEL),
        *("eos_token_id", "pad_token_id", "bos_token_id", "id2label", "num_labels", "problem_type"),
    )
)
# What changes no number that a graph gives; docs/config.md says why, field by field.
_WITHOUT_EFFECT = frozenset(
    (
        *("attention_dropout", "classifier_dropout", "hidden_dropout", "initializer_range"),  # training
        *("dtype", "torch_dtype", "transformers_version", "tokenizer_class", "auto_map", "name_or_path"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "attn_implementation"),
        *("chunk_size_feed_forward", "is_encoder_decoder"),  # nothing in transformers' glm4 reads them
        *("label2id", "finetuning_task", "task_specific_params"),
        *("prefix", "sep_token_id", "decoder_start_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
        *("torchscript", "use_bfloat16", "tf_legacy_loss", "is_decoder", "add_cross_attention", "tie_encoder_decoder"),
        # sampling, which older releases wrote here; a session takes its own
        *("do_sample", "max_length", "min_length", "max_new_tokens", "early_stopping", "num_beams", "num_beam_groups"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "remove_invalid_values", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("unsloth_version", "unsloth_fixed", "pretraining_tp"),  # notes of fine-tuning tools
    )
)
_LARGEST_HEAD = 2**16  # a hundred times what attention kernels take
_LARGEST_EPS = torch.finfo(torch.float16).max


def read_config(path: Path, *, yarn: float | None = None) -> Glm4Config:
    """The model geometry of a checkpoint's config.json, with YaRN by a factor where one is given.

    Raises ConfigError naming key, value and remedy.
    """
    return parse_config(config_data(path, yarn=yarn), str(path))


def config_data(path: Path, *, yarn: float | None = None) -> dict[str, Any]:
    """config.json as it was parsed; with ``yarn`` as a checkpoint would say it. Raises ConfigError."""
    data = _read_json(path)
    return data if yarn is None else with_yarn(data, str(path), yarn)


def parse_config(data: dict[str, Any], where: str) -> Glm4Config:
    """The model geometry of a parsed config.json; ``where`` names it in errors."""
    _check_architecture(data, where)
    _refuse_unknown(data, where)
    key = Keys(data, where)
    act = key("hidden_act", str)
    if act not in ACTIVATIONS:
        raise ConfigError(f"{where}: hidden_act={shown(act)} is not supported; supported: {', '.join(ACTIVATIONS)}")
    sizes = {name: key.positive(name) for name in _SIZES[:-1]}
    positions = key.positive("max_position_embeddings", most=MOST_POSITIONS)
    heads = sizes["num_attention_heads"]
    # null is multi-head attention, as other models' configs write it; a missing key could mean transformers' default
    kv_heads = key.positive("num_key_value_heads", default=heads if "num_key_value_heads" in data else None)
    if heads % kv_heads:
        raise ConfigError(f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    head_dim = key.positive("head_dim", default=sizes["hidden_size"] // heads, most=_LARGEST_HEAD)
    config = Glm4Config(
        **sizes,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        head_dim=head_dim,
        hidden_act=act,
        rms_norm_eps=_eps(key),
        attention_bias=key("attention_bias", bool, default=True),
        tie_word_embeddings=key("tie_word_embeddings", bool, default=False),
        rope=read_rope(data, where, positions, head_dim),
    )
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        raise ConfigError(
            f"{where}: head_dim={config.head_dim} and partial_rotary_factor={config.rope.partial_rotary_factor} give "
            f"{config.rotary_dim} rotary columns; an even number of at least 2 is needed"
        )
    check_rotary(config, where)
    return config


def _check_architecture(data: dict[str, Any], where: str) -> None:
    found = data.get("architectures") or []
    if found not in [[name] for name in ARCHITECTURES]:
        raise ConfigError(
            f"{where}: architectures={shown(found)} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )


def sequence_limit(config: Glm4Config, wanted: int | None) -> int:
    """The bundle's cache length. Raises ConfigError past the positions that the model was made for."""
    limit = config.max_positions
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise ConfigError(f"--max-seq-len {wanted} is not in 1..{limit}, {_why_no_longer(config)}")
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
    vocab = Keys(config, str(folder / "config.json")).positive("vocab_size")
    optional = [(name, value) for name, value in (("pad_token_id", pad), ("bos_token_id", bos)) if value is not None]
    for name, value in (*(("eos_token_id", value) for value in eos_ids), *optional):
        if type(value) is not int or not 0 <= value < vocab:
            raise ConfigError(f"{folder}: {name}={shown(value)} is not a token id below vocab_size={vocab}")
    return TokenIds(eos=tuple(eos_ids), pad=pad, bos=bos)


def _why_no_longer(config: Glm4Config) -> str:
    scaling = config.rope.scaling
    if isinstance(scaling, DynamicScaling | LongropeScaling):
        return (
            f"where rope_type={scaling.rope_type!r} is one table: for longer runs it goes by each run's length, while "
            "the KV cache holds rows rotated for shorter ones"
        )
    if scaling is not None:
        return f"the model's positions as rope_type={scaling.rope_type!r} stretches them"
    return (
        "the model's positions; for longer texts GLM-4's model cards ask for YaRN: --rope-scaling yarn --rope-factor 4"
    )


def _refuse_unknown(data: dict[str, Any], where: str) -> None:
    """Refuse a model of another type, and keys that may change numbers for a reader that knows them."""
    if data.get("model_type") not in (None, MODEL_TYPE):
        raise ConfigError(f"{where}: model_type={shown(data['model_type'])} is not supported; supported: {MODEL_TYPE}")
    for name, value in data.items():
        nothing = value is None or (isinstance(value, dict | list | str) and not value)
        if nothing or name.startswith("_") or name in _READ or name in _WITHOUT_EFFECT:
            continue
        raise ConfigError(
            f"{where}: {shown(name)[1:-1]}={shown(value)} is no field of Glm4Config, and may change what the model "
            "computes; if it does not, take it out"
        )


def _eps(key: Keys) -> float:
    """The norms' eps. Graphs hold it in float32; float16 kernels may round it to float16."""
    eps = key.above("rms_norm_eps", 0)
    least, most = torch.finfo(torch.float32).tiny, _LARGEST_EPS
    if not least <= eps <= most:
        raise ConfigError(
            f"{key.where}: rms_norm_eps={eps} is not in {least:.2g} to {most:.0f}, what a norm can compute with"
        )
    return eps


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
