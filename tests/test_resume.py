"""Runs that survive: an interrupted run ends as an undisturbed one does, to the last bit; files are written whole."""
import errno
import hashlib
import io
import json
import os
import pickle
import signal
from dataclasses import fields
from shutil import copytree, rmtree

import pytest
import torch

import cache
import grpo
import kill
import train
from conftest import call, lines

TINY = ("--prompts 2 --group-size 4 --window 8 --evict-ratio 0.5 --base-steps 3 --steps 6 --save-every 2 "
        "--sample-every 3 --test-problems 0 --loss dapo --overlong-buffer 30 --device cpu").split()  # pays the short


def interrupted(monkeypatch, after, *argv, number=signal.SIGTERM):
    """Runs train.py and sends itself a signal in step `after` -> exit code."""
    def train_step(c, step, *rest):
        if step + 1 == after:
            os.kill(os.getpid(), number)
        return grpo.train_step(c, step, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        return call(train, *argv)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of six steps, and what its files hold."""
    out = tmp_path_factory.mktemp("resume") / "run"
    assert call(train, *TINY, "--out", out) == 0
    assert all(m["grad_norm"] > 0 for m in lines(out / "metrics.jsonl"))
    return out


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The same run, ended by SIGTERM in its fifth step."""
    out = tmp_path_factory.mktemp("resume") / "run"
    assert interrupted(pytest.MonkeyPatch(), 5, *TINY, "--out", out) == 0
    return out


@pytest.fixture
def half(ended, tmp_path):
    """A copy of it."""
    return copytree(ended, tmp_path / "run")


def assert_same(run, whole):
    found, wanted = kill.content(run), kill.content(whole)
    for files in found, wanted:
        for name in ("config.json", "adapter_config.json"):                     # they hold the folder's name
            files.pop(name)
        for name in sorted(name for name in files if name.startswith("checkpoint"))[:-1]:
            files.pop(name)                                                     # the one before depends on the kill
    assert found == wanted


def test_killed_runs_end_like_an_undisturbed_one(tmp_path):
    """The short form of tests/kill.py: real processes, SIGKILL, also while files are written."""
    killed, saving, runs = kill.survive(tmp_path, 2, steps=9, say=lambda text: None)
    assert killed == 2 and runs >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(number, whole, tmp_path, monkeypatch, capsys):
    run, before = tmp_path / "run", [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert interrupted(monkeypatch, 3, *TINY, "--out", run, number=number) == 0
    said = capsys.readouterr().out
    assert f"stopped after step 3 of 6; go on with: python train.py --resume {run}" in said
    assert len(lines(run / "metrics.jsonl")) == 3 and (run / "checkpoint-000003.pt").exists()
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert call(train, "--resume", run) == 0
    assert_same(run, whole)


def test_asked_twice_it_stops_at_once(tmp_path, monkeypatch):
    def train_step(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")
    monkeypatch.setattr(train, "train_step", train_step)
    assert call(train, *TINY, "--out", tmp_path / "run") == 130


SETTINGS = ["--adapter lora", "--adapter no-global --memory-update sum --truncate-memory 1", "--micro-batch 0",
            "--inner-epochs 2 --kl-coef 0.1", "--window 0 --evict-ratio 0.1"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_goes_on_exactly(settings, tmp_path, monkeypatch):
    """Also one that was found out on the way, such as --micro-batch 0."""
    for name in ("whole", "half"):
        flags = [*TINY, *settings.split(), "--out", tmp_path / name]
        if name == "half":
            assert interrupted(monkeypatch, 3, *flags) == 0
            assert call(train, "--resume", tmp_path / name) == 0
        else:
            assert call(train, *flags) == 0
    assert_same(tmp_path / "half", tmp_path / "whole")


def test_problems_of_a_file_go_on_where_they_were(whole, problems, tmp_path, monkeypatch, capsys):
    """Three problems, two a step: shuffled anew within the steps that are skipped. And the file must be the same."""
    text, mine = problems.read_text(), tmp_path / "mine.jsonl"
    mine.write_text(text)
    flags = [*TINY, "--model", whole / "base", "--data", mine]
    assert call(train, *flags, "--out", tmp_path / "whole") == 0
    assert interrupted(monkeypatch, 3, *flags, "--out", tmp_path / "half") == 0
    mine.write_text(text.replace("903341", "903342"))
    assert call(train, "--resume", tmp_path / "half") == 2
    assert f"{mine} is not what it was" in capsys.readouterr().err
    mine.write_text(text)
    assert call(train, "--resume", tmp_path / "half") == 0
    assert_same(tmp_path / "half", tmp_path / "whole")


def test_lines_behind_the_checkpoint_are_cut_and_a_shorter_file_is_refused(half, whole, capsys):
    (half / "checkpoint-000007.pt.tmp").write_text("half a file")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(half / name, "a") as file:
            file.write('{"step": 6}\n{"step": 7, "rew')
    copytree(half, half.parent / "short")
    assert call(train, "--resume", half) == 0
    assert_same(half, whole)
    with open(half.parent / "short" / "metrics.jsonl", "r+b") as file:
        file.truncate(99)
    assert call(train, "--resume", half.parent / "short") == 2
    assert "metrics.jsonl is shorter" in capsys.readouterr().err


def test_the_two_newest_checkpoints_are_kept(whole, half):
    assert [p.name for p in sorted(whole.glob("*.pt"))] == ["checkpoint-000004.pt", "checkpoint-000006.pt"]
    assert [p.name for p in sorted(half.glob("*.pt"))] == ["checkpoint-000004.pt", "checkpoint-000005.pt"]
    assert not [*whole.rglob("*.tmp")]


def spoilt(data, how):
    middle = len(data) // 2
    return {"flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:], "cut": data[:-5], "empty": b"",
            "another's": checkpoint({"step": 5, "adapter": {"h_g": torch.zeros(3)}, "optimizer": {}, "health": {}}),
            "no dict": checkpoint([1, 2]), "a program": checkpoint(Program())}[how]


class Program:
    """What pickle would execute."""
    def __reduce__(self):
        return os.mkdir, ("executed",)


def checkpoint(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=pickle)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "another's", "no dict", "a program"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, half, whole, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    newest = half / "checkpoint-000005.pt"
    newest.write_bytes(spoilt(newest.read_bytes(), how))
    assert call(train, "--resume", half) == 0
    said = capsys.readouterr().err
    assert f"{newest} cannot be used" in said and "from step 5 on" in said
    (half / "checkpoint-000005.pt.damaged").unlink()
    assert not newest.exists() and not (tmp_path / "executed").exists()
    assert_same(half, whole)


def test_if_all_checkpoints_are_damaged_it_says_so(half, capsys):
    for path in half.glob("checkpoint-*.pt"):
        path.write_bytes(b"nothing")
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert call(train, "--resume", half) == 2
    assert "no checkpoint there can be used" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def test_without_a_checkpoint_it_begins_anew(half, whole):
    """Killed before the first was written, or while the base was made."""
    for path in half.glob("checkpoint-*.pt"):
        path.unlink()
    rmtree(half / "base")
    settings = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "fingerprint"}))
    assert call(train, "--resume", half) == 0
    assert_same(half, whole)


def test_a_finished_run_may_get_more_steps(whole, tmp_path, capsys):
    copytree(whole, tmp_path / "run")
    assert call(train, "--resume", tmp_path / "run") == 0                       # nothing left to do
    assert_same(tmp_path / "run", whole)
    assert call(train, "--resume", tmp_path / "run", "--steps", 8) == 0
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [*range(1, 9)] and metrics[:6] == lines(whole / "metrics.jsonl")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 8
    assert call(train, "--resume", tmp_path / "run", "--steps", 7) == 2
    assert "--steps 7" in capsys.readouterr().err


def test_the_table_of_fewer_steps_makes_room(tmp_path):
    flags = [*TINY, "--out", tmp_path / "run", "--steps", 2, "--test-problems", 4]
    assert call(train, *flags) == 0
    table = (tmp_path / "run" / "table.json").read_text()
    assert call(train, "--resume", tmp_path / "run", "--steps", 3) == 0
    assert (tmp_path / "run" / "table.json").read_text() != table


OTHER = {str: "x", int: 7, float: 0.125, bool: True}  # a value that each kind of flag may have
CHANGES = [f.name for f in fields(train.Config) if f.name not in ("resume", "merge", *train.FREE, "steps")]


@pytest.mark.parametrize("name", CHANGES)
def test_a_flag_that_matters_may_not_change(name, half, capsys):
    field = {f.name: f for f in fields(train.Config)}[name]
    began = json.loads((half / "config.json").read_text())[name]
    value = next(x for x in field.metadata["choices"] or [OTHER[field.type]] if x != began)
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert call(train, "--resume", half, f"--{name}", value) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--{name.replace('_', '-')} {value}" in said and str(half) in said
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def test_what_does_not_matter_may_change(half):
    assert call(train, "--resume", half, "--save-every", 1, "--sample-every", 1, "--compile", "off") == 0


# ---- a disk that fills -----------------------------------------------------------------------------------------------
class Full(io.FileIO):
    """A file on a disk with room for 1,000 more bytes."""
    def write(self, data):
        if self.tell() + len(data) > 1000:
            super().write(bytes(data)[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_fills_while_saving(whole, tmp_path, monkeypatch, capsys):
    """The checkpoint before is whole, nothing half-written is left, and with room again the run goes on exactly."""
    run, saves = tmp_path / "run", []

    def save(*arguments):
        saves.append(1)
        if len(saves) == 2:
            monkeypatch.setattr(cache, "open", lambda path, mode: Full(path, "w"), raising=False)
        train_save(*arguments)
    train_save = train.save
    monkeypatch.setattr(train, "save", save)
    assert call(train, *TINY, "--out", run) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-000004.pt: No space left on device; make room" in said and f"--resume {run}" in said
    assert [p.name for p in sorted(run.glob("checkpoint*"))] == ["checkpoint-000002.pt"]
    assert not [*run.rglob("*.tmp")]
    monkeypatch.undo()
    assert call(train, "--resume", run) == 0
    assert_same(run, whole)


def test_a_disk_that_fills_while_a_line_is_written(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    real = train.appending
    monkeypatch.setattr(train, "appending", lambda path, size: real(path, size).close() or Full(path, "a"))
    assert call(train, *TINY, "--out", run) == 2
    assert "No space left on device; make room" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert call(train, "--resume", run) == 0
    assert_same(run, whole)
