"""The device that a plan is for: from the table beside this file, or from a YAML file of the same fields."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from configs.errors import ConfigError
from configs.load import read_yaml
from configs.section import PositiveInt, Section

TABLE = Path(__file__).with_name("devices.yaml")

Positive = Field(gt=0.0)


class Device(Section):
    """One accelerator and its share of a node. Rates are for one direction; GB is 10^9 bytes, GiB 2^30."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1, description="where the figures are from")
    bf16_tflops: float = Positive
    fp32_tflops: float = Positive
    memory_gib: float = Positive
    memory_gb_per_second: float = Positive
    link_gb_per_second: float = Field(gt=0.0, description="to the other devices of the node together")
    network_gb_per_second: float = Field(gt=0.0, description="to other nodes, this device's share")
    host_gb_per_second: float = Field(gt=0.0, description="to the host's memory")
    storage_gb_per_second: float = Field(gt=0.0, description="of a node to the storage of checkpoints and data")
    watts: float = Positive
    gpus_per_node: PositiveInt
    attainable: float = Field(gt=0.0, le=1.0, description="share of the peak that large matrices reach")
    launch_microseconds: float = Field(ge=0.0, description="of the host, to start one kernel")
    ramp: float = Field(ge=0.0, description="inner elements that the start and end of a tile of a product cost")

    @property
    def memory_bytes(self) -> float:
        """Memory in bytes."""
        return self.memory_gib * 2**30

    def peak_flops(self, precision: str) -> float:
        """Dense FLOP/s of `fp32` or `bf16`."""
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops) * 1e12


def find_device(name: str) -> Device:
    """A device of the table by its name, or of the YAML file of that path; raises ConfigError."""
    table = known_devices()
    if name in table:
        return table[name]
    file = Path(name)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        return _from_file(file)
    near = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"--device: unknown device {name!r}; {hint}known: {', '.join(table)}, or a YAML file with the fields "
        f"{', '.join(Device.model_fields)}"
    )


def known_devices() -> dict[str, Device]:
    """The table of this package, by name."""
    return {name: _device(fields, f"{TABLE}: {name}") for name, fields in _read(TABLE).items()}


def _from_file(file: Path) -> Device:
    try:
        tree = _read(file)
    except OSError as error:
        raise ConfigError(f"--device: {file} cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--device: {file} is no YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--device: {file} must hold the fields {', '.join(Device.model_fields)}")
    return _device(tree, f"--device: {file}")


def _read(file: Path) -> dict:
    return read_yaml(file.read_text(encoding="utf-8"))


def _device(fields: object, origin: str) -> Device:
    # Strict sections take no whole number where a fraction may stand.
    if isinstance(fields, dict):
        fractions = {name for name, field in Device.model_fields.items() if field.annotation is float}
        fields = {
            name: float(value) if name in fractions and type(value) is int else value for name, value in fields.items()
        }
    try:
        return Device.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'device'}: {_said(problem)}"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigError(f"{origin}: " + "\n  ".join(problems)) from error


def _said(problem: dict) -> str:
    if problem["type"] == "missing":
        return "is required; add it"
    if problem["type"] == "extra_forbidden":
        return f"unknown field; known: {', '.join(Device.model_fields)}"
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"
