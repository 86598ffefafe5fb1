"""``fastload check`` as a whole: what it tells, its JSON, its page in a browser, and files that lack this or that."""

import csv
import html.parser
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from check_pictures import crops, jpeg, write
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp

from fastload import open as open_dataset
from fastload.check import check, duplicate_groups
from fastload.check.drift import PROPERTIES, drift
from fastload.check.report import SHOWN_CLUSTERS
from fastload.errors import DataError, UsageError

CLASSES = ("cat", "dog", "<b>bird</b>")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training data of 44 pictures: 36 of their own, 8 altered copies; test data of 24, darker and smaller, 4 of them copies."""
    folder, pictures = tmp_path_factory.mktemp("check"), crops(56, 64)
    rows = [(jpeg(p), f"img/{i * 37:05d}.jpg", i % 2) for i, p in enumerate(pictures[:36])]
    rows += [(jpeg(np.fliplr(pictures[i])), f"img/m{i * 41}.jpg", i % 2) for i in (0, 1, 2)]  # same label
    rows += [
        (jpeg(np.rot90(pictures[i]), 70), f"img/r{i * 43}.jpg", 1 - i % 2) for i in (2, 3)
    ]  # another label
    rows += [
        (rows[5][0], "img/<script>.jpg", 1),
        (rows[6][0], "img/e6.jpg", 0),
        (rows[6][0], "img/f6.jpg", 2),
    ]

    def dark(picture):
        small = Image.fromarray(picture).resize((40, 40))
        return jpeg(ImageEnhance.Brightness(small).enhance(0.5))

    tests = [(dark(pictures[i]), f"t/{i * 11}.jpg", i % 2) for i in (*range(36, 56), 10, 11, 12)]
    tests += [(dark(np.rot90(pictures[13], -1)), "t/turned.jpg", 1)]
    train = write(folder / "train.beton", rows, CLASSES)
    test = write(folder / "test.beton", tests, CLASSES[::-1][:2])  # other numbers for the same names
    with open(folder / "folds.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "fold", "group", "label"])
        table.writerows([id, i % 4 if i < 36 else 3, "", ""] for i, id in enumerate(train.ids))
    return folder, train, test


@pytest.fixture(scope="module")
def report(files):
    folder, train, test = files
    return check(train, test, folds=folder / "folds.csv", progress=False)


def members(clusters):
    return sorted(sorted((p.side, p.index) for p in cluster.pictures) for cluster in clusters)


def test_clusters_are_the_copies_that_were_made(report):
    expected = [
        [(0, 0), (0, 36)],
        [(0, 1), (0, 37)],
        [(0, 2), (0, 38), (0, 39)],
        [(0, 3), (0, 40)],
        [(0, 5), (0, 41)],
    ]
    expected += [
        [(0, 6), (0, 42), (0, 43)],
        [(0, 10), (1, 20)],
        [(0, 11), (1, 21)],
        [(0, 12), (1, 22)],
        [(0, 13), (1, 23)],
    ]
    assert members(report.clusters) == expected
    conflicts = [cluster for cluster in report.clusters if cluster.conflict]
    # 10, 11, ... are named by other numbers in the test file, where dog is number 1 and <b>bird</b> 0.
    names = {c.pictures[0].index: {p.label for p in c.pictures} for c in report.clusters}
    assert names[2] == {"cat", "dog"} and names[6] == {"cat", "<b>bird</b>"} and names[13] == {"dog"}
    assert sorted(c.pictures[0].index for c in conflicts) == sorted(i for i, n in names.items() if len(n) > 1)
    assert {c.pictures[0].index: c.copies for c in report.clusters if c.copies} == {5: 2, 6: 3}
    turns = {(p.side, p.index): p.turn for c in report.clusters for p in c.pictures if p.turn}
    assert turns[0, 36] == "mirrored left to right" and turns[0, 39] == "turned by 90 degrees left"
    assert turns[1, 23] == "turned by 90 degrees right"
    across = {c.pictures[0].index for c in report.clusters if c.across_folds}
    assert across == {0, 1, 2, 5, 6}, "3 and its copy are in fold 3 both"


def test_problems_are_told_with_their_numbers(report):
    told = "\n".join(report.problems)
    assert "5 images are exact copies of one another" in told
    assert "4 of 24 test images (16.7%) are copies or look-alikes of training images" in told
    assert "5 clusters of copies or look-alikes (12 images) lie in more than one fold" in told
    assert "fewer than 10 images, too few for five folds: 1 of 3, '<b>bird</b>' (1)" in told
    assert "times as many images" in told
    assert (
        "test images are darker (brightness: median" in told and "test images are smaller (resolution" in told
    )
    assert report.balance.counts == {"cat": 22, "dog": 21, "<b>bird</b>": 1} and report.balance.ratio == 22
    assert report.groups is None and report.damaged == 0
    assert all(problem in report.text() for problem in report.problems)


def test_duplicate_groups_are_the_clusters_of_the_data(files):
    group = duplicate_groups(files[1])
    expected = np.arange(44)
    for head, copies in {0: [36], 1: [37], 2: [38, 39], 3: [40], 5: [41], 6: [42, 43]}.items():
        expected[copies] = head
    assert group.tolist() == expected.tolist()


def test_drift_is_the_largest_gap_of_the_distributions():
    rng = np.random.default_rng(0)
    one = {name: rng.normal(10, 2, 300) for name in PROPERTIES}
    two = {name: rng.normal(10, 2, 200) for name in PROPERTIES}
    two["brightness"] += 1.5
    two["contrast"] = rng.normal(10, 8, 200)
    rows = {row.name: row for row in drift(one, two)}
    assert list(rows) == list(PROPERTIES)
    for name, row in rows.items():
        values = np.sort(np.concatenate([one[name], two[name]]))
        gap = [abs((one[name] <= v).mean() - (two[name] <= v).mean()) for v in values]
        assert row.distance == pytest.approx(max(gap)) and row.p == ks_2samp(one[name], two[name]).pvalue
        assert row.found == (name in ("brightness", "contrast"))
        assert sum(row.shares[0]) == pytest.approx(1) and sum(row.shares[1]) == pytest.approx(1)
    assert "brighter" in rows["brightness"].sentence and "about the same" in rows["aspect"].sentence
    # Significant and small is no drift, large and by few images neither.
    many = {name: rng.normal(0, 1, 20_000) for name in PROPERTIES}
    rows = drift(many, {name: values + 0.08 for name, values in many.items()})
    assert all(row.p < 1e-6 and not row.found for row in rows)
    assert drift(one, {name: values[:19] for name, values in two.items()}) == []


def test_json_is_all_but_the_pictures(report):
    answer = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert answer["kind"] == "check" and answer["problems"] == report.problems
    assert set(answer) == {"kind", *report.__dataclass_fields__} - {"datasets"}
    assert len(answer["clusters"]) == 10 and answer["clusters"][0]["pictures"][0]["source"].startswith("img/")
    assert answer["balance"]["rare"] == {"<b>bird</b>": 1}


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_the_pictures_and_runs_nothing(report):
    page = Tags(report.html())
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(images) == sum(len(cluster.pictures) for cluster in report.clusters)
    assert all(src.startswith("data:image/jpeg;base64,") for src in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    text = "".join(page.texts)
    assert "img/<script>.jpg" in text and "<b>bird</b>" in text
    assert all(problem[1:] in text for problem in report.problems)
    assert "<ol>" in report._repr_html_() and "<b>bird" not in report._repr_html_()


def test_the_page_opens_in_a_browser_without_a_complaint(tmp_path, report):
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page.html"
    report.write_html(page)
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-quic"
    )
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert done.stdout.count("<section") == report.html().count("<section") > 5


def test_many_clusters_are_cut_on_the_page_and_not_in_the_json(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(SHOWN_CLUSTERS + 9)]
    rows = [(picture, f"{n}_{i}.png", 0) for i, picture in enumerate(pictures) for n in range(2)]
    found = check(write(tmp_path / "many.beton", rows), progress=False)
    assert len(found.to_json()["clusters"]) == SHOWN_CLUSTERS + 9
    assert found.html().count('<div class="cluster"><p') == SHOWN_CLUSTERS
    assert f"{SHOWN_CLUSTERS + 9} clusters; the first {SHOWN_CLUSTERS} are shown" in found.html()


def skipped(report):
    return dict(report.skipped)


def test_files_that_lack_this_or_that(tmp_path):
    pictures = crops(22)
    rows = [(jpeg(p), f"{i}", 0) for i, p in enumerate(pictures)]
    bare = write(tmp_path / "bare.beton", rows, labels=False)
    found = check(bare, bare.subset(np.arange(3)), progress=False)
    assert found.balance is None and found.groups is None and not any(c.conflict for c in found.clusters)
    assert "no labels" in skipped(found)["class balance, label conflicts"]
    assert "20 images on each side" in skipped(found)["drift"]
    assert "Not checked" in found.html()
    alone = check(bare, progress=False)
    assert alone.problems == [] and "no problems found" in alone.text() and "No problems" in alone.html()
    assert {"drift, and copies between training and test", "copies across folds"} <= set(skipped(alone))


def test_a_file_of_ffcv_and_one_of_several_labels(tmp_path, monkeypatch):
    golden = open_dataset(os.path.join(os.path.dirname(__file__), "golden", "v1.beton"))
    check(golden, progress=False).html()
    data = write(
        tmp_path / "x.beton", [(jpeg(p), f"p{i // 2}/{i}.jpg", i % 2) for i, p in enumerate(crops(40))]
    )
    assert check(data, progress=False).groups.rule == "parent"
    monkeypatch.setattr(type(data), "format_version", 0)
    assert "FFCV wrote it" in skipped(check(data, progress=False))["groups from paths"]
    several = np.eye(3, dtype=np.float32)[np.arange(40) % 3] + np.eye(3, dtype=np.float32)[0]
    monkeypatch.setattr(type(data), "column", lambda self, name: np.minimum(several[: len(self)], 1))
    found = check(data, progress=False)
    assert found.balance.counts == {"a": 40, "b": 13, "c": 13}


def test_damaged_images_are_counted_and_shown_as_such(tmp_path):
    rows = [(jpeg(p), f"{i}.jpg", i % 2) for i, p in enumerate(crops(24))]
    data, height, width = rows[4][0]
    rows[4] = ((data[:400], height, width), "4.jpg", 0)
    rows += [(rows[4][0], "again.jpg", 0)]
    found = check(write(tmp_path / "damaged.beton", rows), progress=False)
    assert found.damaged == 2 and "2 images are damaged" in found.problems[0]
    assert found.html().count("damaged</div>") == 2


def test_wrong_calls_are_one_sentence(tmp_path, files):
    train = files[1]
    with pytest.raises(UsageError, match="near is a cosine"):
        check(train, near=2.0)
    with pytest.raises(UsageError, match="one number for each of 44 images"):
        check(train, folds=np.zeros(3, int), progress=False)
    with pytest.raises(UsageError, match="cannot be read"):
        check(train, folds=tmp_path / "none.csv", progress=False)
    with pytest.raises(DataError, match="no images to check"):
        check(train.subset([]), progress=False)
    for text, words in {
        "a,b\n1,2\n": "no columns id and fold",
        "id,fold\nid0,x\n": "got 'x'",
        "id,fold\nid0,1\n": "lacks 43 of 44",
    }.items():
        (tmp_path / "folds.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            check(train, folds=tmp_path / "folds.csv", progress=False)
    with pytest.raises(UsageError, match="cannot be written"):
        check(train, progress=False).write_html(tmp_path / "no" / "page.html")


def shell(*args):
    command = [sys.executable, "-m", "fastload", "check", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path, files):
    folder = files[0]
    page, answer = tmp_path / "page.html", tmp_path / "check.json"
    args = (
        folder / "train.beton",
        "--test",
        folder / "test.beton",
        "--folds",
        folder / "folds.csv",
        "--threads",
        2,
    )
    done = shell(*args, "--html", page, "--json", answer)
    assert done.returncode == 0, done.stderr
    found = json.loads(answer.read_text())
    assert all(problem in done.stdout for problem in found["problems"]) and len(found["clusters"]) == 10
    assert page.read_text().count("<img") == 22
    done = shell(*args, "--json", "-", "--strict")
    assert done.returncode == 1 and json.loads(done.stdout)["problems"] == found["problems"]
    assert "--strict was given" in done.stderr.splitlines()[-1]
    done = shell(folder / "nothing.beton")
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr
