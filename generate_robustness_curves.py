"""Robustness curves: R(t), the share of points whose smallest adversarial perturbation has norm at most t, in l_inf, l_2 and l_1, after
Risse, Göpfert & Göpfert, "How to Compare Adversarial Robustness of Classifiers from a Global Perspective" (ICANN 2021).

    d_p(x, y) = 0 where f(x) != y, else min { ||x' - x||_p : x' in [0, 1]^D, f(x') != y };    R(t) = #{i : d_p(x_i, y_i) <= t} / n

An attack's distance is an upper bound of d, so the curve is a lower bound of R. A point without an adversarial example is censored.

compute     distances of one or several models: distances.npz, curves.csv, summary.json and figures in one folder (--resume goes on with it)
compare     models at the same points: crossings, simultaneous bands, McNemar's tests, one norm against another
exact       l_inf distances of small ReLU networks with proof, from stored adversarial examples (compute --adversaries)
distances   how far apart the classes of a data set are, in exact integers
surface     robust accuracy over the perturbation size and the attacker's preference for small margins (Zeng et al., AAAI 2021)
figures     draw again from stored results, with --paper the figures of the paper too

    python generate_robustness_curves.py --dataset mnist --n_points 1000 --model_path model.mat --nn_type cnn --norms 2 1 inf
    python generate_robustness_curves.py compute --model runs/at runs/trades --n_points 1000 --out runs/curves
    python generate_robustness_curves.py compare --results runs/curves
    python generate_robustness_curves.py surface --results runs/curves
    python generate_robustness_curves.py exact --results runs/curves --time_limit 60
    python generate_robustness_curves.py distances --dataset mnist
    python generate_robustness_curves.py figures --results runs/curves --paper
"""
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.bim import bim_bisection
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from attacks.pool import BUDGETS, minimal_distances
from curves import figures as drawing
from curves import output
from curves import store as curve_store
from curves import surface as surfaces
from curves.certified import affine_layers, certified_distances
from curves.class_distances import class_distances
from curves.exact import exact_distances
from curves.measure import Candidates, measure, nearest_of_another_class, norms_of
from curves.models import about_of, names_of, open_network, reopen
from curves.points import choose, load_split, pick
from harness.config import run_script
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.device import choose_device
from harness.errors import UserError
from harness.evaluation.capacity import fitting_batch_size
from harness.evaluation.predictions import BatchInvariant, num_outputs
from harness.folder import resumable
from harness.training.precision import to_device
from losses.margin import margin_weights, misclassified, probability_margin
from models import build_model

SCRIPT = "generate_robustness_curves"
NORMS = {"inf": "linf", "2": "l2", "1": "l1"}


@dataclass(frozen=True)
class Config:
    command: Literal["compute", "compare", "exact", "distances", "surface", "figures"] = "compute"  # may stand first, without --command
    model: tuple[str, ...] = ()                  # compute: checkpoints, run folders or .mat files; --model_path is the same
    arch: str | None = None                      # network of foreign checkpoints: a model's name, or file.py:callable
    nn_type: Literal["cnn", "fc1"] | None = None  # kind of a .mat network, compared with what its keys say
    dataset: str | None = None                   # data set, image folder, mat:FILE or npz:FILE; default: the checkpoint's
    data_dir: str | None = None                  # folder of the data sets; default: the checkpoint's, or data
    split: Literal["test", "train"] = "test"     # split of the data set
    n_points: int | None = None                  # number of points, from the first on; -1 or none: all
    indices: str | None = None                   # text file with the positions of the points to take
    norms: tuple[Literal["inf", "2", "1"], ...] = ("inf", "2", "1")  # norms of the perturbation
    budget: Literal["fast", "standard", "strong", "original"] = "standard"  # pool of attacks; original: PGD bisection, for comparison
    num_starts: int = 2000                       # number of images among which attacks look for a start: the nearest of another class
    adversaries: bool = False                    # keep the adversarial examples in distances.npz
    certify: Literal["none", "crown"] = "none"   # lower bounds of the distances: CROWN, for chains of affine maps and ReLUs
    rel_gap: float = 1e-4                        # exact: a point is closed when upper / lower <= 1 + rel_gap
    time_limit: float = 60.0                     # exact: seconds per point; a point not closed by then is reported as open
    results: tuple[str, ...] = ()                # compare, exact, surface, figures: folders that compute wrote
    thresholds_linf: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 0.3)  # l_inf sizes for intervals and tests, pixels in [0, 1]
    thresholds_l2: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)  # l_2 sizes, pixels in [0, 1]
    thresholds_l1: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)  # l_1 sizes, pixels in [0, 1]
    confidence: float = 0.95                     # confidence level of bands and intervals
    band: Literal["dkw", "cp"] = "dkw"           # simultaneous (DKW) or point-wise (Clopper-Pearson)
    num_resamples: int = 2000                    # compare: resamples of the paired bootstrap
    epsilons: tuple[float, ...] = tuple(round(0.025 * k, 3) for k in range(17))  # surface: l_inf sizes, pixels in [0, 1]
    alphas: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)  # surface: the attacker's preference for small margins
    num_steps: int = 40                          # surface: PGD steps
    units: Literal["raw", "255"] = "raw"         # units of the axes: pixels in [0, 1] or grey levels
    save: bool = True                            # write the published system's JSON too
    plot: bool = True                            # draw the figures
    paper: bool = False                          # figures: the paper's as well
    format: tuple[Literal["png", "pdf", "svg"], ...] = ("png", "pdf")  # file formats of the figures
    batch_size: int | None = None                # points at a time, which changes distances by rounding alone; default: what memory allows
    seed: int = 0                                # seed of random starts, resamples and orders
    out: str | None = None                       # folder to write; default: runs/generate_robustness_curves/<time>
    resume: str | None = None                    # compute: folder of the computation to continue
    device: str = "auto"                         # auto, cpu, or an accelerator by its name in torch

    @property
    def thresholds(self) -> dict[str, tuple[float, ...]]:
        """The thresholds of each norm."""
        return {norm: getattr(self, f"thresholds_{norm}") for norm in NORMS.values()}

    @property
    def chosen_norms(self) -> tuple[str, ...]:
        """The norms by the names that files and functions know them by."""
        return tuple(NORMS[norm] for norm in dict.fromkeys(self.norms))

    @property
    def look(self) -> drawing.Look:
        """How figures are drawn."""
        return drawing.Look(self.confidence, self.band, self.units, self.format)


def attack_pool(model: nn.Module, about: dict, others: tuple[Tensor, Tensor], budget: str, norms: tuple[str, ...], x: Tensor, y: Tensor,
                keys: Tensor) -> Candidates:
    """The closest of all that the attacks of a budget find; `about` learns which these are and how many gradients each costs a point.

    others: images and the classes that the model gives them, from which attacks begin as well. The budget "original" is the published
    system's l_inf attack, measured in every norm.
    """
    if budget == "original":
        about |= {"attacks": ["bim bisection"], "gradients": {"bim bisection": 40 * 41}}
        return Candidates({"linf": bim_bisection(model, x, y)[0]}, {"linf": torch.zeros_like(y)})
    found = minimal_distances(model, x, y, norms=norms, budget=budget, keys=keys, starts=[nearest_of_another_class(x, y, *others)])
    about |= {"attacks": found.attacks, "gradients": found.gradients}
    return Candidates(found.x_adv, found.winner)


# ---- compute -------------------------------------------------------------------------------------------------------------------------

def compute(cfg: Config) -> None:
    """Distances of every model: each in the folder itself, or in one of its own where there are several."""
    device, files, several = choose_device(cfg.device), names_of(cfg.model), []
    subjects = {name: open_network(name, path, cfg, build_model) for name, path in files.items()}
    points = {name: choose(subject.split, cfg.n_points, cfg.indices) for name, subject in subjects.items()}
    for name, subject in subjects.items():
        num_outputs(subject.model, points[name])
    folder, started = curve_store.claim(cfg, SCRIPT), time.monotonic()
    with resumable(folder, f"{SCRIPT}.py compute"):
        for name, subject in subjects.items():
            own = folder / name if len(files) > 1 else folder
            about = about_of(subject, cfg.split) | {"budget": cfg.budget, "seed": cfg.seed}
            results = curve_store.begin(own, about, points[name], cfg.chosen_norms, cfg.adversaries, bool(cfg.resume))
            model, others = to_device(subject.model, device), subject.split[slice(0, cfg.num_starts)].to(device)
            settings = sized(cfg, model, points[name].to(device), max(1, BUDGETS[cfg.budget].num_targets) if cfg.budget in BUDGETS else 1)
            fill(results, model, points[name].to(device), predicted(model, others, settings.batch_size), own, settings)
            several.append(results)
            if cfg.save:
                curve_store.write_json(own / "robustness_curves.json", curve_store.original_json(results))
    output.curves(several, folder, cfg.thresholds, cfg.look, cfg.plot, output.facts(started, device))


def sized(cfg: Config, model: nn.Module, points: Split, copies: int = 1) -> Config:
    """`cfg` with a batch size, where it leaves that open; copies: of a point that an attack holds at once."""
    return replace(cfg, batch_size=cfg.batch_size or fitting_batch_size(model, points, copies))


def fill(results: curve_store.Results, model: nn.Module, points: Split, others: tuple[Tensor, Tensor], folder: Path,
         cfg: Config) -> None:
    """Measure the points that are pending, and save as they are done: an image found among a few points is one among many too."""
    pending, steady = results.pending(), BatchInvariant(model)
    attack = partial(attack_pool, steady, results.about, others, cfg.budget, results.norms)
    layers = chain(model, points) if cfg.certify == "crown" else None
    with tqdm(total=len(results), initial=len(results) - len(pending), desc=results.name, unit="point", disable=None) as bar, \
            curve_store.saving(results, folder) as saved:
        for start in range(0, len(pending), cfg.batch_size):
            rows = pending[start:start + cfg.batch_size]
            part = points[torch.from_numpy(rows)]
            keys = example_keys(part.index, cfg.seed)
            x, y = to_unit(part.images), part.labels
            found = measure(steady, x, y, results.norms, margin_of=probability_margin, misclassified=misclassified,
                            attack=lambda x, y, kept, keys=keys: attack(x, y, keys[kept]))
            for norm in results.norms if layers else ():
                results.lower(norm)[rows] = certified_distances(layers, x, y, found.distance[norm], norm=norm).numpy()
            results.put(rows, found)
            saved()
            bar.update(len(rows))


def predicted(model: nn.Module, points: Split, batch_size: int) -> tuple[Tensor, Tensor]:
    """The images of points and the classes that the model gives them."""
    images = to_unit(points.images)
    with torch.no_grad():
        return images, torch.cat([model(x).argmax(1) for x in images.split(batch_size)])


def chain(model: nn.Module, points: Split) -> list[tuple[Tensor, Tensor]]:
    """The network as affine maps with ReLUs between them.  Raises UserError for any other."""
    try:
        return affine_layers(model, points.images.shape[1:])
    except ValueError as error:
        raise UserError(f"no proof for this network: {error}") from error


# ---- the other commands --------------------------------------------------------------------------------------------------------------

def compare(cfg: Config) -> None:
    """Models at the points that all of them were measured at."""
    several = curve_store.common_points([results for _, results in curve_store.find(cfg.results)])
    if len(several) < 2:
        raise UserError("compare needs the results of two models: name more folders with --results")
    output.comparison(several, curve_store.claim(cfg, SCRIPT), cfg.thresholds, cfg.look, cfg.plot, cfg.num_resamples, cfg.seed)


def distances(cfg: Config) -> None:
    """How far apart the classes of a data set are."""
    if not cfg.dataset:
        raise UserError("distances needs --dataset: mnist, cifar10, an image folder, mat:FILE or npz:FILE")
    device = choose_device(cfg.device)
    points = choose(load_split(cfg.dataset, cfg.data_dir or "data", cfg.split), cfg.n_points, cfg.indices).to(device)
    if len(torch.unique(points.labels)) < 2:
        raise UserError(f"all {len(points):,} points have one class: there is no inter-class distance")
    folder, started = curve_store.claim(cfg, SCRIPT), time.monotonic()
    found = class_distances(points.images, points.labels, cfg.chosen_norms, cfg.seed,
                            partial(tqdm, desc="class distances", unit="block", disable=None))
    about = {"dataset": cfg.dataset, "split": cfg.split, "num_points": len(points)}
    output.class_distances(found, points, folder, about, cfg.thresholds, cfg.look, cfg.plot, output.facts(started, device))


def exact(cfg: Config) -> None:
    """Proofs of l_inf distances, from the stored adversarial examples on: status "exact", or "open" with a bracket."""
    stored, several = curve_store.find(cfg.results), []
    if without := [results.name for _, results in stored if "x_adv_linf" not in results.columns]:
        raise UserError(f"{', '.join(without)}: no adversarial examples in l_inf to begin from (compute with --adversaries)")
    subjects = [reopen(results.about, build_model) for _, results in stored]
    layers = [chain(subject.model, subject.split) for subject in subjects]
    folder, started = curve_store.claim(cfg, SCRIPT), time.monotonic()
    for (_, results), subject, network in zip(stored, subjects, layers):
        own, points = folder / results.name if len(stored) > 1 else folder, pick(subject.split, results.columns["index"])
        results.about |= {"rel_gap": cfg.rel_gap, "time_limit": cfg.time_limit}
        rows = np.flatnonzero(results.columns["status"] == curve_store.OK)
        with tqdm(rows, desc=results.name, unit="point", disable=None) as bar, curve_store.saving(results, own) as saved:
            for row in bar:
                part, x_adv = points[slice(row, row + 1)], torch.from_numpy(results.columns["x_adv_linf"][row:row + 1])
                found, = exact_distances(network, to_unit(part.images), part.labels, x_adv, rel_gap=cfg.rel_gap, time_limit=cfg.time_limit)
                results.put_proof(row, found)
                saved()
        several.append(results)
        closed, open_ = (int((results.columns["status"] == status).sum()) for status in (curve_store.EXACT, curve_store.OPEN))
        print(f"{results.name}: {closed:,} points exact within {cfg.rel_gap:g}, {open_:,} open after {cfg.time_limit:g} s")
    output.curves(several, folder, cfg.thresholds, cfg.look, cfg.plot, output.facts(started, torch.device("cpu")))


def surface(cfg: Config) -> None:
    """Robust accuracy over the perturbation size and the attacker's preference, at the points and around the distances of `results`."""
    stored, device, epsilons = curve_store.find(cfg.results), choose_device(cfg.device), np.unique(cfg.epsilons)
    if without := [results.name for _, results in stored if "linf" not in results.norms]:
        raise UserError(f"a surface needs distances in l_inf, which {', '.join(without)} has not")
    folder, started, found = curve_store.claim(cfg, SCRIPT), time.monotonic(), {}
    for _, results in stored:
        subject = reopen(results.about, build_model)
        model, points = to_device(subject.model, device), pick(subject.split, results.columns["index"]).to(device)
        known = results.upper("linf"), results.columns["clean_margin"], results.columns["margin_linf"]
        attacks = len(epsilons) * (1 + sum(alpha > 0 for alpha in cfg.alphas))
        with tqdm(total=attacks * len(points), desc=results.name, unit="point", unit_scale=True, disable=None) as bar:
            attack = partial(attack_all, model, points, sized(cfg, model, points), bar)
            found[results.name] = surfaces.both(epsilons, cfg.alphas, known, attack)
    output.surface(found, epsilons, np.array(cfg.alphas), folder, cfg.look, cfg.plot, output.facts(started, device))


def attack_all(model: nn.Module, points: Split, cfg: Config, bar: tqdm, epsilon: float, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Margins and l_inf norms [n] of PGD within `epsilon` on the cross-entropy, weighted by exp(-alpha margin)."""
    margins, sizes = [], []
    for rows in torch.arange(len(points), device=points.labels.device).split(cfg.batch_size):
        part = points[rows]
        x = to_unit(part.images)
        x_adv = pgd(model, x, part.labels, epsilon=epsilon, step_size=epsilon / 10, num_steps=cfg.num_steps if epsilon else 0,
                    keys=example_keys(part.index, cfg.seed), loss_fn=lambda z, y: margin_weights(z, y, alpha) * cross_entropy(z, y))
        with torch.no_grad():
            margins.append(probability_margin(model(x_adv).double(), part.labels).cpu().numpy())
        sizes.append(norms_of(x_adv.double() - x.double())["linf"].cpu().numpy())
        bar.update(len(rows))
    return np.concatenate(margins), np.concatenate(sizes)


def figures(cfg: Config) -> None:
    """Draw stored results again, into --out or their own folder."""
    stored = curve_store.find(cfg.results)
    several = [results for _, results in stored]
    folder = curve_store.claim(cfg, SCRIPT) if cfg.out else Path(cfg.results[0])
    drawn, missing = drawing.draw_curves(several, folder, cfg.look, cfg.thresholds), []
    if cfg.paper:
        try:
            images = to_unit(pick(reopen(several[0].about, build_model).split, several[0].columns["index"]).images).numpy()
        except UserError as error:
            print(f"note: {error}")
            images = None
        extra, missing = drawing.draw_paper(several, images, folder, cfg.look)
        drawn += extra
    for line in [*drawn, *(f"not drawn: {line}" for line in missing)]:
        print(line)


COMMANDS = {"compute": compute, "compare": compare, "exact": exact, "distances": distances, "surface": surface, "figures": figures}


def spelling(words: list[str]) -> list[str]:
    """Ours for the published system's command line: a leading command, --model_path, --n_points -1, and --save True or --save=False."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = ["--command", *words] if words and words[0] in COMMANDS else words
    switches = {"true": "--", "false": "--no-"}
    for k in range(len(words) - 2, -1, -1):
        pair = words[k].replace("-", "_").removeprefix("__"), words[k + 1].lower()
        if pair[0] in ("save", "plot") and pair[1] in switches:
            words[k:k + 2] = [switches[pair[1]] + pair[0]]
        elif pair == ("n_points", "-1") or pair == ("n_points", "all"):
            del words[k:k + 2]
    return ["--model" if word in ("--model_path", "--model-path") else word for word in words]


def main(cfg: Config) -> None:
    if empty := [name for name in ("norms", "epsilons", "alphas") if not getattr(cfg, name)]:
        raise UserError(f"--{empty[0]} names nothing")
    if cfg.resume and cfg.command != "compute":
        raise UserError(f"--resume goes on with compute, and {cfg.resume} is of {cfg.command}: run {cfg.command} anew, into another --out")
    COMMANDS[cfg.command](cfg)


if __name__ == "__main__":
    sys.argv[1:] = spelling(sys.argv[1:])
    run_script(main, Config)
