"""Tests of the Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest` and this folder.

Triton decides when it is imported, once for the whole process, whether it interprets; and a process that
interprets cannot run kernels on a device. So these tests are collected only where the variable was set from
the start. `tests/deploy/cuda/test_interpreted.py` starts such a process, whatever ran before it in its own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
