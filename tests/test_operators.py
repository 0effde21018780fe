"""The JIT-built operator: built once however many ask, loaded without a compiler, left out where none is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.operators import CACHE_VARIABLE, OPERATOR, library, operator_environment, prepare_operators

ROOT = Path(__file__).resolve().parent.parent

RANK = """
import json, sys, logging
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from model.engine import create_engine
from tests.test_engine import VOCABULARY, RATE, make_config, share
engine = create_engine(make_config(), VOCABULARY, 0)
print(engine.train_step(share(1, 2, engine.rank, engine.world_size), 1, RATE).loss)
engine.close()
"""

PREPARE = "from model.operators import prepare_operators; o = prepare_operators(); print(o.mode, o.message)"


def start(code, environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(processes):
    found = []
    for process in processes:
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        found.append((out, err))
    return found


def two_ranks(environment, port):
    return results(
        start(
            RANK,
            {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **environment,
            },
        )
        for rank in range(2)
    )


@pytest.fixture
def bare(tmp_path):
    """An environment whose PATH has no compiler, and an empty cache."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), CACHE_VARIABLE: str(tmp_path / "cache")}


@pytest.fixture
def free_port():
    from tests.gloo_pool import _free_port

    return _free_port()


def test_without_a_compiler_two_ranks_train_and_say_so(bare, free_port, tmp_path):
    [(said, _)] = results([start(PREPARE, bare)])
    assert said.startswith("off") and "no C++ compiler" in said and "going on without" in said
    (one, log), (other, _) = two_ranks({**bare, "TELAR_OPERATORS": "off"}, free_port)
    assert float(one) == float(other) > 0
    assert "going without it" in log
    assert not list(tmp_path.rglob("*.so"))


def test_an_unset_mode_needs_no_compiler_either(bare, free_port):
    (one, _), (other, _) = two_ranks(bare, free_port)
    assert float(one) == float(other) > 0


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    found = prepare_operators()
    assert found.mode == "off" and str(tmp_path / "file") in found.message


def test_a_compiler_that_fails_is_no_error(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found = prepare_operators()
    assert found.mode == "off" and "does not compile" in found.message and "error" in found.message.lower()
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [f"{OPERATOR}.lock"]


def counting_compiler(folder):
    """A stand-in for c++ that notes each call and leaves the libraries that a build leaves."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\necho called >> {folder}/calls\nexec {compiler_path()} "$@"\n')
    compiler.chmod(0o755)
    return compiler


def compiler_path():
    import shutil

    return shutil.which("c++")


@pytest.mark.skipif(compiler_path() is None, reason="no C++ compiler on this machine")
def test_callers_at_the_same_time_build_once_and_ranks_load_the_result(tmp_path, free_port, monkeypatch):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        CACHE_VARIABLE: str(tmp_path / "cache"),
        "CXX": str(counting_compiler(tmp_path)),
    }
    said = [out for out, _ in results([start(PREPARE, environment) for _ in range(3)])]
    assert all(line.startswith("shm") for line in said)
    assert sum("built" in line for line in said) == 1
    calls = (tmp_path / "calls").read_text()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert prepare_operators().mode == "shm" and library().exists()
    # Ranks have no compiler on their PATH: they load what was built.
    bare = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path), CACHE_VARIABLE: str(tmp_path / "cache")}
    before = shared_memory()
    (one, log), (other, _) = two_ranks({**bare, **operator_environment("shm")}, free_port)
    assert float(one) == float(other) > 0
    assert "operator loaded" in log
    assert (tmp_path / "calls").read_text() == calls
    assert shared_memory() <= before


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer*")}
