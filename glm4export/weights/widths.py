"""How many bits a stored weight may have, and how many weights may share a scale."""

from __future__ import annotations

from typing import Literal

Bits = Literal[4, 8, 16]  # 16: float16
BlockSize = Literal[16, 32, 64, 128]

BLOCKS: tuple[BlockSize, ...] = (128, 64, 32, 16)  # that every kernel takes, best first
