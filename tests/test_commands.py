"""Every command answers --help before it loads what is slow, and stops in one line."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "data", "summarize", "phantom", "convert", "distil", "evaluate", "train", "bench")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_importing_data_load_no_torch(command):
    """torch alone takes over a second of CPU."""
    code = "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    path = f"{ROOT / command}.py"
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False" and "usage: " in done.stdout
    code = "import data, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "False\n"


@pytest.mark.parametrize("arguments, started", [
    (["phantom.py", "--out", "OUT", "--train", "4000"], "OUT/phantom.begun.json"),
    (["train.py", "--out", "OUT"], "runs/phantom-data/phantom.begun.json"),
])
def test_ctrl_c_is_one_line(tmp_path, arguments, started):
    arguments = [argument.replace("OUT", str(tmp_path)) for argument in arguments]
    running = subprocess.Popen(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]], cwd=tmp_path,
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    mark = tmp_path / started.replace("OUT", str(tmp_path))
    while not mark.exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does it: to all processes
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == f"{arguments[0]}: stopped"
