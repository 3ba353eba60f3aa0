"""The loss of YOLOv3, with focal loss, label smoothing and mixed images."""

import keras
import tensorflow as tf

from examples.yolo import boxes

# A prediction that overlaps some object this well is not told that there is
# none, even if another one is to find it (Redmon & Farhadi 2018, section 2.1).
IGNORED_OVERLAP = 0.5
# Lin et al., "Focal Loss for Dense Object Detection", 2017.
FOCUS = 2.0
# Zhang et al. 2019, section 3.2. The value is that of their code in GluonCV.
LABEL_SMOOTHING = 1 / 40


@keras.saving.register_keras_serializable("yolo")
class Loss(keras.losses.Loss):
    """What predictions miss of an image's objects, summed over predictions.

    For the one prediction that is to find an object, see `boxes.owners`: cross
    entropy of the center within its cell, absolute error of the logarithms of
    the sides, both weighted by 2 - area so that small boxes count more; and
    cross entropy of each class. For all predictions: focal cross entropy of
    there being an object. What belongs to an object counts by its weight, so
    those of a mixed image count by their share in it.

    Args:
        heads: tuple of `boxes.Head`.
        image_size: int, pixels of a side of the images.
        **kwargs: as for `keras.losses.Loss`.

    Called with the objects, float32 of shape (batch, objects, boxes.FIELDS),
    and raw predictions, float32 of shape (batch, predictions, 5 + classes).

    Reference: Redmon & Farhadi, "YOLOv3: An Incremental Improvement", 2018;
        Zhang et al., "Bag of Freebies for Training Object Detection Neural
        Networks", 2019.
    """

    def __init__(self, heads, *, image_size, **kwargs):
        super().__init__(**kwargs)
        # A saved model's heads are lists.
        heads = [boxes.Head(*head) for head in heads]
        self._config = {
            "heads": [list(head) for head in heads],
            "image_size": image_size,
        }
        self._priors = boxes.priors(heads, image_size=image_size)

    def get_config(self):
        """Returns the arguments of the constructor."""
        return {**super().get_config(), **self._config}

    def call(self, y_true, y_pred):
        owner = boxes.owners(y_true, self._priors)
        is_owned = owner >= 0
        own = tf.gather(y_true, tf.maximum(owner, 0), batch_dims=1)
        weight = tf.where(is_owned, own[..., boxes.WEIGHT], 0.0)

        box = self._box_losses(own[..., boxes.BOX], is_owned, y_pred[..., :4])
        classes = _class_losses(own[..., boxes.LABEL], y_pred[..., 5:])
        presence = keras.losses.binary_focal_crossentropy(
            tf.cast(is_owned, tf.float32)[..., tf.newaxis],
            y_pred[..., 4:5],
            gamma=FOCUS,
            from_logits=True,
        )
        judged = tf.where(is_owned, weight, self._is_background(y_true, y_pred))
        return tf.reduce_sum(
            weight * (box + classes) + judged * presence, axis=-1
        )

    def _box_losses(self, box, is_owned, predictions):
        """Returns how far t is from that of the boxes; shape as `is_owned`."""
        corners, grid, anchors = self._priors
        center = (box[..., :2] + box[..., 2:]) / 2
        # Where there is no object, any finite value will do.
        size = tf.where(
            is_owned[..., tf.newaxis], box[..., 2:] - box[..., :2], anchors
        )
        center_losses = tf.nn.sigmoid_cross_entropy_with_logits(
            tf.clip_by_value(center * grid - corners, 0, 1),
            predictions[..., :2],
        )
        size_losses = tf.abs(tf.math.log(size / anchors) - predictions[..., 2:])
        weight = 2 - tf.reduce_prod(size, -1)
        return weight * tf.reduce_sum(center_losses + size_losses, -1)

    def _is_background(self, objects, predictions):
        """Returns 0 where a prediction overlaps an object well, and else 1."""
        decoded = tf.stop_gradient(boxes.decoded(predictions, self._priors))
        overlaps = boxes.overlaps(
            decoded[:, :, tf.newaxis],
            # Padding has no area and overlaps nothing.
            objects[:, tf.newaxis, :, boxes.BOX],
        )
        is_background = tf.reduce_max(overlaps, -1) <= IGNORED_OVERLAP
        return tf.cast(is_background, tf.float32)


def _class_losses(label, logits):
    """Returns the sums of the classes' cross entropies."""
    classes = logits.shape[-1]
    target = tf.one_hot(
        tf.cast(label, tf.int32),
        classes,
        on_value=1 - LABEL_SMOOTHING,
        off_value=LABEL_SMOOTHING / (classes - 1),
    )
    losses = tf.nn.sigmoid_cross_entropy_with_logits(target, logits)
    return tf.reduce_sum(losses, -1)
