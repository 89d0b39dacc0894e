"""A comparison's samples as tables: medians for each peer, and each bundle's ratios over each peer, round by round."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers.machine import Machine

Samples = dict[str, dict[str, list[float]]]  # what was measured -> peer -> the value of each round
BUSY = 0.1  # cores kept busy by other processes, past which a run is called into question


@dataclass(frozen=True)
class Comparison:
    """Everything that one run found. ``peers`` is what each worker said of itself; bundles come first.

    ``alike`` says of each peer's answers that it runs the same model, by the measure ``alike_by``; ``rounds`` how often
    what was measured.
    """

    command: str
    machine: Machine
    other_cores_busy: float
    bundles: list[str]
    peers: dict[str, dict[str, Any]]
    alike_by: str
    alike: dict[str, float]
    rounds: str
    less_is_better: list[str]  # of the samples' names
    samples: Samples

    def others(self) -> list[str]:
        return [spec for spec in self.peers if spec not in self.bundles]

    def doubt(self) -> str:
        """Why the numbers mean little; empty on an idle machine."""
        if self.other_cores_busy <= BUSY:
            return ""
        return (
            f"WARNING: other processes kept {self.other_cores_busy:.1f} cores busy meanwhile; these numbers mean little"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of the rounds."""
    found = [our / their for our, their in zip(ours, theirs, strict=True)]
    return statistics.median(found), min(found), max(found)


def short(spec: str) -> str:
    """A bundle by its folder's name."""
    kind, _, variant = spec.partition(":")
    ours, _, mode = kind.partition("-")
    return f"{Path(variant).name} {mode}".rstrip() if ours == "glm4export" else spec


def text(found: Comparison) -> str:
    """The tables for a terminal."""
    specs = list(found.peers)
    width = max(16, *(len(short(spec)) + 2 for spec in specs))
    first = max(map(len, found.samples)) + 2
    lines = [f"{'medians':<{first}}" + "".join(f"{short(spec):>{width}}" for spec in specs)]
    for row, values in found.samples.items():
        lines.append(f"{row:<{first}}" + "".join(f"{_median(values[spec]):>{width}}" for spec in specs))
    lines += [found.doubt()] if found.doubt() else []
    for bundle in found.bundles:
        for peer in found.others():
            lines += ["", f"{short(bundle)} over {short(peer)}"]
            lines += [
                f"  {row:<{first}}{_ratio(values[bundle], values[peer])}" for row, values in found.samples.items()
            ]
    return "\n".join(lines)


def markdown(found: Comparison) -> str:
    """The same as a page that stands alone: machine, command, versions and settings with the numbers."""
    specs = list(found.peers)
    lines = ["# Beside other runtimes", "", f"{found.machine.describe()}.", "", f"`{found.command}`", ""]
    lines += [found.doubt(), ""] if found.doubt() else []
    lines += _head("", "runtime", "settings", "on huge pages (GiB)", "files (GB)", found.alike_by)
    for spec, told in found.peers.items():
        huge, size = f"{told['huge_bytes'] / 2**30:.2f}", f"{told['files_bytes'] / 1e9:.2f}"
        same = f"{found.alike[spec]:.4f}"
        lines.append(_row(short(spec), told["name"], told["settings"], huge, size, same))
    lines += ["", f"Medians of {found.rounds}:", ""]
    lines += _head("", *map(short, specs))
    lines += [_row(row, *(_median(values[spec]) for spec in specs)) for row, values in found.samples.items()]
    lines += [
        "",
        f"Medians of the rounds' ratios, and their range; less is better in {', '.join(found.less_is_better)}:",
    ]
    for bundle in found.bundles if found.others() else ():
        lines += ["", *_head(f"{short(bundle)} over", *map(short, found.others()))]
        for row, values in found.samples.items():
            lines.append(_row(row, *(_ratio(values[bundle], values[peer]) for peer in found.others())))
    return "\n".join(lines) + "\n"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _median(values: list[float]) -> str:
    value = statistics.median(values)
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    median, low, high = ratios(ours, theirs)
    return f"{median:.2f}x ({low:.2f} to {high:.2f})"
