"""GRPO: what is replayed is what was sampled; advantages, the clip, and which tokens count."""
from dataclasses import replace

import pytest
import torch

import grpo
from conftest import ALL, EOS, E, T, W, assert_same, gradients, logits_by_hand, off_policy, rows_of
from grpo import clipped_loss, group_advantages, micro_batches, overlong_penalty, reference_logps
from rollout import Rollout

EVERY_KIND = [("pte", "paper"), ("pte", "sum"), ("lora", "paper"), ("no-global", "paper"), ("global-only", "paper")]


def replayed(model, encoder, r, rows=ALL, truncate=0):
    """The log-probs (b, T) that the replay finds, all segments put together."""
    found, stop = torch.zeros(r.logps.shape), 0
    with torch.no_grad():
        for logps, span, going in grpo.replay(model, encoder, r, rows, truncate):
            assert span.start == stop                                           # every token once and in order
            assert set(going.tolist()) == {b for b in rows.tolist() if r.lengths[b] > stop}  # of those not yet ended
            found[going, span] = logps
            stop = span.stop
    assert stop == r.lengths[rows].max()
    return found[rows, :stop]


def gap(model, encoder, r, rows=ALL, truncate=0):
    logps = replayed(model, encoder, r, rows, truncate)
    counts = torch.arange(logps.shape[1]) < r.lengths[rows, None]
    return (logps - r.logps[rows, :logps.shape[1]]).abs()[counts].max().item()


# ---- the replay is the rollout ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, update", EVERY_KIND + [(None, None)])
def test_replay_equals_rollout(kind, update, roll):
    assert gap(*roll(kind, update)) < 1e-4


@pytest.mark.parametrize("kind, update", EVERY_KIND)
def test_replay_equals_rollout_to_the_last_digits(kind, update, roll, float64):
    model, encoder, r = roll(kind, update)
    assert gap(model, encoder, r) < 1e-10
    for rows in ([7], [0, 1], [6, 2, 5], [1, 6]):                               # any rows, in any order
        assert gap(model, encoder, r, torch.tensor(rows)) < 1e-10
    for n in (1, 2):                                                            # when none has more than n tokens
        assert gap(model, encoder, replace(r, lengths=r.lengths.clamp(max=n))) < 1e-10
    for truncate in (1, 3, 100):                                                # a matter of the gradient only
        assert gap(model, encoder, r, truncate=truncate) < 1e-10


@pytest.mark.parametrize("window, evict_size", [(0, 0), (16, 2), (8, 4), (4, 2)])
def test_replay_under_another_window_does_not_equal_the_rollout(window, evict_size, roll):
    """So the gap can fail: with a full cache, with twice the window, with evictions of another size."""
    model, encoder, r = roll()
    assert gap(model, encoder, replace(r, window=window, evict_size=evict_size)) > 0.1


def test_replay_without_memory_does_not_equal_the_rollout(roll):
    model, encoder, r = roll()
    encoder.kind = "global-only"                                                # S_0 in every segment
    assert gap(model, encoder, r) > 0.1


def test_replay_does_not_see_pads(roll):
    model, encoder, r = roll()
    pads = torch.arange(7) >= r.prompt_lengths[:, None]                         # (N, P)
    other = replace(r, prompt_ids=r.prompt_ids.masked_fill(pads, 17))
    assert pads.any() and torch.equal(replayed(model, encoder, r), replayed(model, encoder, other))


def test_reference_is_the_base_model_with_a_full_cache(roll, float64):
    model, encoder, r = roll()
    got = reference_logps(model, r, ALL)
    for b, (prompt, tokens) in enumerate(rows_of(r)):
        with torch.no_grad():
            logits = logits_by_hand(model, None, prompt, tokens, W=0, E=0)
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(got[b, :len(tokens)], wanted, atol=1e-9, rtol=0)


# ---- advantages, the clip, and which tokens count --------------------------------------------------------------------
@pytest.mark.parametrize("use_std", [True, False])
def test_advantages_compare_within_the_group(use_std):
    rewards = torch.tensor([1., 0, 0, 0, 1, 1, 0.5, 0.5])                       # two groups of 4
    wanted = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.25, -0.25])
    if use_std:                                                                 # of the population: sqrt(3/16), 1/4
        wanted = wanted / (torch.tensor([3 / 16, 1 / 16]).sqrt() + 0.01).repeat_interleave(4)
    torch.testing.assert_close(group_advantages(rewards, 4, use_std, eps=0.01), wanted)
    assert group_advantages(rewards, 4)[0].item() == pytest.approx(0.75 / ((3 / 16) ** 0.5 + 1e-4), abs=1e-6)


@pytest.mark.parametrize("use_std", [True, False])
def test_equal_rewards_give_an_advantage_of_exactly_zero(use_std):
    """Whatever they are: a rest of rounding would be divided by eps, and the row would count as one with spread."""
    for group_size in range(1, 17):
        for reward in (0.0, 1.0, -1.0, 0.1, 0.7, 1 / 3, -0.3125, 0.9):
            assert not group_advantages(torch.full((2 * group_size,), reward), group_size, use_std).any()


def test_overlong_penalty_falls_from_0_to_minus_1_over_the_buffer():
    lengths = torch.tensor([1, 60, 80, 81, 90, 99, 100])
    assert torch.allclose(overlong_penalty(lengths, 100, 20), torch.tensor([0, 0, 0, -0.05, -0.5, -0.95, -1]))
    assert not overlong_penalty(lengths, 100, 0).any()


@pytest.mark.parametrize("A, ratio, loss, slope, clipped", [
    (+1, 0.5, -0.50, -0.5, False), (+1, 1.0, -1.00, -1.0, False), (+1, 1.2, -1.2, -1.2, False),
    (+1, 1.5, -1.28, 0.0, True),                                                # good, and likely enough already
    (-1, 0.5, +0.80, 0.0, True),                                                # bad, and unlikely enough already
    (-1, 0.9, +0.90, +0.9, False), (-1, 1.0, +1.00, +1.0, False), (-1, 1.5, +1.5, +1.5, False),
    (+2, 1.5, -2.56, 0.0, True), (-2, 0.5, +1.60, 0.0, True), (0, 1.5, 0.0, 0.0, False)])
def test_clip_truth_table(A, ratio, loss, slope, clipped):
    """Value, d loss / d log-prob, and the flag: the clip takes the gradient only where it would push further."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    got, flag = clipped_loss(logp, torch.zeros(1, 1), torch.tensor([[float(A)]]), 0.2, 0.28)
    got.sum().backward()
    assert [got.item(), logp.grad.item()] == pytest.approx([loss, slope]) and flag.item() is clipped


def test_on_policy_the_loss_is_plain_policy_gradient(roll, float64):
    """r = 1: every token that counts adds -A to the loss and -A grad log pi to the gradient, and nothing is clipped."""
    model, encoder, r = roll()
    A = torch.arange(8.) - 3
    got, [sums] = gradients(model, encoder, r, A)
    assert sums["loss"] == pytest.approx(-(A * r.lengths).sum().item() / 100) and sums["clipped"] == 0
    encoder.zero_grad()
    for logps, span, rows in grpo.replay(model, encoder, r, ALL):
        counts = torch.arange(span.start, span.stop) < r.lengths[rows, None]
        (-A[rows, None] * logps * counts / 100).sum().backward()
    assert_same(got, {name: p.grad for name, p in encoder.trainable().items()})


def test_nothing_behind_the_end_token_is_trained(roll, float64):
    """Other old log-probs and other tokens there: the same gradient and the same sums, bit for bit."""
    model, encoder, r = roll()
    r, A = off_policy(r), torch.randn(8)
    behind = torch.arange(T) >= r.lengths[:, None]
    other = replace(r, tokens=r.tokens.masked_fill(behind, 11), logps=r.logps - 0.3 * behind)
    wanted, sums = gradients(model, encoder, r, A)
    got, other_sums = gradients(model, encoder, other, A)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted) and sums == other_sums


@pytest.mark.parametrize("b", range(8))
def test_the_end_token_is_trained(b, roll, float64):
    """Row b alone: another old log-prob at its last token is another gradient, and shows as `gap`."""
    model, encoder, r = roll()
    wanted, [sums] = gradients(model, encoder, r, torch.ones(8), [ALL[b:b + 1]])
    r.logps[b, r.lengths[b] - 1] += 0.1
    got, [other_sums] = gradients(model, encoder, r, torch.ones(8), [ALL[b:b + 1]])
    assert (got["h_g"] - wanted["h_g"]).abs().max() > 1e-6 and sums["gap"] < 1e-10
    assert other_sums["gap"] == pytest.approx(0.1)


@pytest.mark.parametrize("token", [0, EOS[0]])
def test_tokens_count_by_length_and_not_by_id(token, roll, float64):
    """Thoughts of nothing but 0, the id that pads the prompts, or of an end token: all of them count."""
    model, encoder, r = roll()
    r = replace(r, tokens=torch.full_like(r.tokens, token))
    r = replace(r, logps=replayed(model, encoder, r))
    _, [sums] = gradients(model, encoder, r, torch.ones(8))
    assert sums["loss"] == pytest.approx(-r.lengths.sum().item() / 100)


def test_kl_is_zero_for_a_fresh_adapter_and_positive_for_any_other(roll, float64):
    """k3, token by token. With window 0: under a window the policy differs from the base even without an adapter."""
    model, encoder, r = roll(fresh=True, window=0)
    _, [sums] = gradients(model, encoder, r, torch.ones(8), kl_coef=0.1)
    assert abs(sums["kl"]) < 1e-12
    model, encoder, r = roll()
    r = replace(r, lengths=torch.ones(8, dtype=torch.long))                     # one token a row, one row a batch
    _, sums = gradients(model, encoder, r, torch.ones(8), ALL[:, None], kl_coef=0.1)
    d = (reference_logps(model, r, ALL) - replayed(model, encoder, r))[:, 0]
    assert (d > 0).any() and (d < 0).any()                                      # where log p - log q has either sign
    assert [s["kl"] for s in sums] == pytest.approx((d.exp() - d - 1).tolist()) and min(s["kl"] for s in sums) > 0


def test_micro_batches_leave_out_rows_without_advantage():
    lengths = torch.tensor([5, 9, 2, 9, 7, 1])
    r = Rollout(*[None] * 4, lengths, None, None, W, E, 40)
    A = torch.tensor([0.5, 0, -1, 1, 0, 0.1])

    def rows(*settings, **more):
        return [x.tolist() for x in micro_batches(r, *settings, **more)]
    assert rows(A, 16) == [[3, 0], [2, 5]]                                      # longest first, W = 8 thoughts a row
    assert rows(A, 31, everything=True) == [[1, 3, 4], [0, 2, 5]]
    assert rows(A, 8) == [[3], [0], [2, 5]]                                     # a short row has a short segment
    assert rows(A, 100) == [[3, 0, 2, 5]] and rows(A, 3) == [[3], [0], [2], [5]]
    assert rows(A * 0, 16) == [[1]]                                             # so that logp_gap is measured
