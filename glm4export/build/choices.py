"""The closed sets of a build's options, for :class:`BuildOptions` and argparse, which waits for no torch."""

from __future__ import annotations

from typing import Literal

Attention = Literal["standard", "plugin"]
CacheName = Literal["fp32", "fp16", "int8"]
PrefillPrecision = Literal["int8"]
InputKind = Literal["ids", "embeds"]  # --inputs
