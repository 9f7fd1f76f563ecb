"""Which device a process takes, and the arithmetic on it."""
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY

from harness import device, distributed
from harness.checkpoint import built
from harness.errors import UserError
from harness.evaluation.options import EvalConfig
from harness.evaluation.pipeline import begin
from harness.training.run import Run
from tests import standin, standin_runs

CPU = torch.device("cpu")
needs_standin = pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing()))


@pytest.fixture
def as_torch_comes():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    device.forbid_tf32()


def test_float32_is_float32_from_the_choice_of_a_device_on(as_torch_comes):
    assert device.environment(CPU)["tf32"]
    chosen = device.choose_device("auto")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not device.environment(chosen)["tf32"]
    with device.torchs_own_settings():  # the published form's
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


NEWER = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="before torch 2.9")


@pytest.mark.parametrize("switches", [
    'set_float32_matmul_precision("high")\ntorch.backends.cudnn.allow_tf32 = True',
    'backends.fp32_precision = "tf32"',
    pytest.param('backends.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"', marks=NEWER)])
def test_the_file_of_a_network_does_not_allow_tf32(switches, as_torch_comes, script):
    Path("net.py").write_text(f"import torch\ntorch.{switches}\nNet = lambda: torch.nn.Sequential("
                              "torch.nn.Flatten(), torch.nn.Linear(784, 10))\n")
    few = ("--num_examples", 4, "--num_steps", 1, "--num_restarts", 1, "--alphas", 1)
    script("train_at_mnist", *TINY, "--model", "net.py:Net", "--out_dir", "run")
    assert not device.allows_tf32() and torch.get_float32_matmul_precision() == "highest"
    script("eval_mnist", "--checkpoint", "run/last.pt", "--arch", "net.py:Net", *few, "--out", "result.json")
    assert not device.allows_tf32() and not torch.backends.cudnn.allow_tf32
    facts = [json.loads(Path(file).read_text())["environment"] for file in ("run/config.json", "result.json")]
    assert [found["tf32"] for found in facts] == [False, False]


def test_where_nothing_forbids_tf32_a_network_that_is_loaded_does_not_either(as_torch_comes):
    built(torch.nn.Identity)
    assert device.allows_tf32()


@pytest.mark.parametrize(("kind", "name"), [("xpu", "Arc"), ("mps", "Apple MPS, ")])
def test_the_hardware_is_the_accelerator(kind, name, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Arc")
    processor = "" if kind == "xpu" else device.environment(CPU)["hardware"]
    assert device.environment(torch.device(kind))["hardware"] == name + processor


def in_torchrun(monkeypatch, rank, world_size):
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 29500)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_process_of_torchrun_takes_its_own_gpu_before_it_touches_one(name, monkeypatch):
    in_torchrun(monkeypatch, 2, 4)
    touched, group = [], {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: touched.append(("current", str(chosen))))
    monkeypatch.setattr(torch, "empty", lambda *size, device: touched.append(("memory", str(device))))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda **options: group.update(options))
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    chosen = device.choose_device(name)
    assert touched == [("current", "cuda:2"), ("memory", "cuda:2")]
    assert distributed.start(chosen) == (2, 4)
    assert (group["backend"], group["device_id"]) == ("nccl", torch.device("cuda", 2))
    group.clear()
    job = begin(EvalConfig(device=name))  # an evaluation's processes exchange two paths
    assert (job.shard, str(job.device)) == ((2, 4), "cuda:2")
    assert group == {"backend": "gloo", "timeout": distributed.PATIENCE}


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    in_torchrun(monkeypatch, 2, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there are 2 GPUs: --nproc_per_node 2"):
        device.choose_device("cuda")


@pytest.mark.parametrize(("name", "reason"), [
    ("mps", "MPS"), ("xpu", "XPU"), ("meta", "meta tensor"), ("warp", "Expected one of cpu")])
def test_an_accelerator_that_is_not_there_is_refused_with_its_reason(name, reason):
    module = getattr(torch, name, None)
    if getattr(module, "is_available", lambda: False)():
        pytest.skip(f"{name} is there")
    with pytest.raises(UserError, match=f"--device {name} is not available here .*{reason}.*auto or cpu"):
        device.choose_device(name)


def test_an_accelerator_without_exact_integers_is_refused(monkeypatch):
    exact = device.keyed_uniform
    noise = iter((exact, lambda *given: exact(*given) + 2.0**-24))
    monkeypatch.setattr(device, "keyed_uniform", lambda *given: next(noise)(*given))
    with pytest.raises(RuntimeError, match="64-bit integers"):
        device._try_arithmetic(CPU)


def test_distances_are_refused_where_there_is_no_float64(monkeypatch):
    empty = torch.empty

    def without(*size, dtype=None, **options):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return empty(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", without)
    assert device.choose_device("cpu") == CPU
    with pytest.raises(UserError, match=r"Cannot convert a MPS Tensor to float64 dtype.*: use auto or cpu"):
        device.choose_device("cpu", wide=True)


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_torchrun_refuses_what_it_cannot_train_on_together(name, monkeypatch):
    in_torchrun(monkeypatch, 0, 2)
    with pytest.raises(UserError, match=f"torchrun does not work with --device {name}"):
        distributed.start(torch.device(name))


def test_cudnn_tries_its_algorithms_in_training_alone(script, monkeypatch):
    import train_at_mnist

    seen, batches = [], Run.batches

    def watched(run, epoch):
        for batch in batches(run, epoch):
            seen.append(torch.backends.cudnn.benchmark)
            yield batch

    def validate(*given, **options):
        seen.append(torch.backends.cudnn.benchmark)
        return {"A_rob": 0.0}

    monkeypatch.setattr(Run, "batches", watched)
    monkeypatch.setattr(train_at_mnist, "held_out_accuracy", validate)
    script("train_at_mnist", *TINY)
    assert seen == [True, True, False] and not torch.backends.cudnn.benchmark


def test_the_parts_of_all_processes_make_one_share(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    others = torch.tensor([3, 1, 5])  # hits of A_nat and A_rob, rows
    monkeypatch.setattr(distributed, "total", lambda values: values + others)
    found = distributed.percent_of_all({"A_nat": 100 * (5 / 6), "A_rob": 100 * (2 / 6)}, 6, CPU)
    assert found == {"A_nat": 100 * (8 / 11), "A_rob": 100 * (3 / 11)}


def facts_of_a_gpu():
    with standin.StandinMode():
        return device.environment(device.choose_device("auto"))


@needs_standin
@pytest.mark.slow
def test_the_environment_names_what_is_behind_a_gpus_numbers():
    with standin_runs.child() as pool:
        facts = pool.submit(facts_of_a_gpu).result()
    assert (facts["device"], facts["hardware"], facts["capability"], facts["gpus"]) == (
        "cuda", "Stand-in", "9.0", 1)
    assert facts["cuda"] == torch.version.cuda and facts["cudnn"] and facts["tf32"] is False
