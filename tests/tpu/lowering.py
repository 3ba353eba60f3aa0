"""The program of one TPU core as StableHLO, from a trace of `strategy.run`.

Under a TPUStrategy `strategy.run` marks one replica's operations in the graph.
On a TPU's host TensorFlow cuts them out and hands them to XLA. TensorFlow for
CPUs lacks the kernels for that, but its bridge to XLA translates an operation
alike for any platform. This module cuts them out and replaces only three:

    TPUReplicatedInput   becomes an argument or a variable
    CrossReplicaSum      becomes XlaAllReduce, its equivalent
    AllToAll             becomes a call of a name, which `lowered` replaces by
                         StableHLO's all_to_all, as the bridge would

TensorFlow 2.21 makes StableHLO; 2.18 does not.
"""

import re
from typing import NamedTuple

import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.python.ops import handle_data_util

from tests.tpu import stub_strategy

_MARK = "_tpu_replicate"
_ALL_TO_ALL = "tpu_all_to_all"
_GROUPS = f"dense<[{list(range(stub_strategy.CORES))}]>"


class UnfitForTPUError(Exception):
    """A step that a TPU cannot run, or runs only slowly."""


class Value(NamedTuple):
    """A value that an all-reduce sums.

    Attributes:
        dtype: str, XLA's name of the type, such as "f32".
        size: int, number of elements.
    """

    dtype: str
    size: int

    @property
    def bytes(self):
        """Int, its size in bytes."""
        return self.size * int(re.sub(r"\D", "", self.dtype)) // 8


def lowered(strategy, step, *batch):
    """Returns the StableHLO text of one replica's step.

    Args:
        strategy: `stub_strategy.tpu_strategy()`.
        step: callable of a replica's batch.
        *batch: `tf.TensorSpec` of each part of a replica's batch.

    Raises:
        UnfitForTPUError: if the step calls the host, computes in float64, or
            has shapes that depend on the data.
    """

    @tf.function(autograph=False)
    def run(*batch):
        return strategy.run(step, args=batch)

    replica, arguments = _replica(run.get_concrete_function(*batch).graph)
    try:
        text = replica.experimental_get_compiler_ir(**arguments)(
            stage="stablehlo", platform_name="CPU"
        )
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        operations = re.findall(
            r"(\w+) \(No registered '\w+' OpKernel", str(error)
        )
        if not operations:
            raise
        raise UnfitForTPUError(
            "The step holds operations that XLA does not compile, which run "
            "on the host, or all-reduces inside a condition. Expected none. "
            f"Received: operations={sorted(set(operations))}"
        ) from error
    text = _without_mhlo(text)
    _check(text)
    return text


def all_reduced(text):
    """Returns what each all-reduce of StableHLO sums, a list of lists."""
    found = re.findall(
        r'"stablehlo\.all_reduce".*?\}\) : \((.*?)\) ->', text, re.DOTALL
    )
    return [_values(types) for types in found]


def num_all_to_alls(text):
    """Returns how many all-to-alls StableHLO holds."""
    return text.count('"stablehlo.all_to_all"')


def types(text):
    """Returns the set of the types of all tensors, such as "8x3xf32"."""
    # Attributes, such as a window's, are not tensors of the program.
    text = re.sub(r" = dense<[^>]*> : tensor<[^>]*>", "", text)
    return set(re.findall(r"tensor<([^<>]*)>", text))


def _replica(graph):
    """Returns a function of one replica's operations, and its arguments."""
    definition = graph.as_graph_def()
    body = graph_pb2.GraphDef(
        library=definition.library, versions=definition.versions
    )
    body.node.extend(_cut(definition, graph))
    arguments, variables = {}, {}
    for node in definition.node:
        if node.op == "TPUReplicatedInput":
            (source,) = _tensors(graph, node.input[:1])
            if source.dtype == tf.resource:
                variables[node.name] = _variable_like(source)
            else:
                arguments[node.name] = tf.TensorSpec(source.shape, source.dtype)
    outputs = [
        name
        for node in definition.node
        if node.op == "TPUReplicatedOutput"
        for (name,) in [node.input]
    ]

    @tf.function(autograph=False, jit_compile=True)
    def replica(**arguments):
        capture = tf.compat.v1.get_default_graph().capture
        handles = {k: capture(v.handle) for k, v in variables.items()}
        return tf.graph_util.import_graph_def(
            body,
            input_map=arguments | handles,
            return_elements=[_tensor_name(name) for name in outputs],
            name="",
        )

    return replica, arguments


def _cut(definition, graph):
    """Yields a replica's nodes, as operations that XLA for CPUs knows."""
    marked = [node for node in definition.node if _MARK in node.attr]
    marks = {node.attr[_MARK].s for node in marked}
    if len(marks) != 1:
        raise ValueError(
            "There is no one program to compile. Expected a step in one "
            f"`strategy.run`. Received: {len(marks)} of them"
        )
    names = {node.name for node in marked if node.op != "TPUReplicateMetadata"}
    for node in marked:
        if node.name not in names:
            continue
        del node.attr[_MARK]
        inputs = [
            name
            for name in node.input
            if not name.startswith("^") or name[1:] in names
        ]
        node.input[:] = inputs
        if node.op == "CrossReplicaSum":
            node.op = "XlaAllReduce"
            node.attr["reduce_op"].s = b"Add"
            node.attr["mode"].s = b"CrossReplica"
        elif node.op == "AllToAll":
            (result,) = _tensors(graph, [node.name])
            node.op = "XlaCustomCallV2"
            node.input[:] = inputs[:1]
            node.attr.clear()
            node.attr["call_target_name"].s = _ALL_TO_ALL.encode()
            node.attr["backend_config"].s = b""
            node.attr["has_side_effect"].b = False
            for key in ("operand_dtypes", "result_dtypes"):
                types = node.attr[key].list.type
                types.append(result.dtype.as_datatype_enum)
            shapes = node.attr["result_shapes"].list.shape
            shapes.append(result.shape.as_proto())
        yield node


def _without_mhlo(text):
    """Returns the text without operations that only TensorFlow's XLA knows."""
    # A copy of a variable. A reshape to the same shape is equivalent.
    text = re.sub(
        r"mhlo\.copy (%[\w#]+)\s*: (tensor<[^>]*>)",
        r"stablehlo.reshape \1 : (\2) -> \2",
        text,
    )
    return re.sub(
        rf"stablehlo\.custom_call @{_ALL_TO_ALL}\((%[\w#]+)\).*? : (\(.*)",
        r'"stablehlo.all_to_all"(\1) <{'
        "split_dimension = 0 : i64, concat_dimension = 0 : i64, "
        f"split_count = {stub_strategy.CORES} : i64, "
        f"replica_groups = {_GROUPS} : tensor<1x{stub_strategy.CORES}xi64>"
        r"}> : \2",
        text,
    )


def _check(text):
    """Raises an UnfitForTPUError for a program that a TPU should not get."""
    reasons = [
        (
            r"^.*(?:x|tensor<)f64\b.*$",
            "The step computes in float64, which TPUs emulate at best. "
            "Expected float32 or bfloat16.",
        ),
        (
            r"^.*(?:tensor<|x)\?.*$",
            "The step has shapes that depend on the data. Expected static "
            "shapes.",
        ),
        (
            r"^.*stablehlo\.(?:custom_call|infeed|outfeed|send|recv)\b.*$",
            "The step calls what is outside of the program. Expected none but "
            "all-reduces and all-to-alls.",
        ),
    ]
    for pattern, reason in reasons:
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            raise UnfitForTPUError(f"{reason} Received: {found[0].strip()}")


def _values(types):
    values = []
    for shape in re.findall(r"tensor<([^>]*)>", types):
        *dimensions, dtype = shape.split("x")
        size = 1
        for dimension in dimensions:
            size *= int(dimension)
        values.append(Value(dtype, size))
    return values


def _variable_like(handle):
    """Returns a variable of zeros of the type and shape behind a handle."""
    data = handle_data_util.get_resource_handle_data(handle)
    (content,) = data.shape_and_type
    return tf.Variable(tf.zeros(tf.TensorShape(content.shape), content.dtype))


def _tensors(graph, names):
    return [graph.get_tensor_by_name(_tensor_name(name)) for name in names]


def _tensor_name(name):
    return name if ":" in name else f"{name}:0"
