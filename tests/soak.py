"""Kills studies again and again, at random moments of every stage, and compares how they end.

    python tests/soak.py --kills 36 --seed 0

Each study is given once without a kill and then several times, each time killed in another stage:
the process by SIGKILL, SIGTERM or Ctrl-C, its whole group by SIGTERM as a cluster does, or one of
its loading workers by SIGKILL as the system does when memory runs out. The command that was killed
is given again until nothing is left to kill; then embeddings, weights and predictions must be those
of the first study, bit for bit, and nothing temporary may be left. Exit status 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import write_heads

OPTIONS = ("--target", "age", "sex", "--spacing", "8", "--max-epochs", "30", "--batch-size", "4")
SAME = (
    "desc-dcl_embeddings.npy",
    "desc-dcl_embeddings.tsv",
    "desc-dcl*_predictions.tsv",
    "desc-dcl*_metrics.json",
    "models/desc-dcl/weights.safetensors",
    "logs/inputs.tsv",
)

STAGES = ("start", "index", "check", "cache", "train", "checkpoint", "embed", "predict", "report")

BEGINS = {
    "index": r"config: ",
    "check": r"checking images: ",
    "cache": r"preparing volumes: ",
    "train": r"training: ",
    "embed": r"embed: begins",
    "predict": r"predict: begins",
    "report": r"report: begins",
}
"""What the log says when a stage begins."""

LASTS = {"start": 2.0, "index": 0.1, "check": 0.1, "cache": 0.2, "train": 3.0, "checkpoint": 0.0,
         "embed": 0.5, "predict": 4.0, "report": 2.0}  # fmt: skip
"""Seconds after its beginning in which a stage is killed."""

PLAN = (
    *STAGES[:4],
    "train",
    "checkpoint",
    "train",
    "checkpoint",
    "embed",
    "predict",
    "predict",
    "report",
)
"""Where a study is killed, one time after another."""

WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "group", "worker")


class DiffersError(AssertionError):
    """A study that was killed did not go on as it should."""


@dataclass
class Study:
    """A study in a folder, given by one command that may be killed."""

    bids: Path
    out: Path
    options: tuple[str, ...] = OPTIONS
    told: list[str] = field(default_factory=list)

    def begin(self) -> subprocess.Popen[str]:
        """Give the command."""
        command = [sys.executable, "-m", "nidl_dcl", "study", str(self.bids), str(self.out)]
        return subprocess.Popen(
            [*command, *self.options, "--threads", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self) -> None:
        """Give the command and let it end."""
        process = self.begin()
        said = process.communicate(timeout=600)[1]
        if process.returncode != 0:
            raise DiffersError(f"{self.out} did not end well: {said}")

    def log(self, logs_before: set[Path]) -> str:
        """Return the log of the run under way."""
        files = set((self.out / "logs").glob("*.log")) - logs_before
        return "".join(file.read_text("utf-8") for file in files)

    def kill(self, stage: str, way: str, moment: float) -> tuple[str, str] | None:
        """Give the command and kill it after a stage began, or a later one if that is done.

        Parameters
        ----------
        stage, way : str
            One of `STAGES` and of `WAYS`.
        moment : float
            Where in the stage, from 0 to 1.

        Returns
        -------
        tuple of str, or None
            The stage, and how the run ended; None when it ended by itself before.
        """
        before = set((self.out / "logs").glob("*.log"))
        process = self.begin()
        stage = self._wait_for(stage, process, before)
        delay = moment * LASTS[stage]
        time.sleep(delay)
        running = process.poll() is None
        if not running or not self._strike(process, way):
            said = process.communicate(timeout=600)[1]
            if process.returncode != 0:
                raise DiffersError(
                    f"{way} in {stage}: ended by itself, {process.returncode}: {said}"
                )
            return None
        said = process.communicate(timeout=300)[1]
        last = (self.log(before).splitlines() or ["nothing was logged yet"])[-1]
        if last.endswith("Done: exit status 0."):
            return None  # while Python was taken down
        self._check_end(stage, way, process.returncode, said, last)
        told = re.sub(r"^\S+ +(\S+) .*? MB +", r"\1: ", self._last_told(before))
        step = json.loads((self.out / "logs" / "run.json").read_text())["stages"] if before else []
        resumed = [s["resumed_from_step"] for s in step if s["resumed_from_step"]]
        went_on = f", had gone on from step {resumed[0]}" if resumed else ""
        return stage, (
            f"{way:<7} in {stage:<10} {delay:4.2f} s after it began, at “{told[:60]}”: "
            f"status {process.returncode}{went_on}"
        )

    def _wait_for(self, stage: str, process: subprocess.Popen[str], before: set[Path]) -> str:
        later = [x for x in STAGES[STAGES.index(stage) :] if x in BEGINS]
        if stage in ("embed", "predict"):  # a report is written before these, too
            later.remove("report")
        while process.poll() is None and stage != "start":
            if stage == "checkpoint":
                parts = self.out.glob(".work/checkpoints-*/.step-*.part")
                if next(parts, None) is not None:
                    return stage
            log = self.log(before)
            if begun := [x for x in later if re.search(BEGINS[x], log)]:
                return begun[0]
            time.sleep(0.0005 if stage == "checkpoint" else 0.005)
        return stage

    def _strike(self, process: subprocess.Popen[str], way: str) -> bool:
        if way == "worker":
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                if workers := _children(process.pid):
                    os.kill(workers[0], signal.SIGKILL)
                    return True
                time.sleep(0.005)
            return False
        if way == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(getattr(signal, way))
        return True

    def _check_end(self, stage: str, way: str, status: int, said: str, last: str) -> None:
        """Hold how a killed run ended against what is documented."""
        allowed = {"SIGKILL": {-9}, "SIGTERM": {143}, "SIGINT": {130}, "group": {143}}
        # A worker that had nothing left to do is not missed.
        expected = allowed.get(way, {0, 1})
        if stage == "start":  # perhaps before Python has set up what it does at a signal
            expected = expected | {-15, -2, 1}
        if status not in expected:
            raise DiffersError(f"{way} in {stage}: status {status}, said {said!r}")
        if way == "worker" and status == 1 and "A loading worker died" not in said:
            raise DiffersError(f"{way} in {stage}: said {said!r}")
        if (
            "nothing" not in last
            and status in (1, 130, 143)
            and f"Exit status {status}" not in last
        ):
            raise DiffersError(f"{way} in {stage}: the log ends with {last!r}")

    def _last_told(self, before: set[Path]) -> str:
        """Return the last line of the log before it tells of the kill."""
        told = self.log(before).partition("MB  Traceback")[0].splitlines()
        lines = [line for line in told if "MB  " in line and not line.endswith("MB  ")]
        return lines[-1] if lines else "nothing logged yet"

    def digests(self) -> dict[str, str]:
        """Return the checksums of the results."""
        files = sorted(file for pattern in SAME for file in self.out.glob(pattern))
        return {
            file.relative_to(self.out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        }

    def check_against(self, whole: Study) -> None:
        """Hold a study that was killed against one that was not."""
        mine, theirs = self.digests(), whole.digests()
        differing = [name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)]
        if differing:
            raise DiffersError(f"{self.out}: these files differ: {sorted(differing)}")
        left = [p for p in self.out.rglob("*") if p.name.endswith((".part", ".ready", ".making"))]
        left += list(self.out.glob(".work/checkpoints-*"))
        if left:
            raise DiffersError(f"{self.out}: these were left: {left}")
        lines = (self.out / "logs" / "metrics.csv").read_text().splitlines()
        epochs = [int(line.partition(",")[0]) for line in lines[1:]]
        if epochs != list(range(1, len(epochs) + 1)):
            raise DiffersError(f"{self.out}: the training curve has the epochs {epochs}")
        page, known = ((s.out / "report.html").read_text() for s in (self, whole))
        if page.count("<figure") != known.count("<figure"):
            raise DiffersError(f"{self.out}: the report has other figures")

    def resumed(self) -> list[int | None]:
        """Return the steps from which the runs' trainings went on, as ``logs/run.json`` has them."""
        record = json.loads((self.out / "logs" / "run.json").read_text())
        stages = [stage for run in (*record["earlier"], record) for stage in run["stages"]]
        return [
            s["resumed_from_step"] for s in stages if s["name"] == "pretrain" and not s["skipped"]
        ]


def _children(pid: int) -> list[int]:
    """Return the loading workers of a process."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in tasks.read_text().split()]
        except OSError:
            continue
    return [child for child in found if _is_worker(child)]


def _is_worker(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().count(b"nidl_dcl") > 0
    except OSError:
        return False


def main() -> int:
    """Soak, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=36, help="how many, at least (36)")
    parser.add_argument("--seed", type=int, default=0, help="of stages, moments and ways (0)")
    parser.add_argument("--participants", type=int, default=10, help="of the dataset (10)")
    chosen = parser.parse_args()
    # A shell that runs this in the background has it ignore Ctrl-C, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dice = random.Random(chosen.seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        bids = write_heads(Path(place) / "bids", chosen.participants)
        whole = Study(bids, Path(place) / "whole")
        whole.finish()
        _say(f"A study without kills took {time.monotonic() - begun:.0f} s.")
        kills = studies = 0
        by_stage = dict.fromkeys(STAGES, 0)
        faults = []
        while kills < chosen.kills:
            studies += 1
            workers = "0" if studies % 2 else "2"
            study = Study(bids, Path(place) / f"killed{studies}", (*OPTIONS, "--nprocs", workers))
            _say(f"Study {studies}, {workers} loading workers")
            try:
                for stage in PLAN:
                    ways = (*WAYS, "worker") if workers != "0" and stage == "train" else WAYS[:-1]
                    way = "SIGKILL" if stage == "checkpoint" else dice.choice(ways)
                    done = study.kill(stage, way, dice.random())
                    if done is not None:
                        kills += 1
                        by_stage[done[0]] += 1
                        _say(f"  {kills:>3}  {done[1]}")
                study.finish()
                study.check_against(whole)
            except (DiffersError, subprocess.TimeoutExpired) as error:
                faults.append(str(error))
                _say(f"  FAULT: {error}")
                kills += 1  # so that it ends
                continue
            _say(f"  ends as the first study; its trainings began at steps {study.resumed()}")
        files = whole.digests()
        _say(
            f"{kills} kills of {studies} studies in {(time.monotonic() - begun) / 60:.0f} minutes:"
        )
        _say("  " + ", ".join(f"{stage} {count}" for stage, count in by_stage.items()))
        _say(f"  {len(files)} files of each study compared; {len(faults)} faults")
        for name, digest in files.items():
            _say(f"  {digest[:16]}  {name}")
    return 1 if faults else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
