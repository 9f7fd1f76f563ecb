"""harness/folder.py: of many that want a folder one gets it; a file is the old one or the new one."""
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from harness.errors import UserError
from harness.folder import claim_folder, held, whole_file, write_text


def at_once(count, work):
    """The results of work(k) for k < count, begun at the same moment; a refusal is its UserError."""
    barrier = threading.Barrier(count)

    def one(k):
        barrier.wait()
        try:
            return work(k)
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_runs_that_begin_at_the_same_moment_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [folder for _ in range(20)
               for folder in at_once(3, lambda k: (claim_folder(None, "script", {"seed": k}), k))]
    assert len({folder for folder, _ in folders}) == 60
    assert all(json.loads((folder / "config.json").read_text())["seed"] == k for folder, k in folders)


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_two_name_at_the_same_moment_is_one_of_theirs(exists, tmp_path):
    for trial in range(20):
        out = tmp_path / str(trial) / "out"
        if exists:
            out.mkdir(parents=True)
        found = at_once(2, lambda k, out=out: claim_folder(str(out), "script", {"seed": k}))
        winner, = (k for k, place in enumerate(found) if place == out)
        assert json.loads((out / "config.json").read_text()) == {"seed": winner}
        assert isinstance(found[1 - winner], UserError) and "name another --out_dir" in str(found[1 - winner])


@pytest.mark.parametrize("make",
                         [lambda path: path.write_text("mine"),
                          lambda path: (path / "deep").mkdir(parents=True)])
def test_what_is_there_is_left_alone(make, tmp_path):
    make(tmp_path / "out")
    with pytest.raises(UserError, match=r"out already holds something.*another --out"):
        claim_folder(str(tmp_path / "out"), "script", {}, "--out")
    assert not list(tmp_path.rglob("config.json"))


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"No space left on device.*another --out_dir"):
        claim_folder(str(tmp_path / "out"), "script", {})
    assert not (tmp_path / "out").exists()


HOLD = ("import sys, pathlib, time; from harness.folder import held\n"
        "with held(pathlib.Path(sys.argv[1]), sys.argv[2] == 'shared'):\n"
        "    print('held', flush=True); time.sleep(60)")


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours", "free"), [("alone", False, False), ("alone", True, False),
                                                      ("shared", False, False), ("shared", True, True)])
def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(theirs, ours, free, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), theirs], stdout=subprocess.PIPE,
                             cwd=ROOT)
    try:
        assert other.stdout.readline() == b"held\n"
        if free:
            with held(tmp_path, ours):
                pass
        else:
            with pytest.raises(BlockingIOError), held(tmp_path, ours):
                pass
    finally:
        other.kill()
        other.wait()
    with held(tmp_path):
        pass


def test_a_file_that_fails_leaves_the_old_one_and_no_other(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt") as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
