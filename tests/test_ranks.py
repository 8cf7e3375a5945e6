"""Several processes share a step: what they compute together is what one process computes, but for rounding.

As a script, one of the processes: WORLD_SIZE, RANK, ... in the environment; it writes what it computed to a file."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cache
import grpo
import train
from conftest import call, lines, tiny_encoder, tiny_model, tiny_prompts
from encoder import load
from model import read_safetensors
from rollout import generate

TINY = ("--prompts 4 --group-size 4 --window 8 --evict-ratio 0.5 --base-steps 3 --steps 4 --save-every 2 --device cpu "
        "--test-problems 4 --loss dapo --overlong-buffer 30 --lr 1e-4").split()


def start(script, world, *argv):
    """Starts `world` processes of a script, as torchrun does -> processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
    return [subprocess.Popen([sys.executable, script, *map(str, argv)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)]


def ended(processes):
    """[(exit code, stdout, stderr)]"""
    return [(p.returncode, *out) for p, out in [(p, p.communicate(timeout=120)) for p in processes]]


def gradients_of_a_step(run, path):
    """One step on the run's base in float64, with an adapter that matters; the gradients and metrics go to a file."""
    torch.set_default_dtype(torch.float64)
    cache.join(4, "cpu")
    c = train.Config(prompts=4, group_size=4, window=8, evict_ratio=0.5, loss="dapo", overlong_buffer=30,
                     micro_batch=12, max_grad_norm=1e9, kl_coef=0.1, steps=4)
    model, encoder, tokenizer, _ = double_model(run)
    problems = next(train.batches(c, None))
    optimizer = torch.optim.SGD(encoder.trainable().values())
    metrics, _ = grpo.train_step(c, 0, model, encoder, tokenizer, optimizer, problems, grpo.Health(c.micro_batch))
    if grpo.ranks()[0] == 0:
        torch.save(({name: p.grad for name, p in encoder.trainable().items()}, metrics), path)


def double_model(run):
    """The run's model and adapter in float64."""
    model, encoder, tokenizer, config = load("", run, "float32", "cpu")
    for module in model, encoder:
        module.double()
    model.frequencies = model.frequencies.double()
    torch.manual_seed(0)
    for linear in encoder.linears.values():
        torch.nn.init.normal_(linear.A, std=0.1)
    return model, encoder, tokenizer, config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert call(train, *TINY, "--out", out) == 0
    return out


def test_two_processes_have_the_gradient_of_one(alone, tmp_path):
    """The same global batch, to 1e-6 (in float64: what differs is no rounding); and metrics of all rows."""
    found = {}
    for world in (1, 2):
        path = tmp_path / f"{world}.pt"
        for code, _, error in ended(start(__file__, world, alone, path)):
            assert code == 0, error
        found[world] = torch.load(path)
    (one, metrics), (two, shared) = found[1], found[2]
    assert one.keys() == two.keys() and all(x.abs().max() > 0 for x in one.values())
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-6 * one[name].norm(), name
    for name in metrics.keys() - {"seconds", "tokens_per_second", "peak_memory_mb", "logp_gap"}:
        assert shared[name] == pytest.approx(metrics[name], rel=1e-6), name
    assert shared["logp_gap"] < 1e-6 and metrics["grad_norm"] > 0


def test_a_run_of_two_processes_is_the_run_of_one(alone, tmp_path):
    """train.py as torchrun starts it: one of them writes; rewards, samples and the table are the same."""
    out = tmp_path / "run"
    (code, printed, error), (other, nothing, _) = ended(start(train.__file__, 2, *TINY, "--out", out))
    assert code == other == 0, error
    assert "| PTE |" in printed and not nothing
    for one, two in zip(lines(alone / "metrics.jsonl"), lines(out / "metrics.jsonl"), strict=True):
        assert one["reward"] == pytest.approx(two["reward"]) and one["response_tokens"] == two["response_tokens"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert (out / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    wanted, found = (read_safetensors(run / "adapter.safetensors") for run in (alone, out))
    assert wanted.keys() == found.keys() and all((wanted[name] - found[name]).abs().max() < 1e-4 for name in wanted)


def test_torchrun_itself(alone, tmp_path):
    """The README's command, and that two processes resume what one began."""
    out = tmp_path / "run"
    how = dict(env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    done = subprocess.run([*torchrun, *TINY, "--steps", "2", "--out", out], **how)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*torchrun, "--resume", out, "--steps", "4"], **how)
    assert done.returncode == 0 and [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2, 3, 4], done.stderr
    assert json.loads((out / "config.json").read_text())["steps"] == 4


def test_problems_that_cannot_be_shared_are_refused(tmp_path):
    for code, _, error in ended(start(train.__file__, 2, *TINY, "--prompts", 3, "--out", tmp_path / "run")):
        assert code == 2 and "--prompts 3 cannot be shared by 2 processes" in error and not [*tmp_path.iterdir()]


def test_a_row_draws_the_same_in_any_share():
    model = tiny_model()
    settings = dict(group_size=2, max_new_tokens=12, window=8, seed=3)
    prompts = tiny_prompts(3, 7, 1, 5)
    whole = generate(model, tiny_encoder(model), prompts, **settings).tokens
    model = tiny_model()
    encoder = tiny_encoder(model)
    parts = [generate(model, encoder, prompts[2 * i:2 * i + 2], share=(i, 2), **settings).tokens for i in range(2)]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(parts[0], parts[1])


if __name__ == "__main__":
    gradients_of_a_step(Path(sys.argv[1]), sys.argv[2])
