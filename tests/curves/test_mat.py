"""MATLAB networks and image sets: the documented layout against float64 numpy, and what is refused."""
import numpy as np
import pytest
import torch
from scipy.io import savemat

from curves import mat
from harness.errors import UserError


def cnn_arrays(side=28, channels=1, classes=10, seed=0):
    random = np.random.default_rng(seed)
    shapes = {"weights_conv1": (4, 4, channels, 16), "biases_conv1": (1, 16),
              "weights_conv2": (4, 4, 16, 32), "biases_conv2": (1, 32),
              "weights_fc1": ((side // 4) ** 2 * 32, 100), "biases_fc1": (1, 100),
              "weights_fc2": (100, classes), "biases_fc2": (1, classes)}
    return {name: (random.normal(size=shape) * 0.1).astype(np.float32) for name, shape in shapes.items()}


def fc1_arrays(pixels=784, classes=10, hidden=20):
    random = np.random.default_rng(1)
    shapes = {"U": (pixels, hidden), "bU": (1, hidden), "W": (hidden, classes), "bW": (1, classes)}
    return {name: (random.normal(size=shape) * 0.1).astype(np.float32) for name, shape in shapes.items()}


def same_convolution(x, kernel, bias):
    """x [N, H, W, C], kernel [4, 4, C, O]: stride 2, TensorFlow's SAME padding, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n, height, width, _ = x.shape
    out = np.zeros((n, height // 2, width // 2, kernel.shape[3]))
    for i in range(height // 2):
        for j in range(width // 2):
            out[:, i, j] = np.tensordot(padded[:, 2 * i:2 * i + 4, 2 * j:2 * j + 4],
                                        kernel.astype(np.float64), 3) + bias.ravel()
    return out


def reference(arrays, x):
    """Logits in float64 of images [N, H, W, C], by the documented layout."""
    wide = {name: value.astype(np.float64) for name, value in arrays.items()}
    if "U" in wide:
        return np.maximum(x.reshape(len(x), -1) @ wide["U"] + wide["bU"], 0) @ wide["W"] + wide["bW"]
    for layer in ("conv1", "conv2"):
        x = np.maximum(same_convolution(x, wide[f"weights_{layer}"], wide[f"biases_{layer}"]), 0)
    hidden = np.maximum(x.reshape(len(x), -1) @ wide["weights_fc1"] + wide["biases_fc1"], 0)
    return hidden @ wide["weights_fc2"] + wide["biases_fc2"]


def logits(path, x):
    model, _ = mat.load_network(path)
    with torch.no_grad():
        return model.double()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize(("arrays", "shape", "kind"), [
    (cnn_arrays(), (28, 28, 1), "cnn"),
    (cnn_arrays(32, 3, 43), (32, 32, 3), "cnn"), (cnn_arrays(8, 3, 4), (8, 8, 3), "cnn"),
    (fc1_arrays(), (28, 28, 1), "fc1"), (fc1_arrays(3 * 16 * 16), (16, 16, 3), "fc1")])
def test_logits_are_those_of_the_documented_layout(tmp_path, arrays, shape, kind):
    savemat(tmp_path / "net.mat", arrays)
    x = np.random.default_rng(2).uniform(size=(5, *shape))
    assert mat.load_network(tmp_path / "net.mat")[1] == kind
    assert np.abs(logits(tmp_path / "net.mat", x) - reference(arrays, x)).max() < 1e-10


@pytest.mark.parametrize("spoil", [
    lambda a: a | {"weights_conv1": a["weights_conv1"].transpose(1, 0, 2, 3)},
    lambda a: a | {"weights_fc1": a["weights_fc1"].reshape(7, 7, 32, 100).transpose(2, 0, 1, 3)
                                                  .reshape(1568, 100)}])
def test_the_logits_tell_a_transposed_kernel_and_permuted_features(tmp_path, spoil):
    savemat(tmp_path / "net.mat", spoil(cnn_arrays()))
    x = np.random.default_rng(2).uniform(size=(5, 28, 28, 1))
    assert np.abs(logits(tmp_path / "net.mat", x) - reference(cnn_arrays(), x)).max() > 1e-2


def test_a_compressed_file_is_a_network_in_eval_mode(tmp_path):
    savemat(tmp_path / "net.mat", cnn_arrays(), do_compression=True)
    model, _ = mat.load_network(tmp_path / "net.mat")
    assert (model(torch.zeros(2, 1, 28, 28)).shape == (2, 10) and not model.training
            and next(model.parameters()).dtype == torch.float32)


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


@pytest.mark.parametrize(("arrays", "message"), [
    (without(cnn_arrays(), "biases_fc1"), "lacks biases_fc1"),
    (without(fc1_arrays(), "bW"), "lacks bW"),
    (cnn_arrays() | {"weights_conv2": np.zeros((4, 4, 32, 16), np.float32)},
     r"weights_conv2 has the shape \(4, 4, 32, 16\)"),
    (cnn_arrays() | {"weights_fc1": np.zeros((1500, 100), np.float32)}, "weights_fc1 has the shape"),
    (cnn_arrays() | {"weights_conv1": np.zeros((4, 16), np.float32)}, "weights_conv1 has the shape"),
    (fc1_arrays() | {"U": np.zeros((783, 20), np.float32)}, "U has the shape"),
    (cnn_arrays() | {"biases_fc2": np.full((1, 10), np.nan, np.float32)}, "no array of finite numbers"),
    (cnn_arrays() | {"biases_fc2": np.array(["x"] * 10, dtype=object)}, "no array of finite numbers"),
    ({"weights": np.zeros(3)}, "has the keys weights")])
def test_other_keys_and_shapes_are_refused_in_one_line(tmp_path, arrays, message):
    savemat(tmp_path / "net.mat", arrays)
    with pytest.raises(UserError, match=message) as refused:
        mat.load_network(tmp_path / "net.mat")
    assert "\n" not in str(refused.value)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "net.mat"
    with pytest.raises(UserError, match="there is no file"):
        mat.load_network(path)
    savemat(path, cnn_arrays(), do_compression=True)
    whole = path.read_bytes()
    for content, message in ((whole[:5000], "damaged|cut off"), (whole[:60], "damaged or cut off"),
                             (b"", "no MATLAB 5 file"),
                             (b"<html>", "no MATLAB 5 file"), (b"MATLAB 7.3 MAT-file" + bytes(200), "HDF5"),
                             (whole[:200] + b"\x00" * 50 + whole[250:], "damaged|cut off")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            mat.load_network(path)


def test_an_image_set_is_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    savemat(tmp_path / "set.mat", {"images": images, "labels": np.arange(6, dtype=np.uint8)[None]})
    split = mat.read_images(tmp_path / "set.mat")
    assert (torch.equal(split.images, torch.from_numpy(images).permute(0, 3, 1, 2))
            and split.labels.tolist() == list(range(6)))
    for spoiled, message in (({"images": images}, "lacks"),
                             ({"images": images / 255, "labels": np.arange(6)}, "not uint8"),
                             ({"images": images, "labels": np.arange(5)}, "not integers")):
        savemat(tmp_path / "set.mat", spoiled)
        with pytest.raises(UserError, match=message):
            mat.read_images(tmp_path / "set.mat")
