"""Which device each stage gets, and what is bound and copied between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glm4runtime import UserError
from glm4runtime.backends.gpu_options import GpuOptions, gpu_options
from glm4runtime.backends.stages import Stage, StagedGraph


@pytest.mark.parametrize(
    ("device_id", "provider", "stages", "message"),
    [
        ([0, 1], "cpu", (2, 2), "device_id=[0, 1]: several devices are for cuda, this session runs on cpu"),
        ([0, 1], "cuda", None, "device_id=[0, 1]: the bundle has no stages, so it runs on one device; give one"),
        ((0, 1, 2), "cuda", (2, 2), "device_id=[0, 1, 2]: the bundle has 2 stages; give a device for each"),
        ([0, -1], "cuda", (2, 2), "device_id=-1 is not a whole number from 0 on"),
    ],
)  # fmt: skip
def test_devices_that_do_not_fit(device_id: Any, provider: str, stages: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        gpu_options(device_id, None, provider, stages)
    assert message in str(error.value)


def test_devices_of_stages() -> None:
    assert gpu_options([1, 1], 2, "cuda", (2, 2)) == GpuOptions(1, 2)
    several = gpu_options((1, 0, 1), 2, "cuda", (2, 2, 1))
    assert several == GpuOptions(1, 2, (1, 0, 1)) and several.devices == (1, 0)


class Recorder:
    """A session and its binding in one, that notes what is bound and run."""

    def __init__(self, name: str, inputs: list[str], outputs: list[str], notes: list[str]) -> None:
        self.name, self.notes, self.ends = name, notes, (inputs, outputs)

    def get_inputs(self) -> list[Any]:
        return [type("Arg", (), {"name": name}) for name in self.ends[0]]

    def get_outputs(self) -> list[Any]:
        return [type("Arg", (), {"name": name}) for name in self.ends[1]]

    def io_binding(self) -> Recorder:
        return Bound(self.name, *self.ends, self.notes)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.notes.append(f"run {self.name}")


class Bound(Recorder):
    def bind_input(self, name: str, device: str, device_id: int, *_: Any) -> None:
        self.notes.append(f"{self.name} < {name} at {device}:{device_id}")

    def bind_output(self, name: str, device: str, device_id: int, *_: Any) -> None:
        self.notes.append(f"{self.name} > {name} at {device}:{device_id}")

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.notes.append(f"{self.name} < {value}")

    def get_outputs(self) -> list[Any]:
        return [f"the stream of {self.name}"]


def test_what_is_bound_and_copied() -> None:
    """On one device once; what comes from another one, at every run."""
    notes: list[str] = []
    ends = [(["input_ids", "mask"], ["stream.2"]), (["stream.2", "mask"], ["stream.4"]), (["stream.4"], ["logits"])]
    made = [Recorder(f"stage {index}", *names, notes) for index, names in enumerate(ends)]
    graph = StagedGraph([Stage(session, ("cuda", at)) for session, at in zip(made, (0, 1, 1), strict=True)])
    binding = graph.io_binding()
    streams = ["stage 0 > stream.2 at cpu:0", "stage 1 > stream.4 at cuda:1"]
    assert notes == streams  # in front of all other outputs
    notes.clear()
    where = (np.int64, (1, 3), 0)
    binding.bind_input("input_ids", "cuda", 0, *where)
    binding.bind_input("mask", "cuda", 0, *where)
    binding.bind_output("logits", "cpu", 0, *where)
    bound = ["stage 0 < input_ids at cuda:0", "stage 0 < mask at cuda:0", "stage 1 < mask at cuda:0"]
    assert notes == [*streams, *bound, "stage 2 > logits at cpu:0"]
    runs = []
    for _ in range(2):
        notes.clear()
        graph.run_with_iobinding(binding)
        runs.append(list(notes))
    crossing = ["run stage 0", "stage 1 < the stream of stage 0", "stage 1 < mask at cuda:0", "run stage 1"]
    assert runs == [[*crossing, "stage 2 < the stream of stage 1", "run stage 2"], [*crossing, "run stage 2"]]
    notes.clear()
    binding.bind_input("input_ids", "cuda", 0, np.int64, (1, 3), 8)  # as many: streams have their place
    assert notes == ["stage 0 < input_ids at cuda:0"]
    binding.bind_input("input_ids", "cuda", 0, np.int64, (1, 4), 8)
    assert notes[1:3] == streams
