"""The documents: their length, their links, the commands that they show, and the English that they are written in."""

import ast
import dataclasses
import functools
import importlib.util
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest
from apache_beam.options import pipeline_options

from harmonic.config import config_names, load_config, override

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "harmonic", "pipelines", "workflows")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
PAGES = [*sorted(ROOT.glob("*.md")), *(page for package in PACKAGES for page in sorted((ROOT / package).rglob("*.md")))]
LENGTHS = {"README.md": 120, "BUILD_NOTES.md": 250}
# Each hides what the sentence is about, or says something else than it means.
BANNED = [
    r"\bof ours\b",
    r"\bforetold\b",
    r"\bforetells?\b",
    r"\bgoes on\b",
    r"\bgone on with\b",
    r"\bon end\b",
    r"\bwhoever\b",
    r"\blies?\b",
    r"\bstands?\b(?! for\b)",
    r"\bleave to (read|write|see)\b",
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> list[tuple[int, str]]:
    """(line, text) of a page, or of the comments and docstrings of a source."""
    text = path.read_text()
    if path.suffix == ".md":
        return [(1, text)]
    found = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            found.append((node.body[0].lineno, ast.get_docstring(node, clean=False) or ""))
    return found


@pytest.mark.parametrize(("page", "longest"), LENGTHS.items())
def test_pages_stay_short(page, longest):
    assert len((ROOT / page).read_text().splitlines()) <= longest


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_resolve(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not (path.parent / target.split("#")[0]).exists()]
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    headings = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    missing += [target for target in targets if target.startswith("#") and target[1:] not in headings]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_paths_exist(path):
    """Files that a page names in backquotes, from the repository's root or from the page's own folder."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|md|toml|png)|[\w-]+\.(?:py|md|toml)|[\w-]+(?:/[\w-]+)*/)`", text)
    roots = (ROOT, path.parent, ROOT / "tests", ROOT / "harmonic", ROOT / "harmonic/models/harmonic_rnn")
    names = [name for name in names if not name.startswith(("data/", "runs/")) and "ngram" not in name]
    assert [n for n in names if n not in WRITTEN and not any((root / n).exists() for root in roots)] == []


# What commands write, or what the guides tell a reader to write.
WRITTEN = {"tensorboard/", "config.py", "model.py", "checkpoints/", "samples/", "README.md", "my_config.py", "exports/"}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_tests_exist(path):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", path.read_text()) if f"def {name}(" not in tests] == []


@dataclasses.dataclass(frozen=True)
class Command:
    """A module, its flags, what `--set` sets, and the config."""

    module: str
    flags: tuple[str, ...]
    sets: tuple[str, ...] = ()
    config: str = ""


def commands(text: str) -> list[Command]:
    """The `python -m MODULE --flags` of a text, also of what `workflows.launch` is given behind `--`."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for shown in re.findall(r"(?:^|[\s`/(])(?:python3?) -m ([^\n`]*)", text):
        words = shlex.split(re.split(r"\s#|\s\||\s&&|[;)]", shown)[0].replace("'", ""), posix=False)
        while words:
            cut = words.index("--") if "--" in words else len(words)
            module, rest, words = words[0], words[1:cut], words[cut + 1 :]
            pairs = [word.lstrip("-").rstrip(".,:").partition("=") for word in rest if word.startswith("--")]
            sets = tuple(value for flag, _, value in pairs if flag == "set")
            config = next((value for flag, _, value in pairs if flag == "config"), "")
            found.append(Command(module.rstrip(".,:"), tuple(flag for flag, _, _ in pairs), sets, config))
    return found


@functools.cache
def defined(module: str) -> set[str]:
    """The flags of a main, read from its source, from that of the flags that all workflows share, and from Beam."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, f"there is no module {module}"
    text = Path(spec.origin).read_text()
    flags = {"help"}
    if module.startswith("workflows."):
        text += (ROOT / "workflows/cli.py").read_text() * (module != "workflows.launch")
        flags |= set(re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", text))
        flags |= {f"no{flag}" for flag in re.findall(r"flags\.DEFINE_bool\(\s*\"(\w+)\"", text)}
    else:
        flags |= set(re.findall(r"\"--(\w+)\"", text))
    if module == "pipelines.prepare":
        parser = pipeline_options._BeamArgumentParser(allow_abbrev=False)
        for options in pipeline_options.PipelineOptions.__subclasses__():
            options._add_argparse_args(parser)
        flags |= {option.lstrip("-") for option in parser._option_string_actions}
    return flags


def shown(path: Path) -> list[Command]:
    return [command for _, text in prose(path) for command in commands(text)]


@pytest.mark.parametrize("path", [*PAGES, *(path for path in SOURCES if shown(path))], ids=name)
def test_commands_exist(path):
    for command in shown(path):
        if command.module.split(".")[0] not in PACKAGES:
            continue
        unknown = [flag for flag in command.flags if flag not in defined(command.module)]
        assert unknown == [], f"{command.module} has no flags {unknown}"
        # Placeholders, such as D in mesh.data=D, stand for a number.
        sets = [re.sub(r"=[A-Z]+$", "=1", assignment) for assignment in command.sets]
        override(load_config(command.config if command.config in config_names() else "demo"), sets)


def test_commands_are_found():
    text = "`python -m a.b --x=1 --set=train.steps=2` and\n  .venv/bin/python -m c --y \\\n"
    text += "  --z -- d --w --config=demo  # --no"
    assert commands(text) == [
        Command("a.b", ("x", "set"), ("train.steps=2",)),
        Command("c", ("y", "z")),
        Command("d", ("w", "config"), (), "demo"),
    ]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=name)
def test_plain_english(path):
    found = [
        f"{name(path)}:{line + text[: match.start()].count(chr(10))}: {match[0]}"
        for line, text in prose(path)
        for phrase in BANNED
        for match in re.finditer(phrase, text, re.IGNORECASE)
    ]
    assert found == []
