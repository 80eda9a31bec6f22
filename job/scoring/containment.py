"""Limits and rights of the process that calls: taken away in the right order, before it runs code that nobody has read.

What each layer gives, from the surest on:

- rlimits: memory, processor time, size of a file, open files, no core dump. Any Linux.
- seccomp (`seccomp.py`): no second process, no network, no signal to another process. Required.
- another user: root becomes nobody, where nobody can read Python's library; else root's capabilities go. Either way the
  environment and the memory of root's processes are closed to it.
- Landlock (Linux 5.13): reads only Python's library, writes only its folder, sees nothing of other processes in /proc. Where
  it is missing, seccomp refuses every change of a file, and an ordinary user's process enters a user namespace if it may,
  which closes other processes to it as well.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from job.scoring.seccomp import PR_SET_NO_NEW_PRIVS, install_filter, set_process

MAX_FILE_BYTES = 16 * 2**20
MAX_OPEN_FILES = 64
THREAD_STACK_BYTES = 8 * 2**20
"""Linux's default; of addresses, so that a GiB holds 125 threads and no more."""
NOBODY = 65534
"""The user and group of this number own nothing on any Linux."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4  # linux/prctl.h
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # asm-generic/unistd.h, the same on every machine
_PATH_BENEATH, _GET_VERSION = 1, 1  # linux/landlock.h
_READ_FILE, _READ_FOLDER, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1  # LANDLOCK_ACCESS_FS_*
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
"""Landlock's version -> every right over files that it knows; of later ones only devices' ioctl, which nobody needs."""
_READABLE_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_READABLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/dev/urandom", "/dev/random")


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


def contain(*, parent: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Take from this process, for good, what code in it does not need; the current folder stays writable.

    The process ends when its parent does.

    Raises:
        OSError: the kernel cannot contain it.
        KeyError: no system calls are known for this machine.
    """
    _limit(memory_bytes, cpu_seconds)
    _share_heap()
    dropped = os.geteuid() == 0 and _become_nobody()
    set_process(PR_SET_NO_NEW_PRIVS, 1)
    restricted = _restrict_files(Path.cwd())
    if not restricted and not dropped:
        _enter_user_namespace()
    _drop_capabilities()
    # After the change of user, which would undo both.
    set_process(PR_SET_DUMPABLE, 0)
    set_process(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before it could be asked for
    install_filter(no_file_changes=not restricted)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),  # SIGXCPU can be caught, SIGKILL a second later cannot
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_STACK, THREAD_STACK_BYTES, THREAD_STACK_BYTES),
    ):
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _share_heap() -> None:
    """One heap for all threads: glibc would set 64 MiB of addresses aside for each, and 20 threads would fill a GiB."""
    m_arena_max = -8  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has neither
        libc.mallopt(m_arena_max, 1)


def _become_nobody() -> bool:
    """Whether root could become nobody and still import; if not, it stays who it is."""
    needed = _library_folders()
    try:
        os.seteuid(NOBODY)
    except OSError:  # a container without this capability, or with one user
        return False
    try:
        Path.cwd().stat()
        for folder in needed:
            next(folder.iterdir(), None)
    except OSError:
        os.seteuid(0)
        return False
    os.seteuid(0)
    try:
        os.setgroups([])
        os.chown(".", NOBODY, NOBODY)
    except OSError:
        return False
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return True


def _library_folders() -> list[Path]:
    """Where this Python's standard library lies, with its compiled modules: without site, nothing else is on the path."""
    return [Path(entry) for entry in sys.path if Path(entry).is_dir()]


def _restrict_files(folder: Path) -> bool:
    """Leave this process Python's library to read and one folder to change; False where there is no Landlock."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if version < 1:
        return False
    everything = _RIGHTS[min(version, max(_RIGHTS))]
    handled = ctypes.c_uint64(everything)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(ctypes.sizeof(handled)), 0)
    if ruleset < 0:
        return False
    base = Path(sys.base_prefix, "lib")
    allowed = {Path(path): _READ_FILE for path in _READABLE_FILES} | {Path("/dev/null"): _READ_FILE | _WRITE_FILE}
    allowed |= dict.fromkeys((*map(Path, _READABLE_FOLDERS), base, *_library_folders()), _READ_FILE | _READ_FOLDER)
    allowed[folder] = everything
    try:
        for path, rights in allowed.items():
            if path.exists():
                _allow(libc, ruleset, path, rights)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(ruleset)
    return True


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathRule(rights, opened)
        if libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(opened)


def _enter_user_namespace() -> None:
    """In a namespace of its own a process may not look into those outside, though they are the same user's."""
    clone_new_user = 0x10000000  # linux/sched.h
    ctypes.CDLL(None).unshare(clone_new_user)  # refused in many containers: then nothing is changed


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
