"""The codebook of a run with pictures: trained before the data are prepared, kept in storage, shared by runs.

STORAGE/data/codebooks/DIGEST holds the weights, named by their content, and codebook.json, created last; the digest is
of the section `images`, the seed and the files that hold the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import xxhash
from safetensors.torch import load, save

from cluster.storage import Storage
from configs.errors import DataError
from configs.schema import RunConfig
from data.inputs import codebook_digest, list_inputs
from data.pictures import LowestKeys, pictures
from data.runners import Runner
from jobs.pixels import from_bytes
from model.images import ImageShape, ImageTokenizer, codebook_use
from model.seeds import generator

FACTS = "codebook.json"
# Of training and of held-out pictures, at most.
MEASURED_PICTURES = 1000
AT_ONCE = 64


@dataclass(frozen=True)
class CodebookEncoder:
    """What preparation is given to make codes of a picture; each process reads the codebook once.

    `folder` is relative to the storage root, `digest` is that of the weights.
    """

    storage_url: str
    folder: str
    digest: str

    def __call__(self, picture: bytes) -> list[int] | None:
        """Codes row by row, or None for bytes that are no picture; raises DataError without the codebook."""
        model = _loaded(self.storage_url, self.folder, self.digest)
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

    Nothing is reported where it was there. Raises DataError when no picture can be read.
    """
    if config.images is None:
        return None
    images, folder = config.images, f"data/codebooks/{codebook_digest(config, list_inputs(config))}"
    if not storage.exists(f"{folder}/{FACTS}"):
        report(
            f"training {folder}: {images.codes} codes, {images.tokens} of them for {images.side} x {images.side} "
            f"pixels, {images.steps} steps"
        )
        run_tasks(train_codebook, [(CodebookTask(config, storage.url, folder),)])
        for line in described(codebook_facts(storage, folder)):
            report(line)
    return CodebookEncoder(storage.url, folder, codebook_facts(storage, folder)["digest"])


def described(facts: dict[str, Any]) -> list[str]:
    """What people read about a codebook that was trained."""
    codes = facts["shape"]["codes"]
    lines = [
        f"codebook on {each['pictures']:,} {name} pictures: {each['error_share']:.3f} of the variance is lost, "
        f"{each['codes_used']} of {codes} codes are used (perplexity {each['perplexity']:.0f})"
        for name, each in facts["figures"].items()
    ]
    if facts["undecodable"]:
        lines.append(f"codebook: {facts['undecodable']} pictures cannot be decoded and were left out")
    return lines


def train_codebook(task: CodebookTask) -> None:
    """Train the autoencoder on pictures that are not held out, measure it, and write it.

    In one thread, so that the result does not depend on the cores there are. A codebook that another task has written
    meanwhile stays.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, facts = _trained(task)
    finally:
        torch.set_num_threads(threads)
    storage, weights = Storage(task.storage_url).child(task.folder), save(model.state_dict())
    facts["digest"] = xxhash.xxh3_128_hexdigest(weights)
    storage.write_bytes(_weights(facts["digest"]), weights)
    if not storage.create(FACTS, json.dumps(facts, indent=1).encode()):
        kept = json.loads(storage.read_text(FACTS))["digest"]
        if kept != facts["digest"]:
            storage.remove(_weights(facts["digest"]))


def _trained(task: CodebookTask) -> tuple[ImageTokenizer, dict[str, Any]]:
    section, seed = task.config.images, task.config.run.seed
    assert section is not None
    shape = ImageShape(section.side, 3, section.halvings, section.codes, section.width)
    kept, held_out, undecodable = _pixels(task.config, Storage(task.storage_url), section.side, section.most_pictures)
    model = ImageTokenizer(shape, seed).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=section.learning_rate)
    random = generator(seed, "codebook batches")
    for _ in range(section.steps):
        chosen = torch.randint(0, len(kept), (section.batch,), generator=random)
        optimizer.zero_grad()
        model.loss(kept[chosen].float() / 255).backward()
        optimizer.step()
    model.eval()
    parts = {"training": kept[:MEASURED_PICTURES], "held-out": held_out}
    return model, {
        "shape": asdict(shape),
        "pictures": len(kept),
        "undecodable": undecodable,
        "steps": section.steps,
        "figures": {name: _figures(model, part) for name, part in parts.items() if len(part)},
    }


def _figures(model: ImageTokenizer, judged: torch.Tensor) -> dict[str, Any]:
    """How well pictures, uint8 `[n, 3, side, side]`, come back from their codes, and how many codes they use."""
    codes, error = [], 0.0
    for part in judged.split(AT_ONCE):
        wanted = part.float() / 255
        codes.append(model.encode(wanted))
        error += float((model.decode(codes[-1]) - wanted).square().sum())
    use = codebook_use(torch.cat(codes), model.shape.codes)
    variance = float((judged.float() / 255).var(unbiased=False))
    return {
        "pictures": len(judged),
        "error_share": error / judged.numel() / max(variance, 1e-12),
        "codes_used": use.used,
        "perplexity": use.perplexity,
    }


def codebook_facts(storage: Storage, folder: str) -> dict[str, Any]:
    """Content of codebook.json; raises DataError when it is not there."""
    try:
        return json.loads(storage.read_text(f"{folder}/{FACTS}"))
    except FileNotFoundError as error:
        raise DataError(f"{storage.url}/{folder} holds no codebook; run the codebook stage again") from error


def load_codebook(storage: Storage, folder: str, digest: str | None = None) -> ImageTokenizer:
    """A trained codebook in evaluation mode; raises DataError when it is missing, damaged or not that of `digest`."""
    facts = codebook_facts(storage, folder)
    url = f"{storage.url}/{folder}"
    if digest is not None and facts["digest"] != digest:
        raise DataError(
            f"{url} holds codebook {facts['digest']}, the pictures of the data are codes of {digest}; put that one "
            "back, or remove the prepared data and train again"
        )
    try:
        weights = storage.read_bytes(f"{folder}/{_weights(facts['digest'])}")
    except FileNotFoundError as error:
        raise DataError(f"{url}: the weights are missing; remove the folder and run the codebook stage") from error
    if xxhash.xxh3_128_hexdigest(weights) != facts["digest"]:
        raise DataError(f"{url}: the weights do not match their digest; remove the folder and run the codebook stage")
    model = ImageTokenizer(ImageShape(**facts["shape"]))
    model.load_state_dict(load(weights))
    return model.eval()


def _weights(digest: str) -> str:
    return f"{digest}.safetensors"


@lru_cache(maxsize=2)
def _loaded(storage_url: str, folder: str, digest: str) -> ImageTokenizer:
    return load_codebook(Storage(storage_url), folder, digest)


def _pixels(config: RunConfig, storage: Storage, side: int, most: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Different pictures to train on and held-out ones, uint8 `[n, 3, side, side]`, and how many are none.

    Those of the lowest hashes are taken, however they lie in files. What is held out anywhere is not trained on.
    """
    kept: LowestKeys[torch.Tensor] = LowestKeys(most)
    judged: LowestKeys[torch.Tensor] = LowestKeys(MEASURED_PICTURES)
    held_out: set[int] = set()
    undecodable = 0
    for picture, is_held_out in pictures(config, storage):
        key = xxhash.xxh3_64_intdigest(picture)
        if is_held_out:
            held_out.add(key)
        some = judged if is_held_out else kept
        if not some.wants(key):
            continue
        pixels = from_bytes(picture, side)
        if pixels is None:
            undecodable += 1
        else:
            some.add(key, pixels)
    training = [pixels for key, pixels in kept.items() if key not in held_out]
    if not training:
        columns = sorted({corpus.image_column for corpus in config.data.corpora if corpus.image_column is not None})
        raise DataError(
            f"images: the columns {columns} hold no picture that can be read and is not held out; correct the target "
            "template, or lower data.held_out_fraction"
        )
    nothing = torch.empty(0, 3, side, side, dtype=torch.uint8)
    measured = [pixels for _, pixels in judged.items()]
    return torch.stack(training), torch.stack(measured) if measured else nothing, undecodable
