"""The XLA compiler of libtpu, on a machine without a TPU.

JAX loads it. The functions of JAX that compile and run a StableHLO program are
not public, so setup.py pins the version of JAX.
"""

import os
import re
import time
from typing import NamedTuple

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import _jax
from jax._src.lib.mlir import ir
from jax.experimental import topologies

from tests.tpu import lowering, stub_strategy

# Eight chips of each kind.
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")

# libtpu reads these at the first compilation. It must not ask the cloud or
# other processes about a TPU machine.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}

# Set before JAX looks for devices. Keras's counters have 64 bits.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", stub_strategy.CORES)
jax.config.update("jax_enable_x64", True)


class Compiled(NamedTuple):
    """A program as it would run on each chip.

    Attributes:
        text: str, the optimised HLO.
        temporary_bytes: int, memory beside arguments and results.
        seconds: float, processor time of the compilation.
    """

    text: str
    temporary_bytes: int
    seconds: float

    @property
    def all_reduced(self):
        """The values that each all-reduce sums, lists of `lowering.Value`."""
        found = re.findall(
            r"^.* = (.*?) all-reduce(?:-start)?\(", self.text, re.MULTILINE
        )
        return [
            [
                lowering.Value(dtype, int(np.prod(_ints(dimensions))))
                for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shape)
            ]
            for shape in found
        ]


def compiled(stablehlo, topology):
    """Compiles a program for all chips of a topology.

    Args:
        stablehlo: str, the program of one chip.
        topology: str, one of `TOPOLOGIES`.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    begin = time.process_time()
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    with mlir.make_ir_context():
        executable = chips[0].client.compile(
            ir.Module.parse(stablehlo),
            executable_devices=_jax.DeviceList(tuple(chips)),
            compile_options=_options(chips),
        )
    (module,) = executable.hlo_modules()
    return Compiled(
        text=module.to_string(),
        temporary_bytes=executable.get_compiled_memory_stats().temp_size_in_bytes,
        seconds=time.process_time() - begin,
    )


_DTYPES = {"f32": np.float32, "i32": np.int32, "i64": np.int64}


def run(stablehlo, *batch):
    """Runs a program on CPUs in place of cores, with all variables at zero.

    Args:
        stablehlo: str, the program of one core.
        *batch: arrays of which each core gets an entry.

    Returns:
        A list of the program's results, each a list of the cores' arrays.
    """
    devices = jax.devices()
    anywhere = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(devices), "core"),
        jax.sharding.PartitionSpec(),
    )
    with mlir.make_ir_context():
        module = ir.Module.parse(stablehlo)
        executable = devices[0].client.compile_and_load(
            module, _jax.DeviceList(tuple(devices)), _options(devices)
        )
        (main,) = (
            f for f in module.body if ir.StringAttr(f.sym_name).value == "main"
        )
        kinds = [
            (tuple(kind.shape), _DTYPES[str(kind.element_type)])
            for kind in map(ir.RankedTensorType, main.type.inputs)
        ]
    # The first argument is the number of the core.
    arguments = [np.arange(len(devices), dtype=np.int32), *batch]
    arguments += [
        np.zeros((len(devices), *shape), dtype)
        for shape, dtype in kinds[len(arguments) :]
    ]
    results = executable.execute_sharded(
        [
            jax.make_array_from_single_device_arrays(
                shape, anywhere, [*map(jax.device_put, values, devices)]
            )
            for (shape, _), values in zip(kinds, arguments, strict=True)
        ]
    ).disassemble_into_single_device_arrays()
    return [[np.asarray(x) for x in result] for result in results]


def _options(devices):
    return compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array(devices).reshape(len(devices), 1),
        backend=devices[0].client,
    )


def _ints(dimensions):
    return [int(number) for number in dimensions.split(",") if number]
