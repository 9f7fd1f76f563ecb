"""Every training script on a GPU that is not there: the CPU's weights bit for bit, and no wait in a step."""
import numpy as np
import pytest

from tests import standin, standin_runs

pytestmark = [pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing())), pytest.mark.slow]

AT = ("train_at_mnist", "--alpha", 1)
MORE = ("--num_steps", 2, "--crop_padding", 2, "--flip")
SCRIPTS = {
    "at": (*AT, *MORE), "trades": ("train_trades_mnist", "--alpha", 1, *MORE),
    "at-cifar10": ("train_at_cifar10", "--alpha", 1, *MORE, "--normalize"),
    "trades-cifar10": ("train_trades_cifar10", "--alpha", 1, *MORE, "--max_grad_norm", 1),
    "free": ("train_free", "--num_replays", 2), "iaat": ("train_iaat", *MORE, "--burn_in_epochs", 0),
    "iaat-burn-in": ("train_iaat", *MORE),
    "yopo": ("train_yopo", "--num_passes", 2, "--num_steps", 2),
    "yopo-hamiltonian": ("train_yopo", "--num_passes", 2, "--layer_one_grad", "hamiltonian"),
    **{f"{base}-{kind}": ("train_vir", "--base", base, "--weights", kind, "--burn_in_epochs", 0,
                          "--num_steps", 2)
       for base, kind in (("at", "uniform"), ("at", "vir"), ("at", "gairat"), ("trades", "mail"),
                          ("mart", "margin"), ("trades", "vir"))},
    "generated": ("train_vir", "--base", "trades", "--weights", "vir", "--num_steps", 1,
                  "--extra_data", "extra.npz"),
}


@pytest.fixture(scope="module")
def child():
    with standin_runs.child() as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def write_images(folder):
    """The images of --extra_data."""
    random = np.random.default_rng(0)
    np.savez(folder / "extra.npz", image=random.integers(0, 256, (60, 28, 28, 1), dtype=np.uint8),
             label=random.integers(0, 10, 60))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_as_on_the_cpu_and_no_step_waits_for_the_device(name, child, tmp_path):
    script, *words = SCRIPTS[name]
    write_images(tmp_path)
    found = child(standin_runs.trained, script, words, tmp_path)
    assert found.differs == []
    assert found.waits == found.copies == {}  # nothing in a step is justified
    # generated images, labels and places of two batches, from pinned memory
    assert sum(found.queued.values()) == (6 if name == "generated" else 0)


@pytest.mark.parametrize("name", standin_runs.MUTATIONS)
def test_a_step_that_waits_copies_or_mixes_devices_is_caught(name, child, tmp_path):
    script, *words = SCRIPTS["at"]
    raised = {"_on_the_cpu": "on the same device", "_in_numpy": "can't convert cuda:0 device type tensor"}
    if name in raised:
        with pytest.raises((RuntimeError, TypeError), match=raised[name]):
            child(standin_runs.trained, script, words, tmp_path, name)
        return
    found = child(standin_runs.trained, script, words, tmp_path, name)
    assert any("standin_runs.py:" in place and name in place for place in (*found.waits, *found.copies))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_casts_the_frozen_weights_of_convolutions_once(mode, child):
    assert child(standin_runs.casts_in_a_step, mode) == 3  # images, weight and bias of the linear layer


def test_the_command_runs_a_script_and_shows_where_it_waits(child, tmp_path):
    words = (*standin_runs.TINY, "--num_steps", 1, "--device", "cuda", "--out_dir", tmp_path / "run")
    said = child(standin_runs.by_command, "train_at_mnist.py", words)
    assert "waits: " in said and "harness/training/batch.py" in said and (tmp_path / "run/last.pt").exists()
