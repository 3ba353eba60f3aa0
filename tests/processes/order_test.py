"""Adasum among twelve workers, whose collectives list them in another order.

TensorFlow sorts the names of tasks as strings: 0, 1, 10, 11, 2, and so on.
"""

import numpy as np
import pytest

from tests.processes import children, order_worker

pytestmark = pytest.mark.multiworker


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The output of each worker; they run once for all tests."""

    def make(_):
        with children.cluster(
            order_worker.__file__, count=order_worker.COUNT
        ) as processes:
            return children.results(processes)

    return children.once(tmp_path_factory, "ordered_workers", make)[1]


def tree(rows):
    """Returns the Adasum of rows in float64, walked in their order."""
    nodes = list(np.asarray(rows, "float64"))
    while len(nodes) > 1:
        pairs = list(zip(nodes[::2], nodes[1::2]))
        odd_one = nodes[2 * len(pairs) :]
        nodes = [
            (1 - np.vdot(a, b) / (2 * np.vdot(a, a))) * a
            + (1 - np.vdot(a, b) / (2 * np.vdot(b, b))) * b
            for a, b in pairs
        ] + odd_one
    return nodes[0]


@pytest.mark.parametrize(
    "place, case", list(enumerate(order_worker.CASES)), ids=str
)
def test_the_tree_is_walked_in_the_order_of_replicas(workers, place, case):
    size = case["group_size"]
    for number, rows in enumerate(order_worker.gradients()):
        groups = rows.astype("float64").reshape(-1, size, *rows.shape[1:])
        expected = tree(groups.mean(1))
        # In the order of task names the result is another one.
        sorted_names = sorted(range(len(rows)), key=str)
        groups = rows[sorted_names].astype("float64").reshape(groups.shape)
        assert np.abs(tree(groups.mean(1)) - expected).max() > 0.05
        for worker in workers:
            np.testing.assert_allclose(
                worker[place]["combined"][number], expected, rtol=0, atol=2e-6
            )


def test_overwritten_variables_get_the_largest_value(workers):
    expected = order_worker.next_values().max(0)
    for worker in workers:
        for result in worker:
            np.testing.assert_array_equal(result["overwritten"], expected)
