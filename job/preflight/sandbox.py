"""That the sandbox for a model's code can stand on this machine, tried by running something in it."""

from job.errors import MachineError
from job.scoring.sandbox import run_python


def check_sandbox() -> str:
    """Run nothing in it.

    Raises:
        MachineError: the kernel lacks what it stands on; scores would be unknown after all the training was paid for.
    """
    verdict = run_python("pass")
    if not verdict.ok:
        raise MachineError(
            f"EVAL_PROMPTS: the sandbox that answers are tested in does not work here ({verdict.reason}); score by "
            "exact_match, contains or json, or take another machine"
        )
    return "answers can be tested"
