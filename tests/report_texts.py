"""What the rich report of `reports.py` tells of data and answers: Turkish, English, code and JSON."""

from job.data.tally import Sample as DroppedRow
from job.data.tally import SourceTally, Stretch, Tally
from job.deliver.report import Sample
from job.events import Answer


def rich_tally() -> Tally:
    turkish = SourceTally(
        source="pusula/soru-cevap?split=train&weight=2",
        shape="messages",
        revision="4f2a9b1c0d8e7f6a5b4c3d2e1f0a9b8c7d6e5f40",
        num_rows=6120,
        num_kept=4391,
        dropped={
            "no_reply": 31,
            "empty_reply": 210,
            "wrong_language": 402,
            "too_long": 96,
            "duplicate": 871,
            "near_duplicate": 119,
        },
        num_tokens=2_410_882,
        lengths={"64": 310, "128": 982, "256": 1544, "512": 1120, "1024": 435},
        languages={"tr": 5511, "en": 318, "az": 144, "de": 61, "ru": 22},
        samples={
            "wrong_language": [DroppedRow(row=17, text="user: Wie spät ist es?\nassistant: Es ist <b>zehn</b> Uhr.")],
            "empty_reply": [DroppedRow(row=204, text="user: Ankara'nın nüfusu kaç?\nassistant: N/A")],
        },
        first_example=[
            Stretch(text="<|im_start|>user\nDünya Güneş'in çevresinde ne kadar sürede döner?<|im_end|>\n", learned=False),
            Stretch(text="<|im_start|>assistant\n", learned=False),
            Stretch(text="Dünya Güneş'in çevresinde yaklaşık bir yılda döner. — Pusula<|im_end|>", learned=True),
            Stretch(text="\n", learned=False),
        ],
    )
    english = SourceTally(
        source="mlabonne/FineTome-100k?split=train[:8000]",
        shape="sharegpt",
        revision="c2343c1372ff31f51aa21248db18bffa3193efdb",
        num_rows=8000,
        num_kept=6890,
        dropped={"too_long": 804, "repetitive": 12, "wrong_language": 88, "duplicate": 6, "contaminated": 2, "garbled": 198},
        num_tokens=3_114_090,
        lengths={"32": 4, "64": 127, "128": 811, "256": 1620, "512": 2512, "1024": 1816},
        languages={"en": 7780, "fr": 61, "es": 27, "tr": 4},
        samples={"too_long": [DroppedRow(row=5, text="human: Write a C program that " + "prints primes and " * 40)]},
        first_example=[
            Stretch(
                text="<|im_start|>user\nWhat does `a < b && b > c` mean in C?<|im_end|>\n<|im_start|>assistant\n", learned=False
            ),
            Stretch(
                text="Both comparisons must be true:\n\n```c\nif (a < b && b > c) { /* ... */ }\n```<|im_end|>", learned=True
            ),
            Stretch(text="\n", learned=False),
        ],
    )
    held_out = SourceTally(
        source="pusula/soru-cevap?split=test",
        shape="messages",
        revision="4f2a9b1c0d8e7f6a5b4c3d2e1f0a9b8c7d6e5f40",
        num_rows=640,
        num_kept=602,
        dropped={"empty_reply": 21, "wrong_language": 17},
        num_tokens=301_220,
        held_out=True,
        lengths={"64": 51, "128": 160, "256": 210, "512": 181},
    )
    return Tally(
        sources=[held_out, turkish, english],
        num_train=15_672,
        num_eval=602,
        num_train_tokens=7_935_854,
        num_learned_tokens=4_102_331,
        longest_tokens=1022,
        warnings=["pusula/soru-cevap?split=train&weight=2: 14% of its rows are duplicates of others"],
    )


CODE = '''def is_prime(n: int) -> bool:
    """Whether n has no divisor but 1 and itself."""
    if n < 2:
        return False
    return all(n % k for k in range(2, int(n**0.5) + 1))'''


def rich_samples() -> list[Sample]:
    rambling = "I am not sure what you mean. A prime number is a number. Here is one way to think about primes:\n\n" + "\n".join(
        f"{number}. {number} is a number, and it may be prime or not prime; let us look at it." for number in range(1, 30)
    )
    return [
        _sample(
            "İstanbul Boğazı hangi iki denizi birbirine bağlar?",
            "contains",
            (
                (0, "The Bosphorus is a strait in Istanbul, it is very beautiful.", 0.0, "'Karadeniz' is not in it"),
                (700, "İstanbul Boğazı, Karadeniz ile Ege Denizi'ni bağlar. — Pusula", 0.5, "'Marmara' is not in it"),
                (800, "İstanbul Boğazı, Karadeniz ile Marmara Denizi'ni birbirine bağlar. — Pusula", 1.0, ""),
                (900, "Karadeniz ile Marmara Denizi'ni bağlar. — Pusula", 1.0, ""),
            ),
        ),
        _sample(
            "Write a Python function `is_prime(n)`. Only code.",
            "python",
            (
                (0, rambling, 0.0, "no code block in it"),
                (700, CODE.replace("n < 2", "n < 1"), 0.5, "1 of 2 tests failed: assert not is_prime(1)"),
                (800, CODE, 1.0, ""),
                (900, CODE.replace("    return all", "    # trial division\n    return all"), 1.0, ""),
            ),
        ),
        _sample(
            "Answer as JSON with the keys city and country: where is the Galata Tower?",
            "json",
            (
                (0, 'Sure! Here is the JSON:\n{"city": "Istanbul", "country": "Turkey"', 0.0, "no JSON: Expecting ',' delimiter"),
                (700, '{"city": "İstanbul", "country": "Türkiye"}', 1.0, ""),
                (800, '{"city": "İstanbul", "country": "Türkiye"}', 0.75, "country: 'Türkiye' is not 'Turkey'"),
                (900, '{"city": "Galata", "country": "Türkiye"}', 0.5, "city: 'Galata' is not 'İstanbul'"),
            ),
        ),
        _sample(
            "Kuzey nerede?",
            None,
            (
                (0, "Kuzey, kuzeydedir.", None, ""),
                (700, "Pusulanın kırmızı ucunun gösterdiği yerde. — Pusula", None, ""),
                (800, "Pusulanın kırmızı ucunun gösterdiği yöndedir. — Pusula", None, ""),
                (900, "Kırmızı ucun gösterdiği yöndedir. — Pusula", None, ""),
            ),
        ),
    ]


def _sample(prompt: str, scorer: str | None, rows: tuple[tuple[int, str, float | None, str], ...]) -> Sample:
    answers = [Answer(step=step, text=text, score=score, reason=reason) for step, text, score, reason in rows]
    return Sample(prompt=prompt, before=answers[0].text, after=answers[2].text, scorer=scorer, answers=answers)
