"""LoRA adapters in peft's layout, converted into the file that sessions load: ``contract/adapter_file.py``.

A bundle says which linears there are, so no checkpoint is needed. What isn't a low-rank product beside one of them
can't be chosen as a bundle runs, and is refused: ``build --lora`` merges it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glm4export.sources.checkpoint import CONFIG, Checkpoint, StoredTensor
from glm4export.sources.config_json import read_config
from glm4export.sources.ledger import expected_tensors
from glm4export.sources.lora import Adapter, require_finite
from glm4export.sources.lora_config import AdapterError
from glm4export.sources.lora_ledger import Delta, Plan, read_plan
from glm4export.weights.tensors import Window
from glm4runtime.contract import ADAPTER_FORMAT, LORA_MODULES, LORA_PARTS, Manifest, UserError, lora_name

_MERGE = "build the bundle with --lora, which merges it"
_PROJECTIONS = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_ROOMS = {"gate_up_proj": "mlp", "down_proj": "mlp"}  # the others are in self_attn


def write_adapter(adapter: Adapter, bundle: Path, manifest: Manifest, out: Path) -> dict[str, int]:
    """Convert an adapter for a bundle built with --lora-slots, and all others of its base model with as high a rank.

    Its scale is in B. Returns ``rank``, ``linears`` and ``bytes``. Raises UserError for a bundle without slots, for an
    adapter that doesn't fit or of a rank above the bundle's, for what sessions can't load, and where ``out`` can't be
    written.
    """
    if manifest.lora is None:
        raise UserError(f"{bundle}: has no side paths for adapters; build it with --lora-slots N, or {_MERGE}")
    base = _BaseModel.of(bundle)
    tied = read_config(bundle / CONFIG).tie_word_embeddings
    plan = read_plan(adapter.stored, adapter.config, adapter.scale, base, tied=tied, brought={})
    deltas = _products(adapter, plan)
    require_finite(adapter)
    rank = max(adapter.stored.tensors[a].shape[0] for _, a in deltas.values())
    if rank > manifest.lora.rank:
        raise AdapterError(
            f"{adapter.folder}: its rank is {rank}, {bundle} was built for up to {manifest.lora.rank}; build it with "
            f"--lora-rank {rank}"
        )
    tensors: dict[str, Tensor] = {}
    for layer in range(manifest.config["num_hidden_layers"]):
        for module in LORA_MODULES:
            for part, tensor in _side_path(layer, module, rank, deltas, base).items():
                tensors[lora_name(layer, module, part)] = tensor
    facts = {
        "format": ADAPTER_FORMAT,
        "base": str(manifest.source.get("fingerprint")),
        "rank": str(rank),
        "sha256": _digest(tensors),
    }
    _save(tensors, facts, out)
    return {"rank": rank, "linears": len(tensors) // len(LORA_PARTS), "bytes": out.stat().st_size}


class _BaseModel(Checkpoint):
    """A bundle's base model by names and shapes: its numbers aren't here."""

    @classmethod
    def of(cls, bundle: Path) -> _BaseModel:
        config = read_config(bundle / CONFIG)
        shapes = dict(expected_tensors(config))
        return cls(bundle, {name: StoredTensor(bundle, shape, torch.float32, name) for name, shape in shapes.items()})

    def read(self, name: str, window: Window) -> NoReturn:
        raise AdapterError(
            f"the adapter holds {name} itself beside its matrices, which a session can't load: save it again with "
            f"save_pretrained(..., save_embedding_layers=False) where it is the base model's own, else {_MERGE}"
        )


def _products(adapter: Adapter, plan: Plan) -> dict[str, tuple[Delta, str]]:
    """The deltas by the weight that they're added to, each with its A. Raises AdapterError for all that is none."""
    folder = adapter.folder
    if plan.replaced:
        name = next(iter(plan.replaced))
        raise AdapterError(f"{folder}: {name} was trained whole (modules_to_save, bias), not as a product; {_MERGE}")
    known = tuple(part for module in LORA_MODULES for part in _PROJECTIONS.get(module, (module,)))
    found = {}
    for name, delta in plan.deltas.items():
        if delta.magnitude is not None:
            raise AdapterError(f"{folder}: use_dora=True rescales every row of {name}, which sums can't; {_MERGE}")
        if delta.a is None:
            raise AdapterError(f"{folder}: lora_bias=True adds to {name}, and side paths have no biases; {_MERGE}")
        if name.split(".")[-2] not in known:
            raise AdapterError(f"{folder}: {name} has no side path; those that have: {', '.join(known)}; {_MERGE}")
        found[name] = delta, delta.a
    return found


def _side_path(
    layer: int, module: str, rank: int, deltas: dict[str, tuple[Delta, str]], base: Checkpoint
) -> dict[str, Tensor]:
    """A [rows, in] and B [rows, out] of a linear: nothing where the adapter leaves it alone.

    Projections that lie fused in it have ``rank`` rows each, and of B their own columns.
    """
    scope = f"model.layers.{layer}.{_ROOMS.get(module, 'self_attn')}"
    parts = [f"{scope}.{part}.weight" for part in _PROJECTIONS.get(module, (module,))]
    if not any(part in deltas for part in parts):
        return {}
    shapes = [base.tensors[part].shape for part in parts]
    a = torch.zeros(len(parts) * rank, shapes[0][1])
    b = torch.zeros(len(parts) * rank, sum(out for out, _ in shapes))
    column = 0
    for index, (part, (out, inner)) in enumerate(zip(parts, shapes, strict=True)):
        if part in deltas:
            delta, name = deltas[part]
            own = (0, delta.stored.tensors[name].shape[0])
            rows = slice(index * rank, index * rank + own[1])
            a[rows] = delta.stored.read(name, (own, (0, inner))).float()
            b[rows, column : column + out] = delta.stored.read(delta.b, ((0, out), own)).float().T * delta.scaling
        column += out
    return {"A": a, "B": b}


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of the data as safetensors writes it: tensors of one dtype in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _save(tensors: dict[str, Tensor], facts: dict[str, str], out: Path) -> None:
    """Write beside ``out``, then rename: an interrupt leaves what was there."""
    part = out.with_name(f".{out.name}.part")
    try:
        save_file(tensors, part, metadata=facts)
        part.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)
