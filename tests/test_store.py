"""One contract for both stores, and what each kind of fault on the way to S3 becomes."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_proxy import ALWAYS, Fault
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, S3Server

from job.errors import JobError, MachineError, NetworkError, SettingsError
from job.keep.checkpoints import delete_folder
from job.keep.s3 import MIB, S3Store, Transfer
from job.keep.store import MissingError, Store, open_store, read_text, within, write_text
from job.preflight import check_store

ROOT = Path(__file__).resolve().parent.parent
QUICK = Transfer(multipart_bytes=6 * MIB, part_bytes=5 * MIB, num_attempts=3, timeout_seconds=5)  # 5 MiB is S3's least
NAMES = [
    "a",
    "deep/" * 12 + "b.json",
    "sp ace",
    "ünï-code",
    "日本/語",
    "a+b",
    "100%",
    "a%20b",
    "c#d",
    "e?f=1&g",
    "~'(!)*$@,;:=",
    ".dot",
]
NAMES += ["x.partial", "tab le/ x"]


@pytest.fixture
def s3(server: S3Server, tmp_path: Path) -> Iterator[S3Store]:
    """A store of its own, through the proxy."""
    yield S3Store(BUCKET, tmp_path.name, server.credentials, transfer=QUICK)
    server.proxy.clear()


def make_file(path: Path, num_bytes: int, seed: int = 0) -> Path:
    block = hashlib.sha256(str(seed).encode()).digest() * 2**15  # 1 MiB
    with path.open("wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(start.to_bytes(8, "big") + block[8 : num_bytes - start])
    return path


def each_call(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    """The four methods, on a file that is there before each fault."""
    return {
        "put": lambda: store.put(make_file(folder / "local", 1000), "a"),
        "get": lambda: store.get("a", folder / "got"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete("a"),
    }


# What both stores promise.


def test_names_that_are_put_are_listed_in_order_and_can_be_got(store: Store, tmp_path: Path) -> None:
    for name in NAMES:
        write_text(store, name, name, tmp_path / "scratch")
    assert list(store.list()) == sorted(NAMES)
    assert [read_text(store, name, tmp_path) for name in store.list()] == sorted(NAMES)
    for name in NAMES:
        store.delete(name)
    assert list(store.list()) == []


SEGMENT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="/"), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(SEGMENT.filter(lambda part: part not in (".", "..", ".partial")), min_size=1, max_size=4))
def test_any_name_comes_back_as_it_was(store: Store, tmp_path: Path, parts: list[str]) -> None:
    name = "/".join(parts)
    write_text(store, name, "text", tmp_path / "scratch")
    assert list(store.list()) == [name] and list(store.list(name)) == [name]
    assert read_text(store, name, tmp_path / "scratch") == "text"
    store.delete(name)
    assert list(store.list()) == []


def test_a_prefix_is_any_beginning_of_a_name(store: Store, tmp_path: Path) -> None:
    for name in ("a", "deep/er/b.json", "deep/c", "deeper"):
        write_text(store, name, name, tmp_path / "scratch")
    assert list(store.list("deep/")) == ["deep/c", "deep/er/b.json"]
    assert list(store.list("dee")) == ["deep/c", "deep/er/b.json", "deeper"]
    assert list(store.list("deep/er/b")) == ["deep/er/b.json"]
    assert list(store.list("x/y")) == []


def test_a_folder_of_the_store_sees_only_its_own_files(store: Store, tmp_path: Path) -> None:
    write_text(within(store, "run"), "a", "inside", tmp_path / "scratch")
    assert list(store.list()) == ["run/a"]
    assert list(within(store, "run").list()) == ["a"]
    assert list(within(store, "ru").list()) == []


def test_a_missing_name_is_missing_and_deleting_it_is_no_error(store: Store, tmp_path: Path) -> None:
    write_text(store, "a", "text", tmp_path / "scratch")
    write_text(store, "folder/b", "text", tmp_path / "scratch")
    for name in ("nothing", "no/thing", "a/below", "folder"):
        with pytest.raises(MissingError):
            store.get(name, tmp_path / "got" / "x")
    for name in ("nothing", "no/thing", "a/below"):
        store.delete(name)
    assert not list(tmp_path.glob("got/*"))
    assert list(store.list()) == ["a", "folder/b"]


def test_putting_again_replaces_and_an_empty_file_is_a_file(store: Store, tmp_path: Path) -> None:
    for text in ("one", "", "two"):
        write_text(store, "a", text, tmp_path / "scratch")
        assert read_text(store, "a", tmp_path / "scratch") == text


def test_a_local_file_that_is_not_there_says_so_in_both_stores(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.put(tmp_path / "nothing", "a")
    assert list(store.list()) == []


def test_more_than_a_thousand_names_are_all_listed(server: S3Server, store: Store, tmp_path: Path) -> None:
    for number in range(1005):
        if isinstance(store, S3Store):
            server.client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/many/{number:04d}", Body=b"")
        else:
            (tmp_path / "store/many").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"store/many/{number:04d}").touch()
    assert list(store.list()) == [f"many/{number:04d}" for number in range(1005)]


def test_threads_may_read_and_write_small_texts_at_the_same_time(store: Store, tmp_path: Path) -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for count in range(10):
            write_text(store, name, f"{name} {count}", tmp_path / "scratch")
            if (text := read_text(store, name, tmp_path / "scratch")) != f"{name} {count}":
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(f"folder/{letter}",)) for letter in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and list(store.list()) == [f"folder/{letter}" for letter in "abcdef"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_large_file_comes_back_the_same(server: S3Server, store: Store, tmp_path: Path) -> None:
    sent = make_file(tmp_path / "large", 13 * MIB + 5)
    store.put(sent, "large")
    store.get("large", tmp_path / "got")
    assert sent.read_bytes() == (tmp_path / "got").read_bytes()
    if isinstance(store, S3Store):
        assert sum("partNumber=" in request for request in server.proxy.requests) == 3
        assert server.unfinished_uploads() == []


PUT_IN_A_CHILD = """
    import sys
    from pathlib import Path
    from job.keep.s3 import MIB, S3Store, Transfer
    from job.keep.store import open_store, within
    uri, path, endpoint = sys.argv[1:]
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1", "endpoint_url": endpoint}
    if uri.startswith("s3://"):
        bucket, prefix = uri.removeprefix("s3://").split("/")
        store = S3Store(bucket, prefix, keys, transfer=Transfer(multipart_bytes=6 * MIB, part_bytes=5 * MIB))
    else:
        store = open_store(uri)
    print("go", flush=True)
    within(store, "run").put(Path(path), "file")
    print("done", flush=True)
"""


def start_put(store: Store, server: S3Server, path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PUT_IN_A_CHILD), store.uri, str(path), server.proxy.url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "go\n"
    return child


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("num_bytes", [5 * MIB, 24 * MIB])
@pytest.mark.parametrize("before", [None, "old content"])
def test_a_put_that_is_killed_in_the_middle_leaves_nothing_or_what_was_there(
    server: S3Server, store: Store, tmp_path: Path, num_bytes: int, before: str | None
) -> None:
    own = within(store, "run")
    if before is not None:
        write_text(own, "file", before, tmp_path / "scratch")
    if isinstance(store, S3Store):
        large = make_file(tmp_path / "large", num_bytes)
        server.proxy.bytes_per_second = 12 * MIB
        server.proxy.requests.clear()
        child = start_put(store, server, large)
        mark = "partNumber=2" if num_bytes >= QUICK.multipart_bytes else "PUT"
        wait_until(lambda: any(mark in request for request in server.proxy.requests))
        time.sleep(0.1)
    else:
        large = make_file(tmp_path / "large", num_bytes + 128 * MIB)
        child = start_put(store, server, large)
        partial = tmp_path / "store/run/.partial"
        wait_until(lambda: partial.is_dir() and any(partial.iterdir()))
    child.send_signal(signal.SIGKILL)
    assert child.communicate()[0] == "", "it was done before it was killed"
    server.proxy.bytes_per_second = 0
    assert list(own.list()) == ([] if before is None else ["file"])
    if before is not None:
        assert read_text(own, "file", tmp_path / "scratch") == before
    # A later process clears up before it writes a large file of its own.
    for left_over in (tmp_path / "store/run/.partial").glob("*"):
        os.utime(left_over, (time.time() - 3600,) * 2)
    within(store, "run").put(make_file(tmp_path / "next", 7 * MIB), "next")
    assert server.unfinished_uploads() == []
    assert not list((tmp_path / "store/run/.partial").glob("*"))


def test_what_a_live_process_is_copying_is_left_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "store/run/.partial").mkdir(parents=True)
    (tmp_path / "store/run/.partial/young").touch()
    write_text(within(store, "run"), "a", "text", tmp_path / "scratch")
    assert (tmp_path / "store/run/.partial/young").exists() and list(within(store, "run").list()) == ["a"]


def test_what_another_run_is_uploading_is_left_alone(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/run-2/file"
    upload = server.client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    large = make_file(tmp_path / "large", 7 * MIB)
    s3.put(large, "file")
    within(s3, "run").put(large, "file")
    assert server.unfinished_uploads() == [key]
    server.client.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload)


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_the_machines_fault_and_leaves_nothing_half_written(
    store: Store, small_disk: Path, tmp_path: Path
) -> None:
    store.put(make_file(tmp_path / "large", 7 * MIB), "large")
    with pytest.raises(MachineError, match=r"WORK_DIR: cannot write .*No space left"):
        store.get("large", small_disk / "got")
    assert list(small_disk.iterdir()) == []
    full = open_store(str(small_disk / "store"))
    write_text(full, "a", "old", tmp_path)
    with pytest.raises(MachineError, match=r"OUTPUT_URI=.* cannot write a .*No space left"):
        full.put(tmp_path / "large", "a")
    assert read_text(full, "a", tmp_path) == "old"
    assert [path.name for path in (small_disk / "store").rglob("*") if path.is_file()] == ["a"]


def test_a_text_that_does_not_fit_on_the_local_disk_is_the_machines_fault(store: Store, small_disk: Path) -> None:
    with pytest.raises(MachineError, match="WORK_DIR"):
        write_text(store, "a", "x" * 2 * MIB, small_disk)
    assert list(store.list()) == []


@pytest.mark.parametrize("call", ["put", "get", "list", "delete"])
def test_a_folder_that_cannot_be_used_is_the_machines_fault_and_never_empty(tmp_path: Path, call: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="OUTPUT_URI"):
        each_call(open_store(str(tmp_path / "file")), tmp_path)[call]()


# Faults on the way to S3.


@pytest.mark.parametrize("call", ["put", "get", "list", "delete"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("AccessDenied", SettingsError),
        ("InvalidAccessKeyId", SettingsError),
        ("ExpiredToken", SettingsError),
        ("PermanentRedirect", SettingsError),
        ("RequestTimeTooSkewed", MachineError),
        ("SlowDown", NetworkError),
        ("InternalError", NetworkError),
    ],
)
def test_what_the_store_answers_becomes_the_error_of_whose_fault_it_is(
    server: S3Server, s3: S3Store, tmp_path: Path, call: str, code: str, error: type[JobError]
) -> None:
    write_text(s3, "a", "text", tmp_path)
    quick = S3Store(BUCKET, tmp_path.name, server.credentials, transfer=dataclasses.replace(QUICK, num_attempts=2))
    server.proxy.requests.clear()
    server.proxy.add(Fault(kind="error", code=code, times=ALWAYS))
    with pytest.raises(error) as caught:
        each_call(quick, tmp_path)[call]()
    assert type(caught.value) is error and str(caught.value).startswith(f"OUTPUT_URI={s3.uri}: ")
    assert not (tmp_path / "got").exists()
    if error is NetworkError:
        assert len(server.proxy.requests) == 2, "it is tried again, and not for ever"
    elif code != "PermanentRedirect":  # boto3 looks for the region first
        assert len(server.proxy.requests) == 1, "what will not change is not asked again"


@pytest.mark.parametrize("call", ["put", "get", "list", "delete"])
def test_a_bucket_that_does_not_exist_is_a_wrong_setting_and_never_an_empty_store(
    server: S3Server, tmp_path: Path, call: str
) -> None:
    store = S3Store("nowhere", "x", server.credentials, transfer=QUICK)
    with pytest.raises(SettingsError, match="OUTPUT_URI=s3://nowhere/x: the bucket does not exist"):
        each_call(store, tmp_path)[call]()


@pytest.mark.parametrize("call", ["put", "get", "list", "delete"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="error", code="SlowDown", times=2),
        Fault(kind="error", code="InternalError"),
        Fault(kind="reset"),
        Fault(kind="close"),
        Fault(kind="truncate"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.code}",
)
def test_what_passes_is_tried_again(server: S3Server, s3: S3Store, tmp_path: Path, call: str, fault: Fault) -> None:
    write_text(s3, "a", "x" * 1000, tmp_path)
    server.proxy.requests.clear()
    server.proxy.add(dataclasses.replace(fault))
    each_call(s3, tmp_path)[call]()
    assert len(server.proxy.requests) == 1 + fault.times or fault.kind == "truncate"
    if call == "get":
        assert (tmp_path / "got").read_text() == "x" * 1000
    elif call == "put":
        s3.get("a", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "local").read_bytes()
    else:
        assert list(s3.list()) == (["a"] if call == "list" else [])


@pytest.mark.parametrize("call", ["put", "get", "list", "delete"])
def test_a_store_that_is_silent_or_refuses_connections_is_a_network_error(server: S3Server, tmp_path: Path, call: str) -> None:
    impatient = Transfer(num_attempts=1, timeout_seconds=0.3)
    store = S3Store(BUCKET, tmp_path.name, server.credentials, transfer=impatient)
    write_text(store, "a", "text", tmp_path)
    server.proxy.add(Fault(kind="hang", seconds=2))
    begun = time.monotonic()
    with pytest.raises(NetworkError):
        each_call(store, tmp_path)[call]()
    assert time.monotonic() - begun < 2
    server.proxy.stop()
    try:
        with pytest.raises(NetworkError):
            each_call(store, tmp_path)[call]()
    finally:
        server.proxy.start()
    each_call(store, tmp_path)[call]()


def test_a_reset_in_the_middle_of_a_part_costs_that_part(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    sent = make_file(tmp_path / "large", 13 * MIB)
    server.proxy.add(Fault(kind="reset", path="partNumber=2"))
    s3.put(sent, "large")
    parts = [request.partition("partNumber=")[2][:1] for request in server.proxy.requests if "partNumber=" in request]
    assert sorted(parts) == ["1", "2", "2", "3"]
    s3.get("large", tmp_path / "got")
    assert sent.read_bytes() == (tmp_path / "got").read_bytes()


@pytest.mark.parametrize("fault", ["partNumber=2", "uploadId"])
def test_a_large_file_that_cannot_be_stored_leaves_nothing_behind(
    server: S3Server, s3: S3Store, tmp_path: Path, fault: str
) -> None:
    method = "PUT" if fault == "partNumber=2" else "POST"  # a part, or what puts the parts together
    server.proxy.add(Fault(kind="reset", method=method, path=fault, times=QUICK.num_attempts))
    with pytest.raises(NetworkError):
        s3.put(make_file(tmp_path / "large", 13 * MIB), "large")
    assert list(s3.list()) == [] and server.unfinished_uploads() == []


def test_an_answer_that_is_always_cut_short_leaves_no_file(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    write_text(s3, "a", "x" * 1000, tmp_path)
    server.proxy.add(Fault(kind="truncate", method="GET", times=ALWAYS))
    with pytest.raises(NetworkError):
        s3.get("a", tmp_path / "folder" / "got")
    assert list((tmp_path / "folder").iterdir()) == []
    with pytest.raises(NetworkError):
        list(s3.list())


def test_a_large_answer_that_is_cut_short_once_is_completed(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    sent = make_file(tmp_path / "large", 13 * MIB)
    s3.put(sent, "large")
    server.proxy.add(Fault(kind="truncate", method="GET", times=2))
    s3.get("large", tmp_path / "got")
    assert sent.read_bytes() == (tmp_path / "got").read_bytes()


def test_a_clock_that_is_wrong_is_named_with_how_wrong_it_is(server: S3Server, s3: S3Store) -> None:
    headers = (("Date", "Sun, 22 Nov 2020 06:00:00 GMT"),)
    server.proxy.add(Fault(kind="error", code="RequestTimeTooSkewed", times=ALWAYS, headers=headers))
    with pytest.raises(MachineError, match=r"clock is wrong by \d{3},\d{3},\d{3} seconds.* set the clock"):
        list(s3.list())


@pytest.mark.parametrize("region", [None, "eu-central-1"])
def test_a_bucket_in_another_region_names_the_setting_and_the_region(server: S3Server, s3: S3Store, region: str | None) -> None:
    headers = (("x-amz-bucket-region", region),) if region else ()
    server.proxy.add(Fault(kind="error", code="PermanentRedirect", times=ALWAYS, headers=headers))
    with pytest.raises(SettingsError) as caught:
        list(s3.list())
    assert f"AWS_DEFAULT_REGION={region}" in str(caught.value) if region else "AWS_DEFAULT_REGION" in str(caught.value)


def test_an_endpoint_without_batch_delete_loses_nothing(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    for name in ("x/manifest.json", "x/a", "x/deep/b", "y/c"):
        write_text(s3, name, "text", tmp_path)
    server.proxy.add(Fault(kind="error", code="NotImplemented", method="POST", path="delete", times=ALWAYS))
    delete_folder(s3, "x")
    assert list(s3.list()) == ["y/c"]
    first = next(request for request in server.proxy.requests if request.startswith("DELETE"))
    assert first.endswith("/x/manifest.json")


@pytest.mark.parametrize("credentials", [{"aws_access_key_id": "half"}, {"endpoint_url": "no-scheme"}, {"region_name": "a b"}])
def test_credentials_that_boto3_refuses_are_a_wrong_setting(credentials: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        list(open_store("s3://bucket/x", credentials=credentials).list())


def test_a_secure_address_of_a_server_that_is_not_is_a_wrong_setting(server: S3Server) -> None:
    address = server.proxy.url.replace("http://", "https://")
    store = S3Store(BUCKET, "x", {**server.credentials, "endpoint_url": address}, transfer=Transfer(num_attempts=1))
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL_S3"):
        list(store.list())


def test_a_large_file_is_never_whole_in_memory(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    program = f"""
        import resource, sys
        from pathlib import Path
        from job.keep.s3 import MIB, S3Store, Transfer
        keys = {server.credentials!r}
        store = S3Store({BUCKET!r}, {tmp_path.name!r}, keys, transfer=Transfer(multipart_bytes=6 * MIB, part_bytes=5 * MIB))
        store.put(Path(sys.argv[1]), "small")
        store.get("small", Path(sys.argv[2] + ".got"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        store.put(Path(sys.argv[2]), "large")
        store.get("large", Path(sys.argv[2] + ".got"))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    files = [make_file(tmp_path / "small", 1000), make_file(tmp_path / "large", 64 * MIB)]
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 40, "MiB more than before, for a file of 64"
    assert (tmp_path / "large.got").stat().st_size == 64 * MIB


# What preflight finds out.


@pytest.mark.parametrize(
    ("methods", "rights"),
    [
        (("PUT",), ["write"]),
        (("PUT", "DELETE"), ["write", "delete"]),
        (("DELETE",), ["delete"]),
        (("GET /bucket/",), ["read"]),
        (("GET list-type",), ["list"]),
    ],
)
def test_each_right_that_is_lacking_is_named(
    server: S3Server, s3: S3Store, tmp_path: Path, methods: tuple[str, ...], rights: list[str]
) -> None:
    for method in methods:
        verb, _, path = method.partition(" ")
        path = f"/{BUCKET}/{tmp_path.name}/" if path.startswith("/") else path
        server.proxy.add(Fault(kind="error", code="AccessDenied", method=verb, path=path, times=ALWAYS))
    with pytest.raises(SettingsError) as caught:
        check_store(s3, tmp_path / "scratch")
    found = [str(problem).partition("may not ")[2].split()[0] for problem in caught.value.problems]
    assert found == rights
    assert all(str(problem).startswith(f"OUTPUT_URI={s3.uri}: ") for problem in caught.value.problems)


def test_a_key_that_is_wrong_altogether_is_one_problem(server: S3Server, s3: S3Store, tmp_path: Path) -> None:
    server.proxy.add(Fault(kind="error", code="InvalidAccessKeyId", times=ALWAYS))
    with pytest.raises(SettingsError) as caught:
        check_store(s3, tmp_path / "scratch")
    assert len(caught.value.problems) == 1


def test_a_store_that_works_passes_and_keeps_nothing(store: Store, tmp_path: Path) -> None:
    check_store(store, tmp_path / "scratch")
    assert list(store.list()) == []


def test_a_store_that_forgets_is_refused(tmp_path: Path) -> None:
    class Forgetful:
        def __init__(self) -> None:
            self.uri = "forgetful"
            self.redact: Callable[[str], str] = str

        def put(self, path: Path, name: str) -> None:
            pass

        def get(self, name: str, path: Path) -> None:
            raise MissingError(name)

        def list(self, prefix: str = "") -> Iterator[str]:
            return iter(())

        def delete(self, name: str) -> None:
            pass

    with pytest.raises(MachineError, match="read back"):
        check_store(Forgetful(), tmp_path)


def test_opening_a_store_contacts_nothing_and_loads_boto3_only_for_s3() -> None:
    program = (
        "import sys; from job.keep.checkpoints import open_store_for_test"
        if False
        else (
            "import sys, job.keep.checkpoints, job.keep.mirror, job.keep.ledger; from job.keep.store import open_store\n"
            "open_store('/nowhere'); print('boto3' in sys.modules, 'torch' in sys.modules)"
        )
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert child.stdout.split() == ["False", "False"], child.stderr
