"""Published figures: each once, with a source, and named by the models' own rooms."""

import ast
from pathlib import Path

import pytest

from harmonic import models
from harmonic.published import CASES, PAPER, RESULTS, Figure, Row, find

ROOT = Path(__file__).parents[1]
ROWS = (*RESULTS, *CASES)


def test_rows_differ_and_every_figure_has_a_source():
    keys = [(row.dataset, row.paper, row.variant) for row in ROWS]
    assert len(set(keys)) == len(keys)
    for row in ROWS:
        assert find(row.dataset, row.paper, row.variant) is row
        for name, figure in row.figures.items():
            assert figure.source and figure.value >= 0, (row.title, name)
    with pytest.raises(KeyError, match="nothing is published of sc09"):
        find("sc09", PAPER, "5 pooling groups")


def test_a_kind_names_its_rows_and_papers_name_the_others():
    about = models.about(models.DEFAULT_KIND)
    titles = [row.title for row in RESULTS if row.paper == about.arxiv]
    assert len(titles) >= 4 and all(title.split(",")[0] == about.name for title in titles)
    others = {row.title.split(",")[0] for row in RESULTS if row.paper and row.paper != about.arxiv}
    assert others == {"SampleRNN", "WaveNet", "SaShiMi", "Mamba"}
    assert Row("sc09", "2606.00001", "large", {}).title == "2606.00001, large"


def test_what_is_only_recalled_is_not_shown():
    row = Row(
        "sc09", "", "Someone's", {"fid": Figure(1.0, "a talk", "recalled"), "inception_score": Figure(2.0, "a table")}
    )
    assert (row.value("fid"), row.value("inception_score"), row.value("mis")) == (None, 2.0, None)


def test_published_likelihoods_are_written_down_once():
    published = {figure.value for row in ROWS for name, figure in row.figures.items() if name == "bits_per_sample"}
    for path in [
        *(ROOT / "configs").rglob("*.py"),
        *(ROOT / "harmonic").rglob("*.py"),
        *(ROOT / "workflows").glob("*.py"),
    ]:
        found = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        assert path.name == "published.py" or not published & {v for v in found if isinstance(v, float)}, path
