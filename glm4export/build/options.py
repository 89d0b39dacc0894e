"""The options of a build: which of them go together, and which dtypes and formats follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from glm4export.build.choices import Attention, CacheName, InputKind, PrefillPrecision
from glm4export.weights.storage import Formats
from glm4export.weights.widths import BLOCKS, Bits, BlockSize
from glm4runtime.contract import CAUSAL_LM, SEQUENCE_CLASSIFICATION, TENSORRT, Precision, Target, TaskName, UserError

PRECISIONS_OF: dict[Target, tuple[Precision, ...]] = {
    "cpu": ("fp32", "fp16", "int8", "int4"),
    "cuda": ("fp16", "bf16", "int8", "int4"),
    TENSORRT: ("fp32", "fp16", "bf16", "int8", "int4", "fp8"),
}
CALIBRATED = ("fp8",)  # precisions that can't be built without a text
_PLUGIN = ("fp16", "bf16", "int8", "int4")  # what kernels of --attention plugin compute in or beside
_CACHES: dict[CacheName, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}  # --kv-cache, in ONNX's spelling
_DEFAULT_RANK, _LARGEST_RANK, _MOST_SLOTS = 16, 512, 1024  # of adapters that a session loads
_MOST_TOP = 256  # tokens of a row; CUDA's kernel that divides a row among blocks takes no more (topk_hybrid.cuh)
_CPU_ATTENTION = {"--output-attentions": "output of them", "--position-ids": "input for a bias"}
_NO_OUTSIDERS = "which is for programs that run a graph themselves; leave one of them out"
_NO_KERNEL = {
    ("cpu", "bf16"): "onnxruntime's CPU kernels take no bf16 activations: build fp32, fp16 or int8 from the checkpoint",
    ("cuda", "fp32"): "onnxruntime's CUDA kernel of GroupQueryAttention computes in fp16 and bf16 only: build bf16, "
    "which has fp32's range, or fp16",
}


@dataclass(frozen=True)
class BuildOptions:
    """What to build. ``max_seq_len`` None means the most positions the model was made for.

    Raises UserError for what no kernel runs, and for options that do not go together.
    """

    precision: Precision = "fp16"
    target: Target = "cpu"
    max_seq_len: int | None = None
    simplify: bool = True
    block_size: BlockSize | None = None  # None: a quantized checkpoint's, else 128
    symmetric: bool | None = None  # None: as a quantized checkpoint is, else True
    head_bits: Bits | None = None  # None: 8
    embedding_bits: Bits | None = None  # None: 16
    prefill_precision: PrefillPrecision | None = None  # formats of its own for the prefill graph
    kv_cache: CacheName | None = None  # None: the dtype that attention computes in
    calibrate: Path | None = None  # a text file; weights and cache are quantized with an eye on the numbers it gives
    yarn_factor: float | None = None  # stretches plain rope, as --rope-scaling yarn does
    attention: Attention = "standard"  # "plugin": one node, and the function that it stands for, for full TensorRT
    task: TaskName | Literal["auto"] = "auto"  # by the checkpoint's class, or one of glm4runtime.contract.TASKS
    pooling: str | None = None  # features: one embedding per text, of its "last" token or the "mean" of them
    normalize: bool = False  # and of length 1
    inputs: InputKind = "ids"  # "embeds": the graphs take inputs_embeds in the place of input_ids
    position_ids: bool = False  # positions are an input, and masks are read as transformers does
    output_hidden_states: bool = False
    output_attentions: bool = False
    output_top_logits: int | None = None  # how many tokens each row of logits comes with; None: it comes alone
    lora_slots: int | None = None  # adapters that a session may hold; None: graphs without side paths for them
    lora_rank: int | None = None  # the largest that they may have; None: 16
    stages: int | None = None  # graphs that the layers are split over; None: one has them all

    def __post_init__(self) -> None:
        possible = PRECISIONS_OF[self.target]
        if self.precision not in possible:
            why = _NO_KERNEL.get((self.target, self.precision))
            raise UserError(
                f"--precision {self.precision} does not run on --target {self.target}; it runs {', '.join(possible)}"
                + (f". {why}" if why else "")
            )
        if self.prefill_precision is not None and (self.target != "cpu" or self.formats is None):
            raise UserError(
                f"--prefill-precision {self.prefill_precision} goes with --target cpu and --precision int8 or int4, "
                f"not with {self.target} and {self.precision}"
            )
        if self.formats is None:
            self._check_unquantized()
        if self.kv_cache is not None:
            self._check_cache(self.kv_cache)
        if self.calibrate is not None and self.formats is None and self.cache_dtype != "int8":
            raise UserError(
                "--calibrate goes with --precision fp8, int8 or int4, or with --kv-cache int8: "
                f"{self.precision} with a {self.cache_dtype} cache has nothing to calibrate"
            )
        if self.precision in CALIBRATED and self.calibrate is None:
            raise UserError(
                f"--precision {self.precision} needs --calibrate FILE, a text like the model's use: activations are "
                "scaled by what they reach on it"
            )
        if self.target == TENSORRT and self.formats is not None:
            self._check_qdq()
        if self.attention == "plugin" and (self.target != TENSORRT or self.precision not in _PLUGIN):
            raise UserError(
                f"--attention plugin goes with --target {TENSORRT} and --precision {', '.join(_PLUGIN)}, "
                f"not with {self.target} and {self.precision}"
            )
        self._check_boundary()
        self._check_top_logits()
        self._check_lora()
        self._check_stages()

    def require_fit(self, task: TaskName, layers: int) -> None:
        """Raise UserError for options of a causal language model where the task is another, and the other way round.

        And for more stages than ``layers``, the model's.
        """
        if self.stages is not None and self.stages > layers:
            raise UserError(f"--stages {self.stages}: the model has {layers} layers; ask for as many stages at most")
        if self.inputs == "embeds" and task == SEQUENCE_CLASSIFICATION:
            raise UserError(
                f"--inputs embeds does not go with --task {task}: the last token, which is classified, is found in "
                "input_ids"
            )
        if task == CAUSAL_LM:
            return
        for option, given in (
            (f"--precision {self.precision}, which needs --calibrate,", self.precision in CALIBRATED),
            ("--prefill-precision", self.prefill_precision is not None),
            ("--kv-cache", self.kv_cache is not None),
            ("--attention plugin", self.attention == "plugin"),
            ("--calibrate", self.calibrate is not None),
            ("--head-bits", self.head_bits is not None),
            ("--lora-slots", self.lora_slots is not None),
            ("--stages", self.stages is not None),
            ("--output-top-logits", self.output_top_logits is not None),
        ):
            if given:
                raise UserError(f"{option} goes with --task {CAUSAL_LM}, not with {task}; build without it")

    def _check_unquantized(self) -> None:
        """What is said of quantized weights where none are."""
        for option, given in (
            ("--block-size", self.block_size is not None),
            ("--asymmetric", self.symmetric is not None),
            ("--head-bits", self.head_bits is not None),
            ("--embedding-bits", self.embedding_bits is not None),
        ):
            if given:
                raise UserError(f"{option} goes with --precision int8 or int4, not with {self.precision}; leave it out")

    def _check_boundary(self) -> None:
        """What the targets' kernels give and take beside tokens and logits."""
        for option, given in (
            ("--inputs embeds", self.inputs == "embeds"),
            ("--output-hidden-states", self.output_hidden_states),
            ("--output-attentions", self.output_attentions),
            ("--position-ids", self.position_ids),
            ("--output-top-logits", self.output_top_logits is not None),
        ):
            if given and self.target == TENSORRT:
                raise UserError(
                    f"{option} does not go with --target {TENSORRT}: engines are built, and run, for token ids and one "
                    "output"
                    + (", and a step graph has position_ids anyway" if option == "--position-ids" else "")
                    + "; build for cpu or cuda"
                )
            if given and option in _CPU_ATTENTION and self.target != "cpu":
                raise UserError(
                    f"{option} goes with --target cpu, whose kernel of GroupQueryAttention has an "
                    f"{_CPU_ATTENTION[option]}; on {self.target} none has been seen to"
                )
            if given and option in _CPU_ATTENTION and self.cache_dtype == "int8":
                raise UserError(f"{option} does not go with --kv-cache int8; leave one of them out")
        if self.inputs == "embeds" and self.embedding_bits is not None:
            raise UserError("--embedding-bits does not go with --inputs embeds, which stores no table; leave it out")

    def _check_top_logits(self) -> None:
        if self.output_top_logits is None:
            return
        if not 2 <= self.output_top_logits <= _MOST_TOP:
            raise UserError(f"--output-top-logits {self.output_top_logits} is not in 2..{_MOST_TOP}")
        if self.target == "cpu" and (self.prefill_precision is not None or self.cache_dtype == "int8"):
            other = "--kv-cache int8" if self.prefill_precision is None else "--prefill-precision"
            raise UserError(
                f"--output-top-logits does not go with {other} on --target cpu, where steps are the decode graph's, "
                "which keeps the outputs that others know; leave one of them out"
            )

    def _check_lora(self) -> None:
        if self.lora_slots is None:
            if self.lora_rank is not None:
                raise UserError("--lora-rank goes with --lora-slots N; give both, or leave it out")
            return
        for option, value, most in (
            ("--lora-slots", self.lora_slots, _MOST_SLOTS),
            ("--lora-rank", self.slot_rank, _LARGEST_RANK),
        ):
            if not 1 <= value <= most:
                raise UserError(f"{option} {value} is not in 1..{most}")
        if self.target == TENSORRT:
            raise UserError(
                f"--lora-slots does not go with --target {TENSORRT}, whose engines have no side paths; merge an "
                "adapter with --lora, or build for cpu or cuda"
            )

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        if self.stages < 2:
            raise UserError(f"--stages {self.stages}: expected at least 2; leave it out for one graph with all layers")
        for option, given, why in (
            (f"--target {TENSORRT}", self.target == TENSORRT, "whose engines are made of one graph; build for cuda"),
            ("--inputs embeds", self.inputs == "embeds", _NO_OUTSIDERS),
            ("--output-hidden-states", self.output_hidden_states, _NO_OUTSIDERS),
            ("--output-attentions", self.output_attentions, _NO_OUTSIDERS),
            ("--position-ids", self.position_ids, _NO_OUTSIDERS),
            (
                "--output-top-logits",
                self.output_top_logits is not None,
                "which no stage gives yet; leave one of them out",
            ),
            ("--lora-slots", self.lora_slots is not None, "whose adapters lie on one device; merge one with --lora"),
        ):
            if given:
                raise UserError(f"--stages does not go with {option}, {why}")

    def _check_qdq(self) -> None:
        """What TensorRT's DequantizeLinear leaves of the quantized formats."""
        if self.symmetric is False:
            raise UserError("--asymmetric does not go with --target tensorrt, which takes no zero points; leave it out")
        if self.embedding_bits not in (None, 16):
            raise UserError(
                f"--embedding-bits {self.embedding_bits} does not go with --target tensorrt, which has no lookup in a "
                "quantized table; leave it at 16"
            )
        if self.calibrate is not None and not self.calibrates_weights and self.cache_dtype != "int8":
            raise UserError(
                "--calibrate does not go with --precision int8 on --target tensorrt, where weights have one scale a "
                "channel and lose too little to be worth it; leave it out, or build int4"
            )

    def _check_cache(self, wanted: CacheName) -> None:
        if _CACHES[wanted] not in ("int8", self.compute_name):
            raise UserError(
                f"--kv-cache {wanted} does not go with --precision {self.precision} on --target {self.target}: "
                f"attention computes in {self.compute_name} there, and onnxruntime's kernel keeps the cache in that "
                "dtype or in int8 (another float it would convert whole, at every step); "
                "leave --kv-cache out, or give int8"
            )
        if wanted != "int8":
            return
        if self.target == TENSORRT and self.attention != "plugin":
            raise UserError(
                "--kv-cache int8 goes with --attention plugin on --target tensorrt, whose own fused attention has no "
                "such cache; give both, or leave it out"
            )
        if self.calibrate is None:
            raise UserError(
                "--kv-cache int8 needs --calibrate FILE: a text like the model's use, from which every channel of the "
                "cache gets its scale"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations: quantized weights are used with fp32 on a CPU, with fp16 elsewhere."""
        if self.precision == "bf16":
            return torch.bfloat16
        wide = self.precision == "fp32" or (self.precision != "fp16" and self.target == "cpu")
        return torch.float32 if wide else torch.float16

    @property
    def compute_name(self) -> str:
        """The same in ONNX's spelling, such as ``float16``."""
        return str(self.compute_dtype).removeprefix("torch.")

    @property
    def cache_dtype(self) -> str:
        """The dtype of the KV cache in ONNX's spelling."""
        return self.compute_name if self.kv_cache is None else _CACHES[self.kv_cache]

    @property
    def calibrates_weights(self) -> bool:
        """Whether a text is for weights too: TensorRT's int8 has one scale a channel, and loses too little."""
        return self.formats is not None and (self.target, self.precision) != (TENSORRT, "int8")

    @property
    def slot_rank(self) -> int:
        """The largest rank of an adapter that a session loads."""
        return _DEFAULT_RANK if self.lora_rank is None else self.lora_rank

    @property
    def lora_dtype(self) -> str | None:
        """The dtype of side paths, which is that of activations; None where there are none."""
        return None if self.lora_slots is None else self.compute_name

    @property
    def formats(self) -> Formats | None:
        """How weights are stored; None where they are stored as they're computed with."""
        if self.precision not in ("fp8", "int8", "int4"):
            return None
        bits: Bits = 4 if self.precision == "int4" else 8
        qdq = self.target == TENSORRT
        block, symmetric = self.block_size or BLOCKS[0], self.symmetric is not False
        return Formats(bits, self.head_bits or 8, self.embedding_bits or 16, block, symmetric, qdq)
