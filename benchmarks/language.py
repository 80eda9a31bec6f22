"""How well LANGUAGE finds Turkish: precision and recall on paragraphs of Debian's translated manual pages.

    python benchmarks/language.py [--debs DIR] [--write DIR] [--language tr] [--model PATH] [--limit N] [--json FILE]

In: the packages manpages-tr, manpages-de, manpages-fr and manpages, fetched with `apt-get download` (no root is needed) or
taken from `--debs`. Out: a table, JSON, and status 1 when precision or recall is below what is promised. The truth is the
package that a paragraph comes from. Translated packages hold some untranslated English: paragraphs that stand word for
word in the English package too, or in two translated ones, are left out; what untranslated English is left counts against
the detector. Not handled: pages written in mdoc, tables and listings.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from job.data.language import Languages
from job.data.messages import Example
from job.settings import DataSettings

PACKAGES = {"tr": "manpages-tr", "de": "manpages-de", "fr": "manpages-fr", "en": "manpages"}
MIN_WORDS, MAX_WORDS = 20, 300
MIN_PRECISION, MIN_RECALL = 0.995, 0.99

_SKIPPED = {"ig": "..", "de": "..", "am": "..", "nf": ".fi", "EX": ".EE", "TS": ".TE", "EQ": ".EN"}
"""Blocks that hold comments, macros, listings or tables, by the line that ends each."""
_FONTS = {"B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "UR", "MT", "UE", "ME"}
"""Macros whose arguments are part of the sentence; every other one ends the paragraph."""
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_GLYPHS = {
    "aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "en": "–", "em": "—", "bu": "•", "rs": "\\", "ti": "~",
    "ha": "^", "co": "©", "mu": "×", "Fo": "«", "Fc": "»", "hy": "-", "aa": "´", "ga": "`", "->": "→", "<-": "←", "+-": "±",
}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?: ["\#].*                            # a comment
        | f(?:\[[^\]]*\]|\(..|.)                 # a font
        | s[-+]?(?:\[[^\]]*\]|\d+|.)             # a size
        | [hvwmMn*](?:'[^']*'|\[[^\]]*\]|\(..|.) # a movement, a colour, a register, a string
        | \[u(?P<code>[0-9A-F]{4,5})\]
        | \[(?P<long>[^\]]*)\] | \((?P<two>..)
        | (?P<one>.) )""",
    re.VERBOSE,
)
_ONE = {"-": "-", "e": "\\", "~": " ", " ": " ", "0": " ", "t": " ", "'": "´", "`": "`", ".": ".", "\\": "\\"}


def strip_roff(source: str) -> Iterator[str]:
    """Yield a manual page's paragraphs as plain text, one line each."""
    words: list[str] = []
    end: str | None = None  # of the skipped block that we are in
    for line in source.splitlines():
        macro = re.match(r"[.']\s*([^\s\\]*)\s*(.*)", line)
        if end is not None:
            end = None if line.rstrip().startswith(end) else end
        elif macro is None and line.strip():
            words += _plain(line).split()
        elif macro is not None and macro[1] in _FONTS:
            arguments = [quoted or bare for quoted, bare in re.findall(r'"((?:[^"]|"")*)"|(\S+)', macro[2])]
            words += _plain(("" if macro[1] in _ALTERNATING else " ").join(arguments)).split()
        elif macro is None or not macro[1].startswith("\\"):
            if words:
                yield " ".join(words)
            words = []
            end = _SKIPPED.get(macro[1]) if macro is not None else None
    if words:
        yield " ".join(words)


def _plain(line: str) -> str:
    def replace(found: re.Match[str]) -> str:
        if found["code"]:
            return chr(int(found["code"], 16))
        if found["long"] or found["two"]:
            return _GLYPHS.get(found["long"] or found["two"], "")
        return _ONE.get(found["one"] or "", "")

    return _ESCAPE.sub(replace, line)


def fetch_packages(folder: Path) -> None:
    """Download the packages from the Debian (or Ubuntu) mirror that this machine is set up with."""
    command = ["apt-get", "download", "-o", "APT::Sandbox::User=", *PACKAGES.values()]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("apt-get is not here: run this on Debian or Ubuntu, or give the .deb files of the packages "
                 f"{', '.join(PACKAGES.values())} with --debs")  # fmt: skip
    if done.returncode:
        sys.exit(f"apt-get download failed (`apt-get update` as root may help):\n{done.stderr.strip()}")


def read_paragraphs(debs: Path) -> dict[str, list[str]]:
    """Each language's paragraphs of 20 to 300 words, without repetitions and without those that two languages share."""
    found: dict[str, dict[str, None]] = {}
    for language, package in PACKAGES.items():
        paths = sorted(debs.glob(f"{package}_*.deb"))
        if not paths:
            sys.exit(f"no {package}_*.deb in {debs}")
        with tempfile.TemporaryDirectory() as name:
            subprocess.run(["dpkg-deb", "-x", str(paths[-1]), name], check=True)
            found[language] = dict.fromkeys(_of_package(Path(name)))
    shared = Counter(text for texts in found.values() for text in texts)
    return {language: [text for text in texts if shared[text] == 1] for language, texts in found.items()}


def _of_package(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("usr/share/man/**/*.gz")):
        if path.is_symlink():
            continue
        source = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        if re.search(r"^\.Dd ", source, re.MULTILINE):
            continue  # mdoc
        yield from (text for text in strip_roff(source) if MIN_WORDS <= len(text.split()) <= MAX_WORDS)


def take_evenly(texts: Sequence[str], limit: int) -> list[str]:
    """At most so many, spread over all the pages."""
    return [texts[index * len(texts) // limit] for index in range(limit)] if 0 < limit < len(texts) else list(texts)


def measure(paragraphs: Mapping[str, Sequence[str]], settings: DataSettings) -> dict[str, object]:
    """Judge every paragraph and compare with the package that it comes from."""
    languages = Languages(settings)
    wanted = set(settings.language)
    kept: Counter[str] = Counter()
    best: dict[str, Counter[str]] = {language: Counter() for language in paragraphs}
    wrong: list[dict[str, str]] = []
    started = time.perf_counter()
    for language, texts in paragraphs.items():
        for text in texts:
            detected, reason = languages.judge(Example(messages=(), text=text, source=language, row=0))
            kept[language] += reason is None
            best[language][detected or "?"] += 1
            if (reason is None) != (language in wanted):
                wrong.append({"package": language, "detected": detected or "?", "text": text})
    seconds = time.perf_counter() - started
    right = sum(kept[language] for language in wanted)
    count = sum(map(len, paragraphs.values()))
    return {
        "language": sorted(wanted),
        "model": settings.language_model,
        "precision": right / max(1, kept.total()),
        "recall": right / max(1, sum(len(paragraphs[language]) for language in wanted)),
        "microseconds_per_paragraph": seconds / max(1, count) * 1e6,
        "packages": {
            language: {"paragraphs": len(texts), "kept": kept[language], "detected": dict(best[language].most_common(4))}
            for language, texts in paragraphs.items()
        },
        "wrong": wrong,
    }


def print_table(result: Mapping[str, object], packages: Mapping[str, Mapping[str, object]]) -> None:
    print(f"{'package':<14}{'paragraphs':>12}{'kept':>8}  detected as")
    for language, row in packages.items():
        print(f"{PACKAGES[language]:<14}{row['paragraphs']:>12}{row['kept']:>8}  {row['detected']}")
    print(f"precision {result['precision']:.4f}  recall {result['recall']:.4f}  "
          f"{result['microseconds_per_paragraph']:.0f} us a paragraph\n")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--debs", type=Path, help="folder with the four .deb files, instead of a download")
    parser.add_argument("--write", type=Path, help="write the paragraphs there too: DIR/tr/manpages.txt and so on")
    parser.add_argument("--language", default="tr", choices=PACKAGES)
    parser.add_argument("--model", default="lite", help="as LANGUAGE_MODEL")
    parser.add_argument("--limit", type=int, default=0, help="paragraphs a language, evenly spread; 0 for all")
    parser.add_argument("--json", type=Path, help="write the result there, wrong paragraphs with it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        if options.debs is None:
            fetch_packages(Path(name))
        found = read_paragraphs(options.debs or Path(name))
    paragraphs = {language: take_evenly(texts, options.limit) for language, texts in found.items()}
    if options.write:
        for language, texts in paragraphs.items():
            (options.write / language).mkdir(parents=True, exist_ok=True)
            (options.write / language / "manpages.txt").write_text("\n\n".join(texts) + "\n", "utf-8")
    settings = DataSettings.model_validate(
        {"datasets": "manpages", "language": options.language, "language_model": options.model}
    )
    result = measure(paragraphs, settings)
    packages = result["packages"]
    assert isinstance(packages, dict)
    print_table(result, packages)
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    precision, recall = result["precision"], result["recall"]
    assert isinstance(precision, float) and isinstance(recall, float)
    return int(precision < MIN_PRECISION or recall < MIN_RECALL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
