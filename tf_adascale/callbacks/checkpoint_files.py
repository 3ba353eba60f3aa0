"""A run's checkpoints on disk: the last two, of which at least one is whole.

TensorFlow writes a checkpoint's index last, so a process that is killed while
it writes leaves no index. Every block has a checksum, so later damage is
detected when the checkpoint is read.
"""

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Sequence

import tensorflow as tf

KEEP = 2

_INDEX = re.compile(r"ckpt-(\d+)\.index")
# All files of a checkpoint, also of one that a killed process or a full disk
# left unfinished.
_ANY_FILE = re.compile(
    r"(ckpt-\d+)(_temp|(\.index|\.data-\d+-of-\d+)(\.tempstate\d+)?)"
)
_SIGNATURE = "signature/.ATTRIBUTES/py_state"

# TensorFlow raises an IndexError for a file that is too short.
_UNREADABLE = (tf.errors.OpError, IndexError)
_UNWRITABLE = (tf.errors.OpError, OSError)


class Checkpoints:
    """Saves variables to a directory and restores the newest whole checkpoint.

    Args:
        directory: path of the directory. `save` creates it.
        kind: string that names what the variables belong to. Checkpoints of
            another kind are refused.
        **variables: `tf.Variable`s, or lists of them.

    Example:

    >>> import tempfile
    >>> directory, variable = tempfile.mkdtemp(), tf.Variable(1.0)
    >>> Checkpoints(directory, kind="", variable=variable).save()
    >>> restored = tf.Variable(0.0)
    >>> path = Checkpoints(directory, kind="", variable=restored).restore()
    >>> float(restored)
    1.0
    """

    def __init__(
        self,
        directory: str,
        *,
        kind: str,
        **variables: tf.Variable | Sequence[tf.Variable],
    ):
        self.directory = directory
        self._signature = _Signature(kind, variables)
        self._checkpoint = tf.train.Checkpoint(
            signature=self._signature, **variables
        )
        self._damaged = set()

    def restore(self) -> str | None:
        """Restores the newest checkpoint that can be read.

        A RuntimeWarning names each checkpoint that cannot be read.

        Returns:
            String, the checkpoint's path without a suffix. None if there is no
            checkpoint.

        Raises:
            ValueError: if there are checkpoints but none can be read, or if
                they hold other variables. No variable has changed then.
        """
        paths = self._paths()
        for path in paths:
            try:
                self._check_signature(path)
                self._checkpoint.read(path).assert_existing_objects_matched()
                return path
            except _UNREADABLE as error:
                self._damaged.add(path)
                warnings.warn(
                    f"The checkpoint {path} cannot be read and is skipped: "
                    f"{error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if paths:
            raise ValueError(
                "`directory` must hold a checkpoint that can be read, or no "
                "checkpoint. Move the damaged ones away to start over. "
                f"Received: directory={self.directory!r}, with {paths}"
            )
        return None

    def save(self) -> None:
        """Saves a checkpoint, then removes all but the last two.

        If it cannot be saved, for example because the disk is full, a
        RuntimeWarning says so and the last two stay.
        """
        paths = self._paths()
        number = max(map(_number, paths), default=0) + 1
        path = os.path.join(self.directory, f"ckpt-{number}")
        kept = [path for path in paths if path not in self._damaged]
        try:
            self._checkpoint.write(path)
            kept = [path, *kept][:KEEP]
        except _UNWRITABLE as error:
            self._damaged.add(path)
            warnings.warn(
                f"The checkpoint {path} could not be saved; the one before it "
                f"remains the last: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._remove_all_but(kept)

    def _paths(self):
        """Returns the paths of complete checkpoints, newest first."""
        if not tf.io.gfile.isdir(self.directory):
            return []
        indices = [
            os.path.join(self.directory, name)
            for name in tf.io.gfile.listdir(self.directory)
            if _INDEX.fullmatch(name)
        ]
        paths = [index.removesuffix(".index") for index in indices]
        return sorted(paths, key=_number, reverse=True)

    def _check_signature(self, path):
        reader = tf.train.load_checkpoint(path)
        found = []
        if reader.has_tensor(_SIGNATURE):
            found = reader.get_tensor(_SIGNATURE).decode().split("\n")
        pairs = itertools.zip_longest(
            self._signature.lines, found, fillvalue="no such variable"
        )
        for expected, received in pairs:
            if expected != received:
                raise ValueError(
                    "`directory` must hold checkpoints of this model and "
                    "optimizer. Use another directory to start over. Received: "
                    f"path={path!r}, with {received!r} in place of "
                    f"{expected!r}"
                )

    def _remove_all_but(self, paths):
        """Removes other checkpoints, and the files of unfinished ones."""
        kept = {os.path.basename(path) for path in paths}
        names = []
        with contextlib.suppress(*_UNWRITABLE):
            names = tf.io.gfile.listdir(self.directory)
        for name in names:
            found = _ANY_FILE.fullmatch(name.rstrip("/"))
            if not found or found[1] in kept:
                continue
            path = os.path.join(self.directory, found[0])
            # A file that cannot be removed takes up space and does no harm.
            with contextlib.suppress(*_UNWRITABLE):
                if tf.io.gfile.isdir(path):
                    tf.io.gfile.rmtree(path)
                else:
                    tf.io.gfile.remove(path)


class _Signature(tf.train.experimental.PythonState):
    """What a checkpoint must have in common with the variables to restore.

    TensorFlow alone would restore the variables that match and ignore the rest.
    """

    def __init__(self, kind, variables):
        self.lines = [kind]
        for name, group in variables.items():
            self.lines += [
                f"{name}: {variable.dtype.name}, shape {variable.shape}"
                for variable in tf.nest.flatten(group)
            ]

    def serialize(self):
        return "\n".join(self.lines)

    def deserialize(self, string_value):
        pass


def _number(path):
    return int(path.rpartition("-")[2])
