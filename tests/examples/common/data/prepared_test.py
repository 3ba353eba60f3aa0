"""Prepared datasets: genuine ones, and datasets that are incomplete."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from examples.common.data import prepared
from tests import harness
from tests.examples import prepared_fixture

IMAGE = np.zeros((32, 32, 3), "uint8")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("datasets")
    prepared_fixture.prepare(
        "cifar10",
        directory,
        {
            "train": [
                (i, {"id": str(i), "image": IMAGE, "label": i})
                for i in range(10)
            ],
            "test": [(0, {"id": "0", "image": IMAGE, "label": 3})],
        },
    )
    return directory


def records_of(data_dir):
    (path,) = pathlib.Path(data_dir).glob("cifar10/*/*train.tfrecord*")
    return path


def test_splits_and_slices_are_the_builders(data_dir):
    dataset, size = prepared.load(
        "cifar10", "train[:40%]", data_dir=str(data_dir)
    )
    rest, rest_size = prepared.load(
        "cifar10", "train[40%:]+test", data_dir=str(data_dir)
    )
    assert (size, rest_size) == (4, 7)
    labels = [int(x["label"]) for x in dataset.concatenate(rest)]
    assert len(labels) == 11
    assert sorted(labels) == sorted([*range(10), 3])


def test_the_order_is_that_of_the_files(data_dir):
    orders = [
        [
            int(x["label"])
            for x in prepared.load("cifar10", "train", data_dir=str(data_dir))[
                0
            ]
        ]
        for _ in range(2)
    ]
    assert orders[0] == orders[1]


def test_decoders_leave_images_encoded(data_dir):
    dataset, _ = prepared.load(
        "cifar10",
        "train",
        data_dir=str(data_dir),
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    assert next(iter(dataset))["image"].numpy().startswith(b"\x89PNG")


def test_unprepared_gives_the_command(tmp_path):
    data_dir = f"{tmp_path}/none"
    with harness.refused(
        "`data_dir` must contain the prepared dataset voc/2007. Run: python -m "
        f"examples.common.data.prepared voc/2007 --data_dir={data_dir}. ",
        f"data_dir='{data_dir}/voc",
    ):
        prepared.load("voc/2007", "train", data_dir=data_dir)


def test_unprepared_says_what_to_place_by_hand(tmp_path):
    with pytest.raises(
        ValueError, match=r"first place by hand: two archives\)"
    ):
        prepared.load(
            "imagenet2012",
            "train",
            data_dir=str(tmp_path),
            by_hand="two archives",
        )


def test_unknown_split_names_those_there_are(data_dir):
    with harness.refused(
        "`split` must be made of the splits of cifar10: ['test', 'train']",
        "split='validation'",
    ):
        prepared.load("cifar10", "validation", data_dir=str(data_dir))


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_incomplete_files_are_refused(data_dir, harm):
    path = records_of(data_dir)
    whole = path.read_bytes()
    try:
        if harm == "truncate":
            path.write_bytes(whole[:-100])
        else:
            path.unlink()
        left = len(whole) - 100 if harm == "truncate" else 0
        with harness.refused(
            f"`data_dir` must contain all {len(whole)} bytes of split 'train' "
            "of cifar10. Remove the directory and run: "
            + prepared.command("cifar10"),
            f"bytes={left}",
        ):
            prepared.load("cifar10", "train", data_dir=str(data_dir))
    finally:
        path.write_bytes(whole)


def test_the_command_prepares(tmp_path, monkeypatch, capsys):
    prepared_by = []
    builder = type(tfds.builder("cifar10", data_dir=str(tmp_path)))
    monkeypatch.setattr(
        builder,
        "download_and_prepare",
        lambda self: prepared_by.append(str(self.data_dir)),
    )
    prepared.main(["cifar10", f"--data_dir={tmp_path}"])
    assert len(prepared_by) == 1
    assert prepared_by[0].startswith(f"{tmp_path}/cifar10/")
