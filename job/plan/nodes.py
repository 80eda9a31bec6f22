"""Environment variables and files of whoever rents the machines in, how the trainer's processes are spread over them out.

Each engine tells its containers in words of its own which of several machines they are; here they become one layout. The first
rule whose variables are set counts. What is not handled: machines with different numbers of GPUs; an engine that adds or takes
machines while the run goes on: that is a stop and a new start.

Sources: docs.pytorch.org/docs/stable/elastic/run.html (PET_*), docs.runpod.io/instant-clusters/configuration,
docs.skypilot.co/en/latest/running-jobs/environment-variables.html, dstack.ai/docs/concepts/tasks (DSTACK_*),
docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html (resourceconfig.json),
docs.aws.amazon.com/batch/latest/userguide/job_env_vars.html; read 2026-08 to 2026-11.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from job.errors import MachineError

DEFAULT_PORT = 29500
"""torchrun's."""
SAGEMAKER_FILE = Path("/opt/ml/input/config/resourceconfig.json")


class Nodes(BaseModel):
    """The machines of one run, as one of them sees it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    num_nodes: int = 1
    node_rank: int = 0
    processes_per_node: int = 1
    """Trainer processes (ranks) on each machine: one a GPU."""
    master_address: str = "127.0.0.1"
    """Of the machine with node_rank 0, for the others."""
    master_port: int | None = None
    """None on one machine: any free one."""
    engine: str = ""
    """Whose variables said so; empty for a machine of its own."""

    @property
    def num_processes(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.processes_per_node

    @property
    def is_leader(self) -> bool:
        """Whether this machine keeps the run: its ledger, checkpoints, report and adapter."""
        return self.node_rank == 0


class _Names(NamedTuple):
    """Environment variables of an engine."""

    engine: str
    num_nodes: str
    node_rank: str
    per_node: str | None
    address: str
    port: str | None


_ENGINES = (
    _Names("torchrun", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT"),
    _Names("Kubeflow", "PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    _Names("RunPod cluster", "NUM_NODES", "NODE_RANK", "NUM_TRAINERS", "MASTER_ADDR", "MASTER_PORT"),
    _Names("SkyPilot", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_IPS", None),
    _Names("dstack", "DSTACK_NODES_NUM", "DSTACK_NODE_RANK", "DSTACK_GPUS_PER_NODE", "DSTACK_MASTER_NODE_IP", None),
    _Names(
        "AWS Batch",
        "AWS_BATCH_JOB_NUM_NODES",
        "AWS_BATCH_JOB_NODE_INDEX",
        None,
        "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS",
        None,
    ),
)
"""RunPod also says PRIMARY_ADDR and PRIMARY_PORT, which are the same as MASTER_*."""


def find_nodes(
    environ: Mapping[str, str], *, num_gpus: int, per_node: int | None = None, sagemaker_file: Path = SAGEMAKER_FILE
) -> Nodes:
    """Read the layout that an engine tells.

    Args:
        num_gpus: of this machine; each gets a process, unless something else is asked for.
        per_node: NPROC_PER_NODE, when the user has set it.

    Raises:
        MachineError: a variable of several machines is missing or makes no sense.
    """
    local = per_node or max(1, num_gpus)
    for names in _ENGINES:
        if _number(environ, names.num_nodes, 1) > 1:
            return _read(names, environ, local, asked=per_node)
    if sagemaker_file.is_file():
        return _sagemaker(sagemaker_file, local)
    return Nodes(processes_per_node=local)


def _read(names: _Names, environ: Mapping[str, str], local: int, *, asked: int | None) -> Nodes:
    num_nodes = _number(environ, names.num_nodes, 1)
    if names.node_rank not in environ:
        raise MachineError(
            f"{names.num_nodes}={num_nodes}: says that there are several machines, and {names.node_rank} does not say which "
            f"of them this is; set it to 0 to {num_nodes - 1}, another on each"
        )
    node_rank = _number(environ, names.node_rank, 0)
    if node_rank >= num_nodes:
        raise MachineError(f"{names.node_rank}={node_rank}: must be below {names.num_nodes}={num_nodes}; count from 0")
    told = environ.get(names.address, "").split()
    address = told[0] if told else ("127.0.0.1" if node_rank == 0 else "")
    if not address:
        raise MachineError(
            f"{names.address}: is not set, and this machine ({names.node_rank}={node_rank} of {num_nodes}) cannot find the "
            "first one; set it to that machine's address"
        )
    port = _number(environ, names.port, DEFAULT_PORT) if names.port else DEFAULT_PORT
    per_node = asked
    if per_node is None and names.per_node and environ.get(names.per_node, "").isdigit():  # torchrun also takes "gpu", "auto"
        per_node = int(environ[names.per_node]) or None
    return Nodes(
        num_nodes=num_nodes,
        node_rank=node_rank,
        processes_per_node=per_node or local,
        master_address=address,
        master_port=port,
        engine=names.engine,
    )


def _sagemaker(file: Path, local: int) -> Nodes:
    told = json.loads(file.read_text("utf-8"))
    hosts, current = sorted(told["hosts"]), told["current_host"]
    if len(hosts) == 1:
        return Nodes(processes_per_node=local)
    return Nodes(
        num_nodes=len(hosts),
        node_rank=hosts.index(current),
        processes_per_node=local,
        master_address=hosts[0],
        master_port=DEFAULT_PORT,
        engine="SageMaker",
    )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if name.endswith("NNODES") and ":" in text:  # torchrun's elastic range, MIN:MAX
        text = text.partition(":")[2]
    if not text.isdigit():
        raise MachineError(f"{name}={text}: must be a whole number; correct it, or unset it on a machine of its own")
    return int(text)
