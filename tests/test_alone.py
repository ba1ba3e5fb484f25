"""Files that are copied alone work alone, and what they repeat is the same everywhere."""
import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import data
import phantom_reports
import summarize

ROOT = Path(__file__).resolve().parent.parent


def example(file):
    """The indented paragraph after the line "Example:" of a file's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text("utf-8")))
    match = re.search(r"^Example:\n+((?:[ \t]+\S.*\n?)+)", docstring, re.M)
    assert match, f"{file}: its docstring has no indented paragraph after a line 'Example:'"
    return textwrap.dedent(match[1])


@pytest.mark.parametrize("file", ["cmki.py", "llm.py", "data.py", "metrics.py"])
def test_a_file_copied_alone_runs_its_example(file, tmp_path):
    code = example(file)
    assert isinstance(ast.parse(code).body[-1], ast.Assert), "the example checks nothing at its end"
    shutil.copy(ROOT / file, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["write_atomically", "run_command", "sentences", "read_records"])
def test_a_function_that_files_repeat_reads_the_same_in_each(name):
    sources = {}
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text("utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                sources[path.name] = ast.get_source_segment(text, node)
    assert "data.py" in sources
    for file, source in sources.items():
        assert source == sources["data.py"], file


def test_the_class_names_are_the_same_in_every_file_that_has_them():
    assert phantom_reports.CT_RATE == data.CT_RATE
    assert phantom_reports.CT_RATE_LT == data.CT_RATE_LT
    assert list(summarize.BENCHMARK_NAMES) == data.CT_RATE + data.CT_RATE_LT
