"""The shape of the project: who imports whom, how long files are, which names are taken."""

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "cluster", "data", "model", "jobs")
MAY_IMPORT = {
    "configs": {"configs"},
    "cluster": {"configs", "cluster"},
    "data": {"configs", "cluster", "data"},
    "model": {"configs", "cluster", "model"},
    "jobs": {"configs", "cluster", "data", "model", "jobs"},
}
RAY_FREE_CLUSTER = {"cluster.storage", "cluster.commit"}
RAY_ALLOWED = {"data/shard_server.py", "data/coordinator.py", "data/prepare.py"}
RAY_FORBIDDEN_IN_JOBS = {"jobs/loop.py", "jobs/rank.py", "jobs/ledger.py", "jobs/train_local.py"}
TORCH_ALLOWED_IN_DATA = {"data/ring.py"}
DEEPSPEED_ALLOWED = {"model/engine.py", "model/pipeline.py", "model/deepspeed_start.py", "model/operators.py"}


def source_files():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """Dotted names of all modules a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def problems(path, names):
    relative = path.relative_to(ROOT).as_posix()
    folder = relative.split("/")[0]
    found = []
    for name in names:
        top = name.split(".")[0]
        if top in FOLDERS and top not in MAY_IMPORT[folder]:
            found.append(f"{relative} imports {name}: {folder} may import {sorted(MAY_IMPORT[folder])}")
        if folder in ("data", "model") and top == "cluster" and ".".join(name.split(".")[:2]) not in RAY_FREE_CLUSTER:
            found.append(f"{relative} imports {name}: only {sorted(RAY_FREE_CLUSTER)} of cluster are ray-free")
        ray_is_fine = folder in ("cluster", "jobs") or relative in RAY_ALLOWED
        if top == "ray" and (not ray_is_fine or relative in RAY_FORBIDDEN_IN_JOBS):
            found.append(f"{relative} imports {name}: ray has no place there")
        if top == "deepspeed" and relative not in DEEPSPEED_ALLOWED:
            found.append(f"{relative} imports {name}: deepspeed belongs in {sorted(DEEPSPEED_ALLOWED)}")
        if top == "torch" and folder in ("configs", "cluster"):
            found.append(f"{relative} imports {name}: {folder} knows no torch")
        if top == "torch" and folder == "data" and relative not in TORCH_ALLOWED_IN_DATA:
            found.append(f"{relative} imports {name}: in data only {sorted(TORCH_ALLOWED_IN_DATA)} knows torch")
        if top == "tests":
            found.append(f"{relative} imports {name}: nothing but tests imports tests")
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    assert problems(path, imports(path)) == []


def test_the_import_rules_catch_breaches():
    breaches = {
        "configs/x.py": "torch",
        "cluster/x.py": "data.order",
        "data/x.py": "model.loss",
        "data/z.py": "torch",
        "data/y.py": "cluster.placement",
        "model/x.py": "ray",
        "model/y.py": "deepspeed",
        "jobs/loop.py": "ray",
        "jobs/x.py": "tests.faults",
    }
    for path, name in breaches.items():
        assert problems(ROOT / path, [name]), f"{path} importing {name} went unnoticed"


def test_no_module_is_named_like_the_standard_library():
    names = {path.stem for path in source_files()} - {"__init__"}
    assert names & sys.stdlib_module_names == set()


def test_files_stay_short():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in source_files()}
    lengths = {name: length for name, length in lengths.items() if not name.endswith("__init__.py")}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    assert statistics.median(lengths.values()) <= 180


def test_the_training_loop_fits_one_page():
    assert len((ROOT / "jobs/loop.py").read_text().splitlines()) <= 150
    loop = next(
        node
        for node in ast.parse((ROOT / "jobs/loop.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    )
    assert loop.end_lineno - loop.lineno < 60


def test_every_folder_is_a_package():
    for folder in (*FOLDERS, "jobs/tasks", "tests"):
        assert (ROOT / folder / "__init__.py").is_file()
