"""A TPUStrategy with stub cores: it traces and never runs."""

import collections

import numpy as np
import tensorflow as tf
from tensorflow.python.tpu import (
    device_assignment,
    topology,
    tpu_system_metadata,
)

CORES = 8

_Device = collections.namedtuple("_Device", "name device_type")


def tpu_strategy():
    """Returns a `tf.distribute.TPUStrategy` of `CORES` replicas, one host."""
    mesh = topology.Topology(
        mesh_shape=[2, CORES // 2, 1, 1],
        device_coordinates=np.array(
            [[[x, y, 0, 0] for y in range(CORES // 2) for x in range(2)]],
            np.int32,
        ),
    )
    return tf.distribute.TPUStrategy(
        _Resolver(mesh),
        experimental_device_assignment=(
            device_assignment.DeviceAssignment.build(mesh, num_replicas=CORES)
        ),
    )


class _Resolver(tf.distribute.cluster_resolver.TPUClusterResolver):
    """Reports a given topology, without asking a TPU."""

    tpu_hardware_feature = None
    environment = ""

    def __init__(self, mesh):
        self._tpu = "local"
        self._mesh = mesh
        self.task_type, self.task_id = "localhost", 0

    def get_tpu_system_metadata(self):
        kinds = [("CPU", 1), ("TPU", CORES), ("TPU_SYSTEM", 1)]
        host = "/job:localhost/replica:0/task:0"
        return tpu_system_metadata.TPUSystemMetadata(
            num_cores=CORES,
            num_hosts=1,
            num_of_cores_per_host=CORES,
            topology=self._mesh,
            devices=[
                _Device(f"{host}/device:{kind}:{index}", kind)
                for kind, count in kinds
                for index in range(count)
            ],
        )

    def master(self, *args, **kwargs):
        return ""

    def cluster_spec(self):
        return tf.train.ClusterSpec({})
