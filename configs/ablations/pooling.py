"""How much pooling: table 2.

    python -m workflows.ablate --study=pooling --size=paper         # two to four days a run on a TPU v4-8
    python -m workflows.ablate --study=pooling --size=small --source=sc09.zip

The same number of blocks in three arrangements: the baseline's levels; one pooling by 2, two thirds of the blocks
outside it and a third within; none. In the paper the likelihoods are nearly equal; speeds and samples differ. The small
study spreads 10 blocks: (2, 2, 2) at factors (4, 4), 6 outside and 4 within, and 10.
"""

from configs.ablations import Run, Study, base, published, with_model

_PAPER = {
    "baseline": published("sc09", "128 pooling groups", speeds=True),
    "one": published("sc09", "one pooling layer", speeds=True),
    "none": published("sc09", "no pooling", speeds=True),
}
# Pooling factors, blocks a level: `blocks_per_level` counts those on the way down, and as many come again up.
_LAYOUT: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "paper": {"baseline": ((2, 4, 4, 5), (4, 4, 4, 4, 4)), "one": ((2,), (12, 12)), "none": ((), (36,))},
    "small": {"baseline": ((4, 4), (2, 2, 2)), "one": ((2,), (3, 4)), "none": ((), (10,))},
}
_WORDS = {"baseline": "Baseline", "one": "One pooling, by 2", "none": "No pooling"}


def get_study(size: str) -> Study:
    """The study."""
    config = base(size)
    return Study(
        name="pooling",
        title="Levels of pooling",
        reproduces="table 2",
        note="All runs have the same number of blocks; only pooling layers add or take parameters.",
        baseline="baseline",
        runs=tuple(
            Run(
                name,
                f"{_WORDS[name]}{f' ({chr(215).join(map(str, factors))})' if name == 'baseline' else ''}",
                with_model(config, f"pooling_{size}_{name}", pool_factors=factors, blocks_per_level=blocks),
                _PAPER[name],
            )
            for name, (factors, blocks) in _LAYOUT[size].items()
        ),
    )
