"""Groups told from paths: subjects are found, classes and numbered files are not taken for them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.check import path_groups


def subjects(pattern, people=40, photos=7, kinds=3, one_class=False, seed=0):
    """Sources of ``people`` times ``photos`` images in random order, their labels, and the true subjects."""
    rng = random.Random(seed)
    rows = []
    for person in range(people):
        for photo in range(photos):
            label = person % kinds if one_class else photo % kinds
            rows.append((pattern.format(person=person, photo=photo, label=f"class{label}"), label, person))
    rng.shuffle(rows)
    sources, labels, people_of = zip(*rows)
    return list(sources), np.array(labels), np.array(people_of)


def same_partition(one, other):
    pairs = {(a, b) for a, b in zip(one, other)}
    return len(pairs) == len(set(one)) == len(set(other))


PATTERNS = {
    "folders in class folders": ("{label}/person_{person}/img{photo}.jpg", "parent"),
    "folders of all classes": ("images/{person:06d}_female_45/mask{photo}.jpg", "parent"),
    "class folders in folders": ("{person:03d}/{label}/{photo}.png", "parent"),
    "behind a side of a split": ("train/{label}/subject-{person}/{photo}.jpeg", "parent"),
    "folders in folders": ("images/person_{person}/view{photo}/1.jpg", "parent"),
    "stems": ("s{person:03d}_{photo}.jpg", "stem"),
    "stems in class folders": ("{label}/s{person:03d}_{photo}.jpg", "stem"),
    "stems with a word": ("p{person}-mask{photo}.jpg", "stem"),
    "frames of films": ("film{person}_frame_{photo:06d}.jpg", "stem"),
}


@pytest.mark.parametrize("one_class", [False, True], ids=["classes mixed", "one class each"])
@pytest.mark.parametrize("name", PATTERNS)
def test_subjects_are_found(name, one_class):
    pattern, rule = PATTERNS[name]
    sources, labels, people = subjects(pattern, one_class=one_class)
    found = path_groups(sources, labels)
    assert found is not None and found.rule == rule
    assert same_partition(found.values.tolist(), people.tolist())
    assert "40 " in found.why and ("each of one class" if one_class else "several classes") in found.why


CLASSES = [f"n{1440764 + 37 * i:08d}" for i in range(40)]
PLAIN = {
    "class folders": lambda c, i: f"{c}/{c}_{i}.JPEG",
    "class folders on two sides": lambda c, i: f"{('train', 'val')[i % 4 == 0]}/{c}/{i}.png",
    "class in the stem": lambda c, i: f"images/{c}_{i:03d}.jpg",
    "numbers of a camera": lambda c, i: f"{c}/IMG_{CLASSES.index(c) * 100 + i:04d}.jpg",
    "numbers again in each class": lambda c, i: f"{c}/{i:04d}.jpg",
    "clock": lambda c, i: f"{c}/2024011{i % 10}_14{CLASSES.index(c) % 60:02d}{i:02d}.jpg",
    "dates": lambda c, i: f"{c}/IMG_2024-01-1{i % 10} 14.{CLASSES.index(c) % 60:02d}.{i:02d}.jpg",
    "bare numbers": lambda c, i: f"{CLASSES.index(c) * 100 + i}",
    "two cameras": lambda c, i: f"{c}/{('DSC', 'P')[i % 2]}_{CLASSES.index(c) * 100 + i}.jpg",
    "browser downloads": lambda c, i: f"{c}/download ({CLASSES.index(c) * 100 + i}).jpg",
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_classes_and_numbers_are_no_groups(name, classes):
    rows = [(PLAIN[name](c, i), n) for n, c in enumerate(CLASSES[:classes]) for i in range(30)]
    random.Random(1).shuffle(rows)
    assert path_groups([row[0] for row in rows], np.array([row[1] for row in rows])) is None


def test_breeds_of_two_species_are_no_groups():
    words = [
        "abyssinian",
        "beagle",
        "birman",
        "bombay",
        "boxer",
        "havanese",
        "keeshond",
        "persian",
        "pug",
        "ragdoll",
        "samoyed",
        "siamese",
    ]
    rows = [(f"images/{word}_{i}.jpg", n % 2) for n, word in enumerate(words) for i in range(60)]
    assert path_groups([row[0] for row in rows], np.array([row[1] for row in rows])) is None


@pytest.mark.parametrize(
    "mark", ["{} copy", "{} copy 3", "{} - Copy (2)", "Copy of {}", "{} (1)", "{}_rot90", "augmented_{}"]
)
def test_copies_are_found_by_name(mark):
    originals = [f"{'ab'[i % 2]}/photo{i * 31}" for i in range(60)]
    copies = ["/".join((name.split("/")[0], mark.format(name.split("/")[1]))) for name in originals[:20]]
    sources = [f"{name}.jpg" for name in originals + copies]
    found = path_groups(sources, np.array([source[0] == "b" for source in sources], int))
    assert found is not None and found.rule == "copy" and "20 files" in found.why
    assert same_partition(found.values.tolist(), [*range(60), *range(20)])


def test_several_labels_and_none():
    sources, labels, people = subjects("{person:04d}_{photo}.jpg")
    several = np.eye(3, dtype=np.float32)[labels]
    for known in (several, None):
        found = path_groups(sources, known)
        assert found is not None and same_partition(found.values.tolist(), people.tolist())
    assert path_groups([], None) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=60), st.integers(1, 4), st.integers(0, 9))
def test_any_text_is_a_path(sources, kinds, seed):
    labels = np.random.default_rng(seed).integers(0, kinds, len(sources))
    found = path_groups(sources, labels)
    if found is not None:
        assert found.values.shape == (len(sources),) and found.rule in ("parent", "stem", "copy")
