"""XLA's compiler for TPUs compiles the train steps, for eight chips."""

import re

import pytest
import tensorflow as tf

from tests.tpu import compiler, lowering, programs, stub_strategy

# Programs whose sums the compiler does not merge into one. It leaves the scalar
# of AdamScale separate, and the sums of Adasum depend on one another.
ALL_REDUCES = {
    "AdamScale": 2,
    "Adasum of updates": 4,
    "Adasum of gradients": 3,
    "Adasum, 4 micro-batches": 4,
}

# Calls that the compiler adds. They run on the chip.
OF_THE_CHIP = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
    "X64Combine",
    "X64SplitHigh",
    "X64SplitLow",
}


def flat(lists):
    return sorted(value for values in lists for value in values)


@pytest.mark.parametrize("topology", compiler.TOPOLOGIES)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_compiles(name, topology):
    stablehlo = programs.stablehlo(name)
    compiled = compiler.compiled(stablehlo, topology)
    traced = lowering.all_reduced(stablehlo)
    assert flat(compiled.all_reduced) == flat(traced)
    assert len(compiled.all_reduced) == ALL_REDUCES.get(name, 1)
    assert "replica_groups={{0,1,2,3,4,5,6,7}}" in compiled.text
    assert "f64[" not in compiled.text
    assert "[<=" not in compiled.text  # The bound of a dynamic shape.
    assert not re.search(r" (infeed|outfeed|send|recv)\(", compiled.text)
    targets = re.findall(r'custom_call_target="(.*?)"', compiled.text)
    assert set(targets) <= OF_THE_CHIP


@pytest.mark.parametrize("topology", compiler.TOPOLOGIES)
def test_refuses_what_a_chip_cannot_hold(topology):
    """The compiler knows the memory of the chip."""
    stablehlo = lowering.lowered(
        stub_strategy.tpu_strategy(),
        lambda x: x @ x,
        tf.TensorSpec((2**18, 2**18)),  # 256 GiB.
    )
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        compiler.compiled(stablehlo, topology)
