"""A simulated run as a picture: progress against wall time, and where the time went."""

from __future__ import annotations

from pathlib import Path

from configs.errors import ConfigError
from jobs.plan.simulation import Simulation

DAY = 86400.0


def write_plot(simulation: Simulation, file: str, title: str) -> None:
    """A PNG; raises ConfigError where the file cannot be written."""
    target = Path(file)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--plot {file}: must end in .png")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), height_ratios=[4, 1], layout="constrained")
    days = simulation.horizon / DAY
    above.plot([0, days], [0, days], color="0.75", linewidth=1, label="no failures, no checkpoints")
    times, progress = zip(*((time / DAY, done / DAY) for time, done in simulation.path), strict=True)
    above.plot(times, progress, color="#1f5fa8", linewidth=1.2, label=f"this run: goodput {simulation.goodput:.1%}")
    failures = [time / DAY for time in simulation.failure_times]
    above.plot(failures, [0] * len(failures), "|", color="#b3261e", label=f"{len(failures)} failures")
    above.set(xlabel="wall time, days", ylabel="progress, days of training", xlim=(0, days), ylim=(0, days))
    above.set_title(title, fontsize=11)
    above.legend(frameon=False, loc="upper left")
    shares = {
        "training kept": (simulation.progress, "#1f5fa8"),
        "lost": (simulation.lost, "#b3261e"),
        "restarting": (simulation.restarting, "#e08a2b"),
        "waiting for nodes": (simulation.waiting, "#8d6e63"),
        "checkpoint stalls": (simulation.stalled, "#7a7a7a"),
    }
    left = 0.0
    for name, (seconds, colour) in shares.items():
        share = seconds / simulation.horizon
        below.barh(0, share, left=left, color=colour, label=f"{name} {share:.2%}")
        left += share
    below.set(xlim=(0, 1), yticks=[], xlabel="share of wall time")
    below.legend(frameon=False, ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {file}: cannot be written ({error.strerror or error})") from error
    finally:
        pyplot.close(figure)
