"""Byte-level tokenizers: `decode(encode(text)) == text` for every text, special tokens never come from text.

A newline with the indentation after it is one piece, runs of two or more blanks are another, digits stand alone,
letters take one blank before them; tokens never cross pieces. Byte-pair encoding as in Sennrich et al. 2016, over
bytes as in Radford et al. 2019; unigram models as in Kudo 2018, over bytes too. Task prefixes are one token each, and
image codes are the last entries of the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import tokenizers
import xxhash
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import Manifest
from data.unigram import scores_of

# How prefixes are spelled as special tokens, and image codes.
PREFIX = "<task>"
IMAGE = re.compile(r"<image_(\d+)>")
# 256 bytes, the special tokens and something to learn.
LEAST_LEARNED = 270
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PIECES = r"[\r\n]+[ \t]*|[ \t]{2,}| ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s"


def counted(codes: int) -> str:
    """What people read in place of so many image codes."""
    return f"<image: {codes} codes>"


class Tokenizer:
    """Text to token ids and back. `vocabulary_size` counts special tokens; `digest` is xxh3-128 of `to_bytes()`."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # Text that spells "<eos>" must become ordinary tokens, not the id that ends a target.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.pad_id, self.bos_id, self.eos_id = (inner.token_to_id(token) for token in SPECIAL_TOKENS)
        # Not a count: foreign tokenizers may leave ids out.
        self.vocabulary_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
        added = inner.get_added_tokens_decoder().items()
        self.prefixes = {
            token.content.removeprefix(PREFIX): number for number, token in added if token.content.startswith(PREFIX)
        }
        codes = {int(match[1]): number for number, token in added if (match := IMAGE.fullmatch(token.content))}
        self.image_codes = [codes[code] for code in sorted(codes)]
        self.digest = xxhash.xxh3_128_hexdigest(self.to_bytes())

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocabulary_size: int,
        kind: str = "bpe",
        prefixes: Sequence[str] = (),
        image_codes: int = 0,
    ) -> Tokenizer:
        """Learn a model of `kind` (bpe or unigram) on `texts`; the result depends on the arguments alone.

        `vocabulary_size` counts special tokens, `prefixes` and `image_codes`; few texts give a smaller vocabulary.
        Raises DataError when there is no room for the bytes.
        """
        learned = vocabulary_size - len(prefixes) - image_codes
        if learned < LEAST_LEARNED:
            raise DataError(
                f"data.tokenizer.vocabulary_size: {vocabulary_size} entries leave {learned} beside {len(prefixes)} "
                f"prefixes and {image_codes} image codes; set it to {vocabulary_size - learned + LEAST_LEARNED} or more"
            )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        shared = {
            "vocab_size": learned,
            "special_tokens": list(SPECIAL_TOKENS),
            "initial_alphabet": alphabet,
            "show_progress": False,
        }
        if kind == "bpe":
            inner, trainer = tokenizers.Tokenizer(models.BPE()), trainers.BpeTrainer(**shared)
        else:
            inner, trainer = tokenizers.Tokenizer(models.Unigram()), trainers.UnigramTrainer(**shared)
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        texts = list(texts)
        inner.train_from_iterator(texts, trainer)
        if kind == "unigram":
            inner = _scored_anew(inner, alphabet, texts)
        inner.add_special_tokens([AddedToken(PREFIX + prefix, normalized=False) for prefix in prefixes])
        inner.add_special_tokens([AddedToken(f"<image_{i}>", normalized=False) for i in range(image_codes)])
        return cls(inner)

    @classmethod
    def load(cls, content: bytes, origin: str = "tokenizer.json") -> Tokenizer:
        """The tokenizer stored by `to_bytes`, or any `tokenizer.json` that has the three special tokens.

        Raises DataError, naming `origin`, when the file is no tokenizer or lacks a special token.
        """
        inner = _parsed(content, origin)
        lacking = [token for token in SPECIAL_TOKENS if inner.token_to_id(token) is None]
        if lacking:
            raise DataError(
                f"{origin}: the vocabulary lacks {', '.join(lacking)}; say in data.tokenizer.bos, eos and pad what "
                "they are called there, or leave data.tokenizer.path out to have one trained"
            )
        return cls(inner)

    def to_bytes(self) -> bytes:
        """Content of `tokenizer.json`."""
        return self._inner.to_str().encode()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], prefix: str | None = None) -> list[np.ndarray]:
        """Ids of each text, int32 `[tokens]`, without special tokens but for `prefix`, one of `prefixes`.

        All texts must begin with a prefix that is given, and it becomes one token.
        """
        if prefix is None:
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]
        assert all(text.startswith(prefix) for text in texts)
        first = np.array([self.prefixes[prefix]], dtype=np.int32)
        return [np.concatenate([first, ids]) for ids in self.encode_batch([text[len(prefix) :] for text in texts])]

    def encode_codes(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of image codes written as text, `12 7 200 ...`; int32 `[tokens]` each."""
        ids = np.array(self.image_codes, dtype=np.int32)
        return [ids[np.array(text.split(), dtype=np.int64)] for text in texts]

    def show(self, ids: Sequence[int]) -> str:
        """What people read: text as `decode` gives it, and `<image: 64 codes>` for a run of image codes."""
        codes = frozenset(self.image_codes)
        runs = ((is_image, [*run]) for is_image, run in groupby(map(int, ids), key=codes.__contains__))
        return "".join(counted(len(run)) if is_image else self.decode(run) for is_image, run in runs)

    def decode_codes(self, ids: Sequence[int]) -> list[int]:
        """Image codes of ids; those that are none are left out."""
        numbers = {token: code for code, token in enumerate(self.image_codes)}
        return [numbers[int(token)] for token in ids if int(token) in numbers]

    def prefix_of(self, text: str) -> str | None:
        """The longest of `prefixes` that `text` begins with."""
        return max((prefix for prefix in self.prefixes if text.startswith(prefix)), key=len, default=None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=True)


def with_our_names(content: bytes, bos: str, eos: str, pad: str | None, origin: str) -> bytes:
    """A tokenizer.json whose special tokens of these names are `SPECIAL_TOKENS`, with the ids that they had.

    Without `pad` a token is added for it behind the vocabulary. Raises DataError, naming `origin`, when there is no
    such token or no room for one more.
    """
    inner = _parsed(content, origin)
    names = {bos: "<bos>", eos: "<eos>"} | ({} if pad is None else {pad: "<pad>"})
    lacking = [name for name in names if inner.token_to_id(name) is None]
    if lacking or len(names) < 2 + (pad is not None):
        raise DataError(
            f"{origin}: the vocabulary has no {', '.join(lacking) or 'three tokens of these names'}; correct "
            "data.tokenizer.bos, eos and pad"
        )
    tree = json.loads(content)
    vocabulary = tree["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tree["model"]["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        tree["model"]["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in vocabulary]
    added = {token["content"]: token for token in tree["added_tokens"]}
    for old, new in names.items():
        # What is no added token yet could come from text.
        token = added.setdefault(
            old, {"id": inner.token_to_id(old), "single_word": False, "lstrip": False, "rstrip": False}
        )
        token |= {"content": new, "special": True, "normalized": False}
    tree["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    # It would put the old names around texts; here sequences get their special tokens when rows are made.
    tree["post_processor"] = None
    renamed = tokenizers.Tokenizer.from_str(json.dumps(tree))
    if pad is None:
        renamed.add_special_tokens([AddedToken("<pad>", normalized=False)])
        ids = renamed.get_vocab(with_added_tokens=True)
        if sum(number == ids["<pad>"] for number in ids.values()) > 1:
            # The library counts tokens to number a new one, and this vocabulary leaves ids out.
            raise DataError(
                f"{origin}: a token for padding has no free id; name one of its tokens in data.tokenizer.pad"
            )
    return renamed.to_str().encode()


def _parsed(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    # The library raises plain Exception for every malformed file.
    except Exception as error:
        raise DataError(f"{origin}: no tokenizer.json of the tokenizers library ({error})") from error


def _scored_anew(inner: tokenizers.Tokenizer, alphabet: Sequence[str], texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A trained unigram model with scores that any process would give, all bytes, and its entries in a fixed order."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text))
    tree = json.loads(inner.to_str())
    pieces = {piece for piece, _ in tree["model"]["vocab"]} - {*SPECIAL_TOKENS}
    scores = scores_of(pieces | {*alphabet}, words)
    ordered = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
    tree["model"]["vocab"] = [*([token, 0.0] for token in SPECIAL_TOKENS), *map(list, ordered)]
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


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
