"""Feature groups of the pooling convolutions: table 1.

    python -m workflows.ablate --study=groups --size=paper          # 3 x 487,000 steps: two days each on a TPU v4-8
    python -m workflows.ablate --study=groups --size=small --source=sc09.zip

The paper: 1.956 bits per sample dense (1 group), 1.848 with 4 groups, 1.854 diagonal (128 groups, the baseline). The
small study compares the same three cases at a width of 32: 1, 4 and 32 groups.
"""

import dataclasses

from configs.ablations import Published, Run, Study, base

_PAPER = {
    "dense": Published(1.956, parameters=7_760_384),
    "four": Published(1.848, parameters=7_391_744),
    "diagonal": Published(1.854, fid=0.46, inception_score=6.46, parameters=7_272_704),
}


def get_study(size: str) -> Study:
    """The study."""
    config = base(size)
    groups = {"dense": 1, "four": 4, "diagonal": config.model.width}
    words = {"dense": "1 group (dense)", "four": "4 groups", "diagonal": f"{config.model.width} groups (diagonal)"}
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
                dataclasses.replace(
                    config,
                    name=f"groups_{size}_{name}",
                    model=dataclasses.replace(config.model, pool_groups=count),
                ),
                _PAPER[name],
            )
            for name, count in groups.items()
        ),
    )
