"""A dataset as files that other tools read: WebDataset tar shards with the index that DALI wants, or a folder with ``labels.csv``.

Stored JPEG bytes are copied and never decoded, raw pixels become lossless PNG, so nothing is lost and a copy runs as fast as the disk;
a PNG file costs time and is about as large as the pixels were. Everything is written to ``OUT/.partial`` and moved to its place when it
is whole. ``convert`` reads both kinds back with the same ids, labels, classes and fields (see :mod:`fastload.exported`).

>>> print(export_data("photos.beton", "shards/", to="webdataset"))
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm.auto import tqdm

from fastload import __version__, codecs
from fastload.dataset import Dataset
from fastload.dataset import open as open_dataset
from fastload.errors import CorruptError, DataError, UsageError
from fastload.exported import CLASSES, MANIFEST, TABLE, Manifest, Spec, make_specs, read_manifest
from fastload.system import usable_cores

TARGETS = ("webdataset", "folder")
SHARD_MIB = 256
_PARTIAL = ".partial"
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_KEY_CHARS = 80  # with a number and an extension it fits into the 100 bytes of a plain tar header, as DALI's own indexer needs
_NAME_BYTES = 160  # of a file's name: file systems take 255
_PNG_LEVEL = 1  # zlib's; 6 takes two to four times the time for 4% less
_AHEAD = 3  # tasks per thread that are read before they are written
_TASK_BYTES, _TASK_IMAGES = 1 << 22, 32  # pixels and samples of one task
_EXTENSION = re.compile(
    r"(?<=[^/])\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|ppm|pgm|jp2|avif|img)$", re.IGNORECASE
)
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)[:148] + b" " * 8
_EMPTY += tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)[
    156:
]  # a header whose checksum is blank, as the sum wants it
_EMPTY_SUM = sum(_EMPTY)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f<>:\"/\\|?*]")


@dataclass(frozen=True)
class DataExport:
    """What :func:`export_data` wrote. ``bytes`` are those of all files; ``renamed`` samples had an id that another one has too.

    ``stored`` counts images by how they were written (``jpeg`` copied, ``png`` from raw pixels), ``files`` are the shards or the table.
    ``left_out`` are image fields beside the image.
    """

    path: str
    to: str
    samples: int
    bytes: int
    seconds: float
    mb_per_s: float
    files: list[str]
    stored: dict[str, int] = field(default_factory=dict)
    renamed: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def read_back(self) -> str:
        """The command that makes a `.beton` file of it again."""
        source = os.path.join(self.path, TABLE) if self.to == "folder" else self.path
        # Large raw images would otherwise be encoded as JPEG.
        exact = " --reencode never" if self.stored.get("png") else ""
        return f"fastload convert {shlex.quote(source)} again.beton{exact}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "read_back": self.read_back}

    def __str__(self) -> str:
        shards = f" in {len(self.files):,} shards" if len(self.files) > 1 else " in 1 shard"
        how = {"jpeg": "JPEG copied", "png": "raw pixels as PNG"}
        lines = ["  images: " + ", ".join(f"{n:,} {how[kind]}" for kind, n in self.stored.items() if n)]
        if self.renamed:
            lines.append(f"  renamed: {self.renamed:,} samples whose id another one has too")
        if self.left_out:
            lines.append(f"  left out: the image fields {', '.join(self.left_out)}")
        lines.append(f"  read back with: {self.read_back}")
        lines.append(
            f"{self.path}: {self.samples:,} samples{shards if self.to == 'webdataset' else ''}, {self.bytes / 1e6:,.1f} MB, "
            f"{self.seconds:.1f} s ({self.mb_per_s:,.0f} MB/s)"
        )
        return "\n".join(lines)


@dataclass(slots=True)
class _Item:
    """One sample on its way: its place in the dataset, image bytes with their extension, and values in the order of the specs."""

    index: int
    image: Any
    suffix: str
    values: list[Any]


def export_data(
    data: Dataset | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "webdataset",
    *,
    shard_mib: float = SHARD_MIB,
    overwrite: bool = False,
    progress: bool = True,
) -> DataExport:
    """Write a dataset (a path, a view, files joined), in its order, to the folder ``out``.

    ``webdataset``: ``NAME-000000.tar`` of at most ``shard_mib`` MiB each (a larger sample has one for itself), with
    ``NAME-000000.idx`` for DALI's ``fn.readers.webdataset``. A sample is KEY.jpg or KEY.png, KEY.cls (the number of its class) and
    KEY.json (id, source, every field). ``folder``: ``CLASS/NAME.jpg`` and ``labels.csv``, without class folders where the label is no
    single class. Both have ``dataset.json`` (what ``convert`` needs to read it back exactly) and ``classes.txt``.

    The same dataset gives the same bytes. Each sample's checksum is compared. ``overwrite`` replaces an earlier export and nothing
    else. Raises UsageError for a wrong call, DataError or CorruptError for wrong data; then nothing new is in ``out``.
    """
    if to not in TARGETS:
        raise UsageError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    if not shard_mib > 0:
        raise UsageError(f"shard_mib must be above 0, got {shard_mib!r}")
    started = time.perf_counter()
    folder = Path(out)
    _check_target(folder, overwrite)
    ds = data if isinstance(data, Dataset) else open_dataset(data)
    made = not folder.exists()
    partial = folder / _PARTIAL
    try:
        if not len(ds):
            raise DataError(f"{ds.path} shows no samples; there is nothing to export")
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        job = _Job(ds, partial, progress)
        if to == "webdataset":
            files = job.webdataset(int(shard_mib * 2**20))
        else:
            files = job.folder()
        size = sum(entry.stat().st_size for entry in partial.rglob("*") if entry.is_file())
        _publish(folder, overwrite)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the disk is full: {folder} got {job.bytes / 1e6:,.1f} MB for {job.done:,} of {len(ds):,} samples; make room or "
            "choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if ds is not data:
            ds.close()
    seconds = time.perf_counter() - started
    return DataExport(
        os.fspath(out), to, job.done, size, seconds, size / 1e6 / max(seconds, 1e-9), [str(folder / name) for name in files],
        dict(job.stored), job.renamed, job.left_out,
    )  # fmt: skip


class _Job:
    """One export into ``folder``, which is empty and not yet at its place."""

    def __init__(self, ds: Dataset, folder: Path, progress: bool) -> None:
        self.ds, self.target, self.progress = ds, folder, progress
        self.specs, self.left_out = make_specs(ds)
        self.id, self.renamed = _ids(ds)
        self.bytes = self.done = 0
        self.stored: Counter[str] = Counter(jpeg=0, png=0)

    def items(self) -> Generator[_Item, None, None]:
        """Samples in order; threads run a bounded distance ahead, compare checksums, and encode PNG."""
        threads = usable_cores()
        waiting: deque[Future[list[_Item]]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="fastload-export")
        tasks: Iterator[range | None] = itertools.chain(self._tasks(), itertools.repeat(None))
        bar = tqdm(
            total=len(self.ds), unit="img", desc="export", disable=not self.progress, delay=1, leave=False
        )
        try:
            with bar:
                while (task := next(tasks)) is not None or waiting:
                    if task is not None:
                        waiting.append(pool.submit(lambda part: [self._item(i) for i in part], task))
                        if len(waiting) < threads * _AHEAD:
                            continue
                    for item in waiting.popleft().result():
                        yield item
                        self.stored["jpeg" if item.suffix == "jpg" else "png"] += 1
                        self.bytes += len(item.image)
                        self.done += 1
                        bar.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tasks(self) -> Iterator[range]:
        """Samples that one thread does in one go: some small ones, or a single large one."""
        sizes = self.ds.heights * self.ds.widths * 3
        start, size = 0, 0
        for i in range(len(sizes)):
            size += int(sizes[i])
            if size >= _TASK_BYTES or i - start + 1 == _TASK_IMAGES:
                yield range(start, i + 1)
                start, size = i + 1, 0
        if start < len(sizes):
            yield range(start, len(sizes))

    def _item(self, i: int) -> _Item:
        reader, at = self.ds.locate(i)
        try:
            if reader.checksum_matches(at) is False:
                raise CorruptError(
                    "its checksum does not match; fastload verify lists all such samples: export a view without them"
                )
            image = reader.image(at, self.ds.image_field)
            values = [reader.value(at, spec.field.name) for spec in self.specs]
        except CorruptError as error:
            raise self.ds.blame(error, i) from None
        if image.mode == "raw":
            return _Item(i, _png(image.data, image.height, image.width), "png", values)
        data = memoryview(image.data)
        if (
            b"Exif\0\0" in data[:4096].tobytes()
        ):  # a .jpg file would be turned by it, an image in a .beton is not
            data = memoryview(codecs.keep_jpeg(data))
        return _Item(i, data, "jpg", values)

    def _plain(self, item: _Item, turn: Callable[[Spec, Any], Any]) -> dict[str, Any]:
        """Id, source and every field as JSON or cells."""
        record = {"id": self.id(item.index), "source": self.ds.sources[item.index]}
        try:
            record.update((spec.key, turn(spec, value)) for spec, value in zip(self.specs, item.values))
        except DataError as error:
            raise DataError(f"sample {item.index}, id {record['id']!r}: {error}") from error
        return record

    def webdataset(self, limit: int) -> list[str]:
        """Shards of at most ``limit`` bytes; returns their names."""
        key = _unique(lambda i: _key(self.id(i)), len(self.ds), "~")[0]
        name = _key(Path(self.ds.path).stem)
        label = next((n for n, s in enumerate(self.specs) if s.field.name == "label" and s.field.kind == "int"), None)  # fmt: skip
        names: list[str] = []
        shard: _Shard | None = None
        try:
            with contextlib.closing(self.items()) as items:
                for item in items:
                    members = [(item.suffix, item.image)]
                    if label is not None:
                        members.append(("cls", str(item.values[label]).encode()))
                    members.append(("json", json.dumps(self._plain(item, Spec.plain)).encode()))
                    if shard is not None and shard.size_with(members) > limit:
                        shard.close()
                        shard = None
                    if shard is None:
                        names.append(f"{name}-{len(names):06d}.tar")
                        shard = _Shard(self.target / names[-1])
                    shard.add(key(item.index), members)
            if shard is not None:
                shard.close()
        except BaseException:
            if shard is not None:
                shard.abandon()
            raise
        self._describe("webdataset", names)
        return names

    def folder(self) -> list[str]:
        """Images in class folders (flat where the label is no class) and the table; returns its name."""
        label = next((n for n, s in enumerate(self.specs) if s.field.name == "label" and s.field.kind == "int"), None)  # fmt: skip
        parents: list[str] = [""] * len(self.ds)
        if label is not None:
            plain = self.specs[label].plain
            codes = self.ds.column("label").tolist()
            found = sorted(set(codes))
            class_folder = _unique(lambda n: _file_name(str(plain(found[n]))), len(found), "~", fold=True)[0]
            folders = {code: class_folder(n) for n, code in enumerate(found)}
            parents = [folders[code] for code in codes]
            for folder in folders.values():
                (self.target / folder).mkdir()

        def in_class(i: int) -> str:
            stem = _file_name(_EXTENSION.sub("", self.id(i).rpartition("/")[2]))
            return f"{parents[i]}/{stem}" if parents[i] else stem

        path = _unique(in_class, len(self.ds), "~", fold=True)[0]
        with open(self.target / TABLE, "w", encoding="utf-8", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["path", "id", "source", *(spec.key for spec in self.specs)])
            with contextlib.closing(self.items()) as items:
                for item in items:
                    name = f"{path(item.index)}.{item.suffix}"
                    rows.writerow([name, *self._plain(item, Spec.cell).values()])
                    with open(self.target / name, "xb", buffering=0) as file:
                        _write(file, item.image)
        self._describe("folder", [])
        return [TABLE]

    def _describe(self, to: str, shards: list[str]) -> None:
        manifest = Manifest(to, len(self.ds), self.specs, tuple(shards), f"fastload {__version__}")
        _save(self.target / MANIFEST, manifest.to_json() + "\n")
        names = next((spec.classes for spec in self.specs if spec.field.name == "label"), ())
        if names:
            _save(self.target / CLASSES, "".join(f"{' '.join(name.splitlines())}\n" for name in names))


class _Shard:
    """One tar file and its index. Every member has one plain header, so offsets are known as they are written.

    The index is that of DALI's ``wds2idx``, version 1.2: a line for each sample with extension, offset, size and name of each member.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "xb", buffering=1 << 20)
        self._at = 0
        self._lines: list[str] = []

    def size_with(self, members: list[tuple[str, Any]]) -> int:
        """Bytes that the shard would have with one more sample."""
        size = self._at + sum(_BLOCK + _padded(len(data), _BLOCK) for _, data in members)
        return _padded(size + 2 * _BLOCK, _RECORD)

    def add(self, key: str, members: list[tuple[str, Any]]) -> None:
        """Append a sample: (extension, bytes) of each member."""
        line = []
        for suffix, data in members:
            name, size = f"{key}.{suffix}", len(data)
            line.append(f"{suffix} {self._at + _BLOCK} {size} {name}")
            self._file.write(_header(name, size))
            self._file.write(data)
            self._file.write(bytes(_padded(size, _BLOCK) - size))
            self._at += _BLOCK + _padded(size, _BLOCK)
        self._lines.append(" ".join(line))

    def abandon(self) -> None:
        """Let go of the file, which is about to be removed."""
        with contextlib.suppress(OSError):  # a full disk, again
            self._file.close()

    def close(self) -> None:
        """End the archive, write the index, and wait until both are on the disk."""
        with self._file as file:
            file.write(bytes(_padded(self._at + 2 * _BLOCK, _RECORD) - self._at))
            file.flush()
            os.fsync(file.fileno())
        text = "\n".join([f"v1.2 {len(self._lines)}", *self._lines, ""])
        _save(self.path.with_suffix(".idx"), text)


def _header(name: str, size: int) -> bytes:
    """A tar header (ustar), the same as ``tarfile`` makes for these but ten times as fast."""
    digits, letters = b"%011o" % size, name.encode("ascii")
    if len(letters) > 100 or len(digits) > 11:
        raise ValueError(f"{name} of {size} bytes does not fit into a plain tar header")
    total = _EMPTY_SUM + sum(letters) + sum(digits) - 11 * 0x30
    return b"".join(
        (
            letters.ljust(100, b"\0"),
            _EMPTY[100:124],
            digits,
            _EMPTY[135:148],
            b"%06o\0 " % total,
            _EMPTY[156:],
        )
    )


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _write(file: Any, data: Any) -> None:
    """All of the bytes to an unbuffered file, which may take them in pieces."""
    view = memoryview(data)
    while view.nbytes:
        view = view[file.write(view) :]


def _save(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _png(pixels: np.ndarray, height: int, width: int) -> bytes:
    """(height * width * 3,) uint8 RGB as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    image.save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


# -- names


def _ids(ds: Dataset) -> tuple[Callable[[int], str], int]:
    """An id for each sample that no other one has, and how many had to be changed.

    Joined files may count their samples alike: then, as in ``convert``, the file's name goes before each id.
    """
    plain: Callable[[int], str] = ds.ids.__getitem__
    get, renamed = _unique(plain, len(ds), "#")
    if not renamed or len(ds.paths) == 1:
        return get, renamed
    get, _ = _unique(lambda i: f"{Path(ds.locate(i)[0].path).stem}/{plain(i)}", len(ds), "#")
    return get, len(ds)


def _unique(
    get: Callable[[int], str], count: int, mark: str, *, fold: bool = False
) -> tuple[Callable[[int], str], int]:
    """Names that differ: a second ``a`` becomes ``a~2`` (for the mark ``~``), and the number of those. 8 bytes per name.

    ``fold``: names that differ in case only are alike, as file systems of other machines have it.
    """

    def same(name: str) -> str:
        return name.casefold() if fold else name

    hashes = np.fromiter((hash(same(get(i))) for i in range(count)), np.int64, count)
    known, counts = np.unique(hashes, return_counts=True)
    many = known[counts > 1]
    changed: dict[int, str] = {}
    used: dict[str, int] = {}  # names of the suspicious hashes, and the last number given
    for i in np.flatnonzero(np.isin(hashes, many)).tolist() if many.size else ():
        name = get(i)
        number = used.setdefault(same(name), 0) + 1
        while number > 1:
            tried = same(f"{name}{mark}{number}")
            place = int(np.searchsorted(known, hash(tried)))
            if place == len(known) or known[place] != hash(tried):
                changed[i] = f"{name}{mark}{number}"
                break
            number += 1
        used[same(name)] = number
    return (lambda i: changed[i] if i in changed else get(i)) if changed else get, len(changed)


def _key(id: str) -> str:
    """The key of a sample in a shard: letters, digits, ``_``, ``-``, ``/`` between them, everything else as %XX; no dot, because the first dot ends a key."""
    text = quote(_EXTENSION.sub("", id)).replace(".", "%2E").replace("~", "%7E") or "_"
    if text.startswith("/") or text.endswith("/") or "//" in text:
        text = text.replace("/", "%2F")
    return _shortened(text, id, _KEY_CHARS)


def _file_name(text: str) -> str:
    """A name that every file system takes, as near to the text as can be."""
    name = _UNSAFE.sub("_", text).strip().rstrip(".")
    if name.startswith("."):  # it would be hidden, or the folder above
        name = f"_{name[1:]}"
    return _shortened(name or "_", text, _NAME_BYTES)


def _shortened(name: str, whole: str, limit: int) -> str:
    raw = name.encode()
    if len(raw) <= limit:
        return name
    digest = hashlib.blake2b(whole.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
    return raw[: limit - 17].decode("utf-8", "ignore") + f"~{digest}"


# -- the folder


def _check_target(folder: Path, overwrite: bool) -> None:
    parent = folder.absolute().parent
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to export to")
    if not parent.is_dir():
        raise UsageError(f"the folder {parent} does not exist; make it first: mkdir -p {parent}")
    if not os.access(folder if folder.is_dir() else parent, os.W_OK):
        raise UsageError(f"{folder} is not writable; choose another place")
    _earlier(folder, overwrite)


def _earlier(folder: Path, overwrite: bool) -> list[Path]:
    """What an earlier export left at the top of the folder. UsageError where that is not to be replaced, or anything else is there."""
    entries = [entry for entry in folder.iterdir() if entry.name != _PARTIAL] if folder.is_dir() else []
    if not entries:
        return []
    manifest = read_manifest(folder)
    if not overwrite:
        cure = "or replace it with --overwrite" if manifest is not None else "or empty it"
        raise UsageError(f"{folder} is not empty; choose another folder, {cure}")
    if manifest is None:
        raise UsageError(
            f"{folder} holds no earlier export, and --overwrite replaces nothing else; choose another folder"
        )
    ours = {MANIFEST, CLASSES, TABLE}
    for shard in manifest.shards:
        ours |= {shard, Path(shard).with_suffix(".idx").name}
    if manifest.to == "folder" and (folder / TABLE).exists():
        with open(folder / TABLE, encoding="utf-8", newline="") as file:
            ours.update(row[0] for row in csv.reader(file) if row)
    for top, folders, files in os.walk(folder):
        if _PARTIAL in folders and top == str(folder):
            folders.remove(_PARTIAL)
        for name in files:
            path = Path(top, name).relative_to(folder).as_posix()
            if path not in ours:
                raise UsageError(
                    f"{folder} holds {path!r}, which no export wrote; move it away, or choose another folder"
                )
    return entries


def _publish(folder: Path, overwrite: bool) -> None:
    """Move what is ready to its place, the manifest last, because it says that all is there."""
    old = _earlier(folder, overwrite)
    for entry in sorted(old, key=lambda path: path.name != MANIFEST):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for entry in sorted((folder / _PARTIAL).iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        entry.rename(folder / entry.name)
