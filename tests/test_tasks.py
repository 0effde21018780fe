"""Tasks, n-gram yardsticks and intervals, each against a literal reference or a case done by hand."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from configs.load import parse_config
from data.held_out import HeldOut
from jobs.intervals import mean_interval, ratio_interval, statistic_interval
from jobs.ngrams import count
from jobs.tasks.base import Row, TrainingFacts
from jobs.tasks.completion import Completion, compiles, program
from jobs.tasks.likelihood import Likelihood, likelihood_metrics
from jobs.tasks.registry import tasks_of
from jobs.tasks.summary import Summary, best_constant, derangement, most_frequent, name_words, rouge_l
from jobs.tasks.translation import Translation, bleu, statistics

BOS = 1


def config(**evaluate):
    corpus = {"name": "c", "kind": "text", "path": "x", "target": "{text}"}
    return parse_config(
        {
            "data": {"corpora": [corpus]},
            "train": {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1},
            "evaluate": evaluate,
        },
        "test",
    )


def slow_probabilities(sequences, size):
    """Witten-Bell by dictionaries and loops, after the formulas in the module's docstring."""
    unigrams, pairs, totals, followers = Counter(), Counter(), Counter(), {}
    for sequence in sequences:
        before = BOS
        for token in sequence:
            unigrams[token] += 1
            pairs[before, token] += 1
            totals[before] += 1
            followers.setdefault(before, set()).add(token)
            before = token
    seen, types = sum(unigrams.values()), len(unigrams)

    def unigram(token):
        return (unigrams[token] + types / size) / (seen + types) if seen else 1 / size

    def bigram(before, token):
        if not totals[before]:
            return unigram(token)
        kinds = len(followers[before])
        return (pairs[before, token] + kinds * unigram(token)) / (totals[before] + kinds)

    return unigram, bigram


streams = st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=6)


@settings(deadline=None, max_examples=60)
@given(streams, st.lists(st.integers(0, 6), min_size=1, max_size=10))
def test_ngrams_are_those_of_the_slow_reference(sequences, judged):
    counted = count([np.array(sequence, dtype=np.int32) for sequence in sequences], 7, BOS)
    unigram, bigram = slow_probabilities(sequences, 7)
    histories = [BOS, *judged[:-1]]
    expected = [-math.log(bigram(h, w)) for h, w in zip(histories, judged, strict=True)]
    np.testing.assert_allclose(counted.bigram_nll(np.array(judged)), expected, rtol=1e-12)
    np.testing.assert_allclose(counted.unigram_nll(np.array(judged)), [-math.log(unigram(w)) for w in judged])
    for history in range(7):
        assert sum(bigram(history, w) for w in range(7)) == pytest.approx(1)
        probabilities = [bigram(history, w) for w in range(7)]
        assert probabilities[counted.bigram_guesses()[history]] == pytest.approx(max(probabilities))
    assert counted.tokens == sum(map(len, sequences))


def test_counting_in_parts_is_counting_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 50, size=generator.integers(1, 40)) for _ in range(200)]
    whole = count(sequences, 50, BOS)
    monkeypatch.setattr("jobs.ngrams.MERGE_TOKENS", 64)
    parts = count(sequences, 50, BOS)
    for name in ("unigrams", "pairs", "pair_counts", "history_counts", "history_types"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        found = mean_interval(generator.exponential(2.0, size=80), rounds=300, seed=trial)
        covered += found.low <= 2.0 <= found.high
    assert 0.88 <= covered / 300 <= 0.99


def test_intervals_repeat_by_seed_and_are_paired():
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 50, size=60).astype(float)
    worse = generator.normal(5, 3, size=60) * tokens
    better = worse - 0.1 * tokens
    assert ratio_interval(worse, tokens, 200, 3) == ratio_interval(worse, tokens, 200, 3)
    assert ratio_interval(worse, tokens, 200, 3) != ratio_interval(worse, tokens, 200, 4)
    difference = ratio_interval(better - worse, tokens, 200, 3)
    assert difference.value == pytest.approx(-0.1)
    assert difference.high < 0, "a constant gain is certain although both figures vary widely"
    assert ratio_interval(worse, tokens, 200, 3).value == pytest.approx(worse.sum() / tokens.sum())
    with pytest.raises(ValueError, match="no records"):
        mean_interval(np.zeros(0), 100, 0)


def test_strata_keep_each_corpus_size():
    values, strata = np.array([0.0] * 30 + [1.0] * 10), np.array([0] * 30 + [1] * 10)
    fixed = ratio_interval(values, np.ones(40), 200, 0, strata)
    assert (fixed.low, fixed.value, fixed.high) == (0.25, 0.25, 0.25)
    free = ratio_interval(values, np.ones(40), 200, 0)
    assert free.low < 0.25 < free.high


def scored(labels, nll, correct, pieces=None):
    return {"labels": labels, "pieces": pieces or [len(labels)], "nll": nll, "correct": correct, "bytes": 4}


def test_likelihood_by_hand():
    facts = TrainingFacts(count([np.array([2, 3, 0])] * 4, 5, BOS))
    rows = [
        Row(0, (scored([2, 3, 0], [0.5, 0.25, 0.25], [True, True, False]),)),
        Row(1, (scored([4], [3.0], [False]),)),
    ]
    nll, bits, match = likelihood_metrics(rows, facts, config())
    assert nll.value == pytest.approx(4.0 / 4) and nll.n == 2 and nll.tokens == 4
    assert bits.value == pytest.approx(4.0 / 8 / math.log(2))
    assert match.value == pytest.approx(0.5)
    named = {base.name: base for base in nll.baselines}
    unigram, bigram = slow_probabilities([[2, 3, 0]] * 4, 5)
    assert named["unigram"].value == pytest.approx(-sum(math.log(unigram(w)) for w in (2, 3, 0, 4)) / 4)
    chain = [(1, 2), (2, 3), (3, 0), (1, 4)]
    assert named["bigram"].value == pytest.approx(-sum(math.log(bigram(h, w)) for h, w in chain) / 4)
    assert named["bigram"].difference == pytest.approx(nll.value - named["bigram"].value)
    assert {base.name: base.value for base in match.baselines} == {"unigram": 0.25, "bigram": 0.75}


def test_pictures_are_no_part_of_bits_per_byte():
    facts = TrainingFacts(count([np.array([2, 3, 0])] * 4, 5, BOS))
    text = Row(0, (scored([2, 3, 0], [0.5, 0.25, 0.25], [True, True, False]),))
    picture = Row(1, ({**scored([4], [3.0], [False]), "bytes": 0},))
    alone, beside = (likelihood_metrics(rows, facts, config()) for rows in ([text], [text, picture]))
    assert beside[1].value == alone[1].value and beside[0].value == pytest.approx(4.0 / 4)
    assert [b.value for b in beside[1].baselines] == [b.value for b in alone[1].baselines]
    assert [metric.name for metric in likelihood_metrics([picture], facts, config())] == ["nll", "next_token"]


def test_every_piece_of_a_long_target_starts_after_bos():
    facts = TrainingFacts(count([np.array([2, 3, 0])] * 4, 5, BOS))
    nll, _, match = likelihood_metrics([Row(0, (scored([2, 3, 2, 3], [1.0] * 4, [0] * 4, [2, 2]),))], facts, config())
    _, bigram = slow_probabilities([[2, 3, 0]] * 4, 5)
    chain = [(1, 2), (2, 3), (1, 2), (2, 3)]
    assert nll.baselines[1].value == pytest.approx(-sum(math.log(bigram(h, w)) for h, w in chain) / 4)
    assert match.baselines[1].value == 1.0


def records(count_):
    fields = {"name": "get_value", "signature": "def f(x):", "body": "    return x\n"}
    return [HeldOut(i, f"source {i}", f"Return value {i}.", fields) for i in range(count_)]


def test_likelihood_generates_only_where_no_other_task_shows_outputs():
    task = Likelihood()
    lone = task.examples(records(5), "likelihood", config(samples=2))
    assert [len(example.requests) for example in lone] == [2, 1, 2, 1, 1]
    assert all(len(e.requests) == 1 for e in task.examples(records(5), "summary", config(samples=2)))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.integers(0, 10**6))
def test_no_record_keeps_its_own_source(size, seed):
    order = derangement(size, seed)
    assert sorted(order) == list(range(size))
    assert all(order[i] != i for i in range(size))


def test_rouge_is_the_librarys():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [("Return the value.", "returns value"), ("Close the file.", ""), ("a b c", "a b c")]
    expected = [scorer.score(reference, output)["rougeL"].fmeasure for reference, output in pairs]
    np.testing.assert_allclose(rouge_l(*zip(*pairs, strict=True)), expected)
    assert expected[2] == 1.0 and expected[1] == 0.0


def test_constants_come_from_training_targets():
    targets = ["Return the value."] * 3 + ["Return the name."] * 2 + [f"Close file {i}." for i in range(4)]
    assert most_frequent(targets) == "Return the value."
    best = best_constant(targets, seed=0)
    mean = {text: rouge_l(targets, [text] * len(targets)).mean() for text in (best, most_frequent(targets))}
    assert mean[best] >= mean[most_frequent(targets)]
    assert best_constant(targets, seed=0) == best


def test_words_of_names():
    assert name_words("_get_HTTPCode2") == "get http code 2"
    assert name_words("__init__") == "init"
    assert name_words("readLines") == "read lines"


def test_summary_scores_a_perfect_and_an_ignorant_model():
    task, held = Summary(), records(12)
    examples = task.examples(held, "summary", config())
    facts = TrainingFacts(count([np.array([2])], 5, BOS), {"c": ["Return the value."] * 3})
    for example, other in zip(examples, derangement(12, 0), strict=True):
        assert example.requests[2].source == f"source {other}" and example.requests[2].target == example.record.target
    perfect = [
        Row(e.record.index, ({"text": e.record.target}, scored([2], [1.0], [1]), scored([2], [2.5 + i / 100], [1])))
        for i, e in enumerate(examples)
    ]
    rouge, reference = task.score(examples, perfect, facts, "c", config())
    assert rouge.value == 1.0
    assert {base.name for base in rouge.baselines} == {"function name", "best constant", "most frequent docstring"}
    assert all(base.difference_low > 0 for base in rouge.baselines)
    assert reference.baselines[0].difference_high < 0, "the encoder is used"
    ignorant = [Row(e.record.index, ({"text": ""}, scored([2], [1.0], [1]), scored([2], [1.0], [1]))) for e in examples]
    rouge, reference = task.score(examples, ignorant, facts, "c", config())
    assert rouge.value == 0.0
    assert reference.baselines[0].difference_low <= 0 <= reference.baselines[0].difference_high


@pytest.mark.parametrize(
    ("signature", "body", "expected"),
    [
        ("def f(x):", "    return x\n", True),
        ("def f(x):\n", "    return x", True),
        ("def f(x):", "\n    return x\n", True),
        ("async def f(x):  # why", "\tawait x", True),
        ("def f(x):", "return x", False),
        ("def f(x):", "    if x:\n      return 1\n     return 2", False),
        ("def f(x):", "", False),
        ("def f(x):", "    return (x\n", False),
        ("def f(x):", "    return '\\d'\n", True),
        ("def f(x):", "    x = '\0'\n", False),
        ("def f(x):", "    x = " + "(" * 5000, False),
        ("def f(x):", "    x = " + "-" * 60000 + "1", False),
        ("def f(x):", "    raise SystemExit(1)\n", True),
    ],
)
def test_compiles(signature, body, expected, recwarn):
    assert compiles(signature, body) is expected
    assert not recwarn.list


def test_completion_beside_pass_and_reference():
    task, held = Completion(), records(4)
    examples = task.examples(held, "completion", config())
    texts = ["    return x\n", "    return (\n", "    pass\n", "    x +\n"]
    rows = [Row(i, ({"text": text, "ended": i < 3},)) for i, text in enumerate(texts)]
    share, ended = task.score(examples, rows, TrainingFacts(count([], 5, BOS)), "c", config())
    assert share.value == 0.5 and ended.value == 0.75
    assert {base.name: base.value for base in share.baselines} == {"always pass": 1.0, "reference": 1.0}
    assert task.output(examples[0], rows[0]) == "    return x\n"


def test_a_body_is_joined_as_records_are_cut():
    assert program("def f():", "    pass") == "def f():\n    pass\n"


def test_every_corpus_is_judged_by_likelihood_first():
    corpora = config().data.corpora
    assert [task.name for task in tasks_of(corpora[0])] == ["likelihood"]
    python = corpora[0].model_copy(update={"kind": "python", "task": "summary"})
    assert [task.name for task in tasks_of(python)] == ["likelihood", "summary"]


def test_bleu_of_summed_statistics_is_sacrebleu_of_the_corpus():
    outputs = ["Ein Mann geht .", "zwei Hunde laufen schnell durch das hohe Gras", "", "Eine Frau: 3,5 m!"]
    references = ["Ein Mann geht.", "Zwei Hunde laufen schnell durch das Gras.", "Ein Kind lacht.", "Eine Frau: 3,5 m!"]
    for lowercase in (False, True):
        sacre = BLEU(lowercase=lowercase)
        wanted = sacre.corpus_score(outputs, [references]).score
        assert bleu(statistics(outputs, references, lowercase).sum(axis=0)) == pytest.approx(wanted, abs=1e-9)
        assert str(sacre.get_signature()).replace("case:lc", "case:mixed") in Translation.signature


def test_translations_are_scored_against_references_and_beside_copies():
    records = [HeldOut(i, f"a b c d {i}", f"w x y z {i}", {}) for i in range(5)]
    task, whole = Translation(), config(bootstrap_rounds=100)
    examples = task.examples(records, "translation", whole)
    rows = [Row(i, ({"text": record.target if i else "w x", "tokens": 5},)) for i, record in enumerate(records)]
    for metric in task.score(examples, rows, TrainingFacts(count([np.array([2, 3, 0])] * 4, 5, BOS)), "c", whole):
        copied = metric.baselines[0]
        assert copied.value < 10 < metric.low < metric.value < 100 and metric.high == pytest.approx(100)
        assert copied.difference == pytest.approx(metric.value - copied.value) and copied.difference_low > 0


def test_the_interval_of_a_statistic_is_that_of_its_records():
    values, weights = np.random.default_rng(0).random(40), np.random.default_rng(1).random(40)
    sums = np.stack([values, weights], axis=1)
    wanted = ratio_interval(values, weights, 200, seed=3)
    found = statistic_interval(sums, lambda s: s[0] / s[1], 200, seed=3)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted))
    with pytest.raises(ValueError, match="no records"):
        statistic_interval(np.empty((0, 2)), lambda s: s[0], 100, seed=0)
