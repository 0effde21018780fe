"""Tokenizers of both kinds: lossless, reproducible, with prefixes and image codes in one vocabulary."""

import math
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from configs.errors import DataError
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, with_our_names
from data.unigram import UNSEEN, scores_of, segment
from tests.test_layout import ROOT

TEXTS = [f"the cat sat on the mat {i}. a dog and a cat\ndef add(a, b):\n    return a + b" for i in range(99)]
PREFIXES = ("translate: ", "translate to German: ")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return Tokenizer.train(TEXTS, 320, request.param, PREFIXES, image_codes=8)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_training_never_saw_come_back(tokenizer):
    text = "\u4f60\u597d \U0001f600 \x00\x7f ~`"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_holds_all_kinds_of_entries(tokenizer):
    size = tokenizer.vocabulary_size
    assert size <= 320
    assert tokenizer.image_codes == list(range(size - 8, size))
    assert sorted(tokenizer.prefixes.values()) == [size - 10, size - 9]
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == len(SPECIAL_TOKENS)
    again = Tokenizer.load(tokenizer.to_bytes())
    assert (again.digest, again.prefixes, again.image_codes) == (
        tokenizer.digest,
        tokenizer.prefixes,
        tokenizer.image_codes,
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_like_that_of_training_becomes_fewer_tokens_than_bytes(kind):
    files = [path.read_text() for path in sorted((ROOT / "data").glob("*.py"))]
    tokenizer = Tokenizer.train(files[1:], 900, kind)
    assert tokenizer.vocabulary_size == 900
    assert len(tokenizer.encode(files[0] + files[1])) < 0.5 * len(files[0] + files[1])


def test_a_prefix_is_one_token_where_it_is_asked_for_and_text_elsewhere(tokenizer):
    prefix = PREFIXES[1]
    (with_prefix,) = tokenizer.encode_batch([prefix + "the cat"], prefix)
    assert with_prefix.tolist() == [tokenizer.prefixes[prefix], *tokenizer.encode("the cat")]
    (without,) = tokenizer.encode_batch([prefix + "the cat"])
    assert tokenizer.decode(without) == prefix + "the cat"
    special = {*tokenizer.prefixes.values(), *tokenizer.image_codes}
    for text in (prefix, f"<task>{prefix}", "<image_3>", "<pad><bos><eos>"):
        assert not special & set(tokenizer.encode(text)) and min(tokenizer.encode(text)) >= len(SPECIAL_TOKENS)
    assert tokenizer.prefix_of("translate to German: x") == prefix
    assert tokenizer.prefix_of("translate: x") == PREFIXES[0] and tokenizer.prefix_of("x translate: ") is None


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"vocabulary_size: 400 .* set it to 470"):
        Tokenizer.train(TEXTS, 400, image_codes=200)


def test_scores_are_of_the_most_probable_segmentations():
    words = {"abab": 3, "ab": 2, "c": 1}
    scores = scores_of(["a", "b", "c", "ab"], words)
    # "abab" is ab ab and "ab" is ab: 8 of them, one c, and two pieces that nothing uses.
    total = 9 + 4 * UNSEEN
    assert scores["ab"] == pytest.approx(math.log(8 / total)) and scores["c"] == pytest.approx(math.log(1 / total))
    assert scores["a"] == scores["b"] == pytest.approx(math.log(UNSEEN / total))


@pytest.mark.parametrize("word", ["abcab", "a", "bcbcbc"])
def test_segmentation_is_the_best_of_all(word):
    scores = {"a": -1.0, "b": -1.5, "c": -1.2, "ab": -2.2, "bc": -2.9, "cab": -3.0, "abc": -3.9}

    def all_ways(rest):
        if not rest:
            return [[]]
        return [[p, *way] for p in scores if rest.startswith(p) for way in all_ways(rest[len(p) :])]

    ways = all_ways(word)
    best = max(sum(scores[p] for p in way) for way in ways)
    found = segment(word, scores, 3)
    assert "".join(found) == word and sum(scores[p] for p in found) == pytest.approx(best)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_does_not_depend_on_the_process(kind):
    code = (
        "from data.tokenizer import Tokenizer; from tests.test_tokenizer import TEXTS; "
        f"print(Tokenizer.train(TEXTS, 300, {kind!r}).digest)"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert found == {Tokenizer.train(TEXTS, 300, kind).digest + "\n"}


def test_ids_are_what_the_library_itself_gives(tokenizer):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
    inner.encode_special_tokens = True
    for text in TEXTS[:3]:
        assert tokenizer.encode(text) == inner.encode(text, add_special_tokens=False).ids
        assert np.array_equal(tokenizer.encode_batch([text])[0], tokenizer.encode(text))


def test_ids_that_a_foreign_vocabulary_leaves_out_count():
    def foreign(**tokens):
        inner = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **tokens}, merges=[]))
        return inner.to_str().encode()

    found = Tokenizer.load(with_our_names(foreign(a=2, b=9), "<s>", "</s>", None, "there"))
    assert (found.pad_id, found.vocabulary_size) == (4, 10)
    # The library would number padding 4, too.
    with pytest.raises(DataError, match=r"there: a token for padding has no free id; .* data\.tokenizer\.pad"):
        with_our_names(foreign(a=2, b=4), "<s>", "</s>", None, "there")
    assert Tokenizer.load(with_our_names(foreign(a=2, b=4), "<s>", "</s>", "a", "there")).vocabulary_size == 5
