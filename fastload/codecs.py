"""Encode and decode images: anything Pillow reads into RGB, RGB into JPEG with restart markers, crops out of such JPEG.

JPEG goes through libjpeg-turbo (simplejpeg) and kernels, which all run without the GIL; Pillow serves the other formats
and the odd JPEG (CMYK, 12 bit). Everything that can be wrong with bytes comes out as a CorruptError.

>>> encode_jpeg(load_rgb(open("photo.png", "rb").read()), quality=90)
"""

from __future__ import annotations

import functools
import io
import os
import struct
import threading
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg

from fastload.errors import CorruptError, UsageError
from fastload.kernels import baseline as kb
from fastload.kernels import encode as ke
from fastload.kernels import jpeg as kj
from fastload.kernels import progressive as kp
from fastload.kernels import resize as kr
from fastload.kernels import restart as ks
from fastload.kernels.decode import new_work
from fastload.kernels.huffman import ZIGZAG
from fastload.kernels.raw import MORE_SCRATCH

MAX_PIXELS = 300_000_000  # a decompression bomb is refused before it is decoded
# What Pillow's decoders raise for damaged bytes: each format has its own habits.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_DHT, _DQT, _DRI = 0xC4, 0xDB, 0xDD
_LOCAL = threading.local()  # a thread's memory for encoding, of which it keeps this much
_KEPT = 1 << 26
_NOTHING = np.empty(0, np.uint8)
_ONE_AT_A_TIME = (
    threading.Lock()
)  # threads that catch warnings side by side leave the filters of one another behind


@dataclass(frozen=True)
class Probe:
    """What a header says: format name, size after EXIF orientation, and whether its coefficients can be stored as they are."""

    format: str
    width: int
    height: int
    orientation: int
    keepable: bool


def as_bytes(data: Any) -> np.ndarray:
    """Any bytes-like object as a (n,) uint8 array without copying."""
    return np.frombuffer(memoryview(data).cast("B"), np.uint8)


def is_baseline(data: Any) -> bool:
    """Whether ``data`` is a baseline (or extended sequential) JPEG of 8 bits, which can be kept with restart markers."""
    info, status = kj.parse(as_bytes(data))
    return status == kj.OK and int(info[kj.FRAME]) in (0xC0, 0xC1) and int(info[kj.PRECISION]) == 8


def is_jpeg(data: Any) -> bool:
    """Whether ``data`` begins like a JPEG."""
    return bytes(memoryview(data)[:3]) == b"\xff\xd8\xff"


def probe(data: Any) -> Probe:
    """Read the header only. CorruptError if it is no image."""
    if is_jpeg(data):
        array = as_bytes(data)
        info, status = kj.parse(array)
        if status == kj.OK:
            orientation = _jpeg_orientation(array, int(info[kj.SCAN_HEADER_AT]))
            width, height = int(info[kj.WIDTH]), int(info[kj.HEIGHT])
            if orientation >= 5:
                width, height = height, width
            return Probe("JPEG", width, height, orientation, orientation == 1 and _keepable(info))
    with _open(data) as image:
        orientation = _orientation(image, _says_all_first(image, data))
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned this size already, in its later releases
            width, height = image.tag_v2.get(256, width), image.tag_v2.get(257, height)
        if orientation >= 5:
            width, height = height, width
        return Probe(image.format or "?", width, height, orientation, False)


def is_plain(info: np.ndarray) -> bool:
    """Baseline, 8 bit, grey or YCbCr in one scan, of at most as many pixels as we decode: what all decoders show alike.

    ``info`` (kj.INFO_SIZE,) int64 is what :func:`fastload.kernels.jpeg.parse` gives.
    """
    components = int(info[kj.COMPONENTS])
    if info[kj.FRAME] not in (0xC0, 0xC1) or info[kj.PRECISION] != 8 or components not in (1, 3):
        return False
    if info[kj.HEIGHT] * info[kj.WIDTH] > MAX_PIXELS or info[kj.SCAN_COMPONENTS] != components:
        return False
    ids = bytes(int(i) & 255 for i in info[kj.IDS : kj.IDS + 3])
    return components == 1 or int(info[kj.ADOBE]) == 1 or (int(info[kj.ADOBE]) < 0 and ids != b"RGB")


def _keepable(info: np.ndarray) -> bool:
    """Baseline in one interleaved scan, or progressive; 8 bit, grey or YCbCr: what every decoder shows as the same RGB."""
    components = int(info[kj.COMPONENTS])
    if info[kj.FRAME] not in (0xC0, 0xC1, 0xC2) or info[kj.PRECISION] != 8 or components not in (1, 3):
        return False
    if info[kj.SCAN_COMPONENTS] != components and info[kj.FRAME] != 0xC2:
        return False
    if components == 1:
        return True
    sampling = [int(s) for s in info[kj.SAMPLING : kj.SAMPLING + 3]]
    if sampling[1:] != [0x11, 0x11] or sampling[0] not in (0x11, 0x21, 0x12, 0x22):
        return False
    ids = bytes(int(i) & 255 for i in info[kj.IDS : kj.IDS + 3])
    return int(info[kj.ADOBE]) == 1 or (int(info[kj.ADOBE]) < 0 and ids != b"RGB")


def load_rgb(data: Any, *, min_size: tuple[int, int] | None = None, padded: bool = False) -> np.ndarray:
    """Decode any image that Pillow reads to (H, W, 3) uint8 RGB with its EXIF orientation applied.

    Grey and palette become RGB, transparent pixels are laid over white, CMYK is converted, 16-bit grey keeps its upper
    byte. ``min_size`` (height, width) allows a JPEG to be decoded at the smallest n/8 of its size that is at least that
    large. ``padded`` allows (H, W, 4) with any fourth byte, which :func:`encode_jpeg` takes without a copy. Raises CorruptError for bytes that are no image, are truncated, or hold more than 300 megapixels.
    """
    if is_jpeg(data):
        array = as_bytes(data)
        info, status = kj.parse(array)
        if status == kj.OK and info[kj.COMPONENTS] in (1, 3) and info[kj.PRECISION] == 8:
            orientation = _jpeg_orientation(array, int(info[kj.SCAN_HEADER_AT]))
            _check_pixels(int(info[kj.HEIGHT]), int(info[kj.WIDTH]))
            low = (0, 0) if min_size is None else min_size
            if orientation >= 5:
                low = (low[1], low[0])
            rgb = _decode(array, "RGBX" if padded else "RGB", low[0], low[1], exact=True)
            return _orient(rgb, orientation)
    with _open(data) as image:
        _check_pixels(image.height, image.width)
        try:
            image.load()  # before the orientation is asked for: Pillow turns a TIFF while loading it, and says so
            return _orient(_to_rgb(image), _orientation(image))
        except _DAMAGE as error:
            raise CorruptError(f"the {image.format} image cannot be decoded ({error})") from error


def decode_jpeg(data: np.ndarray, exact: bool = True) -> np.ndarray:
    """A whole JPEG (n,) uint8 as (H, W, 3) uint8 RGB, as any JPEG reader shows it (no EXIF)."""
    return _decode(data, "RGB", 0, 0, exact)


def decode_rgbx(
    data: np.ndarray, least: tuple[int, int], exact: bool, scratch: np.ndarray | None = None
) -> np.ndarray:
    """Decode to (h, w, 4) uint8 for the resize kernel; not smaller than ``least`` (height, width), (0, 0) for full size.

    ``scratch`` (n,) uint8 is used as memory if it is large enough; then the result is a view of it.
    """
    return _decode(data, "RGBX", least[0], least[1], exact, scratch)


def _decode(
    data: np.ndarray, space: str, height: int, width: int, exact: bool, scratch: np.ndarray | None = None
) -> np.ndarray:
    try:
        # The accurate inverse DCT always: the fast one saves 3% and loses up to two levels. Smooth chroma upsampling
        # is the real price (a fifth), and only `exact` pays it.
        decoded: np.ndarray = simplejpeg.decode_jpeg(
            data,
            space,
            fastdct=False,
            fastupsample=not exact,
            min_height=height,
            min_width=width,
            buffer=scratch,
        )
    except ValueError as error:
        raise CorruptError(f"the JPEG cannot be decoded ({error})") from error
    return decoded


def encode_jpeg(rgb: np.ndarray, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 RGB as baseline 4:2:0 JPEG with restart markers and their index. ``quality`` 1 to 100.

    (H, W, 4) gives the same bytes a little faster: that is how Pillow keeps RGB, and so it need not unpack it first.
    """
    from PIL import Image

    if not 1 <= quality <= 100:
        raise UsageError(f"JPEG quality is 1 to 100, got {quality}")
    height, width = rgb.shape[:2]
    across, down = -(-width // 16), -(-height // 16)
    interval = kj.choose_interval(across, down, 16)
    mode = "RGB" if rgb.shape[2] == 3 else "RGBX"
    image = Image.frombuffer(mode, (width, height), np.ascontiguousarray(rgb), "raw", mode, 0, 1)
    # Pillow encodes to a file number without the GIL, and to any other file with it.
    with os.fdopen(os.memfd_create("jpeg"), "w+b") if hasattr(os, "memfd_create") else io.BytesIO() as file:
        image.save(file, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=interval)
        file.seek(0)
        array = as_bytes(file.read())
    info, status = kj.parse(array)
    lengths = np.zeros(across // interval * down if interval else 0, np.int64)
    if status != kj.OK or not interval or not kj.measure_segments(array, int(info[kj.SCAN_AT]), lengths):
        return keep_jpeg(array)
    scan = int(info[kj.SCAN_AT])
    head = _stripped_header(array, info, (_DRI,))
    return _with_index(lengths, head, interval, array[int(info[kj.SCAN_HEADER_AT]) : scan], array[scan:])


def encode_anew(data: Any, quality: int) -> bytes | None:
    """The picture of a baseline YCbCr JPEG as :func:`encode_jpeg` stores pixels, without making any: about half of the time.

    None for a JPEG that must go through pixels: another kind, other sampling than 4:2:0 and 4:4:4, damaged, too large for an index.
    """
    array = as_bytes(data)
    info, status = kj.parse(array)
    if status != kj.OK or info[kj.COMPONENTS] != 3:
        return None
    height, width = int(info[kj.HEIGHT]), int(info[kj.WIDTH])
    across, down = -(-width // 16), -(-height // 16)
    interval = kj.choose_interval(across, down, 16)
    if not interval or height * width > MAX_PIXELS:
        return None
    encoder, tables, scan_header = _encoder(quality)
    lengths, result = np.zeros(across // interval * down, np.int64), np.zeros(1, np.int64)
    room = 2 * array.size + height * width // 2 + 65536
    work, scratch, out = getattr(_LOCAL, "memory", None) or (new_work(), _NOTHING, _NOTHING)
    while True:
        out = out if out.size >= room else np.empty(room, np.uint8)
        if scratch.size + out.size <= _KEPT:
            _LOCAL.memory = work, scratch, out
        status = ke.encode_anew(array, height, width, encoder, work, scratch, interval, lengths, out, result)
        if status != MORE_SCRATCH:
            break
        scratch = np.empty(int(result[0]) * 5 // 4, np.uint8)
    if status != ks.OK:
        return None
    head = bytearray(tables)
    frame = head.index(b"\xff\xc0") + 5
    head[frame : frame + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return _with_index(lengths, bytes(head), interval, scan_header, out[: int(result[0])])


@functools.lru_cache(maxsize=8)
def _encoder(quality: int) -> tuple[ke.Encoder, bytes, np.ndarray]:
    """Tables of a quality, the header that has them, and the header of the scan: those that Pillow writes for a picture of one MCU."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    array = as_bytes(file.getvalue())
    info, _ = kj.parse(array)
    scan = int(info[kj.SCAN_HEADER_AT])
    quant = np.zeros((4, 8, 8), np.int64)
    codes, sizes = np.zeros((2, 2, 2, 256), np.int64)  # by kind (DC, AC), number, symbol
    at = 2
    while at < scan:
        begin, end = at + 4, at + 2 + int.from_bytes(array[at + 2 : at + 4].tobytes(), "big")
        while array[at + 1] == _DQT and begin < end:
            quant[array[begin], ZIGZAG // 8, ZIGZAG % 8] = array[begin + 1 : begin + 65]
            begin += 65
        while array[at + 1] == _DHT and begin < end:
            kind, number = divmod(int(array[begin]), 16)
            counts, begin, code = array[begin + 1 : begin + 17].tolist(), begin + 17, 0
            for length, count in enumerate(counts, 1):
                symbols = array[begin : begin + count]
                codes[kind, number, symbols] = np.arange(code, code + count)
                sizes[kind, number, symbols] = length
                begin, code = begin + count, code + count << 1
        at = end
    head = _stripped_header(array, info, (_DRI,))
    return (
        ke.new_encoder(quant[:2], codes.reshape(4, 256), sizes.reshape(4, 256)),
        head,
        array[scan : int(info[kj.SCAN_AT])].copy(),
    )


def _with_index(
    lengths: np.ndarray, head: bytes, interval: int, scan_header: np.ndarray, entropy_coded: np.ndarray
) -> bytes:
    """A JPEG whose restart index stands right behind SOI; ``lengths`` are the bytes of its segments."""
    index = lengths.astype("<u2").tobytes()
    length = 2 + len(kj.INDEX_NAME) + len(index)
    return b"".join(
        (
            bytes((0xFF, 0xD8, 0xFF, kj.INDEX_MARKER)) + length.to_bytes(2, "big") + kj.INDEX_NAME,
            index,
            head,
            b"\xff\xdd\x00\x04" + interval.to_bytes(2, "big"),
            scan_header.tobytes(),
            entropy_coded.tobytes(),
        )
    )


def keep_jpeg(data: Any) -> bytes:
    """The same picture, coefficient for coefficient: metadata stripped, restart markers and their index added.

    A progressive JPEG becomes a baseline one. Where markers cannot be added (another kind of JPEG, an incomplete progressive one,
    segments too long for the index) the stripped original comes back. Raises CorruptError if the entropy-coded data are
    damaged, which copying the bytes would have hidden.
    """
    array = as_bytes(data)
    info, status = kj.parse(array)
    if status != kj.OK:
        raise CorruptError(kj.REASONS[status])
    interval = kj.choose_interval(int(info[kj.MCUS_X]), int(info[kj.MCUS_Y]), int(info[kj.MCU_W]))
    scan_at, scan = int(info[kj.SCAN_HEADER_AT]), int(info[kj.SCAN_AT])
    if interval and info[kj.FRAME] == 0xC2:
        _check_pixels(int(info[kj.HEIGHT]), int(info[kj.WIDTH]))
        made = kb.transcode(array, info, interval)
        _check_data(made.status)
        if made.status == ks.OK:
            head = _stripped_header(array, info, (_DRI, _DHT), baseline=True) + made.tables
            return _with_index(made.lengths, head, interval, _scan_header(info), made.entropy_coded)
    elif interval:
        segments = int(info[kj.MCUS_X]) // interval * int(info[kj.MCUS_Y])
        out = np.empty(array.size - scan + array.size // 4 + 16 * segments + 4096, np.uint8)
        lengths, result = np.zeros(segments, np.int64), np.zeros(2, np.int64)
        status = int(ks.add_restarts(array, info, interval, out, lengths, result))
        _check_data(status)
        if status == ks.OK:
            size, replaced = int(result[0]), int(result[1])
            head = _stripped_header(array, info, (_DRI,))
            if replaced:
                head += ks.standard_dc_segment(replaced)
            return _with_index(lengths, head, interval, array[scan_at:scan], out[:size])
    return b"\xff\xd8" + _stripped_header(array, info) + array[scan_at:].tobytes()


def _check_data(status: int) -> None:
    """CorruptError if a transcoder found damaged data; what it cannot transcode is no damage."""
    if status in (ks.BAD_CODE, ks.BAD_TABLE, ks.OVERRUN, ks.BAD_RESTART, *kp.REASONS):
        raise CorruptError({**ks.REASONS, **kp.REASONS}[status])


def _scan_header(info: np.ndarray) -> np.ndarray:
    """SOS of one scan of everything: the first component takes tables 0, the others tables 1."""
    count = int(info[kj.COMPONENTS])
    ids = (int(i) for i in info[kj.IDS : kj.IDS + count])
    tables = b"".join(bytes((id, 0x11 if number else 0)) for number, id in enumerate(ids))
    return as_bytes(b"\xff\xda\x00" + bytes((6 + 2 * count, count)) + tables + b"\x00\x3f\x00")


def _stripped_header(
    array: np.ndarray, info: np.ndarray, without: tuple[int, ...] = (), baseline: bool = False
) -> bytes:
    """The segments between SOI and SOS that decoding needs, but for those of the markers ``without``.

    The Adobe segment stays, since it names the colour space. ``baseline`` renames a progressive frame.
    """
    parts, at, end = [], int(info[kj.TABLES_AT]), int(info[kj.SCAN_HEADER_AT])
    precise = False
    while at < end:
        marker = int(array[at + 1])
        if marker == 0xFF:
            at += 1
            continue
        length = 2 + int.from_bytes(array[at + 2 : at + 4].tobytes(), "big")
        application = 0xE0 <= marker <= 0xEF and marker not in (0xE0, 0xEE)
        if not application and marker != 0xFE and marker not in without:
            parts.append(array[at : at + length].tobytes())
            precise |= marker == _DQT and _has_precise_table(parts[-1][4:])
        at += length
    if baseline:
        # Baseline in the strict sense has quantisation tables of 8 bits; those of 16 bits are "extended sequential".
        name = b"\xff\xc1" if precise else b"\xff\xc0"
        parts = [name + part[2:] if part[1] == 0xC2 else part for part in parts]
    return b"".join(parts)


def _has_precise_table(body: bytes) -> bool:
    """Whether the body of a DQT segment has a table of 16 bits."""
    at = 0
    while at < len(body):
        if body[at] >> 4:
            return True
        at += 65
    return False


def resize(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 resized to ``size`` (height, width): antialiased bilinear, Pillow's BILINEAR within one level."""
    out = np.empty((*size, 3), np.uint8)
    height, width = rgb.shape[:2]
    kr.resize(np.ascontiguousarray(rgb), (0, 0, height, width), (0, 0, height, width), out)
    return out


def _open(data: Any) -> Any:
    from PIL import Image

    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked below, by us
        try:
            return Image.open(io.BytesIO(bytes(memoryview(data))))
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            what = "it is empty" if not memoryview(data).nbytes else "it is not an image that can be read"
            detail = "" if "cannot identify" in str(error) else f" ({error})"
            raise CorruptError(what + detail) from error


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise CorruptError(f"its header claims {width} x {height} pixels, over the limit of {MAX_PIXELS:,}")


def _to_rgb(image: Any) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        grey = np.clip(wide >> 8 if image.mode != "I" or wide.max(initial=0) > 255 else wide, 0, 255)
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        grey = np.clip(np.nan_to_num(np.asarray(image)), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Over white, not cut off: the colour of fully transparent pixels is arbitrary.
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.array(image.convert("RGB"))


def _says_all_first(image: Any, data: Any) -> bool:
    """Whether a PNG has no metadata after its pixels, so that it need not be decoded to find its orientation."""
    if image.format != "PNG":
        return False
    content = bytes(memoryview(data))
    pixels = content.find(b"IDAT")
    return all(content.find(name, pixels) < 0 for name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))


def _orientation(image: Any, header_only: bool = False) -> int:
    from PIL import Image

    try:
        # A PNG's own getexif decodes the whole image to see what follows its pixels.
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        value = int(exif.get(0x0112, 1))
    except _DAMAGE:
        return 1  # damaged EXIF does not make the picture unreadable
    return value if 1 <= value <= 8 else 1


def _jpeg_orientation(array: np.ndarray, end: int) -> int:
    """EXIF orientation of a JPEG, 1 if it says none; looks at segments only where 'Exif' occurs before ``end``."""
    head = array[:end].tobytes()
    at = head.find(b"Exif\0\0")
    if at < 0:
        return 1
    tiff = head[at + 6 :]
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    order: Any = "little" if tiff[:2] == b"II" else "big"
    first = int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[first : first + 2], order)
    for i in range(min(count, 512)):
        entry = tiff[first + 2 + 12 * i : first + 14 + 12 * i]
        if len(entry) == 12 and int.from_bytes(entry[:2], order) == 0x0112:
            value = int.from_bytes(entry[8:10], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _orient(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image the way its EXIF orientation (1 to 8) says."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
