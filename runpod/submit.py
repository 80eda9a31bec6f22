"""`python runpod/submit.py ...` is `python -m job submit ...`, from wherever it is started."""

import os
import sys
from pathlib import Path

root = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
os.execv(sys.executable, [sys.executable, "-m", "job", "submit", *sys.argv[1:]])
