"""The tokens that begin somebody else's turn. Generation stops on them, even where a checkpoint's eos leaves them out.

A fine-tune often names one eos, and would go on as the user where it should have stopped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from glm4runtime.contract import TOKENIZER, TokenIds, UserError, refuse_pointer

TURN_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def with_turn_tokens(tokens: TokenIds, folder: Path, vocab_size: int) -> tuple[TokenIds, dict[str, int]]:
    """``tokens`` with those of a checkpoint's TURN_TOKENS that its ``eos`` lacks, and what was added, by text.

    Raises UserError where tokenizer.json can't be read.
    """
    known = _added_tokens(folder / TOKENIZER)
    ids = {text: known[text] for text in TURN_TOKENS if text in known}
    added = {text: token for text, token in ids.items() if token < vocab_size and token not in tokens.eos}
    return dataclasses.replace(tokens, eos=(*tokens.eos, *added.values())), added


def _added_tokens(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        data = path.read_bytes()
        refuse_pointer(data, str(path))
        return {str(token["content"]): int(token["id"]) for token in json.loads(data).get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable tokenizer.json ({error!r:.200}); fetch the file again") from None
