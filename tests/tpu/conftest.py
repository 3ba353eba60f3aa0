"""Excludes the tests that need JAX or libtpu where libtpu is not installed.

`make test-tpu` names each file. pytest then reads it in any case, and fails
without them.
"""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("libtpu")
    else ["compile_test.py", "lowering_test.py", "run_test.py"]
)
