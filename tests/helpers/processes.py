"""Commands and programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

PREFIX = "glm4export: error: "
GLM4EXPORT = [sys.executable, "-m", "glm4export"]


def python(code: str, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


WITHOUT = """
import importlib.machinery, sys
blocked = sys.argv.pop(1)
find = importlib.machinery.PathFinder.find_spec
def find_other(name, path=None, target=None):
    return None if name.split(".")[0] == blocked else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_other)  # dill calls it on an instance
from glm4export.cli import main
sys.exit(main())
"""
