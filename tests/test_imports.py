"""The import arrows of the layout, read from the sources, and modules that a data worker may not load."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harmonic import models

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "harmonic", "pipelines", "workflows")
ALLOWED = {
    "harmonic": {"harmonic"},
    "configs": {
        "configs",
        "harmonic.config",
        "harmonic.errors",
        "harmonic.files",
        "harmonic.published",
        "harmonic.study.plan",
        "harmonic.models",
    },
    "pipelines": {
        "pipelines",
        *(
            f"harmonic.{name}"
            for name in ("audio", "errors", "files", "locks", "loudness", "models", "records", "sound")
        ),
    },
    "workflows": {"workflows", "pipelines", "configs", "harmonic"},
}
# Within the library: who stands below whom. A part imports only what stands before it.
ORDER = """errors files locks audio loudness spectrogram records sound kernels models config processes mesh
    published data metrics checkpoint run hlo traffic devices describe evaluate generate voice hub report
    pretrained model_card export stages step compile_for evaluators train perceptual nearest likeness study
    listen""".split()
# Within the pipelines: a recording's way is sources -> audio -> beam; sources and audio do not know each other.
ROOMS = "errors limits paths sources audio beam inspection own_config build console prepare inspect".split()
APART = ("sources", "audio")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MAINS = [p for p in FILES if "__main__" in p.read_text()]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_packages_import_only_what_stands_below(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in ALLOWED[package]), f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "harmonic").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_order_within_the_library(path):
    part = path.relative_to(ROOT / "harmonic").parts[0].removesuffix(".py")
    if part == "__init__":
        # What stands at the top runs with every import; `load` loads what it needs when it is called.
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert {alias.name for node in top for alias in node.names} <= {"annotations", "os", "TYPE_CHECKING"}
        return
    for name in imports(path):
        other = name.split(".")[1]
        assert ORDER.index(other) <= ORDER.index(part), f"{path} imports {name}"


def room(path: Path) -> str:
    return path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_order_within_the_pipelines(path):
    if path == ROOT / "pipelines" / "__init__.py":
        assert not path.read_text()
        return
    for name in imports(path):
        if name.startswith("pipelines."):
            other = name.split(".")[1]
            assert ROOMS.index(other) <= ROOMS.index(room(path)), f"{path} imports {name}"
            assert {other, room(path)} != set(APART), f"{path} imports {name}"


def modules(files: list[Path], root: Path) -> dict[str, Path]:
    """Files by their modules' names."""
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imported(text: str, known: dict[str, Path]) -> set[Path]:
    """Files that a module's text imports, anywhere in it, also by strings: code, or a module's whole name.

    The name of a main is a command to start, and no import: mains are not imported (a test of its own).
    """
    tree = ast.parse(text)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            names |= {node.value} & known.keys() if known.get(node.value) not in MAINS else set()
            names |= {a or b for a, b in re.findall(r"\bfrom ([\w.]+) import\b|\bimport ([\w.]+)", node.value)}
    files = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        files |= {known[name]} if name else set()
    return files


def circle(files: list[Path], root: Path) -> list[str]:
    """The files of an import circle, or none. The import of a package that comes with a module's does not count."""
    known = modules(files, root)
    graph = {path: imported(path.read_text(), known) - {path} for path in files}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [path.relative_to(root).as_posix() for path in error.args[1]]
    return []


def test_no_file_imports_itself_by_way_of_others():
    assert circle(FILES, ROOT) == []


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p import a",
        "from p.a import x",
        "def f():\n    from p.a import x",
        "import importlib\n\ndef f():\n    importlib.import_module('p.a')",
        "start(preload='p.a')",
        "run('from p.a import x; x()')",
    ],
)
def test_a_circle_is_found_however_it_is_hidden(tmp_path, back):
    (tmp_path / "p").mkdir()
    texts = {"__init__": "", "a": "from p import b", "b": "import p.c", "c": back, "d": "from p import a"}
    for name, text in texts.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    files = sorted((tmp_path / "p").glob("*.py"))
    found = circle(files, tmp_path)
    assert set(found) == {"p/a.py", "p/b.py", "p/c.py"} and len(found) == 4
    (tmp_path / "p/c.py").write_text(repr(f"Text: {back}"))
    assert circle(files, tmp_path) == []


def test_mains_do_not_import_one_another():
    modules = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in MAINS}
    assert {"pipelines.prepare", "workflows.full_run", "workflows.train"} <= modules
    for path in FILES:
        assert not {m for m in modules for name in imports(path) if name == m or name.startswith(f"{m}.")}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("harmonic", ["jax", "numpy"]),
        ("harmonic.audio", ["jax", "flax", "grain"]),
        ("harmonic.records", ["jax", "flax", "grain"]),
        ("harmonic.sound.decode", ["jax", "flax", "grain", "av"]),
        ("pipelines.prepare", ["jax", "flax", "orbax", "av"]),
        ("harmonic.run", ["jax", "orbax", "tensorboardX"]),
        ("harmonic.train", ["apache_beam", "librosa", "matplotlib"]),
    ],
)
def test_importing_loads_no_more_than_it_needs(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_tests_import_no_other_tests():
    """What several need is in conftest.py, or in a module that is no test."""
    for path in sorted((ROOT / "tests").glob("*.py")):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = [getattr(node, "module", None) or alias.name for node in nodes for alias in node.names]
        assert not [name for name in names if name.split(".")[-1].startswith("test_")], path


def test_modules_stay_small_enough_to_read():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert {str(p): n for p, n in lengths.items() if n > 500} == {}


FIELDS = ("pool_factors", "blocks_per_level", "level_blocks", "pool_groups", "gate_blocks", "state_width")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_models_are_known_by_their_protocol_alone(path):
    """No code outside harmonic/models names a kind, its classes or its fields; configs name the kind they are of."""
    room = path.relative_to(ROOT).parts
    if room[0] == "configs" or room[:2] == ("harmonic", "models"):
        return
    assert not {name for name in imports(path) for kind in models.kinds() if name.startswith(f"harmonic.models.{kind}")}
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    # The cache of downloads is a folder of the project's name.
    project = {"harmonic_rnn"} if path == ROOT / "pipelines/sources/hub.py" else set()
    assert not (names - project) & {*FIELDS, "HarmonicRNN", *models.kinds()}
