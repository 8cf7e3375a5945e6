"""A run that is not well says so, and what can be mended on the way is: numbers that are none, memory that is short."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import grpo
import train
from conftest import ALL, call, gradients, lines
from grpo import Health

TINY = ("--prompts 2 --group-size 4 --window 8 --evict-ratio 0.5 --base-steps 3 --steps 6 --test-problems 0 "
        "--device cpu --loss dapo --overlong-buffer 30").split()                # the short are paid: there is a gradient


def spoil(monkeypatch, steps, what):
    """From its steps on, `backward` also calls what(parameters of the adapter, sums), which may spoil them."""
    real, real_step, now = grpo.backward, train.train_step, [0]

    def backward(model, encoder, *arguments, **settings):
        sums = real(model, encoder, *arguments, **settings)
        if now[0] in steps:
            what([*encoder.trainable().values()], sums)
        return sums

    def train_step(c, step, *rest):
        now[0] = step + 1
        return real_step(c, step, *rest)
    monkeypatch.setattr(grpo, "backward", backward)
    monkeypatch.setattr(train, "train_step", train_step)


BAD = {"a gradient that is nan": lambda p, sums: p[0].grad.view(-1)[0].fill_(float("nan")),
       "a gradient that is infinite": lambda p, sums: p[-1].grad.fill_(float("inf")),
       "a loss that is nan": lambda p, sums: sums.update(loss=float("nan"))}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_finite_is_skipped_and_counted(what, tmp_path, monkeypatch, capsys):
    """Steps 2, 3 and 5 are not taken; neither the adapter nor AdamW's moments see them."""
    spoil(monkeypatch, (2, 3, 5), BAD[what])
    moved, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: moved.append(1) or real(self))
    assert call(train, *TINY, "--out", tmp_path / "run") == 0
    metrics = [json.loads(line, parse_constant=pytest.fail) for line in
               (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]   # NaN is no JSON
    assert [m["skipped"] for m in metrics] == [False, True, True, False, True, False] and len(moved) == 3 + 3
    assert None in (metrics[1]["grad_norm"], metrics[1]["loss"]) and metrics[3]["grad_norm"] > 0
    said = capsys.readouterr().err
    assert all(f"step {n}: the loss or its gradient is not finite" in said for n in (2, 3, 5))
    assert all(torch.isfinite(x).all() for x in train.Transformer.from_folder(tmp_path / "run" / "base").parameters())


def test_three_in_a_row_end_the_run_with_advice(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, (3, 4, 5), BAD["a gradient that is nan"])
    assert call(train, *TINY, "--out", tmp_path / "run") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "three updates in a row" in last and "step 5" in last and "--lr" in last


def test_a_gap_that_is_no_rounding_warns_once(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, (2, 3, 4), lambda p, sums: sums.update(gap=0.01))
    assert call(train, *TINY, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert said.count("logp_gap 0.01 is above 0.001") == 1 and "step 2: logp_gap" in said
    gaps = [m["logp_gap"] > 1e-3 for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert gaps == [False] + [True] * 3 + [False] * 2


@pytest.mark.parametrize("gap, dtype_limit, warned", [
    (9e-4, 1e-3, False), (2e-3, 1e-3, True), (float("nan"), 1e-3, True), (0.4, 0.5, False), (0.6, 0.5, True)])
def test_what_counts_as_too_large_a_gap(gap, dtype_limit, warned):
    health = Health(1)
    health.look(1, gap, True, True, dtype_limit)
    assert health.warned == warned


def test_rewards_that_are_all_equal_are_told_after_ten_steps(capsys):
    health, told = Health(1), []
    for step, spread in enumerate([0] * 9 + [1] + [0] * 25 + [1] + [0] * 10, start=1):
        health.look(step, 0.0, bool(spread), True, 1e-3)
        if "for 10 steps all rewards of every group were equal" in capsys.readouterr().err:
            told.append(step)
    assert told == [20, 46]                                                     # once each time


def test_a_run_without_any_reward_says_so(tmp_path, capsys):
    flags = [flag for flag in TINY if flag not in ("--loss", "dapo", "--overlong-buffer", "30")]
    assert call(train, *flags, "--steps", 11, "--max-new-tokens", 2, "--window", 0, "--out", tmp_path / "run") == 0
    assert capsys.readouterr().err.count("step 10: for 10 steps") == 1


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    c = train.Config(lr=2.0, warmup=10, steps=1000)
    found = [grpo.learning_rate(step, c) for step in (0, 4, 9, 500, 1000)]
    assert found == pytest.approx([0.2, 1.0, 2 * (1 - 0.9 * 9 / 1000), 1.1, 0.2])
    assert grpo.learning_rate(0, train.Config(lr=2.0, warmup=0)) == 2.0


# ---- out of memory ---------------------------------------------------------------------------------------------------
def settings(**changes):
    return train.Config(**{"micro_batch": 4096, **changes})


def starved(monkeypatch, most):
    """A GPU on which more than `most` rows at a time do not fit; it fails when their gradient is already added."""
    real, sizes = grpo.backward, []

    def backward(model, encoder, rollout, advantages, rows, **how):
        sizes.append(len(rows))
        sums = real(model, encoder, rollout, advantages, rows, **how)
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums
    monkeypatch.setattr(grpo, "backward", backward)
    return sizes


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_gradient(most, roll, float64, monkeypatch, capsys):
    model, encoder, r = roll()
    advantages = torch.linspace(-1, 1, len(ALL))
    wanted, _ = gradients(model, encoder, r, advantages)
    sizes, health = starved(monkeypatch, most), Health(4096)
    optimizer = torch.optim.SGD(encoder.trainable().values())
    parts = grpo.accumulate(settings(), model, encoder, optimizer, r, advantages, 100, health)
    for name, p in encoder.trainable().items():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)
    assert sum(part["tokens"] for part in parts) == r.lengths.sum()
    assert (health.micro_batch == 4096) == (most == 8) and (sizes[0] == 8)
    told = capsys.readouterr().err.count("out of memory: --micro-batch")
    assert told == {1: 3, 2: 2, 3: 2, 5: 1, 8: 0}[most]


def test_if_a_single_row_does_not_fit_it_says_what_to_lower(roll, monkeypatch):
    model, encoder, r = roll()
    starved(monkeypatch, 0)
    with pytest.raises(grpo.UserError, match="--window"):
        grpo.accumulate(settings(), model, encoder, torch.optim.SGD(encoder.trainable().values()), r,
                        torch.linspace(-1, 1, len(ALL)), 100, Health(4096))


def test_out_of_memory_in_a_rollout_says_what_to_lower(tmp_path, monkeypatch, capsys):
    def generate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(grpo, "generate", generate)
    assert call(train, *TINY, "--out", tmp_path / "run") == 2
    assert "out of memory in a rollout: lower --prompts" in capsys.readouterr().err.splitlines()[-1]


def test_the_tracker_gets_what_metrics_jsonl_gets(tmp_path, monkeypatch):
    """--wandb, with a stand-in: it was never run against the service itself."""
    logged, began = [], {}
    fake = SimpleNamespace(__spec__=SimpleNamespace(), init=lambda **how: began.update(how) or SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert call(train, *TINY, "--steps", 2, "--wandb", "--out", tmp_path / "run") == 0
    assert [step for step, _ in logged] == [1, 2]
    assert [m for _, m in logged] == lines(tmp_path / "run" / "metrics.jsonl")
    assert began["name"] == "run" and began["config"]["window"] == 8
