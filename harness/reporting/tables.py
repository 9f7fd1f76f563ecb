"""Results of evaluations as tables: found, named by their defense and joined over seeds."""
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import UserError

KINDS = ("last", "best", "last_ema", "best_ema")
ATTACKS = {"fgsm": "FGSM", "pgd20": "PGD20", "pgd100": "PGD100", "cw": "CW", "fmn100": "FMN100",
           "autoattack": "AA", "mde": "MDE", "square": "Square", "spsa": "SPSA"}
COLUMNS = ("A_nat", "A_rob", "A_sa", "A_tr", "A_sa_kl", *ATTACKS.values())  # in this order
WEIGHTED = ("A_sa", "A_tr", "A_sa_kl")  # each by the attacker's strength: alpha, or the KL budget in nats
# What trainings that differ in nothing but the seed may differ in, and what only describes the run.
NO_SETTING = {"seed", "seeds", "out_dir", "resume", "data_dir", "device", "fuse", "attack_view", "compile",
              "graphs", "dry_run", "command", "environment", "stop_on_collapse", "image_shape", "num_classes",
              "classes", "training_images"}
# What one attack inside `attacks` may set by itself; two values under different ones are never averaged.
ATTACK_SETTINGS = ("num_examples", "epsilon", "step_size", "num_steps", "num_restarts", "start",
                   "num_queries", "num_samples")
CHANCE_MARK = "†"  # beside a mean in which a result at chance counts
# weights of train_vir.py: the fields that they alone read
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


@dataclass
class Row:
    """The results that differ in nothing but the seed of their training."""

    label: str
    settings: dict[str, Any]
    protocol: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def values(self, column: str) -> list[float]:
        """What was measured in `column`, a value a result, by the attack settings of most results."""
        return [result.measured[column][0] for result in self._counted(column)]

    def cell(self, column: str) -> str:
        """The mean and the spread of `column`, with a mark where a result at chance is in them."""
        mark = f" {CHANCE_MARK}" if any(result.at_chance for result in self._counted(column)) else ""
        return mean_and_spread(self.values(column)) + mark

    def attack_settings(self, column: str) -> dict[str, Any]:
        """What the attack of `column` sets by itself, in most results."""
        found = [result.measured[column][1] for result in self.results if column in result.measured]
        return max(found, key=found.count, default={})

    def _counted(self, column: str) -> list[Result]:
        usual = self.attack_settings(column)
        return [result for result in self.results
                if column in result.measured and result.measured[column][1] == usual]


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


# ---- defenses and rows -------------------------------------------------------------------------------------

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


def group(results: Iterable[Result]) -> tuple[list[Row], list[str]]:
    """The results as rows, by label, and notes on seeds that occur twice and on attacks with own settings."""
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
        for column, count in Counter(name for result in row.results for name in result.measured).items():
            if left := count - len(row.values(column)):
                notes.append(f"{row.label}: {left} of the values of {column} left out, measured in another "
                             "way")

    def place(row: Row) -> tuple[bool, str, str]:
        return not row.settings.get("script"), row.label, str(row.settings.get("model"))

    return sorted(rows.values(), key=place), notes


def setting_column(rows: list[Row], *, without: Iterable[str] = ()) -> list[str]:
    """What tells each row from those of the same label, as text; for two scripts, in the fields of both."""
    facts = [row.settings | {f"test {name}": value for name, value in row.protocol.items()} for row in rows]
    texts = []
    for row, own in zip(rows, facts):
        alike = [those for other, those in zip(rows, facts) if other.label == row.label]
        one_script = len({those.get("script") for those in alike}) == 1
        names = dict.fromkeys(name for those in alike for name in those
                              if one_script or all(name in each for each in alike))
        apart = [name for name in names if name not in without
                 and len({str(those.get(name)) for those in alike}) > 1]
        texts.append(", ".join(f"{name} {shown(own.get(name))}" for name in apart))
    return texts


# ---- text --------------------------------------------------------------------------------------------------

def all_results(rows: list[Row]) -> str:
    """Every row, one table a protocol."""
    text = "## All results"
    for protocol in {str(row.protocol): row.protocol for row in rows}.values():
        alike = [row for row in rows if row.protocol == protocol]
        measured = {name for row in alike for result in row.results for name in result.measured}
        columns = sorted(measured, key=_place)
        lines = []
        for row, setting in zip(alike, setting_column(alike, without=("model", "epochs"))):
            facts = row.label, shown(row.settings["model"]), shown(row.settings.get("epochs")), setting
            lines.append([*facts, *(row.cell(column) for column in columns)])
        told = defaultdict(lambda: "-", {name: shown(value) for name, value in protocol.items()})
        text += ("\n\n{dataset}, {num_examples} test images; {norm}, epsilon {epsilon}; PGD, {num_steps} "
                 "steps of {step_size}, {start} start, restarts: {num_restarts}\n\n").format_map(told)
        text += markdown(["defense", "network", "epochs", "setting", *columns], lines, left=4)
    return text


def _place(column: str) -> tuple[int, float, str]:
    """Where a column stands among the others."""
    metric, *alpha = column.split()
    if metric not in COLUMNS:
        return len(COLUMNS), 0.0, column
    return COLUMNS.index(metric), float(alpha[0]) if alpha else 0.0, column


def shown(value: object) -> str:
    """A setting as text."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def mean_and_spread(values: list[float]) -> str:
    """`mean ± sample standard deviation (number of values)`; `-` is the spread of one value, and nothing."""
    if not values:
        return "-"
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):.2f} ± {spread} ({len(values)})"


def difference(values: list[float], printed: float) -> str:
    """Our mean, as it is shown, minus the paper's number."""
    return f"{float(f'{statistics.mean(values):.2f}') - printed:+.2f}" if values else "-"


def markdown(head: list[str], rows: list[list[str]], left: int) -> str:
    """An aligned Markdown table without its empty columns, the first `left` ones to the left."""
    kept = [k for k in range(len(head)) if any(row[k] for row in rows)]
    lines = [[line[k].replace("|", "\\|") for k in kept] for line in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    sides = ["<" if k < left else ">" for k in kept]
    texts = ["| " + " | ".join(map("{:{}{}}".format, line, sides, widths)) + " |" for line in lines]
    rules = [f":{'-' * width}-" if side == "<" else f"-{'-' * width}:" for side, width in zip(sides, widths)]
    return "\n".join([texts[0], f"|{'|'.join(rules)}|", *texts[1:]])
