"""A bundle of stages over Ray actors on a cluster of this machine, beside the same in one process; then one is killed.

python tools/ray_stages_check.py [BUNDLE]    (default: the embedded model in int4, in two stages; two CPUs)

Prints what it found, and exits with 1 where tokens differ or a lost stage isn't told.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

from glm4runtime import Session, UserError, load
from glm4runtime.sampling import SamplingParams
from glm4serve.deploy.ray_stages import load_stages

PROMPT = "Who wrote the book of the sea? " * 80
STEPS = 48


def tokens(session: Session, lookup: int) -> tuple[list[int], float]:
    """Greedy, and milliseconds a token."""
    session.runner.rewind()
    start = time.perf_counter()
    found = list(session.generate(PROMPT, SamplingParams(max_new_tokens=STEPS, temperature=0.0), lookup=lookup))
    return found, 1000 * (time.perf_counter() - start) / len(found)


def main() -> int:
    """Run it; returns the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "bundle"
        if len(sys.argv) == 1:
            options = ["--precision", "int4", "--target", "cpu", "--stages", "2"]
            subprocess.run([sys.executable, "-m", "glm4export", "build", "-o", bundle, *options], check=True)
        ray.init(num_cpus=8, include_dashboard=False, logging_level="warning")
        failed = 0
        with load(bundle, threads=1) as here, load_stages(bundle) as there:
            for lookup in (0, 7):
                (wanted, near), (found, far) = (tokens(session, lookup) for session in (here, there))
                same = found == wanted
                told = "equal" if same else "DIFFER"
                print(f"lookup {lookup}: {len(found)} tokens {told}, {near:.1f} and {far:.1f} ms each")
                failed += not same
            first = there.runner.graphs["prefill"].stages[0].session  # type: ignore[attr-defined]
            ray.kill(first._actor)
            try:
                tokens(there, 0)
                print("a killed stage: NOT TOLD")
                failed += 1
            except UserError as error:
                print(f"a killed stage: {error}")
            try:
                load_stages(bundle, threads=8)
                print("a cluster that is too small: NOT TOLD")
                failed += 1
            except UserError as error:
                print(f"a cluster that is too small: {error}")
        ray.shutdown()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
