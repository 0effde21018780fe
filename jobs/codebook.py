"""The codebook of a run with pictures: trained before the data are prepared, kept in storage, shared by runs.

STORAGE/data/codebooks/DIGEST holds codebook.safetensors and, written last, codebook.json; the digest is of the section
`images`, the seed and the files that hold the pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load, save

from cluster.storage import Storage
from configs.errors import DataError
from configs.schema import RunConfig
from data.inputs import group_of, list_inputs
from data.pictures import pictures
from data.runners import Runner
from jobs.pixels import from_bytes
from model.images import ImageShape, ImageTokenizer, codebook_use
from model.seeds import generator

FACTS, WEIGHTS = "codebook.json", "codebook.safetensors"
HELD_OUT_PICTURES = 1000
AT_ONCE = 64


@dataclass(frozen=True)
class CodebookEncoder:
    """What preparation is given to make codes of a picture; each process reads the codebook once."""

    storage_url: str
    folder: str

    def __call__(self, picture: bytes) -> list[int] | None:
        """Codes row by row, or None for bytes that are no picture."""
        model = _loaded(self.storage_url, self.folder)
        pixels = from_bytes(picture, model.shape.side)
        return None if pixels is None else model.encode(pixels.unsqueeze(0).float() / 255)[0].tolist()


@dataclass(frozen=True)
class CodebookTask:
    """Whose pictures are trained on, and where the codebook is put."""

    config: RunConfig
    storage_url: str
    folder: str


def ensure_codebook(
    config: RunConfig, storage: Storage, run_tasks: Runner, report: Callable[[str], None]
) -> CodebookEncoder | None:
    """The codebook of `config`, trained in a task when storage has none; None for a run without pictures.

    Raises DataError when no picture can be read.
    """
    if config.images is None:
        return None
    folder = f"data/codebooks/{codebook_digest(config)}"
    if not storage.exists(f"{folder}/{FACTS}"):
        (facts,) = run_tasks(train_codebook, [(CodebookTask(config, storage.url, folder),)])
        report(
            f"codebook: {facts['pictures']:,} pictures, {facts['steps']} steps; on {facts['held_out']:,} held-out ones "
            f"{facts['error_share']:.3f} of the variance is lost, {facts['codes_used']} of {config.images.codes} codes "
            f"are used (perplexity {facts['perplexity']:.0f})"
        )
    return CodebookEncoder(storage.url, folder)


def codebook_digest(config: RunConfig) -> str:
    """Of all that a codebook follows from; raises DataError when files of pictures cannot be found."""
    assert config.images is not None
    inputs = list_inputs(config)
    files = [
        (corpus.image_column, corpus.held_out_key, file.relative, file.bytes, file.version, file.held_out)
        for corpus in config.data.corpora
        if corpus.image_column is not None
        for file in inputs[group_of(corpus)]
    ]
    content = [config.images.model_dump(mode="json"), config.run.seed, config.data.held_out_fraction, files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def train_codebook(task: CodebookTask) -> dict[str, Any]:
    """Train the autoencoder, write it, and say how well it does on held-out pictures (on the trained ones if none)."""
    torch.set_num_threads(1)
    storage, section, seed = Storage(task.storage_url), task.config.images, task.config.run.seed
    assert section is not None
    shape = ImageShape(section.side, 3, section.halvings, section.codes, section.width)
    kept, held_out = _pixels(task.config, storage, section.side, section.most_pictures)
    model = ImageTokenizer(shape, seed).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=section.learning_rate)
    random = generator(seed, "codebook batches")
    for _ in range(section.steps):
        chosen = torch.randint(0, len(kept), (section.batch,), generator=random)
        optimizer.zero_grad()
        model.loss(kept[chosen].float() / 255).backward()
        optimizer.step()
    model.eval()
    judged = held_out if len(held_out) else kept[:HELD_OUT_PICTURES]
    codes, error = [], 0.0
    for part in judged.split(AT_ONCE):
        wanted = part.float() / 255
        codes.append(model.encode(wanted))
        error += float((model.decode(codes[-1]) - wanted).square().sum())
    use = codebook_use(torch.cat(codes), section.codes)
    facts = {
        "shape": asdict(shape),
        "pictures": len(kept),
        "held_out": len(held_out),
        "steps": section.steps,
        "error_share": error / float((judged.float() / 255).var() * judged.numel()),
        "codes_used": use.used,
        "perplexity": use.perplexity,
    }
    storage.write_bytes(f"{task.folder}/{WEIGHTS}", save(model.state_dict()))
    storage.write_text(f"{task.folder}/{FACTS}", json.dumps(facts, indent=1))
    return facts


def load_codebook(storage: Storage, folder: str) -> ImageTokenizer:
    """A trained codebook in evaluation mode; raises DataError when it is not there."""
    try:
        facts = json.loads(storage.read_text(f"{folder}/{FACTS}"))
        weights = load(storage.read_bytes(f"{folder}/{WEIGHTS}"))
    except FileNotFoundError as error:
        raise DataError(f"{storage.url}/{folder} holds no codebook; run the prepare stage again") from error
    model = ImageTokenizer(ImageShape(**facts["shape"]))
    model.load_state_dict(weights)
    return model.eval()


@lru_cache(maxsize=2)
def _loaded(storage_url: str, folder: str) -> ImageTokenizer:
    return load_codebook(Storage(storage_url), folder)


def _pixels(config: RunConfig, storage: Storage, side: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures to train on and held-out ones, uint8 `[n, 3, side, side]`."""
    kept: list[torch.Tensor] = []
    held_out: list[torch.Tensor] = []
    for picture, is_held_out in pictures(config, storage):
        some, limit = (held_out, HELD_OUT_PICTURES) if is_held_out else (kept, most)
        pixels = from_bytes(picture, side) if len(some) < limit else None
        if pixels is not None:
            some.append(pixels)
    if not kept:
        columns = sorted({corpus.image_column for corpus in config.data.corpora if corpus.image_column is not None})
        raise DataError(
            f"images: the columns {columns} hold no picture that can be read and is not held out; correct the target "
            "template, or lower data.held_out_fraction"
        )
    nothing = torch.empty(0, 3, side, side, dtype=torch.uint8)
    return torch.stack(kept), torch.stack(held_out) if held_out else nothing
