"""Tasks as data: definitions and their errors, rows through the corpora's sources, what a cell's keys depend on."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from configs.errors import ConfigError, DataError
from configs.load import load_config, load_task, parse_config, to_yaml
from configs.schema import TaskSection
from configs.task_section import METRICS, OF_ALL_ROWS
from data.held_out import HeldOut
from jobs.cli import cli
from jobs.commands.paths import with_absolute_paths
from jobs.commands.task_listing import check_tasks, evaluate_overrides
from jobs.drops import in_domain_of
from jobs.results import Cell
from jobs.tasks.base import Choices, Generate, Row, TrainingFacts
from jobs.tasks.definitions import built_in_names, read_definition, with_definitions
from jobs.tasks.from_data import DataTask
from jobs.tasks.metrics import MEASURES, right_candidates
from jobs.tasks.reshape import RESHAPES
from jobs.tasks.rows import data_version, digest_of_definition, digest_of_rows, read_rows_of, rendered
from tests.test_tasks import config
from tests.test_tasks_answers import NGRAMS

TASK = """\
name: capitals
kind: jsonl
path: rows.jsonl
request: choices
source: "The capital of {country} is"
choices: ["{capital}", "{other}"]
answer: "{capital}"
metric: accuracy
limit: 3
"""
COUNTRIES = [("France", "Paris", "Lyon"), ("Spain", "Madrid", "Sevilla"), ("Italy", "Roma", "Milano")]
COUNTRIES += [("Peru", "Lima", "Cusco"), ("Chile", "Santiago", "Arica")]


def write_task(folder, text=TASK):
    lines = [json.dumps({"country": a, "capital": b, "other": c}) for a, b, c in COUNTRIES]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "capitals.yaml").write_text(text)
    return str(folder / "capitals.yaml")


def section(**changes):
    tree = {"name": "t", "kind": "jsonl", "path": "/x", "request": "choices", "choices": ("{a}", "{b}")}
    return TaskSection(**{**tree, "metric": "accuracy", "answer": "0", **changes})


def test_a_file_of_ten_lines_is_a_task(tmp_path):
    task = read_definition(write_task(tmp_path), None, None)
    assert task.path == str(tmp_path / "rows.jsonl"), "relative to the file of the task"
    rows = read_rows_of(task, 3, seed=0)
    examples = DataTask(task).examples(rows, "capitals", config())
    assert len(examples) == 3 and [e.record.index for e in examples] == sorted(e.record.index for e in examples)
    for example in examples:
        country, capital, other = COUNTRIES[example.record.index]
        assert example.requests == (Choices(f"The capital of {country} is", (capital, other)),)


def test_rows_are_chosen_by_hash_and_a_smaller_limit_is_a_subset(tmp_path):
    task = read_definition(write_task(tmp_path), None, None)
    chosen = [{row.index for row in read_rows_of(task, limit, seed=1)} for limit in (1, 3, 9)]
    assert [len(each) for each in chosen] == [1, 3, 5] and chosen[0] < chosen[1] < chosen[2]
    assert len({tuple(row.index for row in read_rows_of(task, 2, seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_other_sources_give_the_same_rows(tmp_path, kind):
    wanted = read_rows_of(read_definition(write_task(tmp_path), None, None), 5, 0)
    fields = [{"country": a, "capital": b, "other": c} for a, b, c in COUNTRIES]
    if kind == "csv":
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            csv.writer(file).writerows([list(fields[0]), *[row.values() for row in fields]])
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(fields), tmp_path / "rows.parquet")
    else:
        with gzip.open(tmp_path / "rows.json.gz", "wt") as file:
            json.dump({"data": [{"rows": fields}]}, file)
    changed = TASK.replace("jsonl", kind, 1).replace("rows.jsonl", "rows.json.gz" if kind == "json" else f"rows.{kind}")
    (tmp_path / "other.yaml").write_text(changed + ("records: data.rows\n" if kind == "json" else ""))
    found = read_rows_of(read_definition(str(tmp_path / "other.yaml"), None, None), 5, 0)
    keep = ("country", "capital", "other")
    assert [[row.fields[k] for k in keep] for row in found] == [[row.fields[k] for k in keep] for row in wanted]
    assert [row.source for row in found] == [row.source for row in wanted]


def test_dotted_names_go_into_json():
    record = {"answers": '[{"text": "308", "at": 34}]', "a.b": "own", "plain": "x"}
    assert rendered(section(), "target", "<{answers.0.text}|{answers.0.at}|{a.b}>", record, 7) == "<308|34|own>"
    for template, words in (
        ("{answers.1.text}", "row 7: 'answers.1.text': answers has no '1'; there: 0"),
        ("{answers.0.txt}", "answers.0 has no 'txt'; there: text, at"),
        ("{plain.x}", "'plain', which is no JSON"),
        ("{missing}", "row 7 has no field 'missing'; fields there: answers, a.b, plain"),
    ):
        with pytest.raises(DataError, match="task t: target") as caught:
            rendered(section(), "target", template, record, 7)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("metric: accuracy", "metric: acuracy", "metric: 'acuracy' is unknown; one of accuracy, true_mass"),
        ("metric: accuracy", "metric: bleu", "metric: bleu judges request: generate; with request: choices use one of"),
        ("limit: 3", "lmit: 3", "lmit: unknown key; did you mean limit?"),
        ("limit: 3", "limit: 0", "limit: input should be greater than 0, not 0"),
        ("kind: jsonl", "kind: excel", "kind: input should be 'text', 'jsonl'"),
        ('answer: "{capital}"\n', "", "answer: metrics accuracy, true_mass, bbq need it"),
        ('["{capital}", "{other}"]', '["{capital}"]', "choices: one candidate is no choice"),
        ("{country} is", "{country is", "source: 'The capital of {country is' is no template"),
        ("{country} is", "{} is", "source: 'The capital of {} is' has a brace pair that is not a plain field name"),
        ("limit: 3", "columns: [a]", "columns: only kind: csv or tsv or parallel has it"),
        ("limit: 3", "gap: [a, b]", "gap: it names two groups; give group"),
        (
            "metric: accuracy",
            "normalise: byte\nmetric: true_mass",
            "normalise: scores per byte are no log-probabilities, of which metric: true_mass sums; remove it",
        ),
        ("limit: 3", "stop: [x]", "stop, max_new_tokens: only request: generate writes"),
        ("name: capitals\n", "", "name: is required; add it"),
        ("name: capitals", "name: a b", "name: 'a b' must consist of letters"),
        (TASK, "- x", "must hold a mapping with keys of name, kind, path"),
    ],
)
def test_wrong_fields_are_named_with_file_and_fix(tmp_path, old, new, words):
    path = write_task(tmp_path, TASK.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('answer: "{capital}"', 'answer: "{country}"', "task capitals: answer: row 0: 'France' is none of the 2 cand"),
        ('answer: "{capital}"', 'answer: "2"', "'2' is none of the 2 candidates ('Paris', 'Lyon'), not the number"),
        ('answer: "{capital}"', 'answer: "[0, 0]"', "no list of a 0 or 1 for each"),
        ("{country} is", "{land} is", "task capitals: source: row 0 has no field 'land'; fields there: file, country"),
        ("rows.jsonl", "none.jsonl", "evaluate.definitions[capitals].path"),
        ('["{capital}", "{other}"]', '"{country}"', "task capitals: choices: row 0: 'France' is no JSON list of texts"),
        ("limit: 3", 'group: "{capital}"\ngap: [Roma, Bern]', "rows have the groups Lima, Madrid, Paris, Roma, Sant"),
        ("limit: 3", "pair_by: x", "task capitals: pair_by: 'x' stands twice in the rows; use more fields"),
    ],
)
def test_wrong_rows_are_named(tmp_path, old, new, words):
    task = read_definition(
        write_task(
            tmp_path, TASK.replace("limit: 3\n", "limit: 5\n").replace(old.replace("limit: 3", "limit: 5"), new)
        ),
        None,
        None,
    )
    with pytest.raises(DataError) as caught:
        DataTask(task).examples(read_rows_of(task, 5, 0), "capitals", config())
    assert words in str(caught.value)


def test_answers_are_texts_numbers_or_lists():
    def right(answer, choices=("{a}", "{b}")):
        task = section(answer=answer, choices=choices)
        rows = [HeldOut(0, "", "", {"a": "x", "b": "1", "l": '["p", "q"]'})]
        examples = DataTask(task).examples(rows, "t", config())
        return right_candidates(task, examples[0]).tolist()

    assert right("0") == [1, 0]
    assert right("{a}") == [1, 0]
    assert right("1") == [0, 1], "the text of a candidate comes before its number"
    assert right("[1, 1]") == [1, 1]
    assert right("1", "{l}") == [0, 1]


def test_every_metric_that_may_be_named_is_there():
    assert set(MEASURES) == set(METRICS) - set(OF_ALL_ROWS)
    listed = TaskSection.model_fields["reshape"].annotation.__args__
    assert set(listed) == set(RESHAPES)


def test_digests_tell_definitions_and_data_apart(tmp_path):
    task = read_definition(write_task(tmp_path), None, None)
    rows = read_rows_of(task, 3, 0)
    for change in ({"source": "Capital of {country}:"}, {"normalise": "byte"}, {"name": "other"}, {"limit": 4}):
        assert digest_of_definition(task.model_copy(update=change)) != digest_of_definition(task)
    before = data_version(task)
    lines = (tmp_path / "rows.jsonl").read_text().replace("Lyon", "Marseille")
    (tmp_path / "rows.jsonl").write_text(lines)
    assert data_version(task) != before
    assert digest_of_rows(read_rows_of(task, 3, 0)) != digest_of_rows(rows)
    assert digest_of_rows(rows) == digest_of_rows(rows[:])


def run_config(folder, **evaluate):
    (folder / "text.txt").write_text("x")
    tree = {
        "data": {
            "corpora": [{"name": "c", "kind": "text", "path": "text.txt", "target": "{text}", "continuation": True}]
        },
        "train": {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1},
        "evaluate": evaluate,
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    return load_config(folder / "run.yaml")


def test_a_submitted_configuration_holds_tasks_in_full(tmp_path):
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks")
    (tmp_path / "sets" / "blimp").mkdir(parents=True)
    (tmp_path / "sets" / "blimp" / "blimp.jsonl.gz").write_bytes(b"")
    given = run_config(tmp_path, tasks=["tasks/capitals.yaml", "blimp"], datasets="sets")
    whole = with_absolute_paths(given, str(tmp_path / "run.yaml"), check=True)
    assert whole.evaluate.tasks == ()
    assert [task.name for task in whole.evaluate.definitions] == ["capitals", "blimp"]
    assert whole.evaluate.definitions[0].path == str(tmp_path / "tasks" / "rows.jsonl")
    assert whole.evaluate.definitions[1].path == str(tmp_path / "sets" / "blimp" / "blimp.jsonl.gz")
    assert parse_config(yaml.safe_load(to_yaml(whole)), "again") == whole
    again = whole.model_copy(update={"evaluate": whole.evaluate.model_copy(update={"tasks": ("blimp",)})})
    blimp = read_definition("blimp", None, str(tmp_path / "sets"))
    # The second time `datasets` is absolute: a run is resumed from another folder.
    assert with_definitions(again, "/nowhere").evaluate.definitions == (whole.evaluate.definitions[0], blimp)


def test_all_stands_for_every_built_in_task(tmp_path):
    given = run_config(tmp_path, tasks=["all"], datasets="sets")
    found = with_definitions(given, str(tmp_path)).evaluate.definitions
    running = {"humaneval", "mbpp"}
    assert [task.name for task in found] == [name for name in built_in_names() if name not in running]
    allowed = run_config(tmp_path, tasks=["all"], datasets="sets", allow_code_execution=True)
    assert [task.name for task in with_definitions(allowed, str(tmp_path)).evaluate.definitions] == built_in_names()
    assert all(task.path.startswith(str(tmp_path / "sets")) for task in found)
    # What they are compared with is there, too.
    assert parse_config(yaml.safe_load(to_yaml(with_definitions(given, str(tmp_path)))), "again").evaluate.tasks == ()


def test_files_of_built_in_tasks_may_be_anywhere():
    task = read_definition("winobias", "/nowhere", "s3://bucket/sets/")
    assert task.path == "s3://bucket/sets/winobias/{column}_stereotyped_type*.txt.test"
    with pytest.raises(ConfigError, match="no built-in task 'crow_pairs'; did you mean crows_pairs"):
        read_definition("crow_pairs", None, "/x")
    with pytest.raises(ConfigError, match=r"evaluate\.datasets: built-in task blimp reads blimp/blimp"):
        read_definition("blimp", None, None)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"definitions": [{"name": "c"}]}, "'c' is the name of a corpus too"),
        ({"definitions": [{"name": "a"}, {"name": "a"}]}, "definitions: the name 'a' stands twice"),
        ({"definitions": [{"name": "a", "compare_with": "b"}]}, "no task or corpus 'b'; there are c, a"),
    ],
)
def test_names_of_tasks_fit_the_run(tmp_path, evaluate, words):
    full = [{**json.loads(section().model_dump_json()), **entry} for entry in evaluate["definitions"]]
    with pytest.raises(ConfigError) as caught:
        run_config(tmp_path, definitions=full)
    assert words in str(caught.value)


def test_commands_list_and_validate(tmp_path):
    listed = json.loads(CliRunner().invoke(cli, ["tasks", "--json"]).output)
    assert {task["name"] for task in listed["built_in"]} == set(built_in_names()) >= {"crows_pairs", "bbq", "blimp"}
    assert "sentiment" in {task["name"] for task in listed["corpus_tasks"]}
    path = write_task(tmp_path)
    found = CliRunner().invoke(cli, ["tasks", "validate", path])
    assert found.exit_code == 0 and "task capitals: fine. 3 of 5 rows" in found.output
    assert "choice  Paris" in found.output or "choice  Madrid" in found.output or "choice  Roma" in found.output
    said = json.loads(CliRunner().invoke(cli, ["tasks", "validate", path, "--json"]).output)
    assert said["first_request"]["kind"] == "Choices" and said["rows"] == 5
    wrong = CliRunner().invoke(cli, ["tasks", "validate", write_task(tmp_path, TASK.replace("limit", "lmit"))])
    assert isinstance(wrong.exception, ConfigError) and "did you mean limit" in str(wrong.exception)


def test_what_is_wrong_with_rows_is_said_before_a_run(tmp_path):
    path = write_task(tmp_path, TASK.replace("{country} is", "{land} is"))
    given = with_definitions(run_config(tmp_path, tasks=[path]), str(tmp_path))
    with pytest.raises(DataError, match="task capitals: source: row 0 has no field 'land'"):
        check_tasks(given, 1 << 20)
    check_tasks(given, 10)
    done = CliRunner().invoke(
        cli, ["submit", str(tmp_path / "run.yaml"), "--embedded", "--storage", str(tmp_path / "r")]
    )
    assert isinstance(done.exception, DataError) and "no field 'land'" in str(done.exception)
    assert not (tmp_path / "r").exists()


def test_options_of_evaluate_name_files_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = json.dumps([str(Path("t.yaml").absolute()), "blimp"])
    assert evaluate_overrides("t.yaml, blimp", "sets") == [f"evaluate.tasks={path}", 'evaluate.datasets="sets"']
    assert evaluate_overrides(None, None) == []


def test_generate_asks_for_texts_up_to_a_stop():
    changes = {"request": "generate", "choices": (), "answer": "", "source": "Q: {a}", "target": "{b}", "stop": ("\n",)}
    task = DataTask(section(**changes, metric="exact_match", max_new_tokens=5))
    rows = [HeldOut(0, "Q: x", "y", {})]
    examples = task.examples(rows, "t", config())
    assert examples[0].requests == (Generate("Q: x"),) and task.max_new_tokens(config()) == 5
    row = Row(0, ({"text": "y\nQ: more"},))
    (found,) = task.score(examples, [row], TrainingFacts(NGRAMS), "t", config(bootstrap_rounds=100))
    assert found.value == 1.0 and task.output(examples[0], row) == "y"


def test_evaluate_takes_its_options(tmp_path):
    asked = ["evaluate", "nothing", "--tasks", "all", "--datasets", "sets", "--storage", str(tmp_path)]
    done = CliRunner().invoke(cli, asked)
    assert isinstance(done.exception, ConfigError) and "nothing" in str(done.exception)


def test_a_drop_compares_matches_of_the_same_kind():
    def cell_of(name, metric, compare_with=None):
        fields = {"request": "generate", "choices": (), "answer": "", "target": "{capital}", "source": "{country}"}
        task = section(name=name, metric=metric, compare_with=compare_with, **fields)
        return Cell(name, DataTask(task), [], [])

    normalised, verbatim = cell_of("normalised", "squad"), cell_of("verbatim", "exact_match")
    assert in_domain_of(cell_of("out", "squad", "normalised"), [normalised, verbatim]) is normalised
    assert in_domain_of(cell_of("out", "exact_match", "normalised"), [normalised, verbatim]) is None
    assert in_domain_of(cell_of("out", "exact_match", "verbatim"), [normalised, verbatim]) is verbatim
