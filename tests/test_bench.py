"""bench.py is run by hand; here only that each of its commands is there."""
import subprocess
import sys
from pathlib import Path


def test_every_command_says_what_it_measures():
    done = subprocess.run([sys.executable, "bench.py", "--help"], cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"    {command} " in done.stdout for command in ("preprocess", "evaluate", "summarize", "attention", "ablation"))
