"""benchmarks/memory.py: what is measured and in which process, the size of a stand-in, refusals."""
import json

import pytest

from benchmarks import memory
from harness.config import parse_config
from harness.errors import UserError


def test_memory_is_measured_in_a_process_for_each_data_set(tmp_path):
    memory.main(parse_config(memory.Config, ["--dataset", "digits", "--batches", "21", "--num_steps", "1",
                                             "--batch_size", "128",
                                             "--out", str(tmp_path / "m.json")]))
    row, = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert row["batches"] == 24 == len(row["resident_mb"])
    assert row["training_images"] == 1437 and not row["standin"] and row["model"] == "lenet"
    assert row["images_mb"] == pytest.approx(1797 * 784 / 1e6)
    assert 50 < row["loaded_mb"] <= row["end_mb"] <= row["peak_mb"] < 4000
    assert row["growth_mb"] == pytest.approx(row["end_mb"] - row["first_mb"])


def test_a_stand_in_has_the_size_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(memory.STANDINS, "svhn", (300, 50, 7, (3, 16, 16)))
    memory.write_standin("svhn", str(tmp_path))
    data = memory.read_standin("svhn", str(tmp_path))
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (300, 50, 7, (3, 16, 16))
    assert data.train.images.unique().numel() == 256 and data.train.labels.max() == 6


@pytest.mark.parametrize(("words", "message"),
                         ((["--dataset", "mnist-standin"], "no stand-in 'mnist-standin'"),
                                                (["--dataset", "digits", "--batches", "3"], "too few"),
                                                (["--dataset", "nothing"], "no data set 'nothing'")))
def test_what_cannot_be_measured_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        memory.main(parse_config(memory.Config, words))
