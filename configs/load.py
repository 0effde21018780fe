"""YAML file + one level of `extends:` + typed `--set a.b=c` -> RunConfig, with errors that name the field."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.schema import RunConfig, TaskSection

Root = TypeVar("Root", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (`3e-4` is one), and no dates: `2026-11-22` stays text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
        r"\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader`, or a YAML 1.1 reader, would take for another type."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def read_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file; raises ConfigError that names file, field and fix."""
    file = Path(path)
    tree = _read_yaml(file)
    base_name = tree.pop("extends", None)
    if base_name is not None:
        if not isinstance(base_name, str):
            raise ConfigError(f"{file}: extends: {base_name!r} must be the path of one YAML file")
        base = _read_yaml(file.parent / base_name)
        if "extends" in base:
            raise ConfigError(
                f"{file}: extends: {base_name} itself extends {base['extends']}; only one level is allowed, "
                "so that a reader opens two files at most"
            )
        tree = _merge(base, tree)
    return parse_config(apply_overrides(tree, overrides), str(file))


def parse_config(tree: Mapping[str, Any], origin: str) -> RunConfig:
    """Validate a nested mapping; `origin` (a file or command) leads each message. Raises ConfigError."""
    return _validated(RunConfig, tree, origin)


def load_task(path: str | Path) -> TaskSection:
    """Read the YAML file of a task; raises ConfigError that names file, field and fix. Its `path` stays as written."""
    file = Path(path)
    return _validated(TaskSection, _read_yaml(file, TaskSection), str(file))


def _validated(model: type[Root], tree: Mapping[str, Any], origin: str) -> Root:
    try:
        return model.model_validate(_tuples(dict(tree)))
    except ValidationError as error:
        lines = [_explain(problem, model) for problem in _causes(error)]
        raise ConfigError(f"{origin}: " + "\n  ".join(lines)) from error


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments, the value read as YAML; list entries are addressed by number or by their name."""
    result = json.loads(json.dumps(tree))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override}: must have the form section.field=value")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is no YAML ({error}); quote it") from error
        _assign(result, key.strip().split("."), value, override)
    return result


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    tree = json.loads(config.model_dump_json())
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def config_digest(config: BaseModel) -> str:
    """16 hex digits that differ when any field of a configuration or section differs."""
    text = json.dumps(json.loads(config.model_dump_json()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(config: BaseModel, under: Sequence[str]) -> dict[str, Any]:
    """Dotted names and values of the fields below the named sections or fields; lists stay whole."""
    found: dict[str, Any] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{name}.{key}" if name else key)
        elif any(name == prefix or name.startswith(f"{prefix}.") for prefix in under):
            found[name] = value

    visit(json.loads(config.model_dump_json()), "")
    return found


def changed_fields(old: BaseModel, new: BaseModel) -> list[str]:
    """Dotted names of the fields in which two configurations differ."""
    return _differences(json.loads(old.model_dump_json()), json.loads(new.model_dump_json()), "")


def _differences(old: object, new: object, prefix: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [d for name in names for d in _differences(old.get(name), new.get(name), f"{prefix}{name}.")]
    return [] if old == new else [prefix.rstrip(".")]


def _read_yaml(file: Path, model: type[BaseModel] = RunConfig) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1, cutoff=0.5)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"{file}: no such configuration file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file}: must hold a mapping with keys of {', '.join(model.model_fields)}, not {type(tree).__name__}"
        )
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings are merged, anything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _assign(node: Any, parts: list[str], value: object, override: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            names = [str(item.get("name")) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
            index = int(part) if part.isdigit() else names.index(part) if part in names else -1
            if not 0 <= index < len(node):
                raise ConfigError(f"--set {override}: no entry {part!r}; there are {', '.join(names)}")
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise ConfigError(f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section")


def _tuples(value: object) -> object:
    """YAML lists as tuples, which strict frozen models ask for."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value


def _causes(error: ValidationError) -> list[Any]:
    """The problems without their consequences: a tuple is not 'too short' because one of its entries is wrong."""
    problems = error.errors(include_url=False)
    places = [tuple(problem["loc"]) for problem in problems]
    return [
        problem
        for problem, place in zip(problems, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def _explain(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        model, prefix = _model_at(problem["loc"][:-1], root)
        known = list(model.model_fields) if model else []
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if kind == "missing":
        return f"{where}: is required; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        field = message.split(":", 1)[0]
        prefix = f"{where}." if where else ""
        return f"{prefix}{message}" if field.replace("_", "").replace(".", "").isalnum() else f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}, not {_short(given)}"


def _short(value: object) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _model_at(location: Sequence[str | int], root: type[BaseModel]) -> tuple[type[BaseModel] | None, str]:
    """The section class at an error's location, and the dotted prefix that leads to it."""
    model: type[BaseModel] | None = root
    prefix = ""
    for part in location:
        prefix += f"{part}."
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = _section_in(field.annotation) if field else None
    return model, prefix


def _section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _section_in(argument))), None)
