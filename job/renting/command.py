"""`python -m job submit`: forecast here, choose and rent a pod at RunPod, follow it; returns the run's own exit status.

The order is: what is wrong with the settings; a pod of this run that is there already; the forecast; the choice; a yes; the pod.
Nothing is spent before the yes, and no second pod is rented for a run that has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from job.deliver.calls import CallError
from job.deliver.machine import GOOD_ENDS
from job.deliver.record import Record
from job.display import Display
from job.errors import InterruptedRunError, JobError, MachineError, Problem, SettingsError
from job.keep.store import Store, hurried, open_store
from job.plan.price import RUNPOD_API
from job.prepared import known_tally
from job.quote import Quote, make_quote
from job.renting.api import CONSOLE, RunPod, job_error
from job.renting.belongings import Belongings, pack, without_references
from job.renting.following import End, Following
from job.renting.market import Candidate, candidates_table, find_candidates
from job.renting.outcome import find_report, judge
from job.renting.rent import ALIVE, NoCapacityError, Renting, disk_gb, pod_body, refuse_left
from job.renting.telling import Teller, confirm, left_running, pod_line, way_back
from job.renting.wishes import Wishes, read_wishes
from job.settings import Settings
from job.stages import Stages
from job.stopping import StopRequest
from job.supervise import ChildFailedError
from job.trained import DONE

NEXT_AT_MOST = 2.0
"""Times the first choice: so much dearer may the next be that --yes takes without asking again."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One call of the command; the fields are those of `Run`."""

    settings: Settings
    run_id: str
    store: Store
    shared: Store
    work: Path
    environ: Mapping[str, str]
    display: Display
    stop: StopRequest
    flags: Mapping[str, str]
    own: Mapping[str, str]

    def run(self) -> int:
        """Submit the run, and follow it if that is wanted."""
        asked = self.settings.train.nproc_per_node
        wishes = read_wishes(({} if asked == "auto" else {"num_gpus": str(asked)}) | dict(self.own), self.environ)
        belongings = pack(self.settings, wishes, self.environ, self.flags, run_id=self.run_id)
        runpod = RunPod(self.environ.get("RUNPOD_REST_URL") or RUNPOD_API, self._api_key())
        teller = Teller(self.display.say, self.display.redact, as_json=wishes.as_json)
        self.work.mkdir(parents=True, exist_ok=True)
        with self.stop.at_once():
            store = self._reachable_store(belongings)
            if store is not None and DONE in store.list(DONE):
                self.display.say(f"already done: {store.uri}; nothing to rent")
                return 0
        pod = self._pod(runpod, wishes, belongings, teller, is_reachable=store is not None)
        if pod is None:
            self.display.say("nothing is rented")
            return InterruptedRunError.exit_status
        if self.stop.count:  # while the pod was made
            raise left_running(pod["id"])
        if not wishes.follows:
            self.display.say(f"pod {pod['id']} is on its own now\n{way_back(pod['id'])}")
            return 0
        return self._follow(runpod, pod, store, teller)

    def _api_key(self) -> str:
        key = self.settings.secrets.runpod_api_key
        if key is None:
            way_out = f"make one at {CONSOLE}/user/settings"
            raise SettingsError([Problem(setting="RUNPOD_API_KEY", value=None, rule="is required to rent", way_out=way_out)])
        return key.get_secret_value()

    def _reachable_store(self, belongings: Belongings) -> Store | None:
        """The run's folder in an OUTPUT_URI on S3, if this machine may read it."""
        if not belongings.env["OUTPUT_URI"].startswith("s3://"):
            return None
        try:
            next(iter(hurried(self.store).list(DONE)), None)
        except JobError as error:
            self.display.say(f"OUTPUT_URI cannot be reached from here, so the pod's log alone tells how it ends ({error})")
            return None
        return self.store

    def _pod(
        self, runpod: RunPod, wishes: Wishes, belongings: Belongings, teller: Teller, *, is_reachable: bool
    ) -> dict[str, Any] | None:
        """The pod of this run: the one that there is, else a new one; None: the user said no."""
        output_uri = belongings.env["OUTPUT_URI"]
        renting = Renting(runpod, run_id=self.run_id, output_uri=output_uri, say=self.display.say)
        try:
            with FileLock(self.work / "submit.lock", timeout=0):
                with self.stop.at_once():
                    before = self._mine(renting)
                    if (there := next((pod for pod in before if pod["status"] in ALIVE), None)) is not None:
                        self.display.say(
                            f"pod {there['id']} is at this run already, with the settings that it was given; following it"
                        )
                        teller.event("found", run_id=self.run_id, pod=there["id"], usd_per_hour=there["cost"])
                        return there
                    for pod in before:
                        if wishes.has_volume_disk or pod["mounts"].get("persistent"):
                            raise refuse_left(pod)
                        self.display.say(
                            f"pod {pod['id']} of this run is {pod['status']}, and its disk bills; delete it: {CONSOLE}/pods"
                        )
                    place = self._data_center(runpod, wishes)
                quote, num_bytes = self._forecast(output_uri, wishes, is_reachable=is_reachable)
                with self.stop.at_once():
                    candidates = self._choose(runpod, wishes, quote, num_bytes, place, belongings)
                return self._rent(renting, wishes, belongings, candidates, before, disk_gb(num_bytes), place, teller)
        except Timeout:
            raise MachineError(f"RUN_ID={self.run_id}: another process on this machine submits it; wait for it") from None

    def _mine(self, renting: Renting) -> list[dict[str, Any]]:
        try:
            return renting.mine()
        except CallError as error:
            raise job_error(error, "the pods that there are") from error

    def _data_center(self, runpod: RunPod, wishes: Wishes) -> str | None:
        if wishes.network_volume is None:
            return None
        try:
            return str(runpod.volume(wishes.network_volume)["dataCenter"])
        except CallError as error:
            raise job_error(error, f"network volume {wishes.network_volume}") from error

    def _forecast(self, output_uri: str, wishes: Wishes, *, is_reachable: bool) -> tuple[Quote, float]:
        """The quote, and the bytes that the run puts on the pod's disk."""
        self.display.stage("reading the model's shape and the first rows of the data")
        settings = without_references(self.settings)
        shared, store = self.shared, self.store
        if output_uri.startswith("s3://") and not is_reachable:
            shared = store = open_store(str(self.work / "unreachable"))
        stages = Stages(
            settings,
            run_id=self.run_id,
            store=store,
            shared=shared,
            work=self.work,
            environ=self.environ,
            display=self.display,
            stop=self.stop,
            record=Record(settings, self.run_id, store, self.work),
        )
        try:
            tally = known_tally(settings, store, self.work)
            flags = {"num_gpus": str(wishes.num_gpus)}
            quote = make_quote(stages.planner, stages.sizes, settings, flags, tally, scratch=self.work, shared=shared)
        except ChildFailedError as failure:
            raise failure.error from None
        num_bytes = stages.planner.circumstances(quote.footprint).disk_bytes
        if settings.publish.publish_merged:
            num_bytes += 2.0 * quote.footprint.num_parameters
        return quote, num_bytes

    def _choose(
        self, runpod: RunPod, wishes: Wishes, quote: Quote, num_bytes: float, place: str | None, belongings: Belongings
    ) -> list[Candidate]:
        try:
            catalogue = runpod.gpus(cloud=wishes.cloud, num_gpus=wishes.num_gpus)
        except CallError as error:
            raise job_error(error, "its GPUs") from error
        candidates = find_candidates(
            catalogue,
            quote.offers,
            wishes,
            disk_bytes=disk_gb(num_bytes) * 1e9,
            data_center=place,
            limit_usd=self.settings.budget.max_cost_usd,
        )
        if quote.work is None:
            self.display.say(f"data not known, so neither hours nor dollars: {quote.why_unknown or 'nothing to go by'}")
        self.display.table(candidates_table(candidates))
        for text in (*quote.footprint.problems, *quote.advice, *belongings.warnings):
            self.display.say(f"warning: {text}")
        return candidates

    def _rent(
        self,
        renting: Renting,
        wishes: Wishes,
        belongings: Belongings,
        candidates: Sequence[Candidate],
        before: Sequence[Mapping[str, Any]],
        disk: int,
        place: str | None,
        teller: Teller,
    ) -> dict[str, Any] | None:
        """Ask, and make the pod; what is gone meanwhile gives way to the next."""
        refused = ""
        for one in candidates:
            question = f"{refused}Rent {one} in RunPod's {wishes.cloud.lower()} cloud, {disk} GB of disk, image {wishes.image}?"
            if wishes.says_yes and one.rank > NEXT_AT_MOST * candidates[0].rank:
                refused += f"The next, {one}, costs more than --yes agreed to. "
                break
            teller.event("chosen", run_id=self.run_id, gpu=one.gpu_id, usd_per_hour=round(one.usd_per_hour, 4),
                         hours_low=one.hours_low, hours_high=one.hours_high,
                         cost_usd_low=one.cost_low, cost_usd_high=one.cost_high)  # fmt: skip
            if not self._confirm(question, wishes):
                return None
            self.display.say(f"renting {one}")
            try:  # a signal waits: who leaves in the middle would not know whether there is a pod
                pod = renting.make(pod_body(self.run_id, one, belongings.env, wishes, disk=disk, data_center=place), before)
            except NoCapacityError as error:
                refused = f"RunPod {error} for {one.name}. "
                self.display.say(f"{one.name} cannot be had: RunPod {error}")
                if self.stop.count:
                    raise self.stop.error("nothing is rented") from error
                continue
            self.display.say(f"pod {pod['id']} is made: ${float(pod['cost']):.2f} an hour; {CONSOLE}/pods")
            teller.event("rented", run_id=self.run_id, pod=pod["id"], gpu=one.gpu_id, usd_per_hour=pod["cost"])
            return pod
        raise MachineError(
            f"{refused}None of {len(candidates)} kinds of GPU could be had; if each was refused with the same words, they are "
            "about what was asked for (the image, a volume, a quota), else try again later"
        )

    def _confirm(self, question: str, wishes: Wishes) -> bool:
        self.display.__exit__(None, None, None)  # no live line while somebody types
        try:
            with self.stop.at_once():
                return confirm(question, says_yes=wishes.says_yes)
        finally:
            self.display.__enter__()

    def _follow(self, runpod: RunPod, pod: dict[str, Any], store: Store | None, teller: Teller) -> int:
        following = Following(runpod, pod["id"], display=self.display, on_line=teller.log)
        on_finish = str(pod["env"].get("ON_FINISH", "exit"))
        try:
            with self.stop.at_once():
                end = following.follow()
                report, why = find_report(store, pod, self.work)
                outcome = judge(end.told, report, why_no_report=why)
                if end.pod == "running" and outcome.status in GOOD_ENDS and on_finish != "exit":
                    end = following.wait_until_gone()
        except InterruptedRunError as error:
            if self.stop.count:
                raise left_running(pod["id"]) from error
            raise
        self._tell_end(pod, end, outcome.status, outcome.source, outcome.doubt, on_finish, teller)
        return outcome.status

    def _tell_end(
        self, pod: dict[str, Any], end: End, status: int, source: str, doubt: str, on_finish: str, teller: Teller
    ) -> None:
        if doubt:
            self.display.say(f"warning: {doubt}")
        self.display.say(f"run {self.run_id} ended with exit status {status} (by {source})")
        grace = str(pod["env"].get("FAIL_GRACE_MINUTES", "15"))
        is_failed = status not in GOOD_ENDS
        self.display.say(pod_line(pod["id"], end, on_finish=on_finish, is_failed=is_failed, grace_minutes=grace))
        teller.event("ended", run_id=self.run_id, pod=pod["id"], exit_status=status, source=source, doubt=doubt, pod_is=end.pod)
