"""Cached generation against transformers: `python -m tests.bench.generate`; prints a table, writes one JSON.

A model with random weights is exported and loaded by transformers, so both compute with the same numbers; both decode
greedily exactly `--new-tokens` from the same prompts, in turns, float32, in this process. A repeat starts with the one
that the repeat before ended with.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from configs.schema import ModelSection
from jobs.machine import hardware, versions
from model.export import SpecialTokens, export
from model.generation import generate
from model.transformer import Transformer, build_model
from tests.bench.figures import ratio, spread
from tests.bench.report import show

VOCABULARY, TOKENS = 8192, SpecialTokens(pad=0, bos=1, eos=2)
LLAMA = {
    "architecture": "decoder",
    "positions": "rotary",
    "norm": "rms",
    "norm_placement": "pre",
    "feed_forward": "swiglu",
    "bias": False,
    "scale_embeddings": False,
}


def sections(d_model: int, layers: int) -> dict[str, ModelSection]:
    """The two architectures at a size; heads are 64 wide where that fits."""
    sizes = {
        "d_model": d_model,
        "heads": max(1, d_model // 64),
        "d_ff": 4 * d_model,
        "encoder_layers": layers,
        "decoder_layers": layers,
    }
    return {"MarianMTModel": ModelSection(**sizes), "LlamaForCausalLM": ModelSection(**sizes, **LLAMA)}


def exported(model: Transformer, positions: int, device: torch.device) -> Any:
    """The same weights in transformers."""
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    found = export(model.section, parameters, VOCABULARY, TOKENS, positions)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(found.config))
        (Path(folder) / "generation_config.json").write_text(json.dumps(found.generation))
        save_file(found.tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return getattr(transformers, found.architecture).from_pretrained(folder).eval().to(device)


def contestants(
    model: Transformer, theirs: Any, prompts: torch.Tensor, new_tokens: int
) -> dict[str, Callable[[], list[list[int]]]]:
    """Functions that give the new tokens of all rows; `prompts` int64 `[batch, length]` without bos."""
    rows, alone = prompts.tolist(), model.section.architecture == "decoder"
    begun = torch.cat((torch.full_like(prompts[:, :1], TOKENS.bos), prompts), 1) if alone else prompts

    def their_turn() -> list[list[int]]:
        # min_new_tokens forbids the end token; ours does not stop at it but may choose it.
        made = theirs.generate(
            input_ids=begun,
            attention_mask=torch.ones_like(begun),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            num_beams=1,
            do_sample=False,
        )
        return made[:, -new_tokens:].tolist()

    return {"telar": lambda: generate(model, rows, TOKENS.bos, [], new_tokens), "transformers": their_turn}


def measure(contest: dict[str, Callable[[], list[list[int]]]], repeats: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of each, by repeat; one turn of each before does not count."""
    rates: dict[str, list[float]] = {name: [] for name in contest}
    order = list(contest)
    for repeat in range(repeats + 1):
        for name in order:
            started = time.perf_counter()
            contest[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                rates[name].append(tokens / (time.perf_counter() - started))
        order.reverse()
    return rates


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generate", description=__doc__)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-generate.json"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device, runs = torch.device(options.device), []
    print("| model | batch | telar, tokens/s | transformers, tokens/s | telar / transformers | equal tokens |")
    print("|---|---|---|---|---|---|")
    for name, section in sections(options.d_model, options.layers).items():
        model = build_model(section, VOCABULARY, 0).eval().to(device)
        theirs = exported(model, options.prompt_tokens + options.new_tokens + 1, device)
        for batch in map(int, options.batches.split(",")):
            random = torch.Generator().manual_seed(batch)
            prompts = torch.randint(3, VOCABULARY, (batch, options.prompt_tokens), generator=random).to(device)
            contest = contestants(model, theirs, prompts, options.new_tokens)
            ours, peer = contest["telar"](), contest["transformers"]()
            pairs = [pair for row in zip(ours, peer, strict=True) for pair in zip(*row, strict=True)]
            equal = sum(a == b for a, b in pairs) / len(pairs)
            rates = measure(contest, options.repeats, batch * options.new_tokens)
            found = ratio(rates["telar"], rates["transformers"])
            runs.append({"model": name, "batch": batch, "tokens_per_second": rates, "equal_tokens": equal})
            quotient = f"{found.middle:.2f} ({found.low:.2f} to {found.high:.2f})"
            cells = [name, batch, show(rates["telar"], digits=0), show(rates["transformers"], digits=0), quotient]
            print("| " + " | ".join(map(str, [*cells, f"{equal:.1%}"])) + " |", flush=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {**vars(options), "out": str(options.out), "threads": torch.get_num_threads()},
        "runs": runs,
        "medians": [
            {**{key: run[key] for key in ("model", "batch")}, **{n: spread(v).middle for n, v in rates.items()}}
            for run in runs
            for rates in [run["tokens_per_second"]]
        ],
        "hardware": hardware(),
        "versions": {**versions(), "transformers": transformers.__version__},
    }
    options.out.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
