"""What the kernel refuses a process from now on: a list of system calls in, an installed seccomp filter out.

The filter works for any user, without privileges and inside containers, and cannot be taken off again. It is a list of
what is refused, not of what is allowed: new Pythons and C libraries keep working, and a call that is not listed passes.
x86_64 and aarch64 only. Numbers: asm/unistd_64.h and asm-generic/unistd.h of Linux 6.6; layout: linux/seccomp.h, linux/filter.h.
"""

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, ..., BPF_RET|K
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_*
_NUMBER_AT, _ARCH_AT, _ARGS_AT = 0, 4, 16  # offsets in struct seccomp_data
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, linux/audit.h
_X32 = 0x40000000  # x86_64's second set of numbers begins here
_CLONE_THREAD = 0x10000


class Call(NamedTuple):
    """A system call's numbers; None where the machine has no such call."""

    x86_64: int | None
    aarch64: int | None


REFUSED = {
    # A second process: nothing can outlive the first.
    "fork": Call(57, None),
    "vfork": Call(58, None),
    "execve": Call(59, 221),
    "execveat": Call(322, 281),
    # The network, and sockets of other processes. socketpair() stays: asyncio wakes itself with one.
    "socket": Call(41, 198),
    "connect": Call(42, 203),
    "bind": Call(49, 200),
    "listen": Call(50, 201),
    "sendmsg": Call(46, 211),
    "sendmmsg": Call(307, 269),
    # io_uring would do all of the above unseen.
    "io_uring_setup": Call(425, 425),
    "io_uring_enter": Call(426, 426),
    "io_uring_register": Call(427, 427),
    # Other processes: signals, memory, priority.
    "tkill": Call(200, 130),
    "rt_sigqueueinfo": Call(129, 138),
    "rt_tgsigqueueinfo": Call(297, 240),
    "pidfd_open": Call(434, 434),
    "pidfd_send_signal": Call(424, 424),
    "pidfd_getfd": Call(438, 438),
    "ptrace": Call(101, 117),
    "process_vm_readv": Call(310, 270),
    "process_vm_writev": Call(311, 271),
    "process_madvise": Call(440, 440),
    "kcmp": Call(312, 272),
    "setpriority": Call(141, 140),
    "ioprio_set": Call(251, 30),
    "sched_setaffinity": Call(203, 122),
    "sched_setscheduler": Call(144, 119),
    "sched_setparam": Call(142, 118),
    "sched_setattr": Call(314, 274),
    "migrate_pages": Call(256, 238),
    "move_pages": Call(279, 239),
    "setpgid": Call(109, 154),
    "setsid": Call(112, 157),
    # Memory that no limit counts, and what stays in the kernel after the process.
    "memfd_create": Call(319, 279),
    "memfd_secret": Call(447, 447),
    "shmget": Call(29, 194),
    "semget": Call(64, 190),
    "msgget": Call(68, 186),
    "mq_open": Call(240, 180),
    "add_key": Call(248, 217),
    "request_key": Call(249, 218),
    "keyctl": Call(250, 219),
    # New powers.
    "unshare": Call(272, 97),
    "setns": Call(308, 268),
    "bpf": Call(321, 280),
    "perf_event_open": Call(298, 241),
    "userfaultfd": Call(323, 282),
    "personality": Call(135, 92),
    # By path, where Landlock before Linux 6.2 looks away; ftruncate() of an open file stays.
    "truncate": Call(76, 45),
}
ONLY_ITSELF = {"kill": Call(62, 129), "tgkill": Call(234, 131), "prlimit64": Call(302, 261)}
"""Calls whose first argument is a process: only this one, and 0 for prlimit64."""
UNKNOWN = {"clone3": Call(435, 435), "openat2": Call(437, 437)}
"""Their flags lie behind a pointer that a filter cannot follow: "not implemented" makes libraries use the older call."""
PRETENDED = {
    "chmod": Call(90, None),
    "fchmod": Call(91, 52),
    "fchmodat": Call(268, 53),
    "fchmodat2": Call(452, 452),
    "chown": Call(92, None),
    "lchown": Call(94, None),
    "fchown": Call(93, 55),
    "fchownat": Call(260, 54),
    "utime": Call(132, None),
    "utimes": Call(235, None),
    "futimesat": Call(261, None),
    "utimensat": Call(280, 88),
    "setxattr": Call(188, 5),
    "lsetxattr": Call(189, 6),
    "fsetxattr": Call(190, 7),
    "removexattr": Call(197, 14),
    "lremovexattr": Call(198, 15),
    "fremovexattr": Call(199, 16),
}
"""Landlock does not cover these. They succeed and change nothing, so that shutil.copy() still works."""
CLONE = Call(56, 220)
SENDTO = Call(44, 206)
OPEN = (Call(2, None), Call(257, 56))
"""open and openat; their flags are the second and the third argument."""
CHANGES_FILES = {
    "creat": Call(85, None),
    "rename": Call(82, None),
    "renameat": Call(264, 38),
    "renameat2": Call(316, 276),
    "unlink": Call(87, None),
    "unlinkat": Call(263, 35),
    "rmdir": Call(84, None),
    "mkdir": Call(83, None),
    "mkdirat": Call(258, 34),
    "link": Call(86, None),
    "linkat": Call(265, 37),
    "symlink": Call(88, None),
    "symlinkat": Call(266, 36),
    "mknod": Call(133, None),
    "mknodat": Call(259, 33),
}
"""Refused where there is no Landlock to keep changes in one folder."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


Step = tuple[int, int, int, int]
"""Code, steps to skip when true, steps to skip when false, operand."""


def build_filter(machine: str, pid: int, *, no_file_changes: bool) -> list[Step]:
    """Build the program for one process; the accumulator holds the call's number between its blocks.

    Raises:
        KeyError: no numbers are known for this machine.
    """
    steps: list[Step] = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, _ARCHES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        steps += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    refused = [*REFUSED.values(), *(CHANGES_FILES.values() if no_file_changes else ())]
    for calls, number in ((refused, errno.EPERM), (UNKNOWN.values(), errno.ENOSYS), (PRETENDED.values(), 0)):
        for nr in _numbers(calls, machine):
            steps += [(_EQUAL, 0, 1, nr), (_RETURN, 0, 0, _FAIL | number)]
    for nr in _numbers(ONLY_ITSELF.values(), machine):
        allowed = [pid, 0] if nr in _numbers([ONLY_ITSELF["prlimit64"]], machine) else [pid]
        steps += _block(nr, [_argument(0), *((_EQUAL, len(allowed) - place, 0, value) for place, value in enumerate(allowed))])
    for nr in _numbers([CLONE], machine):
        steps += _block(nr, [_argument(0), (_ANY_BIT, 1, 0, _CLONE_THREAD)])
    for nr in _numbers([SENDTO], machine):  # send() is sendto() without an address
        steps += _block(nr, [_argument(4), (_EQUAL, 0, 2, 0), _argument(4, high=True), (_EQUAL, 1, 0, 0)])
    if no_file_changes:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        for place, call in enumerate(OPEN, start=1):
            for nr in _numbers([call], machine):
                steps += _block(nr, [_argument(place), (_ANY_BIT, 0, 1, writing)])
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _numbers(calls: Iterable[Call], machine: str) -> list[int]:
    numbers = (getattr(call, machine) for call in calls)
    return [nr for nr in numbers if nr is not None]


def _argument(place: int, *, high: bool = False) -> Step:
    return _LOAD, 0, 0, _ARGS_AT + 8 * place + (4 if high else 0)  # both machines are little-endian


def _block(nr: int, tests: Sequence[Step]) -> list[Step]:
    """For this call: tests that fall through to a refusal, or skip it to be allowed."""
    body = [*tests, (_RETURN, 0, 0, _FAIL | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), nr), *body]


def install_filter(*, no_file_changes: bool) -> None:
    """Refuse these calls to this process, its threads from now on, for good.

    Raises:
        OSError: the kernel has no seccomp filters, or forbids them.
        KeyError: no numbers are known for this machine.
    """
    steps = build_filter(os.uname().machine, os.getpid(), no_file_changes=no_file_changes)
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    set_process(PR_SET_NO_NEW_PRIVS, 1)
    set_process(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def set_process(option: int, value: int, pointer: int = 0) -> None:
    """Call prctl(2), which `os` does not have.

    Raises:
        OSError: the kernel refuses.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    if prctl(option, value, pointer, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
