"""Damaged and foreign files, by the hundred: each is read, or refused in one line that names it.

`python bench.py hostile --n 10000` is the same at large.
"""
from pathlib import Path

import hostile
import pytest


def test_the_good_files_are_read(tmp_path):
    for name, read in hostile.write_good_files(tmp_path).items():
        assert hostile.outcome(read, Path(tmp_path, name)) == "read", name


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(tmp_path, seed):
    for name, outcome in hostile.hostile_outcomes(tmp_path, 120, seed):
        assert outcome in ("read", "refused"), f"{name}: {outcome}"


def test_a_fault_would_be_seen(tmp_path):
    def unnamed(path):
        raise ValueError("no file is named")

    assert hostile.outcome(unnamed, tmp_path / "file").startswith("not one line that names it")
    assert hostile.outcome(lambda path: 1 / 0, tmp_path / "file").startswith("ZeroDivisionError")
