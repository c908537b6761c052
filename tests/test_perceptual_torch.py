"""Weights of the published PyTorch network: tensors only, whatever else is in the file, and the same logits."""

import collections
import io
import pickle
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from harmonic.errors import UserError
from harmonic.perceptual.classifier import Classifier
from harmonic.perceptual.network import Sizes
from harmonic.perceptual.torch_weights import read_tensors

TINY = Sizes(stem=4, widths=(4, 8, 1_024), inner=(4, 8, 8), groups=2, blocks=1)
SMALL = Sizes(stem=6, widths=(8, 12, 1_024), inner=(8, 12, 16), groups=4, blocks=2)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(path):
    return Calls(eval, f"open({str(path)!r}, 'w').close()")


def as_zip(path, root):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(root, 2))
    return path


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"conv.weight": x}, lambda x: collections.OrderedDict(a=[x])])
@pytest.mark.parametrize("older", [False, True])
def test_a_file_that_calls_code_is_refused_and_does_not_run_it(tmp_path, wrap, older):
    path, proof = tmp_path / "weights.pth", tmp_path / "ran"
    root = wrap(evil(proof))
    if older:
        parts = (0x1950A86A20F9469CFC6C, 1_001, {"little_endian": True}, root, [])
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    else:
        as_zip(path, root)
    with pytest.raises(UserError, match=r"weights\.pth: .*calls (__builtin__|builtins)\.eval, which is code"):
        read_tensors(path)
    assert not proof.exists()


def test_names_alone_load_nothing_and_stand_for_nothing(tmp_path):
    as_zip(tmp_path / "names.pth", {"module": types.SimpleNamespace, "other": np.linalg.norm})
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "names.pth")


def test_a_file_that_refers_to_itself_ends(tmp_path):
    root = {}
    root.update(a=root, b=root)
    with pytest.raises(UserError, match="refers to itself"):
        read_tensors(as_zip(tmp_path / "circle.pth", root))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_of_something_else_is_refused(tmp_path, protocol):
    path = tmp_path / "other.pth"
    path.write_bytes(pickle.dumps({"weights": [1, 2]}, protocol))
    with pytest.raises(UserError, match=r"other\.pth.*(not one of PyTorch's|not a whole file)"):
        read_tensors(path)


def storage_pickle(size, shape, strides, offset=0):
    """data.pkl of one tensor over a storage of `size` floats, as torch.save writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", FloatStorage, "0", "cpu", size) if value is STORAGE else None

    STORAGE = object()
    module = types.ModuleType("torch")
    utils = types.ModuleType("torch._utils")
    FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def _rebuild_tensor_v2():
        raise AssertionError

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    module.FloatStorage, utils._rebuild_tensor_v2, module._utils = FloatStorage, _rebuild_tensor_v2, utils
    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "torch", module)
        patch.setitem(__import__("sys").modules, "torch._utils", utils)
        arguments = (STORAGE, offset, shape, strides, False, collections.OrderedDict())
        Pickler(out, 2).dump({"weight": Calls(_rebuild_tensor_v2, *arguments)})
    return out.getvalue()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "whole"),
    [
        ((2, 3), (3, 1), 0, True),
        ((3, 2), (1, 3), 0, True),
        ((2,), (1,), 4, True),
        ((), (), 5, True),
        ((0, 7), (1, 1), 0, True),
        ((2, 3), (3, 1), 1, False),
        ((6,), (2,), 0, False),
        ((2,), (-1,), 1, False),
        ((10**12,), (0,), 0, False),
        ((-1,), (1,), 0, False),
        ((2, 3), (1,), 0, False),
    ],
)
def test_tensors_are_views_that_stay_within_their_storage(tmp_path, shape, strides, offset, whole):
    path, values = tmp_path / "tensor.pth", np.arange(6, dtype="<f4")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", storage_pickle(6, shape, strides, offset))
        archive.writestr("archive/data/0", values.tobytes())
    if whole:
        expected = np.lib.stride_tricks.as_strided(values[offset:], shape, [4 * s for s in strides])
        np.testing.assert_array_equal(read_tensors(path)["weight"], expected)
    else:
        with pytest.raises(UserError, match="reaches beyond the numbers that the file holds"):
            read_tensors(path)


def test_a_damaged_file_is_refused(tmp_path, rng):
    path = tmp_path / "tensor.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", storage_pickle(6, (6,), (1,)))
        archive.writestr("archive/data/0", b"\0" * 20)
    with pytest.raises(UserError, match="not a whole file of PyTorch weights"):
        read_tensors(path)
    data = path.read_bytes()
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(len(data), size=3):
            broken[place] = rng.integers(256)
        path.write_bytes(bytes(broken[: rng.integers(len(data))]))
        with pytest.raises(UserError, match=r"tensor\.pth"):
            read_tensors(path)


def torch_network(torch, sizes, classes=10):
    """The published network, of any sizes, with random weights and statistics."""
    nn = torch.nn

    class ResNeXtBottleneck(nn.Module):
        def __init__(self, width_in, inner, width, stride):
            super().__init__()
            self.conv_reduce, self.bn_reduce = nn.Conv2d(width_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
            self.conv_conv = nn.Conv2d(inner, inner, 3, stride, 1, groups=sizes.groups, bias=False)
            self.bn = nn.BatchNorm2d(inner)
            self.conv_expand, self.bn_expand = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
            self.shortcut = nn.Sequential()
            if width_in != width:
                self.shortcut.add_module("shortcut_conv", nn.Conv2d(width_in, width, 1, stride, bias=False))
                self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(width))

        def forward(self, x):
            y = torch.relu(self.bn_reduce(self.conv_reduce(x)))
            y = self.bn_expand(self.conv_expand(torch.relu(self.bn(self.conv_conv(y)))))
            return torch.relu(self.shortcut(x) + y)

    class CifarResNeXt(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_1_3x3 = nn.Conv2d(1, sizes.stem, 3, 1, 1, bias=False)
            self.bn_1 = nn.BatchNorm2d(sizes.stem)
            width_in = sizes.stem
            for stage, (width, inner) in enumerate(zip(sizes.widths, sizes.inner, strict=True), 1):
                block = nn.Sequential()
                for number in range(sizes.blocks):
                    stride = 2 if stage > 1 and not number else 1
                    block.add_module(
                        f"stage_{stage}_bottleneck_{number}", ResNeXtBottleneck(width_in, inner, width, stride)
                    )
                    width_in = width
                setattr(self, f"stage_{stage}", block)
            self.classifier = nn.Linear(width_in, classes)

        def forward(self, x):
            x = torch.relu(self.bn_1(self.conv_1_3x3(x)))
            features = self.stage_3(self.stage_2(self.stage_1(x))).mean((2, 3))
            return features, self.classifier(features)

    for kind in (ResNeXtBottleneck, CifarResNeXt):  # so that a whole module can be pickled
        kind.__qualname__, globals()[kind.__name__] = kind.__name__, kind
    torch.manual_seed(0)
    network = CifarResNeXt()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return network.eval()


def test_a_pickled_module_gives_the_logits_that_pytorch_gave():
    """The file: torch.save(torch.nn.DataParallel(torch_network(torch, TINY).half()), path), with PyTorch 2.13.0; the
    figures: that network's, in float32."""
    classifier = Classifier.load(Path(__file__).with_name("resnext_module.pth"))
    assert classifier.sizes == TINY and classifier.classes[9] == "nine"
    images = -((np.arange(2 * 32 * 32) * 37) % 80).reshape(2, 32, 32).astype(np.float32)
    features, logits = classifier.of_images(images)
    np.testing.assert_allclose(features.sum(1), [2128.9209, 2098.1917], rtol=1e-5)
    expected = [
        [0.8056, 3.8015, -0.1813, 0.7056, -1.9999, -1.0361, 0.2377, -1.1215, 2.9775, 1.1311],
        [0.8093, 3.7551, -0.1821, 0.7083, -1.9054, -1.0709, 0.2234, -1.1063, 2.9526, 1.0985],
    ]
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def check_logits(torch, sizes, path, rng, clips):
    """A file in each form gives the network's own logits."""
    network = torch_network(torch, sizes)
    images = rng.uniform(-80, 0, (clips, 32, 32)).astype(np.float32)
    with torch.no_grad():
        features, logits = (x.numpy() for x in network(torch.from_numpy(images[:, None])))
    forms = {
        "state": network.state_dict(),
        "parallel": torch.nn.DataParallel(network).state_dict(),
        "checkpoint": {"epoch": 3, "state_dict": network.state_dict()},
        "module": torch.nn.DataParallel(network),
    }
    for form, saved in forms.items():
        for older in (False, True):
            torch.save(saved, path, _use_new_zipfile_serialization=not older)
            classifier = Classifier.load(path)
            assert classifier.sizes == sizes, form
            if form == "state" and not older:
                ours = classifier.of_images(images)
                scale = abs(logits).max()
                np.testing.assert_allclose(ours[0], features, atol=1e-4 * abs(features).max(), rtol=1e-4)
                np.testing.assert_allclose(ours[1], logits, atol=1e-4 * scale, rtol=1e-4)
                first = classifier.fingerprint
            assert classifier.fingerprint == first, form


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_published_weights_give_the_same_logits(tmp_path, rng):
    check_logits(pytest.importorskip("torch"), SMALL, tmp_path / "resnext.pth", rng, 5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_published_weights_of_the_published_size(tmp_path, rng):
    check_logits(pytest.importorskip("torch"), Sizes(), tmp_path / "resnext.pth", rng, 4)


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(3, 4), path)
    with pytest.raises(UserError, match=r"other\.pth is of another architecture: it has no 'conv_1_3x3.weight'"):
        Classifier.load(path)
    torch.save(torch_network(torch, SMALL, classes=35).state_dict(), path)
    with pytest.raises(UserError, match="tells 35 classes apart, not the ten digits"):
        Classifier.load(path)
    state = torch_network(torch, SMALL).state_dict()
    torch.save({**state, "extra.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"of another architecture: an unknown extra\.weight"):
        Classifier.load(path)
    torch.save({k: v for k, v in state.items() if k != "stage_2.stage_2_bottleneck_1.bn.weight"}, path)
    with pytest.raises(UserError, match=r"of another architecture: no stage_2\.stage_2_bottleneck_1\.bn\.weight"):
        Classifier.load(path)
    torch.save({**state, "bn_1.weight": torch.zeros(7)}, path)
    with pytest.raises(UserError, match=r"of another architecture: bn_1\.scale is \(7,\), not \(6,\)"):
        Classifier.load(path)
