"""The parts of `submit` over real HTTP: never two pods, every line once, whose word counts, which GPU, what goes along."""

import json
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from reports import rich_report
from runpod_server import ALWAYS, Gpu, Pod, RunPodServer

from job.display import Display
from job.errors import JobError, MachineError, NetworkError, PlanError, SettingsError
from job.keep.store import open_store
from job.plan.hardware import known_gpus
from job.plan.offers import Offer
from job.renting.api import LogLine, RunPod
from job.renting.belongings import Belongings, pack
from job.renting.following import End, Following
from job.renting.market import Candidate, find_candidates
from job.renting.outcome import find_report, judge
from job.renting.rent import NoCapacityError, Renting, pod_body
from job.renting.wishes import Wishes, read_wishes
from job.settings import read_settings

FAST = "NVIDIA GeForce RTX 4090"
WISHES = Wishes(image="example.org/qlora:1", references={}, has_volume_disk=True)
CANDIDATE = Candidate(
    gpu_id=FAST, name="RTX 4090", num_gpus=1, memory_gb=24, usd_per_hour=0.7, hours_low=1.0, hours_high=2.0, availability="LOW"
)
SETTINGS = {"MODEL_ID": "owner/model", "DATASETS": "owner/data"}


class World:
    """A RunPod, who rents there, and what was said."""

    def __init__(self, server: RunPodServer) -> None:
        self.server = server
        self.slept: list[float] = []
        self.said: list[str] = []
        self.runpod = RunPod(f"{server.url}/v2", server.api_key, sleep=self.slept.append)
        self.renting = Renting(self.runpod, run_id="r", output_uri="/workspace/runs", say=self.said.append)

    def make(self, **env: str) -> dict[str, Any]:
        about = {"OUTPUT_URI": "/workspace/runs", "RUN_ID": "r", **env}
        return self.renting.make(pod_body("r", CANDIDATE, about, WISHES, disk=20, data_center=None), self.renting.mine())

    @property
    def num_requests(self) -> int:
        return sum(request.method == "POST" for request in self.server.log)


@pytest.fixture
def world() -> Iterator[World]:
    with RunPodServer() as server:
        server.gpus = [Gpu(id=FAST, memory=24, secure=0.69)]
        yield World(server)


def test_a_lost_answer_to_the_request_for_a_pod_does_not_rent_two(world: World) -> None:
    world.server.fail("/v2/pods", method="POST", kind="lost")
    pod = world.make()
    assert list(world.server.pods) == [pod["id"]] and world.num_requests == 1
    assert "looking whether it made one" in world.said[0]


def test_a_pod_that_is_listed_only_later_is_found_and_no_second_one_asked_for(world: World) -> None:
    late = Pod(name="qlora-r", made_of={"env": {"OUTPUT_URI": "/workspace/runs"}})

    def sleep(seconds: float) -> None:
        world.slept.append(seconds)
        if len(world.slept) == 3:
            world.server.pods["late"] = late

    world.runpod.sleep = sleep
    world.server.fail("/v2/pods", method="POST", status=502)
    assert world.make()["id"] == "late" and world.num_requests == 1


def test_a_request_that_certainly_made_nothing_is_sent_again(world: World) -> None:
    world.server.fail("/v2/pods", method="POST", kind="reset")
    world.server.fail("/v2/pods", method="POST", status=429, headers={"Retry-After": "7"})
    pod = world.make()
    assert list(world.server.pods) == [pod["id"]] and world.num_requests == 3 and 7.0 in world.slept


def test_when_nobody_can_say_whether_there_is_a_pod_no_other_is_asked_for_and_that_is_told(world: World) -> None:
    before = world.renting.mine()
    world.server.fail("/v2/pods", method="POST", kind="lost")
    world.server.fail("/v2/pods", method="GET", status=503, times=ALWAYS)
    body = pod_body("r", CANDIDATE, {"OUTPUT_URI": "/workspace/runs"}, WISHES, disk=20, data_center=None)
    with pytest.raises(NetworkError, match="POD qlora-r MAY EXIST AND BILL"):
        world.renting.make(body, before)
    assert world.num_requests == 1 and len(world.server.pods) == 1


def test_the_pod_of_another_store_or_another_run_is_not_this_runs(world: World) -> None:
    world.server.add_pod("other", name="qlora-r", made_of={"env": {"OUTPUT_URI": "s3://elsewhere"}})
    world.server.add_pod("another", name="qlora-r2")
    assert world.renting.mine() == []
    mine = world.make()
    assert [pod["id"] for pod in world.renting.mine()] == [mine["id"]]


def test_a_body_with_a_field_that_runpod_does_not_know_is_refused(world: World) -> None:
    body = pod_body("r", CANDIDATE, {}, WISHES, disk=20, data_center=None) | {"interruptible": True}
    with pytest.raises(SettingsError, match=r"422.*interruptible"):
        world.renting.make(body, [])
    world.server.gpus[0].is_gone = True
    with pytest.raises(NoCapacityError, match="no instances"):
        world.make()


def follow(world: World, pod_id: str) -> tuple[End, list[LogLine]]:
    lines: list[LogLine] = []
    with Display(usd_per_hour=None, redact=str) as display:
        end = Following(world.runpod, pod_id, display=display, on_line=lines.append).follow()
    return end, lines


def test_every_line_of_the_log_is_shown_once_though_the_stream_breaks_and_begins_again(world: World) -> None:
    world.server.add_pod("p", lines=[])
    pod = world.server.pods["p"]
    pod.write("run r in s3://b/r\nsame\nsame\nsame", at="2026-11-01T12:00:00Z")
    breaks = iter(range(3))

    def sleep(seconds: float) -> None:
        number = next(breaks, None)
        if number is not None:
            pod.write(f"same\nmore {number}", at="2026-11-01T12:00:00Z")  # of the very same second
        if number is None:
            pod.write("the job ends with exit status 75", at="2026-11-01T12:00:01Z")
            pod.status = "EXITED"

    world.runpod.sleep = sleep
    pod.status = "PROVISIONING"  # the stream ends at once, each time
    end, lines = follow(world, "p")
    texts = [line.text for line in lines]
    assert texts.count("same") == 6 and [text for text in texts if text.startswith("more")] == ["more 0", "more 1", "more 2"]
    assert (end.told, end.pod) == (75, "exited")


def test_the_last_words_of_an_earlier_start_of_the_container_are_not_believed(world: World) -> None:
    world.server.add_pod("p")
    pod = world.server.pods["p"]
    pod.write("run r in s3://b/r\nthe job ends with exit status 2\nrun r in s3://b/r\nstep 1")
    threading.Timer(4.5, lambda: pod.write("the job ends with exit status 0")).start()  # later than SETTLE_SECONDS
    end, _ = follow(world, "p")
    assert (end.told, end.pod) == (0, "running") and end.usd_per_hour == 0.44


def test_a_pod_that_vanishes_without_a_word_is_an_interrupted_run(world: World) -> None:
    world.server.add_pod("p")
    threading.Timer(0.5, lambda: world.server.pods.pop("p")).start()
    end, _ = follow(world, "p")
    assert (end.told, end.pod) == (None, "gone")
    outcome = judge(None, None, why_no_report="OUTPUT_URI cannot be reached from here")
    assert outcome.status == 75 and "nobody told" in outcome.doubt


def test_the_report_counts_only_when_it_tells_of_a_start_on_this_pod(tmp_path: Path) -> None:
    report = rich_report()
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "report.json").write_text(report.model_dump_json(), "utf-8")
    store.put(tmp_path / "report.json", "report.json")
    started = report.attempts[-1].started
    before, after = ({"createdAt": (started + timedelta(minutes=by)).astimezone(UTC).isoformat()} for by in (-5, 5))
    found, why = find_report(store, before, tmp_path)
    assert found is not None and why == "" and judge(None, found, why_no_report=why).status == report.exit_status
    assert "differs" not in judge(report.exit_status, found, why_no_report="").doubt
    told = judge(6, found, why_no_report="")
    assert told.status == 6 and "report.json says" in told.doubt and "last words" in told.source
    assert find_report(store, after, tmp_path) == (None, "the report.json in OUTPUT_URI is of an earlier start")
    assert find_report(None, before, tmp_path)[0] is None and datetime.now(UTC) > started


def offers(**hours: float) -> list[Offer]:
    """Forecasts: the hours on each GPU by RunPod's words for it; where they are 0 it does not fit."""
    named = {gpu.name: hours.get(gpu.name.replace(" ", "_"), 1.0) for gpu in known_gpus()}
    fixed = {"num_gpus": 1, "memory_bytes": 0, "headroom_bytes": 0, "peak_bytes": 10**9, "safe_peak_bytes": 20 * 2**30}
    rest = {
        "micro_batch": 1,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        "usd_per_hour": None,
        "parallel": "ddp",
    }
    return [
        Offer(name=name, fits=one > 0, hours_low=one, hours_high=3 * one, cost_usd_low=None, cost_usd_high=None,
              price_source="unknown", hint="a smaller model", **fixed, **rest)
        for name, one in named.items()
    ]  # fmt: skip


def choose(world: World, made: list[Offer], *gpus: Gpu, **about: Any) -> list[str]:
    world.server.gpus = list(gpus)
    wishes = about.pop("wishes", WISHES)
    catalogue = world.runpod.gpus(cloud=wishes.cloud, num_gpus=wishes.num_gpus)
    given = {"disk_bytes": 20e9, "data_center": None, "limit_usd": None, **about}
    return [one.name for one in find_candidates(catalogue, made, wishes, **given)]


def test_the_cheapest_run_is_chosen_and_not_the_cheapest_hour(world: World) -> None:
    slow = Gpu(id="NVIDIA L4", memory=24, secure=0.4)
    fast = Gpu(id=FAST, memory=24, secure=0.7)
    small = Gpu(id="NVIDIA GeForce RTX 3070", memory=8, secure=0.1)
    full = Gpu(id="NVIDIA A40", memory=48, secure=0.1, availability="NONE")
    far = Gpu(id="NVIDIA L40S", memory=48, secure=0.1, places=("EU-RO-1",))
    some = (slow, fast, small, full, far)
    made = offers(L4=3.0, RTX_4090=1.0, L40S=9.0)
    assert choose(world, made, *some) == ["RTX 4090", "L40S", "L4"]  # the RTX 3070 has 8 GB, and 20 are needed
    assert choose(world, made, *some, data_center="US-KS-2") == ["RTX 4090", "L4"]
    assert choose(world, made, *some, limit_usd=0.8) == ["RTX 4090"]
    unknown = [offer.model_copy(update={"hours_low": None, "hours_high": None}) for offer in made]
    assert choose(world, unknown, *some) == ["L40S", "L4", "RTX 4090"]
    two = Wishes(image="i", references={}, num_gpus=2, gpus=("L4",))
    assert choose(world, made, slow, fast, wishes=two) == ["L4"]


@pytest.mark.parametrize(
    ("gpu", "hours", "limit", "error", "said"),
    [
        (
            Gpu(id=FAST, memory=24, secure=0.7, availability="NONE"),
            1.0,
            None,
            MachineError,
            "try again later, or --cloud community",
        ),
        (Gpu(id=FAST, memory=24, secure=0.0, community=0.3), 1.0, None, MachineError, "--cloud community"),
        (Gpu(id=FAST, memory=24, secure=0.7), 9.0, 2.0, PlanError, "MAX_COST_USD=2: .* raise it"),
        (Gpu(id=FAST, memory=24, secure=0.7), 0.0, None, PlanError, "fits on no GPU that RunPod rents .*a smaller model"),
        (Gpu(id="AMD Instinct MI300X OAM", memory=192, secure=1.0), 1.0, None, PlanError, "it has none of them"),
    ],
)
def test_why_nothing_can_be_rented_is_told(
    gpu: Gpu, hours: float, limit: float | None, error: type[JobError], said: str, world: World
) -> None:
    with pytest.raises(error, match=said):
        choose(world, offers(RTX_4090=hours), gpu, limit_usd=limit)


def packed(
    folder: Path, *, env_file: str = "", flags: Mapping[str, str] | None = None, own: Mapping[str, str], given: Mapping[str, str]
) -> Belongings:
    (folder / ".env").write_text(env_file, "utf-8")
    given = {**SETTINGS, **given}
    settings = read_settings(given, flags or {}, folder=folder).settings
    wishes = read_wishes({"image": "i", **own}, given)
    return pack(settings, wishes, given, flags or {}, run_id="r", folder=folder)


def test_what_was_given_goes_along_from_every_place_and_what_is_of_this_machine_stays(tmp_path: Path) -> None:
    found = packed(
        tmp_path,
        env_file="LORA_R=8\nMAX_STEPS=5\nHF_HUB_OFFLINE=1\nHF_HOME=/here\nWANDB_PROJECT=p\nCUDA_VISIBLE_DEVICES=0\nWORK_DIR=/here\n",
        flags={"MAX_STEPS": "7"},
        own={"network_volume": "v"},
        given={"AWS_DEFAULT_REGION": "eu", "HOME": "/root", "LEARNING_RATE": "1e-4", "ON_FINISH": "stop"},
    )
    assert found.env == {
        **SETTINGS, "LORA_R": "8", "MAX_STEPS": "7", "LEARNING_RATE": "1e-4", "WANDB_PROJECT": "p", "AWS_DEFAULT_REGION": "eu",
        "RUN_ID": "r", "OUTPUT_URI": "/workspace/runs", "ON_FINISH": "stop", "FAIL_GRACE_MINUTES": "15",
    }  # fmt: skip
    assert found.plain == () and found.warnings == ()


def test_a_secret_goes_by_name_or_as_plain_text_with_a_warning_or_not_at_all(tmp_path: Path) -> None:
    token, word = "hf_planted1234567890", "wandb-planted-word"
    own = {"network_volume": "v"}
    with pytest.raises(SettingsError) as refused:
        packed(
            tmp_path, own=own, given={"HF_TOKEN": token, "WANDB_API_KEY": word}, env_file="MLFLOW_TRACKING_PASSWORD=planted-too\n"
        )
    told = str(refused.value)
    assert all(name in told for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")) and "planted" not in told
    (tmp_path / "token").write_text(token, "utf-8")
    by_name = packed(tmp_path, own={**own, "secrets": "HF_TOKEN=hf"}, given={"HF_TOKEN_FILE": str(tmp_path / "token")})
    assert by_name.env["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf }}" and "HF_TOKEN_FILE" not in by_name.env and not by_name.warnings
    itself = packed(tmp_path, own=own, given={"HF_TOKEN": "{{ RUNPOD_SECRET_hf }}", "RUNPOD_API_KEY": "rpa_planted"})
    assert itself.env["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf }}" and "RUNPOD_API_KEY" not in itself.env
    plain = packed(tmp_path, own={**own, "plain_secrets": "1"}, given={"HF_TOKEN": token})
    assert plain.env["HF_TOKEN"] == token and "HF_TOKEN: sent as plain text" in plain.warnings[0]


@pytest.mark.parametrize(
    ("own", "environ", "said"),
    [
        ({}, {}, "OUTPUT_URI: the pod's own disk goes with the pod"),
        ({}, {"OUTPUT_URI": "runs"}, "OUTPUT_URI=runs: the pod's own disk"),
        ({"network_volume": "v"}, {"OUTPUT_URI": "/data/runs"}, "is not on the volume, which is mounted at /workspace"),
        ({"network_volume": "v"}, {"HUB_MODEL_ID": "me/a"}, "HF_TOKEN: is required on the pod to publish"),
        ({}, {"OUTPUT_URI": "s3://b/q"}, "AWS_SECRET_ACCESS_KEY: is required on the pod"),
        ({"network_volume": "v", "volume_disk": "50"}, {}, "a pod has one of the two"),
        ({"volume_disk": "5"}, {}, "--volume-disk=5: must be a whole number, 10 or more"),
        ({"secrets": "hf"}, {}, "--secrets=hf: must be VARIABLE=secret"),
        ({"follow": "1", "no_follow": "1"}, {}, "--no-follow is set too"),
    ],
)
def test_what_cannot_be_is_refused(own: dict[str, str], environ: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        packed(tmp_path, own=own, given=environ)


def test_more_variables_than_a_pod_takes_are_refused(tmp_path: Path) -> None:
    many = "".join(f"WANDB_NOTE_{number}=x\n" for number in range(50))
    with pytest.raises(SettingsError, match="a pod takes 50"):
        packed(tmp_path, own={"network_volume": "v"}, env_file=many, given={})


def test_the_body_that_is_sent_has_the_disks_that_were_asked_for() -> None:
    body = pod_body("r", CANDIDATE, {}, WISHES, disk=33, data_center=None)
    assert body["mounts"] == {"persistent": {"size": 33, "path": "/workspace"}} and body["disk"] == 33
    assert json.dumps(body) and body["env"]["GPU_HOURLY_RATE"] == "0.7000"
