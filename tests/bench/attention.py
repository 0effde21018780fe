"""Kinds of self-attention by length: `python -m tests.bench.attention`; prints a table, writes one JSON.

Forward and backward of one layer's attention (projected queries, keys and values; one document per row, causal), the
kinds in turns. A kind stops growing where its dense mask would not fit (`--most-mask-bytes`) or where a turn took
longer than `--most-seconds`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from jobs.machine import hardware, versions
from model.attention_kinds import AttentionKind
from model.self_attention import self_attention
from tests.bench.figures import ratio, spread

KINDS = {name: AttentionKind(name, causal=True) for name in ("full", "window", "blocklog", "linear")}


def turn(kind: AttentionKind, leaves: list[Tensor], segments: Tensor, positions: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    self_attention(kind, *leaves, segments, positions).sum().backward()
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
    for leaf in leaves:
        leaf.grad = None
    return time.perf_counter() - started


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attention", description=__doc__)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536", help="tokens")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=30.0)
    parser.add_argument("--most-mask-bytes", type=float, default=2**30)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", type=Path, default=Path("bench-attention.json"))
    options = parser.parse_args()
    runs, stopped = [], {}
    print("| tokens | " + " | ".join(f"{name}, ms" for name in KINDS) + " |\n|" + "---|" * (len(KINDS) + 1))
    for length in map(int, options.lengths.split(",")):
        random = torch.Generator().manual_seed(length)
        shape = (1, options.heads, length, options.width)
        leaves = [
            torch.randn(shape, generator=random).to(options.device, getattr(torch, options.dtype)).requires_grad_()
            for _ in range(3)
        ]
        segments = torch.ones(1, length, dtype=torch.int32, device=options.device)
        positions = torch.arange(length, device=options.device).unsqueeze(0)
        if length**2 > options.most_mask_bytes:
            stopped.setdefault("full", f"a mask of {length**2 / 2**30:.0f} GiB")
        seconds: dict[str, list[float]] = {name: [] for name in KINDS if name not in stopped}
        for repeat in range(options.repeats + 1):
            for name, found in seconds.items():
                if name in stopped:
                    continue
                took = turn(KINDS[name], leaves, segments, positions)
                if repeat:
                    found.append(took)
                if took > options.most_seconds:
                    stopped[name] = f"longer than {options.most_seconds:g} s at {length:,} tokens"
        cells = []
        for name in KINDS:
            if not seconds.get(name):
                cells.append(stopped[name])
                continue
            runs.append({"kind": name, "tokens": length, "seconds": seconds[name]})
            against = ""
            # Fewer repeats than the others where it was stopped among them.
            if name != "full" and len(seconds.get("full", ())) == len(seconds[name]):
                against = f", {ratio(seconds['full'], seconds[name]).middle:.2f}x"
            cells.append(f"{1e3 * spread(seconds[name]).middle:,.1f}{against}")
        print(f"| {length:,} | " + " | ".join(cells) + " |", flush=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {**vars(options), "out": str(options.out), "threads": torch.get_num_threads()},
        "runs": runs,
        "stopped": stopped,
        "hardware": hardware(),
        "versions": versions(),
    }
    options.out.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
