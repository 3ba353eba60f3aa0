"""Checkpoints that are damaged, unfinished, foreign or on a full disk."""

import contextlib
import pathlib
import resource
import shutil
import warnings

import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.callbacks import checkpoint_files

INDEX, DATA = "ckpt-2.index", "ckpt-2.data-00000-of-00001"


def objects(number):
    """Returns variables of several types and shapes that hold a number."""
    return {
        "parts": [
            tf.Variable(tf.fill((50, 3), float(number))),
            tf.Variable(number, dtype=tf.int64),
        ],
        "text": tf.Variable(str(number)),
    }


def put(held, number):
    for variable, other in zip(
        tf.nest.flatten(held), tf.nest.flatten(objects(number))
    ):
        variable.assign(other)


def number_in(held):
    """Returns the number that all variables hold."""
    matrix, integer = held["parts"]
    numbers = {*matrix.numpy().ravel().tolist(), int(integer.numpy())}
    (number,) = numbers | {int(held["text"].numpy())}
    return number


def opened(directory, held, kind="kind"):
    return checkpoint_files.Checkpoints(str(directory), kind=kind, **held)


def restored(directory):
    """Returns the number in the newest checkpoint that can be read."""
    held = objects(0)
    opened(directory, held).restore()
    return number_in(held)


def indices(directory):
    return sorted(path.name for path in directory.glob("*.index"))


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("template")
    held = objects(0)
    run = opened(directory, held)
    for number in (1, 2):
        put(held, number)
        run.save()
    return directory


@pytest.fixture
def directory(template, tmp_path):
    """A directory with checkpoints 1 and 2, which hold 1 and 2."""
    return pathlib.Path(shutil.copytree(template, tmp_path / "run"))


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)


def overwrite(path):
    path.write_bytes(b"x" * path.stat().st_size)


def replace_by_a_directory(path):
    path.unlink()
    path.mkdir()
    (path / "file").write_text("in it")


DAMAGES = [empty, truncate, flip, overwrite, replace_by_a_directory]


class TestRestore:
    @pytest.mark.parametrize("exists", [False, True])
    def test_nothing_where_nothing_is(self, exists, tmp_path):
        directory = tmp_path / "run"
        if exists:
            directory.mkdir()
        held = objects(7)
        assert opened(directory, held).restore() is None
        assert number_in(held) == 7
        # Only a save creates the directory.
        assert directory.exists() == exists

    def test_the_newest_by_number(self, tmp_path):
        # As text, "ckpt-10" is before "ckpt-9".
        held = objects(0)
        run = opened(tmp_path, held)
        for number in range(1, 12):
            put(held, number)
            run.save()
        path = opened(tmp_path, held).restore()
        assert path == str(tmp_path / "ckpt-11")
        assert number_in(held) == 11
        # TensorFlow's list of checkpoints is not written.
        assert not (tmp_path / "checkpoint").exists()

    @pytest.mark.parametrize(
        "name, damage",
        [
            *((INDEX, damage) for damage in DAMAGES),
            *((DATA, damage) for damage in DAMAGES),
            (DATA, pathlib.Path.unlink),
        ],
    )
    def test_skips_what_is_damaged(self, name, damage, directory):
        damage(directory / name)
        held = objects(0)
        run = opened(directory, held)
        with pytest.warns() as caught:
            path = run.restore()
        (warning,) = caught
        assert warning.category is RuntimeWarning
        assert warning.filename == __file__
        assert f"{directory / 'ckpt-2'} cannot be read" in str(warning.message)
        assert path == str(directory / "ckpt-1")
        assert number_in(held) == 1

    def test_skips_what_has_no_index(self, directory):
        # A killed save leaves exactly this. No file is damaged.
        (directory / INDEX).unlink()
        assert restored(directory) == 1

    def test_a_wrong_bit_anywhere_is_noticed_or_harmless(self, directory):
        random = np.random.default_rng(0)
        for name in (INDEX, DATA):
            whole = (directory / name).read_bytes()
            seen = []
            for _ in range(30):
                damaged = bytearray(whole)
                damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
                (directory / name).write_bytes(damaged)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    seen.append(restored(directory))
                assert len(caught) == 2 - seen[-1]
            assert set(seen) <= {1, 2}
            assert seen.count(1) > 15
            (directory / name).write_bytes(whole)

    def test_does_not_begin_anew_when_all_are_damaged(self, directory):
        for path in directory.glob("*.data*"):
            flip(path)
        before, held = contents(directory), objects(7)
        run = opened(directory, held)
        with (
            pytest.warns(RuntimeWarning) as caught,
            harness.refused(
                "`directory` must hold a checkpoint that can be read",
                f"directory={str(directory)!r}",
            ),
        ):
            run.restore()
        named = [str(warning.message).split()[2] for warning in caught]
        assert named == [str(directory / name) for name in ("ckpt-2", "ckpt-1")]
        assert number_in(held) == 7
        assert contents(directory) == before


MATRIX, INTEGER = "parts: float32, shape (50, 3)", "parts: int64, shape ()"
TEXT, NONE = "text: string, shape ()", "no such variable"


@pytest.mark.parametrize(
    "change, found, expected",
    [
        ({"more": [7.0]}, NONE, "more: float32, shape ()"),
        ({"parts": [0, 1, 7.0]}, TEXT, "parts: float32, shape ()"),
        ({"text": None}, TEXT, NONE),
        ({"parts": [0]}, INTEGER, TEXT),
        ({"parts": None, "others": [0, 1]}, MATRIX, TEXT),
        (
            {"parts": [tf.zeros((3, 50)), 1]},
            MATRIX,
            "parts: float32, shape (3, 50)",
        ),
        ({"parts": [0, np.int32(7)]}, INTEGER, "parts: int32, shape ()"),
        ({"kind": "another"}, "kind", "another"),
        ({"parts": None, "text": None}, MATRIX, NONE),
    ],
    ids=[
        *("more variables", "a longer list", "fewer variables"),
        *("a shorter list", "other names", "another shape", "another type"),
        *("another kind", "nothing"),
    ],
)
def test_checkpoints_of_other_objects_are_refused(
    change, found, expected, directory
):
    """In `change`, 0 and 1 are indices of old parts. None removes a name."""
    held = objects(7)
    parts = held["parts"]
    kind = change.get("kind", "kind")
    for name, values in change.items():
        if values is None:
            del held[name]
        elif name != "kind":
            held[name] = [
                parts[value] if type(value) is int else tf.Variable(value)
                for value in values
            ]
    before = [variable.numpy() for variable in tf.nest.flatten(held)]
    files = contents(directory)
    with harness.refused(
        "`directory` must hold checkpoints of this model",
        f"path={str(directory / 'ckpt-2')!r}, with {found!r} in place of "
        f"{expected!r}",
    ):
        opened(directory, held, kind).restore()
    # Nothing has changed.
    for value, variable in zip(before, tf.nest.flatten(held)):
        np.testing.assert_array_equal(value, variable.numpy())
    assert contents(directory) == files


def test_checkpoints_without_a_signature_are_refused(tmp_path):
    # tf.train.Checkpoint by itself writes no signature.
    held = objects(1)
    tf.train.Checkpoint(**held).write(str(tmp_path / "ckpt-1"))
    with harness.refused("`directory` must hold checkpoints of this model"):
        opened(tmp_path, held).restore()


@contextlib.contextmanager
def disk_with(free_bytes):
    """Makes writes beyond a file size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def deny(path):
    raise tf.errors.PermissionDeniedError(None, None, path)


class TestSave:
    def next_process(self, directory, number=3):
        """Restores like the next process, and assigns another number."""
        held = objects(0)
        run = opened(directory, held)
        run.restore()
        put(held, number)
        return run, held

    def test_makes_the_directory(self, tmp_path):
        directory = tmp_path / "of" / "runs"
        opened(directory, objects(5)).save()
        assert restored(directory) == 5

    def test_keeps_two(self, directory):
        run, held = self.next_process(directory)
        for number in (3, 4, 5):
            put(held, number)
            run.save()
            assert len(indices(directory)) == 2
        flip(directory / indices(directory)[1].replace("index", DATA[7:]))
        with pytest.warns(RuntimeWarning, match="skipped"):
            assert restored(directory) == 4

    @pytest.mark.parametrize("name", [INDEX, DATA])
    def test_keeps_whole_ones(self, name, directory):
        overwrite(directory / name)
        with pytest.warns(RuntimeWarning, match="skipped"):
            run, _ = self.next_process(directory)
        run.save()
        assert restored(directory) == 3
        # The other checkpoint is whole too.
        newest = indices(directory)[-1]
        assert len(indices(directory)) == 2
        (directory / newest).unlink()
        assert restored(directory) == 1

    def test_removes_what_a_killed_save_left(self, directory):
        parts = directory / "ckpt-5_temp"
        parts.mkdir()
        (parts / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"x")
        (parts / "part-00000-of-00001.index").write_bytes(b"x")
        (directory / "ckpt-7.data-00000-of-00001").write_bytes(b"x")
        run, _ = self.next_process(directory)
        run.save()
        (oldest, newest) = indices(directory)
        names = {path.name for path in directory.iterdir()}
        assert names == {
            *(oldest, newest),
            *(n.replace("index", DATA[7:]) for n in (oldest, newest)),
        }
        assert restored(directory) == 3

    def test_leaves_other_files_alone(self, directory):
        names = {
            *("ckpt-1.keras", "ckpt-2.weights.h5", "ckpt-best.index"),
            *("my-ckpt-1.index", "log.csv", "ckpt-1-pictures"),
        }
        for name in names:
            (directory / name).write_text(name)
        run, _ = self.next_process(directory)
        for _ in range(3):
            run.save()
        assert names <= {path.name for path in directory.iterdir()}

    def test_is_the_newest_though_it_restored_nothing(self, directory):
        # Two objects save to one directory: the later save counts.
        opened(directory, objects(9)).save()
        assert restored(directory) == 9

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_warns_of_a_full_disk_and_survives_it(self, share, directory):
        run, held = self.next_process(directory)
        before = contents(directory)
        largest = max(len(content) for content in before.values())
        with pytest.warns() as caught, disk_with(int(share * largest)):
            run.save()
        (warning,) = caught
        assert warning.category is RuntimeWarning
        assert warning.filename == __file__
        path = directory / "ckpt-3"
        assert f"checkpoint {path} could not be saved" in str(warning.message)
        # No checkpoint is lost, and no partial file stays.
        assert contents(directory) == before
        assert restored(directory) == 2
        # The disk has room again.
        put(held, 4)
        run.save()
        assert restored(directory) == 4
        assert len(indices(directory)) == 2

    @pytest.mark.parametrize("name", ["ckpt-3.index", DATA.replace("2", "3")])
    def test_survives_what_stands_in_the_way(self, name, directory):
        run, held = self.next_process(directory)
        (directory / name).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run.save()
            assert restored(directory) in (2, 3)
        for number in (4, 5):
            put(held, number)
            run.save()
            assert restored(directory) == number
        assert len(indices(directory)) == 2
        assert all(path.is_file() for path in directory.glob("*.index"))

    def test_a_failed_save_never_counts_as_whole(self, directory, monkeypatch):
        run, held = self.next_process(directory)

        def write(checkpoint, path):
            pathlib.Path(f"{path}.index").write_bytes(b"half")
            raise tf.errors.ResourceExhaustedError(None, None, "full")

        with monkeypatch.context() as patch:
            patch.setattr(tf.train.Checkpoint, "write", write)
            patch.setattr(tf.io.gfile, "remove", deny)
            with pytest.warns(RuntimeWarning, match="could not be saved"):
                run.save()
        put(held, 4)
        run.save()
        newest = indices(directory)[-1]
        (directory / newest).unlink()
        # The checkpoint before it is whole.
        assert restored(directory) == 2

    def test_warns_of_a_directory_that_cannot_be(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("here")
        run = opened(path / "run", objects(1))
        assert run.restore() is None
        with pytest.warns(RuntimeWarning, match="could not be saved"):
            run.save()
        assert path.read_text() == "here"

    def test_succeeds_where_an_old_one_cannot_be_removed(
        self, directory, monkeypatch
    ):
        run, _ = self.next_process(directory)
        with monkeypatch.context() as patch:
            patch.setattr(tf.io.gfile, "remove", deny)
            run.save()
        assert restored(directory) == 3
