"""`telar compare`: paired differences against a bootstrap written out, and what is refused."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import to_yaml
from data.held_out import HeldOut
from jobs import evaluate as stage
from jobs.cli import cli
from jobs.compare import compare, lines, read_side
from tests.test_evaluate import MANIFEST, RUN, STEP, FakeModel, commit_step, held_out, make_config, run
from tests.test_tasks_run import commit_random_model, evaluated

ROUNDS = 2000
BYTES = 9


class Uneven(FakeModel):
    """Rows differ much in difficulty, and a little in how a model that is `shift` worse does on them."""

    def one(self, request):
        answer = super().one(request)
        if "nll" in answer:
            row = int(request.source.split()[-1])
            answer["nll"] = [5.0 * row + self.shift * (1 + math.sin(row))] * 3
        return answer


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "read_records", held_out)
    storage = Storage(str(tmp_path))
    commit_step(storage, STEP, b"weights")
    commit_step(storage, STEP + 1, b"other weights")
    return storage


def side(storage, step, config=None, manifest=MANIFEST):
    return read_side(config or make_config(), storage, RUN, manifest, step)


def found(cells, corpus, task):
    return next(cell for cell in cells if (cell["corpus"], cell["task"]) == (corpus, task))


def test_the_difference_is_that_of_a_bootstrap_written_out(storage):
    run(storage, Uneven())
    run(storage, Uneven(shift=0.5), step=STEP + 1)
    cells = compare(side(storage, STEP), side(storage, STEP + 1), ["prose"], ROUNDS, 7)
    assert len(cells) == 1
    got = found(cells, "prose", "likelihood")
    # Bits of each of the ten rows of nine bytes.
    bits = [[3 * (5.0 * i + shift * (1 + math.sin(i))) / math.log(2) for i in range(10)] for shift in (0.0, 0.5)]
    assert got["first"] == pytest.approx(sum(bits[0]) / (10 * BYTES))
    assert got["second"] == pytest.approx(sum(bits[1]) / (10 * BYTES))
    gains = np.subtract(bits[1], bits[0]) / BYTES
    generator = np.random.default_rng(1)
    draws = [generator.choice(gains, 10).mean() for _ in range(20_000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert got["difference"] == pytest.approx(gains.mean())
    assert (got["low"], got["high"]) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert (got["n"], got["left_out"], got["differs"], got["better"]) == (10, 0, True, "first")
    back = found(compare(side(storage, STEP + 1), side(storage, STEP), ["prose"], ROUNDS, 7), "prose", "likelihood")
    assert back["difference"] == pytest.approx(-got["difference"]) and back["better"] == "second"
    same = found(compare(side(storage, STEP), side(storage, STEP), ["prose"], ROUNDS, 7), "prose", "likelihood")
    assert (same["difference"], same["low"], same["high"], same["better"]) == (0.0, 0.0, 0.0, None)


def test_cells_without_a_figure_say_why(storage):
    run(storage, FakeModel())
    cells = compare(side(storage, STEP), side(storage, STEP + 1), [], ROUNDS, 0)
    assert {cell["status"] for cell in cells} == {"missing"}
    assert "slices of demo, step 21, not answered" in cells[0]["detail"]
    run(storage, FakeModel(), step=STEP + 1)
    cells = compare(side(storage, STEP), side(storage, STEP + 1), [], ROUNDS, 0)
    assert found(cells, "summary", "summary")["status"] == "no headline"
    text = lines("a", "b", cells)
    assert text[:2] == ["A  a", "B  b"] and len(text) == 3 + len(cells)
    assert any("bits_per_byte" in line and "no difference shown" in line for line in text)


def test_rows_that_one_side_failed_are_left_out_of_both(storage, monkeypatch):
    many = [HeldOut(i, f"row {i}", f"row {i}", {}) for i in range(40)]

    def longer(*arguments):
        return many if arguments[2] == "prose" else held_out(*arguments)

    monkeypatch.setattr(stage, "read_records", longer)
    config = make_config(slice_records=32, likelihood_records=40)
    run(storage, FakeModel(poison="row 39"), config)
    run(storage, FakeModel(poison="row 38"), config, step=STEP + 1)
    got = found(
        compare(side(storage, STEP, config), side(storage, STEP + 1, config), ["prose"], ROUNDS, 0),
        "prose",
        "likelihood",
    )
    assert (got["status"], got["n"], got["left_out"]) == ("ok", 38, 2)


def test_other_data_and_other_rows_are_refused_by_name(storage, monkeypatch):
    run(storage, FakeModel())
    other = SimpleNamespace(**{**vars(MANIFEST), "digest": "data1"})
    with pytest.raises(ConfigError, match=r"likelihood of prose: data data0 of demo, step 20, data1 of demo, step 21"):
        compare(side(storage, STEP), side(storage, STEP + 1, manifest=other), [], ROUNDS, 0)
    ours = side(storage, STEP)
    monkeypatch.setattr(stage, "read_records", lambda *arguments: held_out(*arguments)[1:])
    with pytest.raises(ConfigError, match=r"summary of summary: 10 and 9 rows, 9 of them the same"):
        compare(ours, side(storage, STEP), [], ROUNDS, 0)
    with pytest.raises(ConfigError, match=r"--only: nothing is called verse; there are prose, summary, completion"):
        compare(ours, ours, ["verse"], ROUNDS, 0)


def test_the_command_compares_a_run_with_itself(tmp_path):
    made = commit_random_model(tmp_path, "pairs", {})
    made.storage.write_text(f"{RUN}/config.yaml", to_yaml(made.config))
    arguments = ["compare", RUN, RUN, "--storage", made.storage.url, "--only", "qa"]
    nothing = CliRunner().invoke(cli, arguments)
    assert "no figure in common" in str(nothing.exception) and "not answered" in str(nothing.exception)
    evaluated(made)
    answer = CliRunner().invoke(cli, [*arguments, "--json"])
    assert answer.exception is None, answer.output
    cells = json.loads(answer.output)["cells"]
    assert {cell["corpus"] for cell in cells} == {"qa"}
    got = found(cells, "qa", "likelihood")
    assert got["status"] == "ok" and got["first"] == got["second"] and got["low"] == got["high"] == 0
    text = CliRunner().invoke(cli, arguments).output
    assert "B - A [95%, paired]" in text and "no difference shown" in text
