"""Which fields of a run's configuration may change when it is resumed, and which coming weights of the mixture."""

from __future__ import annotations

from cluster import commit
from configs.errors import ConfigError
from configs.load import changed_fields
from configs.schema import RunConfig
from jobs.commands.runs import RunPlace

CHANGEABLE = ("cluster", "parallelism", "elastic", "evaluate", "tracking", "checkpoint", "train.steps")
WEIGHT_CHANGES = "data.weight_changes"


def check_resumable(old: RunConfig, new: RunConfig, place: RunPlace) -> None:
    """Raise ConfigError naming the first field that differs and would make it another run."""
    for name in changed_fields(old, new):
        if name == WEIGHT_CHANGES:
            check_weight_changes(old, new, last_committed_step(place))
        elif not any(name == allowed or name.startswith(f"{allowed}.") for allowed in CHANGEABLE):
            raise ConfigError(
                f"{name}: cannot change when a run is resumed; only {', '.join(CHANGEABLE)} and coming "
                f"{WEIGHT_CHANGES} may; start a new run for another value"
            )


def last_committed_step(place: RunPlace) -> int:
    """Step of the run's latest valid checkpoint; 0 without one."""
    found, _ = commit.latest(place.storage.child(place.name, "checkpoints"))
    return found.step if found else 0


def check_weight_changes(old: RunConfig, new: RunConfig, committed_step: int) -> None:
    """Raise ConfigError when entries of data.weight_changes differ whose from_step is below `committed_step`.

    The mixture of samples that were trained on is the past; entries from the committed step on may come, go and differ.
    """
    past = [change for change in old.data.weight_changes if change.from_step < committed_step]
    for number, change in enumerate(new.data.weight_changes):
        if number < len(past) and change != past[number]:
            problem = f"the run has {past[number].model_dump()} there"
        elif number >= len(past) and change.from_step < committed_step:
            problem = f"from_step {change.from_step} is a new entry before that step"
        else:
            continue
        raise ConfigError(
            f"data.weight_changes[{number}]: steps up to {committed_step} are trained and committed, so entries before "
            f"it must stay as they are: {problem}; give new weights from_step: {committed_step} or later"
        )
    if len(new.data.weight_changes) < len(past):
        number = len(new.data.weight_changes)
        raise ConfigError(
            f"data.weight_changes[{number}]: {past[number].model_dump()} is missing, but steps up to {committed_step} "
            "are trained and committed with it; put it back and add coming changes after it"
        )
