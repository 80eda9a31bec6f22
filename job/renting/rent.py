"""A candidate and a pod's environment in; out, the one pod of this run: the one that is there, or one that is made, never two.

RunPod knows no key that would make a request count once. So a run's pod has the run's name, and after every request whose answer
is not known the pods are listed before another one is sent.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from job.deliver.calls import CallError
from job.errors import MachineError, NetworkError
from job.renting.api import CONSOLE, OLDEST_CUDA, RunPod, job_error
from job.renting.market import Candidate
from job.renting.wishes import MOUNT, SMALLEST_DISK_GB, Wishes

ALIVE = ("PROVISIONING", "STARTING", "RUNNING")
LEFT = ("EXITED", "ERROR")
"""Of a pod that does nothing, but still has its disk."""
LOOKS_SECONDS = (2.0, 4.0, 8.0, 16.0)
"""Waits before each look for a pod whose making was not answered. How long RunPod takes to list one is not documented."""
NUM_TRIES = 3
SMALLEST_CONTAINER_GB = 20
SPARE_GB = 10.0
"""For prepared data, logs and the libraries' caches."""
MARGIN = 1.5
"""Over weights of two bytes a parameter and the checkpoints: a repository may hold more than is needed, or wider numbers."""


class NoCapacityError(Exception):
    """RunPod refuses this kind of GPU; another may be had."""


def pod_name(run_id: str) -> str:
    return f"qlora-{run_id}"


def disk_gb(num_bytes: float) -> int:
    """The container's disk for a run that puts so much on it."""
    return max(SMALLEST_CONTAINER_GB, math.ceil(num_bytes * MARGIN / 1e9 + SPARE_GB))


def pod_body(
    run_id: str, candidate: Candidate, env: Mapping[str, str], wishes: Wishes, *, disk: int, data_center: str | None
) -> dict[str, Any]:
    """A `CreatePodRequest`."""
    body: dict[str, Any] = {
        "name": pod_name(run_id),
        "image": wishes.image,
        "gpu": {"id": candidate.gpu_id, "count": candidate.num_gpus, "minCudaVersion": OLDEST_CUDA},
        "cloud": wishes.cloud,
        "disk": disk,
        "ports": [],
        "startSsh": False,
        "startJupyter": False,
        "env": {**env, "GPU_HOURLY_RATE": f"{candidate.usd_per_hour:.4f}"},
    }
    if wishes.network_volume:
        body["mounts"] = {"network": [{"volumeId": wishes.network_volume, "path": MOUNT}]}
        body["dataCenterIds"] = [data_center]
    elif wishes.has_volume_disk:
        body["mounts"] = {"persistent": {"size": wishes.volume_disk_gb or max(disk, SMALLEST_DISK_GB), "path": MOUNT}}
    return body


def pods_of(run_id: str, output_uri: str, pods: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of this run; a run of the same name that is kept elsewhere is another one."""
    named = (pod for pod in pods if pod["name"] == pod_name(run_id) and pod["status"] in (*ALIVE, *LEFT))
    return [dict(pod) for pod in named if pod["env"].get("OUTPUT_URI", output_uri) == output_uri]


class Renting:
    """The making of one pod.

    Args:
        say: shows a line.
    """

    def __init__(self, runpod: RunPod, *, run_id: str, output_uri: str, say: Callable[[str], None]) -> None:
        self._runpod, self._run_id, self._output_uri, self._say = runpod, run_id, output_uri, say

    def mine(self) -> list[dict[str, Any]]:
        """The run's pods as RunPod lists them."""
        return pods_of(self._run_id, self._output_uri, self._runpod.pods())

    def make(self, body: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Have RunPod make the pod.

        Args:
            before: the run's pods that there were before.

        Raises:
            NoCapacityError: not with this kind of GPU.
            JobError: not at all; or nobody knows, which the text says.
        """
        known = {pod["id"] for pod in before}
        for _ in range(NUM_TRIES):
            try:
                return self._runpod.create(dict(body))
            except CallError as error:
                if error.status in (400, 403):
                    raise NoCapacityError(str(error)) from error
                if error.status is not None and error.status < 500 and error.status != 429:
                    raise job_error(error, "a pod") from error
                failure = error
            self._say(f"RunPod {failure} when asked for a pod; looking whether it made one")
            if (found := self._look(known, failure)) is not None:
                return found
        raise NetworkError(f"RunPod {failure} when asked for a pod, {NUM_TRIES} times, and made none; submit again later")

    def _look(self, known: set[str], failure: CallError) -> dict[str, Any] | None:
        """The pod that the request made, if it did."""
        waits = (max(failure.retry_after_seconds, 1.0),) if failure.status == 429 else LOOKS_SECONDS
        for seconds in waits:
            self._runpod.sleep(seconds)
            try:
                made = [pod for pod in self.mine() if pod["id"] not in known]
            except CallError as error:
                raise NetworkError(
                    f"RunPod {failure} when asked for a pod, and {error} when asked which there are: POD "
                    f"{pod_name(self._run_id)} MAY EXIST AND BILL; submit again, which looks for it first, or look at "
                    f"{CONSOLE}/pods"
                ) from error
            if len(made) > 1:
                names = ", ".join(pod["id"] for pod in made)
                self._say(f"warning: {len(made)} PODS OF THIS RUN ARE BILLING: {names}; delete all but the first: {CONSOLE}/pods")
            if made:
                return made[0]
        return None


def refuse_left(pod: Mapping[str, Any]) -> MachineError:
    """The run lies on the disk of a pod that is stopped."""
    return MachineError(
        f"pod {pod['id']} of this run is {pod['status']}, and its disk holds what was done: start it at {CONSOLE}/pods and "
        "submit again to follow it, or delete it there to begin anew"
    )
