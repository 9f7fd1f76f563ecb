"""The tables of docs/speed.md, each made from the files in results/ as one piece of Markdown."""
from harness.reporting.cells import NETWORKS, RESULTS, load, number, numbers, pair, rows_of
from harness.reporting.defense_tables import measures, metrics
from harness.reporting.tables import markdown

PROOF = {"fast": "bfloat16", "rounding": "bfloat16, other rounding",
         "sixteen-bits": "bfloat16, first layer to sixteen bits", "float32": "float32, eager"}
EVALUATED = {"autoattack": "AutoAttack (ours)", "pgd100": "PGD-100", "cw": "CW, 20 steps"}
CIFAR_TRAINED_ON = 49_000  # images of CIFAR-10 without those held out


def train_step() -> str:
    """Training steps beside the published form."""
    rows = []
    for row in rows_of("train_step_resnet18", "train_step_wrn34_10", "train_step_mnist"):
        step = numbers(row, batch_size=0, num_steps=0, ours_seconds=3, published_form_seconds=3, ratio=2)
        images = pair(row["images_per_second"], row["published_form_images_per_second"])
        overhead, gflops, peak = numbers(row, overhead_percent=1, gflops=0, peak_percent=1)
        rows.append([NETWORKS[row["model"]], row["method"].upper(), *step, images, f"{overhead} %", gflops,
                     f"{peak} %", pair(row["ours_mb"], row["published_form_mb"], 0)])
    head = ["network", "method", "batch", "attack steps", "ours, s", "published form, s", "ratio",
            "images/s, ours / published form", "overhead", "GFLOP/s", "of peak", "MB, ours / published form"]
    return markdown(head, rows, left=2)


def gains() -> str:
    """What each measure gains over the published form, on a processor without AMX."""
    files = [{row["model"]: row for row in rows_of(f"epyc_{name}")}
             for name in ("float32", "bf16", "default")]
    rows = [[NETWORKS[model], "1", *(number(file[model]["ratio"]) for file in files), row["precision"]]
            for model, row in files[-1].items()]
    head = ["network, TRADES", "published form", "frozen parameters, one clean pass, channels last",
            "and bfloat16", "fused layers, and what auto takes", "that is"]
    return markdown(head, rows, left=1)


def precisions() -> str:
    """The same trainings in bfloat16 and in float32."""
    shown, rows = ("A_nat", "A_rob", "A_sa 1", "A_sa 2"), []
    for path, label in PROOF.items():
        folders = [RESULTS / f"proof/{path}-seed{seed}" for seed in range(3)]
        cells = dict(zip(metrics(), measures(folders)))
        each = ", ".join(number(load(folder / "eval.json")["A_rob"]) for folder in folders)
        rows.append([label, *map(cells.get, shown), each])
    return markdown(["path", *shown, "A_rob of each seed"], rows, left=1)


def expectation() -> str:
    """What a user's machine takes for two usual jobs."""
    at = next(row for row in rows_of("cost")
              if row["result"].partition("/seed")[0] == "results/mnist/lenet-at")
    fast = next(row for row in rows_of("train_step_resnet18") if row["method"] == "trades")
    slow = next(row for row in rows_of("epyc_default") if row["model"] == "resnet18")
    epochs = [number(row["ours_seconds"] * CIFAR_TRAINED_ON / row["batch_size"] / 60, 0)
              for row in (fast, slow)]
    rows = [["two cores with AMX", f"{number(at['seconds'] / 60, 1)} minutes", f"{epochs[0]} minutes"],
            ["two cores with AVX512-BF16", "not measured alone", f"{epochs[1]} minutes"],
            ["one GPU, or several", "not measured", "not measured"]]
    head = ["you have", "MNIST, LeNet, ten epochs of AT", "CIFAR-10, ResNet-18, one epoch of TRADES"]
    return markdown(head, rows, left=3)


def accept() -> str:
    """What harness.accept has said where there is no GPU."""
    files = [load(f"accept/{name}.json")["checks"] for name in ("cpu", "standin")]
    rows = [[row["asks"], row["verdict"], other["verdict"],
             (row if other["verdict"] == "not checked" else other)["found"]] for row, other in zip(*files)]
    head = ["asked", "on a CPU", "on the stand-in", "found, on the stand-in where it is checked"]
    return markdown(head, rows, left=4)


def memory() -> str:
    """The memory of a run."""
    rows = [[row["dataset"], NETWORKS[row["model"]],
             *numbers(row, batches=0, images_mb=0, first_mb=0, end_mb=0, peak_mb=0)]
            for row in rows_of("memory", "memory_mnist_epoch", "memory_tiny-imagenet")]
    head = ["data set", "network", "batches", "images, MB", "after twenty batches, MB", "at the end, MB",
            "at most, MB"]
    return markdown(head, rows, left=2)


def evaluation() -> str:
    """Attacks whose broken images leave the batch, beside the same with every step."""
    rows = [[EVALUATED[row["attack"]], str(row["epsilon"]),
             *numbers(row, num_examples=0, robust_percent=2, compacted_seconds=1, whole_seconds=1, ratio=2,
                      bound=2)]
            for row in rows_of("evaluation", "evaluation_pgd")]
    head = ["attack", "epsilon", "images", "robust, %", "s", "all steps, s", "ratio", "1 / R"]
    return markdown(head, rows, left=1)


def recipes() -> str:
    """One step of every recipe of train_vir.py, over that of AT."""
    rows = [[row["recipe"], *numbers(row, seconds=4, spread=4, ratio=3, expected_ratio=3)]
            for row in rows_of("recipes_lenet")]
    return markdown(["recipe", "s per step", "spread", "over AT", "expected"], rows, left=1)
