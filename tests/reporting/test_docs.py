"""harness/reporting/docs.py: every table on the pages is that of its files; one that is not is named."""
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from harness.errors import UserError
from harness.reporting import campaign_tables, cells, defense_tables, docs


def test_every_table_on_the_pages_is_that_of_its_files():
    texts = {page: page.read_text(encoding="utf-8") for page in docs.pages()}
    stale = {page.name: names for page, text in texts.items() if (names := docs.fill(text)[1])}
    assert not stale, "write them with: python -m harness.reporting.docs"
    used = {name for text in texts.values() for name, _ in docs.BLOCK.findall(text)}
    assert used == docs.TABLES.keys() and len(texts) == 8


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with one table in which a number is wrong."""
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    path = tmp_path / "README.md"
    right, _ = docs.fill("before\n<!-- table: recipes -->\n<!-- end -->\nafter\n")
    path.write_text(right.replace("0.0441", "0.0442", 1))
    return path


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["docs.py", *flags])
    with pytest.raises(SystemExit) as ended:
        docs.main()
    return int(ended.value.code)


def test_a_stale_table_is_named_by_check_and_mended_without(page, monkeypatch, capsys):
    wrong = page.read_text()
    assert run(monkeypatch, "--check") == 1 and page.read_text() == wrong
    assert "README.md: table recipes is stale" in capsys.readouterr().out
    assert run(monkeypatch) == 0 and page.read_text() == wrong.replace("0.0442", "0.0441", 1)
    assert run(monkeypatch, "--check") == 0 and capsys.readouterr().out.count("recipes") == 1


@pytest.mark.parametrize(("text", "says"), [
    ("<!-- table: none -->\n<!-- end -->\n", "there is no table 'none'"),
    ("<!-- table: recipes -->\n| a |\n", "has no line"),
])
def test_a_block_that_cannot_be_filled_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        docs.fill(text)


def test_an_example_of_a_block_is_left_alone():
    text = "    <!-- table: NAME -->\n    <!-- end -->\n"
    assert docs.fill(text) == (text, [])


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path, monkeypatch):
    for seed, A_rob in ((2, 90.0), (3, 91.0)):
        (tmp_path / f"mnist/lenet-at/seed{seed}").mkdir(parents=True)
        result = {"A_nat": 99.0, "A_rob": A_rob, "A_sa": {"2.0": 50.0}, "A_tr": {"2.0": 49.0}}
        (tmp_path / f"mnist/lenet-at/seed{seed}/eval.json").write_text(json.dumps(result))
    monkeypatch.setattr(defense_tables, "RESULTS", tmp_path)
    found = defense_tables.runs("mnist/lenet-at")
    assert defense_tables.seeds(found) == "2, 3"
    assert defense_tables.measures(found, ("2.0",)) == ["99.00 ± 0.00", "90.50 ± 0.71", "50.00 ± 0.00",
                                                     "49.00 ± 0.00"]


def test_rows_are_compared_on_the_seeds_that_all_have(tmp_path, monkeypatch):
    for name, seeds in (("at", (0, 1, 2)), ("vir-at", (0, 2)), ("mail-at", (2, 0, 1))):
        for seed in seeds:
            (tmp_path / f"vir/{name}/seed{seed}").mkdir(parents=True)
            (tmp_path / f"vir/{name}/seed{seed}/eval.json").write_text("{}")
    monkeypatch.setattr(defense_tables, "RESULTS", tmp_path)
    at, mail, vir = "vir/at", "vir/mail-at", "vir/vir-at"
    for places, own in (((at, mail), "0, 1, 2"), ((mail, at, vir), "0, 2")):
        found = defense_tables.on_shared_seeds(places)
        assert {place: defense_tables.seeds(folders) for place, folders in found.items()} == dict.fromkeys(
            places, own)


def test_networks_under_strong_attacks_stand_apart(tmp_path, monkeypatch):
    for place, accuracy in (("mnist/lenet-at/seed0", 80.0), ("mnist/small_cnn-at/seed0", 90.0),
                            ("mnist/lenet-at/seed2", 86.0), ("vir/mail-at/seed1", 85.0)):
        (tmp_path / place).mkdir(parents=True)
        result = {"worst_case": {"accuracy": accuracy}}
        (tmp_path / place / "strong.json").write_text(json.dumps(result))
    monkeypatch.setattr(defense_tables, "RESULTS", tmp_path)
    assert list(defense_tables.attacked()) == [
        ("AT", "SmallCNN", "short", "0"), ("MAIL-AT", "LeNet", "VIR's", "1"),
        ("AT", "LeNet", "short", "0, 2")]


@pytest.mark.slow
def test_the_tables_need_neither_torch_nor_numpy():
    code = "import sys, harness.reporting.docs; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_mean_difference_has_the_interval_of_students_t():
    values = [1.0, -0.5, 2.25, 0.75]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = cells.difference(values, images=0.0)
    assert (mean, mean - half, mean + half) == pytest.approx((0.875, low, high), abs=1e-3)
    assert cells.difference(values, images=0.3)[1] == pytest.approx((half**2 + 0.09) ** 0.5)
    assert list(cells.STUDENT) == stats.t.ppf(0.975, range(1, 10)).round(3).tolist()


def test_the_interval_covers_other_seeds_and_other_images():
    random, held = np.random.default_rng(0), {"seeds": 0, "both": 0}
    for _ in range(1000):  # per seed and image: of the seed, of the image, of both; the truth is 0
        found = random.normal(0, 0.02, (3, 1)) + random.normal(0, 1, 400) + random.normal(0, 0.5, (3, 400))
        images = 1.96 * found.mean(0).std() / 20
        for name, width in (("seeds", 0.0), ("both", images)):
            mean, half = cells.difference(found.mean(1).tolist(), width)
            held[name] += abs(mean) <= half
    assert 940 <= held["both"] <= 1000 and held["seeds"] < 900


def test_a_difference_has_the_interval_of_its_seeds_and_of_the_images(tmp_path, monkeypatch):
    (tmp_path / "paired.json").write_text(json.dumps({"rows": [{
        "row": "vir/gairat", "base": "vir/at",
        "A_rob": {"seeds": [1, 2], "differences": [2.0, 4.0], "images": 0.5},
        "worst case": {"seeds": [2], "differences": [-5.04], "images": 1.96},
        "worst case, 0.2 nats": {"seeds": [], "differences": [], "images": None}}]}))
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    ours, theirs = ([cell.strip() for cell in line.strip("|").split("|")]
                    for line in campaign_tables.paired().splitlines()[2:])
    _, half = cells.difference([2.0, 4.0], 0.5)
    assert ours == ["GAIRAT", "LeNet", "VIR's", "AT", "1, 2", f"+3.00 (±{half:.2f})",
                    "**-5.04 (±1.96)**, of 2", "-"]
    assert theirs == ["GAIRAT", "*ResNet-18, CIFAR-10, paper*", "VIR's", "AT", "", "-", "-15.03", "-"]


def test_a_difference_of_zero_has_no_sign():
    assert campaign_tables.compared([0, 1, 2], [0.6, -0.2, -0.4], 0.5, [0, 1, 2]).startswith("+0.00 (")


@pytest.mark.parametrize(("place", "label"), [
    ("cifar10-w16/at-alpha0.1", ("AT, alpha 0.1", "ResNet-18, width 16", "CIFAR-10's")),
    ("vir/mail-at", ("MAIL-AT", "LeNet", "VIR's")),
    ("vir/trades-5", ("TRADES, 1/lambda 5", "LeNet", "VIR's")),
    ("vir/mail-trades-mean1", ("MAIL-TRADES, mean 1", "LeNet", "VIR's")),
    ("fast/free", ("Free AT", "LeNet", "short")),
    ("mnist/small_cnn-trades-alpha2", ("TRADES, alpha 2", "SmallCNN", "short"))])
def test_the_labels_of_a_folder_of_runs(place, label):
    assert defense_tables.label_of(place) == label


def test_a_burn_in_counts_once(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,seconds\n1,10\n2,20\n3,5\n")
    for config, seconds in (({"burn_in_epochs": 2, "burn_in_from": None}, 35), ({}, 35),
                            ({"burn_in_epochs": 2, "burn_in_from": "runs/at"}, 5)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert campaign_tables.training_seconds(tmp_path) == seconds


def test_rows_on_cifar10_stand_beside_the_papers_and_apart_from_mnist(tmp_path, monkeypatch):
    (tmp_path / "paper").symlink_to(defense_tables.RESULTS / "paper")
    attacks = {name: {"accuracy": 40.0} for name in (*defense_tables.STRONG, "square", "spsa")}
    for k, place in enumerate(("cifar10-w16/at", "cifar10-w16/vir-at", "vir/at")):
        weighted = {"A_sa": dict.fromkeys(defense_tables.ALPHAS, 30.0 + k),
                    "A_sa_kl": dict.fromkeys(defense_tables.BUDGETS, 20.0 + k)}
        whole = {"A_nat": 70.0, "A_rob": 45.0 + k, "A_tr": weighted["A_sa"], **weighted}
        (tmp_path / place / "seed0").mkdir(parents=True)
        (tmp_path / place / "seed0/eval.json").write_text(json.dumps(whole))
        strong = {**whole, "verdict": "ok", "attacks": attacks,
                  "worst_case": {"accuracy": 39.0 + k, **weighted}}
        (tmp_path / place / "seed0/strong.json").write_text(json.dumps(strong))
    monkeypatch.setattr(defense_tables, "RESULTS", tmp_path)

    def lines(table):
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table().splitlines()[2:]]

    assert [line[:5] for line in lines(defense_tables.cifar10)] == [
        ["AT", "ResNet-18, width 16, ours", "0", "70.00", "45.00"],
        ["AT", "*ResNet-18, paper*", "", "-", "49.29"],
        ["VIR-AT", "ResNet-18, width 16, ours", "0", "70.00", "46.00"]]
    assert [line[0] for line in lines(defense_tables.equal_budget_cifar10)] == ["AT", "VIR-AT"]
    assert [[line[0], line[2], line[5], line[9], line[-1]]
            for line in lines(defense_tables.strong_cifar10)] == [
        ["VIR-AT", "0", "46.0", "40.0", "40.0"], ["VIR-AT", "", "-", "48.2", "-"],
        ["AT", "0", "45.0", "40.0", "39.0"], ["AT", "", "-", "47.9", "-"]]
    assert [line[:3] for line in lines(defense_tables.equal_budget_strong_cifar10)] == [
        ["VIR-AT", "0", "40.00"], ["AT", "0", "39.00"]]
    assert [line[:2] for line in lines(defense_tables.strong)] == [["AT", "LeNet"]]
