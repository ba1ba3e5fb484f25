"""The limits that keep the files readable, and the tree of their imports.

    python tests/test_style.py          prints the table of all files

Tokens are those of `tokenize` without comments, newlines and indents: a docstring is one.
Complexity is cyclomatic, as radon counts it.
"""
import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted(path.name for path in ROOT.glob("*.py"))
TESTS = sorted(f"tests/{path.name}" for path in ROOT.glob("tests/*.py"))

MOST_COLUMNS = 100
MOST_LINES = 60  # of a function
MOST_COMPLEXITY = 15
MOST_TOKENS = 74_000  # of all files outside tests/; 66,000 is aimed at

# file: the files of the project that it may import; all of them stand above it
ALL_ABOVE = ...
MAY_IMPORT = {
    "cmki": (),
    "llm": (),
    "data": (),
    "metrics": (),
    "phantom_reports": (),
    "model": ("cmki",),
    "summarize": ("llm", "data"),
    "phantom": ("phantom_reports", "data"),
    "heatmap": ("model", "data"),
    "convert": ("model", "data"),
    "distil": ("llm", "data", "summarize", "phantom_reports"),
    "report": ("data", "metrics", "heatmap"),
    "evaluate": ("model", "data", "metrics", "heatmap", "report"),
    "train": ALL_ABOVE,
    "bench": ALL_ABOVE,
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
UNCOUNTED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)


# ---------------------------------------------------------------- counting

@cache
def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def parse(file):
    return ast.parse(read(file))


def long_lines(file):
    """Numbers of the lines that are too long."""
    lines = enumerate(read(file).splitlines(), 1)
    return [number for number, line in lines if len(line) > MOST_COLUMNS]


def tokens(file):
    """How many tokens a file has."""
    stream = tokenize.generate_tokens(io.StringIO(read(file)).readline)
    return sum(token.type not in UNCOUNTED for token in stream)


def functions(file):
    """Every function of a file, methods and nested ones too."""
    return [node for node in ast.walk(parse(file)) if isinstance(node, FUNCTIONS)]


def length(function):
    """Lines of a function, its decorators left out."""
    return function.end_lineno - function.lineno + 1


def complexity(function):
    """1 + the decisions in a function's body."""
    return 1 + sum(decisions(node) for node in function.body)


def decisions(node):
    """The decisions in a node and below; a function or class in it counts apart."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return 0
    if isinstance(node, ast.Assert):
        return 1  # whatever it asserts
    count = 0
    if isinstance(node, (ast.If, ast.IfExp)):
        count = 1
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
        count = 1 + bool(node.orelse)
    elif isinstance(node, ast.Try):
        count = len(node.handlers) + bool(node.orelse)
    elif isinstance(node, ast.BoolOp):
        count = len(node.values) - 1
    elif isinstance(node, ast.comprehension):
        count = 1 + len(node.ifs)
    elif isinstance(node, ast.Match):
        count = sum(getattr(case.pattern, "pattern", node) is not None for case in node.cases)
    return count + sum(decisions(child) for child in ast.iter_child_nodes(node))


def is_kernel(function):
    """Whether a function is compiled by Triton."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def builds_parser(function):
    """Whether a function makes an argument parser."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(ast.unparse(call.func).endswith("ArgumentParser") for call in calls)


def imports(tree):
    """(name of the module, the import's node) of every import in a tree."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name.split(".")[0], node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(((node.module or "").split(".")[0], node))
    return names


# ---------------------------------------------------------------- the limits

@pytest.mark.parametrize("file", PRODUCT + TESTS)
def test_no_line_is_too_long(file):
    assert long_lines(file) == []


@pytest.mark.parametrize("file", PRODUCT)
def test_every_function_fits_on_a_screen(file):
    long = [f for f in functions(file) if length(f) > MOST_LINES]
    assert [f.name for f in long if not is_kernel(f) and not builds_parser(f)] == []


@pytest.mark.parametrize("file", PRODUCT)
def test_no_function_is_too_complex(file):
    assert [f.name for f in functions(file) if complexity(f) > MOST_COMPLEXITY] == []


@pytest.mark.parametrize("file", PRODUCT)
def test_a_line_has_one_comprehension_at_most_and_none_is_in_another(file):
    begins, faults = set(), []
    for node in ast.walk(parse(file)):
        if not isinstance(node, COMPREHENSIONS):
            continue
        if node.lineno in begins:
            faults.append(f"{file}:{node.lineno}: a second one")
        begins.add(node.lineno)
        below = [child for child in ast.walk(node) if child is not node]
        if any(isinstance(child, COMPREHENSIONS) for child in below):
            faults.append(f"{file}:{node.lineno}: one in another")
    assert faults == []


def test_all_files_together_stay_within_their_tokens():
    assert sum(map(tokens, PRODUCT)) <= MOST_TOKENS


@pytest.mark.parametrize("file", PRODUCT)
def test_public_functions_and_classes_say_what_they_are(file):
    assert ast.get_docstring(parse(file)), "the file itself"
    silent = []
    for node in parse(file).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not ast.get_docstring(node):
            silent.append(node.name)
    assert [name for name in silent if name[0] != "_" and name != "main"] == []


# ---------------------------------------------------------------- the tree of imports

def test_the_table_of_imports_names_every_file_and_is_a_tree():
    assert {f"{name}.py" for name in MAY_IMPORT} == set(PRODUCT)
    above = []
    for name, allowed in MAY_IMPORT.items():
        assert allowed is ALL_ABOVE or set(allowed) <= set(above), name
        above.append(name)


@pytest.mark.parametrize("file", PRODUCT)
def test_a_file_imports_only_what_the_table_allows_and_only_at_its_top(file):
    files, tree = list(MAY_IMPORT), parse(file)
    place = files.index(file.removesuffix(".py"))
    allowed = MAY_IMPORT[files[place]]
    allowed = files[:place] if allowed is ALL_ABOVE else allowed
    own = [(name, node) for name, node in imports(tree) if name in files]
    assert {name for name, _ in own} <= set(allowed)
    assert [name for name, node in own if node not in tree.body] == []


# ---------------------------------------------------------------- the counting itself

@pytest.mark.parametrize("body, count", [
    ("pass", 1),
    ("if a: pass\nelif b: pass\nelse: pass", 3),
    ("x = 1 if a and b or c else 2", 4),
    ("for a in b: pass\nelse: pass", 3),
    ("while a: pass", 2),
    ("try: pass\nexcept A: pass\nexcept B: pass\nelse: pass\nfinally: pass", 4),
    ("with a: pass", 1),
    ("assert a and b", 2),
    ("x = [a for a in b if a if b]\ny = {a: c for a in b for c in a}", 6),
    ("x = lambda a: a or b", 2),
    ("def inner():\n    if a: pass", 1),
    ("match a:\n    case 1: pass\n    case 2: pass\n    case _: pass", 3),
])
def test_complexity_is_counted_as_radon_does(body, count):
    source = "def f():\n    " + body.replace("\n", "\n    ")
    assert complexity(ast.parse(source).body[0]) == count


# ---------------------------------------------------------------- the table

def table(files):
    """A row a file: what the limits are about."""
    lines = [f"{'file':28s} lines  tokens  a line  over {MOST_COLUMNS}  "
             f"{'longest function':32s} most complex function"]
    for file in files:
        rows, count = len(read(file).splitlines()), tokens(file)
        longest = max(functions(file), key=length, default=None)
        hardest = max(functions(file), key=complexity, default=None)
        line = f"{file:28s} {rows:5d} {count:7d} {count / max(rows, 1):7.1f} "
        line += f"{len(long_lines(file)):9d}"
        if longest:
            line += f"  {length(longest):3d} {longest.name[:28]:28s}"
            line += f" {complexity(hardest):3d} {hardest.name[:40]}"
        lines.append(line)
    rows = sum(len(read(file).splitlines()) for file in files)
    count = sum(map(tokens, files))
    lines.append(f"{'together':28s} {rows:5d} {count:7d} {count / rows:7.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(PRODUCT), table(TESTS), sep="\n\n")
