"""Configuration: every shipped file loads, every mistake is named with its fix."""

from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from configs.load import changed_fields, config_digest, load_config, parse_config, to_yaml
from configs.schema import RunConfig, Section

GALLERY = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def tree(**changes):
    base = {
        "data": {"corpora": [{"name": "a", "kind": "text", "path": "x", "target": "{text}"}]},
        "train": {"steps": 4, "global_batch_sequences": 8, "micro_batch_sequences": 4},
    }
    for dotted, value in changes.items():
        node = base
        *path, last = dotted.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return base


def write(tmp_path, content, name="run.yaml"):
    file = tmp_path / name
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_round_trips(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    assert config_digest(load_config(again)) == config_digest(config)


def test_the_gallery_is_not_empty():
    assert "smoke.yaml" in [path.name for path in GALLERY]


def sections(model=RunConfig):
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield field.annotation
            yield from sections(field.annotation)


def test_every_field_says_what_it_means():
    for section in sections():
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert field.description or is_section, f"{section.__name__}.{name} has no description"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__stepz": 3}, "train.stepz: unknown key; did you mean train.steps?"),
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"train__steps": "many"}, "train.steps: input should be a valid integer, not 'many'"),
        ({"train__steps": 2.5}, "train.steps: input should be a valid integer, not 2.5"),
        ({"train__steps": 0}, "train.steps: input should be greater than 0, not 0"),
        ({"run__name": "a/b"}, "run.name: 'a/b' cannot name a folder"),
        ({"model__heads": 7}, "model.heads: 7 heads do not divide d_model = 512; set model.heads to 8"),
        ({"train__global_batch_sequences": 7}, "train.global_batch_sequences: 7 is no multiple of micro_batch"),
        ({"optimizer__betas": [0.9, 1.5]}, "optimizer.betas: [0.9, 1.5] must lie in [0, 1)"),
        ({"data__corpora": []}, "data.corpora: "),
        ({"parallelism__data": 3}, "parallelism.data: 3 replicas share 2 micro-batches a step, so 1 would idle"),
        ({"parallelism__tensor": 3}, "parallelism.tensor: 3 ranks cannot share model.heads = 8 evenly; set"),
        (
            {"parallelism__tensor": 4, "model__key_value_heads": 2},
            "parallelism.tensor: 4 ranks cannot share model.key_value_heads = 2 evenly; set parallelism.tensor to 2 or "
            "model.key_value_heads to a multiple of 4",
        ),
        ({"parallelism__tensor": 2, "model__d_ff": 255}, "cannot share model.d_ff = 255 evenly"),
    ],
)
def test_mistakes_are_named_with_their_fix(changes, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, tree(**changes)))
    assert message in str(caught.value)
    assert str(tmp_path / "run.yaml") in str(caught.value)


def test_a_missing_required_field_is_named(tmp_path):
    content = tree()
    del content["train"]["steps"]
    with pytest.raises(ConfigError, match=r"train\.steps: is required"):
        load_config(write(tmp_path, content))


def test_a_wrong_entry_does_not_also_complain_about_the_list(tmp_path):
    content = tree()
    content["data"]["corpora"][0]["wieght"] = 2
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, content))
    assert "did you mean data.corpora.0.weight?" in str(caught.value)
    assert "too_short" not in str(caught.value) and "at least 1" not in str(caught.value)


def test_overrides_are_typed_and_address_list_entries_by_name(tmp_path):
    file = write(tmp_path, tree())
    config = load_config(file, ["train.steps=9", "data.corpora.a.weight=2.5", "run.name=x"])
    assert (config.train.steps, config.data.corpora[0].weight, config.run.name) == (9, 2.5, "x")
    with pytest.raises(ConfigError, match="valid integer, not '9x'"):
        load_config(file, ["train.steps=9x"])
    with pytest.raises(ConfigError, match=r"must have the form section\.field=value"):
        load_config(file, ["train.steps"])
    with pytest.raises(ConfigError, match="no entry 'b'; there are a"):
        load_config(file, ["data.corpora.b.weight=1"])


def test_numbers_and_dates_mean_what_they_look_like(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree()) + "run: {name: 2026-11-22}\n")
    config = load_config(file, ["optimizer.learning_rate=3e-4", "optimizer.eps=1E-8", "model.dropout=.25"])
    assert config.run.name == "2026-11-22"
    assert (config.optimizer.learning_rate, config.optimizer.eps, config.model.dropout) == (3e-4, 1e-8, 0.25)
    # Text that only begins like a number is text.
    assert load_config(file, ["data.corpora.a.source=2.5 kg"]).data.corpora[0].source == "2.5 kg"
    with pytest.raises(ConfigError, match="valid integer, not 400"):
        load_config(file, ["train.steps=4e2"])


def test_extends_goes_one_level(tmp_path):
    write(tmp_path, tree(model__dropout=0.3), "base.yaml")
    top = write(tmp_path, {"extends": "base.yaml", "train": {"steps": 11}}, "top.yaml")
    config = load_config(top)
    assert (config.train.steps, config.train.global_batch_sequences, config.model.dropout) == (11, 8, 0.3)
    write(tmp_path, {"extends": "top.yaml"}, "third.yaml")
    with pytest.raises(ConfigError, match="only one level"):
        load_config(tmp_path / "third.yaml")


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, tree(), "smoke.yaml")
    with pytest.raises(ConfigError, match=r"no such configuration file; did you mean .*smoke\.yaml"):
        load_config(tmp_path / "smokee.yaml")


def test_configurations_are_frozen():
    config = parse_config(tree(), "here")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_changed_fields_are_listed_by_dotted_name():
    old, new = parse_config(tree(), "here"), parse_config(tree(train__steps=9, run__seed=3), "here")
    assert changed_fields(old, new) == ["run.seed", "train.steps"]
