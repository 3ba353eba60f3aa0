"""State that a wrapper saves itself, and state that it refuses to load.

`saving_test.py` covers files of every format.
"""

import keras
import numpy as np
import pytest

from tests import harness
from tf_adascale.optimizers import saved_state


def saved():
    """Returns four variables, two others, and the store of a save."""
    own = harness.variables([[1.0, 2.0], 3.0, 4.0])
    own.append(keras.Variable(2**40, dtype="int64"))
    others = harness.variables(harness.twos())
    store = {}
    saved_state.save(store, own, others)
    return own, others, store


def test_variables_go_by_their_number_beside_the_shapes_of_others():
    own, others, store = saved()
    assert list(store) == ["0", "1", "2", "3", "shapes"]
    # Of rank 2: 3 and 2; of rank 1: 2.
    assert store["shapes"].tolist() == [2, 3, 2, 1, 2]
    expected = harness.values(own)
    for variable in own:
        variable.assign(0 * variable)
    with harness.untouched(*others):
        saved_state.load(store, own, others, name="adascale")
    harness.assert_close(harness.values(own), expected, atol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"1": None},
        {"1": np.zeros(3)},
        {"4": np.zeros(())},
        {"shapes": None},
        {"shapes": np.array([2, 3, 2])},
    ],
    ids=str,
)
def test_state_of_another_optimizer_is_refused(changed):
    own, others, store = saved()
    store = {k: v for k, v in {**store, **changed}.items() if v is not None}
    with (
        harness.untouched(*own),
        harness.refused("The state saved for `adascale` must be that of the"),
    ):
        saved_state.load(store, own, others, name="adascale")
