"""Data loaders against each other: `python -m tests.bench.data`; writes results.json and table.md.

Each loader runs in an environment of its own, every measurement in a new process; repeats are interleaved over the
loaders, so that a slow minute of the machine meets all of them. README.md tells what the workloads are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.bench import corpus, report
from tests.bench.environments import NotInstalled, ensure
from tests.bench.figures import ledger
from tests.bench.http_store import Store

ROOT = Path(__file__).resolve().parents[2]
# Loader -> its environment; Telar runs where this command runs.
LOADERS = {
    "telar": None,
    "mosaic": "mosaic",
    "hf_map": "hf",
    "hf_stream": "hf",
    "torchdata": "torchdata",
    "litdata": "litdata",
    "grain": "grain",
    "ray_data": "ray",
}
NEEDS = {1: ("main",), 2: ("main",), 3: ("main",), 4: ("main",), 5: ("light",), 7: ("main",), 8: ("light",), 9: ()}
NEEDS[6] = tuple(f"mixture{number}" for number in range(len(corpus.MIXTURE)))
# Loaders of which some steps run in worker processes when asked to.
WITH_WORKERS = ("mosaic", "torchdata", "litdata")
PLANS = {"small": (10**6, 10**7), "full": (10**6, 10**7, 10**8)}
FRACTIONS = (0.5, 0.9)
SECONDS = {"small": {1: 2.0, 2: 15.0}, "full": {1: 10.0, 2: 40.0}}
LIMIT_SECONDS = {"small": 300, "full": 1800}


class Bench:
    """The environments, written corpora and results of one invocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.scale, self.repeats = options.scale, options.repeats
        self.cache, self.out = options.envs.expanduser().resolve(), options.out
        self.interpreters: dict[str, Path] = {}
        self.not_installed: dict[str, str] = {}
        self.runs: list[dict[str, Any]] = []
        self.versions: dict[str, dict[str, str]] = {}
        self.cores, self.seconds = options.cores, options.seconds
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def install(self, loaders: list[str]) -> None:
        """Make the environments; what cannot be installed is noted and left out of the runs."""
        for loader in loaders:
            environment = LOADERS[loader]
            try:
                self.interpreters[loader] = ensure(environment, self.cache) if environment else Path(sys.executable)
            except NotInstalled as error:
                self.not_installed[loader] = str(error)
                continue
            self.versions[loader] = self.call(loader, "versions")

    def folder(self, loader: str) -> Path:
        """Where a loader's files of this scale lie."""
        return self.cache / "data" / self.scale / loader

    def write(self, loader: str, names: tuple[str, ...]) -> None:
        """Write the corpora that are not there yet."""
        for name in names:
            stamp = self.folder(loader) / f"{name}.written"
            wanted = repr((corpus.corpora(self.scale)[name], self.versions[loader]))
            if stamp.exists() and stamp.read_text() == wanted:
                continue
            stamp.unlink(missing_ok=True)
            shutil.rmtree(self.folder(loader) / name, ignore_errors=True)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            result = self.call(loader, "write", "--folder", str(self.folder(loader)), "--corpus", name)
            if "failed" in result:
                raise SystemExit(f"{loader} could not write {name}: {result['failed']}")
            stamp.write_text(wanted)

    def call(self, loader: str, *arguments: str) -> dict[str, Any]:
        """Run a loader's module in its environment; its JSON, or {"failed": why}."""
        command = [str(self.interpreters[loader]), "-W", "ignore", "-m", f"tests.bench.peers.{loader}"]
        command += [*arguments, "--scale", self.scale]
        if self.cores:
            command = ["taskset", "-c", self.cores, *command]
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        # A home of its own: hidden caches of an earlier run would be used again.
        with tempfile.TemporaryDirectory(prefix="tb-home-") as home:
            environment = {**os.environ, **own, "HF_HOME": home, "LITDATA_CACHE_DIR": home}
            # The two phases of a resume are on one machine.
            work = arguments[arguments.index("--work") + 1] if "--work" in arguments else home
            environment["TELAR_SHARD_CACHE"] = f"{work}/telar-shards"
            started = time.time()
            process = subprocess.Popen(
                command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            try:
                output, errors = process.communicate(timeout=LIMIT_SECONDS[self.scale])
            except subprocess.TimeoutExpired:
                end_tree(process)
                return {"failed": f"took more than {LIMIT_SECONDS[self.scale]} s"}
        lines = output.strip().splitlines()
        if process.returncode or not lines:
            last = [line for line in errors.strip().splitlines() if line.strip()]
            return {"failed": last[-1][:300] if last else f"exit status {process.returncode}"}
        result = json.loads(lines[-1])
        if "first_batch_at" in result:
            result["process_to_first_batch_seconds"] = result.pop("first_batch_at") - started
        return result

    def run(self, workload: int, loader: str, repeat: int, variant: str, *arguments: str) -> dict[str, Any]:
        """One measurement, kept and shown."""
        started = time.perf_counter()
        result = self.call(loader, "run", str(workload), "--folder", str(self.folder(loader)), *arguments)
        seconds = time.perf_counter() - started
        self.runs.append(
            {"workload": workload, "loader": loader, "repeat": repeat, "variant": variant, "result": result}
        )
        line = json.dumps(result)
        print(f"W{workload} {loader} {variant or '-'} #{repeat} ({seconds:.1f} s): {line[:300]}", flush=True)
        return result

    def workload(self, number: int) -> None:
        """All repeats of one workload, interleaved over the loaders."""
        for loader in self.interpreters:
            self.write(loader, NEEDS[number])
        timed = {1: self._throughput, 2: self._slowdown, 3: self._start, 4: self._resume}.get(number)
        if timed:
            for repeat in range(self.repeats):
                for loader in self.interpreters:
                    timed(loader, repeat)
                    self.save()
            return
        for loader in self.interpreters:
            with tempfile.TemporaryDirectory(prefix="tb-work-", dir=self.cache) as work:
                if number == 7:
                    self._remote(loader, Path(work))
                else:
                    self.run(number, loader, 0, "", "--work", work)
            self.save()

    def _throughput(self, loader: str, repeat: int) -> None:
        self.run(1, loader, repeat, "", "--seconds", str(self.seconds or SECONDS[self.scale][1]))

    def _slowdown(self, loader: str, repeat: int) -> None:
        seconds = str(self.seconds or SECONDS[self.scale][2])
        self.run(2, loader, repeat, "", "--seconds", seconds)
        if loader in WITH_WORKERS:
            self.run(2, loader, repeat, "1 worker", "--seconds", seconds, "--workers", "1")

    def _start(self, loader: str, repeat: int) -> None:
        self.run(3, loader, repeat, "first batch")
        # Plans of many samples take minutes with some loaders; one repeat shows how they grow.
        for samples in PLANS[self.scale] if repeat == 0 else ():
            with tempfile.TemporaryDirectory(prefix="tb-work-", dir=self.cache) as work:
                self.run(3, loader, repeat, f"plan {samples:.0e}", "--samples", str(samples), "--work", work)

    def _resume(self, loader: str, repeat: int) -> None:
        for fraction in FRACTIONS:
            with tempfile.TemporaryDirectory(prefix="tb-work-", dir=self.cache) as work:
                arguments = ("--work", work, "--fraction", str(fraction))
                variant = f"{fraction:.0%}"
                before = self.run(4, loader, repeat, f"{variant} before", *arguments, "--phase", "before")
                if "failed" in before or "not_supported" in before:
                    continue
                result = self.run(4, loader, repeat, f"{variant} after", *arguments, "--phase", "after")
                if "samples" in result:
                    ids = np.concatenate([np.load(Path(work) / f"{phase}.npy") for phase in ("before", "after")])
                    chosen = corpus.corpora(self.scale)["main"]
                    result |= ledger(ids, chosen.first, chosen.samples)

    def _remote(self, loader: str, work: Path) -> None:
        damaged = work / "store" / "main"
        shutil.copytree(self.folder(loader) / "main", damaged)
        damage(damaged)
        with Store(damaged) as store:
            arguments = ("--work", str(work), "--url", store.url, "--folder", str(damaged.parent))
            result = self.run(7, loader, 0, "", *arguments)
            result |= {"store_requests": store.requests, "store_failures": store.failed}
            result |= {"store_bytes": store.sent_bytes, "dataset_bytes": size_of(damaged)}

    def save(self) -> None:
        """results.json and table.md as they are now."""
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "date": self.started,
            "machine": machine(),
            "cores": self.cores or "all",
            "scale": self.scale,
            "repeats": self.repeats,
            "versions": self.versions,
            "not_installed": self.not_installed,
            "runs": self.runs,
        }
        (self.out / "results.json").write_text(json.dumps(content, indent=1))
        (self.out / "table.md").write_text(report.table(content))


def damage(folder: Path) -> None:
    """Flip some bits in the middle of one data file: the middle one of those that are about as big as the biggest."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    big = sorted(path for path, size in sizes.items() if size > max(sizes.values()) / 2)
    chosen = big[len(big) // 2]
    with chosen.open("r+b") as file:
        for step in range(8):
            file.seek(sizes[chosen] // 2 + step * 5003)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started."""
    own = psutil.Process(process.pid)
    for each in [*own.children(recursive=True), own]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__)
    parser.add_argument("--workloads", default="1,2,3,4,5,6,7,8,9")
    parser.add_argument("--peers", default=",".join(name for name in LOADERS if name != "telar"))
    parser.add_argument("--without-telar", action="store_true", help="only the peers")
    parser.add_argument("--repeats", type=int, default=5, help="of workloads 1 to 4; the others count, once")
    parser.add_argument("--seconds", type=float, help="of a measurement of workloads 1 and 2; default: by scale")
    parser.add_argument("--scale", choices=sorted(corpus.SCALES), default="small")
    parser.add_argument("--cores", default="", help="pin every measurement to these cores (taskset), e.g. 0")
    parser.add_argument("--envs", type=Path, default=Path("~/.cache/telar-bench"), help="environments and corpora")
    parser.add_argument("--out", type=Path, default=Path("bench-data"), help="results.json and table.md")
    options = parser.parse_args()
    peers = [name for name in options.peers.split(",") if name and name != "telar"]
    unknown = sorted(set(peers) - set(LOADERS))
    if unknown:
        parser.error(f"no loaders {unknown}; there are {sorted(LOADERS)}")
    bench = Bench(options)
    bench.install([*([] if options.without_telar else ["telar"]), *peers])
    for number in sorted({int(each) for each in options.workloads.split(",")}):
        bench.workload(number)
    bench.save()
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
