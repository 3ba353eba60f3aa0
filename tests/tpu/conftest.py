"""Leaves out, of a run of all tests, those that need JAX or XLA for TPUs.

`make test-tpu` names each file, which pytest then reads in any case: without
them it fails.
"""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("libtpu")
    else ["compile_test.py", "lowering_test.py", "run_test.py"]
)
