#!/usr/bin/env bash
# torch 2.13.0: `torch.inference_mode(False)` inside `torch.no_grad()` turns gradients on. Leaving inference mode
# for a moment, to make a tensor that may be written to later, also leaves the `no_grad` around it: what is computed
# in there from a parameter is recorded for differentiation, and keeps its inputs in memory.
#
# It matters to libraries that make buffers in code which callers run in either mode. Put a `torch.no_grad()` inside
# the `inference_mode(False)`, not outside it.
#
# Seen on Python 3.11, Linux x86_64, 2026-12-01: a product of a parameter needs a gradient with `no_grad` outside,
# and none with `no_grad` inside; after the block gradients are off again.
# Exits with 0 while that holds, and with 1 when it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.3.5"
"$folder/venv/bin/python" - <<'PYTHON'
import torch

weight = torch.nn.Parameter(torch.ones(2))
with torch.no_grad():
    plain = (weight * 2).requires_grad
    with torch.inference_mode(False):
        outside = (weight * 2).requires_grad
    with torch.inference_mode(False), torch.no_grad():
        inside = (weight * 2).requires_grad
    after = (weight * 2).requires_grad
print(f"torch {torch.__version__}: needs a gradient under no_grad: {plain}; in inference_mode(False) inside it: {outside}")
print(f"with no_grad inside inference_mode(False): {inside}; after the block: {after}")
raise SystemExit(0 if (plain, outside, inside, after) == (False, True, False, False) else 1)
PYTHON
