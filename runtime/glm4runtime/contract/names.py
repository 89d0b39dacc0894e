"""Names: files of a bundle, targets, graphs, and the graphs' inputs and outputs."""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["cpu", "cuda", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
GraphName = Literal["prefill", "decode", "step", "model"]
TaskName = Literal["causal-lm", "features", "sequence-classification", "token-classification"]

FORMAT_VERSION = 2  # 1: prefill graphs gave the last row's logits only
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)  # what a session reads beside its graphs
PREFILL: GraphName = "prefill"
DECODE: GraphName = "decode"
STEP: GraphName = (
    "step"  # TensorRT's graph: one for both phases, since an engine made of two would hold the weights twice
)
MODEL: GraphName = "model"  # the one graph of bundles without a cache

INPUT_IDS = "input_ids"
INPUTS_EMBEDS = "inputs_embeds"  # float32 [batch, seq, hidden], where a bundle takes it in input_ids' place
ATTENTION_MASK = "attention_mask"  # int64 [batch, total_seq]; in a step graph bool [batch, 1, seq, max_seq]
SEQLENS_K = "seqlens_k"  # int32 [batch]: each sequence's tokens with the new ones, less one; in the mask's place
TOTAL_SEQUENCE_LENGTH = "total_sequence_length"  # and int32 []: at least the most of them, in the host's memory
POSITION_IDS = "position_ids"  # int64 [batch, seq]: step graphs, and others by option
WRITE_INDICES = "write_indices"  # step graphs: int64 [batch], the cache row that a sequence's first new token takes
LOGIT_ROWS = "logit_rows"  # prefill and step graphs: int64 [batch, rows], which of the new tokens' logits are wanted
LOGITS = "logits"
TOP_LOGITS = "top_logits"  # beside those, by option: float32 [batch, rows, count], each row's largest, descending,
TOP_IDS = "top_ids"  # int64 [batch, rows, count], their tokens,
LOG_SUM = "log_sum_exp"  # and float32 [batch, rows], the logarithm of the sum of the whole row's exponentials
LAST_HIDDEN_STATE = "last_hidden_state"  # float32 [batch, seq, hidden]
HIDDEN_STATES = "hidden_states."  # outputs beside those, by option: float32 [batch, seq, hidden]
STREAM = "stream."  # between stages
ATTENTIONS = "attentions."  # and float32 [batch, heads, seq, total_seq]
SENTENCE_EMBEDDING = "sentence_embedding"  # float32 [batch, hidden]

CAUSAL_LM: TaskName = "causal-lm"
FEATURES: TaskName = "features"
SEQUENCE_CLASSIFICATION: TaskName = "sequence-classification"
TOKEN_CLASSIFICATION: TaskName = "token-classification"
TASKS: tuple[TaskName, ...] = get_args(TaskName)

ACTIVATION_STEP = "rows/inverse_levels"  # initializers of int8 prefill: 1 / the levels of an activation,
ACTIVATION_ZERO = "rows/zero_point"  # and the uint8 that stands for 0.0

TENSORRT: Target = "tensorrt"
TARGETS: tuple[Target, ...] = get_args(Target)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: The sizes in a manifest's ``config``, which has more.
GEOMETRY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip


def graph_names(target: Target, task: TaskName = CAUSAL_LM) -> tuple[GraphName, ...]:
    """The graphs that a bundle for ``target`` and ``task`` holds."""
    if task != CAUSAL_LM:
        return (MODEL,)
    return (STEP,) if target == TENSORRT else (PREFILL, DECODE)


def stage_name(graph: str, stage: int) -> str:
    """The name of one of the graphs that ``graph`` was cut into, in a bundle built with stages."""
    return f"{graph}.{stage}"


def stream_name(layer: int) -> str:
    """What a stage hands to the next, whose first layer that is: the residual stream, [batch, seq, hidden].

    An output of the one and an input of the other, in the dtype of activations, and scaled as those of fp16 are.
    """
    return f"{STREAM}{layer}"


def past_name(layer: int, part: str) -> str:
    """Graph input of one layer's cache; ``part`` is ``key`` or ``value``."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Graph output that is bound to the same buffer as :func:`past_name`."""
    return f"present.{layer}.{part}"


def hidden_state_name(index: int) -> str:
    """Graph output of a bundle built with hidden states: the embeddings, then what each layer made of them."""
    return f"{HIDDEN_STATES}{index}"


def attention_name(layer: int) -> str:
    """Graph output of a bundle built with attentions: a layer's weights, behind the softmax."""
    return f"{ATTENTIONS}{layer}"
