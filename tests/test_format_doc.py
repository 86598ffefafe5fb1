"""docs/format.md is enough: a reader, a writer and a crop made from its text alone, with the standard library and Pillow.

Nothing of the container's code is used here; files to read are made by the public functions and read back beside it.
"""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastload

GOLDEN = Path(__file__).parent / "golden" / "v1.beton"
DOC = Path(__file__).parents[1] / "docs" / "format.md"
KINDS = {0: "float", 1: "int", 2: "image", 3: "bytes", 4: "ndarray", 5: "json"}
MEMBERS = {
    "float": (8, 8),
    "int": (8, 8),
    "image": (13, 1),
    "bytes": (16, 1),
    "ndarray": (8, 8),
    "json": (16, 1),
}
ELEMENTS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "f4": "f",
    "f8": "d",
}
NO_SAMPLE = 2**64 - 1


def align(x, n):
    return (x + n - 1) // n * n


def row_layout(kinds):
    """Section 4: offsets of the members, and the row size."""
    offsets, at, largest = [], 0, 1
    for kind in kinds:
        size, alignment = MEMBERS[kind]
        at = align(at, alignment)
        offsets.append(at)
        at += size
        largest = max(largest, alignment)
    return offsets, align(at, largest)


class DocReader:
    """Sections 1 to 7: every value of a file as plain Python, every checksum compared."""

    def __init__(self, path):
        self.data = Path(path).read_bytes()
        version, fields, self.page, self.count, table = struct.unpack_from("<HHIQQ", self.data, 0)
        assert version == 2
        self.names, self.kinds, self.types, arguments = [], [], [], []
        for i in range(fields):
            type_id, name, args = struct.unpack_from("<B16s1024s", self.data, 24 + 1041 * i)
            self.names.append(name.rstrip(b"\0").decode("ascii"))
            self.kinds.append(KINDS[type_id])
            arguments.append(args)
            self.types.append(self._array_type(args) if type_id == 4 else None)
        self.offsets, self.row_size = row_layout(self.kinds)
        self.rows_at = 24 + 1041 * fields
        self.table = list(struct.iter_unpack("<QQQ", self.data[table:]))
        assert table >= self.rows_at + self.count * self.row_size and table % 8 == 0
        self._read_index(arguments[0])
        self._check_pages()

    @staticmethod
    def _array_type(args):
        shape = [n for n in struct.unpack_from("<32Q", args, 0) if n]
        (length,) = struct.unpack_from("<Q", args, 256)
        ((_, text),) = json.loads(args[264 : 264 + length])
        return shape, (">" if text[0] == ">" else "<") + str(int(np.prod(shape))) + ELEMENTS[text[1:]]

    def _read_index(self, args):
        magic, version, reserved, crc, ptr, size = struct.unpack("<8sHHIQQ", args[960:992])
        assert (magic, version, reserved, args[992:]) == (b"fastload", 1, 0, bytes(32)) and ptr % 8 == 0
        region = self.data[ptr : ptr + size]
        (length,) = struct.unpack_from("<Q", region, 0)
        blob = region[8 : 8 + length]
        assert zlib.crc32(blob) == crc and length % 8 == 0
        index = json.loads(blob)
        self.info, self.sections = index["info"], {}
        for name, (at, size, crc) in index["sections"].items():
            self.sections[name] = region[at : at + size]
            assert at % 8 == 0 and len(self.sections[name]) == size and zlib.crc32(self.sections[name]) == crc
        self.own = ptr, len(region)

    def _check_pages(self):
        assert 2**21 <= self.page <= 2**31 and self.page.bit_count() == 1
        addresses = [ptr for _, ptr, _ in self.table]
        assert len(set(addresses)) == len(addresses)
        slots = sum(kind not in ("int", "float") for kind in self.kinds)
        for number, (sample, ptr, size) in enumerate(self.table):
            assert size == 0 or ptr // self.page == (ptr + size - 1) // self.page
            assert sample == (number // slots if number < slots * self.count else NO_SAMPLE)
        for i in range(self.count):  # all of a sample in one page
            assert len({ptr // self.page for _, ptr, _ in self.table[slots * i : slots * (i + 1)]}) <= 1
        ours = self.table[slots * self.count :]
        assert ours[0][1] == self.own[0] and sum(size for _, _, size in ours) == self.own[1]

    def strings(self, what):
        if f"{what}_ends" not in self.sections:
            return self.strings("id") if what == "source" else [str(i) for i in range(self.count)]
        ends = struct.unpack(f"<{self.count}Q", self.sections[f"{what}_ends"])
        text = self.sections[f"{what}_text"]
        return [text[start:end].decode() for start, end in zip((0, *ends), ends)]

    def sample(self, i):
        """Values by name; images as (mode, height, width, bytes). Compares the sample's checksum."""
        row = self.data[self.rows_at + i * self.row_size :][: self.row_size]
        crc, values, slot = zlib.crc32(row), {}, 0
        slots = sum(kind not in ("int", "float") for kind in self.kinds)
        for name, kind, at, array in zip(self.names, self.kinds, self.offsets, self.types):
            if kind in ("int", "float"):
                (values[name],) = struct.unpack_from("<q" if kind == "int" else "<d", row, at)
                continue
            entry = self.table[i * slots + slot]
            slot += 1
            if kind == "image":
                mode, width, height, ptr = struct.unpack_from("<BHHQ", row, at)
                size = height * width * 3 if mode == 1 else entry[2]
            elif kind == "ndarray":
                (ptr,) = struct.unpack_from("<Q", row, at)
                size = struct.calcsize(array[1])
            else:
                ptr, size = struct.unpack_from("<QQ", row, at)
            assert entry == (i, ptr, size)
            blob = self.data[ptr : ptr + size]
            crc = zlib.crc32(blob, crc)
            if kind == "image":
                values[name] = mode, height, width, blob
            elif kind == "json":
                assert blob.endswith(b"\0")
                values[name] = json.loads(blob.split(b"\0")[0])
            else:
                values[name] = blob if kind == "bytes" else (array[0], struct.unpack(array[1], blob))
        assert crc == struct.unpack_from("<I", self.sections["crc"], 4 * i)[0]
        return values


def pixels_of(image):
    mode, height, width, blob = image
    if mode == 1:
        return np.frombuffer(blob, np.uint8).reshape(height, width, 3)
    with Image.open(io.BytesIO(blob)) as picture:
        assert picture.size == (width, height)
        return np.asarray(picture.convert("RGB"))


def test_the_golden_file():
    """The values are those its makers put in."""
    file = DocReader(GOLDEN)
    assert (file.names, file.kinds) == (
        ["image", "label", "weight", "note", "text"],
        ["image", "int", "float", "json", "bytes"],
    )
    assert (file.offsets, file.row_size) == ([0, 16, 24, 32, 48], 64)  # as in the text
    assert file.info == {"classes": {"label": ["cat", "dog"]}, "created_by": "fastload 0.1.0"}
    assert file.strings("id") == ["a/0", "a/1", "b/2", "b/3"] and file.strings("source")[3] == "b/3.png"
    y, x = np.mgrid[:24, :40]
    for i in range(4):
        sample = file.sample(i)
        assert (sample["label"], sample["weight"], sample["note"], sample["text"]) == (
            i // 2,
            i + 0.5,
            {"i": i},
            b"t" * i,
        )
        expected = np.stack([x * 6, y * 10, np.full_like(x, 60 * i)], axis=2)
        assert sample["image"][0] == i % 2
        assert np.abs(pixels_of(sample["image"]).astype(int) - expected).max() <= (0 if i % 2 else 12)


def test_alignment_examples_of_the_text():
    assert row_layout(["image", "int"]) == ([0, 16], 24)
    assert row_layout(["image"]) == ([0], 13)
    assert row_layout(["image", "bytes", "int"]) == ([0, 13, 32], 40)


@pytest.fixture
def every_kind(small):
    """A field of each kind, as make_beton takes them."""
    with fastload.open(small) as ds:
        field = type(ds.fields["label"])
    return (
        field("text", "bytes"),
        field("number", "int"),
        field("real", "float"),
        field("a_name_of_16_byt", "json"),
        field("vector", "ndarray", "<f4", (2, 3)),
        field("counts", "ndarray", "|u1", (5,)),
    )


@pytest.mark.parametrize(("store", "size", "count"), [("mixed", None, 20), ("raw", (500, 400), 12)])
def test_a_new_file(beton_file, picture, every_kind, store, size, count):
    path = beton_file(store=store, size=size, count=count, extra=every_kind)
    file = DocReader(path)
    assert file.count == count and file.names[5] == "a_name_of_16_byt"
    assert size is None or len(file.data) > 3 * file.page  # the second file has several pages
    assert file.strings("id") == [f"id-{i}" for i in range(count)]
    assert file.strings("source") == [f"class{i % 4}/{i}.jpg" for i in range(count)]
    with fastload.open(path) as ds:
        assert ds.info == file.info
        for i in range(count):
            ours, theirs = file.sample(i), ds[i]
            mode, height, width, _ = ours["image"]
            exact = picture(height, width, i)
            error = np.abs(pixels_of(ours["image"]).astype(int) - exact)
            assert error.max() == 0 if mode == 1 else error.mean() < 12
            assert np.abs(pixels_of(ours["image"]).astype(int) - theirs["image"]).max() <= 1
            assert (ours["label"], ours["number"], ours["real"]) == (i % 4, i * 10, i / 4)
            assert ours["text"] == (f"text {i}".encode() if i else b"")
            assert ours["a_name_of_16_byt"] == {"number": i, "list": [i] * 3}
            assert ours["vector"] == ([2, 3], (float(i),) * 6) and ours["counts"] == ([5], (i,) * 5)


def encode_value(kind, value):
    if kind == "json":
        return json.dumps(value).encode() + b"\0"
    if kind == "ndarray":
        return struct.pack(f"<{len(value)}f", *value)
    return value[3] if kind == "image" else value


def write_by_the_doc(path, fields, samples, ids, info):
    """A whole writer: ``fields`` are (name, kind) pairs, arrays are three floats."""
    kinds = [kind for _, kind in fields]
    offsets, row_size = row_layout(kinds)
    numbers = {kind: number for number, kind in KINDS.items()}
    page, rows, table, crcs = 1 << 21, b"", [], b""
    data = bytearray(align(24 + 1041 * len(fields) + row_size * len(samples), 64))
    for i, sample in enumerate(samples):
        blobs = [None if k in ("int", "float") else encode_value(k, v) for k, v in zip(kinds, sample)]
        total = sum(max(len(blob), 1) for blob in blobs if blob is not None)
        while total > page:
            page *= 2
        if len(data) // page != (len(data) + total - 1) // page:
            data += bytes(align(len(data), page) - len(data))
        row = bytearray(row_size)
        for kind, at, value, blob in zip(kinds, offsets, sample, blobs):
            if kind == "image":
                struct.pack_into("<BHHQ", row, at, value[0], value[2], value[1], len(data))
            elif blob is None:
                struct.pack_into("<q" if kind == "int" else "<d", row, at, value)
            elif kind == "ndarray":
                struct.pack_into("<Q", row, at, len(data))
            else:
                struct.pack_into("<QQ", row, at, len(data), len(blob))
            if blob is not None:
                table.append((i, len(data), len(blob)))
                data += blob or b"\0"
        crcs += struct.pack("<I", zlib.crc32(b"".join([bytes(row), *(b for b in blobs if b is not None)])))
        rows += row
    text = [one.encode() for one in ids]
    ends = [len(b"".join(text[: i + 1])) for i in range(len(text))]
    sections = {"crc": crcs, "id_ends": struct.pack(f"<{len(ends)}Q", *ends), "id_text": b"".join(text)}
    length = 1024  # a JSON of any length will do, as long as blanks fill it up
    places, region = {}, bytearray(8 + length)
    for name, section in sections.items():
        places[name] = [len(region), len(section), zlib.crc32(section)]
        region += section + bytes(align(len(section), 8) - len(section))
    blob = json.dumps({"info": info, "sections": places}).encode().ljust(length)
    region[: 8 + length] = struct.pack("<Q", length) + blob
    data += bytes(align(len(data), 8) - len(data))
    start = len(data)
    data += region
    for at in range(start // page * page, len(data), page):
        low, high = max(at, start), min(at + page, start + len(region))
        table.append((NO_SAMPLE, low, high - low))
    table_at = len(data)
    data += b"".join(struct.pack("<QQQ", *entry) for entry in table)
    head = struct.pack("<HHIQQ", 2, len(fields), page, len(samples), table_at)
    for number, (name, kind) in enumerate(fields):
        arguments = bytearray(1024)
        if kind == "ndarray":
            description = b'[["", "<f4"]]'
            struct.pack_into("<32QQ", arguments, 0, 3, *[0] * 31, len(description))
            arguments[264 : 264 + len(description)] = description
        if number == 0:
            struct.pack_into(
                "<8sHHIQQ", arguments, 960, b"fastload", 1, 0, zlib.crc32(blob), start, len(region)
            )
        head += struct.pack("<B16s1024s", numbers[kind], name.encode(), bytes(arguments))
    data[: len(head) + len(rows)] = head + rows
    Path(path).write_bytes(data)


def test_a_file_written_by_the_text_is_one_of_ours(tmp_path, picture):
    fields = [
        ("vector", "ndarray"),
        ("image", "image"),
        ("text", "bytes"),
        ("label", "int"),
        ("real", "float"),
        ("note", "json"),
    ]
    sizes = [
        (40, 50),
        (700, 700),
        (700, 700),
        (900, 900),
        (30, 30),
    ]  # the fourth is larger than a page of 2 MiB
    samples, shots = [], []
    for i, (height, width) in enumerate(sizes):
        shots.append(picture(height, width, i))
        image = (1, height, width, shots[-1].tobytes())
        samples.append(((i, 0.5, -i), image, b"x" * i, i - 2, i / 8, {"i": i}))
    ids = [f"bild-ü-{i}" for i in range(len(sizes))]
    path = tmp_path / "by_hand.beton"
    write_by_the_doc(path, fields, samples, ids, {"classes": {}, "mine": 1})
    assert DocReader(path).page == 1 << 22
    with fastload.open(path) as ds:
        assert ds.info["mine"] == 1 and list(ds.ids) == ids and list(ds.sources) == ids
        result = fastload.verify(ds)
        assert result.ok and result.has_checksums and result.samples == len(sizes)
        for i, sample in enumerate(ds):
            assert np.array_equal(sample["image"], shots[i]) and sample["vector"].tolist() == [i, 0.5, -i]
            assert (sample["text"], sample["label"], sample["real"]) == (b"x" * i, i - 2, i / 8)
            assert sample["note"] == {"i": i}


class DocJpeg:
    """Section 9: the header of a JPEG, its index, and how a crop is cut."""

    def __init__(self, data):
        self.data = data
        assert data[:4] == b"\xff\xd8\xff\xea" and data[6:15] == b"fastload\x01"
        length = int.from_bytes(data[4:6], "big")
        count = (length - 11) // 2
        self.lengths = struct.unpack_from(f"<{count}H", data, 15)
        self.tables_at = at = 4 + length
        while True:
            marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            body = data[at + 4 : at + 2 + length]
            assert data[at] == 0xFF
            if marker in (0xC0, 0xC1):
                self.frame_at = at
                self.height, self.width = struct.unpack(">HH", body[1:5])
                factors = [divmod(body[7 + 3 * i], 16) for i in range(body[5])]
                if len(factors) == 1:
                    factors = [(1, 1)]
                self.mcu_w, self.mcu_h = (8 * max(f[k] for f in factors) for k in (0, 1))
            if marker == 0xDD:
                self.interval = int.from_bytes(body, "big")
            at += 2 + length
            if marker == 0xDA:
                self.scan_at = at
                break
        self.mcus_x, self.mcus_y = -(-self.width // self.mcu_w), -(-self.height // self.mcu_h)
        self.across = self.mcus_x // self.interval
        assert self.mcus_x % self.interval == 0 and len(self.lengths) == self.across * self.mcus_y
        assert self.scan_at + sum(self.lengths) == len(data)

    def cut(self, y0, x0, y1, x1):
        """(JPEG, top, left) of the crop that covers the window."""
        step = self.interval * self.mcu_w
        r0, r1, c0, c1 = y0 // self.mcu_h, -(-y1 // self.mcu_h), x0 // step, -(-x1 // step)
        height = min(r1 * self.mcu_h, self.height) - r0 * self.mcu_h
        width = min(c1 * step, self.width) - c0 * step
        head = bytearray(b"\xff\xd8" + self.data[self.tables_at : self.scan_at])
        at = 2 + self.frame_at - self.tables_at + 5
        head[at : at + 4] = struct.pack(">HH", height, width)
        numbers = [r * self.across + c for r in range(r0, r1) for c in range(c0, c1)]
        parts = [bytes(head)]
        for k, number in enumerate(numbers):
            start = self.scan_at + sum(self.lengths[:number])
            segment = self.data[start : start + self.lengths[number]]
            last = number == len(self.lengths) - 1
            assert segment[-2:] == (b"\xff\xd9" if last else bytes((0xFF, 0xD0 + number % 8)))
            end = b"\xff\xd9" if k == len(numbers) - 1 else bytes((0xFF, 0xD0 + k % 8))
            parts.append(segment[:-2] + end)
        return b"".join(parts), r0 * self.mcu_h, c0 * step


def brightness(data):
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("L", picture.size)  # the first component as it is, without colour conversion
        return np.asarray(picture)


def original(pixels, mode, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def test_a_crop_cut_by_the_text_equals_the_whole(tmp_path, picture):
    rng = np.random.default_rng(0)
    sources = [picture(203, 331, 1)]  # encoded by us; the rest keep their coefficients
    sources += [original(picture(150 + 11 * s, 517, s), "RGB", subsampling=s) for s in (0, 1, 2)]
    sources += [original(picture(97, 240, 5), "L"), original(picture(64, 640, 6), "RGB", optimize=True)]
    path = tmp_path / "crops.beton"
    fastload.convert([(one, 0) for one in sources], path, store="jpeg", progress=False)
    file = DocReader(path)
    assert file.count == len(sources)
    for i in range(file.count):
        mode, height, width, data = file.sample(i)["image"]
        jpeg = DocJpeg(data)
        assert mode == 0 and (jpeg.height, jpeg.width) == (height, width)
        fits = [d for d in range(1, jpeg.mcus_x + 1) if jpeg.mcus_x % d == 0]
        fits = [d for d in fits if jpeg.mcus_x // d * jpeg.mcus_y <= 32762]
        target = 56 / jpeg.mcu_w
        assert jpeg.interval == min(fits, key=lambda d: (max(d / target, target / d), d))
        whole, light = pixels_of((0, height, width, data)), brightness(data)
        for _ in range(12):
            y0, x0 = int(rng.integers(0, height)), int(rng.integers(0, width))
            y1, x1 = int(rng.integers(y0 + 1, height + 1)), int(rng.integers(x0 + 1, width + 1))
            crop, top, left = jpeg.cut(y0, x0, y1, x1)
            got = np.asarray(Image.open(io.BytesIO(crop)).convert("RGB"))
            bottom, right = top + got.shape[0], left + got.shape[1]
            assert top <= y0 < y1 <= bottom and left <= x0 < x1 <= right
            assert np.array_equal(brightness(crop), light[top:bottom, left:right])
            # Smooth chroma looks past a cut, never past the border of the image.
            up, down = 2 * (top > 0), 2 * (bottom < height)
            near, far = 2 * (left > 0), 2 * (right < width)
            inner = whole[top + up : bottom - down, left + near : right - far]
            assert np.array_equal(got[up : got.shape[0] - down, near : got.shape[1] - far], inner)


def test_the_files_of_an_unfinished_conversion(tmp_path, picture):
    """Section 11: nine images, of which the sixth is broken and stops the work."""
    images = [picture(20, 30 + i, i) for i in range(9)]
    items = [(b"no image" if i == 5 else one, i % 3) for i, one in enumerate(images)]
    path = tmp_path / "cut.beton"
    with pytest.raises(fastload.FastloadError):
        fastload.convert(items, path, store="raw", resume=True, workers=1, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.beton.journal", "cut.beton.partial"]
    journal = Path(f"{path}.journal").read_bytes()
    partial = Path(f"{path}.partial").read_bytes()
    payloads, at = [], 0
    while at < len(journal):
        length, crc = struct.unpack_from("<II", journal, at)
        payloads.append(journal[at + 8 : at + 8 + length])
        assert zlib.crc32(payloads[-1]) == crc
        at += 8 + length
    head = json.loads(payloads[0])
    assert head["journal"] == 1 and head["capacity"] == 9 and head["fingerprint"]
    assert [kind for _, kind, *_ in head["fields"]] == ["image", "int"]
    assert not any(partial[: align(24 + 2 * 1041 + 9 * 24, 64)]) and len(payloads) == 6
    for i, payload in enumerate(payloads[1:]):
        kind, crc, id_size, end, page = struct.unpack_from("<cIIQQ", payload)
        row, entry = payload[25:49], struct.unpack_from("<QQQ", payload, 49)
        _, width, height, ptr = struct.unpack_from("<BHHQ", row)
        blob = partial[ptr : ptr + height * width * 3]
        assert blob == images[i].tobytes() and entry == (i, ptr, len(blob)) and ptr + len(blob) == end
        assert (kind, page) == (b"S", 1 << 21) and crc == zlib.crc32(row + blob)
        assert (
            struct.unpack_from("<q", row, 16) == (i % 3,) and len(payload[73 : 73 + id_size]) == id_size > 0
        )


def test_what_convert_writes_about_itself_is_in_the_text(tmp_path, picture):
    table = tmp_path / "list.csv"
    Image.fromarray(picture(30, 40)).save(tmp_path / "a.png")
    table.write_text("path,label,a name that is too long for a field\na.png,cat,3\n", encoding="utf-8")
    fastload.convert(table, tmp_path / "a.beton", progress=False)
    file, text = DocReader(tmp_path / "a.beton"), DOC.read_text(encoding="utf-8")
    assert file.sample(0)["label"] == 0 and file.info["classes"] == {"label": ["cat"]}
    assert file.info["field_titles"] == {file.names[2]: "a name that is too long for a field"}
    for key in (*file.info, *file.info["encoding"], *file.sections):
        assert f"`{key}`" in text, f"docs/format.md does not name {key}"
