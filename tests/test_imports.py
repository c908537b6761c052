"""The import arrows of the layout, read from the sources, and what a data worker may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "harmonic", "pipelines", "workflows")
ALLOWED = {
    "harmonic": {"harmonic"},
    "configs": {
        "configs",
        "harmonic.config",
        "harmonic.errors",
        "harmonic.published",
        "harmonic.study.plan",
        "harmonic.models",
    },
    "pipelines": {
        "pipelines",
        *(f"harmonic.{name}" for name in ("audio", "errors", "files", "locks", "loudness", "records")),
    },
    "workflows": {"workflows", "pipelines", "configs", "harmonic"},
}
# Within the library: who stands below whom. A part imports only what stands before it.
ORDER = """errors files locks audio loudness spectrogram records kernels models config processes mesh published data
    metrics checkpoint run hlo describe evaluate generate voice hub report pretrained model_card export stages step
    evaluators train perceptual nearest study""".split()
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
        ("pipelines.prepare", ["jax", "flax", "orbax"]),
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
