"""A task as data: rows of files, templates that make requests of them, and a metric by name."""

from __future__ import annotations

import string
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from configs.data_section import KINDS_OF_FIELD, CorpusSection
from configs.section import NAME_PATTERN, PositiveInt, Section

# The request that each metric judges.
METRICS = {
    "accuracy": "choices",
    "true_mass": "choices",
    "first_preferred": "choices",
    "bbq": "choices",
    "faithfulness": "explain",
    "plausibility": "explain",
    "bits_per_byte": "loglikelihood",
    "exact_match": "generate",
    "squad": "generate",
    "rouge_l": "generate",
    "bleu": "generate",
    "diversity": "generate",
    "unsupported": "generate",
    "pass_at_k": "generate",
}
# Metrics that run what the model wrote.
RUNS_CODE = ("pass_at_k",)
# Metrics that are no means over rows: they have no groups and no drops.
OF_ALL_ROWS = ("bleu", "diversity")
# What a metric needs besides what its request does.
NEEDS_ANSWER = ("accuracy", "true_mass", "bbq")
NEEDS_TARGET = ("bits_per_byte", "exact_match", "squad", "rouge_l", "bleu", "pass_at_k")


class TaskCorpus(CorpusSection):
    """The rows of a task, read as a corpus is; messages name the task."""

    place: ClassVar[str] = "evaluate.definitions"


class TaskSection(Section):
    """A task that belongs to no training corpus.

    Templates name fields of a row in braces, as those of corpora do, and `{file}`, the name of its file below `path`;
    `{answers.0.text}` goes into a field that holds a JSON object or list. `kind`, `path` and the fields that say how
    files are read are those of a corpus (`data.corpora` describes them). `choices` is a list of templates, or one
    template whose text is a JSON list of texts. `answer` gives the right candidate: its text, its number from 0, or a
    JSON list of a 0 or 1 for each candidate.
    """

    name: str = Field(description="name of the cell in results and tables")
    kind: Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "parallel", "hf", "babi"] = Field(
        description="how files are read, as for a corpus"
    )
    path: str = Field(
        description="file, folder or glob, any fsspec URL; relative to the file of the task, of built-in tasks to "
        "evaluate.datasets"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of files or folders to leave out")
    columns: tuple[str, ...] = Field((), description="csv, tsv without a header line, parallel: names of the columns")
    quotes: bool = Field(True, description='csv, tsv: false takes " as an ordinary character')
    records: str = Field("", description="json, jsonl: dotted path to nested records")
    subset: str | None = Field(None, description="hf: name of the data set's configuration")
    split: str = Field("train", description="hf: split to read")
    reshape: Literal["none", "winobias", "bbq", "truthfulqa", "mbpp"] = Field(
        "none",
        description="what makes further fields of a row: winobias (two candidates to a pronoun), bbq (biased answers), "
        "mbpp (tests as lines); truthfulqa leaves empty candidates out",
    )
    request: Literal["generate", "loglikelihood", "choices", "explain"] = Field(
        description="what the model is asked; explain: which tokens of the source its choice rests on"
    )
    source: str = Field(
        "", description="template of the text that the model reads; may be empty but to generate or explain"
    )
    target: str = Field("", description="template of the text that is scored, or that an output is compared with")
    choices: str | tuple[str, ...] = Field((), description="candidates: templates, or one of a JSON list")
    answer: str = Field("", description="choices: template of the right candidate, see above")
    rationale: str = Field(
        "",
        description="plausibility: template of the passages of the source that people name as the reason, one a line",
    )
    faithful: str = Field(
        "", description="unsupported: template of a text that its source supports, to judge the detector by"
    )
    unfaithful: str = Field("", description="unsupported: template of a text that it does not; both or none")
    normalise: Literal["sum", "byte", "token"] = Field(
        "sum", description="choices: compare log-likelihoods as they are, per UTF-8 byte or per token of the candidate"
    )
    metric: str = Field(description=f"one of {', '.join(METRICS)}")
    group: str = Field("", description="template of a row's group; the first metric is also given for each group")
    gap: tuple[str, str] | None = Field(
        None, description="two groups: the first metric of one minus that of the other, with an interval"
    )
    compare_with: str | None = Field(
        None, description="in-domain task or corpus whose first metric this one's drop is counted from"
    )
    pair_by: str = Field("", description="template of what rows of both sides of a gap or drop share, to pair them")
    limit: PositiveInt | None = Field(
        None, description="rows at most, chosen by hash; default: evaluate.generate_records or likelihood_records"
    )
    max_new_tokens: PositiveInt | None = Field(
        None, description="generate: longest output, tokens; default: evaluate.max_new_tokens"
    )
    stop: tuple[str, ...] = Field((), description="generate: texts that an output ends before")

    program: str = Field(
        "",
        description="pass_at_k: template of the program that is run, what was written as {completion}; `target` is a "
        "solution that must pass, a control",
    )
    attempts: PositiveInt = Field(1, description="pass_at_k: outputs drawn for each row; 1: decoded as in the settings")
    temperature: float = Field(0.8, gt=0.0, description="pass_at_k with attempts: logits are divided by it")
    pass_at: tuple[int, ...] = Field((1,), description="pass_at_k: values of k, 1 the first, at most `attempts`")

    def corpus(self) -> TaskCorpus:
        """The rows as a corpus; its target is only a filler."""
        fields = {name: getattr(self, name) for name in READING}
        return TaskCorpus(name=self.name, source=self.source, target=self.target or "{text}", **fields)

    @model_validator(mode="after")
    def _files_fit(self) -> TaskSection:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} must consist of letters, digits, '.', '_' and '-'")
        for field, kinds in KINDS_OF_FIELD.items():
            if self.kind not in kinds and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: only kind: {' or '.join(kinds)} has it; remove it or change kind")
        if self.kind == "parallel" and (len(self.columns) < 2 or "{column}" not in self.path):
            raise ValueError(
                "columns: kind: parallel needs two names or more, and {column} in path where they stand in file names"
            )
        return self

    @model_validator(mode="after")
    def _templates_are_templates(self) -> TaskSection:
        listed = [self.choices] if isinstance(self.choices, str) else list(self.choices)
        named = [
            (field, getattr(self, field))
            for field in ("source", "target", "answer", "group", "pair_by", "program", "rationale")
        ]
        for field, text in [*named, *((f"choices.{i}", template) for i, template in enumerate(listed))]:
            try:
                parts = list(string.Formatter().parse(text))
            except ValueError as error:
                raise ValueError(f"{field}: {text!r} is no template ({error}); write literal braces twice") from None
            for _, name, spec, conversion in parts:
                if name is not None and (not name or spec or conversion):
                    raise ValueError(f"{field}: {text!r} has a brace pair that is not a plain field name")
        return self

    @model_validator(mode="after")
    def _metric_fits_the_request(self) -> TaskSection:
        if self.metric not in METRICS:
            raise ValueError(f"metric: {self.metric!r} is unknown; one of {', '.join(METRICS)}")
        if METRICS[self.metric] != self.request:
            fitting = [name for name, request in METRICS.items() if request == self.request]
            raise ValueError(
                f"metric: {self.metric} judges request: {METRICS[self.metric]}; with request: {self.request} use one "
                f"of {', '.join(fitting)}"
            )
        if self.request in ("generate", "explain") and not self.source:
            raise ValueError(f"source: request: {self.request} needs a text to read; give a template")
        if (self.request in ("choices", "explain")) != bool(self.choices):
            raise ValueError(
                "choices: requests choices and explain need candidates, and only they; give or remove them"
            )
        if isinstance(self.choices, tuple) and len(self.choices) == 1:
            raise ValueError("choices: one candidate is no choice; give two or more, or one template without a list")
        if self.metric == "first_preferred" and len(self.choices) != 2:
            raise ValueError("choices: metric: first_preferred compares two templates; give two")
        if bool(self.answer) != (self.metric in NEEDS_ANSWER):
            raise ValueError(f"answer: metrics {', '.join(NEEDS_ANSWER)} need it, and only they; give or remove it")
        if self.metric in NEEDS_TARGET and not self.target:
            raise ValueError(f"target: metric: {self.metric} needs the text that it judges or compares with; give one")
        if self.choices and self.target:
            raise ValueError("target: the candidates are the targets; remove it")
        if bool(self.rationale) != (self.metric == "plausibility"):
            raise ValueError("rationale: metric: plausibility needs it, and only it; give or remove it")
        labelled = bool(self.faithful), bool(self.unfaithful)
        if any(labelled) and (self.metric != "unsupported" or not all(labelled)):
            raise ValueError(
                "faithful, unfaithful: they judge the detector of metric: unsupported; give both with it, or none"
            )
        if self.metric == "true_mass" and self.normalise != "sum":
            raise ValueError(
                f"normalise: scores per {self.normalise} are no log-probabilities, of which metric: true_mass sums; "
                "remove it"
            )
        if (self.metric == "bbq") != (self.reshape == "bbq"):
            raise ValueError("reshape: bbq makes the fields that metric: bbq judges; give both or none")
        return self

    @model_validator(mode="after")
    def _programs_fit(self) -> TaskSection:
        if self.metric not in RUNS_CODE:
            for field in ("program", "attempts", "temperature", "pass_at"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(f"{field}: only metric: {' or '.join(RUNS_CODE)} has it; remove it")
            return self
        if "{completion}" not in self.program:
            raise ValueError(
                f"program: {self.program!r} has no {{completion}}, where what was written stands; add it and the tests"
            )
        if self.pass_at[:1] != (1,) or list(self.pass_at) != sorted(set(self.pass_at)):
            raise ValueError(f"pass_at: {list(self.pass_at)} must begin with 1 and grow")
        if self.pass_at[-1] > self.attempts:
            raise ValueError(f"pass_at: k = {self.pass_at[-1]} needs as many attempts; raise attempts or leave it out")
        return self

    @model_validator(mode="after")
    def _comparisons_fit(self) -> TaskSection:
        compared = [field for field in ("group", "gap", "compare_with") if getattr(self, field)]
        if compared and self.metric in OF_ALL_ROWS:
            raise ValueError(f"{compared[0]}: {self.metric} is no mean over rows that could be compared; remove it")
        if self.gap is not None and not self.group:
            raise ValueError("gap: it names two groups; give group, a template of a row's group")
        if self.compare_with is not None and self.metric == "first_preferred":
            raise ValueError("compare_with: first_preferred is neither better above nor below; remove it")
        if self.compare_with == self.name:
            raise ValueError("compare_with: it is the task itself; name another task or a corpus")
        if self.request != "generate" and (self.stop or self.max_new_tokens is not None):
            raise ValueError("stop, max_new_tokens: only request: generate writes; remove them")
        return self


READING = ("kind", "path", "exclude", "columns", "quotes", "records", "subset", "split")
