"""Which arithmetic `--precision auto` takes, and that every arithmetic trains on every instruction set."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from harness.device import choose_dtype
from models import build_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(("amx", "avx512_bf16", "library", "narrow", "wide"), [
    (True, True, True, "bf16", "bf16"), (False, True, True, "float32", "bf16"),
    (False, False, True, "float32", "float32"), (True, True, False, "float32", "float32")])
def test_auto_takes_bfloat16_where_it_is_faster(amx, avx512_bf16, library, narrow, wide, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
    types = {"bf16": torch.bfloat16, "float32": torch.float32}
    assert choose_dtype("auto", CPU, build_model("lenet", 10, 1)) == types[narrow]
    assert choose_dtype("auto", CPU, build_model("small_cnn", 10, 1)) == types[wide]
    # what is named is taken
    assert [choose_dtype(name, CPU, build_model("lenet", 10, 1)) for name in types] == list(types.values())


TRAIN_FOUR = """
import sys
from itertools import product
import train_at_mnist
from harness.config import parse_config
from harness.reporting import figures
figures.redraw_run = lambda folder: []
for network, precision in product(("lenet", "small_cnn"), ("bf16", "float32")):
    words = [*sys.argv[1:], "--model", network, "--precision", precision, "--out_dir", network + precision]
    train_at_mnist.main(parse_config(train_at_mnist.Config, words))
"""


@pytest.mark.slow
@pytest.mark.parametrize("onednn", ["SSE41", "AVX2", "AVX512_CORE"])
def test_every_network_trains_in_both_precisions_whatever_the_library_has(onednn, tmp_path):
    short = ("--batch_size", "8", "--val_size", "8", "--num_steps", "1", "--val_num_steps", "1")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": onednn, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TRAIN_FOUR, *TINY, *short], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: 1 epochs") == 4


@pytest.mark.slow
def test_without_bfloat16_in_the_library_auto_is_float32():
    program = ("import torch; from harness.device import choose_dtype; from models import build_model\n"
               "print(choose_dtype('auto', torch.device('cpu'), build_model('small_cnn', 10, 1)))")
    done = subprocess.run(["env", "ONEDNN_MAX_CPU_ISA=AVX2", sys.executable, "-c", program],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "torch.float32\n", done.stderr
