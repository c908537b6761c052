"""A page that plays an endless stream while it is generated.

python -m workflows.listen                          # the model in the box
python -m workflows.listen --workdir=runs/piano
python -m workflows.listen --model=USER/NAME        # or an export's folder
"""

from __future__ import annotations

from absl import flags

from harmonic.listen.server import Server, warm_up
from workflows import cli

_MODEL = cli.define_model_flag()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "an address of this machine; for others than its own, with a token")
_PORT = flags.DEFINE_integer("port", 8765, "the first that is tried", lower_bound=1, upper_bound=65_535)
_LISTENERS = flags.DEFINE_integer("listeners", 4, "how many may listen at a time", lower_bound=1, upper_bound=1_000)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Serves the page until Ctrl-C."""
    shown, voice = cli.voice_from_flags(_MODEL.value)
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
