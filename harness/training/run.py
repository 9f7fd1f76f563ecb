"""A training run: its network, its folder, its epochs and its end."""
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from harness import distributed
from harness.checkpoint import built
from harness.datasets.batches import Dataset, batch_places, to_unit
from harness.datasets.split import Split
from harness.device import choose_device, choose_dtype
from harness.errors import Collapsed, UserError
from harness.folder import held
from harness.reporting import figures
from harness.training.average import Average
from harness.training.batch import load_batches
from harness.training.collapse import CollapseWatch, checkpoints_at_chance
from harness.training.compilation import Compilation, compilation_of
from harness.training.first_layer import FirstLayer
from harness.training.options import RunOptions
from harness.training.precision import TrainingPrecision, bare
from harness.training.rows import PersistentRows
from harness.training.saving import RunFolder, make_folder, read_start, summary_of, update_config
from harness.training.steps import Steps
from harness.training.trial import trial_pass

STATISTICS_IMAGES = 10_000  # of the epoch's, for BatchNorm of averaged weights


class Run(Steps):
    """One training run, used as a context: `with Run(cfg, data) as run:`.  On Ctrl-C it says how to continue.

    The folder holds config.json, log.csv, last.pt and best.pt; with ema_decay also last_ema.pt and
    best_ema.pt; with instance weights also weights.csv. A new run never takes a folder that already holds
    something. Under torchrun every process has a Run, and the first one writes.
    """

    def __init__(self, cfg: RunOptions, data: Dataset):
        self.cfg = cfg
        self.data = data
        self.script = Path(str(sys.modules[type(cfg).__module__].__file__)).stem
        self.device = choose_device(cfg.device)
        self.rank, self.world_size = distributed.start(self.device)
        if data.num_classes < 2:
            raise UserError(f"{data.name} has one class, {data.classes[0]}: there is nothing to tell apart")
        if cfg.batch_size < self.world_size:
            raise UserError(f"--batch_size {cfg.batch_size} is less than the {self.world_size} processes "
                            "that share a batch")
        self.train = data.train.to(self.device)
        self.val = data.val.to(self.device)
        batches = len(batch_places(len(self.train), cfg.batch_size, self.world_size))
        self.batches_per_epoch = min(batches, cfg.max_batches or batches)
        self.epoch = 0
        self.architecture: dict[str, object] = {}
        self.persistent: dict[str, PersistentRows] = {}
        self.average = None
        self.compilation: Compilation | None = None
        self.collapse = CollapseWatch(cfg, data.num_classes)
        self.holding = ExitStack()
        self.started = time.monotonic()
        torch.manual_seed(cfg.seed)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        ended = isinstance(error, (KeyboardInterrupt, SystemExit, OSError))
        if ended and hasattr(self, "files") and self.rank == 0:
            print(f"\nstopped after {self.epoch} of {self.cfg.epochs} epochs; "
                  f"go on with: {self.files.resume_command}", file=sys.stderr)
        if kind is None:
            distributed.wait()
        self.holding.close()

    def say(self, text: str) -> None:
        """Print, once for all processes, without tearing the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    # ---- model ---------------------------------------------------------------------------------------------

    def build(self, build_model: Callable[..., nn.Module]) -> nn.Module:
        """The configured network for this data set: on the device, in its precision, parallel in torchrun."""
        mean, std = self.data.channel_statistics() if self.cfg.normalize else (None, None)
        channels = self.data.image_shape[0]
        model = built(build_model, self.cfg.model, self.data.num_classes, channels, mean, std)
        self.architecture = {"name": self.cfg.model, "num_classes": self.data.num_classes,
                             "in_channels": channels, "mean": mean, "std": std}
        self.dtype = choose_dtype(self.cfg.precision, self.device, model)
        model = model.to(self.device).train()
        batch = self.train.images[:self.cfg.batch_size // self.world_size]
        trial = trial_pass(model, batch, self.data.num_classes, dtype=self.dtype, report=self.say)
        if trial.unused and self.world_size > 1:
            self.say(f"note: {len(trial.unused)} parameters are not used in a pass, {trial.unused[0]} first: "
                     "torchrun looks for them in every step")
        self.compilation = compilation_of(self.cfg, self.device, self.say)
        model = TrainingPrecision(model, self.dtype, self.compilation, self.cfg.attack_view)
        return distributed.parallel(model, find_unused=bool(trial.unused))

    def first_layer(self, model: nn.Module) -> FirstLayer:
        """The first layer f0 of a model from `build`, in its precision; its gradients wait for `update`."""
        network = TrainingPrecision(bare(model), self.dtype, None, False)
        return FirstLayer(network, to_unit(self.train.images[:1]))

    def persistent_rows(self, name: str, count: int, shape: tuple[int, ...] = ()) -> PersistentRows:
        """`count` rows of `shape`, zeros at first, that the checkpoint holds as `name`."""
        self.persistent[name] = PersistentRows(count, shape, self.device)
        return self.persistent[name]

    # ---- epochs --------------------------------------------------------------------------------------------

    def epochs(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> Iterator[int]:
        """The epochs to run, from 1: all of them in a new folder, or those after the last checkpoint."""
        last = read_start(self.cfg, self.data)
        folder = make_folder(self.cfg, self.script, self.data, self.device) if self.rank == 0 else None
        folder = distributed.from_first(folder)
        self._hold(folder)
        self.files = RunFolder(folder, self.script, self.cfg, self.data)
        self.say(f"{self.script}: {len(self.train):,} training images of {self.data.name}, {len(self.val):,} "
                 f"held out; {self.device}, {str(self.dtype).removeprefix('torch.')}, seed {self.cfg.seed}\n"
                 f"run folder: {self.files.path}")
        self.state = {"model": bare(model), "optimizer": optimizer, "scheduler": scheduler}
        self.state |= self.persistent
        if self.cfg.ema_decay:  # begins as a copy after the first step
            self.state["ema"] = self.average = Average(bare(model), self.cfg.ema_decay)
        if last:
            self.epoch, self.collapse.at_chance_for = self.files.load(last, self.state)
            whose = "" if self.cfg.resume else f", the burn-in of {self.cfg.burn_in_from}"
            self.say(f"going on after epoch {self.epoch}{whose}")
        if self.cfg.resume and self.rank == 0:
            update_config(self.cfg, folder)
            self._stop_if_collapsed()
        first = self.epoch + 1
        for epoch in range(first, self.cfg.epochs + 1):
            began = time.monotonic()
            yield epoch
            if epoch < self.cfg.epochs and self._is_time_up(time.monotonic() - began):
                self._draw()
                self.say(f"stopped after {epoch} of {self.cfg.epochs} epochs, as --stop_after_minutes "
                         f"{self.cfg.stop_after_minutes:g} says; go on with: {self.files.resume_command}")
                return
        self._finish("finished" if first <= self.cfg.epochs else "already finished")

    def _is_time_up(self, seconds: float) -> bool:
        """Whether one more epoch that takes so long would end too late; the same in every process."""
        if not self.cfg.stop_after_minutes:
            return False
        late = time.monotonic() - self.started + seconds > 60 * self.cfg.stop_after_minutes
        return distributed.from_first(late)

    def _hold(self, folder: Path) -> None:
        """Keep every other process out of the run's folder, until this run ends."""
        try:
            if self.rank == 0:
                self.holding.enter_context(held(folder))
        except BlockingIOError:
            raise UserError(f"another process trains in {folder} at this moment") from None

    def end_epoch(self, model: nn.Module, validate: Callable[[nn.Module, Split], dict[str, float]]) -> None:
        """Measure on the held-out images, log, and save last.pt; save best.pt if that A_rob is the best."""
        training = self.meters.log_columns()
        weights = self.meters.weights.compute(distributed.total)
        at_chance = self.meters.class_counts.at_chance(distributed.total)
        self.collapse.add(at_chance and not self.cfg.max_batches)  # a trial run learns nothing: no collapse
        for rows in self.persistent.values():
            rows.synchronize()
        self.epoch += 1
        if self.average:
            source = load_batches(self.data, self.train, self.cfg, self.epoch, rank=0, world_size=1)
            count = min(self.batches_per_epoch, -(-STATISTICS_IMAGES // self.cfg.batch_size))
            self.average.estimate_statistics((batch.x for batch in islice(source, count)), self.dtype)
        networks = [bare(model), *([self.average.module] if self.average else [])]
        measured, averaged = self._validate(networks, validate)
        if self.rank == 0:
            images = min(len(self.train), self.batches_per_epoch * self.cfg.batch_size)
            row = {"epoch": self.epoch, "lr": self.lr, **training}
            row |= {"epochs_at_chance": self.collapse.at_chance_for[-1]}
            row |= {f"val_{name}": value for name, value in measured.items()}
            row |= {f"val_ema_{name}": value for name, value in averaged.items()}
            row |= {"seconds": round(self.seconds, 2), "images_per_second": round(images / self.seconds, 1)}
            self.files.add_rows(row, weights)
            self.files.about["compiled"] = self.compilation.used() if self.compilation else []
            scores = {"best": measured.get("A_rob", float(self.epoch)),
                      "best_ema": averaged.get("A_rob", float(self.epoch))}
            self.files.save(self.architecture, self.state, self.average, scores)
            self.say(summary_of(row, self.cfg.epochs))
        self._stop_if_collapsed()
        if news := self.collapse.news():
            self.say(news)

    def _validate(self, networks: list[nn.Module],
                  validate: Callable[[nn.Module, Split], dict[str, float]]) -> list[dict[str, float]]:
        """What up to two networks do on the held-out images, in float32; every process takes its part.

        They have the first process's buffers from here on, as they have after a stop.
        """
        if not len(self.val):
            return [{}, {}]
        part = self.val
        if len(part) >= self.world_size:
            part = part[slice(self.rank, None, self.world_size)]
        found = []
        for network in networks:
            distributed.share_buffers(network)
            model = TrainingPrecision(network, torch.float32, None, self.cfg.attack_view)
            found.append(distributed.percent_of_all(validate(model, part), len(part), self.device))
        return [*found, {}][:2]

    def _stop_if_collapsed(self) -> None:
        """Raise Collapsed for a collapsed run with stop_on_collapse."""
        since = self.collapse.since()
        if since and self.cfg.stop_on_collapse:
            self._draw()
            which = checkpoints_at_chance(self.files.rows, self.files.path)
            which = distributed.from_first(which)  # the others wait here until the first one has saved
            raise Collapsed(f"stopped after epoch {self.epoch}: {self.collapse.describe(since)}; {which}")

    def _finish(self, done: str) -> None:
        self._draw()
        minutes = (time.monotonic() - self.started) / 60
        taken = f"{self.epoch} epochs, {minutes:.1f} min"
        if since := self.collapse.since(ended=True):
            self.say(f"{done}, COLLAPSED: {taken}; {self.collapse.describe(since)}; "
                     f"{checkpoints_at_chance(self.files.rows, self.files.path)}")
            if self.cfg.stop_on_collapse:
                raise Collapsed(f"the run has ended at chance, where it has been since epoch {since}")
        else:
            self.say(f"{done}: {taken}; last.pt, and best.pt by A_rob on held-out images, "
                     f"in {self.files.path}")

    def _draw(self) -> None:
        if self.files.rows and self.rank == 0:
            figures.redraw_run(self.files.path)
