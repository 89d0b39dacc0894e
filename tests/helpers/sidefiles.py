"""Shared by tests: PANIC, POINTER."""

from __future__ import annotations

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 19966496\n"


# Normalizers of sentencepiece models carry a table; `tokenizers` reads its header without looking whether it's there.
PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
