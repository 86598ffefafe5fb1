"""The report: every figure of the files, nothing else, in a page that loads and runs nothing."""

import html.parser
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastload.benchmarks.report import load
from fastload.benchmarks.report.markdown import cell, code
from fastload.benchmarks.report.plots import ticks
from fastload.errors import DataError, UsageError

made = runpy.run_path(str(Path(__file__).with_name("report_records.py")))
Maker, write = made["Maker"], made["write"]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`*[x](http://evil.example/)"


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "results.jsonl", Maker(1).everything())


@pytest.fixture
def report(results):
    return load([results])


def shell(*arguments):
    command = [sys.executable, "-m", "fastload", "bench", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class Tree(html.parser.HTMLParser):
    """Elements with their attributes and section, and all visible text; complains about what is not closed."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.section = [], [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "section":
            self.section = values.get("id", "records")
        self.elements.append((tag, values, self.section))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag, class_=None):
        return [
            a for t, a, _ in self.elements if t == tag and (class_ is None or class_ in a.get("class", ""))
        ]

    def text(self):
        return " ".join(" ".join(self.texts).split())


def shown(value):
    """A figure as people read it: computed here from the rule, not with the report's function."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:,.2f}"


def tables(markdown):
    """The rows of all tables as lists of cells."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[part.strip() for part in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def every_series(value, path=""):
    """All Series of a record, found by their shape."""
    if isinstance(value, dict):
        if isinstance(value.get("rounds"), list):
            yield path, value
        else:
            for key, inside in value.items():
                yield from every_series(inside, key)
    elif isinstance(value, list):
        for inside in value:
            yield from every_series(inside, path)


# ---- which records count


def test_the_newest_record_of_each_question_is_shown_and_all_are_listed(tmp_path):
    maker = Maker(2)
    old = maker.bench("2026-01-01T00:00:00+00:00")
    new = maker.bench("2026-02-01T00:00:00+00:00")
    other = maker.bench("2026-01-15T00:00:00+00:00", model="convnext_tiny")
    report = load([write(tmp_path / "a.jsonl", [new]), write(tmp_path / "b.jsonl", [old, other])])
    assert [record.date[:10] for record in report.records] == ["2026-01-01", "2026-01-15", "2026-02-01"]
    assert {record.date[:10] for record in report.newest()} == {"2026-01-15", "2026-02-01"}
    page = report.html()
    assert page.count("<section id=") == 2 and page.count("earlier</span>") == 1
    assert all(day in page for day in ("2026-01-01", "2026-01-15", "2026-02-01"))
    assert "2026-01-01" not in report.markdown()


def test_of_one_date_the_later_line_wins(tmp_path):
    first, second = Maker(3).model(), Maker(4).model()
    report = load([write(tmp_path / "a.jsonl", [first, second])])
    assert [record.line for record in report.newest()] == [2]


def test_another_machine_is_another_question(tmp_path):
    here, there = Maker(3).model(), Maker(4).model()
    there["environment"] = {**there["environment"], "cores": 64}
    assert len(load([write(tmp_path / "a.jsonl", [here, there])]).newest()) == 2


def test_the_same_files_give_the_same_bytes(results):
    assert load([results]).html() == load([results]).html()
    code = (
        "import sys; from fastload.benchmarks.report import load; "
        "sys.stdout.buffer.write(load(sys.argv[1:]).html().encode())"
    )
    other = subprocess.run([sys.executable, "-c", code, str(results)], capture_output=True, timeout=60)
    assert other.stdout == load([results]).html().encode()


# ---- Markdown


def test_markdown_of_bench_has_the_figures_of_the_file(tmp_path):
    record = Maker(5).bench()
    rows = {row[0]: row for row in tables(load([write(tmp_path / "r.jsonl", [record])]).markdown())}
    for name, key in (("loader alone", "loader"), ("model alone", "model"), ("both together", "both")):
        rounds = record[key]["rounds"]
        assert rows[name][1] == shown(np.median(rounds))
        assert rows[name][2].split("\N{EN DASH}") == [f"{min(rounds):,.0f}", f"{max(rounds):,.0f}"]
    total = sum(stage["us"] for stage in record["stages"])
    assert rows["decode"][1:3] == ["388", f"{100 * 388 / total:.0f}%"]
    for change in record["changes"]:
        row = rows[change["what"]]
        assert row[1] == f"`{change['setting']}`" and row[2] == change["cost"]
        assert row[3] == shown(np.median(change["figure"]["rounds"]))
        assert row[4].startswith(f"{np.median(change['ratio']['rounds']):.2f}\N{MULTIPLICATION SIGN}")
        assert row[5] == ("yes" if change["gain"] else "no")
    assert rows["memory bandwidth"][1] == "21.4 GB/s" and "copy to the device" in rows


def test_markdown_of_tune_and_model_has_the_figures_of_the_file(tmp_path):
    maker = Maker(6)
    tune, model = maker.tune(), maker.model()
    text = load([write(tmp_path / "r.jsonl", [tune, model])]).markdown()
    rows = tables(text)
    for one in tune["tried"]:
        assert [
            str(one["threads"]),
            str(one["prefetch"]),
            str(one["batch_size"]),
            shown(one["images_s"]),
        ] in rows
    assert f"```\n{tune['paste']}\n```" in text
    for row in model["rows"]:
        for variant in row["variants"]:
            best = variant["name"] == row["best"]
            name = f"**{variant['name']}**" if best else variant["name"]
            found = next(r for r in rows if r[:2] == [row["model"], name])
            assert found[3] == shown(np.median(variant["figure"]["rounds"]))
            assert found[5] == f"{np.median(variant['ratio']['rounds']):.2f}\N{MULTIPLICATION SIGN}"
            assert found[6] == (shown(row["loader_needs_images_s"]) if best else "")
        assert row["failed"][0]["reason"] in text


def test_comparisons_are_written_as_in_the_readme(tmp_path):
    from fastload.benchmarks import compare_table

    maker = Maker(7)
    records = [maker.compare(), maker.start(), maker.threads(), maker.memory()]
    assert compare_table.markdown(records) + "\n" == load([write(tmp_path / "r.jsonl", records)]).markdown()


def test_markdown_says_where_and_how_it_was_measured(tmp_path):
    text = load([write(tmp_path / "r.jsonl", [Maker(8).bench()])]).markdown()
    for fact in (
        "AMD EPYC, 2 cores",
        "2026-11-24 10:20 UTC",
        "943596f0aa11",
        "rounds: 7",
        "100% of the file",
        "torch 2.15.0",
    ):
        assert fact in text


@pytest.mark.parametrize("text", ["a|b", "<b>", "[x](y)", "`x`", "*x*", "two\nlines", "\\|"])
def test_a_cell_of_markdown_holds_no_markup(text):
    found = cell(text)
    assert "\n" not in found and "<" not in found
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]]", found.replace("\\\\", ""))


def test_a_setting_cannot_leave_its_code_span():
    assert code("a `b` ``c``") == "``` a `b` ``c`` ```" and code("x | y") == "`x \\| y`" and code("") == ""


# ---- the verdict


def test_the_verdict_is_computed_from_the_figures(tmp_path):
    from fastload.benchmarks.verdict import from_record

    record = Maker(9).bench()
    record["verdict"] = from_record(record).sentence
    page = load([write(tmp_path / "a.jsonl", [record])]).html()
    assert "another sentence" not in page
    record["verdict"] = "All is well."
    changed = Tree(load([write(tmp_path / "b.jsonl", [record])]).html()).text()
    assert from_record(record).sentence in changed
    assert "The file holds another sentence than its figures give: “All is well.”" in changed


def test_a_verdict_that_cannot_be_computed_is_said_to_be_the_files_own(tmp_path):
    record = Maker(9).bench()
    del record["settings"]["shared_cores"]
    page = Tree(load([write(tmp_path / "a.jsonl", [record])]).html()).text()
    assert record["verdict"] in page and "This sentence is the file's own" in page


def test_a_bench_of_the_loader_alone_is_shown(tmp_path):
    record = Maker(9).bench()
    record |= {"model": None, "both": None, "stall": None, "timeline": [], "changes": []}
    report = load([write(tmp_path / "a.jsonl", [record])])
    for text in (report.html(), report.markdown()):
        assert "loader alone" in text and "model alone" not in text


# ---- the page


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = report.html()
    tree = Tree(page)
    assert not tree.all("script") and not tree.all("link") and not tree.all("img") and not tree.all("iframe")
    for _, attributes, _ in tree.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith("#")
    assert "http" not in re.sub(r'http-equiv="', "", page) and "url(" not in page and "@import" not in page
    policy = next(a["content"] for a in tree.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script" not in policy
    ids = {a["id"] for _, a, _ in tree.elements if "id" in a}
    assert {a["href"][1:] for a in tree.all("a")} <= ids


def test_the_page_holds_every_peer_and_every_figure(report):
    text = Tree(report.html()).text()
    for record in report.newest():
        for path, series in every_series(record.raw):
            value = float(np.median(series["rounds"]))
            if path == "ratio":
                assert f"{value:.2f}\N{MULTIPLICATION SIGN}" in text, (record.kind, path)
            elif path == "stall":
                assert f"{value:.1%} of the time" in text
            elif path == "cpu_s_per_1000":
                assert f"{value:.2f}" in text
            else:
                assert shown(value) in text, (record.kind, path)
        for row in record.raw.get("rows", []):
            for key in ("title", "filter", "settings", "model", "best"):
                assert row.get(key, "") in text
        for failed in record.raw.get("failed", []) + record.raw.get("not_run", []):
            assert failed.get("reason", failed.get("why")) in text


def test_each_section_says_machine_date_commit_rounds_and_page_cache(report):
    page = report.html()
    sections = page.split('<section id="s')[1:]
    assert len(sections) == 7
    for section in sections:
        for fact in (
            "AMD EPYC, 2 cores",
            "2026-11-24 10:20 UTC",
            "943596f0aa11",
            "100% of the file",
            "torch 2.15.0",
        ):
            assert fact in section
        assert re.search(r"<dt>Rounds</dt><dd>\d", section)


def test_noise_is_said(tmp_path):
    record = Maker(1).compare()
    assert record["rows"][5]["peer"] == "grain" and record["rows"][5]["figure"]["noise"] > 0.15
    noise = record["rows"][5]["figure"]["noise"]
    record["notes"] = ["the disk was nearly full"]
    text = Tree(load([write(tmp_path / "r.jsonl", [record])]).html()).text()
    assert f"Grain: rounds differ by ±{noise:.0%}" in text and text.count("rounds differ by") == 1
    assert "the disk was nearly full" in text


def test_no_speed_is_shown_where_the_check_failed(tmp_path):
    record = Maker(1).compare()
    record["rows"][0]["check"]["passed"] = False
    median = record["rows"][0]["figure"]["median"]
    text = Tree(load([write(tmp_path / "r.jsonl", [record])]).html()).text()
    assert f"{median:,.0f}" not in text and "the check of its work failed" in text


def percent(text):
    assert text.endswith("%")
    return float(text[:-1])


def test_bars_are_as_long_as_their_medians(tmp_path):
    record = Maker(10).compare()
    tree = Tree(load([write(tmp_path / "r.jsonl", [record])]).html())
    bars = [a for a in tree.all("rect", "bar") if "data-median" in a]
    medians = [float(np.median(row["figure"]["rounds"])) for row in record["rows"]]
    assert len(bars) == len(medians)
    top = max(max(row["figure"]["rounds"]) for row in record["rows"])
    for bar, median in zip(bars, medians):
        assert percent(bar["x"]) == 0
        assert percent(bar["width"]) == pytest.approx(100 * median / top, abs=0.001)
    ours = [row["title"].startswith("fastload") for row in record["rows"]]
    assert [bar["class"] == "bar ours" for bar in bars] == ours and sum(ours) == 2
    # Every round is a dot at its own place, and the whisker spans them.
    rounds = [value for row in record["rows"] for value in row["figure"]["rounds"]]
    dots = tree.all("circle", "round")
    assert [percent(dot["cx"]) for dot in dots] == pytest.approx([100 * v / top for v in rounds], abs=0.001)
    whiskers = tree.all("line", "whisker")[::3]
    for whisker, row in zip(whiskers, record["rows"]):
        ends = [percent(whisker["x1"]), percent(whisker["x2"])]
        figures = row["figure"]["rounds"]
        assert ends == pytest.approx([100 * min(figures) / top, 100 * max(figures) / top], abs=0.001)


def test_changes_are_drawn_from_one_and_on_their_side_of_it(tmp_path):
    record = Maker(10).bench()
    tree = Tree(load([write(tmp_path / "r.jsonl", [record])]).html())
    origin = {percent(line["x1"]) for line in tree.all("line", "origin")}
    assert len(origin) == 1
    at = origin.pop()
    bars = [a for a in tree.all("rect", "bar") if float(a.get("data-median", 99)) < 3][
        : len(record["changes"])
    ]
    scale = []
    for bar, change in zip(bars, record["changes"]):
        gain = float(np.median(change["ratio"]["rounds"])) - 1
        start, width = percent(bar["x"]), percent(bar["width"])
        assert (start if gain > 0 else start + width) == pytest.approx(at, abs=0.002)
        scale.append(width / abs(gain))
    assert scale == pytest.approx([scale[0]] * len(scale), rel=0.03)


def test_the_waterfall_has_no_gap_and_no_overlap(tmp_path):
    record = Maker(11).bench()
    tree = Tree(load([write(tmp_path / "r.jsonl", [record])]).html())
    strips = [a for a in tree.all("rect") if "data-us" in a]
    us = [stage["us"] for stage in record["stages"]]
    assert [float(a["data-us"]) for a in strips] == us
    starts = np.concatenate([[0], np.cumsum(us)[:-1]]) / sum(us) * 100
    assert [percent(a["x"]) for a in strips] == pytest.approx(starts, abs=0.001)
    assert [percent(a["width"]) for a in strips] == pytest.approx(np.array(us) / sum(us) * 100, abs=0.001)
    assert [a["class"] for a in strips].index("bar limit") == us.index(max(us))


def test_scaling_curves_and_their_ideal_lines(tmp_path):
    record = Maker(12).threads()
    tree = Tree(load([write(tmp_path / "r.jsonl", [record])]).html())
    by_peer = {}
    for row in record["rows"]:
        by_peer.setdefault(row["title"], []).append(
            (row["threads"], float(np.median(row["figure"]["rounds"])))
        )
    lines = [a["points"] for a in tree.all("polyline") if a["class"].startswith("line ")]
    ideals = [a["points"] for a in tree.all("polyline", "ideal")]
    assert len(lines) == len(ideals) == len(by_peer)
    bottom = 110.0
    for line, ideal, points in zip(lines, ideals, by_peer.values()):
        points = sorted(points)
        at = np.array([[float(v) for v in p.split(",")] for p in line.split()])
        should = np.array([[float(v) for v in p.split(",")] for p in ideal.split()])
        assert at[:, 0] == pytest.approx([100 * (n - 1) / 7 for n, _ in points], abs=0.001)
        heights = (bottom - at[:, 1]) / np.array([figure for _, figure in points])
        assert heights == pytest.approx(np.full(len(points), heights[0]), rel=0.01)
        assert (bottom - should[:, 1]) / (bottom - at[0, 1]) == pytest.approx(
            [n for n, _ in points], rel=0.01
        )


def test_the_timeline_is_every_step_stacked(tmp_path):
    record = Maker(13).bench()
    tree = Tree(load([write(tmp_path / "r.jsonl", [record])]).html())
    rects = [a for a in tree.all("rect", "bar") if "rx" not in a]
    steps = record["timeline"]
    assert len(rects) == 2 * len(steps)
    work, wait = rects[::2], rects[1::2]
    heights = np.array([float(a["height"]) for a in work])
    seconds = np.array([step["step_s"] for step in steps])
    scale = (heights / seconds).mean()
    assert heights == pytest.approx(seconds * scale, abs=0.01)
    assert [float(a["height"]) for a in wait] == pytest.approx([s["wait_s"] * scale for s in steps], abs=0.01)
    for below, above in zip(work, wait):
        assert float(above["y"]) + float(above["height"]) == pytest.approx(float(below["y"]), abs=0.002)


@pytest.mark.parametrize("top", [0.003, 0.9, 1, 7, 99, 26775.3, 1e6])
def test_ticks_are_round_and_within(top):
    found = ticks(top)
    assert found[0] == 0 and 3 <= len(found) <= 6 and found[-1] <= top * (1 + 1e-9)
    assert all(
        len(f"{tick:.6e}".rstrip("0").split("e")[0].rstrip("0").replace(".", "")) <= 2 for tick in found
    )


def hostile(value, key=""):
    """A record whose every text but its kind is an attack, with a setting and a version named so too."""
    if isinstance(value, dict):
        kept = ("kind", "date", "better", "unit")
        changed = {k: v if k in kept else hostile(v, k) for k, v in value.items()}
        return changed | ({HOSTILE: HOSTILE} if key in ("versions", "settings") else {})
    if isinstance(value, list):
        return [hostile(inside) for inside in value]
    return HOSTILE if isinstance(value, str) else value


def outside_of_code(text):
    """Markdown without its code spans and without what a backslash escapes, by CommonMark's rules."""
    kept, at = [], 0
    while at < len(text):
        run = re.match(r"`+", text[at:])
        if text[at] == "\\":
            at += 2
        elif run:
            close = re.compile(rf"(?<!`){run[0]}(?!`)").search(text, at + len(run[0]))
            at = close.end() if close else at + len(run[0])
        else:
            kept.append(text[at])
            at += 1
    return "".join(kept)


def test_hostile_texts_stay_texts(tmp_path):
    records = [hostile(record) for record in Maker(14).everything()]
    report = load([write(tmp_path / "r.jsonl", records)])
    tree = Tree(report.html(HOSTILE))
    assert not tree.all("script") and not tree.all("img")
    assert not any(name.startswith("on") for _, attributes, _ in tree.elements for name in attributes)
    assert HOSTILE in "".join(tree.texts)
    assert all(a["href"].startswith("#") for a in tree.all("a"))
    text = report.markdown()
    outside = outside_of_code(re.sub(r"(?s)\n(`{3,})\n.*?\n\1\n", "\n", text))
    assert "&lt;script&gt;" in outside
    assert "<script" not in outside and "<img" not in outside and "](http" not in outside


# ---- damaged files


def bench_with(change):
    record = Maker(1).bench()
    change(record)
    return json.dumps(record)


DAMAGED = {
    "no JSON": ("{oops", "no JSON"),
    "cut": ('{"kind": "bench", "loader": {"unit"', "no JSON"),
    "a list": ("[1, 2]", "no JSON object"),
    "NaN": ('{"kind": "bench", "seconds": NaN}', "NaN"),
    "no kind": ("{}", "without a kind"),
    "old kind": (
        '{"kind": "vs-ffcv"}',
        "unknown kind of record 'vs-ffcv'; known: bench, compare, model, tune",
    ),
    "kind a number": ('{"kind": 3}', "'kind' must be a text"),
    "nested": ("[" * 100_000, "no JSON"),
    "half a character": ('{"kind": "tune", "sentence": "\\ud800"}', "no JSON"),
    "no rows' peer": (
        '{"kind": "compare", "workload": "eval", "rows": [{}]}',
        "'rows[0].peer' must be a text",
    ),
    "rows a text": ('{"kind": "compare", "workload": "eval", "rows": "x"}', "'rows' must be a list"),
    "no loader": (bench_with(lambda r: r.pop("loader")), "loader is no JSON object"),
    "no rounds": (bench_with(lambda r: r["loader"].update(rounds=[])), "'loader.rounds' holds no figure"),
    "wrong median": (bench_with(lambda r: r["model"].update(median=9999.0)), "'model.median' is 9999 but"),
    "text for a figure": (
        bench_with(lambda r: r["both"].update(rounds=["1"])),
        "'both.rounds' must be a number",
    ),
    "below 0": (bench_with(lambda r: r["both"].update(rounds=[-1.0], median=-1.0)), "below 0"),
    "huge": (bench_with(lambda r: r.update(first_batch_s=10**400)), "must be a number"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_named(tmp_path, name):
    line, words = DAMAGED[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(Maker(1).model()) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load([path])
    message = str(caught.value)
    assert f"{path} line 3: " in message and words in message and "\n" not in message and len(message) < 500


def test_a_comparison_that_gives_no_table_is_named(tmp_path):
    record = Maker(1).compare()
    del record["settings"]["batch"]
    path = write(tmp_path / "bad.jsonl", [Maker(1).model(), record])
    with pytest.raises(DataError, match=r"bad\.jsonl line 2: no table can be made"):
        load([path]).markdown()


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xff\xd8\xff\xe0 a picture")
    with pytest.raises(DataError, match="line 1: this is no text in UTF-8"):
        load([path])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load([tmp_path / "missing.jsonl"])
    with pytest.raises(UsageError, match="directory"):
        load([tmp_path])
    with pytest.raises(UsageError, match="at least one"):
        load([])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="holds no records"):
        load([empty])


# ---- the command


def test_the_command_prints_markdown_or_writes_files(tmp_path):
    file = write(tmp_path / "r.jsonl", [Maker(1).bench(), Maker(1).model()])
    done = shell(file)
    assert done.returncode == 0, done.stderr
    assert done.stdout == load([file]).markdown()
    page, text = tmp_path / "new" / "page.html", tmp_path / "out.md"
    done = shell(file, "--html", page, "--markdown", text, "--title", "Ours & <theirs>")
    assert done.returncode == 0, done.stderr
    assert page.read_text(encoding="utf-8") == load([file]).html("Ours & <theirs>")
    assert text.read_text(encoding="utf-8") == load([file]).markdown()
    assert "<title>Ours &amp; &lt;theirs&gt;</title>" in page.read_text(encoding="utf-8")
    assert done.stdout.splitlines() == [f"page: {page}", f"Markdown: {text}"]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: folder / "missing.jsonl", 2),
        (lambda folder: folder, 2),
        (lambda folder: write(folder / "empty.jsonl", []), 1),
        (lambda folder: write(folder / "old.jsonl", [{"kind": "vs-ffcv"}]), 1),
    ],
    ids=["missing", "folder", "empty", "old kind"],
)
def test_a_wrong_file_is_one_sentence(tmp_path, make, code):
    done = shell(make(tmp_path), "--html", tmp_path / "page.html")
    lines = done.stderr.splitlines()
    assert done.returncode == code and done.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and "bug in fastload" not in lines[0]
    assert not (tmp_path / "page.html").exists()


# ---- in a browser


@pytest.mark.parametrize("case", ["all records", "hostile"])
def test_the_page_opens_in_a_browser_without_a_complaint(tmp_path, report, case):
    chromium = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    if case == "hostile":
        records = [hostile(record) for record in Maker(14).everything()]
        report = load([write(tmp_path / "h.jsonl", records)])
    page = tmp_path / "page.html"
    page.write_text(report.html(), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert done.stdout.count("<section") == report.html().count("<section")
    assert "All records, newest first" in done.stdout
