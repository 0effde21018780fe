"""The report: its numbers come from the run's files, it is self-contained, and it escapes what models write."""

import json
import re
from html.parser import HTMLParser

import pytest

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError
from jobs.report import write_report
from jobs.report_data import course, smoothed
from jobs.report_plots import Mark, Series, line_chart, short, thinned, ticks
from jobs.report_tables import evaluation_table, size, span


def record(step, attempt=1, **changes):
    return {
        "step": step,
        "tokens": step * 1000,
        "loss": 8.0 - step / 100,
        "nll": 7.5 - step / 100,
        "learning_rate": step * 1e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 2000.0,
        "data_wait_seconds": 0.01,
        "step_seconds": 0.5,
        "world_size": 2,
        "attempt": attempt,
        "unix_seconds": 1.7e9 + step,
        "memory_bytes": 2**29,
        **changes,
    }


def baseline(name, value, difference):
    return {
        "name": name,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "difference": difference,
        "difference_low": difference - 0.05,
        "difference_high": difference + 0.05,
    }


def results():
    metric = {
        "name": "nll",
        "label": "negative log-likelihood",
        "value": 4.321,
        "low": 4.2,
        "high": 4.4,
        "n": 64,
        "unit": "nats/token",
        "higher_is_better": False,
        "tokens": 12345,
        "baselines": [baseline("unigram", 6.123, -1.802), baseline("bigram", 4.34, -0.019)],
    }
    cell = {
        "corpus": "prose",
        "task": "likelihood",
        "signature": "s",
        "records": 64,
        "failed_records": 0,
        "status": "ok",
        "detail": None,
        "metrics": [metric],
    }
    sample = {
        "corpus": "prose",
        "task": "likelihood",
        "record": "7",
        "source": "if a < b & c > d: <i>",
        "reference": "</pre></main><b>bold</b>",
        "output": "<script>alert('x')</script>",
    }
    explanation = {
        "corpus": "reasons",
        "record": "9",
        "choice": "<yes>",
        "pieces": ["a <b>", " c"],
        "written": ["<bos>"],
        "attribution": [0.5, -0.25],
        "rollout": [0.75, 0.25],
        "maps": {"encoder, rollout": [[0.6, 0.4], [0.0, 1.0]], "decoder to encoder, rollout": [[0.3, 0.2]]},
    }
    return {
        "digest": "d",
        "step": 40,
        "checkpoint_digest": "feedbeef",
        "training_tokens_counted": 40_000,
        "cells": [cell],
        "failed": [],
        "samples": [sample],
        "explanations": [explanation],
        "records": 64,
        "seconds": 12.0,
        "evaluators": 2,
        "settings": {"decoding": "greedy"},
        "versions": {"rouge-score": "0.1.2"},
        "hardware": {"processor": "A <processor>", "logical_cores": 2, "memory_bytes": 2**33, "gpus": []},
        "finished_unix": 1.7e9 + 50,
    }


@pytest.fixture
def run(tmp_path):
    storage = Storage(str(tmp_path))
    folder = storage.child("demo")
    folder.write_text("config.yaml", "run:\n  name: <demo>\n")
    folder.write_text(
        "status.json",
        json.dumps({"state": "reporting", "steps": 40, "started_unix": 1.7e9, "updated_unix": 1.7e9 + 60}),
    )
    folder.write_text("metrics.jsonl", "".join(json.dumps(record(step)) + "\n" for step in range(1, 41)))
    folder.write_text("events.jsonl", json.dumps({"unix_seconds": 1.7e9, "event": "committed", "bytes": 2**20}) + "\n")
    folder.write_text("manifest.json", json.dumps({"digest": "cafe0123", "vocabulary_size": 2048}))
    folder.write_text("evaluation/results.json", json.dumps(results()))
    checkpoints = folder.child("checkpoints")
    checkpoints.write_bytes(f"{commit.attempt_folder(40, 1)}/rank-00000.safetensors", b"12345678")
    file = commit.RankFile(0, "rank-00000.safetensors", 8, "0")
    commit.commit(checkpoints, 40, 1, [file], 1, {"tokens": 40_000, "parameters": 3_141_592, "versions": {}})
    return storage


def html(storage):
    write_report(storage, "demo")
    return storage.read_text("demo/report.html")


class Balanced(HTMLParser):
    """Checks that tags are closed in order and collects attributes and text."""

    EMPTY = ("meta", "br", "line", "circle", "path")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], set(), [], []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(run):
    page = html(run)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "link", "img", "iframe", "i-dont-exist"} & parser.seen
    assert not [value for name, value in parser.attributes if name in ("src", "href", "xlink:href", "action")]
    assert re.search(r"https?://|url\(|@import", page) is None


def test_what_models_and_configurations_hold_is_escaped(run):
    page = html(run)
    parser = Balanced()
    parser.feed(page)
    text = "".join(parser.text)
    for raw in ("<script>alert('x')</script>", "</pre></main><b>bold</b>", "if a < b & c > d: <i>", "<demo>"):
        assert raw in text
        assert raw not in page


@pytest.mark.parametrize(
    ("path", "old", "new", "before", "after"),
    [
        ("evaluation/results.json", "4.321", "4.987", "4.321", "4.987"),
        ("evaluation/results.json", "6.123", "6.555", "6.123", "6.555"),
        ("evaluation/results.json", "12345", "54321", "12,345", "54,321"),
        ("evaluation/results.json", '"n": 64', '"n": 77', ">64<", ">77<"),
        ("metrics.jsonl", '"loss": 7.6,', '"loss": 2.718,', "7.600", "2.718"),
        ("metrics.jsonl", '"tokens": 40000,', '"tokens": 41234,', "40,000", "41,234"),
        ("events.jsonl", "1048576", "3145728", "1 MiB", "3 MiB"),
        ("manifest.json", "cafe0123", "deadbee5", "cafe0123", "deadbee5"),
        ("config.yaml", "demo", "other-name", "&lt;demo&gt;", "&lt;other-name&gt;"),
        ("status.json", '"steps": 40', '"steps": 99', "of 40", "of 99"),
    ],
)
def test_numbers_come_from_the_files(run, path, old, new, before, after):
    assert before in html(run) and after not in html(run)
    folder = run.child("demo")
    text = folder.read_text(path)
    assert old in text
    folder.write_text(path, text.replace(old, new))
    assert after in html(run)


def test_facts_of_the_checkpoint_are_shown(run):
    page = html(run)
    assert "3,141,592" in page and "3.142M" in page


def test_a_difference_is_coloured_only_beyond_its_interval(run):
    page = html(run)
    assert '<td class="r good">\u22121.802</td>' in page
    assert '<td class="r ">\u22120.019</td>' in page


@pytest.mark.parametrize(
    ("state", "steps", "evaluated", "shown"),
    [
        ("reporting", 40, True, "finished"),
        ("reporting", 99, True, "incomplete"),
        ("reporting", 40, False, "trained, not evaluated"),
        ("failed", 40, True, "failed"),
        ("stopped", 40, True, "stopped"),
        ("training", 40, False, "training"),
    ],
)
def test_state(run, state, steps, evaluated, shown):
    folder = run.child("demo")
    folder.write_text("status.json", json.dumps({"state": state, "steps": steps, "message": "why & <how>"}))
    if not evaluated:
        folder.remove("evaluation")
    page = html(run)
    assert re.search(rf'<span class="badge \w+">{shown}</span>', page)
    assert "why &amp; &lt;how&gt;" in page
    assert ("has not been evaluated" in page) is not evaluated


def test_failed_cells_are_listed(run):
    found = results()
    found["cells"][0].update(status="failed", detail="7 of 64 records failed", metrics=[])
    found.update(failed=["likelihood of prose: 7 of 64 records failed"], finished_unix=2e9)
    run.child("demo").write_text("evaluation/incomplete.json", json.dumps(found))
    page = html(run)
    assert "evaluation incomplete" in page and "likelihood: failed. 7 of 64 records failed" in page
    assert "4.321" not in page


def test_explanations_are_drawn(run):
    page = html(run)
    card = page[page.index("What choices rest on") :]
    assert "&lt;yes&gt;" in card and "a &lt;b&gt;" in card
    assert 'title="attribution -0.2500, rollout 0.2500"' in card
    figures = re.findall(r"<figure><figcaption>(.*?) \(full colour (.*?)\)</figcaption>(.*?)</figure>", card)
    assert [(title, strongest) for title, strongest, _ in figures] == [
        ("encoder, rollout", "1.00"),
        ("decoder to encoder, rollout", "0.30"),
    ]
    assert re.findall(r'opacity="(.*?)"', figures[0][2]) == ["0.60", "0.40", "1.00"], "what is 0 is not drawn"
    assert re.findall(r"<title>(.*?)</title>", figures[1][2]) == ["0.300", "0.200"]
    assert "&lt;bos&gt;" in figures[1][2]


def test_a_run_that_has_only_a_configuration(tmp_path):
    storage = Storage(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        write_report(storage, "demo")
    storage.write_text("demo/config.yaml", "train: {}\n")
    assert "No step has been recorded" in html(storage)


def test_an_unfinished_last_line_is_left_out(run):
    folder = run.child("demo")
    folder.write_text("metrics.jsonl", folder.read_text("metrics.jsonl") + '{"step": 41, "to')
    assert "<b>40<small>" in html(run)
    folder.write_text("metrics.jsonl", "{broken\n" + json.dumps(record(1)) + "\n")
    with pytest.raises(json.JSONDecodeError):
        html(run)


def test_the_last_attempt_counts():
    first = [record(step, 1, loss=5.0) for step in range(1, 9)]
    second = [record(step, 2, loss=4.0) for step in range(5, 7)]
    third = [record(step, 3, loss=3.0) for step in range(6, 8)]
    kept, restarts = course([*first, *second, *third])
    assert [entry["step"] for entry in kept] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["loss"] for entry in kept] == [5.0] * 4 + [4.0] + [3.0] * 2
    assert [(entry["step"], entry["attempt"]) for entry in restarts] == [(5, 2), (6, 3)]


def test_restarts_are_marked(run):
    folder = run.child("demo")
    again = "".join(json.dumps(record(step, 2)) + "\n" for step in range(20, 41))
    assert "attempt 2 starts" not in html(run)
    folder.write_text("metrics.jsonl", folder.read_text("metrics.jsonl") + again)
    page = html(run)
    assert page.count("attempt 2 starts at step 20") == 8, "one mark in every chart"
    assert "1 restart" in page


def test_smoothing_starts_at_the_first_value_and_forgets_by_half_lives():
    assert smoothed([3.0], 5.0) == [3.0]
    assert smoothed([2.0] * 9, 4.0) == pytest.approx([2.0] * 9)
    late = smoothed([0.0] * 1000 + [1.0] * 10, 10.0)
    assert late[-1] == pytest.approx(0.5, abs=1e-6)


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.0, 2.1, 5, whole=True) == [0, 1, 2]
    for low, high in ((-3.3, 7.1), (1e-5, 9e-4), (0, 3.2e9), (4.71, 4.72)):
        found = ticks(low, high, 5)
        assert 3 <= len(found) <= 7
        assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) for tick in found)


def test_long_curves_are_thinned_without_changing_the_mean():
    xs, ys = list(range(5000)), [float(x % 7) for x in range(5000)]
    few_x, few_y = thinned(xs, ys)
    assert len(few_x) <= 600 and len(few_x) == len(few_y)
    assert sum(few_y) / len(few_y) == pytest.approx(sum(ys) / len(ys), rel=0.01)
    assert thinned([1, 2], [float("nan"), 3.0]) == ([2], [3.0])


def test_a_chart_draws_its_points_where_they_belong():
    chart = line_chart("T<", [Series("a", [0, 10], [0.0, 1.0])], "x", "y", [Mark(5, "m")], from_zero=True)
    path = re.search(r'<path class="line main" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    x0, y0, x1, y1 = map(float, path.groups())
    mark = float(re.search(r'<g class="mark">.*?x1="([\d.]+)"', chart)[1])
    assert mark == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert y1 < y0, "larger values stand higher"
    assert "T&lt;" in chart
    assert line_chart("none", [Series("a", [1], [float("nan")])], "x", "y") == ""


def test_short_texts():
    assert [short(v) for v in (0, 0.0021, 4.5, 120, 4100, 1.2e6)] == ["0", "0.0021", "4.5", "120", "4.1k", "1.2M"]
    assert [size(v) for v in (12, 2**19, 1.25 * 2**30)] == ["12 B", "512 KiB", "1.25 GiB"]
    assert [span(v) for v in (0.25, 12, 187, 3720)] == ["0.25s", "12s", "3m07s", "1h02m"]


def test_a_bias_is_no_better_on_either_side():
    cell = {**results()["cells"][0], "corpus": "pairs", "status": "ok"}
    metric = {**cell["metrics"][0], "higher_is_better": None, "label": "first preferred"}
    for difference in (-0.2, 0.2):
        page = evaluation_table([{**cell, "metrics": [{**metric, "baselines": [baseline("even", 0.5, difference)]}]}])
        assert 'class="r bad"' in page and 'class="r good"' not in page
        assert "neither side is better" in page and "&uarr;" not in page and "&darr;" not in page
