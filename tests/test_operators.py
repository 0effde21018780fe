"""The JIT-built operator: built once however many ask, loaded without a compiler, left out where none is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.operators import CACHE_VARIABLE, OPERATOR, library, operator_environment, prepare_operators

ROOT = Path(__file__).resolve().parent.parent

RANK = """
import os, sys, logging
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from model.engine import create_engine
from tests.test_engine import VOCABULARY, RATE, make_config, share
engine = create_engine(make_config(), VOCABULARY, 0)
print(engine.train_step(share(1, 2, engine.rank, engine.world_size), 1, RATE).loss)
engine.close()
sys.stdout.flush()
os._exit(0)  # torch's threads may abort the interpreter while it is torn down
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
    processes = [
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
    ]
    return results(processes)


@pytest.fixture
def bare(tmp_path):
    """An environment whose PATH has no compiler, and an empty cache."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), CACHE_VARIABLE: str(tmp_path / "cache")}


@pytest.fixture
def free_port():
    from cluster.network import free_ports

    return free_ports(1)[0]


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


@pytest.fixture(scope="module")
def built():
    """The operator in this user's own cache, built now if it never was."""
    found = prepare_operators()
    if found.mode != "shm":
        pytest.skip(found.message)
    return library()


def test_callers_at_the_same_time_build_once(built, tmp_path):
    # Stands in for c++ and notes each linking; what it "links" is the library that the real compiler made before.
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-v*|*--version*) echo "g++ (GCC) 13.0.0"; exit 0;; esac\n'
        'while [ "$1" != "-o" ]; do case "$1" in -MF) touch "$2";; esac; shift; done\n'
        f'case "$2" in *.so) echo linked >> {tmp_path}/calls; cp {built} "$2";; *) touch "$2";; esac\n'
    )
    compiler.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        CACHE_VARIABLE: str(tmp_path / "cache"),
        "CXX": str(compiler),
    }
    said = [out for out, _ in results([start(PREPARE, environment) for _ in range(3)])]
    assert all(line.startswith("shm") for line in said), said
    assert sum("built" in line for line in said) == 1
    [(again, _)] = results([start(PREPARE, environment)])
    assert again.startswith("shm") and "built" not in again
    assert (tmp_path / "calls").read_text() == "linked\n"


def test_ranks_load_what_was_built_without_a_compiler(built, bare, free_port):
    before = shared_memory()
    cache = {CACHE_VARIABLE: str(built.parent.parent.parent)}
    (one, log), (other, _) = two_ranks({**bare, **operator_environment("shm"), **cache}, free_port)
    assert float(one) == float(other) > 0
    assert "operator loaded" in log
    assert shared_memory() <= before


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer*")}
