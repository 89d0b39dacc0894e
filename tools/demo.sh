#!/usr/bin/env bash
# Build the embedded GLM-4 in fp16, verify it against PyTorch, and ask it one question.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
install cpu,compile,serve,structured

echo "== Building the embedded model"
glm4export build --precision fp16 -o out/demo-fp16
echo "== Comparing it with the PyTorch definition in fp32"
glm4export verify out/demo-fp16
echo "== Asking it: What is the capital of France?"
glm4export generate out/demo-fp16 --prompt "What is the capital of France?"
