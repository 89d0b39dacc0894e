#!/usr/bin/env bash
# Everything that must hold before a commit: lint, formatting, types, direction of dependency, tests.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
install dev

echo "== Lint and formatting"
ruff check .
ruff format --check .
echo "== Types"
mypy
echo "== Direction of dependency"
lint-imports --no-logo
echo "== Tests"
# A process per core, a thread each; a file's tests stay together, since they share what they build.
OMP_NUM_THREADS=1 pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
