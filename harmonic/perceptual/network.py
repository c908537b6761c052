"""The classifier's network: a ResNeXt on 1 x 32 x 32 images (Xie et al. 1611.05431), in Flax.

A 3 x 3 convolution, three stages of bottlenecks (the second and third halve the image), the mean over the image, which
is the feature vector, and one dense layer. The names of its parameters are those of the published PyTorch network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

FEATURES = 1_024


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network's sizes; by default the published one's, of 34.4 million parameters.

    Attributes:
      stem: channels of the first convolution.
      widths: channels between the bottlenecks of each of the three stages; the last is the number of features.
      inner: channels within them, each a multiple of `groups`.
      groups: of the 3 x 3 convolutions within (the cardinality).
      blocks: bottlenecks a stage.
    """

    stem: int = 64
    widths: tuple[int, ...] = (256, 512, FEATURES)
    inner: tuple[int, ...] = (512, 1_024, 2_048)
    groups: int = 8
    blocks: int = 3


SIZES = {
    "paper": Sizes(),
    # Needs a two-hundredth of the operations, and has the same number of features.
    "small": Sizes(stem=16, widths=(32, 64, FEATURES), inner=(32, 64, 128), groups=4, blocks=1),
}


class Convolution(nnx.Module):
    """A square convolution, centred, without bias: [n, height, width, in] to [n, height / stride, width / stride, out].

    Each group is a convolution of its own: XLA's grouped convolutions on CPU take up to 18 times as long forward, and 7
    to 54 times as long with their gradients.
    """

    def __init__(self, width_in: int, width: int, size: int, rngs: nnx.Rngs, stride: int = 1, groups: int = 1):
        shape = size, size, width_in // groups, width
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.stride, self.groups = stride, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(self.stride,) * 2,
            padding=(((kernel.shape[0] - 1) // 2,) * 2,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        parts = zip(jnp.split(x, self.groups, -1), jnp.split(kernel, self.groups, -1), strict=True)
        return jnp.concatenate([convolve(part, weights) for part, weights in parts], -1)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)


class Bottleneck(nnx.Module):
    """Reduce, convolve in groups, expand; added to the input, or to a projection of it where the width changes."""

    def __init__(self, width_in: int, inner: int, width: int, groups: int, stride: int, rngs: nnx.Rngs):
        self.conv_reduce, self.bn_reduce = Convolution(width_in, inner, 1, rngs), _norm(inner, rngs)
        self.conv_conv = Convolution(inner, inner, 3, rngs, stride, groups)
        self.bn = _norm(inner, rngs)
        self.conv_expand, self.bn_expand = Convolution(inner, width, 1, rngs), _norm(width, rngs)
        self.projects = width_in != width
        if self.projects:
            self.shortcut_conv = Convolution(width_in, width, 1, rngs, stride)
            self.shortcut_bn = _norm(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn_reduce(self.conv_reduce(x)))
        y = nnx.relu(self.bn(self.conv_conv(y)))
        y = self.bn_expand(self.conv_expand(y))
        return nnx.relu(y + (self.shortcut_bn(self.shortcut_conv(x)) if self.projects else x))


class Network(nnx.Module):
    """Images [n, 32, 32] (band, frame) to (features [n, 1024], logits [n, classes])."""

    def __init__(self, sizes: Sizes, classes: int, rngs: nnx.Rngs):
        self.conv_1_3x3, self.bn_1 = Convolution(1, sizes.stem, 3, rngs), _norm(sizes.stem, rngs)
        width_in, stages = sizes.stem, []
        for number, (width, inner) in enumerate(zip(sizes.widths, sizes.inner, strict=True)):
            stage = []
            for block in range(sizes.blocks):
                stride = 2 if number and not block else 1
                stage.append(Bottleneck(width_in, inner, width, sizes.groups, stride, rngs))
                width_in = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.classifier = nnx.Linear(width_in, classes, kernel_init=nnx.initializers.he_normal(), rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nnx.relu(self.bn_1(self.conv_1_3x3(images[..., None])))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        features = x.mean((1, 2))
        return features, self.classifier(features)


Variables = dict[str, jax.Array]  # by the published network's names


@dataclasses.dataclass(frozen=True)
class Functions:
    """A network as functions over flat dictionaries of arrays.

    Attributes:
      init: key -> (parameters, statistics of the batch norms).
      train: (parameters, statistics, images) -> (logits, statistics after the batch).
      evaluate: (parameters, statistics, images) -> (features, logits).
    """

    init: Callable[[jax.Array], tuple[Variables, Variables]]
    train: Callable[..., tuple[jax.Array, Variables]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


def functions(sizes: Sizes, classes: int) -> Functions:
    """The network of these sizes."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Network(sizes, classes, nnx.Rngs(0))))

    def bind(params: Variables, stats: Variables, *, training: bool) -> Network:
        network = nnx.merge(graph, _unflatten({**params, **stats}))
        (network.train if training else network.eval)()
        return network

    def init(key: jax.Array) -> tuple[Variables, Variables]:
        network = Network(sizes, classes, nnx.Rngs(key))
        return _flatten(nnx.state(network, nnx.Param)), _flatten(nnx.state(network, nnx.BatchStat))

    def train(params: Variables, stats: Variables, images: jax.Array) -> tuple[jax.Array, Variables]:
        network = bind(params, stats, training=True)
        logits = network(images)[1]
        return logits, _flatten(nnx.state(network, nnx.BatchStat))

    def evaluate(params: Variables, stats: Variables, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return bind(params, stats, training=False)(images)

    return Functions(init, train, evaluate)


def shapes(sizes: Sizes, classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of (parameters, statistics), without making any."""
    return jax.eval_shape(functions(sizes, classes).init, jax.random.key(0))


def parameter_count(sizes: Sizes, classes: int) -> int:
    """How many parameters are trained."""
    return sum(v.size for v in shapes(sizes, classes)[0].values())


def _flatten(state: Any) -> Variables:
    return {".".join(map(str, path)): v for path, v in nnx.traversals.flatten_mapping(nnx.to_pure_dict(state)).items()}


def _unflatten(values: Variables) -> dict[Any, Any]:
    paths = {tuple(int(p) if p.isdigit() else p for p in name.split(".")): v for name, v in values.items()}
    return nnx.traversals.unflatten_mapping(paths)
