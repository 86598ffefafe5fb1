"""The CPU engine: cut the crop out of the JPEG, decode it, resize, recolour; a slice of a batch in one call, on any thread.

Of each image only the restart segments under the crop are decoded. With ``decode="fast"`` our own decoder
(:mod:`fastload.kernels.batch`) resizes luma and chroma from their own planes, and decodes a crop at least twice as large as
the output at 1/2, 1/4 or 1/8 of its size; ``"exact"`` decodes to the pixels that Pillow gives and resizes within one level of it.
What our decoder does not take (progressive, CMYK or damaged JPEG), libjpeg-turbo decodes, image by image, or says what is
wrong. Nearly all of it runs without the GIL.

>>> made = Engine(dataset, Plan(transforms.train(224)), "fast").fill(spans, table, 0, 64, images)
"""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np

from fastload import codecs
from fastload.beton import EncodedImage, Spans
from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.errors import CorruptError, DataError, UsageError
from fastload.kernels import batch, jpeg, pixels, resize

FAST, EXACT = "fast", "exact"
_SMOOTH = 2  # pixels of margin that keep smooth chroma upsampling independent of the cut
_KEEP = 1 << 26  # scratch memory that a thread keeps; more is freed after the image that needed it
_MOST = 1 << 30  # scratch memory that a row may ask for
_NO_COLOUR = np.empty((0, 3, 7), np.float32)
_NO_CLOCK = np.zeros((2, 0), np.int64)

# What Dataset.spans gives.
Sources = list[tuple[np.ndarray, np.ndarray, Spans]]


class Engine:
    """Executes rows of a table for samples of a dataset; safe to call from many threads at once."""

    def __init__(self, dataset: Dataset, plan: Plan, decode: str = FAST) -> None:
        if decode not in (FAST, EXACT):
            raise UsageError(f"decode must be 'fast' or 'exact', got {decode!r}")
        self._dataset, self._plan, self._exact = dataset, plan, decode == EXACT
        self._field = dataset.image_field
        self._paint = batch.Paint(np.array(plan.fill, np.uint8), plan.erase_fill, *plan.affine)
        self._local = threading.local()

    def fill(
        self,
        spans: Sources,
        table: Table,
        start: int,
        stop: int,
        images: np.ndarray,
        floats: np.ndarray | None = None,
    ) -> np.ndarray:
        """Fill the rows [start, stop) of ``images`` (B, H, W, 3) uint8, and of ``floats`` of the same shape, float32, if it is given.

        ``spans`` is what :meth:`fastload.dataset.Dataset.spans` says of the batch. Returns (stop - start,) bool: False for the rows that
        :meth:`execute` must do, all if the whole images are a function's. With functions of the user nothing is normalised.
        """
        made = np.zeros(stop - start, bool)
        if self._plan.whole_image:
            return made
        no_floats = floats is None or bool(self._plan.per_image)
        wanted = np.empty((0, *images.shape[1:]), np.float32) if no_floats else floats
        rows_of_table = batch.Rows(
            table.place,
            table.box,
            table.clip,
            table.flips,
            _NO_COLOUR if table.colour is None else table.colour,
            table.coloured,
            table.erase,
        )
        status = np.full(len(images), batch.UNSUPPORTED, np.int64)
        for file, places, where in spans:
            mine = places[np.searchsorted(places, start) : np.searchsorted(places, stop)]
            rows = mine[where.raw[mine]] if self._exact else mine
            self._read(file, where, rows, table.box)
            thread = self._thread(0)
            while rows.size:
                self._call_kernel(
                    file, rows, batch.Sources(*where), rows_of_table, images, wanted, thread, status
                )
                # Only a large picture asks for more; what asks for too much goes the other way, which knows the limit.
                rows = rows[status[rows] == batch.MORE_SCRATCH]
                if rows.size and not thread.scratch.size < thread.need[0] <= _MOST:
                    break
                thread = self._thread(int(thread.need[0]))
        made[:] = status[start:stop] == batch.OK
        return made

    def _call_kernel(self, *arguments: Any) -> None:
        file, rows, sources, table, images, floats, thread, status = arguments
        batch.fill(file, rows, sources, table, self._paint, images, floats, thread, status, _NO_CLOCK)

    def _read(self, file: np.ndarray, where: Spans, rows: np.ndarray, box: np.ndarray) -> None:
        """Bring the bytes of ``rows`` into memory, where that does not happen by itself."""

    def _thread(self, size: int) -> batch.Thread:
        """The kernel's memory of this thread, with at least ``size`` bytes of scratch."""
        thread: batch.Thread | None = getattr(self._local, "thread", None)
        if thread is None:
            thread = self._local.thread = batch.new_thread()
        if thread.scratch.size < size:
            thread = thread._replace(scratch=np.empty(size + size // 4, np.uint8))
            if size <= _KEEP:
                self._local.thread = thread
        return thread

    def execute(self, base: int, table: Table, row: int, out: np.ndarray, made: bool = False) -> None:
        """Fill ``out`` (H, W, 3) uint8 with sample ``base`` as row ``row`` says. CorruptError for bad bytes.

        One image by other means than :meth:`fill`. ``made``: :meth:`fill` has made the pixels, and functions of the user are left.
        """
        if made:
            for spec in self._plan.per_image:
                self._call(spec, out, table, row, out)
            return
        reader, at = self._dataset.locate_base(base)
        image = reader.image(at, self._field)
        if self._plan.whole_image:
            self._call(self._plan.per_image[0], self._decode_whole(image), table, row, out)
        else:
            self._geometry(image, table, row, out)
        if table.colour is not None or table.erase.shape[1]:
            self._recolour(table, row, out)
        for spec in self._plan.per_image[1 if self._plan.whole_image else 0 :]:
            self._call(spec, out, table, row, out)

    def normalise(self, image: np.ndarray, out: np.ndarray) -> None:
        """``out`` (H, W, 3) float32 from the pixels of :meth:`execute`."""
        pixels.normalise(image[None], self._paint.scale, self._paint.shift, out[None])

    # Each of the following is one stage of the work on one image (see fastload.stages): ProfiledEngine times them.

    def _geometry(self, image: EncodedImage, table: Table, row: int, out: np.ndarray) -> None:
        y, x, height, width = table.place[row].tolist()
        if (height, width) != out.shape[:2]:
            pixels.fill_outside(out, y, x, height, width, self._paint.background)
            out = out[y : y + height, x : x + width]
            if not out.size:
                return
        flips = int(table.flips[row])
        box: list[float] = table.box[row].tolist()
        clip: list[int] = table.clip[row].tolist()
        if image.mode == "raw":
            self._resize(_raw(image), (0, 0), 1, box, clip, out, flips)
            return
        window, factor = self._window(box, clip, height, width)
        data, part = self._cut(image, window)
        self._resize(self._decode(data, part, factor), part[:2], factor, box, clip, out, flips)

    def _window(
        self, box: list[float], clip: list[int], height: int, width: int
    ) -> tuple[tuple[int, int, int, int], int]:
        """The pixels y0, x0, y1, x1 that are looked at, and by what they may be reduced while they are decoded."""
        scale_y, scale_x = (box[2] - box[0]) / height, (box[3] - box[1]) / width
        factor = 1
        while not self._exact and factor < 8 and min(scale_y, scale_x) >= 2 * factor:
            factor *= 2
        # The triangle filter looks one (scaled) pixel further than the box, where the clip allows.
        margin = (_SMOOTH if self._exact else 0) + (factor if factor > 1 else 0)
        reach_y, reach_x = max(scale_y, 1.0), max(scale_x, 1.0)
        window = (
            max(clip[0], math.floor(box[0] - reach_y)) - margin,
            max(clip[1], math.floor(box[1] - reach_x)) - margin,
            min(clip[2], math.ceil(box[2] + reach_y)) + margin,
            min(clip[3], math.ceil(box[3] + reach_x)) + margin,
        )
        return window, factor

    def _cut(
        self, image: EncodedImage, window: tuple[int, int, int, int]
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """A JPEG (n,) uint8 of at least the window, and the part y, x, height, width of the image that it shows."""
        data = codecs.as_bytes(image.data)
        scratch = self._scratch("jpeg", data.size)
        found = np.empty(5, np.int64)
        status = int(jpeg.cut(data, image.height, image.width, *window, scratch, found))
        if status == jpeg.WHOLE:
            return data, (0, 0, image.height, image.width)
        if status != jpeg.OK:
            raise CorruptError(jpeg.REASONS[status])
        size, y, x, h, w = found.tolist()
        return scratch[:size], (y, x, h, w)

    def _decode(self, data: np.ndarray, part: tuple[int, int, int, int], factor: int) -> np.ndarray:
        """The JPEG of ``part`` as pixels (h, w, 4), reduced by ``factor``."""
        h, w = part[2:]
        if h * w > codecs.MAX_PIXELS:
            raise CorruptError(f"it has {w} x {h} pixels, over the limit of {codecs.MAX_PIXELS:,}")
        least = (-(-h // factor), -(-w // factor))
        memory = self._scratch("pixels", least[0] * least[1] * 4)
        decoded = codecs.decode_rgbx(data, least if factor > 1 else (0, 0), self._exact, memory)
        if decoded.shape[:2] != least:
            raise CorruptError(
                f"its JPEG decodes to {decoded.shape[0]} x {decoded.shape[1]}, not {least[0]} x {least[1]}"
            )
        return decoded

    def _resize(
        self,
        source: np.ndarray,
        origin: tuple[int, int],
        factor: int,
        box: list[float],
        clip: list[int],
        out: np.ndarray,
        flips: int,
    ) -> None:
        """Fill ``out`` with ``box``, given in pixels of the image, of which ``source`` begins at ``origin``."""
        height, width = out.shape[:2]
        shift = (*origin, *origin)
        box = [(b - o) / factor for b, o in zip(box, shift)]
        if (
            factor == 1
            and box[2] - box[0] == height
            and box[3] - box[1] == width
            and box[0] % 1 == box[1] % 1 == 0
        ):
            resize.copy_window(source, int(box[0]), int(box[1]), out, flips)
            return
        limits = (*source.shape[:2], *source.shape[:2])
        low = [max((c - o) // factor, 0) for c, o in zip(clip[:2], shift)]
        high = [min(-(-(c - o) // factor), m) for c, o, m in zip(clip[2:], shift, limits)]
        resize.resize(source, tuple(box), (*low, *high), out, flips)  # type: ignore[arg-type]

    def _recolour(self, table: Table, row: int, out: np.ndarray) -> None:
        if table.colour is not None and table.coloured[row]:
            pixels.recolour(out, table.colour[row])
        if table.erase.shape[1]:
            pixels.erase(out, table.erase[row], self._paint.erase_fill)

    def _decode_whole(self, image: EncodedImage) -> np.ndarray:
        if image.mode == "raw":
            return _raw(image).copy()
        decoded = codecs.decode_jpeg(codecs.as_bytes(image.data), self._exact)
        if decoded.shape != (image.height, image.width, 3):
            raise CorruptError(f"its JPEG decodes to {decoded.shape[:2]}, not {(image.height, image.width)}")
        return decoded

    def _scratch(self, name: str, size: int) -> np.ndarray:
        memory: np.ndarray | None = getattr(self._local, name, None)
        if memory is None or memory.size < size:
            memory = np.empty(max(size + size // 2, 1 << 16) if size <= _KEEP else size, np.uint8)
            if size <= _KEEP:
                setattr(self._local, name, memory)
        return memory

    def _call(self, spec: Any, image: np.ndarray, table: Table, row: int, out: np.ndarray) -> None:
        assert table.keys is not None  # drawn whenever the plan has a PerImage
        functions = getattr(self._local, "functions", None)
        if functions is None:
            functions = self._local.functions = {}
        if id(spec) not in functions:
            functions[id(spec)] = adapt(spec.fn, spec.seeded)
        result = functions[id(spec)](image, table.keys[row])
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape != out.shape:
            got = (
                f"{result.dtype} {result.shape}" if isinstance(result, np.ndarray) else type(result).__name__
            )
            raise UsageError(
                f"PerImage must return uint8 of shape {out.shape}, got {got}; leave conversion and normalising to "
                "transforms.Normalize"
            )
        out[:] = result


def adapt(fn: Any, seeded: bool) -> Any:
    """``fn`` as a function of ((H, W, 3) uint8, key (4,) uint32) that returns an array; one copy for each thread."""
    module = type(fn).__module__
    if module.startswith("albumentations"):
        own = copy.deepcopy(fn)  # its generator is state, which threads must not share

        def run_albumentations(image: np.ndarray, key: np.ndarray) -> Any:
            if hasattr(own, "set_random_seed"):
                own.set_random_seed(int(key[0]))
            return own(image=image)["image"]

        return run_albumentations
    if module.startswith("torchvision.transforms"):
        import torch

        def run_torchvision(image: np.ndarray, key: np.ndarray) -> Any:
            result = fn(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
            return (
                result.numpy().transpose(1, 2, 0) if isinstance(result, torch.Tensor) else np.asarray(result)
            )

        return run_torchvision
    if seeded:
        return lambda image, key: fn(image, np.random.default_rng(key))
    return lambda image, key: fn(image)


def _raw(image: EncodedImage) -> np.ndarray:
    source: np.ndarray = codecs.as_bytes(image.data).reshape(image.height, image.width, 3)
    return source


def check_uniform(heights: np.ndarray, widths: np.ndarray) -> None:
    """Without geometry a batch needs images of one size."""
    if heights.size and (heights.min() != heights.max() or widths.min() != widths.max()):
        raise DataError(
            f"the images have different sizes ({heights.min()} to {heights.max()} x {widths.min()} to {widths.max()}), "
            "and a batch needs one; add a transform that sets it, such as transforms.eval(224)"
        )
