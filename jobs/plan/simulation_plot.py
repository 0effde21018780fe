"""Simulated runs as a picture: how far each falls behind a run without failures, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.errors import ConfigError
from jobs.plan.simulation import Simulation

COLOURS = ("#1f5fa8", "#e08a2b")
DAY, HOUR = 86400.0, 3600.0


def write_plot(runs: Mapping[str, Simulation], file: str, title: str) -> None:
    """A PNG of runs of one length by their names; raises ConfigError where the file cannot be written.

    Above: wall time less progress. Below: the shares of wall time that made no progress.
    """
    target = Path(file)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--plot {file}: must end in .png")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), height_ratios=[3, 1], layout="constrained")
    for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
        times, behind = zip(*((time / DAY, (time - done) / HOUR) for time, done in run.path), strict=True)
        label = f"{name}: goodput {run.goodput:.2%}, {len(run.failure_times):,} failures"
        above.plot(times, behind, color=colour, linewidth=1.2, label=label)
    first = next(iter(runs.values()))
    failures = [time / DAY for time in first.failure_times]
    above.plot(failures, [0.0] * len(failures), "|", color="0.4", markersize=5, clip_on=False)
    above.set(xlabel="wall time, days (ticks: failures)", ylabel="behind a run without failures, hours")
    above.set(xlim=(0, first.horizon / DAY), ylim=(0, None))
    above.set_title(title, fontsize=11)
    above.legend(frameon=False, loc="upper left")
    causes = {
        "lost": ("#b3261e", [run.lost for run in runs.values()]),
        "restarting": ("#e3b341", [run.restarting for run in runs.values()]),
        "waiting for nodes": ("#8d6e63", [run.waiting for run in runs.values()]),
        "copying": ("#7a7a7a", [run.stalled for run in runs.values()]),
    }
    left = [0.0] * len(runs)
    for name, (colour, seconds) in causes.items():
        shares = [100 * value / first.horizon for value in seconds]
        below.barh(range(len(runs)), shares, left=left, color=colour, label=name, height=0.6)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    below.set(yticks=range(len(runs)), yticklabels=[name.replace(" (", "\n(") for name in runs])
    below.set(xlabel="wall time without progress, %")
    below.invert_yaxis()
    below.legend(frameon=False, ncols=4, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {file}: cannot be written ({error.strerror or error})") from error
    finally:
        pyplot.close(figure)
