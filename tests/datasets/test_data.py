"""Data sets (digits, MNIST files, image folders), the held-out split, and the batches of an epoch."""
import gzip
import hashlib
import io
import os
import struct
import sys
import threading
import time
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from harness.datasets.batches import (
    Dataset,
    batch_places,
    fetched_ahead,
    first_examples,
    load_dataset,
    random_crop,
    to_unit,
    training_batches,
)
from harness.datasets.split import Split
from harness.errors import UserError


def refusal(function, *args, **kwargs):
    """The one line with which something is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name))
               for name in ("images", "labels", "index"))


# Digits

@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "nowhere")


def test_digits_are_1437_training_and_360_test_images_of_28x28_in_ten_classes(digits):
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1437, 0, 360)
    assert (digits.image_shape == (1, 28, 28) and digits.num_classes == 10
            and digits.classes == tuple("0123456789"))
    assert digits.train.images.dtype == torch.uint8 and digits.train.labels.dtype == torch.int64
    assert digits.train.images.min() == 0 and digits.train.images.max() == 255


def test_digits_are_stratified(digits):
    train, test = (torch.bincount(split.labels, minlength=10) for split in (digits.train, digits.test))
    assert ((test - (train + test) * 360 / 1797).abs() < 1).all()


def test_digits_are_the_same_at_every_call_and_no_image_is_in_both_splits(digits):
    again = load_dataset("digits", "nowhere")
    assert same(digits.train, again.train) and same(digits.test, again.test)
    train, test = ({image.numpy().tobytes() for image in split.images}
                   for split in (digits.train, digits.test))
    assert not train & test


def test_digits_have_the_labels_of_their_images(digits):
    means = torch.stack([digits.train.images[digits.train.labels == k].float().mean(0) for k in range(10)])
    nearest = torch.cdist(digits.test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == digits.test.labels).double().mean() > 0.85


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install" in refusal(load_dataset, "digits", "nowhere")


# The held-out split

def test_the_held_out_images_are_apart_from_the_training_images(digits):
    held = load_dataset("digits", "nowhere", val_size=137)
    assert (len(held.train), len(held.val)) == (1300, 137)
    assert sorted(torch.cat([held.train.index, held.val.index]).tolist()) == list(range(1437))
    assert same(held.test, digits.test)


def test_the_index_is_the_place_in_the_whole_training_set(digits):
    held = load_dataset("digits", "nowhere", val_size=137)
    for split in (held.train, held.val):
        assert (torch.equal(digits.train.images[split.index], split.images)
                and torch.equal(digits.train.labels[split.index], split.labels))


def test_the_held_out_images_are_the_same_at_every_call_whatever_the_seed():
    torch.manual_seed(1)
    first = load_dataset("digits", "nowhere", val_size=50)
    torch.manual_seed(2)
    second = load_dataset("digits", "nowhere", val_size=50)
    assert same(first.val, second.val) and not torch.equal(first.val.index, torch.arange(50))


@pytest.mark.parametrize("val_size", (1437, 5000))
def test_holding_out_everything_is_refused(val_size):
    assert f"--val_size {val_size}" in refusal(load_dataset, "digits", "nowhere", val_size)


def test_the_first_examples_are_the_first_and_no_more_than_there_are(digits):
    assert (same(first_examples(digits.test, 7), digits.test[:7])
            and first_examples(digits.test, None) is digits.test)
    assert "361" in refusal(first_examples, digits.test, 361)


def test_an_unknown_data_set_is_refused_with_the_known_ones_and_the_places_looked_at(tmp_path):
    message = refusal(load_dataset, "minst", str(tmp_path))
    for part in ("'minst'", "mnist, cifar10, cifar100, svhn, tiny-imagenet, digits", str(tmp_path / "minst")):
        assert part in message


@pytest.mark.parametrize("channels", (1, 3))
def test_channel_statistics_are_numpys_in_units_of_0_to_1(channels):
    images = np.random.default_rng(0).integers(0, 200, (20, channels, 5, 4), dtype=np.uint8)
    split = Split(torch.from_numpy(images), torch.zeros(20, dtype=torch.int64), torch.arange(20))
    mean, std = Dataset("any", ("a",), split, split[:0], split[:3]).channel_statistics()
    assert mean == pytest.approx((images / 255).mean(axis=(0, 2, 3)), rel=1e-10)
    assert std == pytest.approx((images / 255).std(axis=(0, 2, 3)), rel=1e-8)


def test_the_standard_deviation_of_a_constant_channel_can_be_divided_by():
    split = Split(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64),
                  torch.arange(4))
    assert (Dataset("any", ("a",), split, split[:0], split).channel_statistics()
            == ([pytest.approx(7 / 255)], [1e-3]))


# MNIST

def idx(array):
    """An array of bytes in MNIST's file format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files():
    """Tiny files under the names of MNIST's, and what is in them."""
    rng, files, arrays = np.random.default_rng(3), {}, {}
    for split, count in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[split] = images, rng.integers(0, 10, count, dtype=np.uint8)
        files[f"{split}-images-idx3-ubyte"], files[f"{split}-labels-idx1-ubyte"] = map(idx, arrays[split])
    return files, arrays


def write_mnist(folder, **damaged):
    """MNIST's files where torchvision lays them out, those named in `damaged` with those contents."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, contents in mnist_files()[0].items():
        (raw / name).write_bytes(damaged.get(name.replace("-", "_"), contents))


def assert_is_tiny_mnist(data):
    assert data.image_shape == (1, 28, 28) and data.num_classes == 10
    for split, (images, labels) in zip((data.train, data.test), mnist_files()[1].values()):
        assert np.array_equal(split.images.squeeze(1), images) and np.array_equal(split.labels, labels)


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


def test_mnist_is_read_from_its_files(tmp_path, no_network):
    write_mnist(tmp_path)
    assert_is_tiny_mnist(load_dataset("mnist", str(tmp_path)))


@pytest.mark.parametrize(("name", "folder"), (("mnist", "MNIST"), ("cifar10", "CIFAR10")))
def test_a_missing_data_set_without_a_network_says_where_it_was_looked_for_and_what_to_do(
        tmp_path, no_network, name, folder):
    message = refusal(load_dataset, name, str(tmp_path / "data"))
    for part in (folder, str(tmp_path / "data"), "--data_dir", "--dataset digits"):
        assert part in message


def test_a_download_that_fails_gives_its_reason(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", failing)
    assert "File not found or corrupted" in refusal(load_dataset, "mnist", str(tmp_path))


def test_a_data_folder_that_cannot_be_made_is_refused(tmp_path, no_network):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(load_dataset, "mnist", str(tmp_path / "file" / "data"))


def mirror(folder, monkeypatch, damage=lambda packed: packed):
    """A folder as torchvision's mirror of MNIST, each file damaged after its checksum was taken."""
    folder.mkdir()
    resources = []
    for name, contents in mnist_files()[0].items():
        packed = gzip.compress(contents)
        (folder / f"{name}.gz").write_bytes(damage(packed))
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    fetch = urllib.request.urlopen

    def with_length(request):  # torchvision reads the length of a response, which one from a file lacks
        response = fetch(request)
        response.length = None
        return response

    monkeypatch.setattr(urllib.request, "urlopen", with_length)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{folder.as_uri()}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)


def test_mnist_is_downloaded_where_it_is_missing_and_only_once(tmp_path, monkeypatch, capsys):
    mirror(tmp_path / "mirror", monkeypatch)
    assert_is_tiny_mnist(load_dataset("mnist", str(tmp_path / "data")))
    assert "downloading" in capsys.readouterr().out
    for file in (tmp_path / "mirror").iterdir():
        file.unlink()
    assert_is_tiny_mnist(load_dataset("mnist", str(tmp_path / "data")))
    assert "downloading" not in capsys.readouterr().out


def test_a_download_that_arrives_damaged_is_refused(tmp_path, monkeypatch):
    mirror(tmp_path / "mirror", monkeypatch, damage=lambda packed: packed[:-20])
    assert str(tmp_path / "data") in refusal(load_dataset, "mnist", str(tmp_path / "data"))


def test_a_download_goes_on_after_one_that_was_cut_off(tmp_path, monkeypatch):
    mirror(tmp_path / "mirror", monkeypatch)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    whole = (tmp_path / "mirror" / "train-images-idx3-ubyte.gz").read_bytes()
    (raw / "train-images-idx3-ubyte.gz").write_bytes(whole[:100])
    assert_is_tiny_mnist(load_dataset("mnist", str(tmp_path / "data")))


@pytest.mark.parametrize("contents",
                         (b"", b"\x00\x00", idx(np.zeros((12, 28, 28), np.uint8))[:-100],
                          b"<html>not found</html>"),
                         ids=("empty", "two bytes", "cut off", "web page"))
def test_a_damaged_mnist_file_is_refused_in_one_line(tmp_path, no_network, contents):
    write_mnist(tmp_path, train_images_idx3_ubyte=contents)
    assert str(tmp_path) in refusal(load_dataset, "mnist", str(tmp_path))


# Image folders

COUNTS = {"train": {"cat": 2, "dog": 3}, "test": {"cat": 1, "dog": 2}}


def make_folder(folder, counts=None, mode="RGB", size=(6, 4)):
    """A folder of noise images whose class shows in their brightness."""
    rng = np.random.default_rng(0)
    for split, classes in (counts or COUNTS).items():
        for label, (name, count) in enumerate(classes.items()):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(100 * label, 100 * label + 100, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / split / name / f"{k}.png")
    return folder


@pytest.mark.parametrize(("mode", "channels"), (("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3)))
def test_grey_images_have_one_channel_and_all_others_three(tmp_path, mode, channels):
    assert (load_dataset(str(make_folder(tmp_path / "pets", mode=mode)), "nowhere").image_shape
            == (channels, 4, 6))


def test_images_of_a_folder_have_their_pixels_and_the_labels_of_their_classes(tmp_path):
    data = load_dataset(str(make_folder(tmp_path / "pets")), "nowhere")
    assert data.classes == ("cat", "dog") and data.num_classes == 2
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test.labels[data.test.index.argsort()].tolist() == [0, 1, 1]
    assert torch.equal(data.train.images.float().mean((1, 2, 3)) > 100, data.train.labels == 1)
    first = np.asarray(Image.open(tmp_path / "pets" / "train" / "dog" / "0.png"))
    assert np.array_equal(data.train.images[2].permute(1, 2, 0), first)


def test_one_coloured_image_gives_the_whole_set_three_channels(tmp_path):
    make_folder(tmp_path / "pets", mode="L")
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "pets" / "train" / "cat" / "0.png")
    assert load_dataset("pets", str(tmp_path)).image_shape == (3, 4, 6)


def test_a_folder_is_found_by_its_path_and_by_its_name_in_the_data_folder(tmp_path):
    make_folder(tmp_path / "pets")
    assert same(load_dataset(str(tmp_path / "pets"), "nowhere").train,
                load_dataset("pets", str(tmp_path)).train)


def test_files_that_are_not_called_images_are_left_alone(tmp_path):
    make_folder(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("text")
    assert len(load_dataset("pets", str(tmp_path)).train) == 5


@pytest.fixture
def decoded(monkeypatch):
    """The image files opened so far."""
    paths, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: paths.append(path) or opened(path))
    return paths


def test_the_second_load_decodes_nothing(tmp_path, decoded):
    first = load_dataset(str(make_folder(tmp_path / "pets")), "nowhere")
    assert len(decoded) == 8
    second = load_dataset(str(tmp_path / "pets"), "nowhere")
    assert len(decoded) == 8 and same(first.train, second.train) and same(first.test, second.test)
    assert second.classes == first.classes


def test_a_changed_file_is_decoded_again(tmp_path):
    changed = make_folder(tmp_path / "pets") / "train" / "cat" / "1.bmp"
    for second, value in enumerate((7, 9)):
        Image.new("RGB", (6, 4), (value,) * 3).save(changed)  # of one size in bytes
        os.utime(changed, (second, second))
        assert (load_dataset("pets", str(tmp_path)).train.images[1] == value).all()


def test_a_new_file_is_decoded_too(tmp_path):
    load_dataset(str(make_folder(tmp_path / "pets")), "nowhere")
    Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "pets" / "test" / "cat" / "new.png")
    data = load_dataset(str(tmp_path / "pets"), "nowhere")
    assert data.test.labels.tolist() == [0, 0, 1, 1] and (data.test.images[1] == 9).all()


@pytest.mark.parametrize("damage",
                         (lambda b: b"", lambda b: b[:10], lambda b: b[:len(b) // 2], lambda b: b[:-1],
                          lambda b: b"text" * 50),
                         ids=("empty", "ten bytes", "half", "all but one byte", "text"))
def test_a_damaged_cache_is_made_anew(tmp_path, decoded, damage):
    first = load_dataset(str(make_folder(tmp_path / "pets")), "nowhere")
    cache, = (tmp_path / "pets").glob("cache-*.npz")
    cache.write_bytes(damage(cache.read_bytes()))
    assert same(load_dataset(str(tmp_path / "pets"), "nowhere").train, first.train) and len(decoded) == 16
    assert same(load_dataset(str(tmp_path / "pets"), "nowhere").train, first.train) and len(decoded) == 16


def test_a_folder_that_cannot_be_written_to_is_decoded_every_time(tmp_path, decoded, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(np, "savez", full)
    make_folder(tmp_path / "pets")
    for count in (8, 16):
        assert len(load_dataset("pets", str(tmp_path)).train) == 5 and len(decoded) == count
    assert {path.name for path in (tmp_path / "pets").iterdir()} == {"train", "test"}


@pytest.mark.parametrize(("counts", "part"), (
    ({"train": COUNTS["train"]}, "test/CLASS"), ({"test": COUNTS["test"]}, "train/CLASS"),
    ({"train": {"cat": 0}, "test": {"cat": 1}}, "train/cat"),
    ({"train": {"cat": 1, "dog": 1}, "test": {"cat": 1}}, "dog"),
    ({"train": {"cat": 1}, "test": {"cat": 1, "emu": 1}}, "emu")))
def test_a_missing_split_and_unequal_classes_are_refused_by_name(tmp_path, counts, part):
    message = refusal(load_dataset, str(make_folder(tmp_path / "pets", counts)), "nowhere")
    assert str(tmp_path / "pets") in message and part in message


@pytest.mark.parametrize("split", ("train", "test"))
def test_an_image_of_another_size_is_refused_by_name_and_size(tmp_path, split):
    make_folder(tmp_path / "pets")
    Image.new("RGB", (5, 8)).save(tmp_path / "pets" / split / "dog" / "1.png")
    message = refusal(load_dataset, "pets", str(tmp_path))
    assert (str(tmp_path / "pets" / split / "dog" / "1.png") in message and "5x8" in message
            and "6x4" in message)


def test_splits_of_different_sizes_are_refused(tmp_path):
    make_folder(tmp_path / "pets", {"train": {"cat": 2}})
    make_folder(tmp_path / "pets", {"test": {"cat": 2}}, size=(9, 4))
    assert "(4, 6, 3)" in refusal(load_dataset, "pets", str(tmp_path))


def png():
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 100, 50)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("name", "contents"), (
    ("x.png", b""), ("x.png", b"text"), ("x.jpg", b"<html></html>"), ("x.png", png()[:-30]),
    ("x.png", png()[:20]), ("x.ppm", b"P6 6 4 25x " + bytes(72))
), ids=("empty", "text", "web page", "cut off", "no header", "damaged header"))
def test_a_file_that_is_no_whole_image_is_refused_by_name(tmp_path, name, contents):
    make_folder(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "cat" / name).write_bytes(contents)
    assert str(tmp_path / "pets" / "train" / "cat" / name) in refusal(load_dataset, "pets", str(tmp_path))


# Batches

def split_of(count, shape=(1, 6, 5)):
    """Noise images whose index is not their row."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 3, 100 + 2 * torch.arange(count))


def epoch_of(split, batch_size=4, seed=1, epoch=1, **options):
    return list(training_batches(split, batch_size, seed, epoch, **options))


def order_of(batches):
    return torch.cat([index for _, _, index, _ in batches]).tolist()


def by_index(batches):
    return {int(i): image for x, _, index, _ in batches for i, image in zip(index, x)}


AUGMENTED = {"crop_padding": 2, "padding_mode": "reflect", "flip": True}


@pytest.mark.parametrize("batch_size", (1, 4, 10, 11, 64))
def test_an_epoch_has_every_example_exactly_once(batch_size):
    split = split_of(11)
    batches = epoch_of(split, batch_size)
    assert sorted(order_of(batches)) == split.index.tolist()
    assert [len(x) for x, *_ in batches] == [size for _, size in batch_places(11, batch_size)]


def test_a_batch_holds_the_images_in_0_to_1_with_their_labels():
    split = split_of(11, (3, 6, 5))
    for x, y, index, share in epoch_of(split):
        rows = (index - 100) // 2
        assert x.dtype == torch.float32 and share == 1
        assert torch.equal(x, split.images[rows] / 255) and torch.equal(y, split.labels[rows])


def test_the_order_and_the_augmentation_follow_from_seed_and_epoch_alone():
    torch.manual_seed(0)
    first = epoch_of(split_of(30), **AUGMENTED)
    torch.manual_seed(1)
    second = epoch_of(split_of(30), **AUGMENTED)
    assert order_of(first) == order_of(second) and all(torch.equal(a[0], b[0]) for a, b in zip(first, second))


@pytest.mark.parametrize("other", ({"epoch": 2}, {"seed": 2}, {"seed": 0, "epoch": 2}))
def test_the_order_and_the_augmentation_differ_by_epoch_and_seed(other):
    first, second = epoch_of(split_of(30), **AUGMENTED), epoch_of(split_of(30), **AUGMENTED, **other)
    assert order_of(first) != order_of(second)
    left, right = by_index(first), by_index(second)
    assert sum(torch.equal(left[i], right[i]) for i in left) < 10


def test_the_augmentation_of_an_example_does_not_depend_on_the_batch_size():
    left = by_index(epoch_of(split_of(30), 4, **AUGMENTED))
    right = by_index(epoch_of(split_of(30), 7, **AUGMENTED))
    assert all(torch.equal(left[i], right[i]) for i in left) and len(left) == 30


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("count", (12, 10, 11))
def test_the_shares_of_all_processes_make_up_the_batches_of_one(count, world_size):
    whole = epoch_of(split_of(count), 4, **AUGMENTED)
    parts = [epoch_of(split_of(count), 4, **AUGMENTED, rank=rank, world_size=world_size)
             for rank in range(world_size)]
    # one with fewer examples than processes is left out
    kept = [batch for batch in whole if len(batch[0]) >= world_size]
    assert {len(part) for part in parts} == {len(kept)}
    for (x, y, index, _), *shares in zip(kept, *parts):
        order = torch.cat([share[2] for share in shares]).argsort()
        for together, alone in zip(range(3), (x, y, index)):
            assert torch.equal(torch.cat([share[together] for share in shares])[order],
                               alone[index.argsort()])
        mean = sum(share * images.sum((1, 2, 3)).mean() for images, _, _, share in shares) / world_size
        # the mean over processes is that over the batch
        assert mean == pytest.approx(float(x.sum((1, 2, 3)).mean()), rel=1e-5)
        assert sum(share[3] for share in shares) == pytest.approx(world_size)


def test_an_uneven_batch_gives_the_processes_uneven_shares():
    shares = [epoch_of(split_of(7), 7, rank=rank, world_size=2)[0][3] for rank in (0, 1)]
    assert shares == [8 / 7, 6 / 7]


@pytest.mark.parametrize(("padding", "padding_mode"),
                         ((1, "constant"), (2, "reflect"), (3, "constant"), (4, "reflect")))
def test_a_random_crop_is_that_of_a_loop_over_padded_images(padding, padding_mode):
    rng = np.random.default_rng(0)
    x = rng.random((20, 3, 6, 7), dtype=np.float32)
    top, left = rng.integers(0, 2 * padding + 1, (2, 20))
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), padding_mode)
    expected = np.stack([image[:, row:row + 6, column:column + 7]
                         for image, row, column in zip(padded, top, left)])
    found = random_crop(torch.from_numpy(x), padding, padding_mode, torch.from_numpy(top),
                        torch.from_numpy(left))
    assert np.array_equal(found, expected)


def test_crops_reach_every_place_and_nothing_else():
    image = torch.arange(1, 31, dtype=torch.uint8).view(1, 1, 5, 6)
    split = Split(image.expand(400, 1, 5, 6), torch.zeros(400, dtype=torch.int64), torch.arange(400))
    x, *_ = epoch_of(split, 400, crop_padding=1)[0]
    padded = np.pad(image[0, 0], 1)
    places = {(padded[row:row + 5, column:column + 6] / np.float32(255)).tobytes()
              for row in range(3) for column in range(3)}
    assert {crop.numpy().tobytes() for crop in x} == places


def test_about_half_of_the_images_are_flipped_left_to_right():
    split = split_of(400, (2, 3, 4))
    x, _, index, _ = epoch_of(split, 400, flip=True)[0]
    original = to_unit(split.images[(index - 100) // 2])
    flipped = (x == original.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped, ~(x == original).flatten(1).all(1)) and 150 < int(flipped.sum()) < 250


def test_to_unit_maps_0_and_255_to_0_and_1():
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0.0, pytest.approx(0.2), 1.0]


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [
    (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (129, 128, [129]), (143, 128, [143]), (144, 128, [128, 16]),
    (1, 4, [1]), (3, 1, [1, 1, 1]), (59_000, 128, [128] * 460 + [120])])
def test_a_leftover_that_batchnorm_could_not_use_joins_the_batch_before(count, batch_size, sizes):
    places = batch_places(count, batch_size)
    assert [size for _, size in places] == sizes and sum(sizes) == count
    assert [first for first, _ in places] == [sum(sizes[:k]) for k in range(len(sizes))]
    if count < 200:
        batches = epoch_of(split_of(count), batch_size)
        assert [len(batch[1]) for batch in batches] == sizes
        assert sorted(order_of(batches)) == split_of(count).index.tolist()


def test_generated_images_are_read_one_batch_ahead_of_their_use(digits):
    read = []

    class Extra:
        def __getitem__(self, rows):
            read.append((rows.tolist(), threading.current_thread().name))
            return digits.train[rows]

    batches = fetched_ahead(Extra(), torch.arange(12).split(3), torch.device("cpu"))
    for number, rows in enumerate(torch.arange(12).split(3)):
        assert same(next(batches), digits.train[rows])
        while len(read) < min(number + 2, 4):  # the next one comes without being asked for
            time.sleep(0.001)
    assert [rows for rows, _ in read] == torch.arange(12).view(4, 3).tolist()
    assert all(name != threading.current_thread().name for _, name in read)
    assert next(batches, None) is None
