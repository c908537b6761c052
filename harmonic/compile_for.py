"""A config's programs, compiled for a device that is not there: what they hold, move, send and run.

    told = compile_for(load_config("sc09"), target("cuda:h100"))

XLA compiles in a process of its own: no device is asked for, and the caller's flags and platforms stay as they are.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harmonic.config import Config, from_dict
from harmonic.describe import costs, dearest_stage, fits, memory
from harmonic.devices import Target
from harmonic.devices import target as named
from harmonic.errors import UserError

CHUNK = 100  # samples that a generation program makes; what is told is of one of them
_WHEELS = {"tpu": (("libtpu",), "tpu"), "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda12")}
_OWN = ("__gpu$xla.gpu.triton", "triton_kernel_call", "tpu_custom_call")  # what Pallas compiles to
_DEAREST = 10
_CHILD = "import sys; from harmonic.compile_for import answer; answer(sys.argv[1])"


def compile_for(
    config: Config, target: Target, *, what: str = "train", streams: int = 32, keep: str | Path | None = None
) -> dict[str, Any]:
    """Compiles a config's training step, or its generation, for devices that are not there.

    Args:
      config: of a run; of its stages, the one that holds most.
      target: devices; the training step takes as many of them as the config's mesh says, generation one.
      what: train or generate.
      streams: generated side by side.
      keep: a folder for the compiled program's text (program.hlo) and, of GPUs, what XLA dumps besides (dump/).

    Returns:
      {"config", "what", "device", "topology", "devices" (that the program runs on), "samples" (of a step on all
      devices, or of `CHUNK` a stream), "compile_seconds", "held" (bytes on one device: "arguments", "outputs" less what
      takes the arguments' place, "temporaries", "total", "device"; of training also "predicted", by
      `describe.memory`),
      "moved" (bytes on one device: "read", "written", "a_sample"), "kernels" ("a_step", or of generation
      "a_sample"; "by_depth": by the number of loops around them whose counts XLA does not know), "sent" (bytes by
      kind of collective), "bounds" (samples a second that the devices cannot exceed, by "bandwidth", by "operations"),
      "dearest" (kernels that move most: "name", "kind", "runs", "bytes", "share"), "own_kernels" (the project's own
      by name: "runs", "bytes", and on GPUs "registers", "spilled" bytes)}. Loops count as often as they run; in
      generation inner loops of unknown count as if they ran once a sample, which is the most that they do.

    Raises:
      UserError: a package that is missing, a mesh of more devices than there are, or a program that does not fit.
    """
    _check_wheels(target)
    if what == "train" and config.mesh.data * config.mesh.seq > target.size:
        raise UserError(
            f"mesh.data={config.mesh.data} x mesh.seq={config.mesh.seq} asks for {config.mesh.data * config.mesh.seq} "
            f"devices, but {target.kind}:{target.topology_name} has {target.size}: name a larger topology"
        )
    name = f"{target.kind}:{target.topology_name}"
    request = {"config": dataclasses.asdict(config), "target": name, "what": what, "streams": streams}
    with tempfile.TemporaryDirectory(prefix="harmonic_compile_") as scratch:
        folder = Path(keep or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        answered = folder / "answer.json"
        answered.unlink(missing_ok=True)
        shutil.rmtree(folder / "dump", ignore_errors=True)
        (folder / "request.json").write_text(json.dumps(request))
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock guards devices, and none is used
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program from the cache leaves no dump
        if target.device.gpu is not None:
            dump = f"--xla_dump_to={folder}/dump --xla_dump_hlo_module_re=jit_(step_function|run)"
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder)], env=environment, capture_output=True, text=True
        )
        if child.returncode or not answered.exists():
            raise _failure(config, target, child.stderr)
        told = json.loads(answered.read_text())
    held = told["held"]
    if held["total"] > held["device"]:
        raise _does_not_fit(config, target, what, held["total"])
    return told


def _check_wheels(target: Target) -> None:
    modules, extra = _WHEELS[target.device.platform]
    if not any(map(importlib.util.find_spec, modules)):
        raise UserError(
            f"compiling for {target.kind} needs the package {' or '.join(modules)}: pip install -e '.[{extra}]'"
        )


def _does_not_fit(config: Config, target: Target, what: str, held: int) -> UserError:
    room = target.device.memory
    line = f"the program holds {held:,} bytes, but {target.device.name} has {room:,}"
    if what != "train":
        return UserError(f"{line}: take fewer --streams")
    stage = dearest_stage(config)
    found = fits(stage, round(room * memory(stage)["total"] / held))
    return UserError(
        f"{line}: data.window_length={found['longest_window']} is the longest that fits, or train.segment_length="
        f"{found['longest_segment']}, or train.global_batch_size={found['largest_batch']}"
    )


def _failure(config: Config, target: Target, log: str) -> Exception:
    """What a child's log says, as the error to raise."""
    used = re.search(r"Ran out of memory in memory space hbm.*?Used ([\d.]+)([KMGT]) of", log)
    if used:
        held = round(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))))
        return _does_not_fit(config, target, "train", held)
    if ("libtpu" in log and "lockfile" in log) or "TPU is already in use" in log:
        return UserError(
            "another process holds libtpu's lock: wait until it ends, or remove /tmp/libtpu_lockfile if none is there"
        )
    if told := re.findall(r"^(?:harmonic\.errors\.)?UserError: (.*)", log, re.MULTILINE):
        return UserError(told[-1])
    return RuntimeError(f"compiling for {target.kind} failed:\n{log[-4_000:]}")


def answer(name: str) -> None:
    """In the process of its own: reads the request in a folder, and writes the answer there."""
    import jax

    from harmonic import generate, hlo, models, step, traffic
    from harmonic.kernels.target import compiling_for
    from harmonic.mesh import mesh_of

    folder = Path(name)
    request = json.loads((folder / "request.json").read_text())
    config, target = dearest_stage(from_dict(request["config"])), named(request["target"])
    train, device = request["what"] == "train", target.device
    devices = _topology(target)
    model = models.make(config.model, config.data.num_levels)
    start = time.monotonic()
    with compiling_for(target.platform):
        if train:
            mesh = mesh_of(config.mesh, devices)
            lowered = step.make_train_step(model, config, mesh).lower(*step.step_shapes(model, config, mesh))
            used, samples = mesh.size, config.training_length * config.train.global_batch_size
        else:
            place = jax.sharding.SingleDeviceSharding(devices[0])
            lowered = generate.lower_chunk(model, request["streams"], CHUNK, place)
            used, samples = 1, CHUNK * request["streams"]
    compiled = lowered.compile()
    seconds = time.monotonic() - start

    text, stats = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and stats is not None, "the compiler tells neither the program nor its memory"
    (folder / "program.hlo").write_text(text)
    found = traffic.kernels(
        text, unknown=None if train else (lambda depth: 1 if depth else CHUNK), on_chip=device.platform == "tpu"
    )
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    held = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": outputs,
        "temporaries": stats.temp_size_in_bytes,
        "total": stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes,
        "device": device.memory,
    }
    if train:
        held["predicted"] = memory(config)["total"]
    read, written = (round(sum(k.runs * n(k) for k in found)) for n in (lambda k: k.read, lambda k: k.written))
    times = collections.Counter[int]()
    for kernel in found:
        times[kernel.unknown] += round(kernel.runs if train else kernel.runs / CHUNK)
    operations = costs(config).operations["training" if train else "generation"]["total"]
    rate = device.operations["bfloat16" if config.model.dtype == "bfloat16" else "float32"]
    sent = collections.Counter[str]()
    if used > 1:
        for collective in hlo.collectives(text):
            sent[collective.kind] += collective.runs * collective.sent_bytes
    own = _own_kernels(found)
    if device.gpu is not None:
        for name, figures in _registers(folder / "dump", set(own), device.gpu.architecture).items():
            own[name] |= figures
    told = {
        "config": config.name,
        "what": request["what"],
        "device": device.name,
        "topology": target.topology_name,
        "devices": used,
        "samples": samples,
        "compile_seconds": round(seconds, 1),
        "held": held,
        "moved": {"read": read, "written": written, "a_sample": round((read + written) * used / samples)},
        "kernels": {
            "a_step" if train else "a_sample": sum(times.values()),
            **({} if train else {"by_depth": {str(depth): n for depth, n in sorted(times.items())}}),
        },
        "sent": dict(sent),
        "bounds": {
            "bandwidth": round(samples * device.bandwidth / (read + written)),
            "operations": round(used * rate / operations),
        },
        "dearest": _dearest(found, read + written),
        "own_kernels": own,
    }
    (folder / "answer.json").write_text(json.dumps(told))


def _topology(target: Target) -> list[Any]:
    """The target's devices, for XLA to compile for."""
    import jax
    from jax.experimental import topologies

    if target.device.gpu is not None:
        from jax._src import xla_bridge

        jax.devices()  # CPU alone, before the plugin is there
        xla_bridge.discover_pjrt_plugins()
        text = target.device.gpu.target_config(target.device)
        topology = f"1x{target.topology_name}"
        return topologies.get_topology_desc("", platform="cuda", topology=topology, target_config=text).devices
    name = f"{target.kind.removeprefix('tpu:')}:{target.topology_name}"
    # A v4 chip's two cores are one device to JAX; libtpu's own default without a chip are two.
    chip = {"chip_config_name": "megacore"} if target.kind == "tpu:v4" else {}
    return topologies.get_topology_desc(name, platform="tpu", **chip).devices


def _dearest(found: list[Any], total: int) -> list[dict[str, Any]]:
    """The kernels that move most, those of one name in JAX and one kind together."""
    groups = collections.defaultdict(list)
    for kernel in found:
        groups[kernel.kind, kernel.op_name].append(kernel)
    ranked = sorted(groups.values(), key=lambda group: -sum(k.runs * k.moved for k in group))
    return [
        {
            "bytes": round(moved := sum(k.runs * k.moved for k in group)),
            "runs": round(sum(k.runs for k in group)),
            "share": round(moved / total, 4),
            "kind": group[0].kind,
            "name": group[0].op_name or group[0].name,
        }
        for group in ranked[:_DEAREST]
    ]


def _own_kernels(found: list[Any]) -> dict[str, dict[str, Any]]:
    own: dict[str, dict[str, Any]] = {}
    for kernel in found:
        if kernel.kind in _OWN:
            *_, name = kernel.op_name.removesuffix("/pallas_call").split("/")
            figures = own.setdefault(name, {"runs": 0, "bytes": 0})
            figures["runs"] += round(kernel.runs)
            figures["bytes"] += round(kernel.runs * kernel.moved)
    return own


def _registers(folder: Path, names: set[str], architecture: str) -> dict[str, dict[str, int]]:
    """{"registers", "spilled" (bytes stored and loaded)} of the kernels of these names in a folder of XLA's, by ptxas;
    of kernels that share a name, the most. Nothing where ptxas is not installed."""
    ptxas = _ptxas()
    found: dict[str, dict[str, int]] = {}
    for path in folder.glob("*.ptx") if ptxas else ():
        head, *entries = re.split(r"(?=^\s*(?://[^\n]*\n\s*)?\.visible \.entry )", path.read_text(), flags=re.MULTILINE)
        wanted = [e for e in entries if re.sub(r"_\d+$", "", _entry_name(e)) in names]
        if wanted:
            cut = path.with_suffix(".own")
            cut.write_text(head + "".join(wanted))
            command = [str(ptxas), "-v", f"-arch={architecture}", str(cut), "-o", os.devnull]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            for name, figures in read_ptxas(log).items():
                base = re.sub(r"_\d+$", "", name)
                known = found.setdefault(base, dict.fromkeys(figures, 0))
                found[base] = {key: max(known[key], value) for key, value in figures.items()}
    return found


def _entry_name(entry: str) -> str:
    found = re.search(r"\.entry (\S+?)\(", entry)
    return found[1] if found else ""


def read_ptxas(log: str) -> dict[str, dict[str, int]]:
    """{"registers", "spilled"} by kernel, from what `ptxas -v` prints."""
    found: dict[str, dict[str, int]] = {}
    name, spilled = "", 0
    for line in log.splitlines():
        if entry := re.search(r"(?:Compiling entry function|Function properties for) '?(\w+)", line):
            name = entry[1]
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found[name] = {"registers": int(used[1]), "spilled": spilled}
    return found


def _ptxas() -> Path | None:
    """The ptxas of NVIDIA's wheels."""
    import importlib.metadata

    for wheel in ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "ptxas":
                return Path(str(file.locate()))
    return None
