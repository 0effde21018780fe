"""The nine workloads, the same for every loader; each runs in a process of its own and returns measurements."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import corpus
from tests.bench.figures import ledger
from tests.bench.peers import measure
from tests.bench.peers.protocol import NotSupported, Peer, Remote, Stream, View

BATCH = 8
# Divides by every number of ranks that is tried.
ELASTIC_BATCH = 24
ELASTIC_RANKS = (1, 2, 3, 4, 6, 8)
MIXTURE_BATCH = 24
PACKED_WIDTH = 2048
# Nothing waits longer for a batch from a store that is throttled to a shard in half a second.
STALL_SECONDS = 2.0

Result = dict[str, Any]


def throughput(peer: Peer, options: argparse.Namespace) -> Result:
    """W1: epochs for a number of seconds, files in the page cache; imports and `Peer.start` are not counted."""
    folder = options.folder / "main"
    warm(folder)
    peer.start()
    clock, rows, epochs = measure.Clock(), 0, 0
    stream = peer.open(folder, View(BATCH, workers=options.workers))
    batches = iter(stream)
    deadline = time.perf_counter() + options.seconds
    latest = deadline + 10 * options.seconds
    # A whole epoch at least, unless that takes ten times as long: what is read ahead would count as read at once.
    while (now := time.perf_counter()) < deadline or (not epochs and now < latest):
        for batch in batches:
            rows += len(batch)
            now = time.perf_counter()
            if now >= (deadline if epochs else latest):
                break
        else:
            epochs += 1
            batches = iter(stream)
    used = clock.read()
    check_batch(batch)
    tokens = rows * corpus.corpora(options.scale)["main"].width
    result = {"tokens": tokens, "epochs": epochs, **used}
    result |= {"peak_rss_bytes": measure.peak_rss_bytes(), "pss_bytes": measure.pss_bytes()}
    result["tokens_per_second"] = tokens / used["wall_seconds"]
    result["tokens_per_cpu_second"] = tokens / used["cpu_seconds"]
    stream.close()
    return result


def step_slowdown(peer: Peer, options: argparse.Namespace) -> Result:
    """W2: steps of a small transformer on the loader's batches, and on tensors in memory, in turns ABBA.

    The slow-down is the median over turns: what else the machine did meanwhile met both sides of a turn.
    """
    from tests.bench.peers.small_step import Step

    folder = options.folder / "main"
    warm(folder)
    step = Step()
    stream = peer.open(folder, View(BATCH, workers=options.workers))
    batches = iter(stream)
    memory = [next(batches).clone() for _ in range(4)]
    for tokens in memory[:3]:
        step(tokens)
    waits, times, ratios = [], {"memory": [], "loader": []}, []
    kept = itertools.cycle(memory)
    deadline = time.perf_counter() + options.seconds
    while time.perf_counter() < deadline:
        for name in ("memory", "loader", "loader", "memory"):
            started = time.perf_counter()
            tokens = next(kept if name == "memory" else batches)
            if name == "loader":
                waits.append(time.perf_counter() - started)
            step(tokens)
            times[name].append(time.perf_counter() - started)
        ratios.append(sum(times["loader"][-2:]) / sum(times["memory"][-2:]))
    stream.close()
    return {
        "steps": len(times["loader"]),
        "memory_step_seconds": float(np.median(times["memory"])),
        "loader_step_seconds": float(np.median(times["loader"])),
        "wait_seconds": float(np.median(waits)),
        "slowdown": float(np.median(ratios)) - 1,
    }


def start_up(peer: Peer, options: argparse.Namespace) -> Result:
    """W3: seconds to the first batch, or with --samples to the order of that many samples without their data."""
    if options.samples:
        folder = options.work / f"plan-{options.samples}"
        folder.mkdir(parents=True, exist_ok=True)
        peer.write_plan(options.samples, folder)
        before, started = measure.rss_bytes(), time.perf_counter()
        peer.plan(options.samples, folder)
        seconds = time.perf_counter() - started
        return {"plan_seconds": seconds, "plan_rss_bytes": max(0, measure.peak_rss_bytes() - before)}
    folder = options.folder / "main"
    warm(folder)
    peer.start()
    started = time.perf_counter()
    stream = peer.open(folder, View(BATCH))
    check_batch(next(iter(stream)))
    seconds = time.perf_counter() - started
    result = {"first_batch_seconds": seconds, "first_batch_at": time.time(), "rss_bytes": measure.peak_rss_bytes()}
    stream.close()
    return result


def resume(peer: Peer, options: argparse.Namespace) -> Result:
    """W4: read a fraction and save the state; or load the state and read the rest, from files not in the page cache."""
    import torch

    folder, saved = options.folder / "main", options.work / "state.pt"
    chosen = corpus.corpora(options.scale)["main"]
    steps = int(chosen.samples * options.fraction) // BATCH
    if options.phase == "before":
        stream = peer.open(folder, View(BATCH))
        ids = take_ids(stream, steps)
        torch.save(stream.state(), saved)
        stream.close()
        np.save(options.work / "before.npy", ids)
        return {"samples": len(ids), "state_bytes": saved.stat().st_size}
    forget(folder)
    state = torch.load(saved, weights_only=True)
    read, started = measure.disk_bytes(), time.perf_counter()
    stream = peer.open(folder, View(BATCH, states=(state,), consumed=steps * BATCH))
    batches = iter(stream)
    first = next(batches, None)
    seconds, first_bytes = time.perf_counter() - started, measure.disk_bytes() - read
    ids = take_ids(batches if first is None else itertools.chain([first], batches))
    total = measure.disk_bytes() - read
    stream.close()
    np.save(options.work / "after.npy", ids)
    return {
        "resume_seconds": seconds,
        "first_batch_disk_bytes": first_bytes,
        "disk_bytes": total,
        "rest_bytes": chosen.bytes * (1 - options.fraction),
        "samples": len(ids),
    }


def world_sizes(peer: Peer, options: argparse.Namespace) -> Result:
    """W5: global batches at several numbers of ranks, and 4 -> 3 -> 8 within an epoch, against those of one rank."""
    folder = options.folder / "light"
    chosen = corpus.corpora(options.scale)["light"]
    result: Result = {}
    reference: list[np.ndarray] | None = None
    runs: dict[int, list[np.ndarray]] = {}
    for ranks in ELASTIC_RANKS:
        try:
            found = [ids for ids, _ in global_batches(peer, folder, ranks)]
        except NotSupported as error:
            result[str(ranks)] = {"not_supported": str(error)}
            continue
        # Whatever a loader raises is its result; the workloads after it still run.
        except Exception as error:  # noqa: BLE001
            result[str(ranks)] = {"failed": describe(error)}
            continue
        reference = found if reference is None else reference
        runs[ranks] = found
        result[str(ranks)] = compared(found, reference, chosen.samples)
    thirds = len(reference or []) // 3
    try:
        found, states = [], ()
        for ranks, steps in ((4, thirds), (3, thirds), (8, None)):
            for ids, streams in global_batches(peer, folder, ranks, states, len(found) * ELASTIC_BATCH):
                found.append(ids)
                if steps is not None and len(found) % thirds == 0:
                    states = tuple(stream.state() for stream in streams)
                    break
        result["4-3-8"] = compared(found, reference, chosen.samples)
        # Some fix the order when a run begins, whatever it would be on one rank.
        result["4-3-8"]["identical_to_4"] = compared(found, runs[4], chosen.samples)["identical"]
    except NotSupported as error:
        result["4-3-8"] = {"not_supported": str(error)}
    except Exception as error:  # noqa: BLE001
        result["4-3-8"] = {"failed": describe(error)}
    return result


def mixture(peer: Peer, options: argparse.Namespace) -> Result:
    """W6: how far the share of a corpus strays from its weight, and whether a mixture goes on from 2 ranks on 3."""
    folders = [options.folder / f"mixture{number}" for number in range(len(corpus.MIXTURE))]
    rows = corpus.corpora(options.scale)["mixture0"].samples
    steps = rows // MIXTURE_BATCH
    stream = peer.mixture(folders, corpus.MIXTURE, View(MIXTURE_BATCH))
    ids = take_ids(stream, steps)
    stream.close()
    counts = np.stack([np.cumsum(ids // rows == number) for number in range(len(folders))])
    wanted = np.asarray(corpus.MIXTURE)[:, None] * np.arange(1, len(ids) + 1)
    result = {
        "samples": len(ids),
        "max_deviation_samples": float(np.abs(counts - wanted).max()),
        "final_deviation_samples": float(np.abs(counts[:, -1] - wanted[:, -1]).max()),
    }
    for label, before, after in (("resume", 1, 1), ("resize", 2, 3)):
        result[label] = resumed_mixture(peer, folders, steps, ids, before, after)
    return result


def resumed_mixture(
    peer: Peer, folders: list[Path], steps: int, expected: np.ndarray, before: int, after: int
) -> Result:
    """Whether half of the steps at one number of ranks and half at another give the samples of the run on one rank."""
    try:
        half, found, states = steps // 2, [], ()
        for ranks, count in ((before, half), (after, steps - half)):
            views = [
                View(MIXTURE_BATCH, rank, ranks, states=states, consumed=len(found) * MIXTURE_BATCH)
                for rank in range(ranks)
            ]
            streams = [peer.mixture(folders, corpus.MIXTURE, view) for view in views]
            found += in_step(streams, count)
            if ranks == before and not states:
                states = tuple(stream.state() for stream in streams)
            for stream in streams:
                stream.close()
    except NotSupported as error:
        return {"not_supported": str(error)}
    except Exception as error:  # noqa: BLE001
        return {"failed": describe(error)}
    batches = [np.sort(expected[at : at + MIXTURE_BATCH]) for at in range(0, steps * MIXTURE_BATCH, MIXTURE_BATCH)]
    same = sum(np.array_equal(np.sort(one), other) for one, other in zip(found, batches, strict=False))
    return {"identical": same / len(batches)}


def remote(peer: Peer, options: argparse.Namespace) -> Result:
    """W7: an epoch through a store that is slow, fails and holds one damaged shard, started again once it failed."""
    folder = options.folder / "main"
    chosen = corpus.corpora(options.scale)["main"]
    # A quarter; of few shards five, for Mosaic wants room for four with their headers.
    cache_bytes = chosen.bytes // min(4, chosen.shards // 5)
    target = Remote(options.url, folder, options.work / "cache", cache_bytes)
    rows = wrong = stalls = starts = short = 0
    errors: list[str] = []
    longest, started = 0.0, time.perf_counter()
    # A damaged shard may end the epoch, with an error or without; a person would start again with the cache as it is.
    for _ in range(2):
        try:
            starts, before_start = starts + 1, rows
            stream = peer.remote(target, View(BATCH))
            before = time.perf_counter()
            for batch in stream:
                waited = time.perf_counter() - before
                longest, stalls = max(longest, waited), stalls + (waited > STALL_SECONDS)
                values = np.asarray(batch).astype(np.uint16)
                rows, wrong = rows + len(values), wrong + corpus.wrong_rows(values)
                before = time.perf_counter()
            stream.close()
            # The rows of the damaged shard may be left out; more than those may not.
            if rows - before_start >= chosen.samples - chosen.rows:
                break
            short += 1
        except NotSupported:
            raise
        except Exception as error:  # noqa: BLE001
            errors.append(describe(error))
    return {
        "samples": rows,
        "corrupt_samples": wrong,
        "stalls": stalls,
        "longest_wait_seconds": longest,
        "starts": starts,
        "silently_short_epochs": short,
        "errors": errors,
        "wall_seconds": time.perf_counter() - started,
        "cache_limit_bytes": cache_bytes,
        "cache_bytes": sum(file.stat().st_size for file in target.cache.rglob("*") if file.is_file()),
    }


def shuffle_quality(peer: Peer, options: argparse.Namespace) -> Result:
    """W8: correlation of neighbours, serial pairs, and how many shards a batch comes from."""
    chosen = corpus.corpora(options.scale)["light"]
    ids = take_ids(peer.open(options.folder / "light", View(BATCH)))
    batches = [ids[at : at + 256] // chosen.rows for at in range(0, len(ids) - 255, 256)]
    return {
        "samples": len(ids),
        "lag1": lag1(ids),
        "pair_z": pair_z(ids, chosen.samples),
        "shards": chosen.shards,
        "shards_per_256": float(np.mean([len(np.unique(batch)) for batch in batches])),
    }


def packing(peer: Peer, options: argparse.Namespace) -> Result:
    """W9: documents of lognormal length in rows of 2,048 tokens."""
    documents = corpus.documents(corpus.SCALES[options.scale]["documents"])
    real = delivered = leaks = rows = 0
    seen = np.zeros(len(documents) + 1, dtype=np.int64)
    last = np.full(len(documents) + 1, -1)
    pieces = np.zeros(len(documents) + 1, dtype=np.int64)
    folder = options.work / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for row, (tokens, segments, pad) in enumerate(peer.pack(documents, PACKED_WIDTH, folder)):
        tokens = np.asarray(tokens)[~np.asarray(pad)].astype(np.int64)
        rows, real = rows + 1, real + len(tokens)
        values, counts = np.unique(tokens, return_counts=True)
        delivered += len(tokens)
        seen += np.bincount(tokens, minlength=len(seen))
        pieces[values] += last[values] != row
        last[values] = row
        leaks += _leaks(tokens, None if segments is None else np.asarray(segments)[~np.asarray(pad)])
        assert counts.sum() == len(tokens)
    seconds = time.perf_counter() - started
    lengths = np.array([0, *(len(document) for document in documents)])
    short = lengths <= PACKED_WIDTH
    return {
        "rows": rows,
        "utilisation": real / (rows * PACKED_WIDTH),
        "cut_documents_that_fit": int((short & (pieces > 1))[1:].sum()),
        "lost_tokens": int(np.maximum(lengths - seen, 0)[1:].sum()),
        "doubled_tokens": int(np.maximum(seen - lengths, 0)[1:].sum()),
        "leaking_token_fraction": leaks / max(1, delivered),
        "tokens": int(lengths.sum()),
        "wall_seconds": seconds,
    }


def _leaks(tokens: np.ndarray, segments: np.ndarray | None) -> int:
    """Tokens whose causal context holds tokens of another document that no segment number keeps apart."""
    if segments is None:
        segments = np.zeros(len(tokens), dtype=np.int64)
    leaks = 0
    for segment in np.unique(segments):
        own = tokens[segments == segment]
        leaks += int((own != own[0]).sum()) if len(own) else 0
    return leaks


def lag1(ids: np.ndarray) -> float:
    """Correlation of each sample's number with the next one's."""
    return float(np.corrcoef(ids[:-1], ids[1:])[0, 1])


def pair_z(ids: np.ndarray, samples: int, cells: int = 16) -> float:
    """Standard score of chi-square over a grid of (number, next number): about 0 for a true permutation."""
    grid = ids * cells // samples
    counts = np.bincount(grid[:-1] * cells + grid[1:], minlength=cells * cells)
    expected = counts.sum() / cells**2
    degrees = cells**2 - 1
    return float(((counts - expected) ** 2 / expected).sum() - degrees) / float(np.sqrt(2 * degrees))


def global_batches(
    peer: Peer, folder: Path, ranks: int, states: tuple[Any, ...] = (), consumed: int = 0
) -> Iterator[tuple[np.ndarray, list[Stream]]]:
    """The ids of each global batch, all ranks in step, with the streams (for their states)."""
    views = [View(ELASTIC_BATCH, rank, ranks, states=states, consumed=consumed) for rank in range(ranks)]
    streams = [peer.open(folder, view) for view in views]
    try:
        for ids in in_step(streams):
            yield ids, streams
    finally:
        for stream in streams:
            stream.close()


def in_step(streams: list[Stream], steps: int | None = None) -> Iterator[np.ndarray]:
    """The ids of each step of several ranks together, until all are at their end."""
    batches = [iter(stream) for stream in streams]
    for _ in itertools.count() if steps is None else range(steps):
        found = [next(each, None) for each in batches]
        parts = [corpus.ids_of(np.asarray(batch)) for batch in found if batch is not None]
        if not parts:
            return
        yield np.concatenate(parts)


def compared(found: list[np.ndarray], reference: list[np.ndarray] | None, samples: int) -> Result:
    """Share of steps with the same samples as the reference, and the ledger of the epoch."""
    ids = np.concatenate(found)
    same = sum(np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(found, reference or [], strict=False))
    return {"identical": same / max(len(found), len(reference or [])), **ledger(ids, 0, samples)}


def take_ids(batches: Iterable[Any], steps: int | None = None) -> np.ndarray:
    """The ids of the batches, of the first `steps` if given; not one batch more is asked for."""
    # islice asks for no element behind its end, so a state taken afterwards stands where the ids do.
    parts = [corpus.ids_of(np.asarray(batch)) for batch in itertools.islice(iter(batches), steps)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def check_batch(batch: Any) -> Any:
    """The batch, which must be an int64 tensor whose rows are what their numbers say."""
    import torch

    assert batch.dtype == torch.int64, batch.dtype
    assert batch.ndim == 2
    wrong = corpus.wrong_rows(batch.numpy().astype(np.uint16))
    assert not wrong, f"{wrong} wrong rows"
    return batch


def warm(folder: Path) -> None:
    """Read every file once."""
    for file in files(folder):
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass


def forget(folder: Path) -> None:
    """Have the kernel drop the files from the page cache."""
    for file in files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def describe(error: Exception) -> str:
    """Kind and first line of an error, without the colours of a terminal."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {(plain.splitlines() or [''])[0][:200]}"


WORKLOADS = {
    1: throughput,
    2: step_slowdown,
    3: start_up,
    4: resume,
    5: world_sizes,
    6: mixture,
    7: remote,
    8: shuffle_quality,
    9: packing,
}
