"""Many processes: 2 and 3 of them, by gloo on the CPU, against one process on the joined batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import many_processes as scenarios
import pytest
import torch
from many_processes import Run, rows

from nidl_dcl.distributed import by_itself, gather_objects, gather_rows, gather_targets, world

SCRIPT = Path(scenarios.__file__)
EXACT = {"rtol": 1e-6, "atol": 1e-6}
STEPS = (
    "array",
    "array_in_small_batches",
    "accumulated",
    "dataset_with_targets",
    "loader",
    "loader_shuffled",
    "loader_dropping",
    "data_module",
    "warm_cosine",
    "double_precision",
    "regional",
)
IN_DOUBLE_PRECISION = (
    "double_precision",
    "regional",
    "array_in_small_batches",
    "loader",
    "loader_shuffled",
    "data_module",
)
OTHERS = (
    "transforms",
    "no_seed",
    "shuffled_without_generator",
    "mixed_targets",
    "not_a_number",
    "resumed",
    "batch_norm",
    "by_itself",
    "streams_of_unequal_length",
    "fewer_samples_than_processes",
    "bare_steps",
    "probed",
)


BY_THREE = ("array", "accumulated", "data_module", "transforms", "not_a_number", "resumed",
            "streams_of_unequal_length", "fewer_samples_than_processes", "bare_steps")  # fmt: skip
"""What is looked at with three processes, too: rows and batches that do not divide."""
BY_TWO = pytest.mark.parametrize("group", [2], indirect=True)


def launch(folder, command, timeout=600):
    """Run a command to its end, or kill it with all that it started."""
    free = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**free, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = f"not at an end after {timeout} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert status == 0, f"{status}\n{(folder / 'log.txt').read_text()[-6000:]}"


def read(folder, name, rank):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=False)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Return a function that starts a number of processes, once, and returns what reads their files."""

    @cache
    def start(processes):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        names = [*STEPS, *OTHERS] if processes == 2 else BY_THREE
        launch(folder, [*torchrun, SCRIPT, folder, "ddp", processes, *names])
        return lambda name: [read(folder, name, rank) for rank in range(processes)]

    return start


@pytest.fixture(params=[2, 3])
def group(request, launched):
    """Return the number of processes, and what each gave for a scenario."""
    return request.param, launched(request.param)


def one(name, processes, folder):
    """Return what one process gives on the batches of several."""
    return getattr(scenarios, name)(Run(folder).joined(processes))


def assert_same(got, want, **tolerance):
    torch.testing.assert_close(got, want, **(tolerance or EXACT), equal_nan=True)


def _listed(y):
    return y.tolist() if isinstance(y, torch.Tensor) else y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"),
    [(2, name) for name in STEPS] + [(3, name) for name in STEPS if name in BY_THREE],
    indirect=["group"],
)
def test_training_equals_one_process_on_the_joined_batch(group, name, tmp_path):
    processes, found = group
    want = one(name, processes, tmp_path)
    for got in found(name):
        sharp = {"rtol": 1e-12, "atol": 1e-12} if name in IN_DOUBLE_PRECISION else EXACT
        assert_same(got["state"], want["state"], **sharp)
        assert_same(got["rows"], want["rows"])
        assert [m.keys() for m in got["epochs"]] == [m.keys() for m in want["epochs"]]
        for ours, alone in zip(got["epochs"], want["epochs"], strict=True):
            assert ours == pytest.approx(alone, rel=1e-4, abs=1e-6)
            assert ours["loss/train"] == pytest.approx(alone["loss/train"], abs=1e-6)
        assert got["validations"] == want["validations"]
        assert len(got["steps"]) == len(want["steps"])
        for ours, alone in zip(got["steps"], want["steps"], strict=True):
            assert_same([ours["z1"], ours["z2"]], [alone["z1"], alone["z2"]])
            assert _listed(ours["y"]) == _listed(alone["y"])
            assert len(ours["z1"]) == len(ours["z2"])
            assert ours["y"] is None or len(ours["y"]) == len(ours["z1"])


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 5])
def test_transform_gives_every_row_once_in_input_order_on_every_process(group, n):
    _, found = group
    for got in found("transforms"):
        model = Run(".").make()
        model.load_state_dict(got["state"])
        want = model.encoder(rows(n, n)).detach()
        for kind, result in got[n].items():
            features, targets = result if isinstance(result, tuple) else (result, None)
            assert_same(torch.as_tensor(features), want)
            if targets is not None:
                names = [f"sub-{i}" for i in range(n)]
                assert list(targets) == (names if kind == "with names" else list(range(n)))
        assert_same(got["module"], model.encoder(rows(7, 3)).detach())


@pytest.mark.slow
@BY_TWO
def test_without_a_seed_the_processes_agree_on_one(group):
    _, found = group
    first, *others = found("no_seed")
    for other in others:
        assert_same(other["state"], first["state"], rtol=0, atol=0)
    batches = [y.tolist() for y in first["y"]]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(13))


@pytest.mark.slow
@BY_TWO
def test_a_shuffling_loader_of_the_caller_yields_every_sample_once(group):
    _, found = group
    for got in found("shuffled_without_generator"):
        seen = [i for y in got["y"] for i in y.tolist()]
        assert sorted(seen) == list(range(13))
        assert seen != sorted(seen)


@pytest.mark.slow
@BY_TWO
def test_targets_of_any_form_are_gathered_in_order(group):
    _, found = group
    for got in found("mixed_targets"):
        ages = torch.cat([y["age"] for y in got["y"]])
        assert ages.tolist() == [float(i) for i in range(13)]
        assert torch.cat([y["seen"] for y in got["y"]]).tolist() == [i % 2 == 0 for i in range(13)]


@pytest.mark.slow
def test_a_nan_in_one_process_stops_all_with_the_sample_and_the_last_good_weights(group, tmp_path):
    processes, found = group
    want = one("not_a_number", processes, tmp_path)
    assert "(7)" in want["error"]
    for got in found("not_a_number"):
        assert got["error"] == want["error"]
        assert_same(got["state"], want["state"])
        assert got["loader_error"] == want["loader_error"]
        assert_same(got["loader_state"], want["loader_state"])
        assert "Sample 1 of batch 1 has NaN" in got["transform_error"]
        assert_same(got["after"], want["after"])


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(group):
    processes, found = group
    # Of more than two processes, a resumed DistributedDataParallel sums in another order at first.
    sharp = {"rtol": 0, "atol": 0} if processes == 2 else EXACT
    for got in found("resumed"):
        assert_same(got["resumed"], got["whole"], **sharp)
        assert_same(got["resumed without seed"], got["whole without seed"], **sharp)


@pytest.mark.slow
@BY_TWO
def test_batch_statistics_on_the_cpu_are_warned_of_and_end_alike(group):
    _, found = group
    first, *others = found("batch_norm")
    assert "cannot be synchronized on the CPU" in first["said"][0]
    for other in others:
        assert other["said"] == []
        assert_same(other["state"], first["state"], rtol=0, atol=0)
        assert_same(other["rows"], first["rows"], rtol=0, atol=0)


@pytest.mark.slow
@BY_TWO
def test_one_device_works_by_itself_while_a_group_is_running(group, tmp_path):
    _, found = group
    got = found("by_itself")[0]
    want = one("array", 1, tmp_path)
    assert_same(got["state"], want["state"])
    assert_same(got["rows"], want["rows"])


@pytest.mark.slow
def test_streams_end_together_and_are_the_callers_to_divide(group):
    processes, found = group
    for got in found("streams_of_unequal_length"):
        assert [len(step["z1"]) for step in got["steps"]] == 2 * [4 * processes]
        assert f"each of the {processes} processes must yield" in got["said"][0]


@pytest.mark.slow
def test_fewer_samples_than_processes_are_an_error_everywhere(group):
    processes, found = group
    for got in found("fewer_samples_than_processes"):
        for error in got.values():
            assert f"fewer samples ({processes - 1}) than processes ({processes})" in error


@pytest.mark.slow
def test_steps_without_a_trainer_have_the_gradient_of_one_process(group, tmp_path):
    processes, found = group
    want = one("bare_steps", processes, tmp_path)
    for got in found("bare_steps"):
        assert_same(got, want)
        assert got["y"].tolist() == list(range(11))


@pytest.mark.slow
@BY_TWO
def test_a_probe_scores_the_rows_of_all_processes_in_order(group, tmp_path):
    processes, found = group
    want = one("probed", processes, tmp_path)
    for got in found("probed"):
        assert got["scores"] == [(e, pytest.approx(s, abs=1e-4)) for e, s in want["scores"]]
        assert got["baselines"] == pytest.approx(want["baselines"], abs=1e-4)
        assert_same(got["state"], want["state"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_strategies_that_start_the_processes_themselves(strategy, tmp_path):
    launch(tmp_path, [SCRIPT, tmp_path, strategy, 2, "array", "loader"])
    for name in ("array", "loader"):
        want = one(name, 2, tmp_path)
        for rank in range(2 if strategy == "ddp" else 1):
            got = read(tmp_path, name, rank)
            # ddp_spawn brings the weights back into a model that is still in single precision
            for key in ("state", "rows"):
                assert_same(got[key], want[key], **EXACT, check_dtype=strategy == "ddp")


# -- one process -----------------------------------------------------------------------------


def test_one_process_needs_no_group():
    x = torch.ones(3, 2)
    assert world() == (0, 1)
    assert gather_rows(x) == (x, 0)
    assert gather_objects("a") == ["a"]
    assert gather_targets(["a"], 1) == ["a"]
    with by_itself():
        assert world() == (0, 1)
