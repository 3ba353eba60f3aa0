"""The yolo trainer: boxes, loss, metric, data, and both sizes of the model."""

import contextlib
import io
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from examples.common import training
from examples.common.data import digits as digits_data
from examples.common.data import streams
from examples.yolo import augmentation, boxes, data, loss, metric, model, train
from tests import harness
from tests.examples import full_size, prepared_fixture

# Two heads on an image of 32 pixels: 4 cells with an anchor each, and 1 cell
# with two anchors.
HEADS = (boxes.Head(16, ((8, 8),)), boxes.Head(32, ((16, 16), (32, 16))))
PRIORS = boxes.priors(HEADS, image_size=32)
CLASSES = 3


def row(*box, label=0, weight=1.0, difficult=0):
    return [*box, label, weight, difficult]


def padding():
    return [0.0] * boxes.FIELDS


def _logits(probabilities):
    inner = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return np.log(inner / (1 - inner))


def exact(objects, priors, *, classes, certainty=20.0):
    """Returns raw predictions that are exact for the objects of an image."""
    predictions = np.zeros((1, len(priors.grid), 5 + classes), "float32")
    predictions[..., 4:] = -certainty
    owner = boxes.owners(tf.constant([objects]), priors)[0].numpy()
    for number in np.flatnonzero(owner >= 0):
        found = np.array(objects[owner[number]])
        center = (found[:2] + found[2:4]) / 2
        inside = center * priors.grid[number] - priors.corners[number]
        size = (found[2:4] - found[:2]) / priors.anchors[number]
        predictions[0, number, :2] = _logits(inside)
        predictions[0, number, 2:4] = np.log(size)
        predictions[0, number, 4] = certainty
        predictions[0, number, 5 + int(found[4])] = certainty
    return predictions


class TestBoxes:
    def test_sizes_of_the_full_model(self):
        # 3 (52^2 + 26^2 + 13^2)
        priors = boxes.priors(model.FULL.heads, image_size=416)
        assert len(priors.grid) == 10_647

    @pytest.mark.parametrize(
        "box, owner",
        [
            # The anchors have 8, 16 and 32 x 16 pixels. The first one owns a
            # square of 8 pixels, in the cell of its center.
            ((0.0, 0.0, 0.25, 0.25), 0),
            ((0.0, 0.75, 0.25, 1.0), 1),
            ((0.75, 0.0, 1.0, 0.25), 2),
            # A square of 16 pixels, and 16 high by 32 wide.
            ((0.25, 0.25, 0.75, 0.75), 4),
            ((0.25, 0.0, 0.75, 1.0), 5),
        ],
    )
    def test_owner_has_the_shape_and_the_cell(self, box, owner):
        objects = tf.constant([[padding(), row(*box), padding()]])
        owners = boxes.owners(objects, PRIORS)[0].numpy()
        assert owners[owner] == 1
        assert np.all(np.delete(owners, owner) == -1)

    def test_the_last_of_several_objects_is_owned(self):
        objects = [row(0.0, 0.0, 0.25, 0.25), row(0.1, 0.1, 0.3, 0.3)]
        assert boxes.owners(tf.constant([objects]), PRIORS)[0, 0] == 1

    def test_a_center_on_the_border_has_a_cell(self):
        objects = tf.constant([[row(1 - 1e-8, 1 - 1e-8, 1.0, 1.0)]])
        assert tf.reduce_max(boxes.owners(objects, PRIORS)) == 0

    def test_decoding_undoes_encoding(self):
        objects = [
            row(0.05, 0.1, 0.35, 0.3, label=2),
            row(0.2, 0.1, 0.9, 0.95, label=1),
            padding(),
        ]
        found, scores, labels, counts = boxes.detections(
            exact(objects, PRIORS, classes=CLASSES),
            PRIORS,
            threshold=0.5,
            overlap=0.5,
            count=4,
        )
        assert counts.numpy().tolist() == [2]
        order = np.argsort(labels[0, :2].numpy())
        np.testing.assert_allclose(scores[0, :2], 1, atol=1e-6)
        np.testing.assert_allclose(
            found[0].numpy()[order],
            [objects[1][:4], objects[0][:4]],
            atol=1e-6,
        )

    def test_only_boxes_of_one_class_suppress_each_other(self):
        predictions = np.full((1, 6, 5 + CLASSES), -20.0, "float32")
        predictions[0, 4:6, :4] = 0
        predictions[0, 4:6, 2:4] = np.log(0.5 / PRIORS.anchors[4:6])
        predictions[0, 4, 4:6] = 20.0, 20.0  # Class 0.
        predictions[0, 5, 4:6] = 20.0, 3.0

        def count():
            *_, counts = boxes.detections(
                predictions, PRIORS, threshold=0.5, overlap=0.5, count=4
            )
            return int(counts[0])

        assert count() == 1
        predictions[0, 5, 5:7] = -20.0, 3.0  # Class 1.
        assert count() == 2

    def test_a_wild_prediction_is_finite(self):
        wild = tf.constant([[[0.0, 0.0, 1e4, 1e4]] * 6])
        assert np.all(np.isfinite(boxes.decoded(wild, PRIORS)))


class TestLoss:
    loss = loss.Loss(HEADS, image_size=32)

    def test_closed_form(self):
        # An object at the center of the second head's cell, with the shape of
        # its first anchor. With t = 0 each logit is 0, and each side is exact.
        objects = tf.constant([[row(0.25, 0.25, 0.75, 0.75, label=1)]])
        value = self.loss(objects, tf.zeros((1, 6, 5 + CLASSES)))
        # Center: the cross entropy of 1/2 and 1/2 is log 2, twice, times
        # 2 - 0.5 * 0.5. Classes: 3 log 2. Presence: (1/2)^2 log 2 for the owner
        # and for each prediction that overlaps the object by at most 1/2. Those
        # are the 4 of the first head, with sides of 1/4, which share a corner
        # of 1/8 x 1/8, and the anchor twice as wide, which shares 1/2.
        expected = 2 * 1.75 + 3 + (1 + 4 + 1) / 4
        np.testing.assert_allclose(value, expected * math.log(2), rtol=1e-6)

    def test_size_by_the_absolute_error_of_logarithms(self):
        objects = tf.constant([[row(0.25, 0.25, 0.75, 0.75)]])
        predictions = np.zeros((1, 6, 5 + CLASSES), "float32")
        before = self.loss(objects, predictions)
        predictions[0, 4, 2] = 0.1
        # (2 - 0.25) |0 - 0.1|
        np.testing.assert_allclose(
            self.loss(objects, predictions) - before, 0.175, rtol=1e-4
        )

    def test_exact_predictions_cost_only_the_label_smoothing(self):
        objects = [row(0.25, 0.25, 0.75, 0.75, label=1)]
        certain = exact(objects, PRIORS, classes=CLASSES)
        certain[..., 5:] = 0
        smoothing = loss.LABEL_SMOOTHING
        # The minimum is at the targets, 1 - e and e / 2.
        targets = np.array([smoothing / 2, 1 - smoothing, smoothing / 2])
        certain[0, 4, 5:] = np.log(targets / (1 - targets))
        entropy = -np.sum(
            targets * np.log(targets) + (1 - targets) * np.log(1 - targets)
        )
        np.testing.assert_allclose(
            self.loss(tf.constant([objects]), certain),
            entropy + 2 * 1.75 * math.log(2),  # The second is of the center.
            rtol=1e-5,
        )

    def test_an_object_counts_by_its_weight(self):
        box = (0.25, 0.25, 0.75, 0.75)
        predictions = tf.random.stateless_normal((1, 6, 5 + CLASSES), (0, 1))
        # The other predictions are certain, so they have no loss.
        others = tf.one_hot([4] * 6, 5 + CLASSES) * -50.0
        is_owner = tf.one_hot(4, 6)[:, tf.newaxis]
        predictions = is_owner * predictions + (1 - is_owner) * others
        whole, half = (
            self.loss(tf.constant([[row(*box, weight=w)]]), predictions)
            for w in (1.0, 0.5)
        )
        np.testing.assert_allclose(half, whole / 2, rtol=1e-6)

    def test_a_good_box_that_is_not_the_owner_is_not_penalized(self):
        objects = tf.constant([[row(0.25, 0.25, 0.75, 0.75)]])
        predictions = np.zeros((1, 6, 5 + CLASSES), "float32")
        predictions[0, 5, 2:4] = np.log([1.0, 0.5])  # The same box.
        before = self.loss(objects, predictions)
        predictions[0, 5, 4] = 5.0
        np.testing.assert_allclose(self.loss(objects, predictions), before)

    def test_images_without_objects_have_finite_gradients(self):
        objects = tf.constant([[padding(), padding()]])
        predictions = tf.Variable(tf.zeros((1, 6, 5 + CLASSES)))
        with tf.GradientTape() as tape:
            value = self.loss(objects, predictions)
        # (1/2)^2 log 2 for each of 6.
        np.testing.assert_allclose(value, 1.5 * math.log(2), rtol=1e-6)
        gradient = tape.gradient(value, predictions)
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient.numpy()[..., 5:] == 0)

    def test_config_round_trip(self):
        config = json.loads(json.dumps(self.loss.get_config()))
        again = loss.Loss.from_config(config)
        objects = tf.constant([[row(0.25, 0.25, 0.75, 0.75)]])
        zeros = tf.zeros((1, 6, 5 + CLASSES))
        assert float(again(objects, zeros)) == float(self.loss(objects, zeros))


def detected(*found):
    """Returns the detections (box, score, label) of an image."""
    return metric.Detections(
        np.array([box for box, _, _ in found]).reshape(-1, 4),
        np.array([score for _, score, _ in found]),
        np.array([label for _, _, label in found]),
    )


def rows_of(*objects):
    return np.array(objects).reshape(-1, boxes.FIELDS)


LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)


class TestMetric:
    @pytest.mark.parametrize(
        "found, objects, expected",
        [
            ([(LEFT, 0.9, 0)], [row(*LEFT)], 1),
            ([], [row(*LEFT)], 0),
            ([(LEFT, 0.9, 1)], [row(*LEFT)], 0),
            # An overlap of 0.5 is enough, less is not.
            ([((0, 0, 0.5, 0.5), 0.9, 0)], [row(*LEFT)], 1),
            ([((0, 0, 0.49, 0.5), 0.9, 0)], [row(*LEFT)], 0),
            # One of two at precision 1: recalls 0 to 0.5.
            ([(LEFT, 0.9, 0)], [row(*LEFT), row(*RIGHT)], 6 / 11),
            # A false one first: precision 1/2 at all recalls.
            ([(RIGHT, 0.9, 0), (LEFT, 0.8, 0)], [row(*LEFT)], 1 / 2),
            # The second detection of an object is false, but comes last.
            ([(LEFT, 0.9, 0), (LEFT, 0.8, 0)], [row(*LEFT)], 1),
            # Found, false, found: 1 at 0 to 0.5, 2/3 at 0.6 to 1.
            (
                [(LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0)],
                [row(*LEFT), row(*RIGHT)],
                (6 + 5 * 2 / 3) / 11,
            ),
            # Difficult objects are ignored, any number of times.
            (
                [(RIGHT, 0.9, 0), (RIGHT, 0.8, 0), (LEFT, 0.7, 0)],
                [row(*LEFT), row(*RIGHT, difficult=1)],
                1,
            ),
            ([], [row(*LEFT, difficult=1)], 0),
            # The mean over classes that have objects.
            (
                [(LEFT, 0.9, 0), (LEFT, 0.9, 2)],
                [row(*LEFT), row(*RIGHT, label=1)],
                1 / 2,
            ),
            # Padding is not an object.
            ([(LEFT, 0.9, 0)], [row(*LEFT), padding()], 1),
        ],
    )
    def test_closed_forms(self, found, objects, expected):
        value = metric.mean_average_precision(
            [detected(*found)], [rows_of(*objects)]
        )
        assert value == pytest.approx(expected, abs=1e-12)

    def test_scores_are_compared_over_images(self):
        # A false detection in another image comes first.
        value = metric.mean_average_precision(
            [detected((LEFT, 0.5, 0)), detected((LEFT, 0.6, 0))],
            [rows_of(row(*LEFT)), rows_of()],
        )
        assert value == 1 / 2

    @pytest.mark.parametrize("seed", range(5))
    def test_is_cocos_where_objects_are_apart(self, seed):
        # The two definitions agree if objects do not overlap.
        generator = np.random.default_rng(seed)
        detections, objects = [], []
        for _ in range(20):
            corners = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)]
            rows, found = [], []
            for corner in corners[: generator.integers(1, 5)]:
                box = np.add([*corner, *corner], (0.05, 0.05, 0.45, 0.45))
                rows.append(row(*box, label=generator.integers(CLASSES)))
                for _ in range(generator.integers(3)):
                    moved = box + generator.normal(scale=0.05, size=4)
                    label = rows[-1][boxes.LABEL]
                    if generator.random() < 0.3:
                        label = generator.integers(CLASSES)
                    found.append((moved, generator.random(), label))
            detections.append(detected(*found))
            objects.append(rows_of(*rows))
        value = metric.mean_average_precision(detections, objects)
        assert 0.1 < value < 0.9
        assert value == pytest.approx(coco(detections, objects), abs=1e-6)


def coco(detections, objects):
    """Returns pycocotools' mean average precision at 0.5 and 11 recalls."""

    def corners_to_sides(box):
        ymin, xmin, ymax, xmax = (float(value) for value in box)
        return [xmin, ymin, xmax - xmin, ymax - ymin]

    truth, found = [], []
    for image, (guesses, rows) in enumerate(zip(detections, objects)):
        for values in rows:
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image,
                    "category_id": int(values[boxes.LABEL]),
                    "bbox": corners_to_sides(values[boxes.BOX]),
                    "area": 1.0,
                    "iscrowd": 0,
                }
            )
        for box, score, label in zip(*guesses):
            found.append(
                {
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": corners_to_sides(box),
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(objects))],
            "categories": [{"id": label} for label in range(CLASSES)],
            "annotations": truth,
        }
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(found), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        # A little less: 3 / 10 is below linspace's 0.30000000000000004.
        evaluation.params.recThrs = np.linspace(0, 1, 11) - 1e-12
        evaluation.params.maxDets = [1000]
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    return np.mean(precision[precision > -1])


def pixels(height, width):
    """Returns an image of random colors."""
    return np.random.default_rng(0).integers(
        256, size=(1, height, width, 3), dtype="uint8"
    )


class TestAugmentation:
    draws = tf.random.stateless_uniform((1000, 5), (0, 1))
    # 0.1 from the upper and left border, 0.2 wide, 0.4 high.
    objects = tf.constant([[row(0.1, 0.1, 0.5, 0.3, label=7)]])

    def views(self, images, window, *, size=16):
        return augmentation.views(
            tf.constant(images),
            self.objects,
            tf.constant([window], tf.float32),
            size=size,
        )

    def test_the_whole_image_stays(self):
        images = pixels(16, 16)
        shown, objects = self.views(images, augmentation.WHOLE)
        np.testing.assert_allclose(shown, images / 255, atol=1e-5)
        np.testing.assert_array_equal(objects, self.objects)

    def test_mirrored(self):
        images = pixels(16, 16)
        shown, objects = self.views(images, (0.0, 1.0, 1.0, 0.0))
        np.testing.assert_allclose(shown, images[:, :, ::-1] / 255, atol=1e-5)
        np.testing.assert_allclose(objects[0, 0, :4], [0.1, 0.7, 0.5, 0.9])

    def test_a_crop_shows_its_pixels(self):
        images = pixels(32, 24)
        # Rows 8 to 24, columns 4 to 20.
        window = (8 / 32, 4 / 24, 24 / 32, 20 / 24)
        shown, objects = self.views(images, window)
        np.testing.assert_allclose(
            shown, images[:, 8:24, 4:20] / 255, atol=1e-4
        )
        # (0.1 - 1/4) / (1/2) is clipped to 0; (0.5 - 1/4) / (1/2) = 1/2;
        # (0.1 - 1/6) / (2/3) is clipped to 0; (0.3 - 1/6) / (2/3) = 1/5.
        np.testing.assert_allclose(
            objects[0, 0], row(0, 0, 0.5, 0.2, label=7), atol=1e-6
        )

    def test_outside_is_grey(self):
        shown, objects = self.views(
            np.full((1, 16, 16, 3), 255, "uint8"), (-1.0, -1.0, 1.0, 1.0)
        )
        np.testing.assert_allclose(shown[:, 8:, 8:], 1, atol=1e-6)
        np.testing.assert_allclose(shown[:, :8], 0.5, atol=1e-6)
        np.testing.assert_allclose(objects[0, 0, :4], [0.55, 0.55, 0.75, 0.65])

    def test_an_object_outside_is_padding(self):
        _, objects = self.views(pixels(16, 16), (0.31, 0.0, 1.0, 1.0))
        np.testing.assert_array_equal(objects, [[padding()]])

    def test_windows_vary_within_the_limits(self):
        variety = augmentation.Variety(2, 1.5, mirrored=True, mixed=0)
        windows = augmentation.windows(self.draws, variety).numpy()
        height = windows[:, 2] - windows[:, 0]
        width = windows[:, 3] - windows[:, 1]
        np.testing.assert_allclose(np.mean(width < 0), 0.5, atol=0.05)
        width = abs(width)
        assert np.all(np.sqrt(height * width) < 2.001)
        assert np.all(np.sqrt(height * width) > 0.499)
        assert np.all(abs(np.log(height / width)) < np.log(1.501))
        # A view within the image, or the image within the view.
        is_part = height < 1
        inside = (windows[:, 0] > -1e-6) & (windows[:, 2] < 1 + 1e-6)
        around = (windows[:, 0] < 1e-6) & (windows[:, 2] > 1 - 1e-6)
        assert np.all(np.where(is_part, inside, around))
        assert 0.4 < is_part.mean() < 0.6

    def test_jitter_stays_in_range(self):
        images = tf.constant(pixels(8, 8) / 255, tf.float32)
        same = augmentation.jittered(images, tf.constant([[0.5, 0.5]]))
        np.testing.assert_allclose(same, images, atol=1e-6)
        bright = augmentation.jittered(images, tf.constant([[0.5, 1.0]]))
        np.testing.assert_allclose(
            bright, np.minimum(images + 0.1, 1), atol=1e-6
        )

    def mixed(self, draws, *, share=1.0):
        count = len(draws)
        ones = tf.ones((count, 2, 2, 3))
        objects = tf.tile(self.objects, (count, 1, 1))
        return augmentation.mixed(
            ones, objects, 0 * ones, objects, draws, share=share
        )

    def test_mixing_weights_have_the_beta_distribution(self):
        images, _ = self.mixed(self.draws[:, :3])
        weights = images[:, 0, 0, 0].numpy()
        # The 1000 draws are fixed, and so is the p-value.
        assert stats.kstest(weights, stats.beta(1.5, 1.5).cdf).pvalue > 0.1

    def test_objects_have_the_weights_of_their_images(self):
        images, objects = self.mixed(self.draws[:2, :3])
        weight = images[:, 0, 0, 0]
        np.testing.assert_array_equal(objects[:, 0, boxes.WEIGHT], weight)
        np.testing.assert_array_equal(objects[:, 1, boxes.WEIGHT], 1 - weight)
        for number in range(2):
            np.testing.assert_array_equal(
                objects[:, number, :5], [self.objects[0, 0, :5]] * 2
            )

    def test_part_of_the_images_is_mixed(self):
        images, objects = self.mixed(self.draws[:, :3], share=0.25)
        is_whole = images[:, 0, 0, 0].numpy() == 1
        np.testing.assert_allclose(is_whole.mean(), 0.75, atol=0.04)
        # The objects of the second image are padding.
        assert np.all(objects[:, 1, boxes.WEIGHT].numpy()[is_whole] == 0)


def pairs(dataset, count):
    return [
        tuple(value.numpy() for value in batch) for batch in dataset.take(count)
    ]


@pytest.fixture
def few_images(monkeypatch):
    """Makes fewer scenes."""
    monkeypatch.setattr(data, "TRAIN_IMAGES", 256)
    monkeypatch.setattr(data, "TEST_IMAGES", 100)


@pytest.mark.usefixtures("few_images")
class TestDigits:
    def test_scenes(self):
        train_split, _ = digits_data.splits()
        photo = np.zeros((70, 80, 3), "uint8")
        images, objects = data.pasted(train_split, photo, count=64, seed=0)
        counts = np.sum(objects[..., boxes.WEIGHT], axis=1)
        assert set(counts) == {1, 2, 3}
        for image, rows in zip(images, objects):
            rows = rows[rows[:, boxes.WEIGHT] > 0]
            # On black, a pixel is ink * tint, and tints are 160 to 255.
            has_ink = image.max(axis=-1) > data.INK * 255
            for top, left, bottom, right in np.rint(rows[:, :4] * 64):
                part = np.s_[int(top) : int(bottom), int(left) : int(right)]
                has_ink[part] = False
                inked = image[part].max(axis=-1) >= data.INK * 160 - 1
                assert inked[[0, -1]].any(axis=1).all()
                assert inked[:, [0, -1]].any(axis=0).all()
            assert not has_ink.any()  # Outside the boxes.

    def test_batches_depend_on_seed_and_start_only(self):
        source = data.digits()
        whole = pairs(source.train_dataset(8, seed=3), 3)
        later = pairs(source.train_dataset(8, seed=3, start=16), 1)
        np.testing.assert_array_equal(later[0][0], whole[2][0])
        large = pairs(source.train_dataset(24, seed=3), 1)
        for part in range(2):
            np.testing.assert_array_equal(
                large[0][part], np.concatenate([batch[part] for batch in whole])
            )
        other = pairs(source.train_dataset(8, seed=4), 1)
        assert np.any(other[0][0] != whole[0][0])

    def test_workers_share_a_batch(self):
        source = data.digits()
        ((whole, _),) = pairs(source.train_dataset(8, seed=3), 1)
        for index in range(2):
            share = streams.Share(index, 2, rows=4)
            ((part, _),) = pairs(
                source.train_dataset(8, seed=3, share=share), 1
            )
            # Vector instructions depend on the size of a batch.
            np.testing.assert_allclose(part, whole[4 * index :][:4], atol=1e-5)

    def test_a_batch(self):
        ((images, objects),) = pairs(data.digits().train_dataset(16, seed=0), 1)
        assert images.shape == (16, 64, 64, 3)
        assert images.min() >= 0
        assert images.max() <= 1
        assert objects.shape == (16, 6, boxes.FIELDS)
        # Some are mixed, some are not.
        weights = objects[..., boxes.WEIGHT]
        assert np.any((weights > 0) & (weights < 1))
        assert np.any(weights == 1)

    def test_test_batches_are_in_order_and_whole(self):
        dataset = data.digits().test_dataset(30)
        sizes = [len(images) for images, _ in dataset]
        assert sizes == [30, 30, 30, 10]


def photo(number, *, height=40, width=50, box=(0.1, 0.1, 0.5, 0.5)):
    """Returns the key and the example of a photo with a box."""
    image = np.random.default_rng(number).integers(
        256, size=(height, width, 3), dtype="uint8"
    )
    label = number % 20
    return number, {
        "image": image,
        "image/filename": f"{number}.jpg",
        "objects": [
            {
                "label": label,
                "bbox": tfds.features.BBox(*box),
                "pose": 0,
                "is_truncated": False,
                "is_difficult": number % 2 == 1,
            }
        ],
        "labels": [label],
        "labels_no_difficult": [label],
    }


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A directory with a tiny voc/2007 and voc/2012."""
    directory = tmp_path_factory.mktemp("voc")
    broken = photo(3)
    broken[1]["image"] = b"\xff\xd8\xff no JPEG"
    prepared_fixture.prepare(
        "voc/2007",
        directory,
        {
            "train": [photo(0), photo(1, height=70), photo(2)],
            "validation": [broken, photo(4, box=(0.5, 0.5, 0.5, 0.9))],
            "test": [photo(5), photo(6, width=90)],
        },
    )
    prepared_fixture.prepare(
        "voc/2012",
        directory,
        {"train": [photo(7)], "validation": [photo(8), photo(9)]},
    )
    return str(directory)


@pytest.fixture
def warnings_logged(monkeypatch):
    messages = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: messages.append(text % args)
    )
    return messages


class TestVoc:
    def test_trains_on_both_years(self, voc):
        source = data.voc(image_size=32, data_dir=voc)
        ((_, objects),) = pairs(source.train_dataset(40, seed=0), 1)
        rows = objects.reshape(-1, boxes.FIELDS)
        labels = rows[rows[:, boxes.WEIGHT] > 0, boxes.LABEL]
        # All but 3, which does not decode, and 4, which has no area. Difficult
        # objects are included.
        assert set(labels) == {0, 1, 2, 7, 8, 9}

    def test_tests_on_whole_images(self, voc):
        source = data.voc(image_size=32, data_dir=voc)
        ((images, objects),) = pairs(source.test_dataset(4), 1)
        assert images.shape == (2, 32, 32, 3)
        assert np.all(objects[:, 1:] == 0)
        # In the order in which they are stored.
        order = np.argsort(objects[:, 0, boxes.LABEL])
        np.testing.assert_allclose(
            objects[order, 0],
            [
                row(0.1, 0.1, 0.5, 0.5, label=5, difficult=1),
                row(0.1, 0.1, 0.5, 0.5, label=6),
            ],
            rtol=1e-6,
        )

    def test_validation_leaves_the_test_split_alone(self, voc):
        source = data.voc(image_size=32, data_dir=voc, split="validation")
        ((_, objects),) = pairs(source.train_dataset(40, seed=0), 1)
        rows = objects.reshape(-1, boxes.FIELDS)
        labels = rows[rows[:, boxes.WEIGHT] > 0, boxes.LABEL]
        assert set(labels) == {0, 1, 2, 7}
        ((_, objects),) = pairs(source.test_dataset(4), 1)
        assert len(objects) == 1  # Of two, one does not decode.

    def test_dropped_records_are_logged(self, voc, warnings_logged):
        source = data.voc(image_size=32, data_dir=voc, split="validation")
        pairs(source.test_dataset(4), 1)
        assert warnings_logged == [
            "1 of 2 records dropped so far: image does not decode",
            "1 of 1 records dropped so far: box without area, or too many "
            "boxes in its image",
        ]

    def test_boxes_are_clipped_dropped_and_padded(self):
        box = [
            [-0.5, 0.2, 0.4, 1.5],  # Partly outside.
            [0.2, 1.1, 0.8, 1.2],  # Outside.
            [0.5, 0.5, 0.5, 0.9],  # Without height.
            [0.1, 0.1, np.nan, 0.9],
            [0.1, 0.1, 0.2, 0.2],
            [0.1, 0.1, 0.2, 0.2],  # More than `count`.
        ]
        objects, dropped = data.padded(
            tf.constant(box),
            tf.range(6),
            tf.constant([True] + [False] * 5),
            count=2,
        )
        np.testing.assert_array_equal(
            objects,
            np.array(
                [
                    row(0.0, 0.2, 0.4, 1.0, label=0, difficult=1),
                    row(0.1, 0.1, 0.2, 0.2, label=4),
                ],
                "float32",
            ),
        )
        assert dropped == 4

    def test_full_size_fits_its_data(self, voc, monkeypatch):
        stages = tuple((filters, 1) for filters, _ in model.FULL.stages)
        shallow = model.FULL._replace(stages=stages, pairs=1)
        monkeypatch.setattr(model, "FULL", shallow)
        task = train.task(data="tfds", data_dir=voc, image_size=64)
        full_size.model_that_fits(task, 2)

    def test_unprepared(self, tmp_path):
        source = data.voc(image_size=32, data_dir=str(tmp_path))
        with harness.refused(
            "`data_dir` must contain the prepared dataset voc/2007."
        ):
            source.train_dataset(4, seed=0)


# The miniature with few filters and blocks.
SMALL = model.MINIATURE._replace(
    stem=(4, 2), stages=((4, 1), (8, 1), (8, 1)), pairs=0
)


def parameters(built):
    return sum(math.prod(value.shape) for value in built.trainable_variables)


class TestModel:
    def test_parameters_of_the_full_model(self):
        # With the 80 classes of COCO, keras-yolo3 reports 61,949,149 trainable
        # parameters. 60 classes fewer are 3 * 60 filters fewer in each head,
        # of 1024, 512 and 256 weights and a bias: 180 * 1795 = 323,100.
        with full_size.not_initialized():
            full = model.yolo(model.FULL._replace(image_size=32))
        assert parameters(full) == 61_949_149 - 323_100
        # Darknet-53 has 41,609,928 with its classifier of 1000 classes, each
        # with 1024 weights and a bias: 1,025,000.
        assert parameters(full.get_layer("darknet")) == 41_609_928 - 1_025_000

    def test_details_of_the_paper(self):
        small = model.yolo(model.MINIATURE)
        found = [*small.layers, *small.get_layer("darknet").layers]
        norms = [
            layer
            for layer in found
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        assert {layer.momentum for layer in norms} == {0.9}
        slopes = {
            layer.negative_slope
            for layer in found
            if isinstance(layer, keras.layers.LeakyReLU)
        }
        assert slopes == {0.1}
        # 5e-4 / 2 |w|^2, whose gradient is 5e-4 w.
        kernels = [layer.kernel for layer in found if hasattr(layer, "kernel")]
        np.testing.assert_allclose(
            sum(small.losses),
            sum(2.5e-4 * np.sum(kernel.numpy() ** 2) for kernel in kernels),
            rtol=1e-5,
        )

    def test_starts_from_few_objects(self):
        small = model.yolo(model.MINIATURE)
        predictions = small(tf.zeros((1, 64, 64, 3)))
        assert predictions.shape == (1, 2 * (64 + 16), 15)
        # Only the biases count for a black image.
        np.testing.assert_allclose(
            tf.sigmoid(predictions[..., 4]), 0.01, rtol=1e-4
        )

    def test_backbone_weights(self, tmp_path):
        path = str(tmp_path / "backbone.weights.h5")
        backbone = model.darknet(SMALL)
        backbone.save_weights(path)
        loaded = model.yolo(SMALL, backbone_weights=path)
        for found, expected in zip(
            loaded.get_layer("darknet").weights, backbone.weights
        ):
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("name", ["none.weights.h5", "weights.npz"])
    def test_no_weights(self, tmp_path, name):
        path = str(tmp_path / name)
        with harness.refused(
            "`backbone_weights` must be a .weights.h5 file",
            f"backbone_weights={path!r}",
        ):
            model.yolo(SMALL, backbone_weights=path)

    def test_other_weights(self, tmp_path):
        path = tmp_path / "other.weights.h5"
        refusal = (
            "`backbone_weights` must be a .weights.h5 file",
            f"backbone_weights={str(path)!r}, with the error: ",
        )
        path.write_bytes(b"not HDF5")
        with harness.refused(*refusal):
            model.yolo(SMALL, backbone_weights=str(path))
        wider = SMALL._replace(stem=(6, 2))
        model.darknet(wider).save_weights(path, overwrite=True)
        with harness.refused(*refusal):
            model.yolo(SMALL, backbone_weights=str(path))

    @pytest.mark.parametrize("change", [{"image_size": 72}, {"stem": (4, 1)}])
    def test_heads_that_do_not_fit(self, change):
        with harness.refused(
            "`size` must have heads of strides", "strides=[8, 16], image_size="
        ):
            model.yolo(SMALL._replace(**change))


@pytest.mark.usefixtures("few_images")
class TestTrain:
    def test_the_papers_schedule(self):
        schedule = train.task(data="tfds").schedule(207_000)
        steps = (0, 160_000, 160_001, 180_000, 180_001)
        np.testing.assert_allclose(
            [float(schedule(step)) for step in steps],
            [2.5e-4, 2.5e-4, 2.5e-5, 2.5e-5, 2.5e-6],
        )
        assert train.task(data="tfds").total_steps == 207_000

    def test_the_miniature_trains_at_a_scale(self, tmp_path, monkeypatch):
        monkeypatch.setattr(model, "MINIATURE", SMALL)
        result = training.run(
            train.task(split="validation"),
            training.Settings(
                algorithm="adascale",
                scale=2,
                total_steps=2,
                smoke=True,
                model_dir=str(tmp_path),
            ),
        )
        assert result.iterations <= 2
        assert result.metric == "map"

    def test_evaluation_finds_what_the_model_does(self):
        task = train.task()
        images, objects = next(iter(task.test_dataset(8)))
        size = model.MINIATURE
        priors = boxes.priors(size.heads, image_size=size.image_size)
        answers = np.concatenate(
            [exact(rows, priors, classes=10) for rows in objects.numpy()]
        )
        dataset = tf.data.Dataset.from_tensors((images, objects))
        assert task.evaluate(lambda x, training: answers, dataset) == {
            "map": 1.0
        }
        # Without the last image's detections.
        answers[-1, :, 4] = -20
        assert (
            0.5 < task.evaluate(lambda x, training: answers, dataset)["map"] < 1
        )
