"""Feature groups of the pooling convolutions: table 1.

    python -m workflows.ablate --study=groups --size=paper          # 3 x 487,000 steps: two days each on a TPU v4-8
    python -m workflows.ablate --study=groups --size=small --source=sc09.zip

The paper compares dense convolutions (1 group), 4 groups and diagonal ones (128 groups, the baseline). The small study
compares the same three cases at a width of 32: 1, 4 and 32 groups.
"""

from configs.ablations import Run, Study, base, published, width, with_model

_PAPER = {
    "dense": published("sc09", "1 pooling group"),
    "four": published("sc09", "4 pooling groups"),
    "diagonal": published("sc09", "128 pooling groups"),
}


def get_study(size: str) -> Study:
    """The study."""
    config = base(size)
    groups = {"dense": 1, "four": 4, "diagonal": width(config)}
    words = {"dense": "1 group (dense)", "four": "4 groups", "diagonal": f"{width(config)} groups (diagonal)"}
    return Study(
        name="groups",
        title="Groups of the pooling convolutions",
        reproduces="table 1",
        note="Fewer groups mix more features where levels are pooled, with more parameters."
        + ("" if size == "paper" else " The small model is 32 wide: its diagonal has 32 groups, the paper's has 128."),
        baseline="diagonal",
        runs=tuple(
            Run(
                name,
                words[name],
                with_model(config, f"groups_{size}_{name}", pool_groups=count),
                _PAPER[name],
            )
            for name, count in groups.items()
        ),
    )
