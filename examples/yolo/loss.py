"""The loss of YOLOv3, with focal loss, label smoothing and mixed images."""

import keras
import tensorflow as tf

from examples.yolo import boxes

# A prediction that overlaps an object by more than this is not penalized, even
# if it is not the owner (Redmon & Farhadi 2018, section 2.1).
IGNORED_OVERLAP = 0.5
# Lin et al., "Focal Loss for Dense Object Detection", 2017.
FOCUS = 2.0
# Zhang et al. 2019, section 3.2. The value is from their code in GluonCV.
LABEL_SMOOTHING = 1 / 40


@keras.saving.register_keras_serializable("yolo")
class Loss(keras.losses.Loss):
    """The loss of YOLOv3, summed over the predictions of an image.

    The owner of an object (see `boxes.owners`) has the cross entropy of the
    center within its cell, the absolute error of the logarithms of the sides,
    and the cross entropy of each class. The first two are multiplied by
    2 - area, so that small boxes count more. Every prediction has the focal
    cross entropy of an object's presence. The terms of an object are multiplied
    by its weight, which is less than 1 in a mixture of images.

    The arguments of a call are the objects, float32 of shape (batch, objects,
    boxes.FIELDS), and raw predictions, float32 of shape (batch, predictions,
    5 + classes).

    Args:
        heads: tuple of `boxes.Head`.
        image_size: int, pixels of a side of the images.
        **kwargs: see `keras.losses.Loss`.

    Reference: Redmon & Farhadi, "YOLOv3: An Incremental Improvement", 2018;
        Zhang et al., "Bag of Freebies for Training Object Detection Neural
        Networks", 2019.
    """

    def __init__(self, heads, *, image_size, **kwargs):
        super().__init__(**kwargs)
        # The heads of a saved model are lists.
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
        """Returns the loss of centers and sides, of the shape of `is_owned`."""
        corners, grid, anchors = self._priors
        center = (box[..., :2] + box[..., 2:]) / 2
        # Without an object, any finite value works.
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
        """Returns 0 if a prediction overlaps an object well, else 1."""
        decoded = tf.stop_gradient(boxes.decoded(predictions, self._priors))
        overlaps = boxes.overlaps(
            decoded[:, :, tf.newaxis],
            # Padding has no area, so its overlap is 0.
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
