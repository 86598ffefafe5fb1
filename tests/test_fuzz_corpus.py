"""What the fuzzer found once, always: its corpus replayed, some thousands of fresh cases, and the bugs by their names."""

import zipfile

import numpy as np
import pytest
from fuzz_jpeg import CORPUS, Checker, Wrong, case, check, crops
from jpeg_damage import picture, seeds, segments_of

from fastload import codecs
from fastload.errors import CorruptError
from fastload.kernels import decode, jpeg


@pytest.fixture(scope="module")
def checker():
    return Checker()


def failures(files, checker):
    """(name, what is wrong) of the files that break a promise, and the statuses of all."""
    wrong, statuses = [], set()
    for name, rng, data in files:
        outcome = check(data, rng, checker)
        statuses |= set(outcome.statuses)
        if outcome.wrong:
            wrong.append((name, outcome.wrong))
    return wrong, statuses


def test_the_corpus_still_passes(checker):
    with zipfile.ZipFile(CORPUS) as archive:
        files = [(name, np.random.default_rng(0), archive.read(name)) for name in archive.namelist()]
    wrong, statuses = failures(files, checker)
    assert not wrong
    assert len(files) > 100
    # Each way out of the kernel is in it.
    assert statuses >= {
        crops.OK,
        crops.UNSUPPORTED,
        crops.MORE_SCRATCH,
        *(jpeg.NOT_JPEG, jpeg.TRUNCATED, jpeg.BAD_SEGMENT, jpeg.BAD_FRAME, jpeg.NO_SCAN, jpeg.BAD_INDEX),
        *(decode.BAD_MARKER, decode.BAD_TABLE, decode.BAD_CODE, decode.OVERRUN, decode.TOO_MUCH),
    }


def test_fresh_cases_pass(checker):
    pool = seeds()
    wrong, _ = failures(((n, *case(1, n, pool)) for n in range(3000)), checker)
    assert not wrong


def test_seeds_are_supported_as_they_should_be(checker):
    statuses = [check(data, np.random.default_rng(0), checker) for data in seeds()]
    assert [s.statuses[0] for s in statuses] == [crops.OK] * 24 + [crops.UNSUPPORTED] * 4
    assert all(s.compared == "equal" for s in statuses[:24])


def test_the_checker_sees_what_it_is_there_for(checker, monkeypatch):
    """A kernel that shows old memory, writes too far, or shows another picture."""
    good = codecs.encode_jpeg(picture(40, 40), 90)
    box = (0, 0, 40, 40)

    def old_memory(data, height, width, box, clip, flips, out, work, scratch, need):
        out[1:-1, 1:-1] = scratch[0]
        return crops.OK

    def too_far(data, height, width, box, clip, flips, out, work, scratch, need):
        out[:] = 7
        return crops.OK

    def another(data, height, width, box, clip, flips, out, work, scratch, need):
        out[1:-1, 1:-1] = 7
        return crops.OK

    import fuzz_jpeg

    for kernel, message in ((old_memory, "memory that is not"), (too_far, "outside of the output")):
        monkeypatch.setattr(fuzz_jpeg, "crop_to", kernel)
        with pytest.raises(Wrong, match=message):
            checker.crop(good, (40, 40), box, box, (40, 40))
    monkeypatch.setattr(fuzz_jpeg, "crop_to", another)
    assert check(good, np.random.default_rng(0), checker).wrong.startswith("other: up to")


# ---- what the fuzzer found: files that libjpeg-turbo refuses and the kernel showed


def status_of(data, checker, shape=(64, 64), box=None):
    box = box or (0, 0, *shape)
    return checker.crop(data, shape, box, (0, 0, *shape), (box[2] - box[0], box[3] - box[1]))[0]


@pytest.fixture
def good():
    return bytearray(codecs.encode_jpeg(picture(64, 64), 90))


def without_index(data):
    """The same JPEG with an index of a version that nobody knows."""
    return bytes(data).replace(jpeg.INDEX_NAME, jpeg.INDEX_NAME[:-1] + b"\xff")


def segment(data, marker):
    return next((b, e) for m, b, e in segments_of(data) if m == marker)


@pytest.mark.parametrize("marker", [0x02, 0x25, 0xBF, 0xC8, 0xDE, 0xF0, 0xFD])
def test_markers_that_no_jpeg_header_has(good, checker, marker):
    good[segment(good, 0xE0)[0] + 1] = marker
    assert status_of(good, checker) == jpeg.BAD_SEGMENT


def test_a_huffman_table_with_a_code_of_all_ones(good, checker):
    begin, end = segment(good, 0xC4)
    good[begin:end] = b"\xff\xc4\0\x15\0" + bytes((2, *[0] * 15)) + b"\0\1"
    assert status_of(good, checker) == decode.BAD_TABLE
    with pytest.raises(CorruptError, match="Huffman table"):
        codecs.keep_jpeg(without_index(good))


def test_components_that_share_an_id(good, checker):
    frame, scan = segment(good, 0xC0)[0], segment(good, 0xDA)[0]
    good[frame + 13], good[scan + 7] = 1, 1
    assert status_of(good, checker) == crops.UNSUPPORTED


def test_image_data_must_end_with_eoi(checker):
    plain = bytearray(without_index(codecs.encode_jpeg(picture(64, 64), 90)))
    assert status_of(plain, checker) == crops.OK
    plain[-1] = 0xC0
    assert status_of(plain, checker) == decode.BAD_MARKER


def test_an_adobe_segment_has_adobes_whole_name(good, checker):
    """With the ids "RGB" and no word of Adobe's, the colours are RGB: not for this kernel."""
    begin, end = segment(good, 0xE0)
    good[begin:end] = b"\xff\xee\0\x0eAdxbe\0d\0\0\0\0\1"
    frame, scan = segment(good, 0xC0)[0], segment(good, 0xDA)[0]
    for i, name in enumerate(b"RGB"):
        good[frame + 10 + 3 * i] = good[scan + 5 + 2 * i] = name
    assert status_of(good, checker) == crops.UNSUPPORTED


def test_an_index_must_lead_to_the_beginning_of_a_segment(checker):
    """Two lengths whose sum is right: the second segment would be read from the middle of the first."""
    good = bytearray(codecs.encode_jpeg(picture(32, 128), 90))
    first = good.index(jpeg.INDEX_NAME) + len(jpeg.INDEX_NAME)
    window = (0, 80, 10, 120)
    assert status_of(good, checker, (32, 128), window) == crops.OK
    good[first] -= 2
    good[first + 2] += 2
    assert status_of(good, checker, (32, 128), window) == jpeg.BAD_INDEX
    out, found = np.zeros(len(good), np.uint8), np.zeros(5, np.int64)
    assert jpeg.cut(np.frombuffer(good, np.uint8), 32, 128, *window, out, found) == jpeg.BAD_INDEX
