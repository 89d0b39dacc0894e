"""Files of checkpoints and bundles that tests change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm4runtime.contract import MANIFEST


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None drops one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def drop(bundle: Path, name: str) -> None:
    """Take a file out of a bundle and its manifest, as if the checkpoint hadn't had it."""
    (bundle / name).unlink()
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle / MANIFEST, files={key: value for key, value in files.items() if key != name})
