"""A run's files beside its checkpoints: whole at any moment, or as before."""

import csv
import io
import json
import os


def claim(directory, wanted, *, may_change=frozenset(), write=True):
    """Makes a directory a run's own, or finds it to be so, by its run.json.

    Args:
        directory: str.
        wanted: dict, what was asked for; of types that JSON has.
        may_change: set of its keys that may be others when the run goes on.
        write: bool, whether to write what was asked for.

    Raises:
        ValueError: if the directory holds another run.
    """
    path = os.path.join(directory, "run.json")
    found = None
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
        changed = {key for key in wanted if found.get(key) != wanted[key]}
        if changed - may_change:
            raise ValueError(
                "The model directory holds another run. Expected the flags of "
                f"that run, {found}, to go on with it, or another model_dir. "
                f"Received: {wanted}, model_dir={directory!r}"
            )
    if write and found != wanted:
        os.makedirs(directory, exist_ok=True)
        write_json(path, wanted)


def drop_rows(log, *, first_epoch):
    """Removes a log's rows from an epoch on: their checkpoint was not saved.

    Args:
        log: str, path of a CSV whose first column is the epoch.
        first_epoch: int.
    """
    if not os.path.exists(log):
        return
    with open(log, newline="") as file:
        text = file.read()
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    kept = [
        row
        for row in rows
        # The last one may have been cut off.
        if len(row) == len(header) and int(row[0]) < first_epoch
    ]
    new = io.StringIO(newline="")
    csv.writer(new).writerows([header, *kept] if kept else [])
    if new.getvalue() != text:
        write_text(log, new.getvalue())


def write_json(path, values):
    """Writes values as JSON; see `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path, text):
    """Writes a file, whole or not at all."""
    with open(f"{path}.new", "w", newline="") as file:
        file.write(text)
    os.replace(f"{path}.new", path)
