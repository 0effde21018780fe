"""An sbatch script: one Ray cluster per allocation (`ray symmetric-run`), the run submitted on its first machine.

Before the time limit, and on a preemption that gives notice, the run commits and the job puts itself back into the
queue; it resumes there, at whatever machines it is given.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from cluster.deploy.order import DASHBOARD_PORT, GRACE_SECONDS, Order

PORT = 6379
# The exit code of `telar status` for a run that was stopped.
STOPPED = 3

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={memory_gib}G
{gpu_lines}#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
#SBATCH --signal=B:TERM@{grace}
# What your site asks for besides goes before the file's name: sbatch --account=A --partition=P FILE
set -euo pipefail

run={run}
cd {root}
export PATH={root}/.venv/bin:$PATH
# Only who knows the token of this allocation can use its Ray cluster; the dashboard listens on 127.0.0.1.
RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \\n')"
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=1 \\
  ray symmetric-run --address "$head:{port}" --min-nodes "$SLURM_JOB_NUM_NODES" \\
  --dashboard-port {dashboard_port} --num-cpus {cpus}{num_gpus} -- \\
  {command} &
steps=$!

# `wait` ends early when the notice comes; the run then commits and ends as stopped.
noticed=no
trap 'noticed=yes; telar stop "$run" || true' TERM
wait "$steps" || true
if [ "$noticed" = yes ]; then
  wait "$steps" || true
fi

# The run's own record decides: `ray symmetric-run` exits with 0 when Ray did not start.
code=0
state="$(telar status "$run")" || code=$?
echo "$state"
if [ "$noticed" = yes ] && [ "$code" -eq {stopped} ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
case "$code $state" in
  "0 {name}  finished"*) exit 0 ;;
  "0 "*) exit 1 ;;
  *) exit "$code" ;;
esac
"""


def script(order: Order, root: str, config_path: str, overrides: Sequence[str], time: str) -> str:
    """The script. `root` is Telar's folder and `config_path` the configuration, both seen by all machines.

    `overrides` of the configuration come before the run's name and storage.
    """
    run = order.config.run
    # In quotes: YAML takes a name like 4e5 for a number.
    fixed = [f"run.name={json.dumps(order.name)}"]
    if order.config.cluster.shared_filesystem:
        fixed.append("cluster.shared_filesystem=true")
    machines = order.machines
    quoted = shlex.quote(root)
    return SCRIPT.format(
        name=order.name,
        nodes=machines.nodes,
        cpus=machines.cpus,
        memory_gib=machines.memory_gib,
        gpu_lines=f"#SBATCH --gpus-per-node={machines.gpus}\n" if machines.gpus else "",
        num_gpus=f" --num-gpus {machines.gpus}" if machines.gpus else "",
        time=time,
        log=f"{order.name}-%j.log",
        grace=GRACE_SECONDS,
        stopped=STOPPED,
        root=quoted,
        port=PORT,
        command=order.command(config_path, [*overrides, *fixed]),
        dashboard_port=DASHBOARD_PORT,
        run=shlex.quote(f"{run.storage}/{order.name}"),
    )
