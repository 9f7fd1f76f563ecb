"""What every training run takes from the command line beside the hyperparameters of its method."""
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters that a run itself reads.  The Config of each script gives their defaults."""

    model: str
    normalize: bool
    epsilon: float
    epochs: int
    batch_size: int
    max_grad_norm: float
    lr_warmup_epochs: float
    ema_decay: float
    crop_padding: int
    padding_mode: Literal["constant", "reflect"]
    flip: bool
    seed: int


@dataclass(frozen=True)
class RunOptions(Hyperparameters):
    """What is no hyperparameter.  Each Config inherits it; --help lists it after the script's own fields."""

    seeds: tuple[int, ...] = ()         # train once with each of these seeds, in out_dir/seed<k>
    stop_on_collapse: bool = False      # end with exit code 1 once the network is at chance and stays there
    data_dir: str = "data"              # folder of the data sets
    out_dir: str | None = None          # run folder; default runs/<script>/<time>
    resume: str | None = None           # run folder to continue
    device: str = "auto"                # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 where it is faster
    attack_view: bool = True          # attack a faster form of the network, where one can be made and checked
    max_batches: int | None = None      # stop every epoch after this many batches, for a trial run
    stop_after_minutes: float = 0       # stop, to be resumed, where one more epoch would end later; 0 is off


@dataclass(frozen=True)
class CompileOptions:
    """How to use torch.compile, for a script whose training step can be compiled."""

    compile: bool = False               # compile the attack's step and the network's passes (torch.compile)
    graphs: bool = False                # with compile, on a GPU: replay each compiled piece as a CUDA graph
