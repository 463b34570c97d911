"""The rules of the house, read off its own source: floors, sizes, words that do not belong, what an import may load."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fmr

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for house in ("fmr", "analyzers") for path in (ROOT / house).rglob("*.py"))
LINES, FUNCTION_LINES, PUBLIC_NAMES = 400, 60, 31

ROOMS = (
    "errors ids nests nodes weights ops disk zoo watching subspaces edits pictures".split()
    + "graph runs sweeps corpora structure pages interventions".split(),
    "counts protocol sites texts prompts results numbers heads memories causal circuits lenses".split()
    + "tracing editing networks probes alignment images inputs dictionaries sparsity surgery compare scale lab".split(),
)
"""The rooms of fmr and those of analyzers, ground first: a file imports only from its own room and from those before it."""

BUILD_MODELS = ("fmr/zoo", "fmr/__main__.py")
"""What makes models, and so may say which."""

ENGLISH = {"align", "beam", "clip", "funnel", "radio"}
"""Families that are called like a word that code needs."""

SHORT = {"gpt", "t5", "mt5", "vit", "glm", "mpt", "xlm"}
"""Families with names shorter than four letters that mean nothing else."""

PICKLES = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
TENSORS_ALONE = "fmr/zoo/packaged.py"
"""Where a file of torch may be opened: weights that others publish in no other form, and for tensors alone."""

HEAVY = ("transformers", "networkx", "graphviz", "matplotlib", "sklearn", "pandas", "captum", "ray", "pyarrow", "scipy")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def imports(node: ast.AST, how: str = "load") -> Iterator[tuple[str, str]]:
    """Every module that a file imports, and when: as it loads, in a call, or for a type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import; expected its full name"
            yield child.module or "", how
        elif isinstance(child, ast.Import):
            yield from ((alias.name, how) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from imports(child, "typing")
        else:
            yield from imports(child, "call" if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else how)


def module_of(file: str) -> str:
    """The name by which a file is imported."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room that a module is in; empty for the front door of a house and for its command line."""
    name = module.partition(".")[2].partition(".")[0]
    return "" if name == "__main__" else name


def own_imports(file: str, *when: str) -> set[str]:
    """The modules of the two houses that a file imports at these times."""
    return {name for name, how in imports(tree(file)) if name.partition(".")[0] in ("fmr", "analyzers") and how in when}


def functions(file: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def public_definitions(file: str) -> list[Definition]:
    """The functions and classes that a file offers to others."""
    return [node for node in tree(file).body if isinstance(node, Definition) and not node.name.startswith("_")]


def without_docstrings(file: str) -> str:
    """The text of a file with its docstrings blanked and its comments kept."""
    lines = (ROOT / file).read_text().splitlines()
    for node in ast.walk(tree(file)):
        for here in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(here, ast.Expr) and isinstance(here.value, ast.Constant) and isinstance(here.value.value, str):
                lines[here.lineno - 1 : here.end_lineno] = [""] * (here.end_lineno - here.lineno + 1)
    return "\n".join(lines)


@cache
def family_names() -> re.Pattern[str]:
    from transformers import CONFIG_MAPPING

    families = {key.lower() for key in CONFIG_MAPPING if len(key) >= 4} - ENGLISH | SHORT
    spelled = "|".join(re.sub("[-_]", "[-_]?", family) for family in sorted(families, key=len, reverse=True))
    return re.compile(rf"(?<![a-z0-9])(?:{spelled})(?![a-z])")


# ---- sizes


@pytest.mark.parametrize("file", FILES)
def test_files_are_short(file: str) -> None:
    assert len((ROOT / file).read_text().splitlines()) < LINES


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file: str) -> None:
    assert [f.name for f in functions(file) if f.end_lineno - f.lineno >= FUNCTION_LINES] == []


# ---- rooms


@pytest.mark.parametrize("file", [file for file in FILES if room(module_of(file))])
def test_a_room_imports_only_from_those_before_it(file: str) -> None:
    house = module_of(file).partition(".")[0]
    order = next(rooms for rooms in ROOMS if room(module_of(file)) in rooms)
    here = order.index(room(module_of(file)))
    others = {name for name in own_imports(file, "load", "typing", "call") if name.partition(".")[0] == house}
    assert sorted(name for name in others if room(name) not in order[: here + 1]) == []


def test_no_imports_go_round_in_a_circle() -> None:
    modules = {module_of(file): own_imports(file, "load", "typing") for file in FILES}
    while free := [name for name, needs in modules.items() if not needs & modules.keys() - {name}]:
        for name in free:
            del modules[name]
    assert modules == {}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("fmr/")])
def test_fmr_knows_no_analyzer(file: str) -> None:
    assert [name for name, _ in imports(tree(file)) if name.partition(".")[0] == "analyzers"] == []


def test_the_page_on_the_architecture_names_the_rooms_and_files_that_are_there() -> None:
    page = (ROOT / "etc/ARCHITECTURE.md").read_text()
    rooms = sorted(path.parent.name for path in (ROOT / "fmr").glob("*/__init__.py"))
    assert [room for room in rooms if f"`{room}/`" not in page] == []
    paths = re.findall(r"`((?:fmr|analyzers|etc|tests)/[\w./]+)`", page)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    table = re.findall(r"^\|[^|]*\|([^|]*)\|", page.partition("## Reading `structure/`")[2].partition("##")[0], re.MULTILINE)
    files = {path.stem for path in (ROOT / "fmr/structure").rglob("*.py")}
    named = re.findall(r"`(\w+)`", " ".join(table))
    assert len(named) > 20
    assert [name for name in named if name not in files] == []


# ---- words


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(BUILD_MODELS)])
def test_no_file_knows_a_model_family(file: str) -> None:
    code = re.sub(r"zoo\.load\([\"'][\w-]+[\"']", "", without_docstrings(file))  # a model that is loaded is named
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", code).lower()
    assert sorted(set(family_names().findall(apart))) == []


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "model_type == 'llama'", "is_bert", "T5Stack", "GPTNeoX", "gpt-neo"])
def test_a_family_name_is_recognised(name: str) -> None:
    assert family_names().search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


@pytest.mark.parametrize("file", FILES)
def test_no_pickle(file: str) -> None:
    assert [name for name, _ in imports(tree(file)) if name.partition(".")[0] in PICKLES] == []
    attributes = [ast.unparse(node) for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)]
    assert [name for name in attributes if name == "torch.save" or (name == "torch.load" and file != TENSORS_ALONE)] == []


def test_a_file_of_torch_is_opened_for_tensors_alone() -> None:
    nodes = list(ast.walk(tree(TENSORS_ALONE)))
    loads = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert len(loads) == len(
        [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
    )
    assert [[ast.unparse(word) for word in call.keywords if word.arg == "weights_only"] for call in loads] == [
        ["weights_only=True"]
    ]


@pytest.mark.parametrize("file", FILES)
def test_no_error_is_swallowed(file: str) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: `except:` takes everything; name the exception"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
            assert not (broad and silent), f"line {node.lineno}: any error vanishes here; name the exception"


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_left_to_do(file: str) -> None:
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", (ROOT / file).read_text()) == []


@pytest.mark.parametrize("file", [file for file in FILES if not file.endswith("__main__.py")])
def test_only_the_command_line_prints(file: str) -> None:
    calls = [node.func for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    assert [f"line {call.lineno}" for call in calls if isinstance(call, ast.Name) and call.id == "print"] == []


@pytest.mark.parametrize("file", FILES)
def test_public_things_say_what_they_are(file: str) -> None:
    assert ast.get_docstring(tree(file)), f"{file} has no docstring"
    assert [node.name for node in public_definitions(file) if not ast.get_docstring(node)] == []


# ---- the front door


def test_importing_fmr_loads_no_heavy_library() -> None:
    code = f"import sys, fmr; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_the_public_names_are_few() -> None:
    assert len(fmr.__all__) <= PUBLIC_NAMES
    assert all(hasattr(fmr, name) for name in fmr.__all__)


@pytest.mark.parametrize("package", ["fmr", "analyzers"])
def test_what_is_installed_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert re.search(rf'^{package} = \[.*"py\.typed"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
