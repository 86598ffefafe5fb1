"""The report of runs: every figure of the files, nothing that could run, and what is there of a run that was killed."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support, roc_auc_score

import fastload
from fastload.cli.report import command
from fastload.errors import UsageError
from fastload.train import metrics, runs
from fastload.train.config import Config
from fastload.train.predictions import Predictions
from fastload.train.report import Page, report
from fastload.train.report.label_errors import suspects

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
FIVE = ["ant", "bee", "cat", "dog", "eel"]
CFG = Config(model="test_resnet", epochs=6, size=32)


# ---- runs made by hand


def held(seed, ids, classes=FIVE, skill=2.2, multilabel=False, groups=False, fold=0):
    """Probabilities that are right often and wrong sometimes."""
    rng = np.random.default_rng(seed)
    shape = (len(ids), len(classes))
    if multilabel:
        labels = (rng.random(shape) < 0.4).astype(np.float32)
        probs = 1 / (1 + np.exp(-(skill * (2 * labels - 1) + rng.normal(0, 2, shape))))
    else:
        labels = rng.integers(0, len(classes), len(ids))
        powers = np.exp(rng.normal(0, 1, shape) + skill * np.eye(len(classes))[labels])
        probs = powers / powers.sum(axis=1, keepdims=True)
    named = np.array([f"person {i // 3}" for i in range(len(ids))]) if groups else None
    return Predictions(
        list(ids), probs.astype(np.float32), list(classes), labels, named, np.full(len(ids), fold), multilabel=multilabel
    )  # fmt: skip


def make_run(folder, best=None, last=None, cfg=CFG, done=None, seed=0, data=None):
    """The folder of one training of which ``done`` epochs are finished; all if None."""
    folder.mkdir(parents=True)
    cfg.save(folder / runs.CONFIG)
    about = {
        "kind": "run", "resolved": {"device": "cpu", "amp": "off", "lr": cfg.peak_lr, "groups": None},
        "data": {"train": data, "valid": data, "train_images": 1234, "valid_images": len(best or ())},
        "versions": {"fastload": "0.1.0", "torch": "9.8.7"}, "machine": {"cores": 2, "gpus": ["a GPU", HOSTILE]},
    }  # fmt: skip
    (folder / runs.ABOUT).write_text(json.dumps(about))
    rng, history = np.random.default_rng(seed), []
    for epoch in range(1, 1 + (cfg.epochs if done is None else done)):
        names = dict.fromkeys(
            [
                "lr",
                "train_loss",
                "images_per_s",
                "stall",
                "valid_loss",
                "accuracy",
                "macro_f1",
                runs.column(cfg.metric),
            ]
        )
        history.append({"epoch": epoch, **{name: float(rng.random()) for name in names}, "seconds": 3.5})
    runs.write_log(folder, history)
    for part, name in ((best, "valid_probs.npz"), (last, "last_probs.npz")):
        if part is not None:
            part.save(folder / name)
    if done is None:
        result = {"best": runs.best_line(history, cfg.metric), "last": history[-1]}
        (folder / runs.RESULT).write_text(json.dumps(result))
    return folder


def make_cv(folder, parts, cfg=CFG, folds=None, finished=True, data=None):
    folder.mkdir(parents=True)
    cfg.save(folder / runs.CONFIG)
    about = {
        "kind": "cv",
        "folds": folds or len(parts),
        "repeats": 1,
        "scheme": "stratified_group",
        "resolved": {"groups": "person"},
    }
    (folder / runs.ABOUT).write_text(json.dumps(about))
    for k, part in enumerate(parts):
        make_run(folder / f"fold{k}", part, part, cfg, seed=k, data=data)
    if finished:
        whole = together(parts)
        whole.save(folder / "oof.npz")
        whole.save(folder / "oof_last.npz")
        both = {**whole.summary(), "interval": [0.1234, 0.9876]}
        (folder / "scores.json").write_text(
            json.dumps({"metric": cfg.metric, "best": both, "last": both, "folds": []})
        )
    return folder


def together(parts):
    return Predictions(
        [id for part in parts for id in part.ids], *(np.concatenate([getattr(p, n) for p in parts]) if n else parts[0].classes
        for n in ("probs", "", "labels", "groups", "folds"))
    )  # fmt: skip


def ids(count, start=0):
    return [str(i) for i in range(start, start + count)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A file of 150 images, each of one colour that says which it is; their ids are 0, 1, ..."""
    path = tmp_path_factory.mktemp("data") / "pictures.beton"
    items = [{"image": np.full((24, 40, 3), (i, 255 - i, 90), np.uint8), "label": i % 5} for i in range(150)]
    fastload.convert(items, path, classes=FIVE, store="raw", progress=False)
    return str(path)


# ---- the page as a tree


class Tree(html.parser.HTMLParser):
    """Elements with their attributes, texts, and tables as rows of texts; complains about what is not closed."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data

    def all(self, tag, class_=None):
        return [
            a
            for t, a in self.elements
            if t == tag and (class_ is None or class_ in a.get("class", "").split())
        ]

    def text(self):
        return " ".join(" ".join(self.texts).split())

    def row(self, first):
        found = [row for row in self.rows if row and row[0] == first]
        assert found, f"no row {first!r}"
        return found[0]


def tree_of(*folders, data=None):
    return Tree(Page(folders, data).html())


def digits(value):
    return f"{value:.4f}"


# ---- figures


def test_scores_are_those_of_scikit_learn(tmp_path):
    best, last = held(1, ids(120)), held(2, ids(120), skill=1.5)
    tree = tree_of(make_run(tmp_path / "a", best, last))
    for name, score in (("accuracy", None), ("macro-F1", "macro"), ("weighted F1", "weighted")):
        wanted = []
        for part in (best, last):
            guess = part.probs.argmax(axis=1)
            wanted.append(
                (guess == part.labels).mean()
                if score is None
                else f1_score(part.labels, guess, average=score)
            )
        assert tree.row(name) == [name, *map(digits, wanted)]
    assert digits(roc_auc_score(best.labels, best.probs, multi_class="ovr")) == tree.row("AUROC")[1]


def test_the_headline_is_the_metric_of_the_run_with_its_interval(tmp_path):
    best = held(1, ids(90), groups=True)
    folder = make_run(tmp_path / "a", best, cfg=replace(CFG, metric="macro_f1"))
    text = tree_of(folder).text()
    low, high = metrics.bootstrap("macro_f1", best.true, best.probs, best.groups)
    kept = runs.best_line(runs.read_log(folder), "macro_f1")["epoch"]
    assert f"{digits(best.score('macro_f1'))} macro-F1 at the best epoch ({kept} of 6)" in text
    assert (
        f"95% interval {digits(low)} to {digits(high)}, bootstrap over 90 held-out images, drawn by group"
        in text
    )
    assert "at the last epoch" not in text  # its probabilities are not there


def test_each_class_has_its_figures_weakest_first(tmp_path):
    best = held(3, ids(150))
    tree = tree_of(make_run(tmp_path / "a", best))
    wanted = zip(*precision_recall_fscore_support(best.labels, best.probs.argmax(axis=1), labels=range(5)))
    rows = [row for row in tree.rows if row[0] in FIVE]
    for name, (precision, recall, f1, support) in zip(FIVE, wanted):
        auroc = roc_auc_score(best.labels == FIVE.index(name), best.probs[:, FIVE.index(name)])
        row = tree.row(name)
        assert [row[1], *row[3:]] == [str(support), *map(digits, (f1, precision, recall, auroc))]
    assert [float(row[3]) for row in rows] == sorted(float(row[3]) for row in rows) and len(rows) == 5


def test_the_matrix_has_every_count(tmp_path):
    best = held(4, ids(150))
    text = tree_of(make_run(tmp_path / "a", best)).texts
    table = confusion_matrix(best.labels, best.probs.argmax(axis=1))
    found = {}
    for part in text:
        if match := re.fullmatch(r"(\w+) taken for (\w+): (\d+) \((.*)% of (\d+)\)", part):
            true, given, count, share, of = match.groups()
            found[FIVE.index(true), FIVE.index(given)] = int(count)
            assert float(share) == pytest.approx(100 * int(count) / int(of), abs=0.051)
    assert found == {(i, j): table[i, j] for i, j in np.argwhere(table)}


def test_of_many_classes_the_most_confused_pairs_are_listed(tmp_path):
    names = [f"class {i}" for i in range(40)]
    best = held(5, ids(400), names, skill=3)
    tree = tree_of(make_run(tmp_path / "a", best))
    wrong = [(names[t], names[p]) for t, p in zip(best.labels, best.probs.argmax(axis=1)) if t != p]
    counts = Counter(wrong)
    rows = [row for row in tree.rows if row[0] in names and row[1] in names]
    assert len(rows) == 25 and [int(row[2]) for row in rows] == [n for _, n in counts.most_common(25)]
    assert all(counts[row[0], row[1]] == int(row[2]) for row in rows)
    assert not tree.all("rect", "hit")


def points(tree, style):
    return [
        np.array([[float(v) for v in p.split(",")] for p in a["points"].split()])
        for a in tree.all("polyline")
        if a["class"].split()[1:] == style.split()
    ]


def test_curves_are_the_log(tmp_path):
    folder = make_run(tmp_path / "a", held(6, ids(60)))
    history = runs.read_log(folder)
    curves = points(tree_of(folder), "ours")
    # Loss held out, accuracy, macro-F1, learning rate, stall, images/s: each an affine picture of its column.
    for curve, name in zip(curves, ("valid_loss", "accuracy", "macro_f1", "lr", "stall", "images_per_s")):
        values = [line[name] for line in history]
        assert curve[:, 0] == pytest.approx([0, 20, 40, 60, 80, 100])
        assert np.corrcoef(curve[:, 1], values)[0, 1] == pytest.approx(-1, abs=1e-4), name
    assert len(curves) == 6
    (training,) = points(tree_of(folder), "other")
    assert np.corrcoef(training[:, 1], [line["train_loss"] for line in history])[0, 1] == pytest.approx(
        -1, abs=1e-4
    )


def test_folds_are_thin_lines_behind_their_mean(tmp_path):
    folder = make_cv(tmp_path / "cv", [held(k, ids(30, 30 * k), groups=True, fold=k) for k in range(3)])
    tree = tree_of(folder)
    assert len(points(tree, "thin ours")) == 6 * 3 and len(points(tree, "ours")) == 6
    logs = [runs.read_log(folder / f"fold{k}") for k in range(3)]
    means = [np.mean([log[i]["accuracy"] for log in logs]) for i in range(6)]
    titles = [text for text in tree.texts if re.match(r"mean of held out, epoch \d: ", text)]
    assert [title.rpartition(" ")[2] for title in titles[6:12]] == [f"{mean:.4g}" for mean in means]


def test_calibration_and_speed_are_said(tmp_path):
    best = held(7, ids(120))
    folder = make_run(tmp_path / "a", best)
    text = tree_of(folder).text()
    sure, right = best.probs.max(axis=1), best.probs.argmax(axis=1) == best.labels
    error = sum(
        abs(sure[at].sum() - right[at].sum())
        for i in range(15)
        if (at := (sure > i / 15) & (sure <= (i + 1) / 15)).any()
    )
    assert f"Expected calibration error {100 * error / 120:.2f}%" in text
    stall = np.median([line["stall"] for line in runs.read_log(folder)])
    assert f"{100 * stall:.1f}% of the training time was spent waiting for data" in text


def test_a_cross_validation_shows_the_pooled_scores_and_each_fold(tmp_path):
    parts = [held(k, ids(30, 30 * k), groups=True, fold=k) for k in range(3)]
    tree = tree_of(make_cv(tmp_path / "cv", parts))
    whole = together(parts)
    text = tree.text()
    assert f"{digits(whole.score('accuracy'))} accuracy at the best epochs" in text
    assert "95% interval 0.1234 to 0.9876" in text  # what scores.json says, not drawn again
    for k, part in enumerate(parts):
        row = tree.row(f"fold{k}")
        assert row[1] == "30" and row[3] == row[4] == digits(part.score("accuracy"))
    assert (
        "Split stratified_group" in text
        and "Groups person" in text
        and "Folds 3 " in text
        and "Device cpu" in text
    )


def test_changed_options_are_emphasised_and_all_are_there(tmp_path):
    tree = tree_of(make_run(tmp_path / "a", held(1, ids(30)), cfg=replace(CFG, mixup=0.25)))
    text = tree.text()
    assert "mixup 0.25 default 0.0" in text and "cutmix 0.0 default" not in text
    assert {name for name in CFG.to_dict() if f" {name} " in text} == set(CFG.to_dict())
    assert (
        sum("changed" in a.get("class", "") for a in tree.all("dt")) == 2 * 4
    )  # model, epochs, size, mixup, in both lists
    assert "torch 9.8.7" in text and "cores 2" in text


# ---- pictures


def colour(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean(axis=(0, 1))


def test_the_worst_mistakes_come_with_their_own_pictures(tmp_path, pictures):
    best = held(8, ids(150), skill=1.0)
    tree = tree_of(make_run(tmp_path / "a", best, data=pictures))
    wrong = np.flatnonzero(best.probs.argmax(axis=1) != best.labels)
    truth = best.probs[wrong, best.labels[wrong]]
    wanted = [best.ids[i] for i in wrong[np.argsort(truth)][:24]]
    images = tree.all("img")
    assert [a["alt"] for a in images[:24]] == wanted
    for a in images:
        number = int(a["alt"])
        assert colour(a["src"]) == pytest.approx([number, 255 - number, 90], abs=3)
    worst = wrong[np.argmin(truth)]
    text = f"true {100 * truth.min():.1f}% {FIVE[best.labels[worst]]} predicted {100 * best.probs[worst].max():.1f}%"
    assert f"{best.ids[worst]} {text} {FIVE[best.probs[worst].argmax()]}" in tree.text()


def test_without_the_data_a_sentence_stands_in_place_of_pictures(tmp_path, pictures):
    folder = make_run(tmp_path / "a", held(8, ids(150), skill=1.0), data="/nowhere/gone.beton")
    tree = tree_of(folder)
    assert (
        not tree.all("img") and "The pictures are not shown: no such file: /nowhere/gone.beton" in tree.text()
    )
    assert tree_of(folder, data=pictures).all("img")
    assert tree_of(folder, data=fastload.open(pictures)).all("img")
    other = held(8, [f"other {i}" for i in range(150)], skill=1.0)
    assert "are not in the data" in tree_of(make_run(tmp_path / "b", other, data=pictures)).text()


def test_a_damaged_image_does_not_cost_the_others(pictures, monkeypatch):
    from fastload.errors import CorruptError
    from fastload.train.report import pictures as module

    def encode(image):
        if image[0, 0, 0] == 7:
            raise CorruptError("cut off")
        return "fine"

    monkeypatch.setattr(module, "_encode", encode)
    found, problem = module.find(["6", "7", "8"], [pictures])
    assert found == {"6": "fine", "8": "fine"} and problem.startswith("1 of 3 images are")


def test_a_picture_comes_from_the_first_source_that_has_it(tmp_path, pictures):
    from fastload.train.report.pictures import find

    grey = [{"image": np.full((9, 9, 3), 100, np.uint8), "label": 0}] * 200
    fastload.convert(grey, tmp_path / "grey.beton", classes=FIVE, store="raw", progress=False)
    found, problem = find(["3", "170"], [pictures, str(tmp_path / "grey.beton")])
    assert colour(found["3"]) == pytest.approx([3, 252, 90], abs=3) and colour(found["170"]) == pytest.approx(
        [100] * 3, abs=3
    )
    assert problem == ""


# ---- label errors


def slow_suspects(labels, probs):
    """The definition, image by image."""
    mean = {c: np.mean([p[c] for p, label in zip(probs, labels) if label == c]) for c in set(labels.tolist())}
    found = {}
    for i, (label, p) in enumerate(zip(labels.tolist(), probs)):
        sure = [c for c in mean if p[c] >= mean[c]]
        if sure:
            best = max(sure, key=lambda c: (p[c], -c))
            if best != label and p[best] > p[label]:
                found[i] = (label, best)
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6))
def test_suspects_are_the_confident_ones_off_the_diagonal(seed, count, classes):
    rng = np.random.default_rng(seed)
    labels, probs = rng.integers(0, classes, count), rng.dirichlet(np.ones(classes), count)
    found = suspects(labels, probs)
    assert {one.row: (one.given, one.suggested) for one in found} == slow_suspects(labels, probs)
    margins = [probs[one.row, one.suggested] - probs[one.row, one.given] for one in found]
    assert [one.margin for one in found] == pytest.approx(margins) and margins == sorted(
        margins, reverse=True
    )


def test_turned_labels_are_found(tmp_path):
    good = held(9, ids(400), skill=6)
    labels = good.labels.copy()
    turned = np.random.default_rng(0).choice(400, 20, replace=False)
    labels[turned] = (labels[turned] + 1) % 5
    found = {one.row for one in suspects(labels, good.probs)}
    assert len(found & set(turned.tolist())) >= 18 and len(found - set(turned.tolist())) <= 4
    text = tree_of(make_run(tmp_path / "a", replace(good, labels=labels))).text()
    assert f"{len(found)} of 400 images are confidently of another class" in text


def test_each_label_of_several_is_a_question_of_its_own():
    good = held(10, ids(300), skill=8, multilabel=True)
    labels = good.labels.copy()
    labels[[5, 6], [2, 3]] = 1 - labels[[5, 6], [2, 3]]
    found = suspects(labels, good.probs)
    assert {(5, 2), (6, 3)} <= {(one.row, one.label) for one in found}
    assert all(one.given == labels[one.row, one.label] and one.suggested == 1 - one.given for one in found)


# ---- several runs, several labels, pieces of runs


def test_runs_are_compared_first(tmp_path):
    parts = [held(k, ids(30, 30 * k), groups=True, fold=k) for k in range(3)]
    best = held(1, ids(90), skill=3)
    folders = [
        make_run(tmp_path / "a", best),
        make_cv(tmp_path / "b", parts, replace(CFG, mixup=0.5)),
        make_run(tmp_path / "x" / "a", best, done=2),
    ]
    tree = tree_of(*folders)
    names = [f"{tmp_path.name}/a", "b", "x/a"]
    assert [tree.row(name)[2] for name in names] == [
        digits(p.score("accuracy")) for p in (best, together(parts), best)
    ]
    assert tree.row("Option") == ["Option", *names]
    assert (
        tree.row("mixup") == ["mixup", "0.0", "0.5", "0.0"]
        and sum(row[0] == "cutmix" for row in tree.rows) == 0
    )
    assert "scored on different images" not in tree.text()
    assert {a["href"][1:] for a in tree.all("a")} <= {a["id"] for _, a in tree.elements if "id" in a}
    other = make_run(tmp_path / "c", held(1, ids(90, 7)))
    assert "scored on different images" in tree_of(folders[0], other).text()
    same = tree_of(folders[0], folders[0])
    assert "None: the runs were made with the same options." in same.text() and same.row(
        f"{tmp_path.name}/a (2)"
    )


def test_intervals_are_drawn_on_one_scale(tmp_path):
    """And none where there is none: all images are of one group."""
    one, two = held(1, ids(90), skill=3), held(2, ids(90), skill=1)
    lone = replace(one, groups=np.array(["x"] * 90))
    page = Page([make_run(tmp_path / name, part) for name, part in (("a", one), ("b", two), ("c", lone))])
    tree = Tree(page.html())
    heads = [metrics.bootstrap("accuracy", part.true, part.probs) for part in (one, two)]
    low, high = min(head[0] for head in heads), max(head[1] for head in heads)
    dots = [float(a["cx"][:-1]) for a in tree.all("circle", "dot")]
    wanted = [100 * (part.score("accuracy") - low) / (high - low) for part in (one, two)]
    assert dots == pytest.approx(wanted, abs=0.01)
    assert tree.row("c")[2:4] == [digits(one.score("accuracy")), "\N{EN DASH}\N{EN DASH}\N{EN DASH}"]


def test_the_best_run_is_bold_also_where_less_is_better(tmp_path):
    cfg = replace(CFG, metric="log_loss")
    good, bad = held(1, ids(90), skill=4), held(1, ids(90), skill=1)
    page = Page([make_run(tmp_path / "bad", bad, cfg=cfg), make_run(tmp_path / "good", good, cfg=cfg)])
    assert page.comparison["best"] == good.score("log_loss") < bad.score("log_loss")
    assert f"<b>{digits(good.score('log_loss'))}</b>" in page.html()


def test_images_with_several_labels(tmp_path, pictures):
    best = held(11, ids(150), skill=1.5, multilabel=True)
    tree = tree_of(make_run(tmp_path / "a", best, best, data=pictures))
    given, true = best.probs > 0.5, best.labels > 0.5
    for i, name in enumerate(FIVE):
        row = tree.row(name)
        assert row[1] == str(true[:, i].sum()) and row[3] == digits(f1_score(true[:, i], given[:, i]))
        assert row[-2:] == [str((true & ~given)[:, i].sum()), str((given & ~true)[:, i].sum())]
    off = np.where(given != true, np.abs(best.labels - best.probs), 0).max(axis=1)
    assert [a["alt"] for a in tree.all("img")[:24]] == [
        best.ids[i] for i in np.argsort(-off, kind="stable")[:24]
    ]
    assert f"{(given != true).any(axis=1).sum()} of 150 held-out images are wrong" in tree.text()
    assert not tree.all("rect", "hit")


def test_a_run_that_was_killed_is_shown_as_far_as_it_is(tmp_path):
    for done in (0, 2):
        best = held(1, ids(60)) if done else None
        tree = tree_of(make_run(tmp_path / f"run{done}", best, done=done))
        assert f"Not finished: {done} of 6 epochs are in the log." in tree.text()
        assert bool(points(tree, "ours")) == bool(done)
        assert ("There are no held-out probabilities yet" in tree.text()) == (not done)


def test_a_cross_validation_that_was_killed_shows_the_folds_that_are_finished(tmp_path):
    parts = [held(k, ids(30, 30 * k), groups=True, fold=k) for k in range(2)]
    folder = make_cv(tmp_path / "cv", parts, folds=5, finished=False)
    make_run(folder / "fold2", held(2, ids(30, 60), groups=True), done=3)
    (folder / "fold2" / "valid_probs.npz").unlink()
    text = tree_of(folder).text()
    assert f"{digits(together(parts).score('accuracy'))} accuracy at the best epochs" in text
    assert "images held out in 2 of 5 folds" in text and "fold2 is not finished: 3 of 6 epochs" in text


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "log.jsonl", "valid_probs.npz", "last_probs.npz", "result.json"]
)
@pytest.mark.parametrize("content", [b"", b"{oops: [", b"\xff\xfe\x00", b"[1, 2]", None])
def test_a_damaged_file_costs_its_part_only(tmp_path, name, content):
    best = held(1, ids(60))
    folder = make_run(tmp_path / "a", best, best)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    page = Page([folder])
    Tree(page.html())
    assert page.sections[0]["notes"] or (name, content) == ("last_probs.npz", None)
    if name != "valid_probs.npz":
        assert page.sections[0]["headline"]["value"] == best.score("accuracy")


def test_of_a_torn_log_the_whole_lines_are_shown(tmp_path):
    folder = make_run(tmp_path / "a", held(1, ids(60)))
    text = (folder / runs.LOG).read_text()
    (folder / runs.LOG).write_text(text[:-30])
    tree = tree_of(folder)
    assert "Line 6 of" in tree.text() and all(len(curve) == 5 for curve in points(tree, "ours"))


def test_what_this_version_does_not_know_is_shown(tmp_path):
    folder = make_run(tmp_path / "a", held(1, ids(60)))
    (folder / runs.CONFIG).write_text("metric: my_own\nwarp_drive: 9\nepochs: 6\n")
    text = tree_of(folder).text()
    assert "'my_own' is not known here; accuracy is shown" in text and "warp_drive 9" in text


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="there is no run of fastload"):
        Page([tmp_path])
    with pytest.raises(UsageError, match="at least one run folder"):
        report([], tmp_path / "page.html")


# ---- the page


def hostile_run(folder, pictures):
    best = held(
        1,
        [f"{HOSTILE}{'/long' * 30}/{i}" for i in range(120)],
        [f"{HOSTILE} {'W' * 90} {i}" for i in range(4)],
        skill=1,
    )
    return make_run(folder, best, best, replace(CFG, groups=HOSTILE, valid=HOSTILE), data=pictures)


def pages(tmp_path, pictures):
    """Pages of every kind."""
    parts = [held(k, ids(30, 30 * k), groups=True, fold=k) for k in range(3)]
    wide = held(13, ids(300), [f"a long name of one of many classes: {i}" for i in range(25)])
    many = held(12, ids(300), [f"a class with quite a long name, number {i}" for i in range(120)], skill=4)
    one, cv = (
        make_run(tmp_path / "one", held(1, ids(90)), data=pictures),
        make_cv(tmp_path / "cv", parts, data=pictures),
    )
    several = make_run(tmp_path / "several", held(1, ids(90), multilabel=True), data=pictures)
    return {
        "one": [one], "three": [one, cv, several], "many": [make_run(tmp_path / "many", many, many), make_run(tmp_path / "wide", wide)],
        "killed": [make_run(tmp_path / "killed", done=0)], "hostile": [hostile_run(tmp_path / ("n<b>ame" * 9), pictures), one],
    }  # fmt: skip


def test_the_page_loads_nothing_and_runs_nothing(tmp_path, pictures):
    for name, folders in pages(tmp_path, pictures).items():
        page = Page(folders).html()
        tree = Tree(page)
        assert not any(tree.all(tag) for tag in ("script", "link", "iframe", "form", "object", "base")), name
        for _, attributes in tree.elements:
            assert not any(key.startswith("on") for key in attributes)
            assert attributes.get("href", "#").startswith("#") and attributes.get(
                "src", "data:image/jpeg;"
            ).startswith("data:image/jpeg;")
        policy = next(a["content"] for a in tree.all("meta") if "http-equiv" in a)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        assert "url(" not in page and "@import" not in page
        if name == "hostile":
            assert HOSTILE in "".join(tree.texts) and "49" not in re.findall(
                r"alert\(2\)>(\S*)", "".join(tree.texts)
            )


def test_the_command_writes_the_page_and_prints_its_figures(tmp_path, pictures):
    best = held(8, ids(150), skill=1.0)
    folder, out = make_run(tmp_path / "a", best, best), tmp_path / "new" / "page.html"
    done = CliRunner().invoke(
        command, [str(folder), "-o", str(out), "--data", pictures], catch_exceptions=False
    )
    assert done.exit_code == 0 and out.read_text(encoding="utf-8") == Page([folder], pictures).html()
    assert f"accuracy {digits(best.score('accuracy'))} (" in done.output and f"page: {out}" in done.output
    assert f"{(best.probs.argmax(axis=1) != best.labels).sum()} of 150 held-out images wrong" in done.output
    assert report([folder], tmp_path / "b.html", data=pictures).read_text(encoding="utf-8") == out.read_text(
        encoding="utf-8"
    )


@pytest.fixture(scope="module")
def chromium():
    found = next(
        (at for name in ("chromium", "chromium-browser", "google-chrome") if (at := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def opened(chromium, tmp_path, page, width):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --dump-dom"
    flags += (
        f" --disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size={width},900"
    )
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


@pytest.mark.parametrize("name", ["three", "hostile"])
def test_the_page_opens_in_a_browser_without_a_complaint(tmp_path, pictures, chromium, name):
    page = Page(pages(tmp_path, pictures)[name]).write(tmp_path / "page.html")
    shown = opened(chromium, tmp_path, page, 1280)
    assert (
        shown.count("<section") == page.read_text(encoding="utf-8").count("<section") > 8
        and "Made by" in shown
    )


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(tmp_path, pictures, chromium, width):
    """All kinds of pages below one another, with a script added that measures them."""
    whole = "".join(Page(folders).html() for folders in pages(tmp_path, pictures).values())
    whole = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole)
    whole += "<script>const d = document.documentElement; d.dataset.wide = d.scrollWidth; d.dataset.window = innerWidth</script>"
    page = tmp_path / "page.html"
    page.write_text(whole, encoding="utf-8")
    shown = opened(chromium, tmp_path, page, width)
    wide, window = (int(re.search(rf'data-{name}="(\d+)"', shown)[1]) for name in ("wide", "window"))
    assert wide <= window <= max(width, 500)


# ---- a real run


def test_runs_that_were_really_trained(tmp_path):
    from fastload.train import Trainer
    from fastload.train.cv import cross_validate

    rng = np.random.default_rng(0)
    colours = np.array([(40, 40, 200), (40, 200, 40), (200, 40, 40)])
    items = [
        {
            "image": np.clip(colours[i % 3] + rng.integers(-90, 90, (32, 32, 3)), 0, 255).astype(np.uint8),
            "label": i % 3,
        }
        for i in range(48)
    ]
    data = tmp_path / "data.beton"
    fastload.convert(items, data, classes=["blue", "green", "red"], store="raw", progress=False)
    cfg = Config(
        model="test_resnet", epochs=2, size=32, batch_size=8, augment="light", device="cpu", threads=1, allow_leak=True,
        metric="macro_f1",
    )  # fmt: skip
    run = Trainer(cfg).fit(data, out=tmp_path / "run", progress=False)
    cv = cross_validate(data, cfg, folds=2, out=tmp_path / "cv", progress=False)
    page = Page([run, cv])
    assert [one["notes"] for one in page.sections] == [[], []]
    tree = Tree(page.html())
    assert tree.row("run")[2] == digits(run.score) and tree.row("cv")[2] == digits(cv.score)
    assert tree.row("cv")[3].split("\N{EN DASH}") == [digits(value) for value in cv.interval]
    for k, fold in enumerate(cv.scores["folds"]):
        row = tree.row(f"fold{k}")
        assert row[1:4] == [str(fold["images"]), f"{fold['best_epoch']} of 2", digits(fold["macro_f1"])]
    wrong = (cv.oof.predicted != cv.oof.labels).sum() + (run.oof.predicted != run.oof.labels).sum()
    assert len(tree.all("img")) >= min(wrong, 24)
