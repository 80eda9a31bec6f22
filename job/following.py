"""The run on a machine that is not the first of several: its ranks train with the others, and nothing is kept from here.

It brings the model and, once the first machine has ordered a start, the prepared data and the checkpoint from the store; after
each end of its ranks it waits for the next order, or for the run's end. What is not handled: machines that come later or leave:
the whole run stops, with a checkpoint, and starts again.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from job.assignment import assign, rank_environs
from job.display import Display
from job.errors import JobError, NetworkError, PreemptedError, error_for_status
from job.events import Stopped
from job.keep.checkpoints import restore_latest
from job.keep.store import Store
from job.lookout import LOOK_SECONDS, Lookout
from job.orders import End, Order, begin, find_end, find_order, give_end, leave
from job.plan.hardware import find_devices
from job.settings import Settings
from job.stages import Stages
from job.stopping import StopRequest
from job.supervise import ChildFailedError
from job.train.spec import TrainSpec
from job.trained import is_done

WAIT_SECONDS = 3600.0
"""How long nothing may be ordered: the first machine may download and prepare for long, and is paid for all the same."""

LEAVE_SECONDS = 5.0
SETTLE_SECONDS = 180.0
"""How long an end that already lies there is taken for an earlier start's: machines do not begin at the same moment."""


class StaleError(Exception):
    """An order cannot be followed: it is of an earlier start, or the store is not yet what it says."""


class Following:
    """One start of the run on a further machine."""

    def __init__(
        self,
        settings: Settings,
        *,
        run_id: str,
        store: Store,
        work: Path,
        environ: Mapping[str, str],
        display: Display,
        stop: StopRequest,
        stages: Stages,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._settings, self._run_id, self._store, self._work, self._environ = settings, run_id, store, work, environ
        self._display, self._stop, self._stages, self._wait_seconds = display, stop, stages, wait_seconds
        self._done: Order | None = None
        self._started = time.monotonic()
        self._old_end: End | None = None

    def share(self, lead: Callable[[], int], model_dir: Callable[[], Path]) -> int:
        """Do this machine's part; the first one leads the run, and tells the others how it ended. Returns 0.

        Raises:
            JobError: how the run ended.
        """
        nodes = self._stages.planner.nodes
        if nodes.num_nodes == 1:
            return lead()
        self._display.say(f"machine {nodes.node_rank + 1} of {nodes.num_nodes}, as {nodes.engine} tells")
        if not nodes.is_leader:
            self._work.mkdir(parents=True, exist_ok=True)
            try:
                return self.run(model_dir)
            except BaseException as error:
                self._leave(nodes.node_rank, str(error) or type(error).__name__)
                raise
        try:
            with self._stop.at_once():
                begin(self._store)
            status = lead()
        except JobError as error:
            self._give_end(error.exit_status, str(error))
            raise
        except Exception as bug:
            self._give_end(1, f"{type(bug).__name__}: {bug}")
            raise
        self._give_end(status, "")
        return status

    def _give_end(self, exit_status: int, message: str) -> None:
        try:
            give_end(self._store, exit_status, message, self._work)
        except JobError as error:  # the others notice by themselves, later
            self._display.say(f"warning: the other machines are not told of the end: {error}")

    def _leave(self, node_rank: int, why: str) -> None:
        """Tell the first machine, which would wait for this one else."""
        with suppress(JobError), self._stop.within_grace(LEAVE_SECONDS):
            leave(self._store, node_rank, why, self._work)

    def run(self, model_dir: Callable[[], Path]) -> int:
        """Train as the first machine orders, until the last step; returns 0.

        Args:
            model_dir: where the model lies, once it is fetched.

        Raises:
            JobError: with the exit status of the first machine when the run ends otherwise.
        """
        with self._stop.at_once():
            if is_done(self._store):
                self._display.say(f"already done: {self._store.uri}; nothing to do")
                return 0
            self._old_end = find_end(self._store, self._work)
        try:
            self._stages.fetch()
        except ChildFailedError as failure:
            raise failure.error from None
        while (order := self._wait_for_order()) is not None:
            self._done = order
            try:
                self._follow(order, model_dir())
            except StaleError as error:
                self._display.say(f"{error}; waiting for another order")
                continue
            except ChildFailedError as failure:
                if self._stop.is_asked():
                    raise self._stop.error() from failure
                if failure.stopped is Stopped.PREEMPTED:
                    raise PreemptedError("another machine of this run was stopped; start all again to continue") from failure
                self._display.say(f"{failure.error}; waiting for what the first machine does about it")
                continue
            self._display.say("done here: the first machine delivers what was trained")
            return 0
        self._display.say(f"already done: {self._store.uri}; nothing to do")
        return 0

    def _wait_for_order(self) -> Order | None:
        """An order that was not followed yet; None when the run is done. Raises what it ended with otherwise."""
        self._display.stage("waiting for the first machine")
        deadline = time.monotonic() + self._wait_seconds
        while time.monotonic() < deadline:
            self._stop.check()
            self._display.heartbeat()
            try:
                if (end := self._news_of_end()) is not None:
                    if end.exit_status == 0:
                        return None
                    raise error_for_status(end.exit_status, f"the first machine says: {end.message}")
                order = find_order(self._store, self._work)
            except NetworkError as error:
                self._display.say(f"warning: {error}")
                order = None
            if order is not None and (self._done is None or order.id != self._done.id):
                return order
            with self._stop.at_once():
                time.sleep(LOOK_SECONDS)
        raise PreemptedError(
            f"the first machine has ordered nothing for {self._wait_seconds / 60:g} minutes; start all machines again to continue"
        )

    def _news_of_end(self) -> End | None:
        """How the run has ended; not how an earlier start did, whose word the first machine takes back when it begins."""
        end = find_end(self._store, self._work)
        is_old = end is not None and self._old_end is not None and end.id == self._old_end.id
        return None if is_old and (self._done or time.monotonic() < self._started + SETTLE_SECONDS) else end

    def _follow(self, order: Order, model_dir: Path) -> None:
        with self._stop.at_once():
            if (data_dir := self._stages.restore_prepared()) is None:
                raise StaleError("the store does not hold the data that the first machine has prepared")
            resume_from = restore_latest(self._store, self._work / "checkpoints", self._warn, at_most=order.resume_step or 0)
        step = int(resume_from.name.removeprefix("step-")) if resume_from else None
        if step != order.resume_step:
            raise StaleError(f"the store does not hold the checkpoint of step {order.resume_step} that the run goes on from")
        gpus, nodes = find_devices(self._environ), self._stages.planner.nodes
        spec = assign(
            self._settings,
            run_id=self._run_id,
            work=self._work,
            model_dir=model_dir,
            data_dir=data_dir,
            resume_from=resume_from,
            num_steps=order.num_steps,
            fit=order.fit,
            rollback=order.rollback,
            save_interval_seconds=1e9,  # the first rank's clock decides
            expect_gpu=bool(gpus),
            order_id=order.id,
        )
        self._train(spec, rank_environs(nodes, self._environ, num_gpus=len(gpus), warn=self._display.say))

    def _train(self, spec: TrainSpec, ranks: list[dict[str, str]]) -> None:
        """Run this machine's ranks; GPUs wait for a machine that is gone for ever, so the store is asked beside them."""
        watch = Lookout(self._is_over)
        with watch:
            self._stages.run_child(
                "train",
                spec,
                allowed=(),
                environ={"HF_HUB_OFFLINE": "1"},
                hang_seconds=self._settings.keep.hang_seconds,
                ranks=ranks,
                is_pointless=lambda: watch.has_seen,
            )

    def _is_over(self) -> bool:
        """Whether the first machine has ordered something else since, or has ended."""
        order = find_order(self._store, self._work)
        return self._news_of_end() is not None or (order is not None and self._done is not None and order.id != self._done.id)

    def _warn(self, text: str) -> None:
        self._display.say(f"warning: {text}")
