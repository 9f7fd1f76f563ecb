"""benchmarks/attacks.py, benchmarks/others.py: one checker, other packages called as by their users."""
import json
import sys
import types

import pytest
import torch

from attacks.apgd import apgd, apgd_targeted
from attacks.fab import fab_targeted
from attacks.square import square
from benchmarks.attacks import Config, main
from harness.config import parse_config
from harness.errors import UserError
from models import build_model
from tests.attack_models import fake_package


def test_the_benchmark_counts_both_sides_with_one_checker(tmp_path, monkeypatch):
    fake_package(monkeypatch)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits",
                 "--num_examples", "6",
                 "--attacks", "apgd-ce", "--seeds", "1", "2", "--device", "cpu"]
    main(parse_config(Config, [*arguments, "--out", str(tmp_path / "out.json")]))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["rows"][0]["seed"] for result in results] == [1, 2]
    for result in results:
        alone, union = result["rows"]
        assert union["ours"]["robust"] == alone["ours"]["robust"] <= 6
        assert alone["reference"]["cpu_seconds"] >= 0
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UserError, match="optional extra"):
        main(parse_config(Config, arguments))
    with pytest.raises(UserError, match="at least one --checkpoint"):
        main(parse_config(Config, []))


def test_the_benchmark_runs_other_packages_as_they_are_called_there(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def __init__(self, model, **settings):
            calls.append(settings)

        def __call__(self, x, y):
            return x + 2 * calls[-1]["eps"]  # outside the ball: nothing of it may count

    monkeypatch.setitem(sys.modules, "torchattacks", types.SimpleNamespace(FGSM=Fake, PGD=Fake, SPSA=Fake))
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits",
                 "--num_examples", "20",
                 "--epsilon", "0.1"]
    names = ("fgsm", "pgd100", "spsa", "spsa-short")
    main(parse_config(Config,
                      [*arguments, "--sides", "reference", "--attacks", *names, "--out",
                       str(tmp_path / "fake.json")]))
    rows = json.loads((tmp_path / "fake.json").read_text())["results"][0]["rows"]
    clean = rows[0]["reference"]["robust"]
    assert clean > 0 and [row["reference"]["robust"] for row in rows] == [clean] * 5
    assert calls == [{"eps": 0.1}, {"eps": 0.1, "alpha": 0.0125, "steps": 100},
                     {"eps": 0.1, "delta": 0.001, "lr": 0.01, "nb_iter": 100, "nb_sample": 256},
                     {"eps": 0.1, "delta": 0.001, "lr": 0.03, "nb_iter": 20, "nb_sample": 128}]
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UserError, match="pip install --no-deps torchattacks"):
        main(parse_config(Config, [*arguments, "--attacks", "fgsm"]))
    with pytest.raises(UserError, match="l_inf alone"):
        main(parse_config(Config, [*arguments, "--attacks", "spsa", "--norm", "l2"]))


def test_our_fmn_leaves_no_more_than_foolbox_does_and_apgd_on_dlr_is_measured_too(tmp_path):
    pytest.importorskip("foolbox")
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits",
                 "--num_examples", "60",
                 "--epsilon", "0.003"]
    main(parse_config(Config, [*arguments, "--attacks", "fmn100", "--out", str(tmp_path / "fmn.json")]))
    main(parse_config(Config,
                      [*arguments, "--attacks", "apgd-dlr", "--sides", "ours", "--out",
                       str(tmp_path / "dlr.json")]))
    fmn, dlr = (json.loads((tmp_path / f"{name}.json").read_text())["results"][0]["rows"][0]
                for name in ("fmn", "dlr"))
    assert 0 < fmn["ours"]["robust"] <= fmn["reference"]["robust"] < 60 and dlr["ours"]["robust"] < 60


def test_the_ensemble_leaves_the_images_that_its_members_leave_alone(tmp_path, monkeypatch):
    for attack, name in ((apgd, "num_steps"), (apgd_targeted, "num_steps"), (fab_targeted, "num_steps"),
                         (square, "num_queries")):
        monkeypatch.setitem(attack.__kwdefaults__, name, 10)
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    members = ("apgd-ce", "apgd-t", "fab-t", "square")
    main(parse_config(Config, ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset",
                               "digits", "--num_examples", "12",
                               "--epsilon", "0.002", "--sides", "ours", "--attacks", *members, "autoattack",
                               "--out", str(tmp_path / "out.json")]))
    *alone, ensemble, union = json.loads((tmp_path / "out.json").read_text())["results"][0]["rows"]
    assert 0 < ensemble["ours"]["robust"] < 12 and union["ours"]["same_as_autoattack"]
    assert union["ours"]["cpu_seconds"] == pytest.approx(sum(row["ours"]["cpu_seconds"] for row in alone))


RELEASED = """
import torch
from .utils import shift


class Attack:
    def __init__(self, model, epsilon, **settings):
        self.model, self.epsilon, self.settings = model, epsilon, settings

    def perturb(self, x, y):
        settings.append(self.settings)
        assert torch.cuda.FloatTensor(2, 3).shape == (2, 3) and self.model(x).argmax(1).shape == y.shape
        return x + shift(self.epsilon).cuda()


settings, PGDAttack, MDAttack, MDMTAttack = [], Attack, Attack, Attack
"""


def test_the_benchmark_runs_a_clone_of_mdattack_without_cuda_and_without_its_package(tmp_path, capsys):
    folder = tmp_path / "MDAttack" / "attacks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import what_is_not_there")
    utils = "import torch\n\n\ndef shift(epsilon):\n    return torch.tensor(epsilon)\n"
    (folder / "utils.py").write_text(utils)
    for name in ("MD", "PGD"):
        (folder / f"{name}.py").write_text(RELEASED)
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits",
                 "--num_examples", "60",
                 "--epsilon", "0.04", "--attacks", "cw", "md", "mdmt"]
    cuda = torch.Tensor.cuda, torch.cuda.FloatTensor
    main(parse_config(Config,
                      [*arguments, "--md_attack", str(tmp_path / "MDAttack"), "--out",
                       str(tmp_path / "md.json")]))
    rows = json.loads((tmp_path / "md.json").read_text())["results"][0]["rows"]
    assert all(0 < row["ours"]["robust"] <= row["reference"]["robust"] < 60 for row in rows)
    assert [module.settings for module in (sys.modules["mdattack.PGD"], sys.modules["mdattack.MD"])] == [
        [{"num_steps": 20, "step_size": 0.005, "random_start": True, "type": "CW"}],
        [{"num_steps": 50, "change_point": 20}] * 2]
    assert cuda == (torch.Tensor.cuda, torch.cuda.FloatTensor)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"holds no attacks/PGD\.py"):
        main(parse_config(Config, [*arguments, "--md_attack", str(tmp_path)]))
    with pytest.raises(UserError, match="--md_attack FOLDER"):
        main(parse_config(Config, arguments))
    assert not capsys.readouterr().out  # refused before anything has run
