"""The tables of README.md and docs/ on attacks, robustness curves and stability."""
from harness.reporting.cells import RESULTS, extremes, load, number, pair
from harness.reporting.tables import markdown

# ---- what is written by hand: the order of rows, and their labels ------------------------------------------

BESIDE = {"at": "AT, 0.3", "trades": "TRADES, 0.3", "plain": "no attack, 0.1"}
ATTACKS = {"fgsm": "FGSM", "pgd100": "PGD-100", "cw": "CW-20", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR",
           "apgd-t": "APGD-T", "fab-t": "FAB-T", "fmn100": "FMN-100", "md": "MD", "mdmt": "MDMT",
           "square": "Square", "spsa": "SPSA", "spsa-short": "SPSA, a tenth of its passes",
           "autoattack": "AutoAttack", "together": "MDE, CW-20 and the shorter SPSA together"}
SEVERAL_SEEDS = ("md", "autoattack")
CURVES = {"at": "AT", "at-alpha0.5": "AT, alpha 0.5", "trades": "TRADES", "trades-alpha2": "TRADES, alpha 2",
          "vir-recipe-at": "AT, VIR's recipe", "vir-at": "VIR-AT", "gairat": "GAIRAT"}
KINDS = {"at": "AT", "gairat": "GAIRAT", "wong_kolter_mnist": "certified", "plain": "plain"}
HELD_OUT = {"A_nat": "A_nat", "A_rob": "A_rob", "test_A_nat": "A_nat, test set",
            "test_A_rob": "A_rob, test set"}


def attacks() -> str:
    """Our attacks beside others' implementations of the same."""
    files = [load(f"attacks/lenet-{name}.json") for name in BESIDE]
    columns = [{(row["attack"], row["seed"]): row for row in file["rows"]} for file in files]
    rows = []
    for attack, label in ATTACKS.items():
        seeds = sorted(seed for name, seed in columns[0] if name == attack)
        for seed in seeds if attack in SEVERAL_SEEDS else seeds[:1]:
            both = [column[attack, seed] for column in columns]
            theirs = [row.get("published") or row["reference"] for row in both]
            cells = [pair(row["ours"]["accuracy"], other["accuracy"]) for row, other in zip(both, theirs)]
            rows.append([f"{label}, seed {seed}" if attack in SEVERAL_SEEDS else label, *cells])
    return markdown(["attack", *BESIDE.values()], rows, left=1)


def curves() -> str:
    """Robustness curves at a few radii, and median distances."""
    models = load("curves/summary.json")["models"]
    rows = []
    for name, label in CURVES.items():
        norms = models[name]["norms"]
        reached = {(norm, one["t"]): number(100 * one["R"], 1)
                   for norm in norms for one in norms[norm]["thresholds"]}
        median = {norm: number(norms[norm]["median"], 3) for norm in norms}
        wrong = number(100 * norms["linf"]["clean_error"], 1)
        rows.append([f"{label} (`{name}`)", wrong, reached["linf", 0.2], reached["linf", 0.3], median["linf"],
                     reached["l2", 1.0], median["l2"], reached["l1", 2.0], median["l1"]])
    head = ["network", "wrong unattacked", "R(0.2) l_inf", "R(0.3)", "median", "R(1) l_2", "median",
            "R(2) l_1", "median"]
    return markdown(head, rows, left=1)


def mean_budget() -> str:
    """The mean budgets that leave 90 and 50 % of the points right, for p = 1, 2 and infinity."""
    left = load("curves/budget/summary.json")["mean_budget_that_leaves"]
    shown = [(norm, share, order) for norm in ("linf", "l2") for share in ("0.9", "0.5")
             for order in ("1", "2", "inf")]
    rows = [[label, *(number(left[name][norm][order][share], 3) for norm, share, order in shown)]
            for name, label in CURVES.items()]
    norms = {"linf": "l_inf", "l2": "l_2"}
    heads = [f"{norms[norm]}, {100 * float(share):g} %, p = {order}" if order == "1" else f"p = {order}"
             for norm, share, order in shown]
    return markdown(["network", *heads], rows, left=1)


def members() -> str:
    """What each attack of the pool gains in l_inf, on networks of four kinds."""
    found, before = ({(row["member"], row["model"]): row for row in load(f"curves-check/{file}.json")["rows"]
                      if row["norm"] == "linf"} for file in ("members", "members-before"))
    rows = []
    for name in dict.fromkeys(member for member, _ in found):
        each = [found[name, model] for model in KINDS]
        if any(row["gain"] is None or row["gain"] >= 0.01 for row in each):
            gains = ["-" if row["gain"] is None else number(row["gain"]) for row in each]
            seconds = [number(file[name, "at"]["seconds"], 3) if (name, "at") in file else "-"
                       for file in (before, found)]
            rows.append([name, *seconds, *gains])
    total = [number(sum(row["seconds"] for (_, model), row in file.items() if model == "at"), 3)
             for file in (before, found)]
    rows.append(["all, in three norms", *total, *("" for _ in KINDS)])
    return markdown(["attack", "s a point (AT), before", "now", *KINDS.values()], rows, left=1)


def stability_table(rows: list[dict]) -> str:
    """The rows of benchmarks/stability.py, a line for each defense and precision, with the runs' extremes."""
    lines = []
    for name, precision in dict.fromkeys((row["defense"], row["precision"]) for row in rows):
        runs = [row for row in rows if (row["defense"], row["precision"]) == (name, precision)]
        used = dict.fromkeys((row["aten"], row["onednn"]) for row in runs)
        sets = ["native" if both == ("all", "all") else ", ".join(both) for both in used]
        at_chance = sum(row["epochs_at_chance"] > 0 for row in runs)
        found = [extremes([row[metric] for row in runs if metric in row]) for metric in HELD_OUT]
        lines.append([name, precision, "; ".join(sets), str(len(runs)), str(at_chance), *found])
    head = ["defense", "precision", "instruction sets", "runs", "at chance"]
    return markdown([*head, *(f"{name}, min / median / max" for name in HELD_OUT.values())], lines, left=3)


def stability() -> str:
    """A table for each file, under a line with a link to it."""
    parts = []
    for file in sorted((RESULTS / "stability").glob("*.json")):
        rows = load(file)["rows"]
        stopped = sorted({row["epochs"] for row in rows if " --epochs " in row["command"]})
        note = f", stopped after {' or '.join(map(str, stopped))} epochs" if stopped else ""
        link = f"[`results/stability/{file.name}`](../results/stability/{file.name})"
        parts.append(f"{link}{note}:\n\n{stability_table(rows)}")
    return "\n\n".join(parts)
