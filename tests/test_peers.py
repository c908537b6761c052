"""The peers: exact sizes, the published code's layers, weights under their published names, one line for bad input."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harmonic import models
from harmonic.config import load_config, override
from harmonic.describe import memory, parameters
from harmonic.errors import UserError
from harmonic.mesh import make_mesh
from harmonic.models.latent_transformer.config import ModelConfig as Latent
from harmonic.models.mamba.config import ModelConfig as Mamba
from harmonic.models.samplernn.config import ModelConfig as SampleRNN
from harmonic.models.sashimi.config import MUSIC, VARIANTS
from harmonic.models.sashimi.config import ModelConfig as SaShiMi
from harmonic.models.sashimi.released import from_released, to_released
from harmonic.models.wavenet.config import ModelConfig as WaveNet
from harmonic.step import make_train_step, step_shapes

PEERS = ("wavenet", "sashimi", "mamba", "samplernn", "latent_transformer")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MUSIC, 4_059_360),
        (dataclasses.replace(MUSIC, glu=True), 4_751_072),
        (SaShiMi(tied=True), 5_845_152),
        (SaShiMi(), 6_820_512),
        (SaShiMi(ssm="s4d"), 6_492_832),
        (dataclasses.replace(MUSIC, blocks_per_level=2), 1_287_192),
        (WaveNet(), 4_244_480),
        (WaveNet(skip_width=512), 2_671_616),
        (SampleRNN(), 35_034_624),
        (SampleRNN(frames=(16, 4), rnn_layers=2), 51_848_704),
        (SampleRNN(width=256), 2_713_344),
        (Mamba(), 3_557_248),
        (Mamba(complex=False), 3_557_248),
        (Mamba(pool_factors=(4, 4), blocks_per_level=8, complex=False), 6_255_104),
        (Mamba(width=96, pool_factors=(4, 4), blocks_per_level=15, complex=False), 24_851_008),
        (Latent(), 4_027_648),
    ],
)
def test_parameters_to_the_unit(config, expected):
    """Counted in the published code, or from the published equations where there is none."""
    model = models.make(config)
    if config == Mamba():  # A has an imaginary part as well, where half as many modes leave room for it
        assert config.complex
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))) == expected
    assert sum(model.costs().by_part.values()) == expected


@pytest.mark.parametrize(
    ("name", "kind", "total"),
    [
        ("wavenet_sc09", "wavenet", 4_244_480),
        ("samplernn_sc09", "samplernn", 35_034_624),
        ("sashimi_sc09", "sashimi", 6_820_512),
        ("sashimi_beethoven", "sashimi", 4_059_360),
        ("sashimi_youtubemix", "sashimi", 4_059_360),
        ("mamba_sc09", "mamba", 6_255_104),
        ("mamba_youtubemix", "mamba", 3_557_248),
        ("million_youtubemix", "latent_transformer", 4_027_648),
        ("million_youtubemix_large", "latent_transformer", 7_230_416),
    ],
)
def test_configs(name, kind, total):
    config = load_config(name)
    assert (config.model.kind, parameters(config)["total"]) == (kind, total)
    assert f"--config={name}" in (importlib.import_module(f"configs.{name}").__doc__ or "")


def test_reduced_models_are_equally_large():
    from configs.ablations.models import KINDS, reduced

    assert set(KINDS) == set(models.kinds())
    sizes = {kind: sum(models.make(config).costs().by_part.values()) for kind, config in reduced().items()}
    assert all(abs(size - 168_000) < 0.04 * 168_000 for size in sizes.values()), sizes


@pytest.mark.parametrize(("name", "length"), [("two_pools", 240), ("music", 240), ("s4d", 0), ("speech", 0)])
def test_weights_keep_their_values_under_their_released_names(name, length):
    config = VARIANTS[name]
    params = jax.jit(models.make(config).init)(jax.random.key(0))
    tensors = to_released(params, config, length)
    again = from_released(tensors, config)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"no model\.norm\.weight"):
        from_released({k: v for k, v in tensors.items() if k != "model.norm.weight"}, config)
    with pytest.raises(UserError, match="has no place"):
        from_released({**tensors, "model.extra": np.zeros(1)}, config)
    with pytest.raises(UserError, match="shape"):
        from_released(tensors, dataclasses.replace(config, width=config.width * 2))


def test_the_latent_transformer_predicts_a_sample_from_its_window():
    """One window, one sample, as the paper has it: the same logits as in one pass, and none of what is too old."""
    config = importlib.import_module("harmonic.models.latent_transformer.config").SMALL
    model = models.make(config)
    weights = jax.jit(model.prepare)(model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (1, 60, 1), 0, 256)
    whole = jax.jit(lambda t: model.apply(weights, {"tokens": t}, model.init_state(1))[0])(tokens)
    for t in (0, 1, 5, 6, 11):
        np.testing.assert_allclose(model.next_sample(weights, tokens[:, :t]), whole[:, t, 0], rtol=1e-4, atol=1e-5)
    # Every layer reaches back by a window, the way up spreads a latent over a patch, the local layers add their field.
    reach = config.depth * (config.context - config.multiple) + 2 * config.multiple - 2
    reach += config.local_cycles * (2**config.local_layers - 1)
    changed = jax.jit(lambda t: model.apply(weights, {"tokens": t}, model.init_state(1))[0])(
        tokens.at[0, 0].add(97) % 256
    )
    np.testing.assert_array_equal(changed[:, reach + 1 :], whole[:, reach + 1 :])
    assert not np.array_equal(changed[:, config.context - 1], whole[:, config.context - 1])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["model.kind=gru"], "model.kind='gru' is impossible: it must be one of"),
        (["model.kind=wavenet", "model.pool_factors=4,4"], "unknown config field 'model.pool_factors'"),
        (["model.kind=latent_transformer", "model.context=1000"], "model.context=1000 is impossible"),
        (["model.kind=latent_transformer", "model.local_layers=12"], "divides the patch, 256"),
        (["model.kind=samplernn", "mesh.seq=2"], "cannot be cut over time"),
        (["model.kind=sashimi", "model.activations=bfloat16"], "unknown config field 'model.activations'"),
        (["model.kind=mamba", "model.selective=true,false"], r"model.selective=\(True, False\) is impossible"),
        (["train.schedule=steps"], "train.schedule='steps' is not allowed"),
    ],
)
def test_bad_input_is_one_line(assignments, message):
    with pytest.raises(UserError, match=message) as caught:
        override(load_config("demo"), assignments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PEERS)
def test_a_segment_of_another_length_is_refused(kind):
    config = importlib.import_module(f"harmonic.models.{kind}.config").SMALL
    model = models.make(config)
    weights = jax.eval_shape(lambda: model.prepare(model.init(jax.random.key(0))))
    tokens = jax.ShapeDtypeStruct((1, model.multiple + 1, 1), jnp.int32)
    with pytest.raises(UserError, match="a multiple of"):
        jax.eval_shape(lambda w, t: model.apply(w, {"tokens": t}, model.init_state(1)), weights, tokens)


def test_wavenet_is_the_published_network():
    """The same layers in PyTorch, with the same weights, on inputs padded with the middle level."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    config = importlib.import_module("harmonic.models.wavenet.config").SMALL
    model = models.make(config)
    params = jax.tree.map(lambda v: torch.from_numpy(np.array(v)), model.init(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    field = config.receptive_field
    padded = np.concatenate([np.full((2, field), 128), tokens[:, :-1]], axis=1)
    x = params["embedding"][torch.from_numpy(padded)].transpose(1, 2)
    conv = torch.nn.functional.conv1d
    x = conv(x, params["entry"]["kernel"].T[:, :, None])
    skips, layers = 0, params["layers"]
    for cycle in range(config.cycles):
        for i in range(config.layers):
            kernel = layers["entry"]["kernel"][cycle, i].T.reshape(2 * config.width, 2, config.width).transpose(1, 2)
            value, gate = conv(x, kernel, dilation=2**i).chunk(2, 1)
            z = torch.tanh(value) * torch.sigmoid(gate)
            x = x[..., 2**i :] + conv(z, layers["residual"]["kernel"][cycle, i].T[:, :, None])
            skips = (skips[..., 2**i :] if cycle or i else 0) + conv(
                z, layers["skip"]["kernel"][cycle, i].T[:, :, None]
            )
    y = skips.transpose(1, 2)
    for name in ("end", "output"):
        y = torch.relu(y) @ params[name]["kernel"] + params[name]["bias"]
    expected = (y @ params["decoder"]["kernel"] + params["decoder"]["bias"])[:, -24:]
    ours = jax.tree.map(lambda v: jnp.asarray(v.numpy()), params)
    found = model.apply(model.prepare(ours), {"tokens": jnp.asarray(tokens)[..., None]}, model.init_state(2))[0]
    np.testing.assert_allclose(found[:, :, 0], expected.numpy(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_samplernns_units_are_the_published_ones():
    """PyTorch's GRU with the same weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    config = SampleRNN(frames=(2,), width=5, rnn_layers=2, embedding_width=3)
    model = models.make(config)
    params = model.init(jax.random.key(0))["tier_0"]["gru"]
    gru = torch.nn.GRU(5, 5, 2, batch_first=True)
    with torch.no_grad():
        for layer in range(2):
            for ours, theirs in (("input", "ih"), ("hidden", "hh")):
                getattr(gru, f"weight_{theirs}_l{layer}").copy_(torch.tensor(np.array(params[ours]["kernel"][layer].T)))
                getattr(gru, f"bias_{theirs}_l{layer}").copy_(torch.tensor(np.array(params[ours]["bias"][layer])))
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    h = np.random.default_rng(1).normal(size=(2, 2, 5)).astype(np.float32)
    with torch.no_grad():
        expected, last = gru(torch.tensor(x), torch.tensor(h))
    found, found_last = model._gru(params, jnp.asarray(x), jnp.asarray(h))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_last, last.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("segment_length", [0, 4_096])
@pytest.mark.parametrize("kind", PEERS)
def test_memory_is_that_of_the_compiled_step(kind, segment_length):
    """`describe`'s prediction, to within 30 %."""
    from configs.ablations.models import reduced, small

    assignments = ["data.window_length=16384", "data.crop_length=0", f"train.segment_length={segment_length}"]
    config = override(small("sc09", reduced()[kind], "small"), assignments)
    model, mesh = models.make(config.model), make_mesh(config.mesh)
    step = make_train_step(model, config, mesh).lower(*step_shapes(model, config, mesh)).compile()
    held = step.memory_analysis()
    assert memory(config)["total"] == pytest.approx(held.temp_size_in_bytes + held.argument_size_in_bytes, rel=0.3)
