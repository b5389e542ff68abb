"""What stands for ``sbatch``, ``srun`` and ``scontrol`` where there is no Slurm: it runs the jobs here.

Called under one of these names. Understood are the options that the scripts in ``pipelines/slurm``
use; ``FAKE_SLURM`` is ``NODES TASKS_PER_NODE ARRAY`` instead of what a script asks for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_VALUED = ("--dependency", "--wait", "--kill-on-bad-exit")


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return options, and the command after them."""
    options: list[str] = []
    while words and words[0].startswith("-"):
        options.append(words.pop(0))
        if options[-1] in _VALUED:
            options.append(words.pop(0))
    return options, words


def sbatch(words: list[str]) -> int:
    """Run a script to its end, once for each element of its array, all at once."""
    _, words = split(words)
    asked = [line.split()[1] for line in Path(words[0]).read_text().splitlines()
             if line.startswith("#SBATCH")]  # fmt: skip
    nodes, tasks, array = map(int, os.environ["FAKE_SLURM"].split())
    per_node = any(option.startswith("--ntasks-per-node") for option in asked)
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks),
        **({"SLURM_NTASKS_PER_NODE": str(tasks)} if per_node else {}),
    }
    elements = range(1, array + 1) if any(o.startswith("--array") for o in asked) else [0]
    jobs = []
    for element in elements:
        own = {}
        if element:
            own = {
                "SLURM_ARRAY_TASK_ID": str(element),
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_COUNT": str(array),
            }
        jobs.append(subprocess.Popen(["bash", *words], env=os.environ | job | own))
    statuses = [each.wait() for each in jobs]
    sys.stdout.write(job["SLURM_JOB_ID"] + "\n")
    return max(statuses)


def srun(words: list[str]) -> int:
    """Start the tasks of a step and wait for them; with --kill-on-bad-exit one ends all."""
    options, words = split(words)
    tasks = int(os.environ["SLURM_NTASKS"])
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", tasks))
    step = {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost"}
    running = []
    for rank in range(tasks):
        place = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_NODEID": str(rank // per_node),
        }
        running.append(subprocess.Popen(words, env=os.environ | step | place))
    Path(os.environ.get("FAKE_SLURM_PIDS", os.devnull)).write_text(
        " ".join(str(each.pid) for each in running)
    )
    ending = any(option.startswith("--kill-on-bad-exit") for option in options)
    while None in [each.poll() for each in running]:
        if ending and any(each.returncode for each in running):
            time.sleep(5)
            for each in running:
                if each.poll() is None:
                    each.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    return max(each.returncode if each.returncode >= 0 else 128 - each.returncode
               for each in running)  # fmt: skip


def scontrol(words: list[str]) -> int:
    """Note what was asked."""
    Path(os.environ["FAKE_SLURM_LOG"]).write_text(" ".join(words))
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
