"""The shape of the house: the order of imports, the configurations, the tree in README."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SLOW

from jaxrec.config import from_json, load_config, to_json
from jaxrec.systems import SYSTEMS

ROOT = Path(__file__).parent.parent
ORDER = (
    "config", "console", "files", "run", "page", "programs", "nn", "losses", "training", "data", "text", "semantic_ids",
    "models", "decoding", "targets", "catalogue", "evaluation", "systems", "serving", "export",
)  # fmt: skip
SOURCES = sorted((ROOT / "jaxrec").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def imports_of(node: ast.AST) -> Iterator[str]:
    """Modules of jaxrec that this code imports, at once or inside a function; not what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imports_of(ast.Module(child.orelse, []))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "jaxrec")
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            if child.module == "jaxrec":
                yield from (f"jaxrec.{alias.name}" for alias in child.names)
            elif child.module.startswith("jaxrec."):
                yield child.module
        else:
            yield from imports_of(child)


def package_of(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_its_place():
    found = {path.relative_to(ROOT / "jaxrec").parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert found <= set(ORDER)


def test_every_slow_module_of_tests_is_there():
    found = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert set(SLOW) <= found


def test_the_order_is_the_one_that_the_package_states():
    stated = re.search(r"those before them:\n(.*?)\.", (ROOT / "jaxrec" / "__init__.py").read_text(), re.S)[1]
    assert tuple(re.split(r",\s+", stated)) == ORDER


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_from_those_before_them(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    wrong = [
        name
        for name in imports_of(ast.parse(path.read_text()))
        if name != "jaxrec.__version__"
        and (module == "jaxrec.__init__" or ORDER.index(package_of(name)) > ORDER.index(package_of(module)))
    ]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_the_check_of_imports_can_fail():
    source = """
from typing import TYPE_CHECKING
import jaxrec.data.tables
from jaxrec import serving
if TYPE_CHECKING:
    from jaxrec.systems.onemall.config import OneMallConfig
else:
    from jaxrec.models import x
try:
    from jaxrec.export import y
except ImportError:
    pass
def late():
    from jaxrec.systems import SYSTEMS
"""
    names = ["jaxrec.data.tables", "jaxrec.serving", "jaxrec.models", "jaxrec.export", "jaxrec.systems"]
    assert list(imports_of(ast.parse(source))) == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_loads_and_survives_json(path):
    config = load_config(path)
    assert config.system in SYSTEMS
    assert from_json(type(config), to_json(config)) == config
    assert f"configs/{path.name} --run runs/" in path.read_text(), "its docstring gives the command"
    assert config.training.evaluation_steps, "the state that is best on the validation split is kept"


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """module -> the modules that it imports, of sources by name; what is imported from a package is its own module."""
    graph = {}
    for module, source in sources.items():
        named = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = (f"{node.module}.{alias.name}" for alias in node.names)
                named |= {name if name in sources else node.module for name in inside}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        graph[module] = named & set(sources) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, what only type checkers read included."""
    while True:
        imported = set().union(*graph.values())
        inside = {module for module, names in graph.items() if names & set(graph) and module in imported}
        if len(inside) == len(graph):
            return sorted(graph)
        graph = {module: graph[module] & inside for module in inside}


def test_no_module_imports_itself_over_others():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    assert not circles(graph_of({name: path.read_text() for name, path in names.items()}))


def test_the_check_of_circles_can_fail():
    sources = {
        "p": "",
        "p.a": "from p import b",
        "p.b": "import p.c",
        "p.c": "def f():\n    from p.a import x",
        "p.d": "",
    }
    assert circles(graph_of(sources)) == ["p.a", "p.b", "p.c"]


def test_a_class_name_occurs_once():
    found = [
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert not {name for name in found if found.count(name) > 1}


NAMES = ("onemall", "rankgr", "onesearch", "onesug", *SYSTEMS)
OWN_FILES = re.compile(r"systems/(__init__|[a-z]+/\w+)\.py|models/(cross_decoder|rankgr|sequential)\.py")
"""where a system may be named: its package, the dict of all systems, its model's file"""


def named_systems(source: str) -> set[str]:
    """Words of the code that name a system: identifiers, modules and strings; docstrings may cite papers."""
    tree, words = ast.parse(source), set()
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            found.append(node.value)
        words |= {word for word in found if isinstance(word, str)}
    systems = {name for name in NAMES if name != "core"} | {"jaxrec.systems.sequential"}
    return {word for word in words if any(name in word.lower() for name in systems)}


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if not OWN_FILES.fullmatch(str(path.relative_to(ROOT / "jaxrec")))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_system_is_named_in_what_all_share(path):
    assert not named_systems(path.read_text())


def test_the_check_of_names_can_fail():
    source = (
        '"""Docs of OneMall."""\nfrom jaxrec.systems.tiger import model\n\ndef rankgr_loss(x):\n    return "forge"\n'
    )
    assert named_systems(source) == {"jaxrec.systems.tiger", "rankgr_loss", "forge"}


def paths_of_tree(text: str) -> list[str]:
    """The paths of an indented tree: the first word of a line, below the line that is indented less."""
    paths, above = [], []
    for line in text.splitlines():
        name = line.strip("│├└─ \t").split(" ")[0]
        if not name:
            continue
        indent = len(line) - len(line.lstrip("│├└─ \t"))
        above = [(depth, folder) for depth, folder in above if depth < indent]
        paths.append("".join(folder for _, folder in above) + name)
        if name.endswith("/"):
            above.append((indent, name))
    return paths


def test_trees_are_read():
    assert paths_of_tree("a/  x\n  b.py  y\n  c/\n    d.py\ne.md\n") == ["a/", "a/b.py", "a/c/", "a/c/d.py", "e.md"]
    assert paths_of_tree("a/\n├── c/   x\n│   └── d.py\n└── e") == ["a/", "a/c/", "a/c/d.py", "a/e"]


@pytest.fixture(scope="module")
def tree() -> list[str]:
    """The paths of README's tree."""
    section = (ROOT / "README.md").read_text().split("## What is where")[1].split("\n## ")[0]
    block = section.split("```")[1] if "```" in section else re.sub(r"^(?!    ).*", "", section, flags=re.M)
    return [path for path in paths_of_tree(block) if re.fullmatch(r"[\w./-]+", path)]


def test_every_file_of_the_readme_is_there(tree):
    assert len(tree) > 20, "README's tree is not there, or can't be read"
    assert not [path for path in tree if not (ROOT / path).exists()]


def test_every_file_is_in_the_readme(tree):
    patterns = ("jaxrec/**/*.py", "configs/*.py", "benchmarks/*.py", "docs/*.md")
    files = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    assert not sorted({path for path in files if not path.endswith("__init__.py")} - set(tree))
    assert len(tree) == len(set(tree))
