"""Results of evaluations as tables: found, named by their defense and joined over seeds."""
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import UserError

KINDS = ("last", "best", "last_ema", "best_ema")
ATTACKS = {"fgsm": "FGSM", "pgd20": "PGD20", "pgd100": "PGD100", "cw": "CW", "fmn100": "FMN100", "autoattack": "AA", "mde": "MDE",
           "square": "Square", "spsa": "SPSA"}
# What one training configuration may differ in and still be the same but for its seed, and what only describes the run.
NO_SETTING = {"seed", "seeds", "out_dir", "resume", "data_dir", "device", "fuse", "attack_view", "compile", "graphs", "dry_run",
              "command", "environment", "stop_on_collapse", "image_shape", "num_classes", "classes", "training_images"}
# What one attack inside `attacks` may set by itself; two values under different ones are never averaged.
ATTACK_SETTINGS = ("num_examples", "epsilon", "step_size", "num_steps", "num_restarts", "start", "num_queries", "num_samples")
CHANCE_MARK = "†"  # beside a mean in which a result at chance counts
# weights of train_vir.py: the fields that they alone read
OWN_FIELDS = {"vir": {"alpha", "beta", "gamma", "vir_terms", "vir_norm", "weight_forward"},
              "gairat": {"gairat_lambda", "gairat_function", "gairat_norm", "kappa"},
              "mail": {"mail_slope", "mail_bias", "mail_norm"}, "margin": {"margin_alpha"}, "uniform": set()}


@dataclass(frozen=True)
class Result:
    """One checkpoint measured by one protocol."""

    file: Path
    label: str                                       # the defense
    settings: dict[str, object]                      # of the training, without what has no effect
    seed: int | None                                 # of the training
    protocol: dict[str, object]                      # of A_rob, A_sa and A_tr
    measured: dict[str, tuple[float, dict]]          # column -> percent, the attack's own settings
    sha256: str
    at_chance: tuple[str, ...] = ()                  # those of A_nat and A_rob that are no better than a guess


@dataclass
class Row:
    """The results that differ in nothing but the seed of their training."""

    label: str
    settings: dict[str, object]
    protocol: dict[str, object]
    results: list[Result] = field(default_factory=list)

    def values(self, column: str) -> list[float]:
        """What was measured in `column`, one value a result, all under the attack settings that most results have."""
        return [result.measured[column][0] for result in self._counted(column)]

    def cell(self, column: str) -> str:
        """The mean and the spread of `column`, with a mark where a result at chance is in them."""
        mark = f" {CHANCE_MARK}" if any(result.at_chance for result in self._counted(column)) else ""
        return mean_and_spread(self.values(column)) + mark

    def _counted(self, column: str) -> list[Result]:
        usual = self.attack_settings(column)
        return [result for result in self.results if column in result.measured and result.measured[column][1] == usual]

    def attack_settings(self, column: str) -> dict[str, object]:
        """What the attack of `column` sets by itself, in most results."""
        found = [result.measured[column][1] for result in self.results if column in result.measured]
        return max(found, key=found.count, default={})


# ---- reading -------------------------------------------------------------------------------------------------------------------------

def find_files(paths: Iterable[str]) -> list[Path]:
    """The files named, and eval*.json anywhere in the folders named, each once.  Raises UserError for a path that is not there."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        files += sorted(path.rglob("eval*.json"), key=lambda file: (file.parent, file.stem)) if path.is_dir() else [path]
    return list({file.resolve(): file for file in files}.values())


def read_results(files: Iterable[Path], kind: str) -> tuple[list[Result], list[str]]:
    """The results of the checkpoints of this kind, one a checkpoint and protocol, and notes on what was left out.

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
            notes.append(f"{file}: its attack left the ball or the box, so its figures must not be used: left out")
        else:
            results.append(_result(file, found, _training(file, top, found), kind))
            if found.get("at_chance"):
                notes.append(f"{CHANCE_MARK} {file} is at chance, no better than a guess: {' and '.join(found['at_chance'])}")
            if found.get("verdict", "ok") != "ok":
                notes.append(f"{file}: the verdict of the evaluation is '{found['verdict']}'")
    return _once(results, notes), notes


def _load(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON ({error}): mend or remove it") from error


def _is_result(value: object) -> bool:
    needed = {"A_nat": (int, float), "threat_model": dict, "checkpoint": str, "num_examples": int, "dataset": str}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in needed.items())


def _of_kind(top: dict, kind: str) -> dict | None:
    """The part of a result file that belongs to the checkpoint of this kind; a foreign checkpoint (no epoch) is of every kind.

    Where a whole run was evaluated, a best checkpoint of the last epoch is not measured again: it is the last one.
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
    measured = {name: (found[name], {}) for name in ("A_nat", "A_rob") if isinstance(found.get(name), (int, float))}
    measured |= {f"{name} {float(alpha):g}": (value, {}) for name in ("A_sa", "A_tr") for alpha, value in (found.get(name) or {}).items()}
    attacks = {ATTACKS.get(name, name): value for name, value in (found.get("attacks") or {}).items()}
    for name, value in (attacks | {"worst case": found.get("worst_case")}).items():
        facts = (value.get("settings") or {}) | value if isinstance(value, dict) else {"accuracy": value}
        own = {key: facts[key] for key in ATTACK_SETTINGS if key in facts}
        if isinstance(facts.get("accuracy"), (int, float)):
            measured[name] = facts["accuracy"], own | ({"attacks": sorted(attacks)} if name == "worst case" else {})
    sha256 = found.get("checkpoint_sha256") or str(file)
    settings = {"checkpoint": found["checkpoint"], "sha256": sha256[:12]}  # two checkpoints of unknown training are never one row
    if training:
        settings = training_settings(training, kind, found.get("epoch"))
    settings.setdefault("model", found.get("architecture"))
    protocol = {"dataset": found["dataset"], "num_examples": found["num_examples"], **found["threat_model"]}
    label = defense(training) if training else Path(found["checkpoint"]).name
    at_chance = tuple(found.get("at_chance", ()))
    return Result(file, label, _plain(settings), training.get("seed"), _plain(protocol), measured, sha256, at_chance)


def _plain(settings: dict) -> dict:
    """Settings in which 2.0, as a flag gives it, is the 2 of a default."""
    return json.loads(json.dumps(settings), parse_float=lambda text: int(float(text)) if float(text).is_integer() else float(text))


def _once(results: list[Result], notes: list[str]) -> list[Result]:
    """Results of one checkpoint by one protocol as one: the first file's numbers, and what only the others measured."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps([result.sha256, result.protocol], sort_keys=True), []).append(result)
    for first, *others in groups.values():
        for other in others:
            first.measured.update(other.measured | first.measured)
        if others:
            files = ", ".join(str(one.file) for one in (first, *others))
            notes.append(f"these files measure one checkpoint by one protocol; it counts once, by the first file: {files}")
    return [first for first, *_ in groups.values()]


# ---- defenses and rows ---------------------------------------------------------------------------------------------------------------

def _base_and_weights(training: dict) -> tuple[str, str, float]:
    """(AT, TRADES, MART or the script's name; uniform, vir, gairat, mail or margin; the margin weight's alpha)."""
    name = training["script"].removeprefix("train_")
    base, weights, alpha = name, "uniform", 0.0
    if "base" in training:
        base, weights, alpha = training["base"].upper(), training["weights"], training.get("margin_alpha", 0.0)
    elif name.startswith(("at_", "trades_")):
        base, weights, alpha = name.split("_")[0].upper(), "margin", training.get("alpha", 0.0)
    elif name in ("free", "iaat"):
        base = {"free": "AT4Free", "iaat": "IAAT"}[name]
    elif name == "yopo":
        base = f"YOPO-{training['num_passes']}-{training['num_steps']}"
    return base, "uniform" if weights == "margin" and not alpha else weights, alpha


def defense(training: dict) -> str:
    """The defense that a training configuration stands for, as the papers call it: AT, AT+margin (alpha 0.5), GAIRAT, VIR-TRADES, ..."""
    base, weights, alpha = _base_and_weights(training)
    if weights == "margin":
        return f"{base}+margin (alpha {alpha:g})"
    if weights == "gairat":
        return "GAIRAT" if base == "AT" else f"GAIR-{base}"
    terms = {"sv": ", S_v only", "sd": ", S_d only"}.get(training.get("vir_terms"), "") if weights == "vir" else ""
    return base if weights == "uniform" else f"{weights.upper()}-{base}{terms}"


def training_settings(training: dict, kind: str, epoch: int) -> dict[str, object]:
    """The fields of a configuration that make a difference to a checkpoint of this kind, apart from the seed."""
    base, weights, _ = _base_and_weights(training)
    idle = set(NO_SETTING)
    if "base" in training:
        idle |= {name for other, names in OWN_FIELDS.items() if other != weights for name in names}
        idle |= {"burn_in_epochs"} if weights == "uniform" else set()
        idle |= {"inv_lambda"} if base == "AT" else set()
    if not kind.endswith("_ema"):
        idle |= {"ema_decay"}  # the average is taken beside the weights
    idle |= {name for name in ("max_grad_norm", "lr_warmup_epochs") if not training.get(name)}  # off, as in runs before there were any
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


def group(results: Iterable[Result]) -> tuple[list[Row], list[str]]:
    """The results as rows, by label, and notes on seeds that occur twice and on attacks with settings of their own."""
    rows: dict[str, Row] = {}
    for result in results:
        key = json.dumps([result.label, result.settings, result.protocol], sort_keys=True)
        rows.setdefault(key, Row(result.label, result.settings, result.protocol)).results.append(result)
    notes = []
    for row in rows.values():
        for seed, count in Counter(result.seed for result in row.results).items():
            if count > 1:
                files = ", ".join(str(result.file) for result in row.results if result.seed == seed)
                notes.append(f"{row.label}: {count} trainings with seed {seed}, each counted: {files}")
        for column in dict.fromkeys(name for result in row.results for name in result.measured):
            left = sum(column in result.measured for result in row.results) - len(row.values(column))
            if left:
                notes.append(f"{row.label}: {left} of the values of {column} left out, measured in another way")
    return sorted(rows.values(), key=lambda row: (not row.settings.get("script"), row.label, str(row.settings.get("model")))), notes


def setting_column(rows: list[Row], *, without: Iterable[str] = ()) -> list[str]:
    """What sets each row apart from the rows of the same label, as text; for two scripts, in the fields that both have."""
    texts, facts = [], [row.settings | {f"test {name}": value for name, value in row.protocol.items()} for row in rows]
    for row, own in zip(rows, facts):
        alike = [those for other, those in zip(rows, facts) if other.label == row.label]
        one_script = len({those.get("script") for those in alike}) == 1
        names = [name for name in dict.fromkeys(name for those in alike for name in those) if name not in without
                 and (one_script or all(name in those for those in alike)) and len({str(those.get(name)) for those in alike}) > 1]
        texts.append(", ".join(f"{name} {shown(own.get(name))}" for name in names))
    return texts


# ---- text ----------------------------------------------------------------------------------------------------------------------------

def shown(value: object) -> str:
    """A setting as text."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def mean_and_spread(values: list[float]) -> str:
    """`mean ± sample standard deviation (number of values)`; the spread of one value, and everything of none, is `-`."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ± {f'{statistics.stdev(values):.2f}' if len(values) > 1 else '-'} ({len(values)})"


def difference(values: list[float], printed: float) -> str:
    """Our mean, as it is shown, minus the paper's number."""
    return f"{float(f'{statistics.mean(values):.2f}') - printed:+.2f}" if values else "-"


def markdown(head: list[str], rows: list[list[str]], left: int) -> str:
    """An aligned Markdown table, its first `left` columns to the left and the others to the right; empty columns are left out."""
    kept = [k for k in range(len(head)) if any(row[k] for row in rows)]
    lines = [[line[k].replace("|", "\\|") for k in kept] for line in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(kept))]
    sides = ["<" if k < left else ">" for k in kept]
    texts = ["| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) + " |" for line in lines]
    rule = "|" + "|".join(f":{'-' * width}-" if side == "<" else f"-{'-' * width}:" for side, width in zip(sides, widths)) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])
