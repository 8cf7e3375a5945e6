"""What takes long: killed runs, two processes, damaged files.  python -m pytest -m slow"""
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

import pytest
import torch

from conftest import call           # first: it makes the modules importable
import train
from encoder import load_run
from evaluate import load_problems
from model import Tokenizer, Transformer, UserError, read_safetensors

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
CLOCK = ("seconds", "tokens_per_second", "peak_memory_mb")
TINY = ("--out run --sft-steps 3 --steps 5 --save-every 2 --prompts 2 --group-size 4 --window 8 "
        "--evict-ratio 0.5 --max-new-tokens 20 --base-steps 2 --test-problems 0 --device cpu "
        "--memory-update gated --memory-keys plain").split()
# train.py with rewards that differ even though nothing is right: a response is paid for its length.
PAID = "train.Tally.reward = lambda self, problem, text, n_tokens, ended: n_tokens / 20\n"
# AdamW's first step has the size lr however small a gradient is: rounding would decide its sign.
SGD = "train.torch.optim.AdamW = lambda p, **_: train.torch.optim.SGD(p)\n"

def start(folder, flags, threads=1, patch="", launcher=()):
    """Starts train.py in a folder, in a process of its own."""
    script = folder / "train.py"
    script.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n{PAID}{patch}"
                      "train.run_script(train.main)\n")
    return subprocess.Popen([sys.executable, *launcher, str(script), *flags], cwd=folder, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": str(threads),
                                              "OMP_WAIT_POLICY": "passive"},    # for a busy machine
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(process):
    """Waits for the process, which must end well -> what it has printed."""
    printed = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, printed
    return printed

def result(run):
    """What a run has led to, without what tells the time."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: line[name] for name in line if name not in CLOCK} for line in metrics]
    assert metrics[-1]["grad_norm"] > 0
    adapters = [(run / name / "adapter.safetensors").read_bytes() for name in ("", "sft")]
    return metrics, (run / "samples.jsonl").read_text(), adapters

@pytest.mark.parametrize("threads, kills", [(1, 3), (2, 3), (2, 0)])
def test_a_killed_run_ends_as_an_undisturbed_one(threads, kills, tmp_path):
    """It is killed again and again, at a random moment or while it saves, and resumed. Whenever it
    is finished, its result must be an undisturbed run's."""
    calm = tmp_path / "calm"
    killed = tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    begin = time.time()
    finish(start(calm, TINY, threads))
    duration = time.time() - begin
    rng = random.Random(0)
    n_kills = 0
    done = False
    while n_kills < kills or not done:
        run = killed / "run"
        flags = ["--resume", "run"]
        if done or not (run / "config.json").exists():          # finished, or it had not begun
            shutil.rmtree(run, ignore_errors=True)
            flags = TINY
        process = start(killed, flags, threads)
        saving = False
        moment = time.time() + rng.uniform(0, duration)
        while_saving = rng.random() < 0.5
        while n_kills < kills and process.poll() is None and time.time() < moment and not saving:
            saving = while_saving and any(run.glob("*.tmp"))
            time.sleep(0.0005)
        if n_kills < kills and process.poll() is None:
            process.kill()
            n_kills += 1
        printed = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), printed
        done = process.returncode == 0
        if done:
            assert result(run) == result(calm / "run"), f"another end after {n_kills} kills"

def test_two_processes_have_the_gradient_of_one(tmp_path):
    """The same global batch, so the same three steps up to rounding; of four problems, so that each
    process has responses that teach. (One without replays another, which the metrics count.)"""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    changes = "--prompts 4 --sft-steps 1 --steps 2 --lr 0.1 --encoder-lr 0.1 --warmup 0"
    flags = [*TINY, *changes.split(), "--max-grad-norm", "1e9"]
    results = []
    for launcher in ((), torchrun):
        folder = tmp_path / str(len(launcher))
        folder.mkdir()
        finish(start(folder, flags, patch=SGD, launcher=launcher))
        results.append(result(folder / "run")[0])
        results.append(read_safetensors(folder / "run" / "adapter.safetensors"))
    metrics, adapter, metrics_of_two, adapter_of_two = results
    for one, two in zip(metrics, metrics_of_two, strict=True):
        phase = one.pop("phase")
        assert two.pop("phase") == phase
        assert one.pop("logp_gap", 0) < 1e-4 > two.pop("logp_gap", 0)   # nothing but rounding
        assert two == pytest.approx(one, rel=1e-4)
    for name, tensor in adapter.items():
        assert (adapter_of_two[name] - tensor).norm() <= 1e-5 * tensor.norm(), name

# ----------------------------------------------------------------------------------- damaged files

VALUES = (None, True, -1, 0, 7, 2 ** 31, 10 ** 30, 0.5, float("nan"), "", "x" * 5000, "\ud800",
          [], {}, [[]], {"": None}, "F32", "(a+)+$", {"type": "Split"}, "{{ 9 ** 9 ** 9 }}")

def damage_bytes(data, rng):
    """Cuts out, overwrites or repeats some bytes."""
    first = rng.randrange(len(data))
    last = min(len(data), first + rng.choice((1, 4, 50, len(data))))
    middle = rng.choice((b"", data[first:last] * 2, rng.randbytes(last - first), b"}", b"[" * 5000))
    return data[:first] + middle + data[last:]

def damage_json(data, rng):
    """Gives something in a JSON object another value, or takes it out."""
    tree = json.loads(data)
    parent = tree
    key = rng.choice(list(tree))
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key] = rng.choice(VALUES)
    if rng.random() < 0.2:
        del parent[key]
    return json.dumps(tree).encode()

def damage_header(data, rng):
    """damage_json for the header of a safetensors file."""
    stop = 8 + int.from_bytes(data[:8], "little")
    header = damage_json(data[8:stop], rng)
    return len(header).to_bytes(8, "little") + header + data[stop:]

def use_checkpoint(run):
    _, encoder, _, _ = load_run(run)
    groups = []
    for parameters in (encoder.linears.parameters(), encoder.parameters(recurse=False)):
        groups.append({"params": [p for p in parameters if p.requires_grad]})
    optimizer = torch.optim.AdamW(groups)
    train.load_checkpoint(run, encoder, optimizer)

TARGETS = {                             # a file, how else to damage it, what then reads it
    "base/tokenizer.json": (damage_json, lambda run: Tokenizer.from_folder(run / "base")),
    "base/config.json": (damage_json, lambda run: Transformer.from_folder(run / "base")),
    "base/model.safetensors": (damage_header, lambda run: Transformer.from_folder(run / "base")),
    "adapter.safetensors": (damage_header, load_run),
    "config.json": (damage_json, load_run),
    "checkpoint.pt": (damage_bytes, use_checkpoint),
    "problem.jsonl": (damage_json, lambda run: load_problems(run / "problem.jsonl"))}

@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_works_or_is_refused_in_one_line(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train, *TINY, "--steps", 1)[0] == 0
    Path("run/problem.jsonl").write_text('{"problem": "1 + 1?", "answer": 2, "exact": true}')
    path = Path("run", target)
    sound = path.read_bytes()
    damage, use = TARGETS[target]
    use(Path("run"))
    rng = random.Random(target)
    n_refused = 0
    for case in range(45):
        data = rng.choice((damage_bytes, damage))(sound, rng)
        path.write_bytes(data)
        try:
            use(Path("run"))
        except UserError as error:
            n_refused += 1
            assert len(str(error)) < 2000 and "\n" not in str(error)
        except Exception as error:
            Path(tempfile.gettempdir(), f"damaged-{path.name}").write_bytes(data)
            pytest.fail(f"{target}, case {case}: {error!r:.500}; the file: {data[:300]}")
    assert 10 < n_refused < 45
