"""A draft bundle beside the bundle that it drafts for: checked, and opened for as many sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.providers import open_batch_runner
from glm4runtime.backends.settings import Settings, require_path
from glm4runtime.contract import TOKENIZER, WEIGHTS, BundleError, Manifest, UserError, read_manifest, wrong_task
from glm4runtime.engine.draft import Draft
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.files import read_text_files


class DraftBundle:
    """A draft that fits its model, not opened yet: ``manifest``, and the model's it drafts for."""

    def __init__(self, folder: Path, manifest: Manifest, model: Manifest) -> None:
        self.folder, self.manifest, self._model = folder, manifest, model
        self._settings = Settings()

    def leave_room(self, settings: Settings, slots: int) -> Settings:
        """How the model is to be opened, so that a limit on the GPU's memory holds for both.

        Each has its caches, and the rest in shares of what their weights take; of a model over several GPUs, whose
        first one has the draft too, what is there. Raises UserError where the caches alone take more.
        """
        ids = settings.device_id
        first = ids[0] if isinstance(ids, Sequence) and ids else ids  # of several
        self._settings = replace(
            settings, prefill_chunk=None, invariant=False, adapters=None, cuda_graphs=False, device_id=first
        )
        limit = settings.gpu_mem_limit
        if limit is None or not isinstance(limit, int | float):  # what isn't a number is told where it's opened
            return settings
        rows = min(settings.max_seq_len or self._model.cache.max_seq_len, self._model.cache.max_seq_len)
        own = slots * min(rows, self.manifest.cache.max_seq_len) * self.manifest.cache.bytes_per_token
        part = _part_on_first(settings.device_id, self._model.stages)
        theirs = part * (slots + settings.invariant) * rows * self._model.cache.bytes_per_token
        left = limit * 1e9 - own - theirs
        if left <= 0:
            raise UserError(
                f"gpu_mem_limit={limit:g} GB: the caches alone take {(own + theirs) / 1e9:.2f} GB, the draft's among "
                f"them {own / 1e9:.2f}; give more, or open fewer slots or a smaller max_seq_len"
            )
        smaller, larger = (manifest.files[WEIGHTS].size for manifest in (self.manifest, self._model))
        share = (own + left * smaller / (smaller + part * larger)) / 1e9
        self._settings = replace(self._settings, gpu_mem_limit=share)
        return replace(settings, gpu_mem_limit=limit - share)

    def open(self, model: BatchRunner, stall_seconds: float) -> Draft:
        """Open it with the slots and the cache length of ``model``, or as many tokens as it has positions for.

        Not invariant: guesses change no token. Raises what :func:`open_batch_runner` raises.
        """
        rows = min(model.max_seq_len, self.manifest.cache.max_seq_len)
        settings = replace(self._settings, max_seq_len=rows, prefill_chunk=model.prefill_chunk)
        return Draft(open_batch_runner(self.folder, self.manifest, settings, slots=model.slots), stall_seconds)


def _part_on_first(device_id: Any, stages: Sequence[int] | None) -> float:
    """Of a model's layers, the share on the first of its devices; what doesn't fit is told where it's opened."""
    if stages is None or not isinstance(device_id, Sequence) or len(device_id) != len(stages):
        return 1.0
    return sum(layers for layers, at in zip(stages, device_id, strict=True) if at == device_id[0]) / sum(stages)


def read_draft(bundle: str | Path, manifest: Manifest, text: BundleText, *, check_hashes: bool) -> DraftBundle:
    """A draft for the bundle of ``manifest`` and ``text``.

    Raises UserError where it is no path, BundleError where it's no whole bundle, one that writes no text, or one whose
    token ids mean something else.
    """
    require_path("draft", bundle)
    folder = Path(bundle)
    draft = read_manifest(folder, check_hashes=check_hashes)
    if draft.kv_cache is None:
        raise wrong_task(folder, draft.task)
    if draft.vocab_size != manifest.vocab_size:
        raise BundleError(
            f"{folder}: a draft of {draft.vocab_size} tokens, for a bundle of {manifest.vocab_size}; a draft needs the "
            "same tokenizer: take a smaller model of the same family"
        )
    own = read_text_files(folder).get(TOKENIZER)
    if own is not None and text.has_tokenizer and own != text.tokenizer_json:
        _require_same_ids(folder, text.folder, own, text.tokenizer_json)
    return DraftBundle(folder, draft, manifest)


def _require_same_ids(folder: Path, other: Path, own: bytes, wanted: bytes) -> None:
    """Raises BundleError where two tokenizer.json give a token two ids; how they split texts doesn't matter here."""
    first, second = _ids(folder, own), _ids(other, wanted)
    differing = {token for token, _ in first.items() ^ second.items()}
    if differing:
        token = min(differing, key=lambda text: (first.get(text, second.get(text, 0)), text))
        found = [f"{ids[token]}" if token in ids else "none" for ids in (first, second)]
        raise BundleError(
            f"{folder / TOKENIZER}: not the tokenizer of {other}: {len(differing)} tokens have other ids, "
            f"{token!r:.80} {found[0]} in place of {found[1]}; a draft needs the same one"
        )


def _ids(folder: Path, tokenizer: bytes) -> dict[str, int]:
    try:
        content: dict[str, Any] = json.loads(tokenizer)
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens", ())}
        return {**content["model"]["vocab"], **added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / TOKENIZER}: no tokenizer that can be compared: {error!r:.200}") from None
