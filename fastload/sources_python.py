"""Samples from Python: any object with ``__len__`` and ``__getitem__``, and datasets that are ``.beton`` files already.

Items are ``(image, label, ...)`` or a dict; an image is a PIL image, an (H, W, 3) uint8 array, a (3, H, W) uint8 tensor, the bytes of
an image file, or a path. The object is asked from one thread only, in order, because few datasets are safe from several; so its own
decoding does not run in parallel. A torchvision ``ImageFolder`` without transforms is read by its paths, which keeps the original JPEGs.

>>> convert([("a.jpg", 0), ("b.jpg", 1)], "pair.beton")
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastload.beton import Field
from fastload.errors import DataError, UsageError
from fastload.sources_base import (
    Column,
    Payload,
    Sample,
    Source,
    SourceOptions,
    check_unique,
    field_names,
    require_same_options,
    unknown_label,
)
from fastload.sources_folder import read_bytes

_IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "picture", "photo")
_LABEL_KEYS = ("label", "labels", "target", "class", "cls", "fine_label", "category")


class PythonSource(Source):
    """An object with a length and items. Names of extra tuple entries are ``extra1``, ``extra2``, ...

    Class names come from ``classes=``, or from the object's ``classes``, ``class_to_idx`` or Hugging Face ``features``.
    """

    def __init__(self, data: Any, options: SourceOptions) -> None:
        super().__init__(kind="python")
        require_same_options("Python object", options, ("label_from", "classes", "root"))
        if options.label_from not in ("auto", "none"):
            raise UsageError(
                f"labels of a Python object are in its items; use none, got {options.label_from!r}"
            )
        self.data, self._count = data, len(data)
        self._root = options.root if options.root is not None else getattr(data, "root", None)
        if not self._count:
            raise DataError(f"the {type(data).__name__} has length 0; there is nothing to convert")
        self._get = _by_path(data) or data.__getitem__
        first = self._item(0)
        self._image_key = _image_key(first)
        labels = [key for key in _LABEL_KEYS if key in first]
        self._label_key = labels[0] if labels and options.label_from == "auto" else None
        titles = [key for key in first if key not in (self._image_key, *labels[:1])]
        self._fields: dict[str, str] = dict(zip(titles, field_names(titles)))
        self._places: dict[str, int] = {}
        if self._label_key is not None:
            names = options.classes or _class_names(data, self._label_key)
            if names is None and isinstance(first[self._label_key], str):
                raise UsageError(
                    f"labels are text, and their order is not known; give classes=[...], got {first[self._label_key]!r}"
                )
            self._places = {name: n for n, name in enumerate(names or ())}
            label = _field(
                "label", first[self._label_key] if names is None or _is_vector(first[self._label_key]) else 0
            )
            self.columns.append(
                Column(label, self._label_key, lambda i: None, tuple(names) if names else None)
            )
        for title, name in self._fields.items():
            self.columns.append(Column(_field(name, first[title]), title, lambda i: None))

    def _item(self, i: int) -> dict[str, Any]:
        item = self._get(i)
        if isinstance(item, Mapping):
            return {str(key): value for key, value in item.items()}
        if isinstance(item, tuple | list) and not isinstance(item, str):
            return dict(zip(["image", "label", *(f"extra{n}" for n in range(1, len(item)))], item))
        return {"image": item}

    def __len__(self) -> int:
        return self._count

    def sample(self, i: int) -> Sample:
        source = str(i)
        try:
            item = self._item(i)
            source = self._name(item.get(self._image_key), i)
            values = self._values(item)
            load = _loader(item[self._image_key], self._root)
        except DataError as error:
            return Sample(str(i), source, {}, bytes, error=str(error))
        except Exception as error:  # whatever the user's own dataset raises belongs to this sample
            return Sample(str(i), source, {}, bytes, error=f"{type(error).__name__}: {error}")
        return Sample(str(i), source, values, load)

    def _name(self, image: Any, i: int) -> str:
        if not isinstance(image, str | os.PathLike):
            return str(i)
        path = os.fspath(image)
        if os.path.isabs(path):  # no absolute path gets into the file
            path = os.path.relpath(path, self._root) if self._root is not None else os.path.basename(path)
        return path.replace(os.sep, "/")

    def _values(self, item: dict[str, Any]) -> dict[str, Any]:
        values = {}
        for column in self.columns:
            if column.title not in item:
                raise DataError(f"the item has no {column.title!r}, but the first one has")
            value = item[column.title]
            if column.field.name == "label" and column.field.kind == "int":
                value = self._code(value)
            values[column.field.name] = _value(column.field, value)
        return values

    def _code(self, label: Any) -> int:
        if isinstance(label, str):
            if label not in self._places:
                raise DataError(unknown_label(label, list(self._places)))
            return self._places[label]
        if isinstance(label, float) and not label.is_integer():
            raise DataError(f"the label is no integer: {label!r}")
        code = int(label)
        if self._places and not 0 <= code < len(self._places):
            raise DataError(unknown_label(code, list(self._places)))
        return code

    def digest(self, into: Any) -> None:
        # Only what costs nothing: to hash the items would decode every image.
        into.update(f"{type(self.data).__name__} {self._count}".encode())


class BetonSource(Source):
    """A dataset of this package: labels, fields, class names and ids are kept, images are copied or encoded anew."""

    def __init__(self, data: Any, options: SourceOptions, *, owned: bool) -> None:
        super().__init__(kind="beton")
        require_same_options(".beton file", options, ("label_from", "classes"))
        self.data, self._owned = data, owned
        if not len(data):
            raise DataError(f"{data.path} holds no samples; there is nothing to convert")
        if options.label_from not in ("auto", "none") or (options.classes and "label" not in data.fields):
            raise UsageError(f"a .beton file keeps its own labels; use none, got {options.label_from!r}")
        titles = data.info.get("field_titles", {})
        for name, spec in data.fields.items():
            if spec.kind == "image" or (name == "label" and options.label_from == "none"):
                continue
            names = list(data.class_names(name))
            get = self._getter(name, spec)
            if name == "label" and options.classes is not None:
                get, names = self._renumbered(get, names, options.classes), list(options.classes)
            self.columns.append(Column(spec, titles.get(name, name), get, tuple(names) or None))
        self._sources = data.sources
        self._heights, self._widths = data.heights, data.widths  # each call reads the column of all samples
        self._id: Callable[[int], str] = data.ids.__getitem__
        self._check_ids()

    def _check_ids(self) -> None:
        """Joined files may count their samples alike: then the file's name goes before each id."""

        def unique() -> None:
            check_unique(
                self._id,
                len(self),
                lambda i: f"sample {i}",
                "choose each once, or give joined files other names",
            )

        try:
            unique()
        except DataError:
            if len(self.data.paths) == 1:
                raise
            plain = self._id
            self._id = lambda i: f"{Path(self.data.locate(i)[0].path).stem}/{plain(i)}"
            unique()

    def _getter(self, name: str, spec: Field) -> Callable[[int], Any]:
        if spec.kind in ("int", "float"):
            numbers = self.data.column(name)
            return lambda i: numbers[i].item()

        def value(i: int) -> Any:  # without decoding the image
            reader, at = self.data.locate(i)
            return reader.value(at, name)

        return value

    def _renumbered(
        self, get: Callable[[int], Any], names: Sequence[str], classes: Sequence[str]
    ) -> Callable[[int], Any]:
        """Codes in the order of ``classes``; with no class names in the file, ``classes`` names the codes that are there."""
        if not names:
            names = classes
        places = {n: classes.index(name) for n, name in enumerate(names) if name in classes}
        for i in range(len(self.data)):
            if get(i) not in places:
                code = get(i)
                shown = names[code] if 0 <= code < len(names) else code
                self.errors[i] = unknown_label(shown, classes)
        return lambda i: places.get(get(i), -1)

    def __len__(self) -> int:
        return len(self.data)

    def sample(self, i: int) -> Sample:
        height, width = int(self._heights[i]), int(self._widths[i])
        return Sample(
            self._id(i),
            self._sources[i],
            self.values(i),
            lambda: self.data.encoded(i),
            height * width // 3,
            error=self.errors.get(i),
        )

    def digest(self, into: Any) -> None:
        into.update(self._heights.tobytes() + self._widths.tobytes())
        for i in range(len(self)):
            into.update(self._id(i).encode("utf-8", "backslashreplace") + b"\0")
        for column in self.columns:
            if column.field.kind in ("int", "float"):
                into.update(self.data.column(column.field.name).tobytes())

    def close(self) -> None:
        if self._owned:
            self.data.close()


def _by_path(data: Any) -> Callable[[int], Any] | None:
    """Paths and labels of a torchvision folder dataset whose own ``__getitem__`` would only decode them."""
    get = getattr(type(data), "__getitem__", None)
    plain = getattr(data, "transform", 0) is None and getattr(data, "target_transform", 0) is None
    if plain and getattr(get, "__module__", "") == "torchvision.datasets.folder":
        return lambda i: data.samples[i]
    return None


def _image_key(first: Mapping[str, Any]) -> str:
    for key in _IMAGE_KEYS:
        if key in first:
            return key
    raise UsageError(
        f"an item needs an image under one of {', '.join(_IMAGE_KEYS)}; got the keys {', '.join(first)}"
    )


def _class_names(data: Any, key: str) -> list[str] | None:
    names = getattr(data, "classes", None)
    if names is None and isinstance(getattr(data, "class_to_idx", None), Mapping):
        places = data.class_to_idx
        names = sorted(places, key=places.__getitem__)
    if names is None and isinstance(getattr(data, "features", None), Mapping):
        names = getattr(data.features.get(key), "names", None)
    return [str(name) for name in names] if names else None


def _is_vector(value: Any) -> bool:
    return getattr(value, "ndim", 0) > 0 or isinstance(value, list)


def _field(name: str, value: Any) -> Field:
    """The kind of field that holds values like this one."""
    if name == "label" and isinstance(value, list):
        value = np.asarray(value, np.float32)
    if isinstance(value, bool | int | np.integer | np.bool_):
        return Field(name, "int")
    if isinstance(value, float | np.floating):
        return Field(name, "float")
    if isinstance(value, str | bytes | bytearray | memoryview):
        return Field(name, "bytes")
    if hasattr(value, "numpy") or isinstance(value, np.ndarray):
        array = _array(value)
        if array.ndim == 0:
            return Field(name, "float" if array.dtype.kind == "f" else "int")
        if name == "label":
            return Field(name, "ndarray", "float32", array.shape)  # a multi-hot vector
        return Field(name, "ndarray", array.dtype.name, array.shape)
    return Field(name, "json")


def _value(field: Field, value: Any) -> Any:
    """A value as its field takes it; a DataError where it is of another kind than in the first item."""
    try:
        if field.kind == "int":
            return int(value)
        if field.kind == "float":
            return float(value)
        if field.kind == "bytes":
            return value.encode("utf-8", "backslashreplace") if isinstance(value, str) else bytes(value)
        if field.kind == "ndarray":
            array = np.asarray(_array(value), field.dtype)
            if array.shape != field.shape:
                raise DataError(
                    f"its {field.name!r} has shape {array.shape}, and the first item's {field.shape}"
                )
            return array
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"its {field.name!r} is no {field.kind} as in the first item, got {value!r}"
        ) from error
    return value


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _loader(image: Any, root: Any) -> Callable[[], Payload]:
    """A function for a worker thread that gives the image's bytes or pixels."""
    if isinstance(image, str | os.PathLike):
        path = os.path.join(root, image) if root is not None and not os.path.exists(image) else image
        return lambda: read_bytes(path)
    if isinstance(image, bytes | bytearray | memoryview):
        return lambda: bytes(image)
    if isinstance(image, Mapping) and isinstance(
        image.get("bytes"), bytes
    ):  # Hugging Face, Image(decode=False)
        return lambda: bytes(image["bytes"])
    if hasattr(image, "getbands"):
        return lambda: _from_pil(image)
    if hasattr(image, "__array__") or hasattr(image, "detach"):
        tensor = hasattr(image, "detach")
        return lambda: _pixels(_array(image), channels_first=tensor)
    raise DataError(
        f"an image is a PIL image, uint8 array or tensor, bytes or path, got {type(image).__name__}"
    )


def _pixels(array: np.ndarray, *, channels_first: bool) -> Payload:
    if array.dtype != np.uint8:
        raise DataError(f"pixels must be uint8 (0 to 255); scale and convert them first, got {array.dtype}")
    if array.ndim == 3 and channels_first and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in array.shape:
        raise DataError(f"pixels must be (H, W, 3), or (3, H, W) as a tensor, got shape {array.shape}")
    if array.shape[2] == 4:
        from PIL import Image

        return _from_pil(Image.fromarray(np.ascontiguousarray(array), "RGBA"))
    return np.ascontiguousarray(array)


def _from_pil(image: Any) -> Payload:
    """A PIL image through the same conversion as a file of its mode, so that alpha, palettes and 16 bits come out alike."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return np.array(image)
    if image.mode in ("1", "L", "YCbCr", "HSV", "LAB"):
        return np.array(image.convert("RGB"))
    if image.mode == "F":
        raise DataError("a PIL image of mode F has no known range; convert it to 8 bits first")
    buffer = io.BytesIO()
    image.save(
        buffer,
        "TIFF" if image.mode == "CMYK" else "PNG",
        **({} if image.mode == "CMYK" else {"compress_level": 0}),
    )
    return buffer.getvalue()
