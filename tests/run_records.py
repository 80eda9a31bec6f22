"""Records of runs that never were, as a run writes them, and the truth about them: for the history's tests and benchmark."""

import json
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
DATA = ("mlabonne/FineTome-100k", "owner/contracts-tr")
GPUS = ("RTX 4090", "L40S", "H100 SXM", None)

REASONS = {
    "not_published": "HUB_MODEL_ID=owner/adapter: the Hub refuses the token (403); it is safe in the store",
    "budget": "MAX_COST_USD={number}: the budget is reached, ${number}.40 spent in all attempts; {number} steps are trained; "
    "raise it and start again to continue",
    "preempted": "stopped by a signal; the checkpoint of step {number} is saved; start again with the same settings to continue",
    "network": "OUTPUT_URI=s3://bucket/{hex}: step-{number}: Could not connect to the endpoint; start again when it is well",
    "out_of_memory": "PER_DEVICE_TRAIN_BATCH_SIZE=1: out of GPU memory (tried to allocate {number} MiB); nothing is left to give "
    "up at micro-batch 1 with activations recomputed",
    "diverged": "LEARNING_RATE=0.00{number}: the loss is nan at step {number}; 2 roll-backs did not help; these examples were in "
    "it: /data/{hex}.jsonl row {number}, /data/{hex}.jsonl row 7",
    "data": "MIN_SAMPLES=8: only {number} examples survive (64 template_refuses); loosen the filters, or add data",
    "settings": "HF_TOKEN: the Hub refuses it for {hex}; make a new one",
    "no_fit": "MODEL_ID=owner/model: the run needs {number}.2 GiB to be safe and does not fit",
    "machine": "HANG_SECONDS={number}: the train process was silent for longer and was killed",
    "crashed": "RuntimeError: CUDA error: an illegal memory access at 0x{hex}",
}
STATUS = {
    "finished": 0, "published": 0, "settings": 2, "data": 3, "no_fit": 4, "out_of_memory": 4, "machine": 5, "not_published": 6,
    "diverged": 7, "budget": 8, "preempted": 75, "network": 75, "crashed": 1,
}  # fmt: skip
STOPPED = {"published": "finished", "not_published": "finished"} | dict.fromkeys(
    ("settings", "data", "no_fit", "machine", "network"), "crashed"
)
"""What the ledger says, where it is not the outcome's own name."""
WITHOUT_REPORT = {"published": "finished", "not_published": "vanished"} | dict.fromkeys(
    ("settings", "data", "no_fit", "machine", "network"), "crashed"
)
"""As far as it can be known when the report is gone."""
HAPPENINGS = {
    "out_of_memory": "out of memory: continuing with micro-batch 1 x 4, the same examples per step",
    "diverged": "diverged at step 7: back to the last checkpoint before step 7, learning rate x 0.5, steps 7-7 are skipped",
    "hung": "HANG_SECONDS=30: the train process was silent for longer and was killed; its stacks are in stacks.txt of the run; "
    "starting it again",
}
_MORE = {"loss": 1.234567890123, "learning_rate": 0.0001999872, "grad_norm": 0.71234567, "memory_bytes": 17_179_869_184}
OUTCOMES = ("published", "finished", *REASONS, "vanished", "running")
WEIGHTS = (20, 45, 4, 8, 8, 4, 12, 5, 5, 3, 3, 4, 9, 10, 3)
DAMAGES = (
    "",
    "no report",
    "report cut",
    "report garbage",
    "report types",
    "no attempts",
    "attempt cut",
    "attempt folder",
    "nothing left",
)
DAMAGE_WEIGHTS = (60, 3, 3, 3, 4, 3, 4, 3, 2)


@dataclass
class TrueRun:
    """What is to be found out about a run."""

    folder: str
    outcome: str
    model: str
    dataset: str
    attempts: list[str] = field(default_factory=list)
    """How each ended."""
    seconds: list[float | None] = field(default_factory=list)
    costs: list[float | None] = field(default_factory=list)
    survived: set[str] = field(default_factory=set)
    loss: float | None = None
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    memory_ratio: float | None = None
    gpu: str | None = None
    tokens_per_second: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.outcome in ("published", "finished")

    @property
    def is_over(self) -> bool:
        return self.outcome not in ("running", "unreadable")


@dataclass
class Records:
    """Files by name, and the truth about them."""

    files: dict[str, bytes] = field(default_factory=dict)
    runs: list[TrueRun] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Names that have to be told."""
    may_be_unread: set[str] = field(default_factory=set)
    """Names that need not be read at all."""


def make_records(seed: int, count: int, *, bulk: int = 0) -> Records:
    """Runs of every outcome with one to five attempts, one in three of them damaged, among files of other programs.

    Args:
        bulk: rows of each curve, for reports as large as real ones.
    """
    dice, records = random.Random(seed), Records()
    for number in range(count):
        outcome = OUTCOMES[number] if number < len(OUTCOMES) else dice.choices(OUTCOMES, WEIGHTS)[0]
        damage = DAMAGES[number % 40] if 20 <= number % 40 < len(DAMAGES) else ""
        damage = damage or (dice.choices(DAMAGES, DAMAGE_WEIGHTS)[0] if number >= len(OUTCOMES) else "")
        _Maker(dice, records, f"run-{number:04d}", outcome, damage, bulk).make()
    _add_foreign_files(records)
    return records


class _Maker:
    """Writes one run."""

    def __init__(self, dice: random.Random, records: Records, folder: str, outcome: str, damage: str, bulk: int) -> None:
        self.dice, self.records, self.damage, self.bulk = dice, records, damage, bulk
        self.run = TrueRun(folder, outcome, dice.choice(MODELS), dice.choice(DATA))
        self.has_report = outcome not in ("vanished", "running")
        self.files: list[dict[str, Any]] = []
        self.curve: list[dict[str, float]] = []

    def make(self) -> None:
        self._attempts()
        self._settings()
        report = self._report() if self.has_report else None
        self._put("settings.json", {**self.run.settings, "publish": {"hub_model_id": None}})
        self._put("metrics.jsonl", b'{"step": 1}\n')
        for name in ("manifest.json", "adapter_model.safetensors", "settings.json"):
            self._put(f"checkpoints/step-000010/{name}", b"{")
        self._put("data/0123456789abcdef/report.json", b"{")
        if self.run.is_finished:
            self._put("DONE", {"run_id": self.run.folder})
        for number, file in enumerate(self.files, start=1):
            self._put(f"attempts/{number:04d}.json", file)
        if report is not None:
            self._put("report.json", report)
        self._learned()
        self._damage(report)
        self.records.runs.append(self.run)

    def _attempts(self) -> None:
        outcome, dice = self.run.outcome, self.dice
        endings = [dice.choice(("preempted", "vanished", "budget", "crashed")) for _ in range(dice.choice((0, 0, 0, 1, 1, 2, 4)))]
        endings.append({"published": "finished", "not_published": "finished"}.get(outcome, outcome))
        price = dice.choice((None, 0.34, 0.79, 2.49))
        rate, step, tokens = float(dice.randrange(500, 5000)), 0, 0
        when = datetime.now(UTC) - timedelta(days=dice.randrange(5, 120), seconds=dice.randrange(86_400))
        for place, ending in enumerate(endings):
            is_last = place == len(endings) - 1
            seconds = float(dice.randrange(60, 20_000))
            if is_last and outcome == "running":
                when = datetime.now(UTC) - timedelta(seconds=seconds)
            happenings = [{"at": when.isoformat(), "step": 3, "text": HAPPENINGS[name]} for name in self._met(is_last)]
            first = step
            for _ in range(3):
                step, tokens = step + 10, tokens + 10_000
                self.curve.append({"step": step, "num_tokens": tokens, "seconds": (tokens - first * 1000) / rate, "loss": 1.5})
            self.files.append(
                {
                    "started": when.isoformat(),
                    "ended": (when + timedelta(seconds=seconds)).isoformat(),
                    "machine": "m",
                    "price_usd_per_hour": price,
                    "first_step": first,
                    "last_step": step,
                    "stopped": None if ending in ("vanished", "running") else STOPPED.get(ending, ending),
                    "notes": {"save_seconds": 1.0, "happenings": happenings},
                    "of_a_later_version": {"any": ["thing"]},
                }
            )
            when += timedelta(seconds=seconds + 60)
            self.run.attempts.append(ending)
            self.run.seconds.append(seconds)
            self.run.costs.append(None if price is None else price * seconds / 3600)
            if not is_last:
                self.run.survived.add(ending)
        self.run.gpu, self.run.tokens_per_second = dice.choice(GPUS) or "cpu", rate
        if not self.has_report:
            self.run.tokens_per_second = None
            self.run.gpu = None

    def _met(self, is_last: bool) -> list[str]:
        if not is_last or self.dice.random() < 0.7:
            return []
        names = self.dice.sample(sorted(HAPPENINGS), self.dice.randrange(1, 3))
        self.run.survived.update(names)
        return names

    def _settings(self) -> None:
        dice = self.dice
        self.run.settings = {
            "model": {"model_id": self.run.model, "model_revision": None, "load_in_4bit": True},
            "lora": {"lora_r": dice.choice((8, 16)), "lora_alpha": 32, "lora_target_modules": ["all-linear"]},
            "data": {"datasets": [{"where": self.run.dataset, "split": "train"}], "max_length": 2048, "eval_fraction": 0.05},
            "train": {
                "learning_rate": dice.choice((1e-4, 2e-4, 5e-4)),
                "num_train_epochs": 1.0,
                "seed": dice.choice((42, 42, 42, 7)),
                "per_device_train_batch_size": dice.choice((1, 2, 4)),
                "gradient_accumulation_steps": None,
                "effective_batch_size": 16,
            },
        }

    def _report(self) -> dict[str, Any]:
        run, dice, outcome = self.run, self.dice, self.run.outcome
        run.reason = REASONS.get(outcome, "").format(number=dice.randrange(2, 900), hex=f"{dice.getrandbits(64):016x}") or None
        run.loss = round(dice.uniform(0.8, 2.5), 6) if dice.random() < 0.9 else None
        if run.is_finished:
            run.memory_ratio = round(dice.uniform(0.8, 1.4), 4)
        chosen = {"step": 30, "eval_loss": run.loss, "by": "eval_loss"}
        attempts = [{**file, "stopped": file["stopped"] or "crashed", "is_unreadable": False} for file in self.files]
        texts = [one for file in self.files for one in file["notes"]["happenings"]]
        return {
            "schema_version": 1,
            "run_id": run.folder,
            "stopped": STOPPED.get(outcome, outcome),
            "exit_status": STATUS[outcome],
            "reason": run.reason,
            "plan": {"gpu": None if run.gpu == "cpu" else run.gpu, "num_steps": 30},
            "comparison": [
                {"what": "memory_bytes", "ratio_to_plan": run.memory_ratio or 1.0},
                {"what": "seconds", "ratio_to_plan": None},
            ],
            "actual": {
                "seconds": sum(filter(None, run.seconds)),
                "cost_usd": "unknown",
                "num_steps": 30,
                "num_tokens": 1,
                "device": "cpu",
            },
            "data": {"sources": [{"source": run.dataset, "num_rows": 1000, "held_out": False}], "num_eval": 50},
            "attempts": attempts,
            "curve": self.curve + [{"step": 10**6 + row, "num_tokens": 0, "seconds": 0, **_MORE} for row in range(self.bulk)],
            "evaluations": [{"step": 0, "eval_loss": 4.0}],
            "chosen": chosen if run.loss is not None else None,
            "happenings": texts,
            "publication": {"repo_id": "o/a", "url": f"https://huggingface.co/o/{run.folder}"}
            if outcome == "published"
            else None,
            "samples": [{"prompt": "p", "before": "b" * self.bulk, "after": "a" * self.bulk}],
            "model": {"id": run.model, "revision": None},
            "settings": run.settings,
            "versions": {"torch": "2"},
            "of_a_later_version": [1, {"any": "thing"}],
        } | ({} if run.loss is not None else {"evaluations": []})

    def _learned(self) -> None:
        """Some runs wrote their pace down, which goes before what their curve says."""
        if self.run.tokens_per_second is None or self.dice.random() < 0.5:
            return
        self.run.tokens_per_second = float(self.dice.randrange(500, 5000))
        learned = {"tokens_per_second": self.run.tokens_per_second, "gpu": self.run.gpu, "model": self.run.model, "num_steps": 9}
        self.records.files[f".measured/abc/{self.run.folder}.json"] = json.dumps(learned).encode()
        self.is_measured = True

    is_measured = False

    def _damage(self, report: dict[str, Any] | None) -> None:
        folder, damage, last = self.run.folder, self.damage, f"attempts/{len(self.files):04d}.json"
        if damage.startswith(("report", "no report")) and report is not None:
            name = f"{folder}/report.json"
            whole = self.records.files.pop(name)
            if damage == "report types":
                wrong = {**report, "actual": "nonsense", "attempts": 7, "settings": [1], "curve": {"step": 1}, "comparison": None}
                self.records.files[name] = json.dumps(wrong).encode()
                self.run.memory_ratio = None
                self._lose_pace()
            else:
                self._lose_report()
            if damage in ("report cut", "report garbage"):
                self.records.files[name] = whole[: len(whole) // 2] if damage == "report cut" else self.dice.randbytes(300)
            if damage != "no report":
                self.records.unread.add(name)
        elif damage == "no attempts" and report is not None:
            for name in [name for name in self.records.files if name.startswith(f"{folder}/attempts/")]:
                del self.records.files[name]
            self.run.attempts = ["crashed" if one == "vanished" else one for one in self.run.attempts]  # all a report says
            self.run.survived = {"crashed" if one == "vanished" else one for one in self.run.survived}
        elif damage.startswith("attempt"):
            name = f"{folder}/{last}"
            whole = self.records.files.pop(name)
            self.records.files.update({name: whole[:-30]} if damage == "attempt cut" else {f"{name}/inside.txt": b"x"})
            if report is None:  # nothing else tells of it
                self.run.outcome = self.run.attempts[-1] = "unreadable"
                self.run.seconds[-1] = self.run.costs[-1] = None
                self._forget_notes()
                self.records.unread.add(name)
            else:
                self.records.may_be_unread.add(name)
        elif damage == "nothing left":
            for name in [name for name in self.records.files if name.startswith(f"{folder}/") and "settings" not in name]:
                del self.records.files[name]
            self._lose_report()
            self.run.outcome, self.run.attempts, self.run.seconds, self.run.costs = "unreadable", [], [], []
            self.run.survived = set()

    def _lose_report(self) -> None:
        self.run.outcome = WITHOUT_REPORT.get(self.run.outcome, self.run.outcome)
        self.run.attempts[-1] = WITHOUT_REPORT.get(self.run.attempts[-1], self.run.attempts[-1])
        self.run.loss = self.run.memory_ratio = self.run.reason = None
        self._lose_pace()

    def _lose_pace(self) -> None:
        if not self.is_measured:
            self.run.tokens_per_second = None

    def _forget_notes(self) -> None:
        self.run.survived -= set(HAPPENINGS)

    def _put(self, name: str, content: bytes | dict[str, Any]) -> None:
        self.records.files[f"{self.run.folder}/{name}"] = content if isinstance(content, bytes) else json.dumps(content).encode()


def _add_foreign_files(records: Records) -> None:
    records.files |= {
        "notes.txt": b"mine",
        "settings.json": b'{"editor": "theirs"}',
        ".vscode/settings.json": b"{",
        "tool/settings.json": b'{"colour": "red"}',
        "pytest/report.json": b'{"tests": 5, "passed": true}',
        "prepared-only/data/0123456789abcdef/tally.json": b"{}",
        "just-done/DONE": b"",
        ".measured/abc/gone.json": b'{"tokens_per_second": "NaN"}',
        ".measured/abc/cut.json": b'{"tokens',
    }
    records.unread |= {".measured/abc/gone.json", ".measured/abc/cut.json"}
