"""A progressive JPEG writer in plain Python, from ITU-T T.81 annex G: any script of scans, for the tests of the reader.

Encoders in the field use a handful of scripts; this one writes whatever the standard allows. Components are (v blocks down, h blocks
across, 64) integers in zigzag order, padded to whole MCUs.
"""

from __future__ import annotations

import struct

import numpy as np


def dht(kind: int, number: int, short: bool = False) -> bytes:
    """A table with a code for each symbol that may come: 5 bits for the DC sizes; AC symbols of 8 bits, some of 12, or up to 16."""
    if kind == 0:
        counts, symbols = {5: 12}, list(range(12))
    elif short:
        counts, symbols = {8: 255, 9: 1}, list(range(256))
    else:  # codes longer than any first look-up covers
        counts, symbols = {8: 200, 12: 40, 14: 10, 16: 6}, list(range(256))
    lengths = bytes(counts.get(n, 0) for n in range(1, 17))
    body = bytes([kind << 4 | number]) + lengths + bytes(symbols)
    return b"\xff\xc4" + struct.pack(">H", 2 + len(body)) + body


def codes_of(segment: bytes) -> dict[int, tuple[int, int]]:
    """Symbol to (code, length) of a DHT segment with one table."""
    counts, symbols = segment[5:21], segment[21:]
    code, k, found = 0, 0, {}
    for length in range(1, 17):
        for _ in range(counts[length - 1]):
            found[symbols[k]] = (code, length)
            code, k = code + 1, k + 1
        code <<= 1
    return found


class Bits:
    """Entropy-coded bytes, stuffed, padded with ones."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.out = b""

    def put(self, value: int, size: int) -> None:
        if size:
            self.text.append(format(value, f"0{size}b"))

    def flush(self, marker: bytes = b"") -> None:
        text = "".join(self.text)
        text += "1" * (-len(text) % 8)
        data = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        self.out += data.replace(b"\xff", b"\xff\x00") + marker
        self.text = []


def magnitude(value: int) -> tuple[int, int]:
    """The bits of a value and how many they are."""
    size = abs(value).bit_length()
    return (value if value >= 0 else value + (1 << size) - 1), size


class Scan:
    """One scan: blocks come by ``block``, in order."""

    def __init__(self, first, last, before, after, dc, ac) -> None:
        self.first, self.last, self.before, self.after = first, last, before, after
        self.dc, self.ac, self.bits = dc, ac, Bits()
        self.reset()

    def reset(self) -> None:
        self.pred = [0] * 4
        self.run, self.pending = 0, []

    def symbol(self, table, value: int) -> None:
        self.bits.put(*table[value])

    def end_run(self) -> None:
        if self.run:
            size = self.run.bit_length() - 1
            self.symbol(self.ac, size << 4)
            self.bits.put(self.run - (1 << size), size)
            self.run = 0
        for bit in self.pending:
            self.bits.put(bit, 1)
        self.pending = []

    def restart(self, number: int) -> None:
        self.end_run()
        self.bits.flush(bytes((0xFF, 0xD0 + number % 8)))
        self.reset()

    def block(self, component: int, values: list[int]) -> None:
        if self.first == 0:
            value = values[0] >> self.after
            if self.before:
                self.bits.put(value & 1, 1)
                return
            bits, size = magnitude(value - self.pred[component])
            self.pred[component] = value
            self.symbol(self.dc, size)
            self.bits.put(bits, size)
        elif self.before:
            self.refine(values)
        else:
            self.band(values)

    def band(self, values: list[int]) -> None:
        zeros = 0
        for k in range(self.first, self.last + 1):
            value = abs(values[k]) >> self.after
            if not value:
                zeros += 1
                continue
            self.end_run()
            while zeros > 15:
                self.symbol(self.ac, 0xF0)
                zeros -= 16
            bits, size = magnitude(value if values[k] > 0 else -value)
            self.symbol(self.ac, zeros << 4 | size)
            self.bits.put(bits, size)
            zeros = 0
        if zeros:
            self.run += 1
            if self.run == 0x7FFF:
                self.end_run()

    def refine(self, values: list[int]) -> None:
        parts = {k: abs(values[k]) >> self.after for k in range(self.first, self.last + 1)}
        end = max((k for k, v in parts.items() if v == 1), default=-1)
        zeros, own = 0, []
        for k, value in parts.items():
            if not value:
                zeros += 1
                continue
            while zeros > 15 and k <= end:
                self.end_run()
                self.symbol(self.ac, 0xF0)
                for bit in own:
                    self.bits.put(bit, 1)
                own, zeros = [], zeros - 16
            if value > 1:
                own.append(value & 1)
                continue
            self.end_run()
            self.symbol(self.ac, zeros << 4 | 1)
            self.bits.put(int(values[k] > 0), 1)
            for bit in own:
                self.bits.put(bit, 1)
            own, zeros = [], 0
        if zeros or own:
            self.run += 1
            self.pending += own
            if self.run == 0x7FFF:
                self.end_run()


def write(height: int, width: int, sampling, components, script, intervals=(), fill=0) -> bytes:
    """A progressive JPEG. ``sampling``: (h, v) of each component; ``script``: (components, first, last, before, after) of each scan;
    ``intervals``: restart interval of each scan (0: none); ``fill``: fill bytes in front of markers."""
    alone = len(sampling) == 1
    most = (1, 1) if alone else (max(h for h, _ in sampling), max(v for _, v in sampling))
    mcus_x, mcus_y = -(-width // (8 * most[0])), -(-height // (8 * most[1]))
    quantisation = b"\xff\xdb\x00\x43\x00" + bytes(1 + k // 4 for k in range(64))
    frame = struct.pack(">BHHB", 8, height, width, len(sampling))
    frame += b"".join(bytes((i + 1, h << 4 | v, 0)) for i, (h, v) in enumerate(sampling))
    out = b"\xff\xd8" + quantisation + b"\xff\xc2" + struct.pack(">H", 2 + len(frame)) + frame
    for n, (which, first, last, before, after) in enumerate(script):
        dc, ac = dht(0, n % 4), dht(1, (n + 1) % 4, n % 2 == 0)
        interval = intervals[n] if n < len(intervals) else 0
        out += dc + b"\xff" * fill + ac + b"\xff\xdd\x00\x04" + struct.pack(">H", interval)
        header = bytes([len(which)]) + b"".join(bytes((i + 1, (n % 4) << 4 | (n + 1) % 4)) for i in which)
        out += b"\xff\xda" + struct.pack(">H", 2 + len(header) + 3) + header
        out += bytes((first, last, before << 4 | after))
        scan = Scan(first, last, before, after, codes_of(dc), codes_of(ac))
        if len(which) == 1:
            (c,) = which
            h, v = (1, 1) if alone else sampling[c]
            samples_x, samples_y = -(-width * h // most[0]), -(-height * v // most[1])
            across, down = -(-samples_x // 8), -(-samples_y // 8)
            mcus = [[(c, y, x)] for y in range(down) for x in range(across)]
        else:
            mcus = [
                [
                    (c, y * sampling[c][1] + j, x * sampling[c][0] + i)
                    for c in which
                    for j in range(sampling[c][1])
                    for i in range(sampling[c][0])
                ]
                for y in range(mcus_y)
                for x in range(mcus_x)
            ]
        for number, mcu in enumerate(mcus):
            if interval and number and number % interval == 0:
                scan.restart(number // interval - 1)
            for c, y, x in mcu:
                scan.block(c, components[c][y, x].tolist())
        scan.end_run()
        scan.bits.flush()
        out += scan.bits.out + b"\xff" * fill
    return out + b"\xff\xd9"


def padded(height: int, width: int, sampling) -> list[tuple[int, int]]:
    """Blocks (down, across) of each component, padded to whole MCUs."""
    if len(sampling) == 1:
        return [(-(-height // 8), -(-width // 8))]
    most = max(h for h, _ in sampling), max(v for _, v in sampling)
    mcus_x, mcus_y = -(-width // (8 * most[0])), -(-height // (8 * most[1]))
    return [(mcus_y * v, mcus_x * h) for h, v in sampling]


def random_components(rng: np.random.Generator, height: int, width: int, sampling) -> list[np.ndarray]:
    """Coefficients as photographs have them: most are 0, few are large, some blocks are empty, some full."""
    found = []
    for down, across in padded(height, width, sampling):
        scale = 40.0 / (1 + np.arange(64)) * rng.choice([0, 0, 0.3, 1, 12], (down, across, 1))
        values = np.rint(rng.laplace(0, 1, (down, across, 64)) * scale).astype(np.int64).clip(-1000, 1000)
        values[..., 0] = rng.integers(-500, 500, (down, across))
        found.append(values)
    return found


def read_baseline(data: bytes) -> list[np.ndarray]:
    """The coefficients of a baseline JPEG of one scan, in the form that :func:`write` takes; slow, and made of nothing of ours."""
    at, tables, interval = 2, {}, 0
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker in (0xC0, 0xC1):
            height, width, count = struct.unpack(">HHB", body[1:6])
            sampling = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(count)]
        elif marker == 0xC4:
            while body:
                size = 17 + sum(body[1:17])
                one = codes_of(b"\xff\xc4\0\0" + body[:size])
                tables[body[0]] = {format(code, f"0{n}b"): symbol for symbol, (code, n) in one.items()}
                body = body[size:]
        elif marker == 0xDD:
            interval = int.from_bytes(body, "big")
        elif marker == 0xDA:
            ids = [body[2 + 2 * i] for i in range(count)]
            assert body[0] == count and tuple(body[-3:]) == (0, 63, 0)
            at += 2 + length
            break
        at += 2 + length
    if count == 1:
        sampling = [(1, 1)]
    shapes = padded(height, width, sampling)
    found = [np.zeros((*shape, 64), np.int64) for shape in shapes]
    mcus_x, mcus_y = shapes[0][1] // sampling[0][0], shapes[0][0] // sampling[0][1]
    text, place = "", 0

    def take(n: int) -> str:
        nonlocal place
        place += n
        assert place <= len(text)
        return text[place - n : place]

    def symbol(table: dict[str, int]) -> int:
        code = ""
        while code not in table:
            code += take(1)
        return table[code]

    def value(size: int) -> int:
        bits = take(size)
        return 0 if not size else int(bits, 2) if bits[0] == "1" else int(bits, 2) - (1 << size) + 1

    for mcu in range(mcus_x * mcus_y):
        if mcu % interval == 0:
            assert set(text[place:]) <= {"1"} and len(text) - place < 8
            end = at
            while data[end] != 0xFF or data[end + 1] == 0:
                end += 2 if data[end] == 0xFF else 1
            segment = data[at:end].replace(b"\xff\x00", b"\xff")
            text, place, pred = "".join(format(b, "08b") for b in segment), 0, [0] * count
            last = mcu + interval == mcus_x * mcus_y
            assert data[end + 1] == (0xD9 if last else 0xD0 + mcu // interval % 8)
            at = end + 2
        y, x = divmod(mcu, mcus_x)
        for c, (h, v) in enumerate(sampling):
            for j in range(v):
                for i in range(h):
                    block = found[c][y * v + j, x * h + i]
                    pred[c] += value(symbol(tables[ids[c] >> 4]))
                    block[0] = pred[c]
                    k = 1
                    while k < 64:
                        run, size = divmod(symbol(tables[0x10 | ids[c] & 15]), 16)
                        if size == 0 and run < 15:
                            break
                        k += run
                        block[k] = value(size)
                        k += 1
    assert at == len(data)
    return found
