"""Distances between classes: exact integers against a direct computation."""
import numpy as np
import pytest
import torch

from curves.class_distances import NONE, ClassDistances, _pairs, class_distances, summarize


def brute(images, labels):
    """All pairs in int64: norm -> [n, n]."""
    flat = images.reshape(len(images), -1).astype(np.int64)
    apart = np.abs(flat[:, None] - flat[None])
    return {"linf": apart.max(2), "l2": (apart**2).sum(2), "l1": apart.sum(2)}


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (70, 1, 5, 6), dtype=np.uint8), random.integers(0, 4, 70)
    images[0], images[1] = 0, 255  # the largest sums
    labels[5] = 9                  # a class of one point
    return images, labels


@pytest.mark.parametrize("norms", [("linf", "l2", "l1"), ("l2",), ("l1",)])
def test_both_distances_are_exact(data, norms):
    images, labels = data
    found = class_distances(torch.from_numpy(images), torch.from_numpy(labels), norms, seed=3)
    alike = labels[:, None] == labels
    assert set(found) == set(norms)
    for norm in norms:
        pairs = brute(images, labels)[norm]
        assert np.array_equal(found[norm].inter, np.where(~alike, pairs, NONE).min(1))
        assert np.array_equal(found[norm].intra,
                              np.where(alike & ~np.eye(70, dtype=bool), pairs, NONE).min(1))
        assert found[norm].intra[5] == NONE and len(found[norm].intra_unit()) == 69


def test_neither_blocks_nor_the_order_change_a_distance(data, monkeypatch):
    images, labels = map(torch.from_numpy, data)
    whole = class_distances(images, labels)
    monkeypatch.setattr("curves.class_distances.BLOCK_BYTES", 100)  # three images at a time
    small = class_distances(images, labels, seed=8)
    for norm, part in whole.items():
        assert np.array_equal(part.inter, small[norm].inter) and np.array_equal(part.intra, small[norm].intra)
        assert part.prefix[-1] == small[norm].prefix[-1] == part.inter.min()


def test_the_subsets_distance_is_that_of_the_first_points_in_the_random_order(data):
    images, labels = data
    found = class_distances(torch.from_numpy(images), torch.from_numpy(labels), ("l1",), seed=1)["l1"]
    order = np.random.default_rng(1).permutation(70)
    pairs = np.where(labels[:, None] == labels, NONE, brute(*data)["l1"])
    assert found.prefix.tolist() == [pairs[np.ix_(order[:j], order[:j])].min() for j in range(1, 71)]


def test_what_runs_on_an_accelerator_gives_the_same_integers(data):
    flat = torch.from_numpy(data[0]).flatten(1)
    block_of = _pairs(flat, bytewise=False)
    for norm, pairs in brute(*data).items():
        assert np.array_equal(block_of(norm, 20, 50), pairs[20:50, :50])


def test_a_copy_in_another_class_is_counted_and_left_out():
    images = torch.tensor([[0, 0], [0, 0], [10, 0], [0, 40]], dtype=torch.uint8)
    found = class_distances(images, torch.tensor([0, 1, 0, 1]))
    assert found["l1"].duplicates == 2 and found["l1"].inter.tolist() == [0, 0, 10, 40]
    assert found["l1"].inter_unit().tolist() == [10 / 255, 40 / 255] and found["l1"].prefix[-1] == 10


def test_units_and_scale():
    found = ClassDistances("l2", np.array([255**2, 4 * 255**2]), np.array([NONE, 9]),
                           np.array([NONE, 255**2]))
    assert found.unit(found.inter).tolist() == [1, 2] and np.isinf(found.unit(found.prefix)[0])
    summary = summarize(found, (0.25, 1.0))
    assert (summary["half_min_inter"] == 0.5 and summary["inter"]["max"] == 2
            and summary["intra"]["points"] == 1)
    assert summary["thresholds"] == [{"t": 0.25, "of_half": 0.5, "within_2t": 0.0},
                                     {"t": 1.0, "of_half": 2.0, "within_2t": 1.0}]


@pytest.mark.parametrize(("images", "labels"),
                         [(torch.zeros(3, 2), [0, 1, 1]), (torch.zeros(3, 2, dtype=torch.uint8), [1, 1, 1]),
                          (torch.zeros(3, 2, dtype=torch.uint8), [0, 1])])
def test_what_cannot_be_measured_is_refused(images, labels):
    with pytest.raises(ValueError, match=r"needed|no inter-class"):
        class_distances(images, torch.tensor(labels))
