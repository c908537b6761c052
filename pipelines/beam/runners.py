"""Beam's runners: options checked, logging held back, and the user's error found inside theirs."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from harmonic.errors import UserError, one_line
from pipelines.beam.loading import import_beam
from pipelines.beam.workers import LocalWorkers
from pipelines.paths import is_local

DEFAULT_RUNNER = "FnApiRunner"
_BEAM_THREADS = ("beam_control_read", "read_grpc_client_inputs", "run_worker")


def beam_options(arguments: Sequence[str]) -> list[str]:
    """Checks arguments for Beam, and adds defaults with which it needs no network and logs nothing.

    DirectRunner is replaced by FnApiRunner: it first tries to download another runner, and hangs if it cannot.

    Raises:
      UserError: an argument that Beam does not know, or that loses records.
    """
    defaults = [f"--runner={DEFAULT_RUNNER}", "--default_sdk_harness_log_level=CRITICAL"]
    if not arguments:
        return defaults  # without importing Beam, which takes a second or more
    import_beam()
    from apache_beam.options import pipeline_options as po
    from apache_beam.runners.runner import create_runner

    class Parser(po._BeamArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{one_line(message)}; see --help, and Beam's own options")

    parser = Parser(allow_abbrev=False, add_help=False)
    for cls in {str(cls): cls for cls in po.PipelineOptions.__subclasses__()}.values():
        cls._add_argparse_args(parser)
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; see --help, and Beam's own options")
    if known.direct_running_mode == "multi_threading":
        raise UserError("--direct_running_mode=multi_threading loses records; use multi_processing")
    workers = known.direct_num_workers
    if workers not in (None, 1) and known.direct_running_mode != "multi_processing":
        raise UserError(f"--direct_num_workers={workers} needs --direct_running_mode=multi_processing")
    runner = known.runner
    if runner is None or runner.lower() in ("directrunner", "switchingdirectrunner"):
        runner = DEFAULT_RUNNER
    try:
        create_runner(runner)
    except ImportError as error:
        raise UserError(f"--runner={runner} cannot be imported; its extra may be missing: {one_line(error)}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"--runner={runner} is not a runner of Beam's: {one_line(error)}") from error
    return [*defaults, *arguments, f"--runner={runner}"]


def runner_of(options: Sequence[str]) -> str:
    """The runner among the options that `beam_options` returned."""
    return [option for option in options if option.startswith("--runner=")][-1].removeprefix("--runner=")


def is_elsewhere(runner: str) -> bool:
    """Whether a runner's workers are on other machines, which do not see this machine's files."""
    return runner.rpartition(".")[2].lower() == "dataflowrunner"


def check_output(folder: str, runner: str) -> None:
    """Refuses a local folder for workers on other machines.

    Raises:
      UserError: names the runner and the folder.
    """
    if is_elsewhere(runner) and is_local(folder):
        raise UserError(f"the workers of {runner} do not see {folder}; give --output_dir gs://bucket/folder")


def wants_processes(options: Sequence[str]) -> bool:
    """Whether Beam's options, still unchecked, ask for local worker processes."""
    return any("multi_processing" in option for option in options)


def local_runner(options: Any, workers: LocalWorkers | None) -> Any:
    """The FnApiRunner with these worker processes if the options ask for them; else None.

    With Beam's own command, a worker logs to stderr until it has read options that never reach it, and works to the
    end of its share when the launcher has been killed.
    """
    from apache_beam.options.pipeline_options import DirectOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    direct = options.view_as(DirectOptions)
    multiple = direct.direct_running_mode == "multi_processing"
    if options.view_as(StandardOptions).runner != DEFAULT_RUNNER or not multiple or workers is None:
        return None
    direct.direct_running_mode = "in_memory"  # keeps Beam from setting the environment again
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(workers.command))


def unwrap(error: BaseException) -> UserError | None:
    """The UserError inside a runner's error, as an object or only as text; None if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return UserError(_without_step(str(seen)))
        if isinstance(seen, ValueError) and str(seen).startswith("Pipeline has validation"):
            return UserError(f"{one_line(seen)}; see Beam's own options")
        found = re.search(r"^(?:harmonic\.errors\.)?UserError: (.+)$", str(seen), re.MULTILINE)
        if found:
            return UserError(_without_step(found[1]))
        seen = seen.__cause__ or seen.__context__
    return None


def _without_step(message: str) -> str:
    return re.sub(r" \[while running .*", "", message, flags=re.DOTALL)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Beam's logging, which repeats every error with its stack trace, and the stack traces that its threads
    print when a worker is lost."""
    before = threading.excepthook

    def not_beam(args: threading.ExceptHookArgs) -> None:
        if args.thread is None or not args.thread.name.startswith(_BEAM_THREADS):
            before(args)

    threading.excepthook = not_beam
    names = ("apache_beam", "root")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        threading.excepthook = before
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
