"""Packaging and layers: what the wheel holds, what an import costs, and who may know whom."""

import ast
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastload

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "fastload": "fastload",
    "kernels": "fastload.kernels",
    "benchmarks": "fastload.benchmarks",
    "train": "fastload.train",
}
PUBLIC = [
    "Batch",
    "Dataset",
    "FastloadError",
    "Loader",
    "__version__",
    "bench",
    "concat",
    "convert",
    "open",
    "train",
    "transforms",
    "verify",
]
# Files of the package that are no Python.
DATA_FILES = {
    "fastload/py.typed",
    "fastload/benchmarks/report/template.html.j2",
    "fastload/check/template.html.j2",
    "fastload/train/report/template.html.j2",
}
# The table of docs/design.md. What is not here must be added to both: a new module has a layer, or a reason to have none.
LAYERS = {
    "kernels": 0,
    "errors": 1,
    "stages": 1,
    "system": 1,
    "order": 1,
    "transforms": 1,
    "draws": 1,
    "beton": 2,
    "codecs": 2,
    "dataset": 3,
    "exported": 3,
    "exporter": 3,
    "sources": 3,
    "sources_base": 3,
    "sources_csv": 3,
    "sources_folder": 3,
    "sources_python": 3,
    "sources_tar": 3,
    "convert_image": 3,
    "converter": 3,
    "engines": 4,
    "batch": 4,
    "finish": 5,
    "jobs": 5,
    "choose": 5,
    "makers": 5,
    "loader": 5,
    "plan": 6,  # measures what a conversion would give with the real loader
    "summary": 6,
    "parity": 6,
    "parity_model": 6,
    "check": 6,
    "train": 6,
    "benchmarks": 6,
    "demo": 7,
    "doctor": 7,
    "cli": 7,
    "__main__": 7,
}
# What train/ and benchmarks/ may use of the rooms below them: what a user could use as well.
PUBLIC_MODULES = {"", "check", "errors", "dataset", "loader", "transforms", "train", "system"}
EXTRAS = (
    "nvidia",
    "ffcv",
    "matplotlib",
    "lightning",
    "accelerate",
    "optuna",
    "onnx",
    "onnxruntime",
    "wandb",
    "tensorboard",
)
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "nvidia",
    "numba",
    "llvmlite",
    "PIL",
    "matplotlib",
    "sklearn",
    "simplejpeg",
)


def sources():
    """Path and dotted name of every module, the top-level folders mapped as setup.py maps them."""
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join([package, *(p for p in parts if p != "__init__")])


@functools.cache
def trees():
    """Each module's path, name and syntax tree."""
    gc.collect()  # CPython 3.11 fails in ast.parse if garbage with finalizers (FFCV's compiled pipelines) is collected in it
    return [(path, name, ast.parse(path.read_text("utf-8"), str(path))) for path, name in sources()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ROOMS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        "out",
        ".",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "out").glob("*.whl")
    return made


def test_the_wheel_holds_every_source_file_and_nothing_else_at_its_top(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {name.split("/")[0] for name in names} == {
            "fastload",
            f"fastload-{fastload.__version__}.dist-info",
        }
        expected = {
            f"{ROOMS[path.relative_to(ROOT).parts[0]].replace('.', '/')}/{path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).as_posix()}"
            for path, _ in sources()
        }
        inside = {name for name in names if name.startswith("fastload/")}
        assert len(expected) > 60 and inside == expected | DATA_FILES
        for path, name in sources():
            package = path.name == "__init__.py"
            member = name.replace(".", "/") + ("/__init__.py" if package else ".py")
            assert archive.read(member) == path.read_bytes()
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "fastload = fastload.cli:main" in archive.read(points).decode()
        assert any(name.endswith("LICENSE") for name in names)


def test_the_unpacked_wheel_works_without_the_tree(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import fastload, fastload.kernels.rng, fastload.train, fastload.cli, fastload.beton.reader as r\n"
        "import fastload.benchmarks, fastload.engines.cpu\n"
        "print(*(m.__file__ for n, m in list(__import__('sys').modules.items()) if n.startswith('fastload')), sep='\\n')"
    )
    # What the cache of compiled kernels would write must not go into the tree either.
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) > 20 and all(Path(file).is_relative_to(tmp_path / "site") for file in files)


def test_importing_fastload_imports_nothing_heavy():
    code = "import fastload, sys, json; dir(fastload); print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert "fastload" in loaded and not loaded & set(HEAVY)


def test_public_names():
    assert sorted(fastload.__all__) == sorted(PUBLIC) == dir(fastload)
    for name in PUBLIC:
        value = getattr(fastload, name)
        assert value is getattr(fastload, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
    namespace = {}
    exec("from fastload import *", namespace)
    assert set(PUBLIC) - {"__version__"} <= set(namespace)
    with pytest.raises(AttributeError, match="no attribute 'Looder'"):
        _ = fastload.Looder
    with pytest.raises(ImportError):
        importlib.import_module("fastload.convertor")


def test_the_version_is_said_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastload.__version__)
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{fastload.__version__}"' in text
    assert importlib.metadata.version("fastload") == fastload.__version__


def imports(tree, name, package):
    """Absolute dotted names of all that a module imports, at its top or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if package else name.split(".")[:-1]
            start = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value, node.lineno
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "fastload"
        ):
            yield f"fastload.{node.attr}", node.lineno  # `import fastload`, then a lazy name of it


def test_bare_names_of_the_mapped_folders_are_never_imported():
    others = [
        (p, p.stem, ast.parse(p.read_text("utf-8")))
        for d in ("tests", "examples")
        for p in (ROOT / d).glob("*.py")
    ]
    assert len(others) > 10
    for path, name, tree in [*trees(), *others]:
        for module, line in imports(tree, name, path.name == "__init__.py"):
            assert module.split(".")[0] not in ("kernels", "train", "benchmarks"), (
                f"{path}:{line} imports {module}"
            )


def room(module):
    """The room of a dotted name: fastload.beton.reader is in beton, fastload.Loader in loader, fastload itself in none."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in ("*", "__version__", "__all__", "__file__"):
        return ""
    return fastload._LAZY.get(parts[1], f"fastload.{parts[1]}").split(".")[1]


def uses():
    """(room, the room it imports, the name by which, where) for each import within the package, the lazy table of its root left out."""
    for path, name, tree in trees():
        if name == "fastload":
            continue
        for module, line in imports(tree, name, path.name == "__init__.py"):
            if module.split(".")[0] == "fastload" and room(module) not in ("", room(name)):
                yield (
                    room(name),
                    room(module),
                    module.split(".")[1],
                    f"{path.relative_to(ROOT)}:{line} imports {module}",
                )


def test_every_module_has_a_layer():
    found = {room(name) for _, name in sources()} - {""}
    assert found == set(LAYERS)


def test_an_import_goes_to_a_lower_layer_only():
    """Rooms of one layer may know each other, in one direction."""
    seen = list(uses())
    assert len(seen) > 80
    wrong = [where for here, there, _, where in seen if LAYERS[there] > LAYERS[here]]
    assert not wrong, "\n".join(wrong)
    order = {here: {there for h, there, *_ in seen if h == here} for here in LAYERS}
    while order:  # peel off what imports nothing that is left; a cycle never peels
        free = [name for name, needs in order.items() if not needs & set(order)]
        assert free, f"these import each other in a circle: {sorted(order)}"
        for name in free:
            del order[name]


def test_train_and_benchmarks_use_what_users_use():
    """All but the two files that measure the GPU's kernel and DALI's regions themselves."""
    measured = ("benchmarks/gpu_parts.py", "benchmarks/gpu_dali.py")
    wrong = [
        where
        for here, there, name, where in uses()
        if here in ("train", "benchmarks")
        and name not in PUBLIC
        and there not in PUBLIC_MODULES
        and not where.startswith(measured)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_private_is_imported_from_another_module():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path, name, tree in trees()
        for module, line in imports(tree, name, path.name == "__init__.py")
        if module.startswith("fastload.") and re.search(r"\._(?!_)", module)
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_know_numpy_and_numba_only():
    allowed = {"numpy", "numba", "llvmlite", "fastload", "__future__", *sys.stdlib_module_names}
    # What Triton launches on are torch's tensors; its code is in a module of its own, imported when it first runs.
    more = {
        **{
            f"fastload.kernels.{name}": {"torch"}
            for name in ("gpu", "gpu_jpeg", "gpu_jpeg_reference", "jpeg_index")
        },
        **{f"fastload.kernels.{name}": {"triton"} for name in ("gpu_triton", "gpu_jpeg_triton")},
    }
    for path, name, tree in trees():
        if room(name) == "kernels":
            for module, line in imports(tree, name, path.name == "__init__.py"):
                assert module.split(".")[0] in allowed | more.get(name, set()), (
                    f"{path}:{line} imports {module}"
                )


def test_heavy_packages_are_imported_where_they_are_needed():
    """torch at the top of a module only where nothing works without it; timm in train; never the extras."""
    for path, name, tree in trees():
        top = [
            n
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for n in imports(node, name, False)
        ]
        for module, line in top:
            package = module.split(".")[0]
            where = f"{path.relative_to(ROOT)}:{line} imports {module} at its top"
            if package == "torch":
                assert room(name) in (
                    "engines",
                    "batch",
                    "finish",
                    "makers",
                    "loader",
                    "train",
                    "benchmarks",
                ), where
            assert package != "timm" or room(name) == "train", where
            assert package not in EXTRAS, where
            device_code = ("fastload.kernels.gpu_triton", "fastload.kernels.gpu_jpeg_triton")
            assert package != "triton" or name in device_code, where
            assert module not in device_code, where


def test_every_module_begins_with_its_purpose():
    for path, _, tree in trees():
        text = ast.get_docstring(tree)
        assert text and len(text.splitlines()[0]) > 25, path


def test_no_module_is_a_stub():
    for path, _, tree in trees():
        text = path.read_text("utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text), path
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
                f"{path}:{node.lineno}: bare except"
            )


def test_there_is_no_package_of_tests():
    assert not (ROOT / "tests" / "__init__.py").exists() and not (ROOT / "__init__.py").exists()
