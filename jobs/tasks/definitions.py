"""Tasks as data, from names and files to definitions in full: what `evaluate.tasks` lists, with absolute paths."""

from __future__ import annotations

import difflib
from pathlib import Path

import configs
from cluster.storage import absolute_url
from configs.errors import ConfigError
from configs.load import load_task
from configs.schema import RunConfig, TaskSection
from configs.task_section import RUNS_CODE

BUILT_IN = Path(configs.__file__).parent / "tasks"
SUFFIXES = (".yaml", ".yml")
# Stands for every built-in task; those that run programs only where that is allowed.
ALL = "all"


def built_in_names() -> list[str]:
    """Names of the tasks that come with Telar, sorted."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def _all(allow_code_execution: bool) -> list[str]:
    """Names of the built-in tasks that may run."""
    names = built_in_names()
    if allow_code_execution:
        return names
    return [name for name in names if load_task(BUILT_IN / f"{name}.yaml").metric not in RUNS_CODE]


def is_file(entry: str) -> bool:
    """Whether an entry of `evaluate.tasks` is a YAML file and not the name of a built-in task."""
    return entry.endswith(SUFFIXES) or "/" in entry


def read_definition(entry: str, base: str | None, datasets: str | None) -> TaskSection:
    """The definition of a file (relative to `base`) or of a built-in task, its path absolute.

    `datasets` is the folder of the files of built-in tasks. Raises ConfigError naming file and field.
    """
    if is_file(entry):
        file = Path(absolute_url(entry, base=base))
        return _placed(load_task(file), str(file.parent))
    if entry not in built_in_names():
        near = difflib.get_close_matches(entry, built_in_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(built_in_names())}"
        raise ConfigError(f"evaluate.tasks: no built-in task {entry!r}; {hint} A file's name ends in .yaml")
    task = load_task(BUILT_IN / f"{entry}.yaml")
    if datasets is None:
        raise ConfigError(
            f"evaluate.datasets: built-in task {entry} reads {task.path}; set evaluate.datasets to the folder (or URL) "
            "below which that lies"
        )
    return _placed(task, absolute_url(datasets, base=base))


def with_definitions(config: RunConfig, base: str | None) -> RunConfig:
    """`config` with what `evaluate.tasks` names put into `evaluate.definitions`, where it replaces equal names.

    Built-in tasks lie below `evaluate.datasets`, or else `data.datasets`. Paths of files, of both folders and of
    definitions written in full are relative to `base` (None: the current folder). Raises ConfigError.
    """
    evaluate = config.evaluate
    found = {task.name: _placed(task, base) for task in evaluate.definitions}
    given = evaluate.datasets or config.data.datasets
    datasets = None if given is None else absolute_url(given, base=base)
    for listed in evaluate.tasks:
        for entry in _all(evaluate.allow_code_execution) if listed == ALL else [listed]:
            task = read_definition(entry, base, datasets)
            found[task.name] = task
    changed = evaluate.model_copy(update={"tasks": (), "datasets": datasets, "definitions": tuple(found.values())})
    return config.model_copy(update={"evaluate": changed})


def _placed(task: TaskSection, folder: str | None) -> TaskSection:
    if task.kind == "hf" and task.path.startswith("hf://"):
        return task
    return task.model_copy(update={"path": absolute_below(task.path, folder)})


def absolute_below(path: str, folder: str | None) -> str:
    """`path` made absolute; a relative one starts from `folder`, which may be a URL (None: the current folder)."""
    if folder is not None and "://" in folder and "://" not in path and not path.startswith("/"):
        return f"{folder.rstrip('/')}/{path}"
    return absolute_url(path, base=folder)
