"""bench.py is run by hand; here that each of its commands is there, and what the small summarizer is trained on."""
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import data
import distil
import phantom_reports

ROOT = Path(__file__).resolve().parent.parent


def test_every_command_says_what_it_measures():
    done = subprocess.run([sys.executable, "bench.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"    {command} " in done.stdout for command in ("preprocess", "evaluate", "summarize", "attention", "ablation"))
