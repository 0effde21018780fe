"""Byte-level byte-pair tokenizer: `decode(encode(text)) == text` for every text, special tokens never come from text.

A newline with the indentation after it is one piece, runs of two or more blanks are another, digits stand alone,
letters take one blank before them; merges never cross pieces. Byte-pair encoding as in Sennrich et al. 2016, over
bytes as in Radford et al. 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
import xxhash
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import Manifest

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PIECES = r"[\r\n]+[ \t]*|[ \t]{2,}| ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s"


class Tokenizer:
    """Text to token ids and back. `vocabulary_size` counts special tokens; `digest` is xxh3-128 of `to_bytes()`."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # Text that spells "<eos>" must become ordinary tokens, not the id that ends a target.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.pad_id, self.bos_id, self.eos_id = (inner.token_to_id(token) for token in SPECIAL_TOKENS)
        self.vocabulary_size = inner.get_vocab_size(with_added_tokens=True)
        self.digest = xxhash.xxh3_128_hexdigest(self.to_bytes())

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
        """Learn merges on `texts`; the result depends on the texts alone. Few texts give a smaller vocabulary."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, content: bytes, origin: str = "tokenizer.json") -> Tokenizer:
        """The tokenizer stored by `to_bytes`, or any `tokenizer.json` that has the three special tokens.

        Raises DataError, naming `origin`, when the file is no tokenizer or lacks a special token.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(content.decode())
        # The library raises plain Exception for every malformed file.
        except Exception as error:
            raise DataError(f"{origin}: no tokenizer.json of the tokenizers library ({error})") from error
        lacking = [token for token in SPECIAL_TOKENS if inner.token_to_id(token) is None]
        if lacking:
            raise DataError(
                f"{origin}: the vocabulary lacks {', '.join(lacking)}; add {', '.join(SPECIAL_TOKENS)} as special "
                "tokens, or leave data.tokenizer.path out to have one trained"
            )
        return cls(inner)

    def to_bytes(self) -> bytes:
        """Content of `tokenizer.json`."""
        return self._inner.to_str().encode()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 `[tokens]`, without special tokens."""
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=True)


def read_tokenizer(storage: Storage, manifest: Manifest) -> Tokenizer:
    """The tokenizer of prepared data; raises DataError when it is missing or not the one of the manifest."""
    path = f"{storage.url}/{manifest.tokenizer_path}"
    try:
        tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path), path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; run the prepare stage again") from error
    if tokenizer.digest != manifest.tokenizer_digest:
        raise DataError(f"{path} is not the tokenizer of its manifest; remove the folder and prepare the data again")
    return tokenizer
