#!/usr/bin/env bash
# safetensors 0.8.0 writes the entries of a file's metadata in random order: the same tensors with the same
# metadata give other bytes from one process to the next. With a single entry the bytes are always the same.
#
# It matters to whoever names, signs or compares files by their digest: put everything into one entry, as a
# JSON text with sorted keys, or sort the header yourself.
#
# Seen on Python 3.11, Linux x86_64, 2026-11-30: 8 processes, 8 digests with seven entries, 1 with one entry.
# Exits with 0 while that holds, and with 1 when it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "safetensors==0.8.0" "numpy==2.3.5"

digest_of() { # entries
    "$folder/venv/bin/python" - "$1" <<'PYTHON'
import hashlib
import sys

import numpy
from safetensors.numpy import save

entries = {f"key-{number}": "value" for number in range(int(sys.argv[1]))}
print(hashlib.sha256(save({"weight": numpy.zeros(4, numpy.float32)}, metadata=entries)).hexdigest())
PYTHON
}

many=$(for _ in 1 2 3 4 5 6 7 8; do digest_of 7; done | sort -u | wc -l)
one=$(for _ in 1 2 3 4 5 6 7 8; do digest_of 1; done | sort -u | wc -l)
echo "safetensors 0.8.0: of 8 files with the same contents, $many differ with seven entries, $one with one entry"
[[ $many -gt 1 && $one -eq 1 ]]
