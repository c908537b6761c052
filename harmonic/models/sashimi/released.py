"""Weights of SaShiMi under the names of its authors' code (github state-spaces/s4), both ways.

    tensors = harmonic.perceptual.torch_weights.read_tensors("sashimi.pt")    # runs none of its code
    params = from_released(tensors, config)

There the backbone is `model`, the embedding `encoder.0`, the head `decoder.0.output_transform`. A layer's C is stored
as C (I - A^L), where L is `l_kernel`, the length of the kernels that it was trained with (0: C itself).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from harmonic.errors import UserError
from harmonic.models.base import Params
from harmonic.models.sashimi.config import ModelConfig
from harmonic.models.sashimi.layers import S4

Tensors = dict[str, np.ndarray]


def from_released(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """The parameters of a state dict.

    Args:
      tensors: by name.
      config: of the model that they are of.

    Raises:
      UserError: a tensor is missing, left over, or has another shape.
    """
    left = {name: np.asarray(value) for name, value in tensors.items()}

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in left:
            raise UserError(f"the weights have no {name}: they are of another model than kind={config.kind}, {config}")
        value = left.pop(name)
        if value.size != int(np.prod(shape)):
            raise UserError(f"{name} has the shape {list(value.shape)}, and the config asks for {list(shape)}")
        return value.reshape(shape).astype(np.float32)

    def dense(name: str, inputs: int, outputs: int) -> Params:
        return {"kernel": take(f"{name}.weight", outputs, inputs).T, "bias": take(f"{name}.bias", outputs)}

    def norm(name: str) -> Params:
        return {"shift": take(f"{name}.norm.norm.m", 1), "scale": take(f"{name}.norm.norm.s", 1)}

    def s4(name: str, width: int) -> Params:
        modes, copies, kernel = config.state_width // 2, 1 if config.tied else width, f"{name}.layer.layer.kernel"
        params: Params = {"norm": norm(name)}
        params["A_re"] = take(f"{kernel}.A_real", copies, modes)
        params["A_im"] = -take(f"{kernel}.A_imag", copies, modes)
        for part in ("B", "P") if config.ssm == "s4" else ("B",):
            value = take(f"{kernel}.{part}", copies, modes, 2)
            params[f"{part}_re"], params[f"{part}_im"] = value[..., 0], value[..., 1]
        c = take(f"{kernel}.C", width, modes, 2)
        params["C_re"], params["C_im"] = c[..., 0], c[..., 1]
        params["dt"] = take(f"{kernel}.inv_dt", width)
        params["D"] = take(f"{name}.layer.layer.D", width)
        params["output"] = dense(f"{name}.layer.output_linear.0", width, width * (1 + config.glu))
        if config.ssm == "s4" and (length := int(left.pop(f"{kernel}.l_kernel", np.int64(0)))):
            params |= _read_out(params, config, width, length, solve=True)
        return params

    def ff(name: str, width: int) -> Params:
        inner = config.ff * width
        up, down = dense(f"{name}.layer.ff.0.0", width, inner), dense(f"{name}.layer.ff.2", inner, width)
        return {"norm": norm(name), "up": up, "down": down}

    def pool(name: str, level: int, *, up: bool) -> Params:
        factor, outer, inner = config.pool_factors[level], *config.level_widths[level : level + 2]
        shape = (outer, factor, inner) if up else (inner, outer, factor)  # there the features are the outer axis
        suffix = "weight_v" if config.pool_weight_norm else "weight"
        kernel = take(f"{name}.linear.{suffix}", *shape)
        kernel = kernel.transpose(2, 1, 0)
        rows = inner if up else factor * outer

        def features(value: np.ndarray) -> np.ndarray:
            return value.reshape(outer, factor).T.reshape(-1) if up else value

        params = {
            "kernel": kernel.reshape(rows, -1),
            "bias": features(take(f"{name}.linear.bias", factor * outer if up else inner)),
        }
        if config.pool_weight_norm:
            params["gain"] = features(take(f"{name}.linear.weight_g", factor * outer if up else inner))
        return params

    params: Params = {"embedding": take("encoder.0.weight", *_levels(left, config))}
    blocks: dict[str, dict[str, list[Params]]] = {}
    for name, (part, level, stack) in _layers(config):
        if part in ("down_pool", "up_pool"):
            params[f"{part}_{level}"] = pool(name, level, up=part == "up_pool")
        else:
            make = {"s4": s4, "ff": ff}[part]
            blocks.setdefault(stack, {}).setdefault(part, []).append(make(name, config.level_widths[level]))
    for stack, parts in blocks.items():
        params[stack] = {part: jax.tree.map(lambda *v: np.stack(v), *found) for part, found in parts.items()}
    params["norm"] = {"scale": take("model.norm.weight", config.width), "bias": take("model.norm.bias", config.width)}
    params["head"] = dense("decoder.0.output_transform", config.width, len(params["embedding"]))
    if left:
        raise UserError(f"the weights have {', '.join(sorted(left)[:3])}, which {config} has no place for")
    return jax.tree.map(jnp.asarray, params)


def to_released(params: Params, config: ModelConfig, length: int = 0) -> Tensors:
    """The state dict of parameters; undoes `from_released`.

    Args:
      params: as `init` names them.
      config: of the model.
      length: samples that the outermost level's kernels have, L above; an inner level's have as many fewer as it has
        steps. 0 stores C itself.
    """
    found: Tensors = {}
    params = jax.tree.map(np.asarray, params)

    def dense(name: str, layer: Params) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = layer["kernel"].T, layer["bias"]

    found["encoder.0.weight"] = params["embedding"]
    counts: dict[tuple[str, str], int] = {}
    for name, (part, level, stack) in _layers(config):
        if part in ("down_pool", "up_pool"):
            layer, up = params[f"{part}_{level}"], part == "up_pool"
            factor, outer, inner = config.pool_factors[level], *config.level_widths[level : level + 2]
            shape = (inner, factor, outer) if up else (factor, outer, inner)
            kernel = layer["kernel"].reshape(shape).transpose(2, 1, 0)
            suffix = "weight_v" if config.pool_weight_norm else "weight"
            found[f"{name}.linear.{suffix}"] = kernel.reshape(factor * outer if up else inner, -1)
            for ours, theirs, extra in (("bias", "bias", ()), ("gain", "weight_g", (1,))):
                if ours in layer:
                    value = layer[ours].reshape(factor, outer).T.reshape(-1) if up else layer[ours]
                    found[f"{name}.linear.{theirs}"] = value.reshape(-1, *extra)
            continue
        number = counts.get((stack, part), 0)
        counts[stack, part] = number + 1
        own = jax.tree.map(lambda v, i=number: v[i], params[stack][part])
        found[f"{name}.norm.norm.m"], found[f"{name}.norm.norm.s"] = own["norm"]["shift"], own["norm"]["scale"]
        if part == "ff":
            dense(f"{name}.layer.ff.0.0", own["up"])
            dense(f"{name}.layer.ff.2", own["down"])
            continue
        kernel, width = f"{name}.layer.layer.kernel", config.level_widths[level]
        if config.ssm == "s4":
            steps = length // math.prod(config.pool_factors[:level])
            found[f"{kernel}.l_kernel"] = np.asarray(steps)
            if steps:
                own |= _read_out(own, config, width, steps, solve=False)
        found[f"{kernel}.A_real"], found[f"{kernel}.A_imag"] = own["A_re"], -own["A_im"]
        for part in ("B", "P", "C"):
            if f"{part}_re" in own:
                found[f"{kernel}.{part}"] = np.stack([own[f"{part}_re"], own[f"{part}_im"]], -1)[None]
        found[f"{kernel}.inv_dt"], found[f"{name}.layer.layer.D"] = own["dt"][:, None], own["D"][None]
        dense(f"{name}.layer.output_linear.0", own["output"])
    found["model.norm.weight"], found["model.norm.bias"] = params["norm"]["scale"], params["norm"]["bias"]
    dense("decoder.0.output_transform", params["head"])
    return found


def _levels(tensors: Tensors, config: ModelConfig) -> tuple[int, int]:
    table = tensors.get("encoder.0.weight")
    return (0 if table is None else len(table), config.width)


def _layers(config: ModelConfig) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """(the name there, (s4, ff, down_pool or up_pool; its level; our stack)) of every layer, in order."""
    pools, number = len(config.pool_factors), 0

    def blocks(level: int, stack: str) -> Iterator[tuple[str, int, str]]:
        for _ in range(config.level_blocks[level]):
            yield from (("s4", level, stack), ("ff", level, stack))

    for level in range(pools):
        for layer in [*(blocks(level, f"down_{level}") if config.unet else ()), ("down_pool", level, "")]:
            yield f"model.d_layers.{number}", layer
            number += 1
    for number, layer in enumerate(blocks(pools, "inner")):
        yield f"model.c_layers.{number}", layer
    number = 0
    for place, level in enumerate(reversed(range(pools))):
        up = [("up_pool", level, ""), *blocks(level, f"up_{level}")]
        for within, layer in enumerate(up):
            # The U-Net's are one list, the other's a list of lists.
            yield (f"model.u_layers.{number}" if config.unet else f"model.u_layers.{place}.{within}"), layer
            number += 1


def _read_out(params: Params, config: ModelConfig, width: int, length: int, *, solve: bool) -> Params:
    """C of C (I - A^L), or with `solve` false the other way, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), {k: v for k, v in params.items() if k != "output"})
        tables = S4(config, width).prepare({**wide, "output": {}})["tables"]
        a = np.asarray(tables.once)
        c = np.concatenate([2 * np.asarray(wide["C_re"]), -2 * np.asarray(wide["C_im"])], -1)
    rest = np.eye(a.shape[-1])[None] - np.linalg.matrix_power(a, length)
    c = np.linalg.solve(rest.swapaxes(1, 2), c[..., None])[..., 0] if solve else np.einsum("hm,hmn->hn", c, rest)
    re, im = np.split(c, 2, axis=-1)
    return {"C_re": (re / 2).astype(np.float32), "C_im": (-im / 2).astype(np.float32)}
