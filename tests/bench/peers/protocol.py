"""What a loader offers to the workloads, and the command line of its module: `write` and `run`, one JSON line out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.peers import measure


class NotSupported(Exception):
    """The loader has no such thing; the message says why and lands in the table."""


@dataclass(frozen=True)
class View:
    """Which part of the global batches is wanted. `states` are those of all ranks where reading stopped."""

    batch: int
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    seed: int = 7
    states: tuple[Any, ...] = ()
    consumed: int = 0

    @property
    def own(self) -> int:
        """Samples of a global batch that this rank reads."""
        if self.batch % self.ranks:
            raise NotSupported(f"a batch of {self.batch} does not divide by {self.ranks} ranks")
        return self.batch // self.ranks

    @property
    def state(self) -> Any:
        """The state this rank goes on from; None at the beginning. Raises NotSupported when ranks are more or fewer."""
        if not self.states:
            return None
        if len(self.states) != self.ranks:
            raise NotSupported(f"state of {len(self.states)} ranks cannot be loaded on {self.ranks}")
        return self.states[self.rank]


class Stream:
    """One epoch (or what is left of it) of shuffled int64 tensors `[samples, tokens]`; asked again, one more."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def state(self) -> Any:
        """What is needed to go on behind the batch that was handed out last."""
        raise NotSupported("no state can be saved")

    def close(self) -> None:
        """Stop what runs in the background."""


@dataclass(frozen=True)
class Remote:
    """A dataset that is not local: `url` of a throttled HTTP server, `folder` the same files as a directory."""

    url: str
    folder: Path
    cache: Path
    cache_bytes: int


class Peer:
    """One loader. What is not overridden is reported as not supported."""

    name: str
    packages: tuple[str, ...] = ()
    has_workers = False

    def write(self, corpus: Any, folder: Path) -> None:
        """Write a corpus in the loader's own format into an empty folder."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the services that the loader needs, which a training job would have running anyway."""

    def open(self, folder: Path, view: View) -> Stream:
        """Shuffled batches of one epoch."""
        raise NotImplementedError

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        """Corpora mixed by weight."""
        raise NotSupported("no mixture of corpora")

    def write_plan(self, samples: int, folder: Path) -> None:
        """Make what `plan` needs; not measured."""

    def plan(self, samples: int, folder: Path) -> None:
        """From metadata alone: make the order of that many samples (shards of 1,024) ready and find the first one."""
        raise NotSupported("no order without reading data")

    def remote(self, remote: Remote, view: View) -> Stream:
        """One epoch of a dataset that is not local."""
        raise NotSupported("no HTTP")

    def pack(self, documents: list[Any], width: int, folder: Path) -> Iterator[tuple[Any, Any, Any]]:
        """Rows of packed documents: tokens, segments or None, pad (bool, True where no token is), each `[width]`."""
        raise NotSupported("no packing of documents")

    def versions(self) -> dict[str, str]:
        """Versions of the packages that matter."""
        from importlib.metadata import version

        return {package: version(package) for package in self.packages}


def main(peer: Peer) -> None:
    """The command line of a loader's module."""
    ready = measure.age_seconds()
    from tests.bench import corpus
    from tests.bench.peers import workloads

    parser = argparse.ArgumentParser(prog=peer.name)
    parser.add_argument("command", choices=("write", "run", "versions"))
    parser.add_argument("workload", nargs="?", type=int)
    parser.add_argument("--scale", default="small", choices=sorted(corpus.SCALES))
    parser.add_argument("--folder", type=Path, help="where the loader's files lie, a folder per corpus")
    parser.add_argument("--work", type=Path, help="where results of this run may be written")
    parser.add_argument("--corpus", default="")
    parser.add_argument("--phase", default="")
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--url", default="")
    parser.add_argument("--json", action="store_true", help="always so: the last line printed is JSON")
    options = parser.parse_args()
    if options.command == "versions":
        result: dict[str, Any] = peer.versions() | {"python": sys.version.split()[0]}
    elif options.command == "write":
        chosen = corpus.corpora(options.scale)[options.corpus]
        started = time.perf_counter()
        peer.write(chosen, options.folder / options.corpus)
        result = {"wall_seconds": time.perf_counter() - started}
    else:
        try:
            result = workloads.WORKLOADS[options.workload](peer, options)
        except NotSupported as error:
            result = {"not_supported": str(error)}
        result["import_seconds"] = ready
    print("\n" + json.dumps(result), flush=True)
    sys.stdout.flush()
