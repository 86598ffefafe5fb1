"""Small JPEG files of each kind, and ways to damage them: what the fuzzer of the crop kernels feeds on.

Each ``damage_`` function changes a bytearray in place, as well as its kind of damage fits the file; ``pool`` are files to take
pieces from. Nothing is drawn but from the generator that is handed in, so a case can be made again from its number.

>>> bad = mutate(seeds()[0], np.random.default_rng(0), seeds())
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from fastload import codecs
from fastload.kernels import jpeg

_NUMBERS = (0, 1, 2, 7, 8, 16, 17, 255, 256, 4096, 32768, 65535)


def picture(height, width, seed=0, noise=8.0):
    """(height, width, 3) uint8 that is neither flat nor noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(y / (7 + seed % 5))[..., None] + 55 * np.cos(x[..., None] / (5 + np.arange(3)))
    return np.clip(base + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)


def _pillow(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def seeds() -> list[bytes]:
    """Small files of each kind: all sampling modes, grey, with restart markers and index and without; and unsupported ones."""
    made = []
    sizes = [(8, 8), (17, 33), (48, 64), (40, 96), (9, 70), (96, 50), (1, 1)]
    for i, mode in enumerate(["444", "422", "440", "420", "420", "Gray", "444"]):
        pixels = picture(*sizes[i], i)
        if mode == "Gray":
            plain = simplejpeg.encode_jpeg(pixels[..., :1].copy(), 80, "GRAY", "GRAY")
        else:
            plain = simplejpeg.encode_jpeg(pixels, 60 + 6 * i, "RGB", mode)
        made += [plain, codecs.keep_jpeg(plain)]
    for i, (mode, subsampling) in enumerate(
        [("RGB", "4:2:0"), ("RGB", "4:2:2"), ("RGB", "4:4:4"), ("L", "4:2:0")]
    ):
        options = {"quality": (30, 75, 90, 100)[i], "optimize": i % 2 == 1, "restart_marker_blocks": 1 + i}
        if mode == "RGB":
            options["subsampling"] = subsampling
        plain = _pillow(picture(30 + 11 * i, 90 - 13 * i, i, 2.0), mode, **options)
        made += [plain, codecs.keep_jpeg(plain)]
    made.append(codecs.encode_jpeg(picture(60, 90, 3), 90))
    made.append(codecs.encode_jpeg(np.full((64, 64, 3), 200, np.uint8), 50))
    # What the kernel leaves to others: progressive, four components, 4:1:1, and 12 bits by its header.
    made.append(_pillow(picture(40, 40), progressive=True))
    made.append(_pillow(picture(24, 24), "CMYK"))
    made.append(simplejpeg.encode_jpeg(picture(32, 64), 75, "RGB", "411"))
    made.append(made[4].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"))
    return made


def segments_of(data):
    """(marker, begin, end) of the header segments, the last being SOS where there is one."""
    at, found = 2, []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], at, min(end, len(data))))
        at = end
        if found[-1][0] == 0xDA:
            break
    return found


def _scan_at(data):
    found = segments_of(data)
    return min(found[-1][2] if found else 2, max(len(data) - 1, 0))


def _markers(data):
    start = _scan_at(data)
    return [i for i in range(start, len(data) - 1) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]


def pick(rng, items):
    return items[int(rng.integers(0, len(items)))]


def _put(data, at, value, size=1):
    if at >= 0 and at + size <= len(data):
        data[at : at + size] = int(value).to_bytes(size, "big")


def _segment(data, rng, *markers):
    found = [s for s in segments_of(data) if not markers or s[0] in markers]
    return pick(rng, found) if found else (0, 2, min(20, len(data)))


def _insert(data, rng, segment):
    found = segments_of(data)
    at = pick(rng, [b for _, b, _ in found]) if found else 2
    data[at:at] = segment


def damage_bits(data, rng, pool):
    start = _scan_at(data)
    for _ in range(int(rng.integers(1, 9))):
        data[int(rng.integers(start, len(data)))] ^= 1 << int(rng.integers(0, 8))


def damage_bytes(data, rng, pool):
    for _ in range(int(rng.integers(1, 6))):
        data[int(rng.integers(0, len(data)))] = pick(rng, (0, 1, 0xFF, 0xD0, 0xD9, int(rng.integers(0, 256))))


def damage_end(data, rng, pool):
    del data[int(rng.integers(0, len(data))) :]
    if rng.integers(0, 2):
        data += b"\xff\xd9"


def damage_range(data, rng, pool):
    a, b = sorted(int(v) for v in rng.integers(0, len(data), 2))
    data[a : min(b, a + 40)] = b"" if rng.integers(0, 2) else bytes(data[a:b]) * 2


def damage_marker(data, rng, pool):
    found, kind = _markers(data), int(rng.integers(0, 7))
    at = pick(rng, found) if found else _scan_at(data)
    if kind == 0:
        del data[at : at + 2]
    elif kind == 1:
        data[at:at] = data[at : at + 2]
    elif kind == 2:
        data[at : at + 2] = bytes((0xFF, 0xD0 + int(rng.integers(0, 10))))
    elif kind == 3:
        place = int(rng.integers(_scan_at(data), len(data) + 1))
        data[place:place] = bytes((0xFF, pick(rng, (*range(0xC0, 0xE0), 0x00, 0xFF, 0xFE))))
    elif kind == 4 and len(found) > 1:
        other = pick(rng, found)
        data[at : at + 2], data[other : other + 2] = data[other : other + 2], data[at : at + 2]
    elif kind == 5:
        data[at:at] = b"\xff" * int(rng.integers(1, 4))
    else:  # a stuffed zero less
        place = bytes(data).find(b"\xff\0", _scan_at(data))
        if place >= 0:
            del data[place + 1]


def damage_header(data, rng, pool):
    _, begin, end = _segment(data, rng)
    for _ in range(int(rng.integers(1, 4))):
        _put(data, int(rng.integers(begin, max(end, begin + 1))), rng.integers(0, 256))


def damage_length(data, rng, pool):
    _, begin, end = _segment(data, rng)
    length = end - begin - 2
    _put(data, begin + 2, pick(rng, (*_NUMBERS, max(length - 1, 0), length + 1, length + 2)), 2)


def damage_frame(data, rng, pool):
    _, at, _ = _segment(data, rng, 0xC0, 0xC1, 0xC2)
    kind = int(rng.integers(0, 6))
    if kind == 0:
        _put(data, at + 1, rng.integers(0xC0, 0xD0))
    elif kind == 1:
        _put(data, at + 4, pick(rng, (0, 1, 7, 8, 12, 16, 255)))
    elif kind == 2:
        _put(data, at + 9, rng.integers(0, 6))
    else:
        component = at + 10 + 3 * int(rng.integers(0, 4))
        _put(data, component, pick(rng, (0, 1, 2, 3, ord("R"), 255)))
        _put(data, component + 1, pick(rng, (0, 0x11, 0x12, 0x21, 0x22, 0x14, 0x41, 0x44, 0x55)))
        _put(data, component + 2, pick(rng, (0, 1, 2, 3, 4, 255)))


def damage_size(data, rng, pool):
    _, at, _ = _segment(data, rng, 0xC0, 0xC1, 0xC2)
    for place in (5, 7):
        if rng.integers(0, 3) and at + place + 2 <= len(data):
            old = int.from_bytes(data[at + place : at + place + 2], "big")
            nearby = max(0, min(65535, old + pick(rng, (-16, -8, -1, 1, 8, 16))))
            _put(data, at + place, pick(rng, (*_NUMBERS, nearby, nearby)), 2)


def damage_scan(data, rng, pool):
    _, at, end = _segment(data, rng, 0xDA)
    _put(data, at + 4 + int(rng.integers(0, max(end - at - 4, 1))), pick(rng, (0, 1, 2, 3, 17, 34, 63, 255)))


def damage_huffman(data, rng, pool):
    _, at, end = _segment(data, rng, 0xC4)
    for _ in range(int(rng.integers(1, 3))):
        place = at + 4 + int(rng.integers(0, max(1, min(end - at - 4, pick(rng, (1, 17, 300))))))
        _put(data, place, pick(rng, (0, 1, 0x10, 0xF0, 255, int(rng.integers(0, 256)))))


def damage_quant(data, rng, pool):
    _, at, end = _segment(data, rng, 0xDB)
    place = at + 4 + (0 if rng.integers(0, 3) == 0 else int(rng.integers(0, max(end - at - 4, 1))))
    _put(data, place, pick(rng, (0, 1, 2, 3, 4, 0x10, 128, 255)))


def damage_interval(data, rng, pool):
    _, at, _ = _segment(data, rng, 0xDD)
    if bytes(data[at + 1 : at + 2]) == b"\xdd" and rng.integers(0, 2):
        _put(data, at + 4, pick(rng, _NUMBERS), 2)
    else:
        _insert(data, rng, b"\xff\xdd\0\4" + int(pick(rng, _NUMBERS)).to_bytes(2, "big"))


def damage_index(data, rng, pool):
    name = bytes(data).find(jpeg.INDEX_NAME)
    if name < 4:
        _insert(data, rng, b"\xff\xea\0\x0f" + jpeg.INDEX_NAME + rng.bytes(4))
        return
    first = name + len(jpeg.INDEX_NAME)
    count = (int.from_bytes(data[name - 2 : name], "big") - 2 - len(jpeg.INDEX_NAME)) // 2
    kind = int(rng.integers(0, 6))
    place = first + 2 * int(rng.integers(0, max(count - 1, 1)))
    if place + 4 > len(data):
        return
    a, b = (int.from_bytes(data[place + i : place + i + 2], "little") for i in (0, 2))
    if kind == 0:
        data[place : place + 4] = data[place + 2 : place + 4] + data[place : place + 2]
    elif kind == 1:  # two lengths whose sum stays
        shift = int(rng.integers(-min(a, 9), min(b, 9) + 1))
        data[place : place + 4] = (a + shift & 65535).to_bytes(2, "little") + (b - shift & 65535).to_bytes(
            2, "little"
        )
    elif kind == 2:
        data[place : place + 2] = int(pick(rng, (*_NUMBERS, max(a - 1, 0), a + 1 & 65535))).to_bytes(
            2, "little"
        )
    elif kind == 3:  # the count, with and without the lengths
        _put(data, name - 2, max(0, 2 + len(jpeg.INDEX_NAME) + 2 * count + 2 * int(rng.integers(-2, 3))), 2)
    elif kind == 4:
        data[place:place] = data[place : place + 2]
        _put(data, name - 2, 4 + len(jpeg.INDEX_NAME) + 2 * count, 2)
    else:
        data[name - 1 + int(rng.integers(0, 11))] ^= 1


def damage_order(data, rng, pool):
    _, begin, end = _segment(data, rng)
    part = bytes(data[begin:end])
    kind = int(rng.integers(0, 3))
    if kind != 1:
        del data[begin:end]
    if kind and len(data) > 4:
        _insert(data, rng, part)


def damage_colour(data, rng, pool):
    if rng.integers(0, 3) == 0:
        _insert(data, rng, b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
    else:
        name = pick(rng, (b"Adobe", b"Adxbe"))
        _insert(data, rng, b"\xff\xee\0\x0e" + name + b"\0d\0\0\0\0" + bytes((int(rng.integers(0, 4)),)))


def damage_splice(data, rng, pool):
    other = pick(rng, pool)
    if rng.integers(0, 2):  # one's header, the other's image data
        data[_scan_at(data) :] = other[_scan_at(other) :]
    else:
        data[int(rng.integers(0, len(data))) :] = other[int(rng.integers(0, len(other))) :]


def damage_all(data, rng, pool):
    start = pick(rng, (2, _scan_at(data)))
    data[start:] = rng.bytes(int(rng.integers(1, 400)))


DAMAGES = [function for name, function in list(globals().items()) if name.startswith("damage_")]
# What leaves a header that can be read is of more interest than what does not.
DAMAGES += 2 * [damage_bits, damage_marker, damage_index] + [damage_huffman, damage_quant, damage_interval]


def mutate(good: bytes, rng, pool) -> bytes:
    """``good`` with one to three kinds of damage, or one time in fifty with none."""
    data = bytearray(good)
    if rng.integers(0, 50) == 0:
        return good
    for _ in range(pick(rng, (1, 1, 1, 2, 2, 3))):
        if len(data) < 8:
            break
        pick(rng, DAMAGES)(data, rng, pool)
    return bytes(data)
