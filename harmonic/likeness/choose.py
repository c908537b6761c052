"""Chooses the temperature and top-p at which a run's clips sound most like recordings of the validation split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmonic.data import Dataset
from harmonic.errors import UserError
from harmonic.likeness.measure import Comparison, generate_clips, made_from, make_plan, written
from harmonic.run import SOUND, Run

TEMPERATURES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
TOP_PS = (0.9, 0.95, 1.0)
_SPLIT = "validation"  # the test split is for figures that nothing was chosen by


def choose(
    workdir: str | Path,
    data: str | Path,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    top_ps: Sequence[float] = TOP_PS,
    checkpoint: str = "best",
    raw: bool = False,
    seed: int | None = None,
    clips: int | None = None,
    seconds: float | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measures each pair of a temperature and a top-p on the validation split, from the same random numbers.

    Every pair is written to `workdir`/sound.json, under "choice", when it is measured: an interrupted call continues.

    Args:
      workdir: the run.
      data: the data set that it was trained on.
      temperatures, top_ps: the grid.
      checkpoint, raw, seed, clips, seconds: as for `measure_run`.

    Returns:
      The value of "choice": what it was made from, "rows" ({"temperature", "top_p", "distance", "share",
      "bits_per_sample" (at temperature 1)}), "train" and "shaped_noise" (their distances), and "recommended": the row
      with the least distance, and as "alike" the number of other rows that are as near to it as the choices of training
      recordings are to one another.

    Raises:
      UserError: no run, checkpoint or data, impossible settings, or too little audio for a distance.
    """
    for name, values, allowed in (
        ("temperature", temperatures, "above 0"),
        ("top_p", top_ps, "above 0 and at most 1"),
    ):
        most = 1.0 if name == "top_p" else float("inf")
        wrong = [value for value in values if not (0 < value <= most and value < float("inf"))]
        if wrong or not values:
            raise UserError(f"{name}={wrong[0] if wrong else 'nothing'} is impossible: it must be {allowed}")
    run, dataset = Run(workdir), Dataset(data)
    trained = run.weights(checkpoint, raw=raw)
    dataset.check(trained.config)
    plan = make_plan(trained.config, dataset.split(_SPLIT), clips=clips, seconds=seconds, seed=seed)
    comparison = Comparison(dataset, trained.config, plan)
    if comparison.too_short is not None:
        raise UserError(f"there is nothing to choose by: {comparison.too_short}; give more --num_clips or --seconds")
    key: dict[str, Any] = {**made_from(trained, dataset, plan), "checkpoint": checkpoint}
    noted = written(run).get("choice") or {}
    kept = noted.get("rows", []) if all(noted.get(name) == value for name, value in key.items()) else []
    rows = {(row["temperature"], row["top_p"]): row for row in kept}
    references = comparison.figures(None)["rows"]

    def note(notes: list[str], **more: Any) -> dict[str, Any]:
        beside = {name: references[name] for name in ("train", "shaped_noise")}
        choice = {**key, "rows": [rows[pair] for pair in sorted(rows)], **beside, "notes": notes, **more}
        run.write(SOUND, {**written(run), "choice": choice})
        return choice

    notes = noted.get("notes", []) if kept else []
    for pair in dict.fromkeys(itertools.product(map(float, temperatures), map(float, top_ps))):
        if pair in rows:
            continue
        title = f"temperature {pair[0]:g}, top_p {pair[1]:g}"
        made = generate_clips(trained, dataset, plan, *pair, title=title, show_progress=show_progress)
        figures = comparison.figures(made.heard)
        rows[pair] = {
            "temperature": pair[0],
            "top_p": pair[1],
            "distance": figures["rows"]["generated"]["distance"],
            "share": figures["share"],
            "bits_per_sample": made.bits_per_sample,
        }
        notes = figures["notes"]
        note(notes)
    best = min(rows.values(), key=lambda row: (row["distance"], -row["temperature"], -row["top_p"]))
    chance = references["train"]["greatest"] - references["train"]["least"]
    alike = sum(row["distance"] - best["distance"] <= chance for row in rows.values()) - 1
    return note(notes, recommended={**best, "alike": alike})
