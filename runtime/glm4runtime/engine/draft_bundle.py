"""A draft bundle beside the bundle that it drafts for: checked, and opened for as many sequences."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm4runtime.backends.batch import BatchRunner
from glm4runtime.backends.providers import Provider, open_batch_runner
from glm4runtime.contract import TOKENIZER, BundleError, Manifest, UserError, read_manifest, shown, wrong_task
from glm4runtime.engine.draft import Draft
from glm4runtime.text.bundle_text import BundleText
from glm4runtime.text.files import read_text_files


def read_draft(bundle: str | Path, manifest: Manifest, text: BundleText, *, check_hashes: bool) -> Manifest:
    """The manifest of a draft for the bundle of ``manifest`` and ``text``.

    Raises UserError where it is no path, BundleError where it's no whole bundle, one that writes no text, or one whose
    token ids mean something else.
    """
    if not isinstance(bundle, str | os.PathLike):
        raise UserError(f"draft={shown(bundle)} is not the path of a folder")
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
    return draft


def open_draft(
    bundle: str | Path,
    draft: Manifest,
    model: BatchRunner,
    *,
    provider: Provider | None,
    threads: int,
    check_hashes: bool,
    device_id: int | Sequence[int],
    stall_seconds: float,
) -> Draft:
    """Open a draft with the slots and the cache length of ``model``, or as many tokens as it has positions for.

    Not invariant: guesses change no token. Raises what :func:`open_batch_runner` raises.
    """
    runner = open_batch_runner(
        Path(bundle),
        draft,
        slots=model.slots,
        provider=provider,
        threads=threads,
        max_seq_len=min(model.max_seq_len, draft.cache.max_seq_len),
        prefill_chunk=model.prefill_chunk,
        check_hashes=check_hashes,
        invariant=False,
        device_id=device_id if isinstance(device_id, int) else device_id[0],
    )
    return Draft(runner, stall_seconds)


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
