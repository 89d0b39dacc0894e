"""Which tensors an adapter must hold for a checkpoint, how those that it holds differ, and what each of them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm4export.sources.checkpoint import Checkpoint
from glm4export.sources.ledger import Shape
from glm4export.sources.lora_config import AdapterConfig, AdapterError
from glm4export.terminal.errors import MOST_LINES, listed
from glm4export.weights.storage import EMBEDDING, HEAD
from glm4export.weights.tensors import Window
from glm4export.weights.write import windows
from glm4runtime.contract import shown

WRAPPER = "base_model.model."  # peft's, in front of every name
_INNER = "model."  # of a causal model's names, which its backbone alone hasn't
_RESIDENT = ".base_layer"  # behind the name of a module that peft wrapped, in front of its own tensors' names


@dataclass(frozen=True, eq=False)
class Delta:
    """What an adapter adds to one tensor of the checkpoint: scaling * B @ A, or a trained bias.

    a: [rank, in], b: [out, rank]; for an embedding a: [rank, vocab], b: [hidden, rank], and the product is transposed.
    Of a bias, ``a`` is None and ``b`` [out].
    """

    stored: Checkpoint
    scaling: float
    a: str | None
    b: str
    magnitude: str | None = None  # DoRA's: [out], or an embedding's [hidden]
    embedding: bool = False

    def read(self, window: Window) -> Tensor:
        """That window of it: float32, the caller's to change."""
        if self.a is None:
            return self.stored.read(self.b, window).float() * self.scaling
        rows, columns = window
        rank = (0, self.stored.tensors[self.a].shape[0])
        out, inner = (columns, rows) if self.embedding else (rows, columns)
        b, a = self.stored.read(self.b, (out, rank)), self.stored.read(self.a, (rank, inner))
        product = b.float() @ a.float() * self.scaling
        return product.T.contiguous() if self.embedding else product

    def channels(self, window: Window) -> slice:
        """Those that have a magnitude each, in that window."""
        return slice(*window[1 if self.embedding else 0])

    def magnitude_of(self, window: Window) -> Tensor:
        """float32, one for each of :meth:`channels`."""
        assert self.magnitude is not None
        part = self.channels(window)
        return self.stored.read(self.magnitude, ((part.start, part.stop),)).float()


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint's tensors, by their names."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, tuple[Checkpoint, str]] = field(default_factory=dict)  # by a tensor that was trained whole


def read_plan(
    stored: Checkpoint,
    config: AdapterConfig,
    scale: float,
    checkpoint: Checkpoint,
    *,
    tied: bool,
    brought: Mapping[str, Shape],
) -> Plan:
    """Compare an adapter's tensors with those that its config calls for; raise AdapterError telling all that differ.

    tied: the model's head is its embedding where none is stored. brought: tensors that the checkpoint lacks and an
    adapter is to bring.
    """
    names = _Names(stored, checkpoint, tied, brought)
    plan, expected = Plan(), {}
    for module in names.modules:
        expected.update(_module(module, names, stored, config, scale, plan))
    if not plan.deltas and not plan.replaced:
        raise AdapterError(f"{stored.folder}: target_modules and modules_to_save match no module of this model")
    _add_resident(names, stored, expected, plan, checkpoint)
    if problem := _mismatches({name: tensor.shape for name, tensor in stored.tensors.items()}, expected, config):
        raise AdapterError(f"{stored.folder}: {problem}")
    if scale != 1 and plan.replaced:
        name = next(iter(plan.replaced))
        raise AdapterError(
            f"{stored.folder}: a scale of {scale} has no meaning for {name}, which the adapter replaces as a whole; "
            "give it without a scale"
        )
    return plan


class _Names:
    """The modules of a checkpoint as an adapter names them, and their tensors by the checkpoint's names."""

    def __init__(self, stored: Checkpoint, checkpoint: Checkpoint, tied: bool, brought: Mapping[str, Shape]) -> None:
        shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        shapes |= brought
        self.tied = tied and HEAD not in shapes
        if self.tied:
            shapes[HEAD] = shapes[EMBEDDING]  # still a module of its own
        inside = [name.removeprefix(WRAPPER) for name in stored.tensors]
        tops = tuple({f"{name.removeprefix(_INNER).split('.')[0]}." for name in shapes} - {HEAD.split(".")[0] + "."})
        self.backbone_alone = bool(inside) and all(name.startswith(tops) for name in inside)
        self.modules: dict[str, dict[str, tuple[str, Shape]]] = {}  # each one's tensors: checkpoint's name and shape
        for name, shape in shapes.items():
            if name == HEAD and self.backbone_alone:
                continue
            module, _, part = (name.removeprefix(_INNER) if self.backbone_alone else name).rpartition(".")
            self.modules.setdefault(module, {})[part] = (name, shape)


def _module(
    module: str, names: _Names, stored: Checkpoint, config: AdapterConfig, scale: float, plan: Plan
) -> dict[str, Shape]:
    """The tensors that an adapter must hold for a module; what they do goes into the plan."""
    tensors, at = names.modules[module], WRAPPER + module
    expected: dict[str, Shape] = {}

    def replaces(part: str, theirs: str) -> None:
        name, shape = tensors[part]
        expected[theirs] = shape
        plan.replaced[name] = (stored, theirs)

    if config.saves(module):
        for part in tensors:
            replaces(part, f"{at}.{part}")
        return expected
    targeted = config.targets(module)
    if targeted:
        expected |= _lora(module, at, tensors, stored, config, scale, plan)
    if "bias" in tensors and (config.bias == "all" or (config.bias == "lora_only" and targeted)):
        replaces("bias", f"{at}{_RESIDENT if targeted else ''}.bias")
    return expected


def _lora(
    module: str,
    at: str,
    tensors: Mapping[str, tuple[str, Shape]],
    stored: Checkpoint,
    config: AdapterConfig,
    scale: float,
    plan: Plan,
) -> dict[str, Shape]:
    """The matrices of a targeted module."""
    name, shape = tensors["weight"]
    if len(shape) != 2:
        raise AdapterError(f"{stored.folder}: target_modules match {module}, a norm, which has no LoRA")
    rank, scaling, embedding = config.rank(module), scale * config.scaling(module), name == EMBEDDING
    out, inner = shape[::-1] if embedding else shape
    a, b = (f"{at}.lora_embedding_{x}" if embedding else f"{at}.lora_{x}.weight" for x in "AB")
    magnitude = f"{at}.lora_magnitude_vector" if config.dora else None
    plan.deltas[name] = Delta(stored, scaling, a, b, magnitude, embedding)
    expected: dict[str, Shape] = {a: (rank, inner), b: (out, rank)}
    if magnitude is not None:
        expected[magnitude] = (out,)
    if config.lora_bias:
        if "bias" not in tensors:
            raise AdapterError(
                f"{stored.folder}: lora_bias=True, and {module} has no bias that its own could be added to; merge it "
                "with a model that has"
            )
        expected[f"{at}.lora_B.bias"] = (out,)
        plan.deltas[tensors["bias"][0]] = Delta(stored, scaling, None, f"{at}.lora_B.bias")
    return expected


def _add_resident(
    names: _Names, stored: Checkpoint, expected: dict[str, Shape], plan: Plan, checkpoint: Checkpoint
) -> None:
    """The embedding and the head themselves, which peft may save beside their matrices.

    Mostly they are the base model's own: then they are passed over.
    """
    for module, tensors in names.modules.items():
        name, shape = tensors.get("weight", (None, ()))
        if name not in (EMBEDDING, HEAD) or name in plan.replaced:
            continue
        own = name if name in checkpoint.tensors else EMBEDDING
        for infix in ("", _RESIDENT):
            theirs = f"{WRAPPER}{module}{infix}.weight"
            if theirs not in stored.tensors:
                continue
            expected[theirs] = shape
            if stored.tensors[theirs].shape == shape and not _equal(stored, theirs, checkpoint, own):
                plan.replaced[name] = (stored, theirs)
                if names.tied:  # peft writes into the one tensor
                    plan.replaced.setdefault(HEAD, (stored, theirs))


def _equal(stored: Checkpoint, theirs: str, checkpoint: Checkpoint, own: str) -> bool:
    """Whether they round to the checkpoint's numbers."""
    return all(
        torch.equal(stored.read(theirs, window).to(checkpoint.tensors[own].dtype), checkpoint.read(own, window))
        for window in windows(checkpoint.tensors[own].shape)
    )


def _mismatches(found: Mapping[str, Shape], expected: Mapping[str, Shape], config: AdapterConfig) -> str | None:
    missing = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"unexpected {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    misshaped = [
        f"mis-shaped {name}: {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = [lines for lines in (missing, unexpected, misshaped) if lines]
    if not kinds:
        return None
    base = f", which names {shown(config.base)} as its model" if config.base else ""
    text = f"{sum(map(len, kinds))} tensors do not match this model and adapter_config.json{base}"
    text += "".join(f"\n  {listed(lines, most=MOST_LINES // len(kinds))}" for lines in kinds)
    return text + "".join(f"\n  {hint}" for sign, hint in _HINTS if any(sign in line for line in unexpected))


_HINTS = (
    (
        ".lora_A.default.",
        "an adapter's name is in the names: save it with peft's save_pretrained(), which leaves it out",
    ),
    (".gate_proj.", "GLM-4's gate and up are one linear, gate_up_proj: this adapter is another model's"),
    (".score.", "a classifier's head: build with --task sequence-classification or --task token-classification"),
    ("_orig_mod.", "it was saved from a torch.compile'd model: save model._orig_mod"),
)
