"""`telar plan`: what a run will need, without a cluster; neither torch nor ray is imported.

Only `model.init_from`, whose directory says the sizes, takes the slow imports that reading it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import RunConfig
from jobs.plan.devices import find_device
from jobs.plan.duration import in_words, parse_duration
from jobs.plan.make import Plan, Question, make_plan
from jobs.plan.published import comparisons
from jobs.plan.techniques import techniques_of, with_assumptions
from jobs.plan.text import as_text, published_table, terminal_width


def plan(
    file: str,
    overrides: Sequence[str] = (),
    device: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    assumed: Sequence[str] = (),
    mtbf: str | None = None,
    simulate: str | None = None,
    seed: int = 0,
    spares: int | None = None,
    plot: str | None = None,
) -> Plan:
    """The plan of a configuration file; raises ConfigError. With `plot` the simulation's picture is written there."""
    if plot is not None and simulate is None:
        raise ConfigError("--plot: there is nothing to draw without --simulate; give it a length like 30d")
    config = _configuration(file, overrides)
    found = make_plan(
        config,
        Question(
            find_device(device or ("cpu" if config.cluster.device == "cpu" else "h100")),
            nodes,
            gpus_per_node,
            with_assumptions(techniques_of(config), assumed),
            None if mtbf is None else parse_duration(mtbf, "--mtbf"),
            None if simulate is None else parse_duration(simulate, "--simulate"),
            seed,
            spares,
        ),
    )
    if plot is not None:
        from jobs.plan.simulation_plot import write_plot

        checkpoints = found.facts["checkpoints"]
        title = (
            f"{Path(file).stem} on {found.facts['nodes']:,} nodes, a failure every "
            f"{in_words(checkpoints['mtbf_seconds'])}"
        )
        runs = {
            f"checkpoint every {in_words(found.facts['simulation'][name]['interval_seconds'])} ({name})": run
            for name, run in found.simulations.items()
        }
        write_plot(runs, plot, title)
    return found


def on(stream: TextIO, found: Plan, rows: int) -> str:
    """Text of a plan for a terminal, or for what stands in its place."""
    return as_text(found.facts, rows, terminal_width(stream))


def published(stream: TextIO | None) -> tuple[dict[str, Any], str]:
    """Published runs and their predictions, as plain data and, where there is a stream, as text for it."""
    found = comparisons()
    rows = [{**asdict(one), "error": one.error} for one in found]
    return {"published": rows}, "" if stream is None else published_table(found, terminal_width(stream))


def _configuration(file: str, overrides: Sequence[str]) -> RunConfig:
    config = load_config(file, overrides)
    if config.model.init_from is None:
        return config
    from jobs.pretrained import with_pretrained

    return with_pretrained(config, str(Path(file).absolute().parent))
