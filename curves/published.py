"""The published system's command line and file format (Risse, Göpfert & Göpfert, ICANN 2021)."""
from collections.abc import Collection

import numpy as np

from curves.store import Results

NORMS = {"inf": "linf", "2": "l2", "1": "l1"}  # its names, and ours


def spelling(words: list[str], commands: Collection[str]) -> list[str]:
    """Ours for its --model_path, --n_points -1, --save True or --save=False, and for a command that leads."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = ["--command", *words] if words and words[0] in commands else words
    switches = {"true": "--", "false": "--no-"}
    for k in range(len(words) - 2, -1, -1):
        flag, value = words[k].replace("-", "_").removeprefix("__"), words[k + 1].lower()
        if flag in ("save", "plot") and value in switches:
            words[k:k + 2] = [switches[value] + flag]
        elif flag == "n_points" and value in ("-1", "all"):
            del words[k:k + 2]
    return ["--model" if word in ("--model_path", "--model-path") else word for word in words]


def file_format(results: Results) -> dict[str, dict[str, list[float]]]:
    """{norm: {"x": rising distances, "y": i / n}}; a censored point is left out but counts in n."""
    curves = {}
    for name, norm in NORMS.items():
        if norm in results.norms:
            x = np.sort(results.upper(norm)[np.isfinite(results.upper(norm))])
            curves[name] = {"x": x.tolist(), "y": (np.arange(1, len(x) + 1) / len(results)).tolist()}
    return curves
