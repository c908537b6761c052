"""How a run sounds, as figures: generated clips beside recordings and noise, for any data set.

python -m workflows.sound --workdir=runs/demo
python -m workflows.sound --workdir=runs/piano --num_clips=64 --seconds=10 --temperature=0.95
python -m workflows.sound --workdir=runs/demo --choose        # tries temperatures and top-p on the validation split

Writes RUN/sound.json, and builds the report again, which shows the figures. An interrupted choice continues.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from harmonic.errors import UserError
from harmonic.likeness.choose import TEMPERATURES, TOP_PS, choose
from harmonic.likeness.measure import measure_run
from harmonic.report import build_report
from harmonic.run import Run
from workflows import cli

_CHOOSE = flags.DEFINE_bool(
    "choose", False, "try each of --temperatures with each of --top_ps on the validation split, and recommend a pair"
)
_TEMPERATURES = flags.DEFINE_list("temperatures", [f"{t:g}" for t in TEMPERATURES], "with --choose: what to try")
_TOP_PS = flags.DEFINE_list("top_ps", [f"{p:g}" for p in TOP_PS], "with --choose: what to try")
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "the held-out recordings to compare with")
_NUM = flags.DEFINE_integer("num_clips", None, "clips to generate; as many as give 32 s by default", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", None, "length of each clip; 4 by default, or that of the recordings where they are shorter"
)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "of sampling; the config's generate.temperature by default")
_TOP_P = flags.DEFINE_float("top_p", None, "of sampling; the config's generate.top_p by default")
_SEED = flags.DEFINE_integer("seed", None, "of the clips; the config's seed by default", lower_bound=0)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (on validation), latest, or a step")
_RAW = flags.DEFINE_bool("raw_weights", False, "sample the raw weights instead of their average")
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Measures or chooses, and prints the table."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a run is measured with its own config: give --workdir alone")
    if _CHOOSE.value:
        _refuse("--choose tries --temperatures and --top_ps on the validation split", "temperature", "top_p", "split")
    else:
        _refuse("only --choose tries several settings; give --temperature and --top_p", "temperatures", "top_ps")
    grid: dict[str, Any] = {"temperatures": _numbers("temperatures"), "top_ps": _numbers("top_ps")}
    run = Run(cli.FLAGS.workdir or "runs/demo")
    data = cli.data_folder(run.config.data.dataset)
    shared: dict[str, Any] = {
        "checkpoint": _CHECKPOINT.value,
        "raw": _RAW.value,
        "seed": _SEED.value,
        "clips": _NUM.value,
        "seconds": _SECONDS.value,
    }
    with run.writing():
        if _CHOOSE.value:
            lines = _choice(choose(run.folder, data, **grid, **shared))
        else:
            one: dict[str, Any] = {"split": _SPLIT.value, "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
            lines = _table(measure_run(run.folder, data, **one, **shared))
        report = build_report(run.folder) if (run.folder / "metrics.jsonl").exists() else None
    print("\n".join(lines))
    print(f"figures: {run.folder / 'sound.json'}" + (f"; report: {report}" if report else ""))


def _refuse(why: str, *names: str) -> None:
    for name in names:
        if cli.FLAGS[name].present:
            raise UserError(f"{why}: leave out --{name}")


def _numbers(name: str) -> tuple[float, ...]:
    items: list[str] = cli.FLAGS[name].value or []
    try:
        return tuple(float(item) for item in items)
    except ValueError:
        raise UserError(f"--{name}={','.join(items)} is impossible: it must be numbers such as 0.8,0.9,1") from None


_ROWS = {
    "generated": "generated",
    "train": "training recordings",
    "held_out": "held-out recordings",
    "shaped_noise": "noise, their spectrum",
    "white_noise": "white noise",
}
_FIGURES = (  # key of a row, form, width
    ("distance", ",.0f", 12),
    ("frames", ",", 9),
    ("level_db", ".1f", 9),
    ("peaks", ".1%", 8),
    ("silence", ".1%", 9),
    ("onsets_per_second", ".2f", 10),
)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(found: dict[str, Any]) -> list[str]:
    lines = [f"{'':22}{'distance':>12}{'frames':>9}{'level':>9}{'peaks':>8}{'silence':>9}{'onsets/s':>10}"]
    for key, title in _ROWS.items():
        row = found["rows"].get(key)
        if row:
            figures = ((row[name], form, width) for name, form, width in _FIGURES)
            lines.append(f"{title:22}" + "".join(f"{_number(value, form):>{width}}" for value, form, width in figures))
    if found["share"] is not None:
        lines.append(f"share of the way from training recordings (0) to noise (1): {found['share']:.3f}")
    if found["drift"]:
        lines.append("bits per sample by second of the clip, generated / held-out:")
        lines += [
            f"  {row['start']:g} to {row['stop']:g} s: {row['generated']:.3f} / {_number(row['held_out'], '.3f')}"
            for row in found["drift"]
        ]
    if longer := found["longer"]:
        lines.append(f"{longer['streams']} streams of {longer['seconds']:g} s, level and bits per sample by stretch:")
        lines += [
            f"  {row['start']:g} to {row['stop']:g} s: {row['level_db']:.1f} dB, {row['bits_per_sample']:.3f}"
            for row in longer["rows"]
        ]
        lines.append(f"longer streams: {longer['verdict']}")
    return lines + found["notes"]


def _choice(found: dict[str, Any]) -> list[str]:
    lines = [f"{'temperature':>12}{'top_p':>8}{'distance':>12}{'share':>9}{'bits':>8}"]
    lines += [
        f"{row['temperature']:>12g}{row['top_p']:>8g}{row['distance']:>12,.0f}{_number(row['share'], '.3f'):>9}"
        f"{row['bits_per_sample']:>8.3f}"
        for row in found["rows"]
    ]
    best, train = found["recommended"], found["train"]
    lines.append(
        f"training recordings: {train['distance']:,.0f} ({train['least']:,.0f} to {train['greatest']:,.0f}); "
        f"noise with their spectrum: {_number(found['shaped_noise']['distance'], ',.0f')}"
    )
    lines += found["notes"]
    lines.append(
        f"recommended: generate.temperature={best['temperature']:g}, generate.top_p={best['top_p']:g} "
        f"({best['alike']} other pairs are within chance of it)"
    )
    return lines


if __name__ == "__main__":
    cli.run(main)
