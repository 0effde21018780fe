"""What is shown of a run: the view of its files, one screen of it, plain lines, and files read piece by piece."""

import io
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cluster.storage import Storage
from jobs.commands import following
from jobs.commands.runs import RunPlace
from jobs.commands.screen import screen, sparkline
from jobs.run_reader import GrowingLines, RunReader
from jobs.run_view import event_text, progress_line, view

NOW = 1_000_000.0


def record(step, attempt=1, loss=None, seconds=0.5, wait=0.05, world=2):
    return {
        "step": step,
        "tokens": step * 100,
        "loss": 5.0 - step / 100 if loss is None else loss,
        "step_seconds": seconds,
        "data_wait_seconds": wait,
        "tokens_per_second": 200.0,
        "world_size": world,
        "attempt": attempt,
    }


def status(**fields):
    return {
        "run": "r",
        "state": "training",
        "stage": "train",
        "step": 60,
        "steps": 100,
        "tokens": 6000,
        "loss": 4.4,
        "tokens_per_second": 200.0,
        "world_size": 3,
        "attempt": 2,
        "last_commit_step": 50,
        "last_commit_unix_seconds": NOW - 12,
        "message": None,
        "updated_unix": NOW - 1,
        "started_unix": NOW - 90,
        "dashboard_url": "http://127.0.0.1:8265",
        **fields,
    }


def event(name, at, **fields):
    return {"unix_seconds": NOW - at, "event": name, **fields}


EVENTS = [
    event("attempt_started", 80, attempt=1, world_size=4, from_step=0, reason="first attempt"),
    event("committed", 60, step=50, attempt=1, bytes=3 * 2**20),
    event("attempt_failed", 40, attempt=1, detail="lost node abc with ranks 2, 3\ntraceback"),
    event("attempt_started", 35, attempt=2, world_size=3, from_step=50, reason="lost node abc"),
    event("decision", 34, decision="start"),
    event("recovered", 30, attempt=2, recovered_seconds=9.2, detected_seconds=2.1),
]
# Steps 51 to 55 of attempt 1 were thrown away.
RECORDS = [record(step, world=4) for step in range(1, 56)] + [record(step, 2, world=3) for step in range(51, 61)]


def drawn(shown, width=100, height=30):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, color_system=None)
    console.print(screen(shown, width, height))
    return console.file.getvalue().splitlines()


def test_a_screen_shows_what_one_wants_to_know_of_a_run():
    shown = view("night-run", status(slowest_rank={"rank": 3, "data_wait_seconds": 0.125}), RECORDS, EVENTS, NOW)
    text = "\n".join(drawn(shown))
    for words in (
        "night-run  training",
        "step 60/100  60%  eta 20s  after 1m30s",
        "loss 4.400",
        "4.40 to 4.99",
        "tokens/s",
        "10.0%",
        "slowest rank   rank 3 (data 25%)",
        "attempts     2 (1 failed)",
        "last commit    step 50, 12s ago",
        "attempt failed  attempt 1  lost node abc with ranks 2, 3",
        "committed  step 50  attempt 1  3.0 MiB",
        "recovered  attempt 2  recovered 9s  detected 2s",
        "http://127.0.0.1:8265",
    ):
        assert words in text, f"{words!r} is missing in\n{text}"
    assert "traceback" not in text and "decision" not in text


def test_abandoned_steps_are_not_in_the_curve_and_attempts_say_how_they_ended():
    shown = view("r", status(), RECORDS, EVENTS, NOW)
    assert [r["step"] for r in shown.records] == list(range(1, 61))
    assert [r["attempt"] for r in shown.records[-11:]] == [1] + [2] * 10
    first, second = shown.attempts
    assert (first.world_size, first.from_step, first.ended) == (4, 0, "lost node abc with ranks 2, 3")
    assert (second.world_size, second.from_step, second.ended) == (3, 50, None)
    over = view("r", status(state="finished"), RECORDS, EVENTS, NOW)
    assert over.attempts[-1].ended == "finished" and over.is_over and over.eta_seconds is None


def test_a_run_that_says_nothing_and_one_that_ran_out_of_its_lease():
    nothing = view("r", None, [], [], NOW)
    assert nothing.state == "submitted" and progress_line(nothing) == "r  submitted" and drawn(nothing)
    silent = view("r", status(updated_unix=NOW - 75), RECORDS, EVENTS, NOW)
    assert silent.state == "silent" and "silent for 1m15s" in progress_line(silent)
    assert "silent for 1m15s" in drawn(silent)[0]
    assert view("r", status(updated_unix=NOW - 75, state="stopped"), [], [], NOW).running_seconds == 15


def test_markup_in_what_others_wrote_is_text():
    shown = view("r", status(message="[red]no[/red]"), RECORDS, [event("problem", 1, detail="[link=x]y[/link]")], NOW)
    text = "\n".join(drawn(shown))
    assert "[red]no[/red]" in text and "[link=x]y[/link]" in text


words = st.text(max_size=200)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(60, 200),
    st.integers(16, 60),
    st.lists(st.floats(-100, 100), max_size=50),
    st.lists(words, max_size=40),
    st.none() | words,
)
def test_a_screen_is_never_wider_or_higher_than_the_terminal(width, height, losses, details, message):
    records = [record(step + 1, loss=loss) for step, loss in enumerate(losses)]
    events = [event("problem", 1, detail=detail) for detail in details]
    found = drawn(view("r", status(message=message), records, events, NOW), width, height)
    assert len(found) <= height and all(len(line) <= width for line in found)


def test_sparkline_shows_a_falling_series_falling():
    assert sparkline([4.0, 3.0, 2.0, 1.0], 4) == "█▅▃▁"
    assert len(sparkline(list(range(1000)), 30)) == 30 and sparkline([], 10) == ""


def test_an_event_without_words_is_its_name():
    assert event_text({"unix_seconds": 1, "event": "run_finished", "detail": None}) == "run finished"


def test_growing_lines_come_once_and_whole(tmp_path):
    lines, path = GrowingLines(Storage(str(tmp_path)), "m.jsonl"), tmp_path / "m.jsonl"
    assert lines.fresh() == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert lines.fresh() == [{"a": 1}] and lines.fresh() == []
    with path.open("a") as file:
        file.write('}\n{"a": 3}\n')
    assert lines.fresh() == [{"a": 2}, {"a": 3}]


def test_of_a_long_file_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.run_reader.FIRST_BYTES", 100)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"a": n}) + "\n" for n in range(1000)))
    found = [line["a"] for line in GrowingLines(Storage(str(tmp_path)), "m.jsonl").fresh()]
    assert 5 < len(found) < 12 and found == list(range(1000 - len(found), 1000))


def test_few_records_are_kept_of_many_and_the_newest_are(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.run_reader.RECORDS_KEPT", 64)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/metrics.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(1, 1001)))
    steps = [kept["step"] for kept in RunReader(Storage(str(tmp_path)), "r").look(NOW).records]
    assert len(steps) <= 64 and steps[0] == 1 and steps[-20:] == list(range(981, 1001)) and steps == sorted(steps)


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), ("stopped", 3)])
def test_plain_watching_prints_the_end_and_returns_its_code(tmp_path, monkeypatch, state, code):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EVENTS))
    (folder / "status.json").write_text(json.dumps(status(updated_unix=time.time())))
    monkeypatch.setattr(following, "_keep_record", lambda *_: None)
    said = []

    def end(_):
        (folder / "status.json").write_text(json.dumps(status(state=state, message="because")))

    monkeypatch.setattr(time, "sleep", end)
    assert following.watch(RunPlace(Storage(str(tmp_path)), "r"), None, False, said.append) == code
    assert said[0] == "r  attempt failed  attempt 1  lost node abc with ranks 2, 3"
    assert "step 60/100 (60%)  loss 4.400  tok/s 200  data 10%  attempt 2 world 3" in said[1]
    assert said[-1].startswith(f"r  {state}") and said[-1].endswith("because") and len(said) == 3
