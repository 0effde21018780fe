"""`telar tasks` and what `telar evaluate` makes of its options: all tasks, and the check of one of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.load import load_task
from configs.schema import EvaluateSection, RunConfig
from configs.task_section import METRICS
from jobs.tasks.definitions import BUILT_IN, built_in_names, is_file, read_definition
from jobs.tasks.from_data import DataTask
from jobs.tasks.registry import TASKS
from jobs.tasks.rows import data_version, read_rows_of, records_of

SEED = 0
SHOWN_CHARACTERS = 400


def evaluate_overrides(
    tasks: str | None, datasets: str | None, code: bool = False, lm_eval: str | None = None
) -> list[str]:
    """`--set` assignments of the options; files are named from the current folder."""
    changes = []
    for field, given in (("tasks", tasks), ("lm_eval", lm_eval)):
        if given is not None:
            entries = [entry.strip() for entry in given.split(",") if entry.strip()]
            named = [str(Path(entry).absolute()) if is_file(entry) else entry for entry in entries]
            changes.append(f"evaluate.{field}={json.dumps(named)}")
    if datasets is not None:
        changes.append(f"evaluate.datasets={json.dumps(datasets)}")
    if code:
        changes.append("evaluate.allow_code_execution=true")
    return changes


def check_tasks(config: RunConfig, most_bytes: int) -> None:
    """Make the requests of all tasks as data, so that what is wrong with one is said before a run and not after it.

    Tasks whose files hold more than `most_bytes` are left to the evaluation. Raises DataError or StorageError.
    """
    for definition in config.evaluate.definitions:
        if sum(size for _, size, _ in data_version(definition)) <= most_bytes:
            task = DataTask(definition)
            task.examples(read_rows_of(definition, task.limit(config), config.run.seed), definition.name, config)


def listing() -> dict[str, Any]:
    """Tasks of corpora (`corpus.task`), built-in tasks (`evaluate.tasks`), and the metrics that a file may name."""
    built_in = []
    for name in built_in_names():
        task = load_task(BUILT_IN / f"{name}.yaml")
        built_in.append({"name": name, "request": task.request, "metric": task.metric, "path": task.path})
    own = [{"name": name, "does": (type(task).__doc__ or "").split("\n")[0]} for name, task in TASKS.items()]
    return {"corpus_tasks": own, "built_in": built_in, "metrics": METRICS}


def listing_text(found: dict[str, Any]) -> str:
    """The listing for people."""
    lines = ["tasks of corpora (data.corpora.N.task)"]
    lines += [f"  {task['name']:<16} {task['does']}" for task in found["corpus_tasks"]]
    lines += ["", "built-in tasks (evaluate.tasks; their files lie below evaluate.datasets)"]
    lines += [f"  {t['name']:<24} {t['request']:<14} {t['metric']:<16} {t['path']}" for t in found["built_in"]]
    lines += ["", "metrics of task files"]
    for request in dict.fromkeys(found["metrics"].values()):
        lines.append(f"  {request:<16} {', '.join(n for n, r in found['metrics'].items() if r == request)}")
    return "\n".join(lines)


def validate(entry: str, datasets: str | None) -> dict[str, Any]:
    """Check all fields of a task and all rows that an evaluation would take of its files.

    Raises ConfigError for fields, DataError or StorageError for rows. Limits that the task leaves open are the
    defaults of the evaluate section.
    """
    definition = read_definition(entry, None, datasets)
    task = DataTask(definition)
    # Of a configuration a task reads only how many records it may take.
    config = RunConfig.model_construct(evaluate=EvaluateSection())
    rows = read_rows_of(definition, task.limit(config), SEED)
    examples = task.examples(rows, definition.name, config)
    groups = sorted(set(task.keys("group", examples))) if definition.group else []
    return {
        "name": definition.name,
        "metric": definition.metric,
        "path": definition.path,
        "rows": sum(1 for _ in records_of(definition)),
        "taken": len(examples),
        "groups": groups,
        "signature": task.signature,
        "first_row": rows[0].index,
        "first_request": {"kind": type(examples[0].requests[0]).__name__, **asdict(examples[0].requests[0])},
    }


def validated_text(found: dict[str, Any]) -> str:
    """The outcome for people."""
    request = found["first_request"]

    def shown(text: str) -> str:
        return (text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...") or "(none)"

    lines = [
        f"task {found['name']}: fine. {found['taken']} of {found['rows']} rows are taken from {found['path']}",
        f"metric {found['metric']}; {found['signature']}",
        *([f"groups {', '.join(found['groups'])}"] if found["groups"] else []),
        f"row {found['first_row']} asks to {request['kind']}:",
        f"  source  {shown(request['source'])}",
    ]
    lines += [f"  target  {shown(request['target'])}"] if "target" in request else []
    lines += [f"  choice  {shown(choice)}" for choice in request.get("targets", ())]
    return "\n".join(lines)
