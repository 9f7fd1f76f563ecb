"""Results of evaluations, read from their files and named by their defense."""
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError

KINDS = ("last", "best", "last_ema", "best_ema")
ATTACKS = {"fgsm": "FGSM", "pgd20": "PGD20", "pgd100": "PGD100", "cw": "CW", "fmn100": "FMN100",
           "autoattack": "AA", "mde": "MDE", "square": "Square", "spsa": "SPSA"}
WEIGHTED = ("A_sa", "A_tr", "A_sa_kl")  # each by the attacker's strength: alpha, or the KL budget in nats
# What trainings that differ in nothing but the seed may differ in, and what only describes the run.
NO_SETTING = {"seed", "seeds", "out_dir", "resume", "data_dir", "device", "fuse", "attack_view", "compile",
              "graphs", "dry_run", "command", "environment", "stop_on_collapse", "stop_after_minutes",
              "burn_in_from", "image_shape", "num_classes", "classes", "training_images"}
# What one attack inside `attacks` may set by itself; two values under different ones are never averaged.
ATTACK_SETTINGS = ("num_examples", "epsilon", "step_size", "num_steps", "num_restarts", "start",
                   "num_queries", "num_samples")
CHANCE_MARK = "†"  # beside what a result at chance counts in
# weights of train_vir.py -> the fields that they alone read, after the burn-in
OWN_FIELDS = {"vir": {"alpha", "beta", "gamma", "vir_terms", "vir_norm", "weight_forward"},
              "gairat": {"gairat_lambda", "gairat_function", "gairat_norm", "kappa"},
              "mail": {"mail_slope", "mail_bias", "mail_norm"}, "margin": {"margin_alpha"}}


@dataclass(frozen=True)
class Result:
    """One checkpoint measured by one protocol."""

    file: Path
    label: str                                # the defense
    settings: dict[str, Any]                  # of the training, without what has no effect
    seed: int | None                          # of the training
    protocol: dict[str, Any]                  # of A_rob, A_sa and A_tr
    measured: dict[str, tuple[float, dict]]   # column -> percent, the attack's own settings
    sha256: str
    at_chance: bool                           # A_nat or A_rob is no better than a guess


# ---- reading -----------------------------------------------------------------------------------------------

def find_files(paths: Iterable[str]) -> list[Path]:
    """The files named, and eval*.json anywhere in the folders named, each once.

    Raises UserError for a path that is not there.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        found = path.rglob("eval*.json") if path.is_dir() else [path]
        files += sorted(found, key=lambda file: (file.parent, file.stem))
    return list({file.resolve(): file for file in files}.values())


def read_results(files: Iterable[Path], kind: str) -> tuple[list[Result], list[str]]:
    """The results of this kind of checkpoint, one a checkpoint and protocol, and notes on those left out.

    Raises UserError for a file that is not JSON.
    """
    results, notes = [], []
    for file in files:
        top = _load(file)
        found = _of_kind(top, kind) if _is_result(top) else None
        if not _is_result(top):
            notes.append(f"{file} is not the result of an evaluation: left out")
        elif found is None:
            notes.append(f"{file} has no {kind} checkpoint: left out")
        elif not (found.get("certificate") or {}).get("ok", True):
            notes.append(f"{file}: its attack left the ball or the box, so its figures must not be used: "
                         "left out")
        else:
            results.append(_result(file, found, _training(file, top, found), kind))
            if at_chance := " and ".join(found.get("at_chance", ())):
                notes.append(f"{CHANCE_MARK} {file} is at chance, no better than a guess: {at_chance}")
            if (verdict := found.get("verdict", "ok")) != "ok":
                notes.append(f"{file}: the verdict of the evaluation is '{verdict}'")
    return _once(results, notes), notes


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON ({error}): mend or remove it") from error


def _is_result(value: Any) -> bool:
    needed = {"A_nat": (int, float), "threat_model": dict, "checkpoint": str, "num_examples": int,
              "dataset": str}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in needed.items())


def _of_kind(top: dict, kind: str) -> dict | None:
    """The part of a result about this kind of checkpoint; a foreign one, which has no epoch, is of each kind.

    Where a whole run was evaluated, a best checkpoint of the last epoch is not measured again.
    """
    own = Path(top["checkpoint"]).stem
    if top.get("epoch") is None or kind == (own if own in KINDS else "last"):
        return top
    if _is_result(top.get(kind)):
        return top[kind]
    whole_run = ".pt" not in (top.get("command") or ".pt")
    return _of_kind(top, kind.replace("best", "last")) if whole_run and kind.startswith("best") else None


def _training(file: Path, top: dict, found: dict) -> dict:
    """The configuration of the training; of a foreign checkpoint, or where none was kept, empty."""
    if found.get("epoch") is None:
        return {}
    beside = file.parent / "config.json"
    config = found.get("training") or top.get("training") or (_load(beside) if beside.is_file() else None)
    return config if isinstance(config, dict) and "script" in config else {}


def _result(file: Path, found: dict, training: dict, kind: str) -> Result:
    sha256 = found.get("checkpoint_sha256") or str(file)
    if training:
        label, settings = defense(training), training_settings(training, kind, found["epoch"])
    else:  # two checkpoints of unknown training are never one row
        label = Path(found["checkpoint"]).name
        settings = {"checkpoint": found["checkpoint"], "sha256": sha256[:12]}
    settings.setdefault("model", found.get("architecture"))
    protocol = {"dataset": found["dataset"], "num_examples": found["num_examples"], **found["threat_model"]}
    return Result(file, label, _plain(settings), training.get("seed"), _plain(protocol), _measured(found),
                  sha256, bool(found.get("at_chance")))


def _measured(found: dict) -> dict[str, tuple[float, dict]]:
    """Column -> (percent, the attack's own settings) of everything that a result holds."""
    measured: dict[str, tuple[float, dict]] = {
        name: (found[name], {}) for name in ("A_nat", "A_rob") if isinstance(found.get(name), (int, float))}
    for name in WEIGHTED:
        curve = (found.get(name) or {}).items()
        measured |= {f"{name} {float(strength):g}": (value, {}) for strength, value in curve}
    attacks = {ATTACKS.get(name, name): value for name, value in (found.get("attacks") or {}).items()}
    for name, value in (attacks | {"worst case": found.get("worst_case")}).items():
        facts = (value.get("settings") or {}) | value if isinstance(value, dict) else {"accuracy": value}
        own = {key: facts[key] for key in ATTACK_SETTINGS if key in facts}
        own |= {"attacks": sorted(attacks)} if name == "worst case" else {}
        if isinstance(facts.get("accuracy"), (int, float)):
            measured[name] = facts["accuracy"], own
        if name == "worst case":
            measured |= {f"worst case KL {float(budget):g}": (percent, own)
                         for budget, percent in (facts.get("A_sa_kl") or {}).items()}
    return measured


def _plain(settings: dict) -> dict:
    """Settings in which 2.0, as a flag gives it, is the 2 of a default."""
    def value(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    return json.loads(json.dumps(settings), parse_float=value)


def _once(results: list[Result], notes: list[str]) -> list[Result]:
    """Results of one checkpoint by one protocol as one: the first file's, with what only the others have."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps([result.sha256, result.protocol], sort_keys=True), []).append(result)
    for first, *others in groups.values():
        for other in others:
            first.measured.update(other.measured | first.measured)
        if others:
            files = ", ".join(str(one.file) for one in (first, *others))
            notes.append("these files measure one checkpoint by one protocol; it counts once, by the first "
                         f"file: {files}")
    return [first for first, *_ in groups.values()]


# ---- defenses ----------------------------------------------------------------------------------------------

def _base_and_weights(training: dict) -> tuple[str, str, float]:
    """(AT, TRADES, MART or the script's; uniform, vir, gairat, mail or margin; the margin weight's alpha)."""
    name = training["script"].removeprefix("train_")
    if "base" in training:
        base, weights = training["base"].upper(), training["weights"]
        alpha = training.get("margin_alpha", 0.0)
    elif name.startswith(("at_", "trades_")):
        base, weights, alpha = name.split("_")[0].upper(), "margin", training.get("alpha", 0.0)
    else:
        base, weights, alpha = {"free": "AT4Free", "iaat": "IAAT"}.get(name, name), "uniform", 0.0
        if name == "yopo":
            base = f"YOPO-{training['num_passes']}-{training['num_steps']}"
    return base, "uniform" if weights == "margin" and not alpha else weights, alpha


def defense(training: dict) -> str:
    """What the papers call a training configuration: AT, AT+margin (alpha 0.5), GAIRAT, VIR-TRADES, ..."""
    base, weights, alpha = _base_and_weights(training)
    if weights == "margin":
        return f"{base}+margin (alpha {alpha:g})"
    if weights == "gairat":
        return "GAIRAT" if base == "AT" else f"GAIR-{base}"
    if weights == "uniform":
        return base
    terms = {"sv": ", S_v only", "sd": ", S_d only"}.get(training.get("vir_terms", ""), "")
    return f"{weights.upper()}-{base}{terms if weights == 'vir' else ''}"


def training_settings(training: dict, kind: str, epoch: int) -> dict[str, Any]:
    """The fields that make a difference to a checkpoint of this kind, apart from the seed."""
    base, weights, _ = _base_and_weights(training)
    idle = set(NO_SETTING)
    if "base" in training:
        idle |= {name for other, names in OWN_FIELDS.items() if other != weights for name in names}
        idle |= {"burn_in_epochs"} if weights == "uniform" else set()
        idle |= {"inv_lambda"} if base == "AT" else set()
    if not kind.endswith("_ema"):
        idle |= {"ema_decay"}  # the average is taken beside the weights
    # off, as in runs before there were any
    idle |= {name for name in ("max_grad_norm", "lr_warmup_epochs") if not training.get(name)}
    if not training.get("extra_data"):
        idle |= {"extra_data", "extra_fraction"}
    settings = {name: value for name, value in training.items() if name not in idle}
    if "extra_data" in settings:
        settings["extra_data"] = Path(settings["extra_data"]).name
    if base == "TRADES" and "base" not in training:
        settings["inv_lambda"] = settings.pop("beta", None)
    if kind.startswith("last") and epoch != training.get("epochs", epoch):
        settings["stopped after epoch"] = epoch
    return settings
