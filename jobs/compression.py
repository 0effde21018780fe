"""What `telar compress` may be asked for, and what of it is refused before a run is touched."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError
from model.packed import KINDS, Int4Weight
from model.rounding import Rounding

METHODS = ("structured", "wanda", "magnitude")
GROUPS = (32, 64, 128)
PATTERN = "2:4"


@dataclass(frozen=True)
class Compression:
    """What is to be done: `quantize` (one of KINDS) or `prune` (a share in (0, 1)) by one of METHODS.

    `group` is for int4, `pattern` ("2:4") for wanda and magnitude. `recover_steps` (optimizer steps) are trained after
    structured pruning, and before quantizing, on rounded weights.
    """

    quantize: str | None = None
    prune: float | None = None
    method: str = "structured"
    group: int = 64
    pattern: str | None = None
    recover_steps: int = 0

    def check(self) -> None:
        """Raises ConfigError for what is unknown, out of range or contradictory."""
        if (self.quantize is None) == (self.prune is None):
            raise ConfigError("--quantize, --prune: give one of them; a pruned run can be quantized afterwards")
        if self.quantize is not None and self.quantize not in KINDS:
            raise ConfigError(f"--quantize: {self.quantize!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.group not in GROUPS:
            raise ConfigError(f"--group: {self.group} is not one of {', '.join(map(str, GROUPS))}")
        if self.method not in METHODS:
            raise ConfigError(f"--method: {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.prune is not None and not 0.0 < self.prune < 1.0:
            raise ConfigError(f"--prune: {self.prune:g} is no share between 0 and 1; 0.3 takes away 30%")
        if self.pattern not in (None, PATTERN):
            raise ConfigError(f"--pattern: {self.pattern!r} is unknown; {PATTERN} is the only one")
        unstructured = self.prune is not None and self.method != "structured"
        if self.pattern is not None and (not unstructured or self.prune != 0.5):
            raise ConfigError("--pattern: 2:4 takes away half; use it with --prune 0.5 --method wanda or magnitude")
        if self.recover_steps < 0 or (self.recover_steps and unstructured):
            raise ConfigError(
                "--recover-steps: only structured pruning and quantizing go with training; it would fill the zeros of "
                "the other methods again"
            )
        if self.recover_steps and self.quantize is not None and self.group != Rounding.group:
            raise ConfigError(
                f"--group: training rounds in groups of {Rounding.group}; leave --group or --recover-steps out"
            )

    @property
    def kind(self) -> str:
        """What quantizing makes, such as `int8-weight` or `int4-group-64`."""
        return f"{self.quantize}-{self.group}" if self.quantize == Int4Weight.kind else str(self.quantize)

    @property
    def label(self) -> str:
        """Short name, such as `int8-weight`, `structured-30` or `wanda-2-4`."""
        if self.quantize is not None:
            return f"{self.kind}-trained" if self.recover_steps else self.kind
        return f"{self.method}-2-4" if self.pattern else f"{self.method}-{100 * self.prune:g}".replace(".", "_")
