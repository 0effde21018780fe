"""A trained model out of a run's folder: verified checkpoint, tokenizer and configuration; the average of several."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cluster import commit
from cluster.commit import Committed
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.schema import RunConfig
from data.manifest import Manifest, folder_of
from data.tokenizer import Tokenizer, read_tokenizer
from model.checkpoint import CheckpointReader, load_parameters
from model.packed import PackedWeight
from model.quantize import install, read_packed
from model.transformer import Transformer, build_model


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode with what it was trained with; `steps` are the checkpoints it was made of."""

    model: Transformer
    tokenizer: Tokenizer
    manifest: Manifest
    config: RunConfig
    steps: tuple[int, ...]


def choose_checkpoints(storage: Storage, run: str, step: int | None = None, average: int = 1) -> list[Committed]:
    """The checkpoint of `step` (default: the latest) with the `average` - 1 committed before it, ascending.

    Raises ConfigError when there are not so many, CheckpointError when one is damaged.
    """
    checkpoints = storage.child(run, "checkpoints")
    steps = commit.committed_steps(checkpoints)
    if step is not None and step not in steps:
        raise ConfigError(f"step {step}: {storage.url}/{run} has no such commit; it has {steps or 'none'}")
    steps = [each for each in steps if step is None or each <= step][-average:]
    if not steps:
        raise ConfigError(f"{storage.url}/{run} has no committed checkpoint yet; wait for one, or train longer")
    if len(steps) < average:
        raise ConfigError(
            f"{average} checkpoints are to be averaged, {storage.url}/{run} has {len(steps)} up to there; raise "
            "checkpoint.keep when training, or average fewer"
        )
    return [commit.read_commit(checkpoints, each) for each in steps]


def load_trained(storage: Storage, run: str, config: RunConfig, step: int | None = None, average: int = 1) -> Trained:
    """The checkpoint of `step` (default: the latest), or the mean of it and the `average` - 1 committed before it.

    Averaging is section 6.1 of Vaswani et al. 2017. Raises ConfigError when there are no such checkpoints, and
    CheckpointError or DataError for what is damaged or does not belong together.
    """
    checkpoints, committed = storage.child(run, "checkpoints"), choose_checkpoints(storage, run, step, average)
    manifest = Manifest.read(storage, folder_of(committed[-1].manifest["data_digest"]))
    tokenizer = read_tokenizer(storage, manifest)
    trained_with = committed[-1].manifest["tokenizer_digest"]
    if tokenizer.digest != trained_with:
        raise ConfigError(
            f"{storage.url}/{run}: step {committed[-1].step} was trained with tokenizer {trained_with}, "
            f"{manifest.folder} holds {tokenizer.digest}; prepare the data of that run again"
        )
    mean: dict[str, Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    for each in committed:
        with CheckpointReader(checkpoints, each) as reader:
            # A compressed run has one checkpoint, so there is no mean of packed matrices.
            packed = read_packed(reader)
            for name, tensor in load_parameters(reader).items():
                share = tensor / len(committed)
                mean[name] = mean[name] + share if name in mean else share
    model = build_model(config.model, manifest.vocabulary_size, config.run.seed)
    install(model, packed)
    model.load(mean)
    return Trained(model.eval(), tokenizer, manifest, config, tuple(each.step for each in committed))
