"""Every text set of the datasets folder loads through a source with a few lines of YAML; skipped where it is absent."""

from collections import Counter
from itertools import islice
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

CORPORA = """
- {name: babi-single-question, kind: text, path: babi/en/*_train.txt.gz, held_out: babi/en/*_test.txt.gz,
   target: "{text}", continuation: true}
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
- {name: imdb-counterfactual, kind: tsv, path: imdb-counterfactual/paired_train.tsv.gz,
   held_out: imdb-counterfactual/paired_test.tsv.gz, source: "{Text}", target: "{Sentiment}"}
- {name: imdb-original, kind: tsv, path: imdb-counterfactual/orig*, source: "{Text}", target: "{Sentiment}"}
- {name: mbpp, kind: jsonl, path: mbpp, source: "{text}", target: "{code}"}
- {name: mr-sentence-polarity, kind: jsonl, path: mr-sentence-polarity, source: "{text}", target: "{label}"}
- name: multi30k
  kind: parallel
  path: "multi30k/train.{column}.gz"
  held_out: "multi30k/test_2016_flickr.{column}.gz"
  columns: [en, de, fr, cs]
  source: "translate English to German: {en}"
  target: "{de}"
- {name: noto-emoji-captions, kind: parquet, path: noto-emoji-captions, source: "{emoji}", target: "{caption_en}"}
- {name: quijote-es, kind: text, path: quijote-es, target: "{text}", continuation: true}
- {name: scitldr, kind: jsonl, path: scitldr/train*, held_out: scitldr/test*, records: target, source: "{source}",
   target: "{text}"}
- {name: tatoeba-en-es, kind: tsv, path: tatoeba-en-es/spa.tsv.gz, columns: [en, es], quotes: false,
   held_out_key: en, source: "{en}", target: "{es}"}
- {name: tinyshakespeare, kind: text, path: tinyshakespeare, target: "{text}", continuation: true}
- {name: truthfulqa-multi, kind: json, path: truthfulqa-multi, source: "{question}", target: "{best_answer}"}
- {name: uci-sentiment-3domains, kind: tsv, path: uci-sentiment-3domains/*.txt, columns: [sentence, label],
   quotes: false, source: "{sentence}", target: "{label}"}
- {name: wikitext2-eval, kind: text, path: wikitext2-eval, target: "{text}", continuation: true}
- {name: winobias, kind: tsv, path: winobias/*stereotyped*, columns: [sentence], quotes: false,
   target: "{sentence}", continuation: true}
- {name: xquad, kind: json, path: xquad, records: data.paragraphs.qas.answers, source: "{question} {context}",
   target: "{text}"}
- {name: xsum-factuality, kind: csv, path: xsum-hallucination/fact*, source: "{summary}", target: "{is_factual}"}
- {name: xsum-hallucination, kind: csv, path: xsum-hallucination/hall*, source: "{summary}",
   target: "{hallucination_type}"}
"""

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} is not here: the datasets lie beside the checkout"
)


def tuples(value):
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


SECTIONS = [CorpusSection(**tuples(corpus)) for corpus in yaml.safe_load(CORPORA)]


def test_the_list_is_complete_and_each_entry_is_short():
    used = {section.path.split("/")[0] for section in SECTIONS}
    there = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    assert there - NOT_TEXT <= used, f"no corpus for {there - NOT_TEXT - used}"
    entries = CORPORA.strip().split("\n- ")
    assert len(entries) == len(SECTIONS) and max(entry.count("\n") + 1 for entry in entries) <= MOST_LINES


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_set_gives_pairs(section):
    paths = {field: f"{FOLDER}/{getattr(section, field)}" for field in ("path", "held_out") if getattr(section, field)}
    section = section.model_copy(update=paths)
    check_known_fields(section, 64)
    template = PairTemplate(section, 64)
    files = list_files(section)
    assert any(file.held_out for file in files) == (section.held_out is not None)
    for file in files:
        records = list(islice(read_records(section, file, Counter()), 50))
        template.check(records[0].keys(), file.url)
        pairs = [pair for pair in map(template.render, records) if pair is not None]
        assert len(pairs) >= min(3, len(records)) > 0, f"{file.url}: {len(pairs)} pairs of {len(records)} records"
        assert all(source.strip() and target.strip() for source, target in pairs)
