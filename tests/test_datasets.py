"""Every text and image-caption set of the datasets folder loads whole through a source with a few lines of YAML."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
import yaml

from configs.schema import CorpusSection
from data.extract import check_known_fields
from data.files import list_files
from data.sources import read_records
from data.templates import PairTemplate

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "datasets"
MOST_LINES = 10
# No text at all: images and labels.
NOT_TEXT = {"mnist-t10k"}
# About the data, not of it.
NOT_DATA = {"SOURCE.md", "LICENSE.txt", "LICENSE.noto-emoji.txt", "_about.txt"}

CORPORA = """
- {name: babi, kind: text, path: babi/en*/*_train.txt.gz, held_out: babi/en*/*_test.txt.gz, target: "{text}",
   continuation: true}
- {name: bbq-en, kind: jsonl, path: bbq-en, source: "{context} {question}", target: "{ans1}"}
- {name: blimp, kind: jsonl, path: blimp, source: "mend: {sentence_bad}", target: "{sentence_good}"}
- {name: bold, kind: json, path: bold, records: "*.*", source: "{key}", target: "{text}"}
- {name: classic-books-en, kind: parquet, path: classic-books-en, target: "{text}", continuation: true}
- {name: crows-pairs, kind: csv, path: crows-pairs, source: "{bias_type}: {sent_more}", target: "{sent_less}"}
- {name: dialogsum-dev, kind: jsonl, path: dialogsum-eval/dev*, source: "{dialogue}", target: "{summary}"}
- {name: dialogsum-test, kind: jsonl, path: dialogsum-eval/test*, source: "{dialogue}", target: "{summary1}"}
- {name: esbbq, kind: csv, path: esbbq, source: "{context} {question}", target: "{answer_info.ans0}"}
- {name: halueval-qa, kind: jsonl, path: halueval/qa*.gz, source: "{knowledge} {question}", target: "{right_answer}"}
- {name: halueval-general, kind: jsonl, path: halueval/general*, source: "{user_query}", target: "{chatgpt_response}"}
- {name: humaneval, kind: jsonl, path: humaneval, source: "{prompt}", target: "{canonical_solution}"}
- {name: imdb-paired, kind: tsv, path: imdb-counterfactual/paired*, held_out: imdb-counterfactual/paired_test*,
   source: "{Text}", target: "{Sentiment}"}
- {name: imdb-original, kind: tsv, path: imdb-counterfactual/orig*, source: "{Text}", target: "{Sentiment}"}
- {name: mbpp, kind: jsonl, path: mbpp, source: "{text}", target: "{code}"}
- {name: mr-sentence-polarity, kind: jsonl, path: mr-sentence-polarity, source: "{text}", target: "{label}"}
- name: multi30k
  kind: parallel
  path: "multi30k/*.{column}.gz"
  held_out: "multi30k/test_2016_flickr.{column}.gz"
  columns: [en, de, fr, cs]
  source: "translate English to German: {en}"
  target: "{de}"
- {name: noto-emoji-en, kind: parquet, path: noto-emoji-captions, source: "{emoji}", target: "{caption_en}"}
- {name: noto-emoji-es, kind: parquet, path: noto-emoji-captions, held_out_key: codepoints,
   source: "translate English to Spanish: {caption_en}", target: "{caption_es}"}
- {name: quijote-es, kind: text, path: quijote-es/*.gz, target: "{text}", continuation: true}
- {name: scitldr, kind: jsonl, path: scitldr, held_out: scitldr/test*, records: target, source: "{source}",
   target: "{text}"}
- {name: tatoeba-en-es, kind: tsv, path: tatoeba-en-es/spa.tsv.gz, columns: [en, es], quotes: false,
   held_out_key: en, source: "{en}", target: "{es}"}
- {name: tinyshakespeare, kind: text, path: tinyshakespeare/*.txt, target: "{text}", continuation: true}
- {name: truthfulqa-multi, kind: json, path: truthfulqa-multi, held_out_key: question, source: "{question}",
   target: "{best_answer}"}
- {name: uci-sentiment-3domains, kind: tsv, path: uci-sentiment-3domains/*.txt, columns: [sentence, label],
   quotes: false, source: "{sentence}", target: "{label}"}
- {name: wikitext2-eval, kind: text, path: wikitext2-eval/*.gz, target: "{text}", continuation: true}
- {name: winobias, kind: tsv, path: winobias/*.dev, held_out: winobias/*.test, columns: [sentence], quotes: false,
   target: "{sentence}", continuation: true}
- {name: winobias-occupations, kind: tsv, path: winobias/*_occupations.txt, columns: [occupation],
   source: "an occupation:", target: "{occupation}"}
- {name: xquad, kind: json, path: xquad, records: data.paragraphs.qas.answers, source: "{question} {context}",
   target: "{text}"}
- {name: xsum-factuality, kind: csv, path: xsum-hallucination/fact*, source: "{summary}", target: "{is_factual}"}
- {name: xsum-hallucination, kind: csv, path: xsum-hallucination/hall*, source: "{summary}",
   target: "{hallucination_type}"}
"""

# Records to train on and held out, as each set's SOURCE.md counts them. Kind text has records of its own making.
COUNTS = {
    "bbq-en": (11_956, 0),
    "blimp": (67_000, 0),
    "bold": (23_679, 0),
    "classic-books-en": (92, 0),
    "crows-pairs": (1_508, 0),
    "dialogsum-dev": (500, 0),
    "dialogsum-test": (500, 0),
    "esbbq": (27_320, 0),
    "halueval-qa": (500, 0),
    "halueval-general": (4_507, 0),
    "humaneval": (164, 0),
    "imdb-paired": (3_904, 976),
    "imdb-original": (2_440, 0),
    "mbpp": (974, 0),
    "mr-sentence-polarity": (10_662, 0),
    "multi30k": (30_014, 1_000),
    "noto-emoji-en": (3_528, 0),
    "noto-emoji-es": (3_528, 0),
    "tatoeba-en-es": (118_964, 0),
    "truthfulqa-multi": (1_646, 0),
    "uci-sentiment-3domains": (3_000, 0),
    "winobias": (1_584, 1_584),
    "winobias-occupations": (40, 0),
    "xsum-factuality": (5_597, 0),
    "xsum-hallucination": (11_185, 0),
}

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} is not here: the datasets lie beside the checkout"
)


def tuples(value):
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def section_of(corpus):
    paths = {field: f"{FOLDER}/{corpus[field]}" for field in ("path", "held_out") if field in corpus}
    return CorpusSection(**{**tuples(corpus), **paths})


SECTIONS = [section_of(corpus) for corpus in yaml.safe_load(CORPORA)]


def test_the_list_is_complete_and_each_entry_is_short():
    there = {
        path
        for path in FOLDER.rglob("*")
        if path.is_file() and path.parent != FOLDER and path.name not in NOT_DATA
        if path.relative_to(FOLDER).parts[0] not in NOT_TEXT
    }
    listed = [file for section in SECTIONS for file in list_files(section)]
    assert {Path(url.removeprefix("file://")) for file in listed for url in file.urls} == there
    entries = CORPORA.strip().split("\n- ")
    assert len(entries) == len(SECTIONS) and max(entry.count("\n") + 1 for entry in entries) <= MOST_LINES


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_set_loads_whole(section):
    check_known_fields(section, 64)
    template = PairTemplate(section, 64)
    found, pairs = Counter(), Counter()
    for file in list_files(section):
        for record in read_records(section, file, Counter()):
            template.check(record.keys(), file.url)
            pair = template.render(record)
            found[file.held_out] += 1
            pairs[file.held_out] += pair is not None
            assert pair is None or (pair[0].strip() and pair[1].strip())
    assert (found[True] > 0) == (section.held_out is not None)
    assert COUNTS.get(section.name, (found[False], found[True])) == (found[False], found[True])
    # A few records of some sets have an empty field.
    assert all(pairs[side] >= 0.95 * found[side] for side in found), (pairs, found)


def records(name):
    (section,) = (section for section in SECTIONS if section.name == name)
    for file in list_files(section):
        for record in read_records(section, file, Counter(), ("image",) if name == "noto-emoji-en" else ()):
            yield file.held_out, record


def test_text_files_are_there_to_the_last_line():
    questions = Counter()
    for held_out, record in records("babi"):
        questions[held_out] += record["text"].count("\t") // 2
    assert questions == {False: 50_000, True: 23_000}
    for name in ("tinyshakespeare", "quijote-es", "wikitext2-eval"):
        (section,) = (section for section in SECTIONS if section.name == name)
        contents = [Path(file.url.removeprefix("file://")).read_bytes() for file in list_files(section)]
        texts = [gzip.decompress(each) if each[:2] == b"\x1f\x8b" else each for each in contents]
        lines = [line for text in texts for line in text.decode("utf-8-sig").split("\n") if line.strip()]
        found = [line for _, record in records(name) for line in record["text"].split("\n") if line.strip()]
        assert [line.strip("\r") for line in lines] == found and len(lines) > 5000


def test_every_reference_summary_and_every_answer_is_a_record():
    papers = Counter()
    for held_out, record in records("scitldr"):
        papers[held_out, record["paper_id"]] += 1
    assert Counter(held_out for held_out, _ in papers) == {False: 1992 + 619, True: 618}
    questions = {(record["id"], record["question"]) for _, record in records("xquad")}
    assert len(questions) == 3 * 1190


def test_pictures_come_with_their_captions():
    found = [record for _, record in records("noto-emoji-en")]
    assert all(record["image"].startswith(b"\x89PNG") and record["caption_es"] for record in found)
    assert Counter(record["split"] for record in found) == {"train": 2856, "validation": 351, "test": 321}
