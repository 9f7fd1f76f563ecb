"""CIFAR-100, SVHN and Tiny ImageNet from small archives laid out as the official ones,
files of generated images, and mixed batches."""
import functools
import hashlib
import io
import os
import pickle
import sys
import tarfile
import threading
import tracemalloc
import urllib.request
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from harness.datasets import generated, tiny_imagenet
from harness.datasets.batches import load_dataset, training_batches
from harness.datasets.generated import Extra, load_extra
from harness.datasets.split import Split
from harness.errors import UserError

RNG = np.random.default_rng(5)


def refusal(function, *args, **kwargs):
    """The one line with which something is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name))
               for name in ("images", "labels", "index"))


def md5(contents):
    return hashlib.md5(contents).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, folder, paths asked for) of a web server in this process;
    a file under cut/ breaks off half way."""
    folder, asked = tmp_path / "server", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            if not self.path.startswith("/cut/"):
                return super().do_GET()
            contents = (folder / Path(self.path).name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            self.wfile.write(contents[:len(contents) // 2])

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder, asked
        running.shutdown()
        thread.join()


# CIFAR-100

CIFAR = {split: (RNG.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), RNG.integers(0, 100, count))
         for split, count in (("train", 9), ("test", 4))}
NAMES = [f"name {k}" for k in range(100)]


def cifar100_files():
    files = {split: pickle.dumps({"data": images.reshape(-1, 3072), "fine_labels": labels.tolist(),
                                  "coarse_labels": [0] * len(labels)})
             for split, (images, labels) in CIFAR.items()}
    return files | {"meta": pickle.dumps({"fine_label_names": NAMES, "coarse_label_names": ["all"]})}


@pytest.fixture
def cifar100(monkeypatch):
    """Tiny files in place of CIFAR-100's, whose checksums torchvision expects."""
    files, cls = cifar100_files(), torchvision.datasets.CIFAR100
    for split in ("train", "test"):
        monkeypatch.setattr(cls, f"{split}_list", [[split, md5(files[split])]])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(files["meta"])})
    return files


def write_cifar100(folder, files):
    (folder / "cifar-100-python").mkdir(parents=True)
    for name, contents in files.items():
        (folder / "cifar-100-python" / name).write_bytes(contents)


def assert_is_tiny_cifar100(data):
    assert data.classes == tuple(NAMES) and data.image_shape == (3, 32, 32) and data.extra is None
    for split, (images, labels) in zip((data.train, data.test), CIFAR.values()):
        assert np.array_equal(split.images, images) and np.array_equal(split.labels, labels)


def test_cifar100_has_its_100_fine_classes(tmp_path, cifar100, no_network):
    write_cifar100(tmp_path, cifar100)
    assert_is_tiny_cifar100(load_dataset("cifar100", str(tmp_path)))


def test_a_damaged_cifar100_file_is_refused_in_one_line(tmp_path, cifar100, no_network):
    write_cifar100(tmp_path, cifar100 | {"train": cifar100["train"][:-1] + b"x"})
    message = refusal(load_dataset, "cifar100", str(tmp_path))
    assert "CIFAR100" in message and str(tmp_path) in message and "no network" in message


def test_cifar100_is_downloaded_where_it_is_missing(tmp_path, cifar100, server, monkeypatch):
    address, folder, asked = server
    write_cifar100(tmp_path / "packed", cifar100)
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "packed" / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", f"{address}/cifar-100-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5",
                        md5((folder / "cifar-100-python.tar.gz").read_bytes()))
    assert_is_tiny_cifar100(load_dataset("cifar100", str(tmp_path / "data")))
    assert set(asked) == {"/cifar-100-python.tar.gz"}
    asked.clear()
    assert_is_tiny_cifar100(load_dataset("cifar100", str(tmp_path / "data")))
    assert not asked


# SVHN

SVHN = {split: (RNG.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) % 10)
        for split, count in (("train", 12), ("test", 11))}


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """A folder with tiny files in place of SVHN's, whose checksums torchvision expects;
    digit 0 has the label 10 there."""
    split_list, folder = {}, tmp_path / "svhn"
    folder.mkdir()
    for split, (images, labels) in SVHN.items():
        file = folder / f"{split}_32x32.mat"
        scipy.io.savemat(file, {"X": images.transpose(2, 3, 1, 0),
                                "y": np.where(labels, labels, 10).astype(np.uint8)[:, None]})
        split_list[split] = [f"http://127.0.0.1/{file.name}", file.name, md5(file.read_bytes())]
    split_list["extra"] = ["http://127.0.0.1/extra_32x32.mat", "extra_32x32.mat", "0" * 32]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)
    return folder


def test_svhn_has_its_digits_as_labels_and_no_extra_part(svhn, no_network):
    data = load_dataset("svhn", str(svhn))
    assert data.classes == tuple("0123456789") and data.image_shape == (3, 32, 32)
    for split, (images, labels) in zip((data.train, data.test), SVHN.values()):
        assert (np.array_equal(split.images, images) and np.array_equal(split.labels, labels)
                and split.images.is_contiguous())


@pytest.mark.parametrize("name", ("train_32x32.mat", "test_32x32.mat"))
@pytest.mark.parametrize("damage", (None, lambda contents: contents[:-1] + bytes([contents[-1] ^ 1])),
                         ids=("missing", "damaged"))
def test_a_missing_or_damaged_svhn_file_is_refused_in_one_line(svhn, no_network, name, damage):
    contents = (svhn / name).read_bytes()
    (svhn / name).unlink()
    if damage:
        (svhn / name).write_bytes(damage(contents))
    message = refusal(load_dataset, "svhn", str(svhn))
    assert "SVHN" in message and str(svhn) in message and "--data_dir" in message


def test_svhn_is_downloaded_where_it_is_missing(tmp_path, svhn, server, monkeypatch):
    address, folder, asked = server
    for split, entry in torchvision.datasets.SVHN.split_list.items():
        monkeypatch.setitem(torchvision.datasets.SVHN.split_list, split,
                            [f"{address}/{entry[1]}", *entry[1:]])
    for file in svhn.iterdir():
        file.rename(folder / file.name)
    data = load_dataset("svhn", str(tmp_path / "data"))
    assert ((len(data.train), len(data.test)) == (12, 11)
            and set(asked) == {"/test_32x32.mat", "/train_32x32.mat"})


def test_svhn_without_scipy_says_how_to_get_it(svhn, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    message = refusal(load_dataset, "svhn", str(svhn))
    assert "scipy" in message and "pip install" in message


# Tiny ImageNet

WNIDS = ("n03", "n01", "n02")  # as in the file, not sorted
VAL = {"val_0.JPEG": "n02", "val_1.JPEG": "n01", "val_10.JPEG": "n03", "val_2.JPEG": "n02"}


def jpeg(mode="RGB", size=(64, 64)):
    """A JPEG file of coarse noise."""
    file = io.BytesIO()
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image.resize(size).convert(mode).save(file, "JPEG")
    return file.getvalue()


def tiny_files(grey=("train/n01/images/n01_0.JPEG", "val/images/val_1.JPEG")):
    """The files of a Tiny ImageNet of three classes, in the order of no list."""
    files = {"wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS).encode(), "words.txt": b"n01\tcat\n",
             "val/val_annotations.txt": "".join(f"{name}\t{wnid}\t0\t0\t63\t63\n"
                                                for name, wnid in VAL.items()).encode()}
    names = [f"train/{wnid}/images/{wnid}_{k}.JPEG" for wnid in WNIDS for k in (1, 0)]
    for name in (*names, *(f"val/images/{name}" for name in reversed(VAL)), "test/images/test_0.JPEG"):
        files[name] = jpeg("L" if name in grey else "RGB")
    return files | {f"train/{wnid}/{wnid}_boxes.txt": b"box\n" for wnid in WNIDS}


def write_zip(path, files):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("tiny-imagenet-200") if hasattr(archive, "mkdir") else None
        for name, contents in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", contents)
    return path.read_bytes()


def write_folder(data_dir, files):
    for name, contents in files.items():
        path = data_dir / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def pixels(contents):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(contents)).convert("RGB"))).permute(2, 0, 1)


def assert_is_tiny(data, files):
    """The data set that the official layout of `files` stands for, in any layout."""
    assert data.classes == ("n01", "n02", "n03") and data.image_shape == (3, 64, 64)
    train = [f"train/{wnid}/images/{wnid}_{k}.JPEG" for wnid in sorted(WNIDS) for k in (0, 1)]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.labels.tolist() == [1, 0, 2, 1]
    assert torch.equal(data.train.images, torch.stack([pixels(files[name]) for name in train]))
    assert torch.equal(data.test.images, torch.stack([pixels(files[f"val/images/{name}"]) for name in VAL]))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(data folder, files): a small tiny-imagenet-200.zip in the folder,
    with the checksum and the counts that are expected."""
    files = tiny_files()
    monkeypatch.setattr(tiny_imagenet, "TINY_MD5",
                        md5(write_zip(tmp_path / "data" / "tiny-imagenet-200.zip", files)))
    monkeypatch.setattr(tiny_imagenet, "TINY_COUNTS", {"training": 6, "validation": 4})
    return tmp_path / "data", files


@pytest.fixture
def tiny_folder(tiny):
    """The same in the extracted folder, without the zip."""
    data_dir, files = tiny
    (data_dir / "tiny-imagenet-200.zip").unlink()
    write_folder(data_dir, files)
    return data_dir, files


def test_the_official_archive_is_expected_with_its_100000_and_10000_images():
    assert (tiny_imagenet.TINY_MD5 == "90528d7ca1a48142e341f4ef8d21d0de"
            and tiny_imagenet.TINY_URL.endswith("/tiny-imagenet-200.zip"))
    assert list(tiny_imagenet.TINY_COUNTS.values()) == [100_000, 10_000]


def test_tiny_imagenet_is_read_from_its_zip_and_nothing_is_unpacked(tiny, no_network):
    data_dir, files = tiny
    assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)
    names = sorted(path.name for path in data_dir.iterdir())
    assert (len(names) == 2 and names[0].startswith("tiny-imagenet-200-cache-")
            and names[1] == "tiny-imagenet-200.zip")


def test_tiny_imagenet_is_read_from_its_extracted_folder(tiny_folder, no_network):
    data_dir, files = tiny_folder
    assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)


def test_grey_images_become_colour_images_even_where_all_are_grey(tiny_folder):
    data_dir, _ = tiny_folder
    files = tiny_files(grey=tiny_files())
    write_folder(data_dir, files)
    data = load_dataset("tiny-imagenet", str(data_dir))
    assert_is_tiny(data, files)
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])


@pytest.mark.parametrize("annotations", (True, False))
@pytest.mark.parametrize("place", ("val/{wnid}/{name}", "val/{wnid}/images/{name}"))
def test_validation_images_in_class_folders_have_the_labels_of_these(tiny_folder, place, annotations):
    data_dir, files = tiny_folder
    folder = data_dir / "tiny-imagenet-200"
    for name, wnid in VAL.items():
        moved = folder / place.format(wnid=wnid, name=name)
        moved.parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / "images" / name).rename(moved)
    if not annotations:
        (folder / "val" / "val_annotations.txt").unlink()
    assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)


def test_validation_images_without_labels_are_refused_with_what_is_missing(tiny_folder):
    data_dir, _ = tiny_folder
    (data_dir / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    message = refusal(load_dataset, "tiny-imagenet", str(data_dir))
    for part in ("in no class folders", "val/val_annotations.txt", "is missing", "tiny-imagenet-200.zip",
                 str(data_dir)):
        assert part in message


@pytest.mark.parametrize("lines", ("val_0.JPEG\tn02\t0\n", "".join(f"{name}\tn99\t0\n" for name in VAL)),
                         ids=("one line", "other classes"))
def test_annotations_that_do_not_cover_the_images_are_refused(tiny_folder, lines):
    data_dir, _ = tiny_folder
    (data_dir / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(lines)
    message = refusal(load_dataset, "tiny-imagenet", str(data_dir))
    assert "val_annotations.txt" in message and "val/images/val_" in message


@pytest.mark.parametrize(("missing", "parts"), (
    ("wnids.txt", ("wnids.txt is missing",)), ("train/n02/images/n02_1.JPEG", ("5 training images, not 6",)),
    ("val/images/val_10.JPEG", ("3 validation images, not 4",))))
def test_a_folder_that_is_not_whole_is_refused(tiny_folder, missing, parts):
    data_dir, _ = tiny_folder
    (data_dir / "tiny-imagenet-200" / missing).unlink()
    message = refusal(load_dataset, "tiny-imagenet", str(data_dir))
    for part in (*parts, str(data_dir / "tiny-imagenet-200"), "unpack tiny-imagenet-200.zip again"):
        assert part in message


def test_a_damaged_image_is_refused_by_name(tiny_folder):
    data_dir, files = tiny_folder
    damaged = data_dir / "tiny-imagenet-200" / "val" / "images" / "val_2.JPEG"
    damaged.write_bytes(files["val/images/val_2.JPEG"][:-200])
    assert str(damaged) in refusal(load_dataset, "tiny-imagenet", str(data_dir))


@pytest.mark.parametrize("damage",
                         (lambda b: b[:len(b) // 2], lambda b: b[:-1], lambda b: b"<html>not found</html>",
                          lambda b: b"", lambda b: b + b"x"),
                         ids=("half", "all but one byte", "web page", "empty", "one byte more"))
def test_a_zip_with_another_checksum_is_refused_with_both(tiny, damage):
    data_dir, _ = tiny
    archive = data_dir / "tiny-imagenet-200.zip"
    archive.write_bytes(damage(archive.read_bytes()))
    message = refusal(load_dataset, "tiny-imagenet", str(data_dir))
    for part in (str(archive), md5(archive.read_bytes()), tiny_imagenet.TINY_MD5, "download it again",
                 tiny_imagenet.TINY_URL):
        assert part in message
    assert [path.name for path in data_dir.iterdir()] == ["tiny-imagenet-200.zip"]


@pytest.mark.parametrize("layout", ("tiny", "tiny_folder"))
def test_the_second_load_decodes_nothing_and_compares_no_checksum(layout, request, monkeypatch):
    data_dir, files = request.getfixturevalue(layout)
    load_dataset("tiny-imagenet", str(data_dir))
    monkeypatch.setattr(tiny_imagenet, "decode", None)
    monkeypatch.setattr(tiny_imagenet, "TINY_MD5", "another")
    assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)


def test_a_zip_that_was_replaced_is_checked_and_decoded_again(tiny, monkeypatch):
    data_dir, files = tiny
    load_dataset("tiny-imagenet", str(data_dir))
    os.utime(data_dir / "tiny-imagenet-200.zip", (1, 1))
    monkeypatch.setattr(tiny_imagenet, "TINY_MD5", "another")
    assert "another" in refusal(load_dataset, "tiny-imagenet", str(data_dir))
    files = tiny_files()
    monkeypatch.setattr(tiny_imagenet, "TINY_MD5", md5(write_zip(data_dir / "tiny-imagenet-200.zip", files)))
    assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)


def test_a_cache_that_was_cut_off_is_made_anew(tiny):
    data_dir, files = tiny
    load_dataset("tiny-imagenet", str(data_dir))
    cache, = data_dir.glob("*-cache-*.npz")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-100])
    assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)
    assert cache.stat().st_size == len(whole)


def test_tiny_imagenet_is_downloaded_where_it_is_missing_and_only_once(tiny, server, monkeypatch, capsys):
    data_dir, files = tiny
    address, folder, asked = server
    (data_dir / "tiny-imagenet-200.zip").rename(folder / "tiny-imagenet-200.zip")
    data_dir.rmdir()
    monkeypatch.setattr(tiny_imagenet, "TINY_URL", f"{address}/tiny-imagenet-200.zip")
    for _ in range(2):
        assert_is_tiny(load_dataset("tiny-imagenet", str(data_dir)), files)
        assert asked == ["/tiny-imagenet-200.zip"]
    assert capsys.readouterr().out.count("downloading") == 1
    assert ((data_dir / "tiny-imagenet-200.zip").read_bytes()
            == (folder / "tiny-imagenet-200.zip").read_bytes())
    assert len(list(data_dir.iterdir())) == 2


@pytest.mark.parametrize(("path", "parts"),
                         (("other.zip", ("has MD5", "not")), ("cut/tiny-imagenet-200.zip", ("has MD5",)),
                          ("nothing.zip", ("404",))),
                         ids=("another file", "cut off", "not found"))
def test_a_download_that_fails_is_refused_and_leaves_nothing(tiny, server, monkeypatch, path, parts):
    data_dir, _ = tiny
    address, folder, _ = server
    (data_dir / "tiny-imagenet-200.zip").rename(folder / "tiny-imagenet-200.zip")
    (folder / "other.zip").write_bytes(b"other")
    monkeypatch.setattr(tiny_imagenet, "TINY_URL", f"{address}/{path}")
    message = refusal(load_dataset, "tiny-imagenet", str(data_dir))
    for part in (*parts, f"{address}/{path}", str(data_dir), "--data_dir"):
        assert part in message
    assert ("MD5" not in parts[0]) or tiny_imagenet.TINY_MD5 in message
    assert not list(data_dir.iterdir())


@pytest.mark.parametrize("folder", ("data", "file/data"))
def test_a_missing_tiny_imagenet_without_a_network_says_what_to_do(tmp_path, no_network, folder):
    (tmp_path / "file").write_text("")
    message = refusal(load_dataset, "tiny-imagenet", str(tmp_path / folder))
    for part in ("tiny-imagenet-200.zip", str(tmp_path / folder),
                 "no network" if folder == "data" else "file", tiny_imagenet.TINY_URL,
                 "--data_dir", "--dataset digits"):
        assert part in message


# Generated images

IMAGES = RNG.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4
SHAPE = (3, 6, 5)


def write_extra(path, save=np.savez, **arrays):
    save(path, **({"image": IMAGES, "label": LABELS} | arrays))
    return path


def assert_holds(extra, images=IMAGES):
    assert (isinstance(extra.images, np.memmap) and not extra.images.flags.writeable
            and not extra.images.flags.owndata)
    assert np.array_equal(extra.images, images) and np.array_equal(extra.labels, LABELS)
    assert extra.labels.dtype == torch.int64 and len(extra) == 40
    part = extra[torch.tensor([7, 0, 39, 7])]
    assert (np.array_equal(part.images, images[[7, 0, 39, 7]].transpose(0, 3, 1, 2))
            and part.labels.tolist() == [3, 0, 3, 3])
    assert part.index.tolist() == [extra.first_index + row for row in (7, 0, 39, 7)]


@pytest.mark.parametrize("label_type", (np.int64, np.int32, np.uint8))
def test_stored_images_are_mapped_where_they_lie_in_the_file(tmp_path, label_type):
    path = write_extra(tmp_path / "1m.npz", label=LABELS.astype(label_type))
    extra = load_extra(str(path), 4, SHAPE, first_index=100)
    assert_holds(extra)
    assert (Path(extra.images.filename) == path and extra.images.offset > 0
            and list(tmp_path.iterdir()) == [path])


def test_the_place_of_stored_images_follows_from_their_own_header(tmp_path):
    path = tmp_path / "padded.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in (("note", np.zeros(7)), ("image", IMAGES), ("label", LABELS)):
            file, info = io.BytesIO(), zipfile.ZipInfo(f"{name}.npy")
            np.save(file, array)
            info.extra = b"\x99\x99\x05\x00abcde"  # in the local header too
            archive.writestr(info, file.getvalue())
    assert_holds(load_extra(path, 4, SHAPE))


def test_images_in_fortran_order_are_mapped_too(tmp_path):
    path = write_extra(tmp_path / "1m.npz", image=np.asfortranarray(IMAGES))
    assert_holds(load_extra(path, 4, SHAPE))


def test_compressed_images_are_unpacked_once_beside_the_file(tmp_path, monkeypatch, capsys):
    path = write_extra(tmp_path / "1m.npz", np.savez_compressed)
    assert_holds(load_extra(path, 4, SHAPE))
    unpacked, = tmp_path.glob("*.npy")
    assert (unpacked.name.startswith("1m-image-") and np.array_equal(np.load(unpacked), IMAGES)
            and len(list(tmp_path.iterdir())) == 2)
    assert "unpacking" in capsys.readouterr().out
    monkeypatch.setattr(generated, "copy_stream", None)
    extra = load_extra(path, 4, SHAPE)
    assert_holds(extra)
    assert Path(extra.images.filename) == unpacked and "unpacking" not in capsys.readouterr().out


def test_other_compressed_images_are_not_mistaken_for_those_unpacked_before(tmp_path):
    path = write_extra(tmp_path / "1m.npz", np.savez_compressed)
    load_extra(path, 4, SHAPE)
    write_extra(path, np.savez_compressed, image=255 - IMAGES)
    assert_holds(load_extra(path, 4, SHAPE), 255 - IMAGES)


def test_unpacked_images_that_were_cut_off_are_unpacked_again(tmp_path):
    path = write_extra(tmp_path / "1m.npz", np.savez_compressed)
    load_extra(path, 4, SHAPE)
    unpacked, = tmp_path.glob("*.npy")
    unpacked.write_bytes(unpacked.read_bytes()[:-5])
    assert_holds(load_extra(path, 4, SHAPE))


def test_images_that_cannot_be_unpacked_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = write_extra(tmp_path / "1m.npz", np.savez_compressed)
    monkeypatch.setattr(generated, "copy_stream", full)
    message = refusal(load_extra, path, 4, SHAPE)
    assert str(path) in message and "No space left" in message and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("arrays", "parts"), (
    ({"image": IMAGES[:, :, :4]}, ("[40, 6, 4, 3]", "[N, 6, 5, 3]")),
    ({"image": IMAGES.transpose(0, 3, 1, 2)}, ("[40, 3, 6, 5]",)),
    ({"image": IMAGES[..., 0]}, ("[40, 6, 5]",)),
    ({"image": IMAGES / 255}, ("float64",)), ({"image": IMAGES.astype(np.int8)}, ("int8",)),
    ({"image": IMAGES[:0], "label": LABELS[:1]}, ("[0, 6, 5, 3]",)),
    ({"label": LABELS[:-1]}, ("39 labels for 40 images",)), ({"label": LABELS[:, None]}, ("[40, 1]",)),
    ({"label": LABELS / 1.0}, ("float64",)), ({"label": LABELS > 1}, ("bool",)),
    ({"label": LABELS[:0]}, ("[0]",)), ({"label": LABELS + 1}, ("from 1 to 4", "0 to 3")),
    ({"label": LABELS - 1}, ("from -1 to 2",))))
@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
def test_images_and_labels_that_do_not_fit_are_refused(tmp_path, save, arrays, parts):
    path = write_extra(tmp_path / "1m.npz", save, **arrays)
    message = refusal(load_extra, path, 4, SHAPE)
    for part in (str(path), *parts):
        assert part in message


def test_a_missing_file_of_generated_images_is_refused(tmp_path):
    message = refusal(load_extra, tmp_path / "1m.npz", 4, SHAPE)
    assert str(tmp_path / "1m.npz") in message and "--extra_data" in message


def test_missing_keys_are_refused_with_those_that_are_there(tmp_path):
    np.savez(tmp_path / "1m.npz", images=IMAGES, label=LABELS)
    message = refusal(load_extra, tmp_path / "1m.npz", 4, SHAPE)
    assert "images, label" in message and "image and label" in message


@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
@pytest.mark.parametrize("damage",
                         (lambda b: b"", lambda b: b"text" * 50, lambda b: b[:len(b) // 2], lambda b: b[:-1]),
                         ids=("empty", "text", "half", "all but one byte"))
def test_a_damaged_file_of_generated_images_is_refused(tmp_path, save, damage):
    path = write_extra(tmp_path / "1m.npz", save)
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(load_extra, path, 4, SHAPE)


def test_compressed_images_that_do_not_match_their_checksum_are_refused_and_leave_nothing(tmp_path):
    path = write_extra(tmp_path / "1m.npz", np.savez_compressed)
    contents = bytearray(path.read_bytes())
    contents[2000] ^= 255
    path.write_bytes(contents)
    assert str(path) in refusal(load_extra, path, 4, SHAPE) and list(tmp_path.iterdir()) == [path]


def test_an_array_that_is_shorter_than_its_header_says_is_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, IMAGES)
    with (zipfile.ZipFile(write_extra(tmp_path / "whole.npz")) as whole,
          zipfile.ZipFile(tmp_path / "short.npz", "w") as short):
        short.writestr("image.npy", file.getvalue()[:-9])
        short.writestr("label.npy", whole.read("label.npy"))
    assert "announces" in refusal(load_extra, tmp_path / "short.npz", 4, SHAPE)


def test_a_single_array_in_a_file_called_npz_is_refused(tmp_path):
    with open(tmp_path / "1m.npz", "wb") as file:
        np.save(file, IMAGES)
    assert "1m.npz" in refusal(load_extra, tmp_path / "1m.npz", 4, SHAPE)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("key", ("image", "label"))
def test_pickled_arrays_are_refused_and_never_unpickled(tmp_path, key):
    path = write_extra(tmp_path / "1m.npz", **{key: np.array([Trap(tmp_path / "sprung")] * 40, dtype=object)})
    assert str(path) in refusal(load_extra, path, 4, SHAPE) and not (tmp_path / "sprung").exists()


def test_a_data_set_has_its_generated_images_behind_the_whole_training_set(colour_folder, tmp_path):
    path = write_extra(tmp_path / "more.npz", image=np.zeros((40, 32, 32, 3), np.uint8), label=LABELS % 2)
    data = load_dataset(str(colour_folder), "nowhere", 5, str(path))
    assert len(data.extra) == 40 and data.extra.first_index == 12 and len(data.train) == 7
    assert load_dataset(str(colour_folder), "nowhere", 5).extra is None
    np.savez(path, image=np.zeros((40, 32, 32, 3), np.uint8), label=LABELS)
    assert "classes 0 to 1" in refusal(load_dataset, str(colour_folder), "nowhere", 5, str(path))


# Batches of real and generated images

def split_of(count, shape=SHAPE):
    """Noise images whose index is not their row."""
    images = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    return Split(images, torch.arange(count) % 4, 100 + 2 * torch.arange(count))


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    return load_extra(write_extra(tmp_path_factory.mktemp("extra") / "1m.npz"), 4, SHAPE, first_index=1000)


AUGMENTED = {"crop_padding": 2, "padding_mode": "reflect", "flip": True}


def epoch_of(split, extra, extra_fraction, batch_size=8, seed=1, epoch=1, **options):
    return list(training_batches(split, batch_size, seed, epoch, extra=extra, extra_fraction=extra_fraction,
                                 **options))


def order_of(batches):
    return torch.cat([index for _, _, index, _ in batches])


def test_without_generated_images_the_order_the_crops_and_the_flips_are_the_first_three_draws():
    split, padding = split_of(29), 2
    generator = torch.Generator().manual_seed((3 << 20) + 5)
    order = torch.randperm(29, generator=generator)
    top, left = torch.randint(0, 2 * padding + 1, (2, 29), generator=generator)
    flipped = torch.randint(0, 2, (29,), generator=generator)
    padded = torch.nn.functional.pad(split.images.float() / 255, (padding,) * 4, mode="reflect")
    batches = epoch_of(split, None, 0.7, seed=3, epoch=5, **AUGMENTED)
    assert torch.equal(order_of(batches), split.index[order])
    for row, x in zip(order.tolist(), torch.cat([x for x, *_ in batches])):
        expected = padded[row, :, top[row]:top[row] + 6, left[row]:left[row] + 5]
        assert torch.equal(x, expected.flip(2) if flipped[row] else expected)


def test_a_fraction_of_0_is_the_epoch_without_generated_images(extra):
    split = split_of(29)
    for first, second in zip(epoch_of(split, extra, 0.0, **AUGMENTED),
                             epoch_of(split, None, 0.0, **AUGMENTED), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3])) and first[3] == second[3]


@pytest.mark.parametrize("fraction", (0.0, 0.1, 0.3, 0.5, 0.7, 0.99, 1.0))
@pytest.mark.parametrize(("count", "batch_size"), ((32, 8), (29, 8), (29, 5), (29, 64), (29, 1)))
def test_every_batch_has_its_part_of_generated_images_and_the_epoch_as_many_images_as_before(
        extra, count, batch_size, fraction):
    batches = epoch_of(split_of(count), extra, fraction, batch_size)
    assert ([len(x) for x, *_ in batches]
            == [min(batch_size, count - first) for first in range(0, count, batch_size)])
    for x, y, index, share in batches:
        assert len(x) == len(y) == len(index) and share == 1
        assert int((index >= 1000).sum()) == round(fraction * len(x))


@pytest.mark.parametrize("fraction", (0.3, 0.7, 1.0))
def test_a_batch_holds_the_images_with_their_own_labels(extra, fraction):
    split = split_of(29)
    for x, y, index, _ in epoch_of(split, extra, fraction):
        for image, label, i in zip(x, y, index.tolist()):
            expected = (torch.from_numpy(IMAGES[i - 1000]).permute(2, 0, 1) if i >= 1000
                        else split.images[(i - 100) // 2])
            assert torch.equal(image, expected / 255)
            assert label == (LABELS[i - 1000] if i >= 1000 else split.labels[(i - 100) // 2])


@pytest.mark.parametrize("fraction", (0.3, 0.7, 1.0))
def test_no_image_comes_twice_in_an_epoch(extra, fraction):
    order = order_of(epoch_of(split_of(40), extra, fraction))
    assert len(order.unique()) == len(order) == 40 and order[order >= 1000].max() < 1040


def test_all_images_come_in_some_epoch_and_none_in_an_order_of_the_file(extra):
    orders = [order_of(epoch_of(split_of(30), extra, 0.5, epoch=epoch)) for epoch in range(1, 20)]
    assert set(torch.cat(orders).tolist()) == {*range(100, 160, 2), *range(1000, 1040)}
    assert all((order[order >= 1000].diff() < 0).any() for order in orders)


def test_too_few_generated_images_are_drawn_with_repetition(extra):
    order = order_of(epoch_of(split_of(100), extra, 0.7, batch_size=10))
    generated = order[order >= 1000]
    assert len(generated) == 70 and generated.max() < 1040 and 20 < len(generated.unique()) < 40
    assert len(order[order < 1000].unique()) == 30


def test_the_mixture_follows_from_seed_and_epoch_alone(extra):
    def epoch(**options):
        torch.manual_seed(int(RNG.integers(1000)))
        np.random.seed(int(RNG.integers(1000)))
        return epoch_of(split_of(29), extra, 0.5, **AUGMENTED, **options)

    first, second = epoch(), epoch()
    assert all(torch.equal(a, b)
               for left, right in zip(first, second, strict=True) for a, b in zip(left[:3], right[:3]))
    generated = [set(order_of(batches)[order_of(batches) >= 1000].tolist())
                 for batches in (first, epoch(epoch=2), epoch(seed=2))]
    assert generated[0] != generated[1] and generated[0] != generated[2] and generated[1] != generated[2]


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("count", (32, 29, 25))
@pytest.mark.parametrize("fraction", (0.3, 0.7, 1.0))
def test_the_shares_of_all_processes_make_up_the_mixed_batches_of_one(extra, count, world_size, fraction):
    whole = [batch for batch in epoch_of(split_of(count), extra, fraction, **AUGMENTED)
             if len(batch[0]) >= world_size]
    parts = [epoch_of(split_of(count), extra, fraction, **AUGMENTED, rank=rank, world_size=world_size)
             for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts):
        for rank, share in enumerate(shares):
            assert all(torch.equal(mine, all_[rank::world_size]) for mine, all_ in zip(share[:3], batch[:3]))
        generated = [int((share[2] >= 1000).sum()) for share in shares]
        assert max(generated) - min(generated) <= 1
        assert sum(share[3] for share in shares) == pytest.approx(world_size)


def test_generated_images_are_cropped_and_flipped_too(tmp_path):
    image = np.arange(1, 31, dtype=np.uint8).reshape(5, 6, 1)
    path = write_extra(tmp_path / "1m.npz", image=np.broadcast_to(image, (400, 5, 6, 1)),
                       label=np.zeros(400, np.int64))
    split = Split(torch.zeros(400, 1, 5, 6, dtype=torch.uint8), torch.zeros(400, dtype=torch.int64),
                  torch.arange(400))
    x, *_ = epoch_of(split, load_extra(path, 1, (1, 5, 6)), 1.0, 400, crop_padding=1, flip=True)[0]
    padded = np.pad(image[..., 0], 1)
    crops = [padded[row:row + 5, column:column + 6] / np.float32(255)
             for row in range(3) for column in range(3)]
    counts = {crop.tobytes(): 0 for upright in crops for crop in (upright, upright[:, ::-1])}
    for crop in x:
        counts[crop.numpy().tobytes()] += 1
    assert len(counts) == 18 and min(counts.values()) > 5


def test_a_generated_image_never_has_the_index_of_a_real_one(extra):
    behind = Extra(extra.images, extra.labels)  # first_index 0
    order = order_of(epoch_of(split_of(29), behind, 0.5))
    generated = order[order >= 157]  # the largest real index is 156
    assert (len(order.unique()) == 29 and len(generated) == 14 and generated.max() < 157 + 40
            and generated.min() < 157 + 20)


def test_a_few_of_twenty_million_are_drawn_without_a_list_of_them_all():
    count = 20_000_000
    many = Extra(np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (count, 1, 1, 1)),
                 torch.zeros(1, dtype=torch.int64).expand(count), 1000)
    tracemalloc.start()
    order = order_of(epoch_of(split_of(1000, (1, 1, 1)), many, 0.7, batch_size=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = order[order > 2098] - 1000
    assert len(rows.unique()) == 700 and peak < 10e6
    assert (torch.histc(rows.double(), 4, 0, count) > 130).all()


@pytest.mark.parametrize("fraction", (-0.1, 1.1, float("nan")))
def test_a_fraction_outside_0_to_1_is_refused(extra, fraction):
    assert "--extra_fraction" in refusal(epoch_of, split_of(29), extra, fraction)
