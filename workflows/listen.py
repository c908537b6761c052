"""A page that plays an endless stream while it is generated.

python -m workflows.listen                          # the model in the box
python -m workflows.listen --workdir=runs/piano
python -m workflows.listen --model=USER/NAME        # or an export's folder
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

import harmonic
from harmonic.errors import UserError
from harmonic.listen.server import Server, warm_up
from harmonic.pretrained import in_the_box
from harmonic.run import Run
from harmonic.voice import Codec, Voice
from workflows import cli

_BOXED = "piano"
_MODEL = flags.DEFINE_string(
    "model", None, "an export's folder, USER/NAME on the hub, or the name of a model in the box"
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "an address of this machine; for others than its own, with a token")
_PORT = flags.DEFINE_integer("port", 8765, "the first that is tried", lower_bound=1, upper_bound=65_535)
_LISTENERS = flags.DEFINE_integer("listeners", 4, "how many may listen at a time", lower_bound=1, upper_bound=1_000)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Serves the page until Ctrl-C."""
    if cli.FLAGS.config or cli.FLAGS.set:
        raise UserError("a model is heard with its own config: give --workdir or --model alone")
    if cli.FLAGS.workdir and _MODEL.value:
        raise UserError("--workdir and --model are two models: give one of them")
    name = cli.FLAGS.workdir or _MODEL.value or _BOXED
    if cli.FLAGS.workdir:
        run = Run(cli.FLAGS.workdir)
        trained = run.weights()
        voice = Voice(trained.model, trained.params, Codec.of(run.manifest))
    elif not _MODEL.value and _BOXED not in in_the_box():
        raise UserError(f"there is no model {_BOXED} in the box; give --workdir=RUN or --model=EXPORT_OR_HUB_ID")
    else:
        voice = harmonic.load(name).voice
    shown = Path(name).resolve().name
    with Server(voice, name=shown, host=_HOST.value, port=_PORT.value, listeners=_LISTENERS.value) as server:
        if server.port != _PORT.value:
            print(f"port {_PORT.value} is in use; this is {server.port}")
        print("compiling ...", flush=True)
        speed = warm_up(voice)
        print(f"makes sound {speed:.1f} times as fast as it plays{'' if speed > 1 else ', so it will stop to buffer'}")
        print(f"listen at {server.url}   (Ctrl-C ends it)", flush=True)
        server.run()
    print("stopped")


if __name__ == "__main__":
    cli.run(main)
