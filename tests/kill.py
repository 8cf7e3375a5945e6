"""kill.py: kills a tiny run with SIGKILL, again and again, resumes it, and compares its end with an undisturbed run's.

    python tests/kill.py --kills 30

Half of the kills come at a random moment, half while a checkpoint or the adapter is being written (a .tmp file is
there). At the end all files of both runs must be equal, but for the three fields of metrics.jsonl that tell the time,
and no kill may have cost more steps than lie between two checkpoints. tests/test_resume.py runs a short form.
"""
import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")
EVERY, CLOCK = 3, ("tokens_per_second", "peak_memory_mb", "seconds")


def start(place, steps):
    """Begins the run place/run, or goes on with it if there is something to go on with -> the process."""
    flags = ["--resume", "run"]
    if not (place / "run" / "config.json").exists():                            # killed before it had begun
        shutil.rmtree(place / "run", ignore_errors=True)
        flags = ["--out", "run", "--save-every", str(EVERY), "--steps", str(steps), *"--base-steps 15 --prompts 4 "
                 "--loss dapo --overlong-buffer 30 --lr 1e-4 --group-size 8 --sample-every 5 --test-problems 8 "
                 "--device cpu".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, TRAIN, *flags], cwd=place, env=environment, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def content(run):
    """{name: bytes} of a run's files; of metrics.jsonl without what tells the time."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    metrics = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    assert all(metrics[i]["step"] == i + 1 for i in range(len(metrics))), "lines of metrics.jsonl are missing, or twice"
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics]
    for name in found:
        if name.startswith("checkpoint"):                                       # equal numbers may be pickled otherwise
            found[name] = flat(torch.load(io.BytesIO(found[name][32:]), weights_only=True))
            found[name].pop("sizes metrics.jsonl")                              # digits of the clock
    return found


def flat(tree, name=""):
    """A tree of dicts and lists as {path: number, or bytes of a tensor}."""
    if isinstance(tree, torch.Tensor):
        return {name: tree.numpy().tobytes()}
    if not isinstance(tree, (dict, list, tuple)):
        return {name: tree}
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, branch in branches for k, v in flat(branch, f"{name} {key}".strip()).items()}


def steps_lost(run):
    """Steps in metrics.jsonl that no checkpoint holds."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    return lines - max((int(p.stem[-6:]) for p in run.glob("checkpoint-*.pt")), default=0)


def survive(place, kills, steps, seed=0, say=print):
    """Kills runs until `kills` is reached. Raises AssertionError if one ends otherwise than the undisturbed one."""
    rng, killed, runs, saving = random.Random(seed), 0, 0, 0
    (place / "undisturbed").mkdir()
    (place / "killed").mkdir()
    began = time.time()
    process = start(place / "undisturbed", steps)
    assert process.communicate()[1] is not None and process.returncode == 0
    length, run = time.time() - began, place / "killed" / "run"
    wanted = content(place / "undisturbed" / "run")
    assert sum(line["grad_norm"] > 0 for line in wanted["metrics.jsonl"]) > steps / 2, "it has nothing to learn from"
    while killed < kills:
        process, began = start(place / "killed", steps), time.time()
        moment, wait_for_file = began + rng.uniform(0, length), rng.random() < 0.5
        while process.poll() is None and killed < kills:
            writing = wait_for_file and time.time() > began + 0.5 * (moment - began) and any(run.glob("*.tmp"))
            if writing or not wait_for_file and time.time() > moment:
                process.send_signal(signal.SIGKILL)
                killed, saving = killed + 1, saving + writing
                break
            time.sleep(0.0005)
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        assert steps_lost(run) <= EVERY, "a kill cost more than the steps since the last checkpoint"
        if process.returncode == 0 or killed == kills:
            process = start(place / "killed", steps) if process.returncode else process
            error = process.communicate()[1] if process.returncode is None else error
            assert process.returncode == 0, error
            found, runs = content(run), runs + 1
            different = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
            assert not different, f"after {killed} kills these differ: {different}"
            shutil.rmtree(run)
        say(f"{killed} kills, {saving} of them while saving; {runs} runs ended as the undisturbed one did")
    return killed, saving, runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survive(Path(folder), o.kills, o.steps, o.seed)
