"""Verbs about machines: what is there, what a run needs, how it gets there and is watched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from jobs.verbs.options import address, as_json, overrides, print_result, storage


@click.command()
@click.option("--address", metavar="URL", help="Also check this cluster.")
@storage
@as_json
def doctor(address: str | None, storage: str | None, as_json: bool) -> None:
    """Check versions, hardware, storage, ports and cluster; say what to fix."""
    from jobs.doctor import examine

    checks = examine(storage, address)
    print_result(
        as_json,
        {"ok": all(check.state != "fail" for check in checks), "checks": [check.as_dict() for check in checks]},
        "\n".join(check.as_line() for check in checks),
    )
    sys.exit(1 if any(check.state == "fail" for check in checks) else 0)


@click.command()
@click.option("--cpus", type=click.IntRange(min=1), help="Logical CPUs; may exceed the cores.")
@click.option("--dashboard-port", type=click.IntRange(1024, 65535), help="First port tried for the dashboard.")
@as_json
def up(cpus: int | None, dashboard_port: int | None, as_json: bool) -> None:
    """Start the embedded cluster, or show the one that runs."""
    from jobs.commands.clusters import bring_up

    result = bring_up(cpus, dashboard_port)
    print_result(as_json, result, result["message"])


@click.command()
@click.option("--force", is_flag=True, help="Also when jobs are running on it.")
@as_json
def down(force: bool, as_json: bool) -> None:
    """End the embedded cluster."""
    from jobs.commands.clusters import take_down

    result = take_down(force)
    print_result(as_json, result, result["message"])


@click.command()
@click.argument("config", required=False)
@click.option("--nodes", type=click.IntRange(1, 100_000), help="Nodes; default: as many as the configuration fills.")
@click.option("--gpus-per-node", type=click.IntRange(1, 1024), help="Devices in a node; default: the device's.")
@click.option("--device", metavar="NAME|FILE", help="h100, h200, a100, cpu, or a YAML file of a device's fields.")
@click.option(
    "--assume", "assumed", multiple=True, metavar="A=B", help="Software that Telar is not: recompute=full, ..."
)
@click.option("--mtbf", metavar="TIME", help="Mean time between failures of the whole run, e.g. 3h.")
@click.option("--simulate", metavar="TIME", help="Simulate so long a run against failures, e.g. 30d.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the simulation.")
@click.option("--spares", type=click.IntRange(min=0), help="Spare nodes of the simulation; default: always one.")
@click.option("--plot", metavar="PNG", help="With --simulate: draw progress and losses.")
@click.option("--layouts", "rows", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Layouts shown.")
@click.option("--published", is_flag=True, help="Show predictions for published runs instead; needs no CONFIG.")
@overrides
@as_json
def plan(config: str | None, rows: int, published: bool, as_json: bool, **question: Any) -> None:
    """What a run will need: memory, layouts, time, energy, checkpoints, goodput. Needs no cluster and no GPU."""
    from jobs.commands import planning

    if published:
        result, text = planning.published(None if as_json else sys.stdout)
        print_result(as_json, result, text)
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG' (or --published)")
    found = planning.plan(config, **question)
    print_result(as_json, found.facts, "" if as_json else planning.on(sys.stdout, found, rows))


@click.command()
@click.option("--out", type=click.Path(file_okay=False), default="monitoring", show_default=True, help="Folder.")
@click.option("--token-file", type=click.Path(), help="Holds the cluster's token; default: the embedded cluster's.")
@click.option("--prometheus", metavar="URL", default="http://127.0.0.1:9090", show_default=True, help="For Grafana.")
@address
@as_json
def monitor(out: str, token_file: str | None, prometheus: str, address: str | None, as_json: bool) -> None:
    """Write prometheus.yml, Grafana's dashboard and its provisioning for a cluster."""
    from jobs.commands.monitoring import monitor as write_files

    written = write_files(Path(out), address, token_file, prometheus)
    print_result(as_json, written, written["message"])


@click.command()
@click.argument("config")
@click.option("--to", "system", type=click.Choice(("kuberay", "slurm", "ray-up")), required=True)
@click.option("--nodes", type=click.IntRange(1), help="Machines with ranks; default: as many as the ranks need.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="Default: 8, or all ranks if they are fewer.")
@click.option("--cpus-per-node", type=click.IntRange(1), help="Default: cluster.cpus_per_rank for each rank and 2.")
@click.option("--memory-gib", type=click.IntRange(1), help="Memory per machine; default: 16 GiB for each rank.")
@click.option("--image", help="kuberay: container image with Telar installed.")
@click.option("--claim", help="kuberay: a ReadWriteMany volume claim, mounted at /shared in all pods.")
@click.option(
    "--gcs-storage",
    metavar="rocksdb|redis://HOST:PORT|none",
    default="rocksdb",
    show_default=True,
    help="kuberay: where the head keeps its state, so that a run survives its restart.",
)
@click.option("--shared", metavar="DIR", help="slurm: a folder that all machines see, e.g. /home.")
@click.option("--time", "limit", default="24:00:00", show_default=True, help="slurm: time limit of one allocation.")
@click.option("--hosts", help="ray-up: machines that are there, separated by commas, the head first.")
@click.option("--region", help="ray-up on AWS.")
@click.option("--instance-type", help="ray-up on AWS: machines with ranks.")
@click.option("--user", default="ubuntu", show_default=True, help="ray-up: who logs in by SSH.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write here instead of to the terminal.")
@storage
@overrides
def deploy(config: str, storage: str | None, overrides: tuple[str, ...], out: str | None, **options: Any) -> None:
    """Write what brings a run onto Kubernetes (KubeRay), Slurm or machines of `ray up`."""
    from jobs.commands.deploying import Target, manifest

    text = manifest(config, overrides, storage, Target(**options))
    if out is None:
        click.echo(text, nl=False)
        return
    Path(out).write_text(text)
    click.echo(f"wrote {out}", err=True)


VERBS = (doctor, up, down, plan, monitor, deploy)
