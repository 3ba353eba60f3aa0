"""The files of a run besides its checkpoints, each replaced atomically."""

import csv
import io
import json
import os


def claim(directory, wanted, *, may_change=frozenset(), write=True):
    """Claims a directory for a run, or checks that the run owns it already.

    The settings are stored in run.json.

    Args:
        directory: str.
        wanted: dict, the settings of the run, of JSON types.
        may_change: set of keys that may differ when the run resumes.
        write: bool, whether to write run.json.

    Raises:
        ValueError: if the directory belongs to another run.
    """
    path = os.path.join(directory, "run.json")
    found = None
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
        changed = [
            key
            for key in wanted
            if found.get(key) != wanted[key] and key not in may_change
        ]
        if changed:
            theirs, received = (
                {key: settings.get(key) for key in changed}
                for settings in (found, wanted)
            )
            raise ValueError(
                "`model_dir` must be new or belong to the same run. Use "
                f"{theirs} to resume the one that it belongs to, or another "
                f"directory. Received: {received}, model_dir={directory!r}"
            )
    if write and found != wanted:
        os.makedirs(directory, exist_ok=True)
        write_json(path, wanted)


def drop_rows(log, *, first_epoch):
    """Removes the rows of epochs whose checkpoint was not saved.

    Args:
        log: str, path of a CSV file whose first column is the epoch.
        first_epoch: int, first epoch to remove.
    """
    if not os.path.exists(log):
        return
    with open(log, newline="") as file:
        text = file.read()
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    kept = [
        row
        for row in rows
        # The last row may be truncated.
        if len(row) == len(header) and int(row[0]) < first_epoch
    ]
    new = io.StringIO(newline="")
    csv.writer(new).writerows([header, *kept] if kept else [])
    if new.getvalue() != text:
        write_text(log, new.getvalue())


def write_json(path, values):
    """Writes values as JSON, see `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path, text):
    """Writes a file atomically."""
    with open(f"{path}.new", "w", newline="") as file:
        file.write(text)
    os.replace(f"{path}.new", path)
