"""A training run: its folder and log, its steps and checkpoints, its end and its resumption."""
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from harness import checkpoint, distributed
from harness.datasets.batches import Dataset, to_unit, training_batches
from harness.device import choose_device, choose_dtype, command_line, environment, why_not_compile
from harness.errors import Collapsed, RunError, UserError
from harness.evaluation.chance import ClassCounts, collapsed_since
from harness.evaluation.metrics import Means, WeightStatistics
from harness.folder import claim_folder, write_csv, write_text
from harness.reporting import figures as plots
from harness.training.compilation import Compilation
from harness.training.first_layer import FirstLayer
from harness.training.precision import TrainingPrecision, bare, to_device
from harness.training.rows import Memory

CHECK_SECONDS = 1.0  # how often the host looks at the loss: for the bar, and for a value that is not finite


class Run:
    """One training run.  Use as a context: `with Run(cfg, data) as run:`; on Ctrl-C it says how to go on.

    The folder holds config.json, log.csv, last.pt and best.pt (with ema_decay last_ema.pt and best_ema.pt, with instance weights
    weights.csv too), and is never one that already holds something. Under torchrun every process has a Run, and the first one writes.
    """

    def __init__(self, cfg: object, data: Dataset):
        self.cfg, self.data = cfg, data
        self.script = Path(sys.modules[type(cfg).__module__].__file__).stem
        self.rank, self.world_size, self.device = distributed.start(choose_device(cfg.device))
        if cfg.batch_size < self.world_size:
            raise UserError(f"--batch_size {cfg.batch_size} is less than the {self.world_size} processes that share a batch")
        self.train, self.val = data.train.to(self.device), data.val.to(self.device)
        self.architecture: dict[str, object] = {}
        self.epoch, self.batch, self.rows, self.weight_rows = 0, 0, [], []
        self.at_chance_for: list[int] = []  # of every epoch: how many up to it were at chance without a break
        self.best = {"best": -1.0, "best_ema": -1.0}
        self.average: AveragedModel | None = None
        self.memories: dict[str, Memory] = {}
        self.batches_per_epoch = min(-(-len(self.train) // cfg.batch_size), cfg.max_batches or 10**9)
        self.started = time.monotonic()
        torch.manual_seed(cfg.seed)
        self.folder: Path | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit)) and self.folder and self.rank == 0:
            print(f"\nstopped after {self.epoch} of {self.cfg.epochs} epochs; go on with: {self.resume_command}", file=sys.stderr)
        if kind is None:
            distributed.wait()

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run, and with the other seeds where it is one of several."""
        several = (self.folder.parent / "config.json").exists()
        return f"python {self.script}.py --resume {shlex.quote(str(self.folder.parent if several else self.folder))}"

    def say(self, text: str) -> None:
        """Print, once for all processes, without tearing the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    # ---- folder ------------------------------------------------------------------------------------------------------------------

    def _make_folder(self) -> Path:
        folder = claim_folder(self.cfg, self.script)
        settings = dataclasses.asdict(self.cfg) | {"resume": None}
        facts = {"script": self.script, "command": command_line(), "image_shape": self.data.image_shape,
                 "num_classes": self.data.num_classes, "classes": list(self.data.classes), "training_images": len(self.train),
                 "environment": environment(self.device)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            saved = folder / "config.json"
            before = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
            write_text(saved, json.dumps(facts | before | settings, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {folder} ({error.strerror}): name another --out_dir") from error
        return folder

    # ---- model and steps ---------------------------------------------------------------------------------------------------------

    def build(self, build_model: Callable[..., nn.Module]) -> nn.Module:
        """The configured network for this data set: on the device, in the training precision, parallel under torchrun."""
        mean, std = self.data.channel_statistics() if self.cfg.normalize else (None, None)
        channels = self.data.image_shape[0]
        try:
            model = build_model(self.cfg.model, self.data.num_classes, channels, mean, std)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.architecture = {"name": self.cfg.model, "num_classes": self.data.num_classes, "in_channels": channels,
                             "mean": mean, "std": std}
        self.dtype = choose_dtype(self.cfg.precision, self.device, model)
        model = TrainingPrecision(to_device(model, self.device), self.dtype, self._compilation(), self.cfg.attack_view)
        return distributed.parallel(model)

    def _compilation(self) -> Compilation | None:
        """What the run is to try torch.compile with; None for not at all."""
        if self.cfg.compile == "auto":
            attack_steps = self.cfg.epochs * self.batches_per_epoch * getattr(self.cfg, "num_steps", getattr(self.cfg, "num_replays", 1))
            if why := why_not_compile(self.device, attack_steps):
                if self.device.type == "cuda":
                    self.say(f"torch.compile is not tried: {why} (--compile on tries it)")
                return None
        if self.cfg.compile == "off":
            return None
        return Compilation(self.cfg.compile == "on", self.cfg.graphs and self.device.type == "cuda", self.say,
                           partial(self.say, "torch.compile is tried on the first batch, which takes about a minute"))

    def first_layer(self, model: nn.Module) -> FirstLayer:
        """The first layer f0 of a model from `build`, in the training precision; its gradients wait for `update`."""
        return FirstLayer(TrainingPrecision(bare(model), self.dtype, None, False), to_unit(self.train.images[:1]))

    def remember(self, name: str, count: int, shape: tuple[int, ...] = ()) -> Memory:
        """`count` rows of `shape`, zeros at first, that the checkpoint holds under `name` and the processes share after every epoch."""
        self.memories[name] = Memory(count, shape, self.device)
        return self.memories[name]

    def places(self, x: Tensor) -> Tensor:
        """The places [B] of this process's batch `x` in the global batch."""
        return self.rank + self.world_size * torch.arange(len(x), device=self.device)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The epoch's batches x [B, C, H, W] in [0, 1], y [B] and index [B], behind a progress bar with the time left."""
        torch.manual_seed((self.cfg.seed * 100_003 + epoch) * 1_009 + self.rank)  # dropout: the same after a resumption
        self.means, self.weight_statistics, self.seconds = Means(), WeightStatistics(self.data.num_classes, self.device), time.monotonic()
        self.class_counts = ClassCounts(self.data.num_classes, self.device)
        self.bad_step = torch.full((), -1, device=self.device)
        self.lr = self.state["optimizer"].param_groups[0]["lr"]
        looked = self.seconds
        augmentation = {name: getattr(self.cfg, name) for name in ("crop_padding", "padding_mode", "flip")}
        extra = {"extra": self.data.extra, "extra_fraction": self.cfg.extra_fraction} if self.data.extra else {}
        source = training_batches(self.train, self.cfg.batch_size, self.cfg.seed, epoch, **augmentation, **extra,
                                  rank=self.rank, world_size=self.world_size)
        with tqdm(total=self.batches_per_epoch, desc=f"epoch {epoch}/{self.cfg.epochs}", unit="batch", leave=False,
                  disable=None if self.rank == 0 else True) as bar:
            for self.batch, (x, self.labels, index, self.share) in enumerate(source, 1):
                yield x, self.labels, index
                bar.update()
                if time.monotonic() - looked > CHECK_SECONDS:
                    looked = time.monotonic()
                    self._check_finite(epoch)
                    bar.set_postfix({name: f"{value:.3f}" for name, value in self.means.compute().items()}, refresh=False)
                if self.batch == self.batches_per_epoch:
                    break
        self._check_finite(epoch)
        self.seconds = time.monotonic() - self.seconds

    def ramp(self, epoch: int, epochs: float) -> float:
        """The fraction, from 0 to 1, of a linear rise over the first `epochs` epochs, at the current batch."""
        done = epoch - 1 + (self.batch - 1) / self.batches_per_epoch
        return min(1.0, done / epochs) if epochs else 1.0

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer, **metrics: Tensor) -> None:
        """One optimiser step on `loss`, the mean over this process's examples; `metrics`, [B] each, are averaged into the log.

        A loss that is not finite is noted on the device, and the run stops when the host next looks.
        """
        optimizer.zero_grad(set_to_none=True)
        (loss * self.share).backward()  # exactly 1 unless torchrun splits a batch unevenly
        self._update(loss, optimizer, metrics)

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer, **metrics: Tensor) -> None:
        """`step` without its backward pass, on the gradients that this process left in the parameters, `share` times those of a mean."""
        distributed.average_gradients(self.state["model"])
        self._update(loss, optimizer, metrics)

    def _update(self, loss: Tensor, optimizer: torch.optim.Optimizer, metrics: dict[str, Tensor]) -> None:
        if self.cfg.max_grad_norm:
            grad_norm = nn.utils.clip_grad_norm_(self.state["model"].parameters(), self.cfg.max_grad_norm)
            metrics["grad_norm"] = grad_norm.expand(len(self.labels))
        with self._warmed_up(optimizer):
            optimizer.step()
        if self.average:
            self.average.update_parameters(self.state["model"])
        with torch.no_grad():
            self.bad_step = torch.where((self.bad_step < 0) & ~torch.isfinite(loss), self.batch, self.bad_step)
            self.means.add(loss=loss.expand(len(self.labels)), **metrics)
            if "A_rob" in metrics:
                self.class_counts.add(metrics["A_rob"], self.labels)

    @contextmanager
    def _warmed_up(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """The optimiser at the learning rate of this batch: the schedule's, times a linear rise over the first lr_warmup_epochs."""
        done = self.epoch + self.batch / self.batches_per_epoch
        factor = min(1.0, done / self.cfg.lr_warmup_epochs) if self.cfg.lr_warmup_epochs else 1.0
        scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= factor
        yield
        for group, lr in zip(optimizer.param_groups, scheduled):
            group["lr"] = lr

    def over_all(self, weigh: Callable[..., Tensor], *arguments: object) -> Tensor:
        """The weights [B] of this process's examples where `weigh` sees the batch of all processes: a normalisation goes over all of it.

        Tensors among the arguments, one row an example, are gathered; everything else is handed on.
        """
        count = next(round(len(value) * self.world_size / self.share) for value in arguments if isinstance(value, Tensor))
        whole = [distributed.gather(value, count) if isinstance(value, Tensor) else (value, None) for value in arguments]
        own = next(rows for _, rows in whole if rows is not None)
        return weigh(*(value for value, _ in whole))[own]

    def log_weights(self, weights: Tensor, y: Tensor) -> None:
        """Take the instance weights [B] of a batch with labels y [B] into the epoch's distribution: a row of weights.csv."""
        self.weight_statistics.add(weights.detach(), y)

    def _check_finite(self, epoch: int) -> None:
        step = int(self.bad_step)
        if step >= 0:
            raise RunError(f"the loss is not finite at epoch {epoch}, step {step}: try --max_grad_norm 1 or a smaller --lr; "
                           f"what was saved before is intact in {self.folder}")

    # ---- epochs and checkpoints --------------------------------------------------------------------------------------------------

    def epochs(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> Iterator[int]:
        """The epochs still to be run, from 1, after making the run folder or taking up the last checkpoint of a resumed run."""
        last = Path(self.cfg.resume, "last.pt") if self.cfg.resume else None
        before = checkpoint.read(last) if last and last.exists() else {}
        if isinstance(done := before.get("epoch"), int) and done > self.cfg.epochs:
            raise UserError(f"--epochs {self.cfg.epochs}: {done} epochs of {self.cfg.resume} are done already")
        self.folder = Path(distributed.from_first(str(self._make_folder()) if self.rank == 0 else None))
        self.say(f"{self.script}: {len(self.train):,} training images of {self.data.name}, {len(self.val):,} held out; {self.device}, "
                 f"{str(self.dtype).removeprefix('torch.')}, seed {self.cfg.seed}\nrun folder: {self.folder}")
        self.state = {"model": bare(model), "optimizer": optimizer, "scheduler": scheduler, **self.memories}
        if self.cfg.ema_decay:  # begins as a copy after the first step
            self.average = AveragedModel(bare(model), multi_avg_fn=get_ema_multi_avg_fn(self.cfg.ema_decay), use_buffers=True)
            self.state["ema"] = self.average
        if before:
            self._load(before)
            self.say(f"going on after epoch {self.epoch}")
            if self.at_chance_for and self.cfg.stop_on_collapse:
                self._judge()
        first = self.epoch + 1
        yield from range(first, self.cfg.epochs + 1)
        self._draw()
        done = "finished" if first <= self.cfg.epochs else "already finished"
        time_taken = f"{self.epoch} epochs, {(time.monotonic() - self.started) / 60:.1f} min"
        if since := collapsed_since(self.at_chance_for, self.cfg.epochs, ended=True):
            self.say(f"{done}, COLLAPSED: {time_taken}; {self._collapse(since)}; {self._what_is_at_chance()}")
        else:
            self.say(f"{done}: {time_taken}; last.pt, and best.pt by A_rob on held-out images, in {self.folder}")

    def end_epoch(self, model: nn.Module, validate: Callable[[nn.Module, object], dict[str, float]]) -> None:
        """Measure on the held-out images, log, and save last.pt, and best.pt when the held-out A_rob is the highest so far."""
        averages = self.means.compute(distributed.total)
        weights = self.weight_statistics.compute(distributed.total)
        at_chance = self.class_counts.at_chance(distributed.total)
        self.at_chance_for.append(1 + (self.at_chance_for or [0])[-1] if at_chance else 0)
        for memory in self.memories.values():
            memory.share()
        self.epoch += 1
        if self.rank == 0:
            networks = [bare(model), *([self.average.module] if self.average else [])]
            measured, averaged = self._validate(networks, validate)
            images = min(len(self.train), self.batches_per_epoch * self.cfg.batch_size)
            row = {"epoch": self.epoch, "lr": self.lr}
            row |= {f"train_{name}": 100 * value if name.startswith("A_") else value for name, value in averages.items()}
            row["epochs_at_chance"] = self.at_chance_for[-1]
            row |= {f"val_{name}": value for name, value in measured.items()} | {f"val_ema_{name}": v for name, v in averaged.items()}
            row |= {"seconds": round(self.seconds, 2), "images_per_second": round(images / self.seconds, 1)}
            self.rows.append(row)
            self.weight_rows += [{"epoch": self.epoch} | weights] if weights else []
            self._save({"best": measured.get("A_rob", float(self.epoch)), "best_ema": averaged.get("A_rob", float(self.epoch))})
            self._report(row)
        self._judge()

    def _validate(self, networks: list[nn.Module], validate: Callable[[nn.Module, object], dict[str, float]]) -> list[dict[str, float]]:
        """The measures of up to two networks on the held-out images, in float32."""
        if not len(self.val):
            return [{}, {}]
        found = [validate(TrainingPrecision(network, torch.float32, None, self.cfg.attack_view), self.val) for network in networks]
        return [*found, {}][:2]

    def _draw(self) -> None:
        if self.rows and self.rank == 0:
            plots.redraw_run(self.folder)

    def _judge(self) -> None:
        """Say that the run has collapsed, or has recovered, when it has just happened.  Raises Collapsed with stop_on_collapse."""
        before, since = (collapsed_since(column, self.cfg.epochs, self.cfg.lr_warmup_epochs)
                         for column in (self.at_chance_for[:-1], self.at_chance_for))
        if since and self.cfg.stop_on_collapse:
            self._draw()
            raise Collapsed(f"stopped after epoch {self.epoch}: {self._collapse(since)}; {self._what_is_at_chance()}")
        if since and not before:
            self.say(f"COLLAPSED: {self._collapse(since)} (--stop_on_collapse ends such a run)")
        elif before and not since:
            self.say(f"above chance again after {self.epoch - before} epochs at chance")

    def _collapse(self, since: int) -> str:
        """Since when, and what to try."""
        clip = f"a smaller --max_grad_norm than {self.cfg.max_grad_norm:g}" if self.cfg.max_grad_norm else "--max_grad_norm 1"
        guess = f"a guess among {self.data.num_classes} classes"
        return (f"the network has been at chance since epoch {since} (under attack it knows no more of its training images than {guess}); "
                f"start anew with {clip}, a smaller --lr or a longer --epsilon_warmup_epochs")

    def _what_is_at_chance(self) -> str:
        """Which of the checkpoints were saved in an epoch at chance, in words."""
        best = max(self.rows, key=lambda row: row.get("val_A_rob", row["epoch"])) if self.rows else {}
        both = best.get("epochs_at_chance", 0) > 0
        return f"last.pt{' and best.pt' if both else ''} in {self.folder} {'are' if both else 'is'} at chance"

    def _save(self, scores: dict[str, float]) -> None:
        better = {name: score > self.best[name] for name, score in scores.items()}
        self.best = {name: max(score, self.best[name]) for name, score in scores.items()}
        about = {"format": checkpoint.FORMAT, "architecture": self.architecture, "epoch": self.epoch, "script": self.script,
                 "epochs_at_chance": self.at_chance_for[-1],
                 "dataset": self.data.name, "data_dir": str(self.cfg.data_dir), "seed": self.cfg.seed,
                 "threat_model": {"norm": "linf", "epsilon": self.cfg.epsilon},
                 "config": {"script": self.script} | dataclasses.asdict(self.cfg) | {"resume": None}}
        parts = {name: part.state_dict() for name, part in self.state.items()}
        contents = about | parts | {"best": self.best, "log": self.rows, "weight_log": self.weight_rows}
        if self.average:
            averaged = about | {"model": self.average.module.state_dict()}
            for name in ("last_ema", *(["best_ema"] if better["best_ema"] else [])):
                checkpoint.save(self.folder / f"{name}.pt", averaged)
        if better["best"]:
            checkpoint.save(self.folder / "best.pt", contents)
        checkpoint.save(self.folder / "last.pt", contents)  # the one that a resumed run starts from: the last to be written
        write_csv(self.folder / "log.csv", self.rows)
        if self.weight_rows:
            write_csv(self.folder / "weights.csv", self.weight_rows)

    def _load(self, contents: dict) -> None:
        try:
            for name, part in self.state.items():
                part.load_state_dict(contents[name])
            self.epoch, self.best = contents["epoch"], contents["best"]
            self.rows, self.weight_rows = contents["log"], contents["weight_log"]
            self.at_chance_for = [row.get("epochs_at_chance", 0) for row in self.rows]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / 'last.pt'} does not continue this run ({str(error).splitlines()[0][:150]})") from error

    def _report(self, row: dict[str, float]) -> None:
        parts = [f"{name} {value:.2f} %" if "A_" in name else f"{name.removeprefix('train_')} {value:.4f}"
                 for name, value in row.items() if name.startswith(("train_", "val_"))]
        left = row["seconds"] * (self.cfg.epochs - self.epoch)
        self.say(f"epoch {self.epoch:>3}/{self.cfg.epochs}  {'  '.join(parts)}  {row['seconds']:.1f} s  "
                 f"{row['images_per_second']:,.0f} images/s" + (f"  {left / 60:.1f} min left" if left else ""))
