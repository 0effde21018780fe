"""The folders' READMEs: short, and every command, file and setting that they name is there."""

import re
import shlex
from pathlib import Path

import pytest

from configs.schema import RunConfig
from jobs.cli import cli

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / folder / "README.md" for folder in ("data", "model", "jobs", "cluster")]
SECTIONS = set(RunConfig.model_fields)


def commands(text):
    """Words of the lines of shell blocks that call telar, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("telar ")]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_page_is_short_and_what_it_names_is_there(readme):
    text = readme.read_text()
    assert len(text.splitlines()) <= 90
    for name in set(re.findall(r"`(tests/[a-z_]+\.py)`", text)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"`([a-z_]+\.py)`", text)):
        assert (readme.parent / name).exists(), f"{name} is not in {readme.parent.name}/"
    for name in set(re.findall(r"configs/[a-z0-9_]+\.yaml", text)):
        assert (ROOT / name).exists(), name
    for section, field in set(re.findall(r"`([a-z]+)\.([a-z_]+)[:`]", text)):
        if section in SECTIONS and field not in ("py", "yaml"):
            kind = RunConfig.model_fields[section].annotation
            assert field in getattr(kind, "model_fields", {field}), f"{section}.{field} is no setting"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_commands_are_ones_that_telar_understands(readme):
    text = readme.read_text()
    assert commands(text)
    for _, verb, *arguments in commands(text):
        cli.commands[verb].make_context(verb, arguments)
    assert set(re.findall(r"`telar ([a-z]+)", text)) <= set(cli.commands)


def test_the_example_of_the_order_runs():
    (example,) = re.findall(r"```python\n(.*?)```", READMES[0].read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    assert len(names["row"]) == 4 and set(names["corpus"]) <= {0, 1}
