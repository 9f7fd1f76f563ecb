"""benchmarks/sweep.py: what is timed, the line through it, the figure, refusals."""
import json

import pytest

from benchmarks import sweep
from benchmarks.figures import sweep as draw
from harness.config import parse_config
from harness.errors import UserError

TOY = ["--model", "lenet", "--eval_model", "lenet", "resnet18", "--batch_sizes", "2", "4", "--num_steps", "1", "3", "--batch_size", "4",
       "--steps", "1", "--eval_batch_sizes", "2", "3", "--repeats", "1", "--device", "cpu"]


def test_the_sweep_times_every_point_once_and_draws_it(tmp_path):
    sweep.main(parse_config(sweep.Config, [*TOY, "--out", str(tmp_path / "s.json")]))
    result = json.loads((tmp_path / "s.json").read_text())
    assert [(row["batch_size"], row["num_steps"]) for row in result["training"]] == [(2, 1), (4, 1), (4, 3)]
    assert [(row["model"], row["batch_size"]) for row in result["evaluation"]] == [
        ("lenet", 2), ("lenet", 3), ("resnet18", 2), ("resnet18", 3)]
    assert all(row[form] > 0 for row in result["training"] for form in ("ours", "published_form"))
    few, many = (next(row for row in result["training"] if row["batch_size"] == 4 and row["num_steps"] == steps) for steps in (1, 3))
    for line in result["lines"]:
        assert line["fixed"] + line["per_step"] == pytest.approx(few[line["form"]])
        assert line["fixed"] + 3 * line["per_step"] == pytest.approx(many[line["form"]])
    assert [line["form"] for line in result["lines"]] == ["ours", "published_form"]
    assert (tmp_path / "s.png").stat().st_size > 20_000


def test_seconds_an_image_are_those_of_the_step_over_its_batch(monkeypatch):
    asked = []

    def measured(name, method, setting, peak_of):
        asked.append((name, method, setting.batch_size, setting.num_steps))
        return {"precision": "bf16", "ours_seconds": 8.0, "published_form_seconds": 40.0}

    monkeypatch.setattr(sweep.train_step, "measure", measured)
    row = sweep.train("lenet", 16, 5, sweep.Config(method="trades"))
    assert (row["ours"], row["published_form"]) == (0.5, 2.5) and asked == [("lenet", "trades", 16, 5)]


def test_the_figure_shows_one_line_a_network_and_form(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("benchmarks.figures.save", lambda figure, path: drawn.update({
        axis.get_title(): {line.get_label(): list(map(tuple, line.get_xydata())) for line in axis.lines} for axis in figure.axes}))
    training = [{"model": "lenet", "batch_size": size, "num_steps": steps, "ours": size * steps / 1e3, "published_form": size * steps / 1e2}
                for size, steps in ((4, 10), (2, 10), (2, 30))]
    draw({"training": training, "evaluation": [{"model": "lenet", "batch_size": 8, "seconds": 0.004}], "batch_size": 2, "steps": 10},
         tmp_path / "s.png")
    left, middle, right = drawn.values()
    assert left["lenet, ours"] == [(2, 20), (4, 40)] and middle["lenet, published form"] == [(10, 200), (30, 600)]
    assert right["lenet"] == [(8, 4)]


@pytest.mark.parametrize(("words", "message"), ((["--model", "lenot"], "unknown model"), (["--repeats", "0"], "--repeats"),
                                                (["--batch_sizes", "0"], "at least 1"),
                                                (["--eval_batch_sizes"], "--eval_batch_sizes"), (["--out", __file__], "never overwritten")))
def test_what_cannot_be_timed_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        sweep.main(parse_config(sweep.Config, [*TOY, *words]))
