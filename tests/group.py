"""One of several processes: loss and gradients of one batch on several meshes, against one device's.

python tests/group.py <host:port> <processes> <index> <data set> <file of the expected> <some or all meshes>
"""

import sys

import jax
import numpy as np
from tiny import config, parameters

from harmonic import processes
from harmonic.config import MeshConfig
from harmonic.data import Dataset, train_batches
from harmonic.errors import UserError
from harmonic.mesh import make_mesh, process_part
from harmonic.models import make
from harmonic.step import make_loss_and_grad
from harmonic.train import place_batch

WORDS = np.array([1, 2], np.uint32)
SHAPES = ((8, 1), (1, 8), (2, 4), (4, 2))
MESHES = {
    "some": (("float32", 2, 4), ("float64", 8, 1), ("float64", 1, 8)),
    "all": tuple((dtype, *shape) for dtype in ("float32", "float64") for shape in SHAPES),
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def loss_and_grad(data, dtype, *shape):
    """Loss and gradient's leaves of the second batch of eight, in three segments, on a mesh."""
    ours = config(
        "train.global_batch_size=8", "train.segment_length=192", f"mesh.data={shape[0]}", f"mesh.seq={shape[1]}"
    )
    with jax.enable_x64(dtype == "float64"):
        mesh = make_mesh(ours.mesh)
        part = process_part(mesh)
        batches = train_batches(Dataset(data), ours, shard=part.rows, piece=part.piece)
        next(batches)
        batch = place_batch(next(batches), ours, mesh)
        params = jax.tree.map(np.asarray, parameters(dtype))
        function = jax.jit(make_loss_and_grad(make(ours.model), mesh))
        loss, grads = function(params, batch, WORDS)
        return [np.asarray(v) for v in (loss, *jax.tree.leaves(grads))]


def main():
    address, count, index, data, expected, which = sys.argv[1:]
    processes.initialise(address, int(count), int(index))
    expected = np.load(expected)
    for dtype, *shape in MESHES[which]:
        for number, value in enumerate(loss_and_grad(data, dtype, *shape)):
            wanted = expected[f"{dtype}_{number}"]
            error = np.abs(value - wanted).max() / np.abs(wanted).max()
            assert error < TOLERANCE[dtype], (dtype, shape, number, error)
    for shape, words in (((3, 1), "asks for 3 devices, but there are 2 processes"), ((9, 9), "but there are 8")):
        try:
            make_mesh(MeshConfig(*shape))
        except UserError as error:
            assert words in str(error), error
        else:
            raise AssertionError(shape)
    assert [int(text) for text in processes.gather(str(index))] == list(range(int(count)))
    processes.finish()
    print("equal")


if __name__ == "__main__":
    main()
