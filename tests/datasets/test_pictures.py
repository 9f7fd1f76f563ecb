"""harness/datasets/pictures.py and image_folders.py: a picture is what a viewer shows, or it is refused."""
import numpy as np
import pytest
import torch
from PIL import Image

from harness.datasets import pictures
from harness.datasets.batches import first_examples, load_dataset
from harness.errors import UserError

GREY16 = np.array([[0, 257 * 7, 257 * 128, 65535]], np.uint16)


def read(image, tmp_path, name="x.png", **options):
    image.save(tmp_path / name, **options)
    (pixels,), grey = pictures.decode([tmp_path / name], "decoding")
    return pixels, grey


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_of_grey_are_rounded_to_eight(name, tmp_path):
    pixels, grey = read(Image.fromarray(GREY16), tmp_path, name)
    assert grey and pixels[0, :, 0].tolist() == [0, 7, 128, 255]


@pytest.mark.parametrize(("mode", "colour", "seen"), [
    ("LA", (40, 255), 40), ("LA", (40, 0), 255), ("LA", (0, 128), 127), ("RGBA", (9, 9, 9, 255), 9),
    ("RGBA", (9, 9, 9, 0), 255), ("RGBA", (0, 0, 0, 51), 204)])
def test_what_is_transparent_lies_on_white_and_one_line_says_so(mode, colour, seen, tmp_path, capsys):
    pixels, grey = read(Image.new(mode, (3, 2), colour), tmp_path)
    assert grey == (mode == "LA") and np.unique(pixels).tolist() == [seen]
    assert ("transparent in part" in capsys.readouterr().out) == (colour[-1] < 255)


def test_a_palette_gives_its_colours_and_its_transparent_entry_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    pixels, grey = read(image, tmp_path)
    assert not grey and pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    pixels, _ = read(image, tmp_path, transparency=1)
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(("orientation", "expected"), [(1, [[0, 90, 180]]), (3, [[180, 90, 0]]),
                                                       (6, [[0], [90], [180]]), (8, [[180], [90], [0]])])
def test_a_photograph_is_turned_as_its_exif_entry_says(orientation, expected, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, _ = read(Image.fromarray(np.array([[0, 90, 180]], np.uint8)), tmp_path, exif=exif)
    assert pixels[..., 0].tolist() == expected


@pytest.mark.parametrize(("mode", "name", "says"), [
    ("CMYK", "x.jpg", "its colours are CMYK"), ("CMYK", "x.tif", "CMYK"), ("LAB", "x.tif", "LAB"),
    ("F", "x.tif", "its colours are F"), ("I", "x.tif", "its colours are I")])
def test_colours_without_one_look_are_refused(mode, name, says, tmp_path):
    with pytest.raises(UserError, match=f"{name} cannot be read as an image .*{says}"):
        read(Image.new(mode, (4, 4)), tmp_path, name)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_an_animation_is_refused(name, tmp_path):
    frames = [Image.new("L", (4, 4), level) for level in (0, 100, 200)]
    with pytest.raises(UserError, match=f"{name} cannot be read as an image .it holds 3 pictures"):
        read(frames[0], tmp_path, name, save_all=True, append_images=frames[1:])


def test_what_does_not_fit_into_memory_is_said_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "free_memory", lambda device: 10**9)
    Image.new("RGB", (224, 224)).save(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "as_seen", lambda image: pytest.fail("it was read"))
    with pytest.raises(UserError,
                       match=r"10,000 images of 224x224 take 3.0 GB of memory, and 1.0 GB are free"):
        pictures.decode([tmp_path / "x.png"] * 10_000, "decoding")


@pytest.fixture
def pets(tmp_path):
    """An image folder of three classes, ten training and twenty test images each; image k of a class is k."""
    for split, count in (("train", 10), ("test", 20)):
        for label, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for k in range(count):
                image = Image.new("RGB", (8, 8), (20 * label, 0, k))
                image.save(tmp_path / "pets" / split / name / f"{k:02}.png")
    return tmp_path / "pets"


def test_the_first_images_are_a_sample_of_all_classes_and_the_same_ones_always(pets):
    test = load_dataset(str(pets), "data").test
    first = first_examples(test, 20)
    assert torch.bincount(first.labels, minlength=3).min() >= 3
    assert torch.equal(first.index, first_examples(load_dataset(str(pets), "data").test, 20).index)
    assert torch.equal(test.index.sort().values, torch.arange(60))
    assert torch.equal(test.index // 20, test.labels)  # an image is known by its place among the sorted files
    assert torch.equal(test.images[:, 2, 0, 0].long(), test.index % 20)


@pytest.mark.parametrize("hidden", ["train/.ipynb_checkpoints/x.png", "test/.cache/x.png", "train/ant/.x.png",
                                    "test/bee/._05.png", "train/cow/.DS_Store"])
def test_hidden_folders_and_files_are_no_classes_and_no_images(hidden, pets):
    (pets / hidden).parent.mkdir(exist_ok=True)
    (pets / hidden).write_bytes(b"no picture")
    data = load_dataset(str(pets), "data")
    assert data.classes == ("ant", "bee", "cow") and (len(data.train), len(data.test)) == (30, 60)


@pytest.mark.parametrize(("files", "says"), [
    (("a.heif_", "b.raw"), "2 files, such as a.heif_"), ((), "nothing"), ((".hidden.png",), "nothing")])
def test_a_class_without_an_image_is_named(files, says, pets):
    for split in ("train", "test"):
        (pets / split / "dog").mkdir()
        for name in files:
            (pets / split / "dog" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"train/dog has no image: it holds {says}"):
        load_dataset(str(pets), "data")


def test_what_is_left_out_of_a_class_is_said_in_one_line(pets, capsys):
    (pets / "train" / "ant" / "more").mkdir()
    (pets / "train" / "bee" / "notes.txt").write_text("text")
    assert len(load_dataset(str(pets), "data").train) == 30
    said = capsys.readouterr().out
    assert said.count("note: ") == 1 and "2 files and folders in" in said and "ant/more" in said


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".TIFF", ".jfif", ".webp", ".pnm", ".tga"])
def test_every_kind_of_file_that_pillow_reads_is_an_image(suffix, pets):
    Image.new("RGB", (8, 8)).save(pets / "test" / "ant" / f"more{suffix}")
    assert len(load_dataset(str(pets), "data").test) == 61
