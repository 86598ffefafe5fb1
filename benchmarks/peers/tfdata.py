"""tf.data: TensorFlow's graph of C++ operations, which decodes the crop's window only. Its trade-off: an import of seconds, no antialiasing.

TensorFlow and numba or Triton each bring an LLVM: a process that imports both is ended by it, so nothing here may import torch's compilers.

>>> from fastload.benchmarks.peers import make; peer = make("tfdata"); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Files, Peer, Work

FILTER = "bilinear, not antialiased"


class TfData(Peer):
    """``from_tensor_slices``, shuffle, parallel map, batch, repeat, prefetch: the performance guide's chain, with AUTOTUNE."""

    name: ClassVar[str] = "tfdata"
    title: ClassVar[str] = "tf.data"
    requires: ClassVar[tuple[str, ...]] = ("tensorflow-cpu>=2.16",)
    modules: ClassVar[tuple[str, ...]] = ("tensorflow",)
    crops: ClassVar[dict[str, str]] = {"train": FILTER, "eval": FILTER}
    settings: ClassVar[str] = (
        "decode_and_crop_jpeg, map and prefetch with AUTOTUNE, order not kept, a private pool of as many threads as asked and no "
        "threads inside of operations, as tf.data's performance guide and ThreadingOptions advise"
    )

    def imports(self) -> None:
        # Before the import: it prints a page otherwise, and looks for GPUs.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
        import tensorflow  # noqa: F401

    def load(self, work: Work) -> None:
        self.imports()
        import tensorflow as tf

        tf.random.set_seed(work.seed)
        files = Files(work.folder)
        self.count = -(-len(files) // work.batch)
        samples = tf.data.Dataset.from_tensor_slices((files.paths, files.labels))
        if work.crop == "train":
            samples = samples.shuffle(len(files), seed=work.seed, reshuffle_each_iteration=True)
        make = train_sample if work.crop == "train" else eval_sample
        samples = samples.map(
            lambda path, label: (make(tf.io.read_file(path), work), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        options = tf.data.Options()
        options.deterministic = False
        options.autotune.cpu_budget = work.threads
        options.threading.private_threadpool_size = work.threads
        options.threading.max_intra_op_parallelism = 1
        self.epochs = samples.batch(work.batch).repeat().prefetch(tf.data.AUTOTUNE).with_options(options)
        self.batches = self.epochs.as_numpy_iterator()
        self.whole = True

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not self.whole:  # an epoch that was left would go on where it was left
            self.batches = self.epochs.as_numpy_iterator()
        self.whole = False
        yield from itertools.islice(self.batches, self.count)
        self.whole = True


def train_sample(data: Any, work: Work) -> Any:
    """Graph: JPEG bytes to (size, size, 3): RandomResizedCrop by TensorFlow's own box sampler, and a flip of half of them."""
    import tensorflow as tf

    whole = tf.reshape(tf.constant([0.0, 0.0, 1.0, 1.0]), (1, 1, 4))
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(data),
        whole,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    top, left, _ = tf.unstack(begin)
    height, width, _ = tf.unstack(extent)
    image = _resized(data, tf.stack([top, left, height, width]), work.size)
    return _levels(tf.image.random_flip_left_right(image), work)


def eval_sample(data: Any, work: Work) -> Any:
    """Graph: JPEG bytes to (size, size, 3): the centre that is left when the shorter side is ``resize``, in the source's pixels."""
    import tensorflow as tf

    shape = tf.image.extract_jpeg_shape(data)
    shorter = tf.cast(tf.minimum(shape[0], shape[1]), tf.float32)
    side = tf.maximum(1, tf.cast(tf.round(shorter * (work.size / work.resize)), tf.int32))
    window = tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])
    return _levels(_resized(data, window, work.size), work)


def _resized(data: Any, window: Any, size: int) -> Any:
    import tensorflow as tf

    image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
    return tf.image.resize(image, (size, size), method="bilinear", antialias=False)


def _levels(image: Any, work: Work) -> Any:
    import tensorflow as tf

    if work.normalise:
        return (image - tf.constant(MEAN)) / tf.constant(STD)
    return tf.cast(tf.round(image), tf.uint8)
