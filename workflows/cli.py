"""The parts that the workflows' mains share: flags, and errors as one line."""

from __future__ import annotations

import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from harmonic.config import Config, load_config, override
from harmonic.errors import UserError
from harmonic.records import MANIFEST_NAME

if TYPE_CHECKING:
    from harmonic.voice import Voice

FLAGS = flags.FLAGS
_BOXED = "piano"  # the model in the box that is taken if none is named

flags.DEFINE_string(
    "config", None, "a name in configs/ (such as demo or sc09), a path to a .py, or a saved config.json"
)
flags.DEFINE_multi_string("set", [], "override a field of the config, as --set=train.steps=200 (repeatable)")
flags.DEFINE_string("workdir", None, "the run's folder; runs/<name of the config> by default")
flags.DEFINE_string("data_dir", "data", "the folder that holds prepared data sets")


def config_from_flags(default: str = "demo") -> Config:
    """The config of --config with the changes of --set."""
    return override(load_config(FLAGS.config or default), FLAGS.set)


def workdir_from_flags(config: Config) -> Path:
    """The run's folder."""
    return Path(FLAGS.workdir or Path("runs") / config.name)


def data_folder(dataset: str) -> Path:
    """The folder of a prepared data set: in --data_dir, or --data_dir itself."""
    folder = Path(FLAGS.data_dir)
    return folder if (folder / MANIFEST_NAME).exists() else folder / dataset


def define_model_flag() -> flags.FlagHolder[str | None]:
    """Defines the flag of mains that take a trained model from anywhere; see `voice_from_flags`."""
    about = "an export's folder, USER/NAME on the hub, or the name of a model in the box"
    return flags.DEFINE_string("model", None, about)


def voice_from_flags(model: str | None) -> tuple[str, Voice]:
    """The model of --workdir or --model, or that in the box, and what it is called.

    Raises:
      UserError: several are given, or there is none.
    """
    import harmonic  # loads JAX, as a run's weights do
    from harmonic.pretrained import in_the_box
    from harmonic.run import Run
    from harmonic.voice import Codec, Voice

    if FLAGS.config or FLAGS.set:
        raise UserError("a model comes with its own config: give --workdir or --model alone")
    if FLAGS.workdir and model:
        raise UserError("--workdir and --model are two models: give one of them")
    name = FLAGS.workdir or model or _BOXED
    if FLAGS.workdir:
        run = Run(FLAGS.workdir)
        trained = run.weights()
        voice = Voice(trained.model, trained.params, Codec.of(run.manifest))
    elif not model and _BOXED not in in_the_box():
        raise UserError(f"there is no model {_BOXED} in the box; give --workdir=RUN or --model=EXPORT_OR_HUB_ID")
    else:
        voice = harmonic.load(name).voice
    return Path(name).resolve().name, voice


def define_process_flags() -> None:
    """Defines the flags of mains that run as several processes. SLURM, Open MPI and TPUs need none of them."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where several processes run")
    flags.DEFINE_integer("num_processes", None, "number of processes", lower_bound=1)
    flags.DEFINE_integer("process_index", None, "index of this process, from 0", lower_bound=0)
    flags.DEFINE_integer("initialization_timeout", 60, "seconds for all processes to join", lower_bound=1)


def join_processes() -> bool:
    """Joins the run's processes, if there are several. True in the first, which does the work that is not shared."""
    from harmonic import processes

    processes.initialise(
        FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_index, timeout=FLAGS.initialization_timeout
    )
    return processes.current()[0] == 0


def command(workflow: str) -> str:
    """The command line that the user gave, ready to be pasted."""
    return shlex.join(["python", "-m", f"workflows.{workflow}", *sys.argv[1:]])


def next_command(workflow: str, workdir: Path) -> str:
    """A command line over a run, ready to be pasted, with the data folder that the user gave."""
    data = [] if FLAGS.data_dir == "data" else [f"--data_dir={FLAGS.data_dir}"]
    return shlex.join(["python", "-m", f"workflows.{workflow}", f"--workdir={workdir}", *data])


def _print_unraisable(unraisable: Any) -> None:
    # After a failed save tensorstore's threads report to an event loop that has ended; the failure itself was raised.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def run(main: Callable[[], None]) -> None:
    """Runs a main, and turns errors that a user can mend into one line on standard error.

    Exit status: 0, also for --help; 2 for a wrong flag, value, file or folder, or another process that is gone; 128 +
    the signal's number for a run that was stopped.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's log
    # Sigmoids and gelus take half the time in vectors of 512 bits; XLA prefers 256. The user's own flags come last, so
    # that they win.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_prefer_vector_width=512 {os.environ.get('XLA_FLAGS', '')}".strip()
    import jax

    from harmonic import processes
    from harmonic.train import Interrupted

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)  # Orbax logs every file that it opens
        for stream in (sys.stdout, sys.stderr):  # names of files that the terminal's encoding does not have
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        sys.unraisablehook = _print_unraisable
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
            main()
            processes.finish()
            return
        except UserError as error:
            status, line = 2, f"error: {error}"
        except OSError as error:
            status, line = 2, f"error: {error.filename or 'input/output'}: {error.strerror or error}"
        except Interrupted as stop:
            status, line = 128 + stop.signal, str(stop) if processes.current()[0] == 0 else ""
        except KeyboardInterrupt:
            status, line = 130, "stopped; the same command goes on"
        except Exception as error:
            if processes.current()[1] == 1:
                raise
            if isinstance(error, jax.errors.JaxRuntimeError):
                processes.await_watchdog()
            status, line = 1, traceback.format_exc()
        if line:
            print(line, file=sys.stderr, flush=True)
        processes.leave(status)

    def parse(argv: list[str]) -> list[str]:
        try:
            return FLAGS(argv)
        except flags.Error as error:
            print(f"error: {str(error).strip().splitlines()[0]}; see --help", file=sys.stderr)
            sys.exit(2)
        except SystemExit:  # --help, which absl ends with status 1
            sys.exit(0)

    app.run(guarded, flags_parser=parse)
