"""docs/gpu.md's table of kernels names every operator of the graphs for cuda, in the version and types they have."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTINGS = sorted((ROOT / "graphs" / "golden").glob("cuda-*/*.txt"))
FLOATS = {"fp16": "fp16", "int8": "fp16", "int4": "fp16", "bf16": "bf16"}  # that a precision computes in
ROW = re.compile(r"\| `(?:(com\.microsoft)::)?(\w+)` \| (\d+) \| ([\w, ]+) \| (GPU|host) \| ([\d.]+) \| .+ \|")


def kernels() -> dict[tuple[str, str], tuple[int, set[str]]]:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [ROW.fullmatch(line) for line in text.splitlines()]
    return {(row[1] or "", row[2]): (int(row[3]), set(row[4].split(", "))) for row in rows if row}


def operators(listing: Path) -> set[tuple[str, str]]:
    nodes = listing.read_text(encoding="utf-8").partition("\nnodes\n")[2]
    return set(re.findall(r"^  .*? = (?:([\w.]+)::)?(\w+)\(", nodes, re.MULTILINE))


def test_every_operator_and_no_other_is_in_the_table() -> None:
    assert len(LISTINGS) >= 10
    assert kernels().keys() == set().union(*map(operators, LISTINGS))


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda path: path.parent.name + "-" + path.stem)
def test_versions_and_types(listing: Path) -> None:
    """Versions are those of opset 24; of floats, an operator has the precision's or none."""
    table, own = kernels(), FLOATS[listing.parent.name.split("-")[1]]
    for domain, name in operators(listing):
        version, types = table[domain, name]
        assert domain or version == onnx.defs.get_schema(name, 24).since_version, name
        assert own in types or not types & {"fp16", "bf16"}, name
