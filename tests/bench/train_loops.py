"""Training loops without Telar on the samples of a run of it: `python -m tests.bench.train_loops WAY FOLDER`.

Reads FOLDER/shape.json and FOLDER/samples.npz, trains one step for each of its entries and prints one JSON: seconds of
a step from the end of step `warm` on, parameters, the losses. `loop` trains Telar's model with nothing around it,
`nanogpt` a GPT written down as in nanoGPT (Karpathy 2022), `hf` GPT2LMHeadModel under transformers' Trainer; the last
two need torch, numpy and (hf) transformers with accelerate alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = dict[str, Any]
Samples = dict[str, np.ndarray]


def loop(shape: Shape, samples: Samples) -> dict[str, Any]:
    """Telar's model and rate, torch's Adam, float32, clipping; the micro-batches lie in memory."""
    from configs.load import parse_config
    from model.batch import ModelBatch
    from model.schedule import learning_rate
    from model.transformer import build_model

    config = parse_config(shape["config"], "bench")
    own, train = config.optimizer, config.train
    model = build_model(config.model, shape["vocabulary"], config.run.seed, train.label_smoothing).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=own.betas, eps=own.eps, fused=True)
    inputs = [samples[f"input{number}"] for number in range(6)]
    ends, losses = [], []
    for at in range(len(samples["labels"])):
        parts = [each[at] for each in inputs]
        batch = ModelBatch.from_numpy(0, parts, samples["labels"][at], samples["loss_weight"][at])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(own, config.model.d_model, at + 1, train.steps)
        result = model(batch.inputs, torch.tensor([at + 1, 0]), batch.labels, batch.loss_weight)
        loss = result.loss / batch.loss_weight.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), own.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.time())
    return {"ends": ends, "losses": losses, "parameters": sum(each.numel() for each in model.parameters())}


class Block(nn.Module):
    """Pre-norm attention and feed-forward of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[batch, tokens, width]`."""
        batch, tokens, width = x.shape
        parts = self.attention(self.norms[0](x)).split(width, 2)
        query, key, value = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(found.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.feed_forward(self.norms[1](x))


class GPT(nn.Module):
    """GPT-2 with learned positions and tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape["width"]
        self.tokens = nn.Embedding(shape["vocabulary"], width)
        self.positions = nn.Embedding(shape["tokens"], width)
        self.blocks = nn.ModuleList([Block(width, shape["heads"]) for _ in range(shape["layers"])])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, shape["vocabulary"], bias=False)
        for each in (self.tokens, self.positions):
            nn.init.normal_(each.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of ids `[batch, tokens]`."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def nanogpt(shape: Shape, samples: Samples) -> dict[str, Any]:
    """Windows at random places of one file of tokens, AdamW, clipping."""
    torch.manual_seed(0)
    model = GPT(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, rows = shape["tokens"], samples["labels"].shape[1]
    ends, losses = [], []
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        samples["labels"].astype(np.uint16).tofile(file.name)
        for _ in range(len(samples["labels"])):
            data = np.memmap(file.name, dtype=np.uint16, mode="r")
            places = torch.randint(len(data) - tokens, (rows,)).tolist()
            windows = torch.from_numpy(np.stack([data[at : at + tokens + 1] for at in places]).astype(np.int64))
            loss = model(windows[:, :-1], windows[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            ends.append(time.time())
    return {"ends": ends, "losses": losses, "parameters": sum(each.numel() for each in model.parameters())}


def hf(shape: Shape, samples: Samples) -> dict[str, Any]:
    """Trainer with its defaults, and as many checkpoints as Telar makes."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    # transformers shifts labels itself: a row and what follows it.
    rows = np.concatenate([samples["input3"], samples["labels"][:, :, -1:]], axis=2)[:, :, : shape["tokens"]]
    count, batch, _ = rows.shape
    flat = torch.from_numpy(rows.reshape(count * batch, -1).astype(np.int64))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocabulary"],
            n_positions=shape["tokens"],
            n_embd=shape["width"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=count,
            use_cpu=True,
            report_to="none",
            save_steps=count // 3,
            disable_tqdm=True,
        )
        rows_of = [{"input_ids": row, "labels": row} for row in flat]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows_of, callbacks=[Clock()])
        loss = trainer.train().training_loss
    return {"ends": ends, "losses": [loss], "parameters": sum(each.numel() for each in model.parameters())}


WAYS: dict[str, Callable[[Shape, Samples], dict[str, Any]]] = {"loop": loop, "nanogpt": nanogpt, "hf": hf}


def main() -> int:
    """Train and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_loops", description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    shape = json.loads((options.folder / "shape.json").read_text())
    torch.set_num_threads(1)
    with np.load(options.folder / "samples.npz") as file:
        samples = dict(file)
    found = WAYS[options.way](shape, samples)
    ends, warm = found.pop("ends"), shape["warm"]
    print(json.dumps({"seconds": (ends[-1] - ends[warm - 1]) / (len(ends) - warm), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
