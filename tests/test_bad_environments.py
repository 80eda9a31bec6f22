"""Bad environments, each broken in one way or in two: `python -m job check` names what is wrong, in seconds, and spends nothing.

Every case is a real process against a real Hub and a real S3 server (ours, local). A new way to be wrong is one more Case.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import Job, small_run, write_conversations
from fault_proxy import ALWAYS, Fault
from hub_server import HubServer
from s3_server import KEYS, S3Server, s3_server

WRITER, READER, INVALID = "hf_plantedwriter0123456789", "hf_plantedreader0123456789", "hf_plantedinvalid0123456789"
SECRET = "planted/aws/secret/0123456789"
SECRETS = (WRITER, READER, INVALID, SECRET)
WEIGHTS = ("safetensors", ".bin", ".pt")
NUM_AT_ONCE = 3
"""Processes; two cores, and some of each one's time is waiting."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to be wrong."""

    name: str
    environ: dict[str, str]
    """On top of what is right; `{place}` stands for what the fixture `world` made."""
    status: int
    names: tuple[str, ...]
    """What the output must name."""
    server_faults: tuple[Fault, ...] = ()
    """Ways to break the S3 server; no other case runs meanwhile."""


def case(name: str, status: int, names: str, /, *faults: Fault, **environ: str) -> Case:
    return Case(name=name, environ=environ, status=status, names=tuple(names.split()), server_faults=faults)


ON_S3 = {"OUTPUT_URI": "s3://bucket/prefix", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
PUBLISHED = {"HF_TOKEN": WRITER, "HUB_MODEL_ID": "tester/tuned"}

SETTINGS = (  # refused before anything is asked
    case("a value that is no number", 2, "LEARNING_RATE=abc", LEARNING_RATE="abc"),
    case("a value out of range", 2, "LORA_DROPOUT=2", LORA_DROPOUT="2"),
    case("an unknown choice", 2, "OVERLONG=shrink", OVERLONG="shrink"),
    case("an unknown name", 2, "LORA_RR LORA_R?", JOB_ENV_FILE="{folder}/unknown.env"),
    case("no model", 2, "MODEL_ID required", MODEL_ID=""),
    case("no data", 2, "DATASETS required", DATASETS=""),
    case("a missing local file", 2, "DATASETS=nowhere.jsonl", DATASETS="nowhere.jsonl"),
    case("a missing local model", 2, "MODEL_ID=./nowhere", MODEL_ID="./nowhere"),
    case("a file whose name says no format", 2, "DATASETS=", DATASETS="{folder}/rows.dat"),
    case("an option that does not exist", 2, "DATASETS=", DATASETS="{rows}?spilt=train"),
    case("a split of a file", 2, "DATASETS=", DATASETS="{rows}?split=test"),
    case("two quantisations", 2, "LOAD_IN_8BIT=1", LOAD_IN_8BIT="1"),
    case("an output address of another kind", 2, "OUTPUT_URI=gs://bucket", OUTPUT_URI="gs://bucket"),
    case("a name that is no repository", 2, "HUB_MODEL_ID=tuned", HUB_MODEL_ID="tuned"),
    case("a secret's file that is missing", 2, "HF_TOKEN_FILE=nowhere", HF_TOKEN_FILE="nowhere"),
    case("a field that SFTConfig has not", 2, "TRAIN_ARGS", TRAIN_ARGS='{{"learning_speed": 1}}'),
    case("an unknown recipe", 2, "RECIPE=nothing", RECIPE="nothing"),
)
MODEL = (
    case("a gated model", 2, "MODEL_ID=other/gated HF_TOKEN", MODEL_ID="other/gated", HF_TOKEN=WRITER),
    case("a gated model without a token", 2, "MODEL_ID=other/gated HF_TOKEN", MODEL_ID="other/gated"),
    case("an unknown model", 2, "MODEL_ID=other/unknown", MODEL_ID="other/unknown"),
    case("an unknown revision", 2, "MODEL_REVISION=v9", MODEL_ID="tester/base", MODEL_REVISION="v9"),
    case("a model without config.json", 2, "MODEL_ID=tester/gguf .gguf", MODEL_ID="tester/gguf"),
    case("a model without weights", 2, "MODEL_ID=tester/empty weights", MODEL_ID="tester/empty"),
    case("a folder that is no model", 2, "MODEL_ID= config.json", MODEL_ID="{folder}"),
    case("offline and not in the cache", 2, "MODEL_ID=tester/base HF_HUB_OFFLINE", MODEL_ID="tester/base", HF_HUB_OFFLINE="1"),
)
ACCOUNT = (
    case("a token that is not valid", 2, "HF_TOKEN=***", MODEL_ID="tester/base", HF_TOKEN=INVALID),
    case("one to publish with that is not", 2, "HF_TOKEN=*** write", **{**PUBLISHED, "HF_TOKEN": INVALID}),
    case("a read-only token", 2, "HF_TOKEN=*** HUB_MODEL_ID=tester/tuned", **{**PUBLISHED, "HF_TOKEN": READER}),
    case("no token to publish with", 2, "HF_TOKEN HUB_MODEL_ID=tester/tuned", HUB_MODEL_ID="tester/tuned"),
    case("a repository of somebody else", 2, "HUB_MODEL_ID=other/new", **{**PUBLISHED, "HUB_MODEL_ID": "other/new"}),
    case("one of somebody else that exists", 2, "HUB_MODEL_ID=other/public", **{**PUBLISHED, "HUB_MODEL_ID": "other/public"}),
    case("offline with something to publish", 2, "HF_HUB_OFFLINE=1 HUB_MODEL_ID=tester/tuned", HF_HUB_OFFLINE="1", **PUBLISHED),
)
DATA = (
    case("a wrong column", 3, "DATASETS= prompt=frage prompt,", DATASETS="{rows}?prompt=frage&completion=completion"),
    case("no known shape", 3, "DATASETS= known shape", DATASETS="{folder}/odd.jsonl"),
    case("an empty file", 3, "DATASETS= rows", DATASETS="{folder}/empty.jsonl"),
    case("a web page by the name of data", 3, "DATASETS= page", DATASETS="{folder}/page.json"),
    case("a folder without data", 3, "DATASETS= files", DATASETS="{folder}/nothing"),
    case("a missing split", 3, "DATASETS=tester/chats?split=test train", DATASETS="tester/chats?split=test"),
    case("a wrong column on the Hub", 3, "DATASETS=tester/chats prompt=frage", DATASETS="tester/chats?prompt=frage"),
    case("a gated data set", 3, "DATASETS=other/locked HF_TOKEN", DATASETS="other/locked"),
    case("an unknown data set", 3, "DATASETS=other/unknown", DATASETS="other/unknown"),
    case("an unknown revision of a data set", 3, "DATASETS=tester/chats v9", DATASETS="tester/chats?revision=v9"),
    case("an object that is not there", 3, "DATASETS=s3://bucket/none.jsonl 404", DATASETS="s3://bucket/none.jsonl"),
    case("an address that is not there", 3, "none.jsonl 404", DATASETS="{hub}/datasets/tester/chats/resolve/main/none.jsonl"),
    case("a wrong column in a bucket", 3, "prompt=frage", DATASETS="s3://bucket/rows.jsonl?prompt=frage"),
    case("EVAL_DATASETS without a shape", 3, "odd.jsonl shape", EVAL_DATASETS="{folder}/odd.jsonl"),
    case("a language that is unknown", 2, "LANGUAGE=klingon", LANGUAGE="klingon"),
)
STORE = (
    case("a bucket that is missing", 2, "OUTPUT_URI=s3://none bucket", **{**ON_S3, "OUTPUT_URI": "s3://none/prefix"}),
    case(
        "no right to read",
        2,
        "OUTPUT_URI= read",
        Fault(kind="error", code="AccessDenied", method="GET", path="/.preflight", times=ALWAYS),
        **ON_S3,
    ),
    case(
        "no right to delete",
        2,
        "OUTPUT_URI= delete",
        Fault(kind="error", code="AccessDenied", method="DELETE", times=ALWAYS),
        **ON_S3,
    ),
    case(
        "a key that is not known",
        2,
        "OUTPUT_URI= AWS_ACCESS_KEY_ID",
        Fault(kind="error", code="InvalidAccessKeyId", times=ALWAYS),
        **ON_S3,
    ),
    case("no S3 at the address", 2, "OUTPUT_URI= AWS_ENDPOINT_URL_S3", Fault(kind="error", code="404", times=ALWAYS), **ON_S3),
    case("half a key", 2, "OUTPUT_URI=s3:// aws_secret_access_key", **{**ON_S3, "AWS_SECRET_ACCESS_KEY": ""}),
    case(
        "a clock that S3 refuses", 5, "OUTPUT_URI= clock", Fault(kind="error", code="RequestTimeTooSkewed", times=ALWAYS), **ON_S3
    ),
    case("a store that does not answer", 75, "OUTPUT_URI=", **{**ON_S3, "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}),
    case("a store that always fails", 75, "OUTPUT_URI=", Fault(kind="error", code="InternalError", times=ALWAYS), **ON_S3),
    case("a file where the store should be", 5, "OUTPUT_URI=", OUTPUT_URI="{rows}"),
)
MACHINE = (
    case("a work folder that cannot be made", 5, "WORK_DIR=", WORK_DIR="{rows}/below"),
    case(
        "a volume that is not mounted",
        5,
        "OUTPUT_URI= mounted",
        OUTPUT_URI="{unmounted}/runs",
        VOLUME_ROOT="{unmounted}",
        RUNPOD_POD_ID="x",
    ),
    case("a disk that is too small", 5, "WORK_DIR= HF_HOME model free", MODEL_ID="tester/huge"),
    case("8 bits without a GPU", 5, "LOAD_IN_8BIT=1", LOAD_IN_8BIT="1", LOAD_IN_4BIT="0", CUDA_VISIBLE_DEVICES="-1"),
    case(
        "flash attention without a GPU",
        2,
        "ATTN_IMPLEMENTATION=flash_attention_2",
        ATTN_IMPLEMENTATION="flash_attention_2",
        CUDA_VISIBLE_DEVICES="-1",
    ),
    case("a GPU that is too old", 5, "P100 7.5", PATH="{p100}"),
    case("a driver that is too old", 5, "driver 570.86.10 RTX 580", PATH="{old_driver}"),
    case("an old driver in a data centre", 5, "driver 550.54.15 A100 cuda-compat", PATH="{old_data_centre}"),
    case("bfloat16 on a T4", 2, "DTYPE=bfloat16 T4 float16", PATH="{t4}", DTYPE="bfloat16"),
    case(
        "flash attention on a T4",
        2,
        "ATTN_IMPLEMENTATION=flash_attention_2 T4",
        PATH="{t4}",
        ATTN_IMPLEMENTATION="flash_attention_2",
    ),
    case(
        "flash attention without its package",
        2,
        "ATTN_IMPLEMENTATION=flash_attention_2 flash_attn",
        PATH="{h100}",
        ATTN_IMPLEMENTATION="flash_attention_2",
    ),
    case("a clock that is wrong", 5, "clock seconds NTP", MODEL_ID="tester/base", HF_ENDPOINT="{late_hub}"),
)
NETWORK = (
    case("a Hub that does not answer for the model", 75, "MODEL_ID=tester/base", MODEL_ID="tester/base", HF_ENDPOINT="http://127.0.0.1:9"),
    case("a Hub that does not answer for the data", 75, "DATASETS=tester/chats", DATASETS="tester/chats", HF_ENDPOINT="http://127.0.0.1:9"),
    case("a Hub that does not answer to publish", 75, "Hub answer", HF_ENDPOINT="http://127.0.0.1:9", **PUBLISHED),
    case("an address that does not answer", 75, "DATASETS=http://127.0.0.1:9", DATASETS="http://127.0.0.1:9/rows.jsonl"),
)  # fmt: skip
ASKED = (*MODEL, *ACCOUNT, *DATA, *STORE, *MACHINE, *NETWORK)


def pair(one: Case, other: Case) -> Case:
    """Both at once: the status is by the order of blame, and both are told."""
    assert not one.environ.keys() & other.environ.keys()
    return Case(
        name=f"{one.name}, and {other.name}",
        environ=one.environ | other.environ,
        status=min(one.status, other.status),
        names=one.names + other.names,
        server_faults=one.server_faults + other.server_faults,
    )


BY_NAME = {case.name: case for case in (*SETTINGS, *ASKED)}
PAIRED = (
    ("a value that is no number", "an unknown choice"),
    ("an unknown name", "a missing local file"),
    ("no model", "a value out of range"),
    ("a gated model", "a language that is unknown"),
    ("an unknown model", "a bucket that is missing"),
    ("an unknown revision", "a wrong column"),
    ("a repository of somebody else", "no known shape"),
    ("a read-only token", "a language that is unknown"),
    ("a wrong column", "a work folder that cannot be made"),
    ("a missing split", "a GPU that is too old"),
    ("a gated data set", "a store that does not answer"),
    ("a disk that is too small", "a store that does not answer"),
    ("8 bits without a GPU", "an empty file"),
    ("a volume that is not mounted", "an address that does not answer"),
    ("bfloat16 on a T4", "a bucket that is missing"),
    ("flash attention without a GPU", "no right to delete"),
    ("a driver that is too old", "an unknown data set"),
    ("a clock that is wrong", "EVAL_DATASETS without a shape"),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """What the cases stand on."""

    folder: Path
    hub: HubServer
    late_hub: HubServer
    s3: S3Server
    right: dict[str, str]
    places: dict[str, str]
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of the cases' folders."""


def nvidia_smi(folder: Path, name: str, driver: str, capability: str) -> str:
    """A PATH on which the driver shows one GPU."""
    folder.mkdir(parents=True)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{name}, 81559, {driver}, {capability}'\n", "utf-8")
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def fill(hub: HubServer, model: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    rows = b'{"prompt": "What follows 1?", "completion": "2 follows."}\n' * 20
    hub.add_repo("model", "tester/base", files)
    hub.add_repo("model", "other/gated", files, gated=True)
    hub.add_repo("model", "other/public", files)
    hub.add_repo("model", "tester/gguf", {"README.md": b"", "q4.gguf": b"GGUF"})
    hub.add_repo("model", "tester/empty", {"config.json": files["config.json"]})
    hub.add_repo("model", "tester/huge", files)
    hub.repos["model", "tester/huge"].claimed["model.safetensors"] = 10**15
    hub.add_repo("dataset", "tester/chats", {"train.jsonl": rows})
    hub.add_repo("dataset", "other/locked", {"train.jsonl": rows}, gated=True)
    hub.roles[READER] = "read"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("bad")
    rows = write_conversations(folder / "rows.jsonl", 20)
    (folder / "unknown.env").write_text("LORA_RR=8\n", "utf-8")
    (folder / "rows.dat").write_text("text\n", "utf-8")
    (folder / "odd.jsonl").write_text('{"alpha": 1, "beta": 2}\n' * 20, "utf-8")
    (folder / "empty.jsonl").write_text("", "utf-8")
    (folder / "page.json").write_text("<!doctype html><html></html>", "utf-8")
    (folder / "nothing").mkdir()
    (folder / "nothing/notes.md").write_text("nothing to learn", "utf-8")
    tokens = {WRITER: "tester", READER: "tester"}
    with HubServer(tokens) as hub, HubServer(tokens) as late_hub, s3_server() as s3:
        for server in (hub, late_hub):
            fill(server, tiny_model)
        late_hub.clock_offset_seconds = 900.0
        s3.client.put_object(Bucket="bucket", Key="rows.jsonl", Body=rows.read_bytes())
        right = small_run(tiny_model, rows) | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "AWS_ENDPOINT_URL_S3": s3.proxy.url,
            "AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "HF_HUB_DISABLE_XET": "1",
        }
        places = {
            "folder": str(folder),
            "rows": str(rows),
            "hub": hub.url,
            "late_hub": late_hub.url,
            "unmounted": str(folder / "volume"),
            "p100": nvidia_smi(folder / "p100", "Tesla P100-PCIE-16GB", "580.65.06", "6.0"),
            "t4": nvidia_smi(folder / "t4", "Tesla T4", "580.65.06", "7.5"),
            "h100": nvidia_smi(folder / "h100", "NVIDIA H100 80GB HBM3", "580.65.06", "9.0"),
            "old_driver": nvidia_smi(folder / "old", "NVIDIA GeForce RTX 4090", "570.86.10", "8.9"),
            "old_data_centre": nvidia_smi(folder / "older", "NVIDIA A100-SXM4-80GB", "550.54.15", "8.0"),
        }
        yield World(folder=folder, hub=hub, late_hub=late_hub, s3=s3, right=right, places=places)


def complaints(world: World, case: Case, command: str) -> list[str]:
    """What is wrong with how a bad environment is refused."""
    folder = world.folder / f"case-{next(world.numbers)}"
    job = Job(folder, world.right | {"HF_HOME": str(folder / "hf")})
    settings: dict[str, str] = {name: value.format(**world.places) for name, value in case.environ.items()}
    status, output = job.run(command, **settings)
    wrong = [f"status {status} instead of {case.status}"] if status != case.status else []
    wrong += [f"{name!r} is not named" for name in case.names if name not in output]
    wrong += [f"{secret!r} is shown" for secret in SECRETS if secret in output]
    wrong += ["a traceback is shown"] if "Traceback" in output else []
    wrong += [
        f"{path.name} was made" for path in folder.rglob("*") if path.name in ("checkpoints", "adapter", "attempts", "data")
    ]
    return [f"{case.name}: {', '.join(wrong)}\n{output}"] if wrong else []


def refuse_all(world: World, cases: Sequence[Case], command: str = "check") -> None:
    for server in (world.hub, world.late_hub):
        server.requests.clear()
    broken = [case for case in cases if case.server_faults]
    whole = [case for case in cases if not case.server_faults]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        wrong = [text for texts in pool.map(lambda case: complaints(world, case, command), whole) for text in texts]
    for case in broken:  # the server that they break is everybody's
        for fault in case.server_faults:
            world.s3.proxy.add(replace(fault))
        wrong += complaints(world, case, command)
        world.s3.proxy.clear()
    assert not wrong, "\n\n".join(wrong)
    asked = [request.path for server in (world.hub, world.late_hub) for request in server.requests]
    assert [path for path in asked if "/resolve/" in path and path.endswith(WEIGHTS)] == []


def test_what_is_right_passes_every_check(world: World) -> None:
    right = case("nothing is wrong", 0, "", MODEL_ID="tester/base", DATASETS="tester/chats", LANGUAGE="en", **ON_S3, **PUBLISHED)
    refuse_all(world, [right, replace(right, environ={})])


def test_settings_are_refused_before_anything_is_asked(world: World) -> None:
    refuse_all(world, SETTINGS)
    assert not world.hub.requests


@pytest.mark.parametrize("cases", [MODEL, ACCOUNT, DATA, STORE, MACHINE, NETWORK], ids=lambda cases: cases[0].name)
def test_each_mistake_is_told_before_anything_is_spent(world: World, cases: tuple[Case, ...]) -> None:
    refuse_all(world, cases)


def test_of_two_mistakes_both_are_told_and_the_blame_decides_the_status(world: World) -> None:
    refuse_all(world, [pair(BY_NAME[one], BY_NAME[other]) for one, other in PAIRED])


def test_a_run_is_refused_as_a_check_is(world: World) -> None:
    names = ("an unknown model", "a read-only token", "a wrong column", "a bucket that is missing", "a GPU that is too old")
    refuse_all(world, [BY_NAME[name] for name in names], command="run")
