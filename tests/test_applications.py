"""The applications that Telar brings of its own: bAbI, drawn shapes, programs that are run, chrF++, seven in one."""

import base64
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from configs.errors import ConfigError, DataError
from configs.load import load_config, parse_config
from configs.schema import CorpusSection
from data.drawn_shapes import ATTRIBUTES, Drawing, drawings, side_of
from data.files import list_files
from data.held_out import HeldOut
from data.sources import read_records
from data.templates import literal_start
from jobs.commands.paths import with_absolute_paths
from jobs.commands.task_listing import evaluate_overrides
from jobs.drawing import draw_pictures, pixels_of
from jobs.pixels import from_bytes
from jobs.tasks.base import Draw, Row, TrainingFacts
from jobs.tasks.definitions import read_definition
from jobs.tasks.from_data import DataTask
from jobs.tasks.programs import code_measures, parses, pass_at_k
from jobs.tasks.question import QuestionAnswering
from jobs.tasks.rows import read_rows_of
from jobs.tasks.sandbox import Outcome, run_program, run_programs
from jobs.tasks.text_to_image import TextToImage, attribute_measures, nearest
from jobs.tasks.translation import Translation, chrf, chrf_statistics
from model.images import ImageShape, ImageTokenizer
from model.transformer import build_model
from tests.test_tasks import config
from tests.test_tasks_answers import KNOWN

ROOT = Path(__file__).parent.parent
DATASETS = ROOT.parent / "shared" / "datasets"
STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 John took the milk.
5 Where is the milk?\thallway\t4 2
1 Sheep are afraid of mice.
2 What is a sheep afraid of?\tmouse\t1
"""


def section(path, kind, **more):
    return CorpusSection(**{"name": "c", "kind": kind, "path": str(path), "source": "{x}", "target": "{y}", **more})


def records(found):
    return [record for file in list_files(found) for record in read_records(found, file, {})]


def test_stories_become_questions_with_what_was_told_before(tmp_path):
    (tmp_path / "qa.txt").write_text(STORY)
    found = records(section(tmp_path, "babi"))
    assert [r["answer"] for r in found] == ["bathroom", "hallway", "mouse"]
    assert found[0]["story"] == "Mary moved to the bathroom. John went to the hallway."
    assert found[1]["story"] == "Mary moved to the bathroom. John went to the hallway. John took the milk."
    assert found[1]["supporting"] == "John went to the hallway.\nJohn took the milk."
    assert found[2]["story"] == "Sheep are afraid of mice." and found[2]["path"] == "qa.txt"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Mary moved.", "line 8 does not begin"),
        ("3 Where?\there", "line 8: after"),
        ("3 Where?\there\t7", "line 8: after"),
    ],
)
def test_lines_that_are_no_story_are_named(tmp_path, line, said):
    (tmp_path / "qa.txt").write_text(STORY + line + "\n")
    with pytest.raises(DataError, match=rf"data.corpora\[c\].path: .*qa.txt {said}"):
        records(section(tmp_path, "babi"))


def test_questions_of_babi_on_real_rows():
    if not DATASETS.is_dir():
        pytest.skip(f"{DATASETS} is not on this machine")
    found = records(section(DATASETS / "babi/en-10k/*_test.txt.gz", "babi"))[::20]
    assert len(found) == 150
    assert all(set(r["supporting"].split("\n")) <= {f"{s}." for s in r["story"].rstrip(".").split(". ")} for r in found)
    rows = [HeldOut(i, r["question"], r["answer"], r) for i, r in enumerate(found)]
    task, settings_ = QuestionAnswering(), config(bootstrap_rounds=300)
    examples = task.examples(rows, "qa", settings_)

    def judged(answers):
        given = [Row(i, ({"text": text},)) for i, text in enumerate(answers)]
        return {m.name: m for m in task.score(examples, given, KNOWN, "c", settings_)}["exact_match"]

    assert judged([r["answer"] for r in found]).value == 1.0
    answers = sorted({r["answer"] for r in found})
    shares = np.array([sum(r["answer"] == a for r in found) for a in answers]) / len(found)
    drawn = np.random.default_rng(0).choice(answers, size=len(found))
    random = judged(drawn.tolist())
    assert random.low <= shares.mean() <= random.high, "who draws an answer evenly is right in 1 of so many"


def test_every_drawing_has_a_caption_and_a_picture_of_its_own():
    found = drawings()
    assert len(found) == len({d.caption for d in found}) == 6 * 8 * 2 * 9 * 4
    some = found[:: len(found) // 60]
    noise = np.random.default_rng(1)
    pictures = np.stack([drawing.pixels(24) for drawing in some])
    assert nearest(pictures) == some
    shaken = np.clip(pictures + noise.normal(0, 10, pictures.shape), 0, 255).astype(np.uint8)
    assert nearest(shaken) == some, "noise of 10 of 255 does not hide what a picture shows"
    square = Drawing("square", "red", "large", "middle", "black").pixels(80)
    assert square[40, 40].tolist() == [220, 30, 30] and square[0, 0].tolist() == [0, 0, 0]
    # 0.9 of 0.2 of the side to each side of the middle.
    assert square[:, :, 0].sum() / 220 == pytest.approx((80 * 2 * 0.18) ** 2, rel=0.05)


def test_records_of_shapes_hold_pictures_where_they_are_asked_for():
    corpus = section("shapes://16", "shapes", source="{caption}", target="{image:image}")
    (file,) = list_files(corpus)
    plain = next(read_records(corpus, file, {}))
    assert plain == {**{n: plain[n] for n in ATTRIBUTES}, "caption": "a small red circle at the top left on white"}
    drawn = next(read_records(corpus, file, {}, ["image"]))
    first = drawings()[0]
    assert (from_bytes(drawn["image"], 16).permute(1, 2, 0).numpy() == first.pixels(16)).all()
    with pytest.raises(DataError, match="has no column 'picture'"):
        next(read_records(corpus, file, {}, ["picture"]))
    assert side_of("shapes://24") == 24 and side_of("shapes://24/") == 24 and side_of("shapes://8") is None
    with pytest.raises(DataError, match=r"data.corpora\[c\].path: 'shapes://x' names no drawn shapes"):
        list_files(section("shapes://x", "shapes"))


def drawn(drawing, side=24):
    return {"side": side, "pixels": base64.b64encode(drawing.pixels(side).tobytes()).decode(), "codes": [], "tokens": 9}


def test_perfect_pictures_have_all_attributes_and_random_ones_chance():
    task, settings_ = TextToImage(), config(bootstrap_rounds=300)
    generator = np.random.default_rng(5)
    wanted = [drawings()[i] for i in generator.permutation(3456)[:150]]
    rows = [HeldOut(i, d.caption, "", {n: getattr(d, n) for n in ATTRIBUTES}) for i, d in enumerate(wanted)]
    examples = task.examples(rows, "text_to_image", settings_)
    assert examples[0].requests == (Draw(wanted[0].caption),)

    def judged(pictures):
        given = [Row(i, (drawn(d),)) for i, d in enumerate(pictures)]
        return given, {m.name: m for m in task.score(examples, given, TrainingFacts(KNOWN.ngrams), "c", settings_)}

    given, found = judged(wanted)
    assert {m.value for m in found.values()} == {1.0} and task.output(examples[3], given[3]) == wanted[3].caption
    _, found = judged([drawings()[i] for i in generator.integers(0, 3456, 150)])
    assert found.pop("all_attributes").value == 0.0, "one of 3,456 by chance is less than 150 pictures show"
    for metric in found.values():
        (chance,) = metric.baselines
        assert chance.difference_low <= 0 <= chance.difference_high, metric
    assert found["colour"].baselines[0].value == pytest.approx(1 / 8)
    (every,) = judged(wanted)[1]["all_attributes"].baselines
    assert every.value == pytest.approx(1 / 3456)
    half = attribute_measures(examples[:1], [Drawing(wanted[0].shape, wanted[0].colour, "-", "-", "-")])
    assert half[0].numerators.tolist() == [0.4] and half[1].numerators.tolist() == [0.0]


class CodesAlone:
    """Stands for a tokenizer whose last eight ids are codes."""

    bos_id, image_codes = 1, range(24, 32)

    def decode_codes(self, ids):
        return [each - 24 for each in ids]


def test_pictures_are_drawn_of_codes_alone():
    tree = {"corpora": [{"name": "c", "kind": "text", "path": "x", "target": "{text}"}]}
    model = {"d_model": 16, "heads": 2, "d_ff": 32, "encoder_layers": 1, "decoder_layers": 1}
    train = {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1}
    network = build_model(parse_config({"data": tree, "model": model, "train": train}, "test").model, 32, 0)
    codebook = ImageTokenizer(ImageShape(8, 3, 2, 8, 8), 0).eval()
    first, second = draw_pictures(network, CodesAlone(), codebook, [[3, 4], [5]])
    assert len(first["codes"]) == first["tokens"] == 4 and set(first["codes"]) <= set(range(8))
    with torch.no_grad():
        again = codebook.decode(torch.tensor([second["codes"]]))[0].permute(1, 2, 0)
    assert np.abs(pixels_of(second) / 255 - again.clamp(0, 1).numpy()).max() <= 0.5 / 255 + 1e-6


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=60)
def test_pass_at_k_is_the_mean_over_all_choices_of_k(passed, data):
    k = data.draw(st.integers(1, len(passed)))
    chosen = [any(each) for each in itertools.combinations(passed, k)]
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(np.mean(chosen))


def test_pass_at_k_by_hand():
    # Of 5 attempts 2 pass; two drawn both fail in 3 of 10 cases.
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7) and pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0
    for wrong in ((5, 2, 6), (5, 6, 1), (5, 2, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


ENDS = {
    "x = 1": None,
    "assert 1 == 2": "AssertionError",
    "import sys; sys.exit(0)": "SystemExit",
    "import os; os._exit(0)": "ended before its end",
    "print('passed'); def": "SyntaxError",
    "open('a', 'w').write('x' * 3_000_000)": "OSError",
    "x = [0] * 10**9": "MemoryError",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))": "ValueError",
}


def test_programs_end_as_they_should_whatever_they_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TELAR_SECRET", "s")
    hidden = "import os\nassert 'TELAR_SECRET' not in os.environ and os.listdir('.') == []"
    found = run_programs([*ENDS, hidden, hidden])
    assert [each.error for each in found] == [*ENDS.values(), None, None]
    assert run_program("while True: pass", seconds=0.6) == Outcome("not done after 0.6 s", None)


def test_programs_have_no_network_and_leave_no_process(tmp_path):
    if run_program("x = 1").apart is not True:
        pytest.skip("this kernel gives no user namespaces; programs run with limits alone, and results say so")
    connects = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    assert run_program(connects) == Outcome("OSError", True), "refused would be ConnectionRefusedError"
    mark = tmp_path / "alive"
    lasting = (
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(0.4)\n    open({str(mark)!r}, 'w')\n"
    )
    assert run_program(lasting) == Outcome(None, True)
    # The process that a program left would write by now; another program is the time that passes.
    assert run_program("import time; time.sleep(0.7)").passed and not mark.exists()
    assert run_program("import os; os.kill(os.getppid() or 10**6, 9)").error == "ProcessLookupError"


def code_task(**more):
    tree = {
        "name": "t",
        "kind": "jsonl",
        "path": "x",
        "request": "generate",
        "source": "{p}",
        "target": "{s}",
        "metric": "pass_at_k",
        "program": "{p}{completion}\n{t}",
        **more,
    }
    data = {"corpora": [{"name": "c", "kind": "text", "path": "x", "target": "{text}"}]}
    train = {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1}
    evaluate = {"definitions": [tree], "allow_code_execution": True}
    return parse_config({"data": data, "train": train, "evaluate": evaluate}, "test").evaluate.definitions[0]


def test_code_is_judged_beside_its_canonical_solutions():
    task = code_task(attempts=3, pass_at=(1, 2))
    fields = {"p": "def f():\n", "s": "    return 1", "t": "assert f() == 1"}
    examples = DataTask(task).examples([HeldOut(i, "", fields["s"], fields) for i in range(2)], "t", config())
    assert examples[0].requests[0].number == 3 and examples[1].requests[0].seed == 1
    asked = []

    def run(programs):
        asked.extend(programs)
        return [Outcome(None if "return 1" in each else "AssertionError", True) for each in programs]

    texts = [["    return 1", "    return 2", " x"], ["    return 1"] * 2 + ["    return ("]]
    first, second, syntax = code_measures(task, examples, texts, run)
    assert asked[0] == "def f():\n    return 1\nassert f() == 1" and len(asked) == 8
    assert first.numerators.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert second.numerators.tolist() == pytest.approx([2 / 3, 1.0])
    assert first.baselines["canonical solutions"].tolist() == [1.0, 1.0] and "without network" in first.label
    assert syntax.numerators.tolist() == pytest.approx([1.0, 2 / 3])
    assert not parses("def f(:") and not parses("\0") and parses("") and not parses("(" * 10_000)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_solutions_of_real_problems_pass_and_empty_ones_do_not(name):
    if not DATASETS.is_dir():
        pytest.skip(f"{DATASETS} is not on this machine")
    definition = read_definition(name, None, str(DATASETS))
    task = DataTask(definition)
    examples = task.examples(read_rows_of(definition, 5, 0), name, config())

    def judged(texts):
        given = [Row(e.record.index, ({"text": t},)) for e, t in zip(examples, texts, strict=True)]
        return {m.name: m for m in task.score(examples, given, KNOWN, name, config(bootstrap_rounds=100))}

    found = judged([e.record.target for e in examples])
    assert found["pass_at_1"].value == found["parses"].value == 1.0
    assert judged(["    pass\n"] * 5)["pass_at_1"].value == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_all_canonical_solutions_pass(name):
    if not DATASETS.is_dir():
        pytest.skip(f"{DATASETS} is not on this machine")
    definition = read_definition(name, None, str(DATASETS))
    rows = read_rows_of(definition, 1000, 0)
    examples = DataTask(definition).examples(rows, name, config())
    found = code_measures(definition, examples, [[""]] * len(rows))
    assert found[0].baselines["canonical solutions"].mean() >= 0.99


def test_code_is_run_only_when_it_is_allowed():
    with pytest.raises(ConfigError, match=r"evaluate.allow_code_execution: t would run programs"):
        tree = {"definitions": [code_task().model_dump(mode="json")]}
        config(**tree)
    assert evaluate_overrides("humaneval", None, True)[-1] == "evaluate.allow_code_execution=true"
    for more, said in (
        ({"program": "{p}"}, "has no {completion}"),
        ({"pass_at": (2,)}, "must begin with 1"),
        ({"pass_at": (1, 2)}, "k = 2 needs as many attempts"),
        ({"metric": "exact_match"}, "program: only metric: pass_at_k"),
    ):
        with pytest.raises(ConfigError, match=said):
            code_task(**more)


WORDS = st.lists(st.sampled_from(["the", "Dog,", "barks", "a", "cat.", "x"]), max_size=6).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_chrf_is_the_library_s(pairs):
    outputs, references = [out for out, _ in pairs], [ref for _, ref in pairs]
    library = CHRF(word_order=2).corpus_score(outputs, [references]).score
    assert chrf(chrf_statistics(outputs, references).sum(0)) == pytest.approx(library)


def test_translations_that_are_right_have_all_points_and_copies_those_of_copying():
    task, settings_ = Translation(), config(bootstrap_rounds=100)
    rows = [HeldOut(i, f"a dog runs {i}", f"ein Hund läuft schnell {i}", {}) for i in range(12)]
    examples = task.examples(rows, "translation", settings_)

    def judged(texts):
        given = [Row(i, ({"text": text},)) for i, text in enumerate(texts)]
        return {m.name: m for m in task.score(examples, given, KNOWN, "c", settings_)}

    right, copied = judged([r.target for r in rows]), judged([r.source for r in rows])
    assert set(right) == {"bleu", "bleu_lc", "chrf_pp"}
    for name in right:
        assert right[name].value == pytest.approx(100) and right[name].baselines[0].difference_low > 0
        assert copied[name].baselines[0].difference == copied[name].baselines[0].difference_high == 0
    # By hand: of 1 and 1 character and word n-grams one of each order stands in both.
    assert chrf(chrf_statistics(["b"], ["b"]).sum(0)) == pytest.approx(100)
    assert "chrF++ nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no" in task.signature


@pytest.mark.parametrize("name", ["seven_tasks", "seven_tasks_gpu", "evaluate_all"])
def test_seven_tasks_are_one_mixture_with_a_prefix_each(name, tmp_path):
    found = load_config(ROOT / "configs" / f"{name}.yaml")
    tasks = [corpus.task for corpus in found.data.corpora]
    assert sorted(tasks) == sorted(
        ["text_generation", "translation", "summary", "sentiment", "qa", "completion", "text_to_image"]
    )
    starts = [literal_start(corpus) for corpus in found.data.corpora]
    for prefix in found.data.tokenizer.prefixes:
        assert sum(start.startswith(prefix) for start in starts) == 1
    assert len(found.data.tokenizer.prefixes) == 7 and found.data.tokenizer.image_codes == found.images.codes
    assert (
        found.images.tokens < found.data.target_tokens
        and f"shapes://{found.images.side}" == found.data.corpora[-1].path
    )


def test_one_field_says_where_the_data_lie(tmp_path):
    file = str(ROOT / "configs" / "evaluate_all.yaml")
    placed = with_absolute_paths(load_config(file, ["data.datasets=sets"]), file, check=False)
    paths = {corpus.name: corpus.path for corpus in placed.data.corpora}
    assert paths["reviews"] == str(ROOT / "configs/sets/mr-sentence-polarity/mr.jsonl.gz")
    assert paths["shapes"] == "shapes://24" and paths["code"] == "python://stdlib"
    assert {task.path.startswith(str(ROOT / "configs/sets")) for task in placed.evaluate.definitions} == {True}
    away = with_absolute_paths(load_config(file, ["data.datasets=s3://bucket/sets/"]), file, check=False)
    assert away.data.corpora[1].path == "s3://bucket/sets/multi30k/train.{column}.gz"
    assert away.data.corpora[4].held_out == "s3://bucket/sets/babi/en-10k/*_test.txt.gz"
    again = with_absolute_paths(placed, "/nowhere/x.yaml", check=False)
    assert [c.path for c in again.data.corpora] == list(paths.values())
