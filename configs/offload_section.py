"""States of ZeRO-3 that lie in the host's memory instead of the GPU's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from configs.section import Section


class OffloadSection(Section):
    """What each rank keeps in its host's memory; it crosses to the device when it is needed."""

    optimizer: Literal["none", "cpu"] = Field(
        "none", description="cpu: master weights and optimizer states, updated there by the host"
    )
    parameters: Literal["none", "cpu"] = Field("none", description="cpu: the shards of the parameters")

    @field_validator("optimizer", "parameters", mode="before")
    @classmethod
    def _stays_in_memory(cls, value: object) -> object:
        if value == "nvme":
            raise ValueError(
                "nvme is not supported: checkpoints are copied out of memory between two steps; use cpu, more "
                "replicas, or parallelism.tensor"
            )
        return value

    @property
    def active(self) -> bool:
        """Whether anything is kept there."""
        return "cpu" in (self.optimizer, self.parameters)
