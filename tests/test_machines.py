"""One run on several machines: two supervisors with disks of their own and one store, a rank each, over gloo on this machine."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import Job, share_footprints, small_run

from job.errors import MachineError
from job.keep.checkpoints import list_steps
from job.keep.store import open_store
from job.orders import Order, give_order, new_id
from job.plan.nodes import Nodes, find_nodes
from job.plan.retreat import Fit, Rollback
from job.supervise import child_environ


class Machines:
    """Two machines of one run."""

    def __init__(self, folder: Path, settings: Mapping[str, str], footprints: Path) -> None:
        self.store = folder / "runs"
        self._jobs = [Job(folder / f"machine-{rank}", {**settings, "OUTPUT_URI": str(self.store)}) for rank in range(2)]
        for job in self._jobs:
            share_footprints(job, footprints)

    def start(self, *ranks: int, **settings: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
        return [self._jobs[rank].start("run", **{**place, "NODE_RANK": str(rank), **settings}) for rank in ranks]

    @property
    def steps(self) -> list[int]:
        return list_steps(open_store(str(self.store / "r")))


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_machines_stop_together_continue_together_and_deliver_once(
    tmp_path: Path, tiny_model: Path, conversations: Path, footprints: Path
) -> None:
    long = small_run(tiny_model, conversations) | {
        "MAX_STEPS": "60",
        "NUM_TRAIN_EPOCHS": "20",
        "PER_DEVICE_TRAIN_BATCH_SIZE": "1",
    }
    machines = Machines(tmp_path, long, footprints)
    stale = Order(
        id=new_id(), resume_step=None, num_steps=3, fit=Fit(micro_batch=1, gradient_accumulation_steps=1), rollback=Rollback()
    )
    give_order(open_store(str(machines.store / "r")), stale, tmp_path)
    both = machines.start(0, 1)
    while not machines.steps:
        assert both[0].poll() is None and both[1].poll() is None, ends(both)
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)  # the further one is taken away
    (first, told), (second, said) = ends(both)
    assert (first, second) == (75, 75), told + said
    stopped_at = max(machines.steps)
    assert 4 <= stopped_at < 60
    (first, told), (second, said) = ends(machines.start(1, 0))[::-1]
    assert (first, second) == (0, 0), told + said
    assert f"continuing after step {stopped_at} of 60" in told
    report = json.loads((machines.store / "r/report.json").read_text("utf-8"))
    assert (report["actual"]["num_steps"], len(report["attempts"])) == (60, 2), "one machine keeps the run"
    assert [output for _, output in ends(machines.start(1)) if "already done" in output]


@pytest.mark.slow
def test_a_machine_hears_why_the_first_one_does_not_begin(
    tmp_path: Path, tiny_model: Path, conversations: Path, footprints: Path
) -> None:
    machines = Machines(tmp_path, small_run(tiny_model, conversations) | {"MIN_SAMPLES": "1000"}, footprints)
    (first, told), (second, said) = ends(machines.start(0, 1))
    assert (first, second) == (3, 3), told + said
    assert "the first machine says" in said and "MIN_SAMPLES" in said


ENGINES = {
    "torchrun": {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},
    "Kubeflow": {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "4",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "1234",
    },
    "RunPod cluster": {
        "NUM_NODES": "2",
        "NODE_RANK": "1",
        "NUM_TRAINERS": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
        "WORLD_SIZE": "8",
    },
    "SkyPilot": {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    },
    "dstack": {
        "DSTACK_NODES_NUM": "2",
        "DSTACK_NODE_RANK": "1",
        "DSTACK_GPUS_PER_NODE": "4",
        "DSTACK_MASTER_NODE_IP": "10.0.0.1",
    },
    "AWS Batch": {
        "AWS_BATCH_JOB_NUM_NODES": "2",
        "AWS_BATCH_JOB_NODE_INDEX": "1",
        "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.1",
    },
}


def test_no_library_hears_of_other_processes_in_stages_that_have_none() -> None:
    told = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "PATH": "/bin"}
    environ = child_environ(told, {})
    assert environ["PATH"] == "/bin" and not environ.keys() & (told.keys() - {"PATH"})


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_tells_which_of_the_machines_this_is(engine: str, tmp_path: Path) -> None:
    found = find_nodes(ENGINES[engine], num_gpus=4, sagemaker_file=tmp_path / "none")
    assert (found.engine, found.num_nodes, found.node_rank, found.processes_per_node) == (engine, 2, 1, 4)
    assert (found.num_processes, found.is_leader, found.master_address) == (8, False, "10.0.0.1")
    assert found.master_port == (1234 if any("PORT" in name for name in ENGINES[engine]) else 29500)
    assert find_nodes(ENGINES[engine], num_gpus=4, per_node=2, sagemaker_file=tmp_path / "none").processes_per_node == 2


def test_sagemaker_tells_it_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "resourceconfig.json"
    file.write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-2", "algo-1"]}), "utf-8")
    found = find_nodes({}, num_gpus=8, sagemaker_file=file)
    assert (found.engine, found.num_nodes, found.node_rank, found.master_address) == ("SageMaker", 2, 1, "algo-1")
    file.write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}), "utf-8")
    assert find_nodes({}, num_gpus=8, sagemaker_file=file) == Nodes(processes_per_node=8)


def test_a_machine_of_its_own_has_a_process_for_each_gpu(tmp_path: Path) -> None:
    alone = {"NNODES": "1", "NODE_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "SKYPILOT_NUM_NODES": "1"}
    assert find_nodes(alone, num_gpus=4, sagemaker_file=tmp_path / "none") == Nodes(processes_per_node=4)
    assert find_nodes({}, num_gpus=0, sagemaker_file=tmp_path / "none").num_processes == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"NODE_RANK": None}, "NODE_RANK does not say which"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NODE_RANK": "first"}, "NODE_RANK=first: must be a whole number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_named(change: dict[str, str | None], complaint: str, tmp_path: Path) -> None:
    environ = {name: value for name, value in {**ENGINES["torchrun"], **change}.items() if value is not None}
    with pytest.raises(MachineError, match=complaint):
        find_nodes(environ, num_gpus=1, sagemaker_file=tmp_path / "none")
