"""``fastload parity`` against facts of its own: figures by numpy, loaders that are wrong on purpose, answers of a model by hand."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

import fastload
from fastload import parity
from fastload import transforms as T
from fastload.cli import main
from fastload.errors import CorruptError, DataError, UsageError
from fastload.train import Config, Trainer, predict

SIZE = 64


@pytest.fixture
def photos_file(beton_file):
    """Twelve pictures, JPEG and raw by turns, three times as large as the crop: resizing matters."""
    return beton_file("p.beton", count=12, store="mixed", size=(190, 250))


def test_the_figures_are_those_of_numpy():
    rng = np.random.default_rng(0)
    sums, ours, theirs = parity.Differences(), [], []
    for index in (5, 9):
        a = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        b = np.clip(a + rng.integers(-3, 4 + 20 * (index == 9), a.shape), 0, 255).astype(np.uint8)
        b[0, 0] = 255 - a[0, 0]  # rare and far apart: the largest is not the 99th percentile
        sums.add(a, b, index)
        ours.append(a)
        theirs.append(b)
    difference = np.array(ours).astype(float) - np.array(theirs)
    row = sums.row("eval crop", "fast", "Pillow")
    assert row.mean == pytest.approx(np.abs(difference).mean())
    assert row.p99 == np.percentile(np.abs(difference), 99, method="inverted_cdf")
    assert row.largest == np.abs(difference).max() > row.p99
    np.testing.assert_allclose(row.shift, difference.mean((0, 1, 2)))
    assert row.large == pytest.approx((np.abs(difference).max(-1) > 2).mean())
    assert row.worst_index == 9 and row.worst == pytest.approx(np.abs(difference[1]).mean())
    assert row.images == 2
    with pytest.raises(DataError, match="shapes differ"):
        sums.add(np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8), 0)


def test_equal_pictures_differ_by_nothing():
    sums = parity.Differences()
    sums.add(np.full((4, 4, 3), 7, np.uint8), np.full((4, 4, 3), 7, np.uint8), 3)
    row = sums.row("eval crop", "exact", "Pillow")
    assert (row.mean, row.p99, row.largest, row.shift, row.large, row.worst) == (0, 0, 0, (0, 0, 0), 0, 0)


def test_a_right_loader_is_within_the_tolerances(photos_file):
    report = parity.measure(photos_file, parity.Options(size=SIZE))
    assert report.exceeded == [] and report.samples == 12
    assert [(r.pipeline, r.ours, r.reference) for r in report.rows] == [
        (pipeline, *pair) for pipeline in ("train crop", "eval crop") for pair in parity.PAIRS
    ]
    assert all(r.images == 12 for r in report.rows)
    assert report.settings["stored"] == {"jpeg": 6, "raw": 6}
    exact = [r for r in report.rows if r.ours == "exact"]
    assert all(0 < r.mean < 0.5 and r.largest <= 2 for r in exact)
    # Two trusted libraries are not equal either, and that is said.
    assert all(r.mean < 0.5 for r in report.rows if r.ours == "torchvision")


@pytest.mark.parametrize("size", [(190, 250), (250, 190), (64, 64), (20, 31)])
def test_any_shape_and_enlarging(beton_file, size):
    path = beton_file("s.beton", count=4, size=size)
    report = parity.measure(path, parity.Options(size=37))
    # Noise in colour, enlarged, is worse for the fast way than any photograph.
    assert not [line for line in report.exceeded if "exact" in line]
    assert all(r.mean < 3 for r in report.rows)


def wrong(change, monkeypatch):
    """Let the loader that is measured spoil its batches by ``change(batch, loader)``."""

    class Wrong(fastload.Loader):
        def __iter__(self):
            for batch in super().__iter__():
                change(batch, self)
                yield batch

    monkeypatch.setattr(parity, "Loader", Wrong)


def shift_by_a_pixel(batch, loader):
    batch[0][:] = torch.roll(batch[0], 1, dims=3)


def swap_red_and_blue(batch, loader):
    batch[0][:] = batch[0].flip(1)


def without_antialias(batch, loader):
    if isinstance(loader.plan.specs[0], T.Resize):
        for i, base in enumerate(batch.index.tolist()):
            whole = torch.from_numpy(loader.dataset[base]["image"]).permute(2, 0, 1)
            small = F.resize(whole, [loader.plan.specs[0].size], antialias=False)
            batch[0][i] = F.center_crop(small, [SIZE, SIZE])


def brighten(batch, loader):
    batch[0][:] = batch[0].clamp(max=254) + 1


def spoil_one_image(batch, loader):
    batch[0][batch.index == 7] = 0


def unflipped(batch, loader):
    if isinstance(loader.plan.specs[0], T.RandomResizedCrop):
        batch[0][:] = batch[0].flip(3)


@pytest.mark.parametrize(
    "change, what",
    [
        (shift_by_a_pixel, "mean error"),
        (swap_red_and_blue, "mean error"),
        (without_antialias, "eval crop: the mean error"),
        (brighten, "shifted by"),
        (spoil_one_image, "sample 7"),
        (unflipped, "train crop: the mean error"),
    ],
)
def test_a_wrong_loader_exceeds_the_tolerances(photos_file, monkeypatch, change, what):
    wrong(change, monkeypatch)
    report = parity.measure(photos_file, parity.Options(size=SIZE))
    for decode in ("fast", "exact"):
        said = [line for line in report.exceeded if decode in line]
        assert any(what in line for line in said), report.exceeded
    if change is without_antialias:
        assert not any("train crop" in line for line in report.exceeded)
    assert all(
        r.mean < 0.5 for r in report.rows if r.ours == "torchvision"
    )  # the references are as they were


def test_one_wrong_image_does_not_hide_among_many():
    sums = parity.Differences()
    black = np.zeros((8, 8, 3), np.uint8)
    for index in range(199):
        sums.add(black, black, index)
    sums.add(black + 10, black, 199)
    row = sums.row("eval crop", "exact", "Pillow")
    assert row.mean < 0.1
    assert any("sample 199 is 10.000" in line for line in parity.exceeded([row]))


def test_images_are_spread_over_a_view_and_named_by_their_place_in_it(photos_file, monkeypatch):
    with fastload.open(photos_file) as data:
        view = data.subset([11, 7, 3, 2, 0])
        wrong(spoil_one_image, monkeypatch)
        report = parity.measure(view, parity.Options(images=3, size=SIZE))
        assert all(r.images == 3 for r in report.rows) and report.exceeded == []  # 11, 3, 0 of the file
        report = parity.measure(view, parity.Options(images=5, size=SIZE))
        assert any("sample 1 " in line for line in report.exceeded)  # 7 is at place 1


def test_wrong_options_are_refused():
    for options, said in (
        ({"images": 0}, "images.*got 0"),
        ({"size": -1}, "size.*got -1"),
        ({"threads": 0}, "threads.*got 0"),
        ({"random_weights": True}, "got model None"),
        ({"model": "a", "checkpoint": "b", "random_weights": True}, "got checkpoint 'b'"),
    ):
        with pytest.raises(UsageError, match=said):
            parity.Options(**options)


def test_a_corrupt_sample_is_named(small):
    with fastload.open(small) as data:
        offset = bytes(open(small, "rb").read()).index(bytes(data.encoded(3).data))
    with open(small, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 200)
    with pytest.raises(CorruptError, match="sample 3"):
        parity.measure(small, parity.Options(size=32))


# -- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, picture):
    folder = tmp_path_factory.mktemp("run")
    tint = np.array([[60, 0, 0], [0, 0, 60]])
    items = [
        {"image": np.clip(picture(70, 90, i) // 2 + tint[i % 2], 0, 255).astype(np.uint8), "label": i % 2}
        for i in range(24)
    ]
    data = folder / "t.beton"
    fastload.convert(items, data, store="jpeg", classes=["red", "blue"], progress=False)
    cfg = Config(
        model="test_resnet", epochs=4, size=32, batch_size=8, lr=3e-3, augment="none", device="cpu", threads=1
    )
    trained = Trainer(cfg).fit(data, out=folder / "run", progress=False)
    return trained, data


def by_hand(trained, data):
    """Logits of Pillow's pixels without any code of fastload's: decode, resize, crop, normalise, timm's model."""
    state = torch.load(trained.folder / "best.pt", weights_only=True)
    model = timm.create_model("test_resnet", num_classes=2)
    model.load_state_dict(state["weights"])
    pictures = []
    with fastload.open(data) as dataset:
        for i in range(len(dataset)):
            whole = Image.open(io.BytesIO(bytes(dataset.encoded(i).data)))
            small = whole.resize((int(32 * 90 / 70), 32), Image.Resampling.BILINEAR)
            left = round((small.width - 32) / 2)
            pictures.append(np.asarray(small.crop((left, 0, left + 32, 32))))
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        return model.eval()((torch.tensor(np.array(pictures)).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()


def test_a_training_run_is_judged_as_predict_scores_it(run):
    trained, data = run
    judged = parity.measure(data, parity.Options(checkpoint=str(trained.folder), device="cpu")).judged
    truth = by_hand(trained, data)
    labels = np.arange(24) % 2
    assert judged.images == 24 and judged.model == "test_resnet" and judged.note == ""
    assert judged.spread == pytest.approx(truth.std(), rel=1e-3)
    rows = {r.ours: r for r in judged.rows}
    assert set(rows) == {"fast", "exact", "torchvision"}
    for row in rows.values():
        assert row.reference_accuracy == pytest.approx((truth.argmax(1) == labels).mean())
        assert 0 <= row.mean <= row.largest < 0.2 * judged.spread
    assert rows["fast"].accuracy == predict(trained, data, device="cpu", progress=False).accuracy
    same = parity.measure(
        data, parity.Options(checkpoint=str(trained.folder / "best.pt"), device="cpu")
    ).judged
    assert same.rows == judged.rows
    with pytest.raises(UsageError, match=r"test_resnet.*got 'resnet18'"):
        parity.measure(data, parity.Options(model="resnet18", checkpoint=str(trained.folder)))


def test_logits_and_decisions_betray_wrong_pixels(run, monkeypatch):
    trained, data = run
    wrong(swap_red_and_blue, monkeypatch)
    judged = parity.measure(data, parity.Options(checkpoint=str(trained.folder), device="cpu")).judged
    rows = {r.ours: r for r in judged.rows}
    assert rows["exact"].mean > 10 * rows["torchvision"].mean
    assert rows["exact"].same < 0.6 and rows["torchvision"].same == 1


def test_weights_that_cannot_be_downloaded_are_one_sentence(photos_file, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UsageError, match=r"weights of 'test_resnet'.*no route to host.*--checkpoint.*--random-weights"
    ):
        parity.measure(photos_file, parity.Options(model="test_resnet"))
    report = parity.measure(photos_file, parity.Options(model="test_resnet", size=SIZE, random_weights=True))
    assert "random weights: the model has learned nothing" in report.text()
    assert "no accuracy: the file has 4 classes and the model 1000 outputs" in report.text()
    with pytest.raises(UsageError, match="did you mean 'test_resnet'"):
        parity.measure(photos_file, parity.Options(model="test_resnt", random_weights=True))


def test_weights_from_a_file(photos_file, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    options = {"model": "test_resnet", "size": SIZE, "device": "cpu"}
    judged = parity.measure(photos_file, parity.Options(**options, checkpoint=str(tmp_path / "w.pt"))).judged
    assert judged.note == "" and all(r.accuracy is not None for r in judged.rows)
    assert "w.pt" in judged.weights
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, kind, said in (
        ("other.pt", DataError, "do not fit 'test_resnet'"),
        ("text.pt", DataError, "cannot be read as weights"),
        ("none.pt", UsageError, "no checkpoint"),
    ):
        with pytest.raises(kind, match=said):
            parity.measure(photos_file, parity.Options(**options, checkpoint=str(tmp_path / name)))
    with pytest.raises(UsageError, match="--model NAME"):
        parity.measure(photos_file, parity.Options(checkpoint=str(tmp_path / "w.pt")))


# -- the command ----------------------------------------------------------------------------------------------------


def call(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_command(photos_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.jsonl"
    arguments = ("parity", photos_file, "--size", SIZE, "--images", 6, "--out", out, "--json")
    code, text, _ = call(capsys, *arguments)
    assert code == 0 and "exact - Pillow" in text and "torchvision - Pillow" in text
    record = json.loads(text.splitlines()[-1])
    assert record["kind"] == "parity" and record["exceeded"] == [] and len(record["rows"]) == 10
    assert record["tolerances"]["exact"]["mean"] == 1.0 and record["versions"]["Pillow"]
    wrong(shift_by_a_pixel, monkeypatch)
    code, text, err = call(capsys, *arguments)
    assert code == 1 and "exact - Pillow" in text and "Traceback" not in err
    assert "\nerror: decode 'fast', train crop: the mean error is" in err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 and lines[0] == record and lines[1]["exceeded"]


def test_command_refuses_what_cannot_work(photos_file, tmp_path, capsys):
    for arguments, said in (
        ((tmp_path / "none.beton",), "none.beton"),
        ((photos_file, "--images", "0"), "got 0"),
        ((photos_file, "--out", tmp_path / "no" / "r.jsonl"), "make it first"),
        ((photos_file, "--random-weights"), "got model None"),
    ):
        code, _, err = call(capsys, "parity", *arguments)
        assert code == 2 and said in err and "Traceback" not in err
    code, _, err = call(capsys, "parity", photos_file, "--size", SIZE, "--out", tmp_path)
    assert code == 2 and "choose another --out" in err
