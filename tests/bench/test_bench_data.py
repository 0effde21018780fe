"""The benchmark's own arithmetic, on measurements that are made up; nothing is timed and no loader is started."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.bench import corpus, report
from tests.bench.figures import best_peer, ledger, ratio, spread
from tests.bench.http_store import Store
from tests.bench.peers.protocol import NotSupported, Peer, Stream, View
from tests.bench.peers.workloads import compared, lag1, pair_z, resume, take_ids, world_sizes


def test_rows_carry_their_number_and_a_changed_bit_is_seen():
    rows = corpus.make_rows(np.array([0, 5, 70_000]), 33)
    assert corpus.ids_of(rows).tolist() == [0, 5, 70_000]
    assert corpus.wrong_rows(rows) == 0
    rows[1, 20] ^= 1
    assert corpus.wrong_rows(rows) == 1
    again = corpus.Corpus("x", 3, 4, 33, first=8).shard(1)
    assert corpus.ids_of(again).tolist() == [12, 13, 14, 15]
    assert len(np.unique(again[:, 2:])) > 100


def test_ledger_counts():
    assert ledger(np.array([10, 11, 11, 11, 13, 99]), 10, 4) == {"lost": 1, "doubled": 2, "unknown": 1}
    assert ledger(np.arange(6), 0, 6) == {"lost": 0, "doubled": 0, "unknown": 0}


def test_spreads_and_ratios():
    found = spread([5.0, 1.0, 3.0])
    assert (found.middle, found.low, found.high, found.count) == (3.0, 1.0, 5.0, 3)
    # Pairs of a repeat: a machine that is slow for both does not change the ratio.
    times = ratio([10.0, 50.0, 30.0], [2.0, 10.0, 5.0])
    assert (times.middle, times.low, times.high) == (5.0, 5.0, 6.0)
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])
    assert best_peer({"telar": [9.0], "a": [1.0, 3.0, 2.0], "b": [2.5], "none": []}, ["telar"]) == "b"
    assert best_peer({"telar": [9.0]}, ["telar"]) is None


def test_quality_of_orders_known_to_be_good_and_bad():
    good, bad = np.random.default_rng(1).permutation(20_000), np.arange(20_000)
    assert abs(lag1(good)) < 0.03 and abs(pair_z(good, 20_000)) < 5
    assert lag1(bad) > 0.99 and pair_z(bad, 20_000) > 100


class Listed(Stream):
    """Batches of given samples; state is how many were handed out."""

    def __init__(self, ids, view):
        self._parts, self._done, self._view = ids, view.state or 0, view

    def __iter__(self):
        for at in range(self._done, len(self._parts), self._view.batch):
            self._done = at + self._view.batch
            own = self._parts[at : self._done][self._view.rank :: self._view.ranks]
            yield corpus.make_rows(own, 4)

    def state(self):
        return self._done


class Fake(Peer):
    name = "fake"

    def open(self, folder, view):
        return Listed(np.arange(64), view)


def test_no_batch_is_asked_for_behind_the_last_that_counts():
    stream = Listed(np.arange(64), View(8))
    assert take_ids(stream, 3).tolist() == list(range(24))
    assert stream.state() == 24
    assert take_ids(stream).tolist() == list(range(24, 64))


def test_world_sizes_see_lost_samples_and_states_that_do_not_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "corpora", lambda scale: {"light": corpus.Corpus("light", 2, 33, 4)})
    result = world_sizes(Fake(), SimpleNamespace(folder=tmp_path, scale="small"))
    assert result["8"] == {"identical": 1.0, "lost": 2, "doubled": 0, "unknown": 0}
    assert "state of 4 ranks" in result["4-3-8"]["not_supported"]


def test_identical_share_of_batches():
    found = [np.array([1, 0]), np.array([2, 2])]
    same = compared(found, [np.array([0, 1]), np.array([2, 3])], 4)
    assert same == {"identical": 0.5, "lost": 1, "doubled": 1, "unknown": 0}


def test_states_of_other_sizes_and_uneven_batches_are_refused():
    with pytest.raises(NotSupported):
        View(8, ranks=3).own  # noqa: B018
    with pytest.raises(NotSupported):
        View(8, ranks=2, states=(1,)).state  # noqa: B018
    assert resume.__name__ == "resume" and View(8, ranks=2, rank=1, states=(1, 5)).state == 5


def test_store_serves_ranges_and_fails_now_and_then(tmp_path):
    import urllib.error
    import urllib.request

    (tmp_path / "file").write_bytes(bytes(range(200)))
    with Store(tmp_path, failures=0.1) as store:
        answers = []
        for _ in range(10):
            request = urllib.request.Request(f"{store.url}/file", headers={"Range": "bytes=10-19"})
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    assert answer.read() == bytes(range(10, 20))
                    answers.append(answer.status)
            except urllib.error.HTTPError as error:
                answers.append(error.code)
        assert sorted(answers) == [206] * 9 + [503]
        assert store.failed == 1 and store.sent_bytes == 90


def test_table_has_every_loader_also_those_without_figures():
    runs = [
        {"workload": 1, "loader": "telar", "repeat": n, "variant": "", "result": figures}
        for n, figures in enumerate(
            {"tokens_per_second": 1e6 * v, "tokens_per_cpu_second": 1e6 * v, "epochs": 1} for v in (40, 60)
        )
    ]
    for number, value in enumerate((10, 10)):
        figures = {"tokens_per_second": 1e6 * value, "tokens_per_cpu_second": 1e6 * value, "epochs": 1}
        runs.append({"workload": 1, "loader": "peer", "repeat": number, "variant": "", "result": figures})
    runs.append({"workload": 1, "loader": "slow", "repeat": 0, "variant": "", "result": {"failed": "no disk"}})
    content = {
        "date": "today",
        "machine": {"cpu": "c", "cores": 2, "memory_bytes": 2**30, "kernel": "k"},
        "cores": "all",
        "scale": "small",
        "repeats": 2,
        "versions": {"telar": {"commit": "x"}},
        "not_installed": {"gone": "pip failed"},
        "runs": json.loads(json.dumps(runs)),
    }
    text = report.table(content)
    assert "| telar | 50.0 (40.0 to 60.0) |" in text
    assert "telar / peer, the best peer, per CPU-second: 5.0 times (4.0 to 6.0)." in text
    assert "| slow | failed: no disk |" in text
    assert "| gone | not installed: pip failed |" in text
