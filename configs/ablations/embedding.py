"""How tokens enter: figure 2.

    python -m workflows.ablate --study=embedding --size=paper       # 4 x 487,000 steps: two days each on a TPU v4-8
    python -m workflows.ablate --study=embedding --size=small --source=sc09.zip

Sinusoidal (fixed, the paper's choice), linear (the token scaled to [-1, 1) and projected), a learned table, and that
table with dropout. The paper shows curves, and prints only the baseline's likelihood. It does not print the rate of
dropout either: here it is the blocks' own at the paper's size, 0.2, in both sizes.
"""

from typing import Literal

from configs.ablations import Published, Run, Study, base, published, with_model

_RUNS: dict[str, tuple[str, Literal["sinusoidal", "linear", "learned"], float]] = {
    "sinusoidal": ("Sinusoidal", "sinusoidal", 0.0),
    "linear": ("Linear", "linear", 0.0),
    "learned": ("Learned", "learned", 0.0),
    "learned_dropout": ("Learned, dropout 0.2", "learned", 0.2),
}


def get_study(size: str) -> Study:
    """The study."""
    config = base(size)
    return Study(
        name="embedding",
        title="Embeddings of the tokens",
        reproduces="figure 2",
        note="The paper's figure 2 is a plot: of its runs only the baseline's likelihood is printed.",
        baseline="sinusoidal",
        runs=tuple(
            Run(
                name,
                title,
                with_model(config, f"embedding_{size}_{name}", embedding=embedding, embedding_dropout=dropout),
                published("sc09", "128 pooling groups") if name == "sinusoidal" else Published(),
            )
            for name, (title, embedding, dropout) in _RUNS.items()
        ),
    )
