"""`telar generate`: texts from a trained run, on this machine, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.schema import RunConfig
from jobs.commands.runs import RunPlace

if TYPE_CHECKING:
    from jobs.loading import Trained
    from model.generation import Choose

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Choice:
    """How the output is chosen; the most probable token each time when nothing is given."""

    beams: int | None = None
    alpha: float = 0.6
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn by their probabilities."""
        return self.temperature is not None or bool(self.top_k) or self.top_p < 1.0

    def chooser(self) -> Choose:
        """What chooses the next token, without beams."""
        from model.generation import Sampling, most_probable

        if not self.draws:
            return most_probable
        return Sampling(1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p, self.seed)

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other."""
        if self.beams is not None and self.draws:
            raise ConfigError("--beams: beam search draws nothing; leave --temperature, --top-k and --top-p out")


def generate_texts(
    place: RunPlace,
    sources: Sequence[str],
    max_new_tokens: int,
    choice: Choice,
    step: int | None = None,
    average: int = 1,
    write: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One output per source: text, number of tokens, whether it ended by itself.

    `write` receives a single output piece by piece while it grows (not for beam search). Raises ConfigError for an
    empty source where the model reads one, and for a source that is longer than the model's positions.
    """
    from data.packing import fit_source
    from jobs.loading import load_trained
    from model.beam import beam_search
    from model.generation import evaluating, generate, stream

    choice.check()
    config = place.config()
    trained = load_trained(place.storage, place.name, config, step, average)
    tokenizer, model = trained.tokenizer, trained.model
    empty = [number for number, source in enumerate(sources, 1) if not source.strip()]
    encodes = config.model.architecture != "decoder"
    if empty and encodes:
        raise ConfigError(f"TEXT {empty[0]} is empty; an encoder needs a source")
    if config.model.architecture == "encoder":
        return _labels(trained, config, sources, write)
    capacity = config.data.source_tokens if encodes else config.data.target_tokens
    ids = [tokenizer.encode_batch([source], tokenizer.prefix_of(source))[0] for source in sources]
    encoded = [fit_source(each, capacity).tolist() for each in ids]
    positions = max_new_tokens + (0 if encodes else 1 + max(map(len, encoded)))
    if config.model.positions == "learned" and positions > config.model.max_positions:
        raise ConfigError(
            f"--max-new-tokens: {positions} positions are needed, the model learned {config.model.max_positions} "
            "(model.max_positions); ask for fewer tokens"
        )
    if choice.beams is not None:
        found = beam_search(
            model, encoded, tokenizer.bos_id, tokenizer.eos_id, max_new_tokens, choice.beams, choice.alpha
        )
        outputs = [hypotheses[0].tokens for hypotheses in found]
    else:
        arguments = (model, encoded, tokenizer.bos_id, [tokenizer.eos_id], max_new_tokens, choice.chooser())
        if write is None or len(sources) > 1:
            outputs = generate(*arguments)
        else:
            growing = Growing(tokenizer.show, write)
            with evaluating(model):
                for new in stream(*arguments):
                    growing.add(new[0][1])
            growing.end()
            outputs = [growing.tokens]
    return [
        {
            "text": tokenizer.show(output),
            "tokens": len(output),
            "ended": bool(output) and output[-1] == tokenizer.eos_id,
        }
        for output in outputs
    ]


def _labels(
    trained: Trained, config: RunConfig, sources: Sequence[str], write: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """The likeliest label of each source, with its probability, from a model that classifies."""
    import numpy as np

    from jobs.answers import ModelAnswers
    from jobs.tasks.base import Choices
    from jobs.tasks.choosing import probabilities, scores

    labels = config.model.labels
    requests = [Choices(source, labels) for source in sources]
    answers = ModelAnswers(trained.model, trained.tokenizer, config).answer(config.data.corpora[0].name, requests, 1)
    outputs = []
    for answer in answers:
        shares = probabilities(scores(answer))
        chosen = int(np.argmax(shares))
        outputs.append({"text": labels[chosen], "probability": float(shares[chosen])})
        if write is not None:
            write(f"{labels[chosen]} ({shares[chosen]:.3f})")
    return outputs


def generate_picture(
    place: RunPlace, source: str, file: str, choice: Choice, step: int | None = None, average: int = 1
) -> dict[str, Any]:
    """Write the picture that the run's model makes of a caption as PNG to `file`; its codes, row by row.

    Only image codes can be chosen, as many as a picture has; a file that is there is replaced. Raises ConfigError for
    a run without pictures, a text that it cannot draw, a file that cannot be written, and beam search.
    """
    from data.packing import fit_source
    from jobs.codebook import load_codebook
    from jobs.drawing import picture_codes
    from jobs.loading import load_trained
    from jobs.pixels import write_png
    from jobs.references import references

    config = place.config()
    _check_picture(place, config, source, file, choice)
    trained = load_trained(place.storage, place.name, config, step, average)
    tokenizer = trained.tokenizer
    codebook = load_codebook(
        place.storage, references(place.storage.child(place.name))["codebook"], trained.manifest.codebook_digest
    )
    encodes = config.model.architecture == "encoder_decoder"
    tokens = codebook.shape.tokens
    capacity = config.data.source_tokens if encodes else config.data.target_tokens - tokens - 1
    ids = fit_source(tokenizer.encode_batch([source], tokenizer.prefix_of(source))[0], capacity).tolist()
    found = picture_codes(trained.model, tokenizer, codebook, [ids], choice.chooser())
    try:
        write_png(codebook.decode(found)[0], file)
    except OSError as error:
        raise ConfigError(f"--out: {file} cannot be written ({error.strerror}); choose another place") from error
    return {"file": file, "codes": found[0].tolist(), "side": codebook.shape.side, "steps": list(trained.steps)}


def _check_picture(place: RunPlace, config: RunConfig, source: str, file: str, choice: Choice) -> None:
    """Raise ConfigError for what cannot give a picture, before anything is loaded."""
    from data.templates import literal_start

    choice.check()
    if config.images is None:
        raise ConfigError(f"--out: {place.url} was trained on texts alone (it has no section images); leave --out away")
    if choice.beams is not None:
        raise ConfigError("--beams: pictures are drawn token by token; leave --beams away, or --out")
    if not source.strip():
        raise ConfigError("TEXT is empty; a picture needs a caption")
    if not file.lower().endswith(".png"):
        raise ConfigError(f"--out: {file}: pictures are written as PNG; name a file that ends in .png")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"--out: the folder of {file} does not exist; make it, or choose another place")
    starts = sorted({literal_start(c) for c in config.data.corpora if c.image_column is not None})
    if not source.startswith(tuple(starts)):
        raise ConfigError(
            f"TEXT: {place.url} draws what follows {' or '.join(map(repr, starts))}; begin TEXT with that, as its "
            "corpus does"
        )


class Growing:
    """Text that grows by tokens, handed on as soon as its characters are whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]) -> None:
        self._decode, self._write = decode, write
        self._written = 0
        self.tokens: list[int] = []

    def add(self, token: int) -> None:
        """One more token; a character whose bytes are not all there yet is held back."""
        self.tokens.append(token)
        text = self._decode(self.tokens)
        self._hand_on(text.rstrip(REPLACEMENT))

    def end(self) -> None:
        """Nothing more comes: what was held back is written as it is."""
        self._hand_on(self._decode(self.tokens))

    def _hand_on(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)
