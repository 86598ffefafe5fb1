"""Look-alikes and exact copies: against brute force, numpy's turns, scipy's DCT, and altered copies of real photographs."""

import io

import numpy as np
import pytest
from check_pictures import ALTERED, crops, jpeg, write
from PIL import Image

from fastload.check import hashing, search
from fastload.check.hashing import TURNS, clusters, describe, exact_copies, look_alikes, look_at


def test_descriptors_are_weighted_frequencies():
    from scipy.fft import dctn

    grey = np.random.default_rng(0).uniform(0, 255, (3, 32, 32)).astype(np.float32)
    for mine, picture in zip(describe(grey), grey):
        full = dctn(picture, norm="ortho")[:12, :12]
        full *= np.hypot(*np.mgrid[:12, :12])
        expected = full[tuple(hashing._CHOSEN.T)]
        assert mine == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    assert len({tuple(f) for f in hashing._CHOSEN.tolist()}) == 143
    assert not describe(np.full((1, 32, 32), 7, np.float32)).any()


TURNED = {
    "as it is": lambda p: p,
    "mirrored left to right": np.fliplr,
    "mirrored top to bottom": np.flipud,
    "turned by 180 degrees": lambda p: np.rot90(p, 2),
    "turned by 90 degrees left": np.rot90,
    "turned by 90 degrees right": lambda p: np.rot90(p, -1),
    "mirrored along the diagonal": lambda p: p.transpose(1, 0, 2),
    "mirrored along the other diagonal": lambda p: np.rot90(p, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("swapped", [False, True])
def test_turns_are_named_as_numpy_turns(tmp_path, swapped):
    assert set(TURNED) == set(TURNS)
    pictures = crops(8)
    rows = []
    for picture, turn in zip(pictures, TURNED.values()):
        pair = [picture, np.ascontiguousarray(turn(picture))]
        if turn(picture) is picture:
            pair[1] = np.clip(pair[1].astype(int) + 3, 0, 255).astype(np.uint8)
        rows += [(part, f"{len(rows)}", 0) for part in pair]
    order = np.arange(16) if not swapped else np.arange(16).reshape(8, 2)[::-1].reshape(-1)
    data = write(tmp_path / "turns.beton", rows).subset(order)
    pairs = look_alikes(look_at([data]))
    assert sorted(zip(pairs.first.tolist(), pairs.second.tolist())) == [(2 * i, 2 * i + 1) for i in range(8)]
    told = [TURNS[turn] for turn in pairs.turn]
    assert told == (list(TURNED)[::-1] if swapped else list(TURNED))
    assert (pairs.score > 0.97).all()


def test_each_turn_is_undone_by_its_inverse():
    unit = np.random.default_rng(0).normal(size=143).astype(np.float32)

    def turned(values, g):
        view = hashing._VIEWS[g]
        return values[view[:, 0].astype(int)] * view[:, 1]

    for g in range(8):
        assert np.array_equal(turned(turned(unit, g), hashing._INVERSE[g]), unit)
        assert sum(np.array_equal(turned(turned(unit, g), h), unit) for h in range(8)) == 1


def brute_force(units, mean):
    """(N, N) cosines of units (N, 143), the best of eight orientations either way, by plain numpy."""
    residual = units - mean
    residual /= np.linalg.norm(residual, axis=1, keepdims=True)
    best = np.full((len(units), len(units)), -1.0)
    for view in hashing._VIEWS:
        turned = units[:, view[:, 0].astype(int)] * view[:, 1] - mean
        turned /= np.linalg.norm(turned, axis=1, keepdims=True)
        best = np.maximum(best, turned @ residual.T)
    return np.maximum(best, best.T)


def looks_of(units):
    ones = np.ones(len(units), np.float32)
    return hashing.Looks(units, ones < 0, ones > 0, ones < 0, ones, ones, ones)


def test_the_search_finds_what_brute_force_finds():
    rng = np.random.default_rng(1)
    number = 1500
    units = rng.normal(size=(number, 143)).astype(np.float32)
    # A third are altered, turned copies of others, at every distance around the limit.
    for i in range(1000, number):
        view, other = hashing._VIEWS[i % 8], units[i - 1000]
        units[i] = other[view[:, 0].astype(int)] * view[:, 1] + rng.normal(size=143) * rng.uniform(0, 0.9)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    pairs = look_alikes(looks_of(units), 1)
    assert pairs.raised == 0
    best = brute_force(units, units.sum(0) / (number + hashing._PRIOR))
    expected = np.triu(best, 1) >= hashing.NEAR
    assert 200 < expected.sum() < 480
    score = best[pairs.second, pairs.first]
    assert pairs.score == pytest.approx(score, abs=2e-3) and (pairs.first < pairs.second).all()
    missed = expected.sum() - len(pairs.score)
    assert 0 <= missed <= 0.03 * expected.sum()
    shared = look_alikes(looks_of(units), 3)
    assert all(
        np.array_equal(getattr(shared, name), getattr(pairs, name)) for name in ("first", "second", "turn")
    )


def test_a_crowd_of_copies_is_one_cluster_of_few_links():
    rng = np.random.default_rng(2)
    units = rng.normal(size=(6000, 143)).astype(np.float32)
    units[:250] = units[0] + rng.normal(size=(250, 143)) * 0.05
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    pairs = look_alikes(looks_of(units))
    assert len(pairs.first) <= 250 * search._MOST_HITS < 250 * 249 / 2
    group = clusters(6000, pairs.first, pairs.second)
    assert (group[:250] == 0).all() and len(np.unique(group)) == 5751


def test_recall_and_precision_on_altered_photographs(tmp_path, photos):
    """60 photographs and 10 altered copies of each: every kind at 100% but the 5% crop at 95%, and no wrong pair."""
    rows, truth = [], []
    for number, data in enumerate(photos):
        original = Image.open(io.BytesIO(data)).convert("RGB")
        original.thumbnail((256, 256))
        for kind, alter in {"original": lambda i: i, **ALTERED}.items():
            rows.append((jpeg(alter(original), 60 if kind == "quality 60" else 90), f"{number}/{kind}", 0))
            truth.append((number, kind))
    pairs = look_alikes(look_at([write(tmp_path / "altered.beton", rows)]))
    of, kinds = np.array([number for number, _ in truth]), [kind for _, kind in truth]
    assert len(pairs.first) > 60 * 10
    assert (of[pairs.first] == of[pairs.second]).all(), "precision"
    found = {(of[i], kinds[j]) for i, j in zip(pairs.first, pairs.second) if kinds[i] == "original"}
    recall = {kind: sum((n, kind) in found for n in range(60)) / 60 for kind in ALTERED}
    assert recall.pop("cropped 5%") >= 0.95
    assert recall == dict.fromkeys(recall, 1.0)


def test_exact_copies_are_those_of_all_bytes(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)
    unseen = large.copy()
    unseen.reshape(-1)[2000] ^= 1  # between two windows of the digest
    turned = np.ascontiguousarray(large.reshape(50, 200, 3))  # the same bytes of another shape
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    other = small.copy()
    other[4, 4, 1] ^= 1
    blank = np.full((40, 40, 3), 255, np.uint8)
    pictures = [large, small, unseen, blank, large, turned, other, small, blank, jpeg(large), jpeg(large)]
    data = write(tmp_path / "exact.beton", [(picture, str(i), 0) for i, picture in enumerate(pictures)])
    assert exact_copies([data]).tolist() == [0, 1, 2, 3, 0, 5, 6, 1, 3, 9, 9]
    assert exact_copies([data], blank_too=False).tolist() == [0, 1, 2, 3, 0, 5, 6, 1, 8, 9, 9]
    two = [data.subset([4, 2]), data.subset([1, 0, 2])]
    assert exact_copies(two).tolist() == [0, 1, 2, 0, 1]
    digests = np.empty(2, np.uint64)
    file = np.concatenate([large.reshape(-1), unseen.reshape(-1)])
    shapes = np.full((2, 2), 100)
    search.digest(file, np.array([0, 30000]), np.array([30000, 30000]), shapes, digests)
    assert digests[0] == digests[1], "the case above no longer needs the full comparison"


def test_clusters_join_through_others():
    rng = np.random.default_rng(0)
    for _ in range(50):
        number = int(rng.integers(1, 30))
        first, second = rng.integers(0, number, (2, int(rng.integers(0, 20))))
        mine = clusters(number, first, second)
        expected = list(range(number))
        for _ in range(number):  # the smallest number spreads along the pairs
            for a, b in zip(first, second):
                expected[a] = expected[b] = min(expected[a], expected[b])
        assert mine.tolist() == expected


def test_small_blank_and_damaged_images_are_not_compared(tmp_path):
    picture, other = crops(2)
    tiny = np.asarray(Image.fromarray(picture).resize((31, 64)))
    enough = np.asarray(Image.fromarray(picture).resize((32, 64)))
    grey = np.full((64, 64, 3), 90, np.uint8)
    grey[:2] += 5
    broken = jpeg(other)
    rows = [
        tiny,
        np.fliplr(tiny),
        enough,
        np.fliplr(enough),
        grey,
        grey + 1,
        jpeg(other),
        (broken[0][:300], *broken[1:]),
    ]
    data = write(
        tmp_path / "small.beton",
        [(r if isinstance(r, tuple) else np.ascontiguousarray(r), str(i), 0) for i, r in enumerate(rows)],
    )
    looks = look_at([data])
    assert looks.damaged.tolist() == [False] * 7 + [True]
    assert looks.comparable.tolist() == [False, False, True, True, False, False, True, False]
    pairs = look_alikes(looks)
    assert list(zip(pairs.first.tolist(), pairs.second.tolist())) == [(2, 3)]


@pytest.mark.parametrize("size", [8, 32, 64])
def test_digits_that_look_alike_by_nature_are_no_copies(tmp_path, size):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        Image.fromarray((i * 15.9).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        for i in digits.images
    ]
    rows = [(np.stack([np.asarray(i)] * 3, 2), str(n), 0) for n, i in enumerate(images)]
    copied = [
        (np.ascontiguousarray(np.clip(rows[5][0].astype(int) * 0.98, 0, 255).astype(np.uint8)), "copy", 0)
    ]
    pairs = look_alikes(look_at([write(tmp_path / "digits.beton", rows + copied)]))
    assert len(pairs.first) < 0.01 * len(rows)
    assert size == 8 or pairs.raised > 0.9
