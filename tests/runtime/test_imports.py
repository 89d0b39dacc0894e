"""The runtime works where the compiler's packages are not installed, and imports fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import Build
from tests.helpers import checkpoints

BLOCKED = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "glm4graphs", "glm4export")
HUB = ("huggingface_hub",)

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
"""
GENERATE = f"""{BLOCK}
from glm4runtime import SamplingParams, load
session = load({{bundle!r}})
print(*session.generate([5, 6, 7], SamplingParams(max_new_tokens=8, temperature=1.0, seed=1)))
assert not set({{blocked!r}}) & set(sys.modules), set({{blocked!r}}) & set(sys.modules)
"""
COMMANDS = f"""{BLOCK}
from glm4export import cli
for argv in (
    ["inspect", {{bundle!r}}],
    ["generate", {{bundle!r}}, "--prompt", "hello", "--max-new-tokens", "2"],
    ["verify", {{bundle!r}}, "--prompt", "hello", "--steps", "1"],
):
    assert cli.main(argv) == 0, argv
assert cli.main(["inspect", "zai-org/GLM-4-9B-0414"]) == 2
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_generates_with_the_compilers_packages_blocked(build_bundle: Build) -> None:
    bundle: Path = build_bundle(checkpoints.random_model(eos_token_id=[95]), precision="fp16", target="cpu")
    tokens = run(GENERATE.format(blocked=(*BLOCKED, *HUB), bundle=str(bundle))).stdout.split()
    assert len(tokens) == 8


def test_local_bundles_need_no_hub(demo_bundles: dict[str, Path]) -> None:
    done = run(COMMANDS.format(blocked=HUB, bundle=str(demo_bundles["fp32"])))
    assert "passed" in done.stdout
    install = "pip install '.[compile]' in a clone of glm4export's repository"
    assert done.stderr == f"glm4export: error: huggingface_hub is not installed; {install}\n"


def test_import_takes_less_than_half_a_second_more_than_onnxruntime() -> None:
    seconds = run(
        "import time, onnxruntime; start = time.perf_counter(); from glm4runtime import load; "
        "print(time.perf_counter() - start)"
    ).stdout
    assert float(seconds) < 0.5
