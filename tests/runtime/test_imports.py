"""The runtime works where the compiler's packages are not installed, and imports fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import Build
from tests.helpers import checkpoints

BLOCKED = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "glm4graphs", "glm4export")

GENERATE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
from glm4runtime import SamplingParams, load
session = load({bundle!r})
print(*session.generate([5, 6, 7], SamplingParams(max_new_tokens=8, temperature=1.0, seed=1)))
assert not set({blocked!r}) & set(sys.modules), set({blocked!r}) & set(sys.modules)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generates_with_the_compilers_packages_blocked(build_bundle: Build) -> None:
    bundle: Path = build_bundle(checkpoints.random_model(eos_token_id=[95]), precision="fp16", target="cpu")
    tokens = run(GENERATE.format(blocked=BLOCKED, bundle=str(bundle))).split()
    assert len(tokens) == 8


def test_import_takes_less_than_half_a_second_more_than_onnxruntime() -> None:
    seconds = run(
        "import time, onnxruntime; start = time.perf_counter(); from glm4runtime import load; "
        "print(time.perf_counter() - start)"
    )
    assert float(seconds) < 0.5
