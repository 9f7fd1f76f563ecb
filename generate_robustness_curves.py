"""Robustness curves: R(t), the share of points whose smallest adversarial perturbation has norm at most t.

    d_p(x, y) = 0 where f(x) != y, else min { ||x' - x||_p : x' in [0, 1]^D, f(x') != y },    p in inf, 2, 1
    R(t) = #{i : d_p(x_i, y_i) <= t} / n

After Risse, Göpfert & Göpfert, "How to Compare Adversarial Robustness of Classifiers from a Global
Perspective" (ICANN 2021). An attack's distance is an upper bound of d, so the curve is a lower bound of R. A
point without an adversarial example is censored. AutoAttack then checks the curve at a few radii: what it
finds nearer than the curve says is the curve's slack.

compute     distances of models: distances.npz, curves.csv, summary.json and figures (--resume goes on)
compare     models at the same points: crossings, bands, McNemar's tests, one norm against another
exact       l_inf distances of small ReLU networks with proof, from adversaries (compute --adversaries)
distances   how far apart the classes of a data set are, in exact integers
surface     robust accuracy over size and the preference for small margins (Zeng et al., AAAI 2021)
budget      accuracy when the mean distance of the points is limited, not each one's (Wasserstein)
figures     draw again from stored results, with --paper the figures of the paper too

    python generate_robustness_curves.py --dataset mnist --model_path model.mat --nn_type cnn --norms 2 1 inf
    python generate_robustness_curves.py compute --model runs/at runs/trades --n_points 1000 --out runs/curves
    python generate_robustness_curves.py compare --results runs/curves
    python generate_robustness_curves.py surface --results runs/curves
    python generate_robustness_curves.py budget --results runs/curves --orders 1 2
    python generate_robustness_curves.py exact --results runs/curves --time_limit 60
    python generate_robustness_curves.py distances --dataset mnist
    python generate_robustness_curves.py figures --results runs/curves --paper
"""
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.autoattack import autoattack
from attacks.bim import bim_bisection
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from attacks.polish import polish
from attacks.pool import BUDGETS, minimal_distances
from curves import budget as budgets
from curves import check as checks
from curves import exact as proofs
from curves import output, published, store
from curves import surface as surfaces
from curves.canvas import Look
from curves.class_distances import class_distances
from curves.figures import draw_curves
from curves.measure import (
    Candidates,
    look_at,
    measure_pending,
    nearest_of_another_class,
    predicted,
)
from curves.models import about_of, chain, names_of, open_network, reopen
from curves.paper import draw_paper
from curves.points import choose, load_split, pick
from curves.records import Found, read_records
from harness.config import run_script
from harness.datasets.split import Split
from harness.device import choose_device
from harness.errors import UserError
from harness.evaluation.capacity import fitting_batch_size
from harness.evaluation.predictions import BatchInvariant
from harness.evaluation.report import dumps
from harness.folder import check_free, write_text
from losses.margin import margin_weights
from models import build_model

SCRIPT = "generate_robustness_curves"
CHECK = 1  # stream of the check's random numbers
Command = Literal["compute", "compare", "exact", "distances", "surface", "budget", "figures"]


@dataclass(frozen=True)
class Config:
    command: Command = "compute"         # may stand first, without --command
    model: tuple[str, ...] = ()          # compute: checkpoints, run folders or .mat files; also --model_path
    arch: str | None = None              # network of foreign checkpoints: a model's name, or file.py:callable
    ignore_extra: bool = False           # leave out parameters of a checkpoint that the network lacks
    nn_type: Literal["cnn", "fc1"] | None = None  # kind of a .mat network, compared with what its keys say
    dataset: str | None = None           # data set, folder, mat:FILE or npz:FILE; default: the checkpoint's
    data_dir: str | None = None          # folder of the data sets; default: the checkpoint's, or data
    split: Literal["test", "train"] = "test"  # split of the data set
    n_points: int | None = None          # number of points, from the first on; -1 or none: all
    indices: str | None = None           # text file with the positions of the points to take
    norms: tuple[Literal["inf", "2", "1"], ...] = ("inf", "2", "1")  # norms of the perturbation
    budget: Literal["fast", "standard", "strong", "original"] = "standard"  # pool; original: PGD bisection
    check_radii: int = 5                 # radii at which AutoAttack checks the curve; 0: it is not checked
    check_points: int = 100              # random points that are checked
    num_starts: int = 2000               # images of other classes among which attacks look for a start
    records: tuple[str, ...] = ()        # RESULT.record/last of eval_*.py --save_adversaries: candidates too
    adversaries: bool = False            # keep the adversarial examples in distances.npz
    certify: Literal["none", "crown"] = "none"  # lower bounds: CROWN, for chains of affine maps and ReLUs
    rel_gap: float = 1e-4                # exact: a point is closed when upper / lower <= 1 + rel_gap
    time_limit: float = 60.0             # exact: seconds per point; one not closed by then is open
    results: tuple[str, ...] = ()        # compare, exact, surface, budget, figures: what compute wrote
    thresholds_linf: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 0.3)  # l_inf sizes tested, pixels in [0, 1]
    thresholds_l2: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)  # l_2 sizes, pixels in [0, 1]
    thresholds_l1: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)  # l_1 sizes, pixels in [0, 1]
    confidence: float = 0.95             # confidence level of bands and intervals
    band: Literal["dkw", "cp"] = "dkw"   # simultaneous (DKW) or point-wise (Clopper-Pearson)
    num_resamples: int = 2000            # compare, budget: resamples of the bootstrap
    epsilons: tuple[float, ...] = tuple(k / 40 for k in range(17))  # surface: l_inf sizes, pixels in [0, 1]
    alphas: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)  # surface: attacker's preference for small margins
    num_steps: int = 40                  # surface: PGD steps
    orders: tuple[float, ...] = (1.0, 2.0)  # budget: p of the mean (mean_i d_i^p)^(1/p); p = inf is added
    mean_budgets: tuple[float, ...] = ()  # budget: means, pixels in [0, 1]; none: up to the largest distance
    units: Literal["raw", "255"] = "raw"  # units of the axes: pixels in [0, 1] or grey levels
    save: bool = True                    # write the published system's JSON too
    plot: bool = True                    # draw the figures
    paper: bool = False                  # figures: the paper's as well
    format: tuple[Literal["png", "pdf", "svg"], ...] = ("png", "pdf")  # file formats of the figures
    batch_size: int | None = None        # points at a time, changes distances by rounding; default: what fits
    seed: int = 0                        # seed of random starts, resamples and orders
    out: str | None = None               # folder to write; default: runs/generate_robustness_curves/<time>
    resume: str | None = None            # compute, exact: folder of the computation to continue
    device: str = "auto"                 # auto, cpu, or an accelerator by its name in torch

    @property
    def out_dir(self) -> str | None:
        """The folder to write, as `harness.folder` calls it."""
        return self.out

    @property
    def chosen_norms(self) -> tuple[str, ...]:
        """The norms by the names that files and functions know them by."""
        return tuple(published.NORMS[norm] for norm in dict.fromkeys(self.norms))

    @property
    def look(self) -> Look:
        """How results are shown."""
        thresholds = {"linf": self.thresholds_linf, "l2": self.thresholds_l2, "l1": self.thresholds_l1}
        return Look(self.confidence, self.band, thresholds, self.units, self.format, self.plot)


# ---- the attacks -------------------------------------------------------------------------------------------

def attack_pool(model: nn.Module, cfg: Config, results: store.Results, others: tuple[Tensor, Tensor],
                found_before: dict[str, Found], x: Tensor, y: Tensor, index: Tensor) -> Candidates:
    """The closest of all that a budget's attacks find; results.about learns which, and their gradients.

    others: images and the classes that the model gives them, from which attacks begin as well; found_before:
    of evaluations. The budget "original" is the published system's l_inf attack, measured in every norm.
    """
    if cfg.budget == "original":
        results.about |= {"attacks": ["bim bisection"], "gradients": {"bim bisection": 40 * 41}}
        return Candidates({"linf": bim_bisection(model, x, y)[0]}, {"linf": torch.zeros_like(y)})
    found = minimal_distances(model, x, y, norms=results.norms, budget=cfg.budget,
                              keys=example_keys(index, cfg.seed),
                              starts=[nearest_of_another_class(x, y, *others)],
                              candidates={name: found.at(x, index) for name, found in found_before.items()})
    results.about |= {"attacks": found.attacks, "gradients": found.gradients}
    return Candidates(found.x_adv, found.winner)


def independent_attack(model: nn.Module, cfg: Config, norm: str, x: Tensor, y: Tensor, index: Tensor,
                       radius: Tensor) -> Tensor:
    """AutoAttack within the radius [b] of each point, and the polish."""
    x_adv = autoattack(model, x, y, epsilon=radius, norm=norm, keys=example_keys(index, cfg.seed, CHECK))
    return polish(model, x, y, x_adv, norm=norm)


def weighted_pgd(model: nn.Module, cfg: Config, x: Tensor, part: Split, epsilon: float,
                 alpha: float) -> Tensor:
    """PGD within `epsilon` on the cross-entropy, weighted by exp(-alpha margin)."""
    return pgd(model, x, part.labels, epsilon=epsilon, step_size=epsilon / 10,
               num_steps=cfg.num_steps if epsilon else 0, keys=example_keys(part.index, cfg.seed),
               loss_fn=lambda z, y: margin_weights(z, y, alpha) * cross_entropy(z, y))


# ---- the commands ------------------------------------------------------------------------------------------

def compute(cfg: Config) -> None:
    """Distances of every model: each in the folder itself, or in one of its own where there are several."""
    device, files, several = choose_device(cfg.device, wide=True), names_of(cfg.model), []
    subjects = [open_network(name, path, build_model, split=cfg.split, nn_type=cfg.nn_type, arch=cfg.arch,
                             dataset=cfg.dataset, data_dir=cfg.data_dir, ignore_extra=cfg.ignore_extra)
                for name, path in files.items()]
    chosen = [choose(subject.split, cfg.n_points, cfg.indices) for subject in subjects]
    before = read_records(cfg.records, {subject.sha256: subject.split for subject in subjects})
    folder, started = store.claim(cfg, SCRIPT), time.monotonic()
    copies = max(1, BUDGETS[cfg.budget].num_targets) if cfg.budget in BUDGETS else 1  # of a point at once
    with store.working(folder, f"{SCRIPT}.py compute"):
        for subject, points in zip(subjects, chosen):
            own = folder / subject.name if len(files) > 1 else folder
            about = about_of(subject, cfg.split, points) | {"budget": cfg.budget, "seed": cfg.seed}
            fresh = store.Results.empty(about, points, cfg.chosen_norms, cfg.adversaries)
            results = store.begin(own, fresh, bool(cfg.resume))
            model, points = subject.model.to(device), points.to(device)
            batch_size = cfg.batch_size or fitting_batch_size(model, points, copies)
            others = predicted(model, subject.split[slice(0, cfg.num_starts)].to(device), batch_size)
            steady = BatchInvariant(model)
            results.about["verdict"] = look_at(steady, points)
            attack = partial(attack_pool, steady, cfg, results, others, before[subject.sha256])
            layers = chain(model, points) if cfg.certify == "crown" else None
            measure_pending(results, steady, points, attack, batch_size, layers, own)
            if cfg.check_radii:
                checks.run(results, steady, points, partial(independent_attack, steady, cfg), own,
                           cfg.check_radii, cfg.check_points, cfg.seed)
            several.append(results)
            if cfg.save:
                write_text(own / "robustness_curves.json", dumps(published.file_format(results)))
    output.curves(several, folder, cfg.look, output.facts(started, device))


def compare(cfg: Config) -> None:
    """Models at the points that all of them were measured at."""
    several = store.common_points(store.find(cfg.results))
    if len(several) < 2:
        raise UserError("compare needs the results of two models: name more folders with --results")
    output.comparison(several, store.claim(cfg, SCRIPT), cfg.look, cfg.num_resamples, cfg.seed)


def distances(cfg: Config) -> None:
    """How far apart the classes of a data set are."""
    if not cfg.dataset:
        raise UserError("distances needs --dataset: mnist, cifar10, an image folder, mat:FILE or npz:FILE")
    device = choose_device(cfg.device, wide=True)
    split, _ = load_split(cfg.dataset, cfg.data_dir or "data", cfg.split)
    points = choose(split, cfg.n_points, cfg.indices).to(device)
    if len(torch.unique(points.labels)) < 2:
        raise UserError(f"all {len(points):,} points have one class: there is no inter-class distance")
    folder, started = store.claim(cfg, SCRIPT), time.monotonic()
    found = class_distances(points.images, points.labels, cfg.chosen_norms, cfg.seed,
                            partial(tqdm, desc="class distances", unit="block", disable=None))
    about = {"dataset": cfg.dataset, "split": cfg.split, "num_points": len(points)}
    output.class_distances(found, points, folder, about, cfg.look, output.facts(started, device))


def exact(cfg: Config) -> None:
    """Proofs of l_inf distances, from the stored adversaries on: status "exact", or "open" with a bracket."""
    several = store.find(cfg.results)
    if without := [results.name for results in several if "x_adv_linf" not in results.columns]:
        raise UserError(f"{', '.join(without)}: no adversarial examples in l_inf to begin from (compute with "
                        "--adversaries)")
    subjects = [reopen(results.about, build_model) for results in several]
    networks = [chain(subject.model, subject.split) for subject in subjects]
    folder, started, proved = store.claim(cfg, SCRIPT), time.monotonic(), []
    with store.working(folder, f"{SCRIPT}.py exact"):
        for results, subject, layers in zip(several, subjects, networks):
            own = folder / results.name if len(several) > 1 else folder
            results = store.begin(own, results, bool(cfg.resume))
            results.about |= {"rel_gap": cfg.rel_gap, "time_limit": cfg.time_limit}
            points = pick(subject.split, results.columns["index"])
            proofs.prove(results, layers, points, own, cfg.rel_gap, cfg.time_limit)
            closed, left = (len(results.rows(status)) for status in (store.EXACT, store.OPEN))
            print(f"{results.name}: {closed:,} points exact within {cfg.rel_gap:g}, {left:,} open after "
                  f"{cfg.time_limit:g} s")
            proved.append(results)
    output.curves(proved, folder, cfg.look, output.facts(started))


def surface(cfg: Config) -> None:
    """Robust accuracy over size and preference, at the points and around the distances stored."""
    device = choose_device(cfg.device, wide=True)
    several, epsilons = store.find(cfg.results), np.unique(cfg.epsilons)
    if without := [results.name for results in several if "linf" not in results.norms]:
        raise UserError(f"a surface needs distances in l_inf, which {', '.join(without)} has not")
    folder, started, found = store.claim(cfg, SCRIPT), time.monotonic(), {}
    num_attacks = len(epsilons) * (1 + sum(alpha > 0 for alpha in cfg.alphas))
    for results in several:
        subject = reopen(results.about, build_model)
        points = pick(subject.split, results.columns["index"]).to(device)
        model = subject.model.to(device)
        batch_size = cfg.batch_size or fitting_batch_size(model, points)
        known = results.upper("linf"), results.columns["clean_margin"], results.columns["margin_linf"]
        with tqdm(total=num_attacks * len(points), desc=results.name, unit="point", unit_scale=True,
                  disable=None) as bar:
            attack = partial(weighted_pgd, model, cfg)
            attack_all = partial(surfaces.attack_all, model, points, batch_size, attack, bar)
            found[results.name] = surfaces.both(epsilons, cfg.alphas, known, attack_all)
    output.surface(found, epsilons, np.array(cfg.alphas), folder, cfg.look, output.facts(started, device))


def budget(cfg: Config) -> None:
    """Accuracy under a mean budget, at the points that all models were measured at."""
    several = store.common_points(store.find(cfg.results))
    folder, started = store.claim(cfg, SCRIPT), time.monotonic()
    budgets.write(several, cfg.mean_budgets, cfg.orders, folder, cfg.look, cfg.num_resamples, cfg.seed,
                  partial(output.facts, started))


def figures(cfg: Config) -> None:
    """Draw stored results again, into --out or their own folder."""
    several = store.find(cfg.results)
    folder = store.claim(cfg, SCRIPT) if cfg.out else Path(cfg.results[0])
    drawn = draw_curves(several, folder, cfg.look)
    more, missing = draw_paper(several, folder, cfg.look, build_model) if cfg.paper else ([], [])
    for line in [*drawn, *more, *(f"not drawn: {line}" for line in missing)]:
        print(line)


COMMANDS = {"compute": compute, "compare": compare, "exact": exact, "distances": distances,
            "surface": surface, "budget": budget, "figures": figures}


def main(cfg: Config) -> None:
    if empty := [name for name in ("norms", "epsilons", "alphas") if not getattr(cfg, name)]:
        raise UserError(f"--{empty[0]} names nothing")
    if cfg.records and cfg.budget == "original":
        raise UserError("--budget original is the published system's attack alone: leave --records out")
    if cfg.resume and cfg.command not in ("compute", "exact"):
        raise UserError(f"--resume goes on with compute and exact, and {cfg.resume} is of {cfg.command}: run "
                        f"{cfg.command} anew, into another --out")
    if cfg.out and not cfg.resume:
        check_free(Path(cfg.out), "--out")
    COMMANDS[cfg.command](cfg)


if __name__ == "__main__":
    sys.argv[1:] = published.spelling(sys.argv[1:], COMMANDS)
    run_script(main, Config)
