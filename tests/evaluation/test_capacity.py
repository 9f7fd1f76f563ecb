"""harness/evaluation/capacity.py: how many images fit, by fake and by real memory;
the evaluation that chooses for itself."""
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.config import run_script
from harness.datasets.split import Split
from harness.device import free_memory, peak_memory
from harness.evaluation import capacity
from harness.evaluation.capacity import FASTEST_ON_CPU, PROBE, fitting_batch_size
from harness.evaluation.options import EvalConfig
from harness.training.precision import TrainingPrecision
from harness.training.trial import trial_pass
from models import build_model
from models.wide_resnet import WideResNet

IN_THE_WORDS_OF = (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory"),
                   RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
                   RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def split_of(count, device="cpu"):
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8, device=device)
    return Split(images, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def lenet(device="cpu"):
    with torch.device(device):
        return build_model("lenet", 10, 1).eval()


@pytest.mark.parametrize(("each", "free", "expected"), (
    (1000, 2 * 1000 * 6400, 6400), (1000, 2 * 1000 * 6431, 6400), (1000, 2 * 1000 * 31, 31), (1000, 10, 1),
    (0, 10**12, 100_000)))
def test_half_of_an_accelerators_memory_in_whole_multiples(each, free, expected):
    found = fitting_batch_size(lenet("meta"), split_of(100_000, "meta"), free=lambda device: free,
                               peak=lambda device, work: each * PROBE)
    assert found == expected and (found < PROBE or found % PROBE == 0)


@pytest.mark.parametrize("error", IN_THE_WORDS_OF)
@pytest.mark.parametrize(("holds", "expected"),
                         ((10**9, 6400), (6399, 3200), (1600, 1600), (100, 96), (33, 32), (20, 16), (3, 2)))
def test_a_batch_that_does_not_fit_after_all_is_halved(holds, expected, error, monkeypatch):
    class Full(nn.Module):  # as an accelerator whose memory others use too
        def forward(self, x):
            if len(x) > holds:
                raise error
            return x.flatten(1)[:, :10]

    class OnAGpu:
        images = SimpleNamespace(device=torch.device("cuda"))

        def __len__(self):
            return 100_000

    monkeypatch.setattr(capacity, "release_memory", lambda device: None)
    monkeypatch.setattr(capacity, "input_gradient", lambda model, images, count=PROBE: model(
        torch.zeros(count, 1, 4, 4)))
    assert fitting_batch_size(Full(), OnAGpu(), free=lambda device: 2 * 1000 * 6400,
                              peak=lambda device, work: work() is None or 1000 * PROBE) == expected


@pytest.mark.parametrize("error", IN_THE_WORDS_OF)
def test_a_script_whose_accelerator_is_full_ends_in_one_line(error, monkeypatch, capsys):
    class Full(nn.Linear):
        def forward(self, x):
            raise error

    def main(cfg):
        trial_pass(Full(1, 1), split_of(8).images, 10)

    monkeypatch.setattr("sys.argv", ["eval_mnist.py"])
    with pytest.raises(SystemExit):
        run_script(main, EvalConfig)
    said = capsys.readouterr().err
    assert "the accelerator's memory is full: try a smaller --batch_size" in said and said.count("\n") == 1


def test_any_other_error_of_the_trial_is_not_hidden():
    def fails(device, work):
        raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")

    with pytest.raises(RuntimeError, match="EXECUTION"):
        fitting_batch_size(lenet(), split_of(3), peak=fails)


def test_on_a_cpu_no_more_than_is_fast_and_no_more_than_there_are():
    def found(count, free):
        return fitting_batch_size(lenet(), split_of(count), free=lambda device: free,
                                  peak=lambda device, work: 1000 * PROBE)

    assert found(10_000, 10**12) == FASTEST_ON_CPU and found(10_000, 2 * 1000 * 70) == 64
    assert (fitting_batch_size(lenet(), split_of(500), 5, lambda device: 2 * 1000 * 5 * 70,
                               lambda device, work: 1000 * PROBE) == 64)
    assert found(40, 10**12) == 64 and found(1, 10**12) == PROBE


def test_the_pass_that_is_measured_is_that_of_an_attack_step():
    model, seen = lenet(), []
    model.register_forward_hook(lambda module, inputs, out: seen.append(
        (inputs[0].shape, inputs[0].requires_grad,
         any(parameter.requires_grad for parameter in module.parameters()))))
    gradient = capacity.input_gradient(model, split_of(5).images)
    assert gradient.shape == (PROBE, 1, 28, 28) and seen == [((PROBE, 1, 28, 28), True, False)]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_hidden_gradient_takes_no_memory():
    class Hidden(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :10]

    assert fitting_batch_size(Hidden(), split_of(3)) == PROBE


def test_real_memory_grows_with_the_network():
    device = torch.device("cpu")
    assert 0 < free_memory(device) < 2**50
    networks = [build_model(name, 10, 1).eval() for name in ("lenet", "small_cnn")]
    small, large = (peak_memory(device, partial(capacity.input_gradient, model, split_of(8).images))
                    for model in networks)
    assert PROBE * 28 * 28 * 4 < small < large < 2**30


def test_saved_memory_is_counted_once():
    x = torch.ones(1000, requires_grad=True)

    def work():
        y = x.exp()             # kept for the backward pass: 4,000 bytes
        (y * y).sum().backward()  # twice the same

    assert peak_memory(torch.device("cpu"), work) == 4000


def test_an_evaluation_that_chooses_has_the_verdicts_of_any_other(script, monkeypatch):
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), "net.pt")
    flags = ("--checkpoint", "net.pt", "--arch", "lenet", "--dataset", "digits", "--num_examples", 40,
             "--num_steps", 2, "--num_restarts", 1, "--epsilon", 0.01, "--alphas", 1)
    monkeypatch.setattr(capacity, "FASTEST_ON_CPU", 32)
    for out, extra in (("chosen", ()), ("given", ("--batch_size", 40)), ("strong", ("--attacks", "cw"))):
        script("eval_mnist", *flags, *extra, "--out", f"{out}.json")
    chosen, given, strong = (json.loads(Path(f"{out}.json").read_text())
                             for out in ("chosen", "given", "strong"))
    assert chosen["batch_size"] == strong["batch_size"] == 32 and given["batch_size"] == 40
    assert (chosen["A_rob"] == given["A_rob"] == strong["A_rob"]
            and chosen["class_accuracy"] == given["class_accuracy"])


def kept_by(model, x):
    """The logits, and the bytes of the tensors that autograd keeps of a training pass."""
    kept = {}  # storage -> itself, so that its number is not given to another

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(x)
    return logits, sum(storage.nbytes() for storage in kept.values())


def test_wide_resnet_trains_on_a_gpu_of_24_gb():
    """A count from shapes, for WRN-34-10 at batch 128; the attack's view needs numbers, and keeps as much."""
    with FakeTensorMode():
        model = build_model("wrn34_10", 10, 3)
        model = TrainingPrecision(model, torch.bfloat16, None, attack_view=False)
        logits, a_pass = kept_by(model, torch.empty(128, 3, 32, 32))
        parameters = sum(parameter.numel() for parameter in model.parameters())
    assert logits.shape == (128, 10) and parameters == 46_160_474
    # a block keeps the inputs of its two BatchNorms and the outputs of its two ReLUs, in bfloat16, a stage
    # has five of them; the shortcuts' inputs are among these; the weights once more, in bfloat16
    maps = 4 * 5 * 128 * 1024 * (160 + 320 / 4 + 640 / 16) * 2
    assert maps < a_pass - 2 * parameters < 1.05 * maps
    gibibytes = a_pass / 2**30
    assert (round(gibibytes, 1), round(2 * gibibytes, 1)) == (1.5, 2.9)  # AT; TRADES, with two passes
    # weights, gradients, momentum in float32: a quarter of the card is not in use by half
    assert 2 * a_pass + 12 * parameters < 24e9 / 4


def test_the_attack_view_keeps_no_more_for_the_training_step():
    torch.manual_seed(0)
    network, x = WideResNet(16, 1, 10, 3).train(), torch.rand(2, 3, 32, 32)
    plain, seen = (TrainingPrecision(network, torch.bfloat16, None, view) for view in (False, True))
    seen(x)  # makes the form
    assert kept_by(seen, x)[1] <= kept_by(plain, x)[1] and seen.view.used
