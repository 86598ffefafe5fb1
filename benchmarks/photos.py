"""The pictures of a comparison: found once, encoded once, and laid out in every form that a peer may want to read.

All peers read the same bytes: JPEG files in class folders, the same JPEG kept losslessly in a ``.beton``, and pixels decoded from
them by Pillow. The trade-off is disk: a scratch folder of some gigabytes where raw pixels are compared. The user's files are copied
first, so nothing that a peer does can reach them.

>>> photos = Photos("photos.tar", Path(scratch), images=2000); photos.get("500").folder
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastload.benchmarks import machine
from fastload.benchmarks.peers.base import SUFFIXES, Files, Pixels
from fastload.benchmarks.reference import Sources
from fastload.errors import DataError, UsageError

SIDE, QUALITY, SMALL_SIDE = 500, 90, 32
TILES, _MOST_LARGE = 4, 100  # photographs along a side of a mosaic; mosaics in a set
ORIENTATION = 0x0112  # EXIF
_LOOKED_AT = 200  # files whose share in the page cache is looked up


@dataclass(frozen=True)
class Item:
    """One picture: its number, the rank of its class, and where its bytes are."""

    number: int
    label: int
    path: Path


@dataclass(frozen=True)
class ImageSet:
    """Pictures in every form that a peer may read; see :class:`fastload.benchmarks.peers.base.Work` for the forms.

    ``labels`` is the sorted list of one epoch, ``sources`` the distinct pictures, each of which stands ``copies`` times in the set.
    """

    name: str
    folder: str
    beton: str
    pixels: str
    labels: list[int]
    sources: Sources
    copies: int
    notes: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        """All files that are read."""
        inside = Files(self.folder).paths if self.folder else []
        return [*inside, *([self.beton] if self.beton else []), *self._pixels()]

    def _pixels(self) -> list[str]:
        return [os.path.join(self.pixels, "pixels.bin")] if self.pixels else []

    def warm(self) -> str:
        """Read everything once, and say which share the page cache holds then."""
        files = self.files()
        for path in files:
            machine.warm_cache(path)
        looked_at = [files[i] for i in evenly(len(files), _LOOKED_AT)]
        shares = [share for path in looked_at if (share := machine.cached_share(path)) is not None]
        if not shares:
            return "every file was read before; the share in the page cache is unknown"
        return f"warm: every file was read before, {np.mean(shares):.0%} of it in the page cache"

    def settings(self) -> dict[str, Any]:
        size = sum(map(os.path.getsize, self._pixels() or Files(self.folder).paths))
        return {
            "images_in_set": len(self.labels),
            "distinct_pictures": len(self.sources),
            "copies": self.copies,
            "classes": len(set(self.labels)),
            "bytes_per_image": round(size / len(self.labels)),
        }


def evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the numbers below ``count``, evenly spread."""
    return list(range(count)) if count <= wanted else [i * count // wanted for i in range(wanted)]


class Photos:
    """Finds the pictures of ``data`` and makes the sets "500", "original", "large", "raw", "small", "subset" and "convert" when first asked for.

    ``data`` is a folder of class folders, a tar of one, or a ``.beton`` of JPEG images. A set has about ``images`` images:
    more pictures are thinned out evenly, fewer stand in it ``copies`` times (None: as often as needed). DataError where there is
    nothing to read.
    """

    def __init__(
        self,
        data: str,
        scratch: Path,
        *,
        images: int,
        copies: int | None = None,
        small_images: int = 20_000,
        subset_images: int = 200,
        threads: int = 2,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self.scratch, self.images, self.copies, self.threads = scratch, images, copies, threads
        self.small_images, self.subset_images = small_images, subset_images
        self.say = say or (lambda text: None)
        self.notes: list[str] = []
        self.say("find the pictures")
        self.originals = self._copied(data)
        self.say("encode the pictures")
        self.encoded = self._encode()
        self._sets: dict[str, ImageSet] = {}

    def get(self, name: str) -> ImageSet:
        """A set, made when it is first asked for."""
        if name not in self._sets:
            self.say(f"make the set {name!r}")
            self._sets[name] = getattr(self, f"_make_{name}")()
        return self._sets[name]

    # ---- finding ----

    def _copied(self, data: str) -> list[Item]:
        """The chosen pictures, copied to the scratch folder under safe names; ranks of their classes as labels."""
        target = self.scratch / "originals"
        target.mkdir(parents=True)
        if data.endswith(".beton"):
            return self._dumped(data, target)
        found = photo_files(unpack(data, self.scratch))
        ranks = {name: rank for rank, name in enumerate(sorted({path.parent.name for path in found}))}
        chosen = [found[i] for i in self._thin(len(found))]
        items = []
        for number, path in enumerate(chosen):
            copy = target / f"{number:06d}{path.suffix.lower()}"
            shutil.copyfile(path, copy)
            items.append(Item(number, ranks[path.parent.name], copy))
        return items

    def _dumped(self, data: str, target: Path) -> list[Item]:
        import fastload

        with fastload.open(data) as dataset:
            jpeg = np.flatnonzero(np.asarray(dataset.modes) == 0)
            if not len(jpeg):
                raise DataError(
                    f"{data!r} holds no JPEG images to compare with; give a folder of class folders"
                )
            if len(jpeg) < len(dataset):
                self.notes.append(f"{len(dataset) - len(jpeg):,} images that are stored raw were left out")
            labels = np.zeros(len(dataset), np.int64)
            if "label" in dataset.fields and dataset.fields["label"].kind == "int":
                labels = np.unique(dataset.labels, return_inverse=True)[1].reshape(-1)
            items = []
            for number, i in enumerate(jpeg[self._thin(len(jpeg))].tolist()):
                path = target / f"{number:06d}.jpg"
                path.write_bytes(bytes(dataset.encoded(i).data))
                items.append(Item(number, int(labels[i]), path))
        return items

    def _thin(self, count: int) -> list[int]:
        if count > self.images:
            self.notes.append(f"{self.images:,} of {count:,} pictures were taken, evenly spread")
        return evenly(count, self.images)

    def _encode(self) -> list[Item]:
        """Every picture as the same JPEG for all: longer side at most 500, quality 90, baseline 4:2:0, by Pillow."""
        target = self.scratch / "encoded"
        target.mkdir()
        with ThreadPoolExecutor(self.threads) as pool:
            done = list(
                pool.map(lambda item: encode(item.path, target / f"{item.number:06d}.jpg"), self.originals)
            )
        if broken := [item for item, good in zip(self.originals, done) if not good]:
            self.notes.append(f"{len(broken):,} files that Pillow cannot decode were left out")
        self.originals = [item for item, good in zip(self.originals, done) if good]
        if not self.originals:
            raise DataError(
                "none of the files can be decoded; give a folder of class folders with photographs"
            )
        return [Item(item.number, item.label, target / f"{item.number:06d}.jpg") for item in self.originals]

    # ---- sets ----

    def _times(self, distinct: int, wanted: int) -> int:
        return self.copies or max(1, round(wanted / distinct))

    def _make_500(self) -> ImageSet:
        return self._jpeg_set("500", self.encoded, self._times(len(self.encoded), self.images))

    def _make_subset(self) -> ImageSet:
        chosen = [self.encoded[i] for i in evenly(len(self.encoded), self.subset_images)]
        return self._jpeg_set("subset", chosen, 1)

    def _make_original(self) -> ImageSet:
        plain = [item for item in self.originals if is_plain_jpeg(item.path)]
        notes = []
        if odd := len(self.originals) - len(plain):
            notes.append(
                f"{odd:,} original files were left out for all peers: not JPEG, or grey, CMYK, progressive or turned by EXIF"
            )
        if not plain:
            raise DataError(
                "none of the original files is a plain RGB JPEG, so there is nothing to compare at original size"
            )
        return self._jpeg_set("original", plain, self._times(len(plain), self.images), notes)

    def _make_large(self) -> ImageSet:
        """As many details a pixel as photographs have: enlarged ones would have fewer, and be easier to decode."""
        folder = self.scratch / "large" / "mosaics"
        folder.mkdir(parents=True)
        count = max(1, min(_MOST_LARGE, self.images // 10))
        items = []
        for number in range(count):
            parts = [self.encoded[(number * TILES**2 + i) % len(self.encoded)] for i in range(TILES**2)]
            path = folder / f"{number:06d}.jpg"
            mosaic([part.path for part in parts]).save(path, "JPEG", quality=QUALITY, subsampling="4:2:0")
            items.append(Item(number, parts[0].label, path))
        return self._jpeg_set("large", items, 1)

    def _make_convert(self) -> ImageSet:
        copies = self._times(len(self.originals), self.images // 2)
        folder = self._folder("convert", self.originals, copies)
        return self._image_set("convert", folder=folder, items=self.originals, copies=copies)

    def _make_raw(self) -> ImageSet:
        chosen = [
            self.encoded[i] for i in evenly(len(self.encoded), self.images // 2)
        ]  # half a megabyte each
        copies = self._times(len(chosen), self.images // 2)
        sources = Sources([item.path for item in chosen])
        return self._pixel_set("raw", [item.label for item in chosen], sources, copies)

    def _make_small(self) -> ImageSet:
        from PIL import Image

        sources = Sources([item.path for item in self.encoded])
        shape = (SMALL_SIDE, SMALL_SIDE)
        small = np.stack(
            [np.asarray(sources.image(i).resize(shape, Image.Resampling.BOX)) for i in range(len(sources))]
        )
        copies = -(-self.small_images // len(small))
        return self._pixel_set("small", [item.label for item in self.encoded], Sources(small), copies)

    def _folder(self, name: str, items: Sequence[Item], copies: int) -> Path:
        """Class folders of hard links, so that copies cost no disk."""
        folder = self.scratch / name / "files"
        for item in items:
            (folder / f"{item.label:05d}").mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                target = folder / f"{item.label:05d}" / f"{copy}-{item.number:06d}{item.path.suffix}"
                try:
                    os.link(item.path, target)
                except OSError:  # a file system without links
                    shutil.copyfile(item.path, target)
        return folder

    def _jpeg_set(self, name: str, items: Sequence[Item], copies: int, notes: Iterable[str] = ()) -> ImageSet:
        import fastload

        folder, beton, said = (
            self._folder(name, items, copies),
            self.scratch / name / "images.beton",
            list(notes),
        )
        report = fastload.convert(folder, beton, store="jpeg", workers=self.threads, progress=False)
        if changed := report.storage.get("encoded", 0):
            said.append(
                f"{changed:,} images could not be kept losslessly in the .beton and were encoded anew there"
            )
        return self._image_set(name, folder=folder, beton=beton, items=items, copies=copies, notes=said)

    def _image_set(
        self,
        name: str,
        *,
        folder: Path,
        items: Sequence[Item],
        copies: int,
        beton: Path | None = None,
        notes: Iterable[str] = (),
    ) -> ImageSet:
        labels = sorted(Files(str(folder)).labels.tolist())
        sources = Sources([item.path for item in items])
        return ImageSet(name, str(folder), str(beton or ""), "", labels, sources, copies, list(notes))

    def _pixel_set(self, name: str, classes: Sequence[int], sources: Sources, copies: int) -> ImageSet:
        import fastload

        ranks = {label: rank for rank, label in enumerate(sorted(set(classes)))}
        folder, beton = self.scratch / name / "pixels", self.scratch / name / "images.beton"
        folder.mkdir(parents=True)
        index, at = [], 0
        with open(folder / "pixels.bin", "wb") as file:
            for i, label in enumerate(classes):
                pixels = np.asarray(sources.image(i))
                height, width, _ = pixels.shape
                for _ in range(copies):
                    file.write(pixels.tobytes())
                    index.append((at, height, width, ranks[label]))
                    at += pixels.nbytes
        np.save(folder / "index.npy", np.array(index, np.int64))
        fastload.convert(
            Decoded(Pixels(str(folder))), beton, store="raw", workers=self.threads, progress=False
        )
        labels = sorted(row[3] for row in index)
        return ImageSet(name, "", str(beton), str(folder), labels, sources, copies)


class Decoded:
    """Pixels as a sequence of ``(image, label)``, which ``fastload.convert`` takes."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.asarray(self.pixels.image(i)), int(self.pixels.labels[i])

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return (self[i] for i in range(len(self)))


def unpack(data: str, scratch: Path) -> Path:
    """The folder of class folders: the given one, or a tar file's content in ``scratch``."""
    root = Path(data)
    if not root.exists():
        raise UsageError(f"there is no folder, tar or .beton file at {data!r}; check the path")
    if root.is_file():
        target = scratch / "unpacked"
        try:
            with tarfile.open(root) as archive:
                archive.extractall(target, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"cannot unpack {data!r} ({error}); give a tar file or a folder") from error
        root = target
    while len(inside := list(root.iterdir())) == 1 and inside[0].is_dir():
        if photo_files(root):
            break  # a single class
        root = inside[0]  # archives often wrap everything in one folder
    if not photo_files(root):
        raise DataError(f"found no images in class folders under {data!r}; give a folder of class folders")
    return root


def photo_files(folder: Path) -> list[Path]:
    """Images in the class folders of ``folder``, sorted."""
    return sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)


def encode(source: Path, target: Path) -> bool:
    """One picture as a JPEG of at most 500 pixels; False if Pillow cannot decode it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        side = max(image.size)
        if side > SIDE:
            width, height = (max(1, round(length * SIDE / side)) for length in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        image.save(target, "JPEG", quality=QUALITY, subsampling="4:2:0")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's ways to say no
        return False
    return True


def mosaic(paths: Sequence[Path]) -> Any:
    """TILES x TILES pictures as one Pillow image of TILES * 500 by TILES * 375 pixels."""
    from PIL import Image

    width, height = SIDE, SIDE * 3 // 4
    whole = Image.new("RGB", (TILES * width, TILES * height))
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            part = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(part, (i % TILES * width, i // TILES * height))
    return whole


def is_plain_jpeg(path: Path) -> bool:
    """Whether a file is a baseline RGB JPEG that is shown as it is stored: what every peer decodes to the same picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
            plain = image.format == "JPEG" and image.mode == "RGB" and not turned
            return plain and not image.info.get("progressive", 0)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
