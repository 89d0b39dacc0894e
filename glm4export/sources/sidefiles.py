"""Tokenizer, template and configs, checked before the build: a bad one is reported now, not at the first chat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from glm4export.sources.checkpoint import SIDE_FILES
from glm4export.sources.files import refuse_pointer
from glm4runtime.contract import UserError, sha256_of

_TOKENIZER = "tokenizer.json"
_REFUSED = 3  # the probe's exit status for a tokenizer that the runtime refuses in words
_SECONDS = 60
_MEMORY = 4 << 30  # bytes of address space; GLM-4's own tokenizer takes a tenth

# Loaded as a session loads it. `tokenizers` is Rust: it panics, or aborts the process, on some files.
_PROBE = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from glm4runtime.contract import UserError
from glm4runtime.text.tokenizer import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
    tokenizer.decode(tokenizer.encode("What is 1+1? \\u4f60\\u597d [gMASK]<sop><|user|>\\n"))
except UserError as error:
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    print(error, end="")
    sys.exit({_REFUSED})
"""
_loaded: set[str] = set()  # sha256 of the files that a probe has loaded


def check_side_files(folder: Path) -> None:
    """Raise UserError for a git-lfs pointer among a checkpoint's side files, and a tokenizer that can't be loaded."""
    for name in SIDE_FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    if (folder / _TOKENIZER).is_file():
        _check_tokenizer(folder / _TOKENIZER)


def _check_tokenizer(path: Path) -> None:
    """Load the file in a process of its own: what ends that one must not end the build."""
    digest = sha256_of(path)
    if digest in _loaded:
        return
    places = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, str(path.absolute())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            env={**os.environ, "PYTHONPATH": places, "TOKENIZERS_PARALLELISM": "false"},
            cwd="/",  # python -c looks for modules in the working directory first
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: not loaded within {_SECONDS} s; fetch the file again") from None
    if probe.returncode == _REFUSED:
        raise UserError(probe.stdout)
    if probe.returncode:
        lines = [line.strip() for line in probe.stderr.splitlines() if line.strip()]
        end = f"signal {-probe.returncode}" if probe.returncode < 0 else f"status {probe.returncode}"
        said = next((line for line in lines if "Error" in line or "xception" in line or "overflow" in line), end)
        raise UserError(f"{path}: `tokenizers` can't load the file and ends its process ({said}); fetch it again")
    _loaded.add(digest)
