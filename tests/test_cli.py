"""The command line: help that costs nothing, answers that can be parsed, and errors of one sentence with the right exit code."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import fastload
from fastload import beton, codecs
from fastload.cli import COMMANDS, cli, main

HEAVY = ("torch", "timm", "numba", "sklearn", "PIL", "simplejpeg", "matplotlib")


@pytest.fixture
def run(capsys):
    """The function that runs a command here: (*arguments) to its exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


def shell(*arguments, **options):
    """The same in a process of its own."""
    command = [sys.executable, "-m", "fastload", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def is_one_sentence(err):
    """One line for people: no traceback, no bare class name, long enough to say why."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "img/s" not in line]
    return (
        len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 30 and "Errno" not in err
    ) and "bug in fastload" not in err


def damaged(path, target, change):
    data = bytearray(open(path, "rb").read())
    target.write_bytes(change(data))
    return target


def zeroed(path, target, index=3):
    """A copy whose sample ``index`` has lost the bytes of its image."""
    with beton.Reader(path) as file:
        at = int(file.metadata["f0"]["ptr"][index])
    return damaged(path, target, lambda data: data[:at] + b"\0" * 300 + data[at + 300 :])


@pytest.fixture
def bad_files(small, tmp_path):
    """name: (path, words of the message, exit code of a command that opens it)."""
    return {
        "missing": (tmp_path / "none.beton", "no such file", 2),
        "below a file": (f"{small}/x.beton", "no such file", 2),
        "folder": (tmp_path, "is not a file", 2),
        "empty": (damaged(small, tmp_path / "empty", lambda d: b""), "has only 0 bytes", 1),
        "truncated": (
            damaged(small, tmp_path / "cut", lambda d: d[: len(d) // 2]),
            "truncated or damaged",
            1,
        ),
        "tail lost": (damaged(small, tmp_path / "tail", lambda d: d[:-7]), "truncated or damaged", 1),
        "other version": (damaged(small, tmp_path / "v3", lambda d: b"\3" + d[1:]), "version 3", 1),
        "a picture": (damaged(small, tmp_path / "png", lambda d: b"\x89PNG" + d), "is not a .beton file", 1),
    }


# ---- help, version, usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    for flag in ("--help", "-h"):
        code, out, err = run(name, flag)
        assert code == 0 and err == ""
        assert out.startswith(f"Usage: fastload {name}") and "Options:" in out
    command = cli.get_command(None, name)
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert parameter.opts[-1].startswith("-")
            assert parameter.help or parameter.opts[-1] in ("--columns",), f"{name} {parameter.opts}: no help"


def test_the_group_lists_every_command_in_the_order_of_use(run):
    code, out, _ = run("--help")
    places = [out.index(f"  {name} ") for name in COMMANDS]
    assert code == 0 and places == sorted(places) and next(iter(COMMANDS)) == "demo"
    assert run()[0] == 2 and "Usage: fastload" in run()[2]  # no command is a wrong call


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom fastload.cli import COMMANDS, main\n"
        "for argv in [['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    try: main(argv)\n"
        "    except SystemExit as stopped: assert not stopped.code, argv\n"
        f"    print('LOADED', argv[0], [m for m in {HEAVY} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert len(lines) == len(COMMANDS) + 2, done.stderr
    assert [line for line in lines if not line.endswith("[]")] == []


def test_help_is_fast():
    times = []
    for _ in range(3):
        began = time.perf_counter()
        assert shell("--help").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 1.5  # a tenth of that on a quiet machine


def test_version(run):
    assert run("--version") == (0, f"fastload, version {fastload.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspec", "x"], "unknown command 'inspec'; did you mean 'inspect'? see: fastload --help"),
        (["frobnicate"], "unknown command 'frobnicate'; known: bench, "),
        (["inspect"], "Missing argument 'DATA'"),
        (["inspect", "a", "b"], "unexpected extra argument"),
        (["inspect", "x", "--pixles", "3"], "No such option '--pixles'"),
        (["inspect", "x", "--pixels", "many"], "'many' is not a valid integer"),
        (["inspect", "x", "--pixels", "-1"], "-1 is not in the range"),
        (["inspect", "x", "--classes", "-1"], "-1 is not in the range"),
        (["preview", "x", "--count", "0"], "0 is not in the range"),
        (["preview", "x", "--size", "9999999"], "9999999 is not in the range"),
        (["--frob"], "No such option '--frob'"),
    ],
)
def test_a_wrong_call_exits_2_and_names_what_is_wrong(run, arguments, words):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and words in err and "Traceback" not in err


# ---- the commands on good files -------------------------------------------------------------------------------------


def test_inspect_tells_what_is_in_a_file(run, beton_file, picture):
    path = beton_file(store="mixed", count=12, extra=(beton.Field("vector", "ndarray", "<f4", (2, 3)),))
    code, out, _ = run("inspect", path, "--json")
    figures = json.loads(out.splitlines()[-1])
    assert code == 0 and figures["samples"] == 12 and figures["path"] == path
    assert figures["bytes"] == os.path.getsize(path) and figures["storage"] == {"jpeg": 6, "raw": 6}
    assert figures["classes"] == {f"class{c}": 3 for c in range(4)} and figures["created_by"] == "tests"
    assert [f["name"] for f in figures["fields"]] == ["image", "label", "vector"]
    with fastload.open(path) as ds:
        sizes = [sample["image"].shape for sample in ds]
        pixels = np.concatenate([sample["image"].reshape(-1, 3) for sample in ds]) / 255
    assert np.allclose(figures["mean"], pixels.mean(0), atol=1e-9)
    assert np.allclose(figures["std"], pixels.std(0), atol=1e-9)
    assert figures["sampled"] == 12
    heights = sorted(size[0] for size in sizes)
    assert (figures["height"][0], figures["height"][2]) == (heights[0], heights[-1])
    assert sum(figures["sides"].values()) == 12
    for words in ("12", "jpeg 6, raw 6", "class3", "vector", "(2, 3)", "mean (", "written by tests"):
        assert words in out


def test_inspect_lists_as_many_classes_as_asked_and_decodes_as_many_images(run, small):
    _, out, err = run("inspect", small, "--classes", "2", "--pixels", "0")
    assert "class1" in out and "class2" not in out and "2 more; all: 5 to 5" in out
    assert "mean" not in out and err == ""
    assert json.loads(run("inspect", small, "--pixels", "7", "--json")[1].splitlines()[-1])["sampled"] == 7


def test_verify_says_that_all_is_well(run, small):
    code, out, _ = run("verify", small)
    assert code == 0 and out == f"{small}: each of 20 samples decodes and matches its checksum\n"
    code, out, _ = run("verify", small, "--json")
    assert json.loads(out.splitlines()[-1]) == {"samples": 20, "checksums": True, "bad": []} and code == 0


def test_verify_lists_what_is_wrong_and_exits_1(run, small, tmp_path):
    path = zeroed(small, tmp_path / "altered.beton")
    code, out, err = run("verify", path, "--json")
    assert code == 1 and is_one_sentence(err) and "1 damaged places in 20 samples" in err
    assert out.startswith("sample 3, id 'id-3', source 'class3/3.jpg': ") and "each of" not in out
    (bad,) = json.loads(out.splitlines()[-1])["bad"]
    assert (bad["index"], bad["id"], bad["source"]) == (3, "id-3", "class3/3.jpg") and bad["reason"]


def test_verify_finds_one_changed_bit(run, beton_file, tmp_path):
    path = beton_file(store="raw", count=6)
    with beton.Reader(path) as file:
        at = int(file.metadata["f0"]["ptr"][4]) + 77

    def flip(data):
        data[at] ^= 4
        return data

    code, out, _ = run("verify", damaged(path, tmp_path / "bit.beton", flip))
    assert code == 1 and out == "sample 4, id 'id-4', source 'class0/4.jpg': its checksum does not match\n"


def test_preview_draws_every_tile(run, beton_file, tmp_path):
    path = beton_file(store="raw", count=6, size=(100, 100))
    out_path = tmp_path / "sheet.png"
    code, out, _ = run("preview", path, "-o", out_path, "--columns", "3", "--size", "100")
    assert code == 0 and out == f"{out_path}: 6 of 6 images, 316 x 240 pixels\n"
    sheet = np.asarray(Image.open(out_path))
    assert sheet.shape == (240, 316, 3)
    with fastload.open(path) as ds:
        for i in range(6):
            y, x = 4 + i // 3 * 118, 4 + i % 3 * 104
            assert np.array_equal(sheet[y : y + 100, x : x + 100], ds[i]["image"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.beton", "sheet.png"]


def test_preview_augmented_differs_by_seed_and_by_nothing_else(run, small, tmp_path):
    sheets = []
    for seed in (1, 1, 2):
        code, _, _ = run(
            "preview", small, "-o", tmp_path / "a.png", "--augment", "--seed", seed, "--count", "4"
        )
        assert code == 0
        sheets.append(np.asarray(Image.open(tmp_path / "a.png")))
    assert np.array_equal(sheets[0], sheets[1]) and (sheets[0] != sheets[2]).mean() > 0.2


def test_preview_of_one_class(run, small, tmp_path):
    out_path = tmp_path / "a.png"
    code, out, _ = run("preview", small, "-o", out_path, "--class", "class2")
    assert code == 0 and "5 of 5 images" in out
    code, _, err = run("preview", small, "-o", tmp_path / "b.png", "--class", "clas2")
    assert code == 2 and is_one_sentence(err) and "unknown class 'clas2'; did you mean 'class2'" in err
    assert not (tmp_path / "b.png").exists()


# ---- bad files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inspect", "verify", "preview", "doctor"])
def test_files_that_cannot_be_opened(run, bad_files, tmp_path, name):
    out_path = tmp_path / "new" / "sheet.png"
    out_path.parent.mkdir()
    for kind, (path, words, code) in bad_files.items():
        arguments = [name, path, *(["-o", out_path] if name == "preview" else [])]
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and words in err and str(path) in err, kind
        assert is_one_sentence(err), kind
        assert list(out_path.parent.iterdir()) == [], kind


@pytest.mark.parametrize("name", ["inspect", "preview"])
def test_a_corrupt_image_is_named(run, small, tmp_path, name):
    path = zeroed(small, tmp_path / "altered.beton")
    out_path = tmp_path / "sheet.png"
    code, _, err = run(name, path, *(["-o", out_path] if name == "preview" else []))
    assert code == 1 and is_one_sentence(err) and "sample 3, id 'id-3', source 'class3/3.jpg'" in err
    assert not out_path.exists()


def test_debug_shows_the_traceback_wherever_it_stands(run, tmp_path):
    path = tmp_path / "none.beton"
    assert "Traceback" not in run("inspect", path)[2]
    for arguments in (
        ["--debug", "inspect", path],
        ["inspect", path, "--debug"],
        ["inspect", "--debug", path],
    ):
        code, _, err = run(*arguments)
        assert code == 2 and "Traceback (most recent call last)" in err and "reader.py" in err
        assert err.rstrip().splitlines()[-1].startswith("error: no such file")
    _, _, err = run("inspect", "--", "--debug")  # a file of that name
    assert "Traceback" not in err and "no such file: --debug" in err


def test_a_bug_is_called_a_bug(run, small, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("fastload.summary.summarise", broken)
    code, _, err = run("inspect", small)
    assert code == 1 and "error: ZeroDivisionError: division by zero" in err and "Traceback" not in err
    assert "bug in fastload; run with --debug" in err
    code, _, err = run("inspect", small, "--debug")
    assert code == 1 and "Traceback" in err


def test_notes_of_an_error_are_shown(run, small, monkeypatch):
    if sys.version_info < (3, 11):
        return  # errors have had notes since 3.11

    def broken(*arguments, **options):
        error = fastload.FastloadError("the sentence")
        error.add_note("the circumstance")
        raise error

    monkeypatch.setattr("fastload.summary.summarise", broken)
    assert run("inspect", small)[2] == "error: the sentence\n  the circumstance\n"


# ---- targets that cannot be written ---------------------------------------------------------------------------------


def test_preview_into_what_is_no_folder(run, small, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("mine")
    for out_path, words in [
        (taken / "a.png", "there is no folder"),
        (tmp_path / "none" / "a.png", "there is no folder"),
        (tmp_path, "it is a folder; name a file"),
        (tmp_path / ("x" * 300 + ".png"), "cannot write"),
    ]:
        code, out, err = run("preview", small, "-o", out_path)
        assert code == 2 and out == "" and is_one_sentence(err) and words in err
    assert taken.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "small.beton",
    ]


def test_preview_on_a_full_disk_leaves_the_old_picture(run, small, tmp_path, monkeypatch):
    out_path = tmp_path / "a.png"
    out_path.write_bytes(b"the old one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:  # a file may have 1,000 bytes, then writing fails as on a full disk
        code, _, err = run("preview", small, "-o", out_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and is_one_sentence(err) and "File too large" in err

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, err = run("preview", small, "-o", out_path)
    assert code == 1 and is_one_sentence(err) and "No space left on device; make room" in err
    assert out_path.read_bytes() == b"the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "small.beton"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastload", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (
        done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    )


# ---- pipes and signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "FILE", "--pixels", "0", "--json"]])
def test_a_pipe_that_closes_early_is_quiet(small, arguments):
    command = [sys.executable, "-m", "fastload", *(small if a == "FILE" else a for a in arguments)]
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads: the first write fails
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert done.stderr == "" and done.returncode in (0, 1)


def test_the_first_line_of_a_pipe(small):
    command = f"{sys.executable} -m fastload inspect {small} --pixels 0 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (f"{small}\n", "", 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file that takes seconds to verify: one large image, many times."""
    path = tmp_path_factory.mktemp("large") / "large.beton"
    y, x = np.mgrid[:1500, :2000]
    data = codecs.encode_jpeg(np.dstack([x, y, x ^ y]).astype(np.uint8))
    writer = beton.Writer(path, [beton.Field("image", "image")], 600)
    for i in range(600):
        writer.add({"image": beton.EncodedImage("jpeg", 1500, 2000, data)}, id=str(i), source=str(i))
    writer.finish({})
    return path


def test_ctrl_c_stops_a_running_verify(large):
    command = [sys.executable, "-m", "fastload", "verify", str(large)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = b""
    while b"img/s" not in seen or b"/600" not in seen or b" 0/600" in seen[-60:]:  # the work has begun
        part = os.read(process.stderr.fileno(), 1000)
        assert part, seen
        seen += part
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    out, err = process.communicate(timeout=30)
    assert time.perf_counter() - began < 5
    assert (
        process.returncode == 130
        and b"Traceback" not in err
        and b"interrupted" in err
        and b"decodes" not in out
    )
