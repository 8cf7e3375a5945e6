"""GRPO: what is replayed is what was sampled, and the gradient is that of one graph."""
import functools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import grpo
from cache import SlidingCache
from conftest import (DELTA, E, ENDS, GLOBAL_ONLY, KINDS, LORA, NO_GLOBAL, PLAIN, PROMPTS, T, W,
                      every_kind, logits_by_hand, name_of, rows_of, tiny_encoder, tiny_model,
                      tiny_prompts)
from rollout import generate, given_responses

ALL = torch.arange(len(ENDS))                       # the rows of `roll`
REWARDS = torch.tensor([0.5, 0.5, 1, 0, 0.3, 0.2])  # the first two rows have advantage 0

def gap(model, encoder, r, rows=ALL):
    """The largest |log-prob of the replay - log-prob of the rollout|."""
    found = []

    def collect(logps, columns):
        assert columns.start == sum(x.shape[1] for x in found)      # every token once, in order
        found.append(logps.detach())
        return logps.sum()

    grpo.replay_and_backward(model, encoder, r, rows, collect)
    logps = torch.cat(found, dim=1)                                             # (b, T)
    mask = torch.arange(logps.shape[1]) < r.lengths[rows, None]
    return (logps - r.logps[rows, :logps.shape[1]]).abs()[mask].max().item()

# ---- the replay is the rollout

@every_kind
def test_replay_equals_rollout(kind, roll, float64):
    assert gap(*roll(**kind)) < 1e-10

@pytest.mark.parametrize("kind", [*KINDS, dict(temperature=0), dict(temperature=0.6)], ids=name_of)
def test_replay_equals_rollout_in_float32_at_any_temperature(kind, roll):
    model, encoder, r = roll(**kind)
    assert gap(model, encoder, r) < 1e-4
    assert r.temperature != 0.6 or gap(model, encoder, replace(r, temperature=1.0)) > 0.1

def test_any_part_of_a_rollout_can_be_replayed(roll, float64):
    model, encoder, r = roll()
    for rows in ([5], [1, 0], [4, 0, 5]):                           # any rows, in any order
        assert gap(model, encoder, r, torch.tensor(rows)) < 1e-10
    for n in (1, 2):                                                # none has more than n tokens
        assert gap(model, encoder, replace(r, lengths=r.lengths.clamp(max=n))) < 1e-10

def random_slots(cache):
    """An eviction rule: any E response tokens, drawn by the number of response tokens so far."""
    generator = torch.Generator().manual_seed(cache.n_tokens - cache.P)
    return cache.P + torch.randperm(cache.W, generator=generator)[:cache.E]

@pytest.mark.parametrize("rows", [ALL, ALL[2:4], ALL[4:]])
def test_replay_follows_another_eviction_rule(rows, roll, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SlidingCache, "slots_to_evict", random_slots)
        model, encoder, r = roll()
        assert gap(model, encoder, r, rows) < 1e-4
        patch.setattr(SlidingCache, "slots_to_evict", lambda cache: cache.P + torch.arange(cache.E))
        assert gap(model, encoder, r, rows) > 0.1                   # the rollout had another rule

# ---- one step of GRPO, and the same by hand

SETTINGS = dict(group_size=2, loss="grpo", max_new_tokens=20, micro_batch=1000, kl_coef=0.0,
                clip_low=0.2, clip_high=0.28, inner_epochs=2, max_grad_norm=1e9, truncate_memory=0)

def learned(encoder):
    """{name: parameter}. The delta rule has a decay too, which nothing reads."""
    return {name: x for name, x in encoder.named_parameters()
            if x.requires_grad and (name != "decay" or encoder.memory_update == "gated")}

def step(model, encoder, r, rewards=REWARDS, lr=0.0, all_reduce=lambda x: None, **changes):
    """One step -> its gradients (a dict) and metrics; without rewards a supervised one. Two inner
    epochs: with one, the old log-probs are the replay's, and the clip never acts."""
    config = SimpleNamespace(**SETTINGS | changes)
    optimizer = torch.optim.SGD(encoder.trainable_parameters(), lr)
    if rewards is None:
        metrics = grpo.sft_step(model, encoder, optimizer, r, config, all_reduce)
    else:
        metrics = grpo.grpo_step(model, encoder, optimizer, r, rewards.to(r.logps), config,
                                 all_reduce)
    return {name: x.grad for name, x in learned(encoder).items()}, metrics

def by_hand(loss, encoder, changes):
    """Gradients of a loss, and metrics: the loss, the norms of the gradient, and how much the
    evictions of `logits_by_hand` have changed the memory."""
    parameters = learned(encoder)
    found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True,
                                materialize_grads=True)
    squares = {name: x.square().sum().item() for name, x in zip(parameters, found)}
    of_linears = sum(square for name, square in squares.items() if name.startswith("linears"))
    of_all = sum(squares.values())
    writes = []
    cosines = []
    for before, write, after in changes:                                        # (L, 1, R, R)
        size = before.square().sum(dim=3).sqrt()                                # 0 if S_0 is 0
        writes.append((write.square().sum(dim=3).sqrt() / size).nan_to_num(posinf=0))
        cosines.append((before * after).sum(dim=3) / after.square().sum(dim=3).sqrt() / size)
    return dict(zip(parameters, found)), dict(
        loss=loss.item(), grad_norm=of_all ** 0.5, grad_norm_linears=of_linears ** 0.5,
        grad_norm_encoder=(of_all - of_linears) ** 0.5,
        memory_write=torch.stack(writes).mean().item(),
        memory_cosine=torch.stack(cosines).nan_to_num().mean().item())

def step_by_hand(model, encoder, r, loss="grpo", kl_coef=0.0, truncate_memory=0):
    """Every row alone, token by token, all losses in one graph with one backward pass."""
    groups = REWARDS.to(r.logps).view(3, 2)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    N = len(ALL) * 20                                               # not T, the longest row
    if loss == "grpo":
        advantages = advantages / (groups.var(dim=1, keepdim=True, correction=0).sqrt() + 1e-4)
        N = int(r.lengths.sum())
    losses = []
    kls = []
    gaps = []
    changes = []
    for (prompt, tokens), A, old in zip(rows_of(r), advantages.flatten(), r.logps):
        n = len(tokens)
        logits = logits_by_hand(model, encoder, prompt, tokens, W, E, truncate_memory, changes)
        logps = logits.log_softmax(-1)[range(n), tokens]
        base = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1]
        d = base.log_softmax(-1)[range(n), tokens] - logps
        ratio = (logps - old[:n]).exp()
        losses.append(-torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A).sum())
        kls.append((d.exp() - d - 1).sum())
        if A != 0 or kl_coef:                                       # else it is not replayed
            gaps.append((logps - old[:n]).abs().max().item())
    assert len(changes) == 6 == r.n_evictions().sum()
    loss = (sum(losses) + kl_coef * sum(kls)) / N
    kl = sum(kls).item() / int(r.lengths.sum()) if kl_coef else 0.0
    gradients, numbers = by_hand(loss, encoder, changes)
    return gradients, numbers | dict(kl=kl, logp_gap=max(gaps))

def assert_equal_gradients(got, wanted):
    """Every tensor to 1e-9 of its largest number; and none is zero."""
    assert got.keys() == wanted.keys()
    for name, y in wanted.items():
        if y.numel() > 0:                                           # there may be no global tokens
            assert y.abs().max() > 1e-6, name
            assert (got[name] - y).abs().max() <= 1e-9 * y.abs().max(), name

def off_policy(r):
    """Old log-probs off by up to 0.5: on some tokens the clip acts, on others it does not."""
    torch.manual_seed(4)
    return replace(r, logps=r.logps + torch.rand_like(r.logps) - 0.5)

CASES = [(kind, dict()) for kind in KINDS]
CASES += [(kind, dict(truncate_memory=1)) for kind in (KINDS[1], PLAIN, DELTA)]
CASES += [(PLAIN, dict(kl_coef=0.1)), (DELTA, dict(kl_coef=0.1, loss="dr_grpo"))]

@pytest.mark.parametrize("kind, settings", CASES, ids=name_of)
def test_the_gradient_is_that_of_one_graph(kind, settings, roll, float64):
    """Of every parameter, and so are the metrics, two rows at a time or all: neither pads nor what
    is behind an end token is seen. Only cached keys and values are cut."""
    model, encoder, r = roll(**kind)
    r = off_policy(r)
    wanted, numbers = step_by_hand(model, encoder, r, **settings)
    for micro_batch in (2 * W, 1000):
        got, metrics = step(model, encoder, r, micro_batch=micro_batch, **settings)
        assert_equal_gradients(got, wanted)
        assert {name: metrics[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)
        assert 0 < metrics["ratio_clipped"] < 1

def test_truncation_takes_nothing_from_a_state_without_history(roll, float64):
    """global-only: S = S_0 in all segments, and each of them has its gradient."""
    model, encoder, r = roll(**GLOBAL_ONLY)
    wanted, _ = step(model, encoder, r)
    got, _ = step(model, encoder, r, truncate_memory=1)
    assert_equal_gradients(got, wanted)

def test_with_one_update_the_ratio_is_1_whatever_the_rollout_has_rounded(roll, float64):
    """As in bfloat16: old log-probs that are off change logp_gap, but neither loss nor gradient."""
    model, encoder, r = roll()
    wanted, metrics = step(model, encoder, r)
    got, other_metrics = step(model, encoder, off_policy(r), inner_epochs=1)
    assert_equal_gradients(got, wanted)
    assert other_metrics["logp_gap"] > 0.1 and other_metrics["ratio_clipped"] == 0
    assert other_metrics["loss"] == pytest.approx(metrics["loss"])

def test_the_gradient_does_not_depend_on_how_the_work_is_split(roll, float64, monkeypatch):
    """Into micro-batches; among two processes, with the same rollout, so twice of every sum; and
    over the tokens, so that logits exist for 3 of them at a time."""
    model, encoder, r = roll()
    r = off_policy(r)
    wanted, metrics = step(model, encoder, r, kl_coef=0.1)

    def check(**change):
        got, other_metrics = step(model, encoder, r, kl_coef=0.1, **change)
        assert_equal_gradients(got, wanted)
        assert other_metrics == pytest.approx(metrics, rel=1e-9)

    check(micro_batch=1)
    check(all_reduce=lambda x: x.mul_(2))
    sizes = []
    model.head.register_forward_hook(lambda head, inputs, logits: sizes.append(len(logits)))
    few = functools.partial(grpo.token_logps, chunk_bytes=3 * 40 * 4)
    monkeypatch.setattr(grpo, "token_logps", few)
    check()
    assert max(sizes) == 3

def test_micro_batches_leave_out_rows_without_advantage():
    def batches(advantages, max_tokens, window=8, **settings):
        r = SimpleNamespace(lengths=torch.tensor([5, 9, 2, 9, 7, 1]), window=window)
        return [x.tolist() for x in grpo.micro_batches(r, advantages, max_tokens, **settings)]

    A = torch.tensor([0.5, 0, -1, 1, 0, 0.1])
    assert batches(A, 16) == [[3, 0], [2, 5]]                       # longest first, 8 tokens a row
    assert batches(A, 8) == [[3], [0], [2, 5]]                      # a short row, a short segment
    assert batches(A, 3) == [[3], [0], [2], [5]]                    # at least one row
    assert batches(A, 31, all_rows=True) == [[1, 3, 4], [0, 2, 5]]
    assert batches(0 * A, 16) == [[1]]                              # so that logp_gap is measured
    assert batches(A, 18, window=0) == [[3, 0], [2, 5]]

def test_updates_go_against_the_gradient_unless_that_is_not_finite(roll, float64):
    """Two updates of length lr * max_grad_norm; logp_gap is measured before the first."""
    model, encoder, r = roll()
    before = encoder.h_g.detach().clone()
    found, metrics = step(model, encoder, r, lr=1e-6, max_grad_norm=0.1)
    assert sum(x.square().sum() for x in found.values()).sqrt().item() == pytest.approx(0.1)
    after = encoder.h_g.detach().clone()
    torch.testing.assert_close(after - before, -2 * 1e-6 * found["h_g"], atol=0, rtol=1e-2)
    assert metrics["logp_gap"] < 1e-10 and not metrics["skipped"]
    r.logps[5, 3] = -torch.inf
    _, metrics = step(model, encoder, r, lr=1.0)
    assert metrics["skipped"] and torch.equal(encoder.h_g, after)

@pytest.mark.parametrize("kind, truncate_memory", [(PLAIN, 0), (DELTA, 1)], ids=name_of)
def test_a_supervised_step_has_the_gradient_of_the_cross_entropy(kind, truncate_memory, float64):
    """Of given responses under the window, of different lengths, row by row in one graph."""
    model = tiny_model()
    encoder = tiny_encoder(model, **kind)
    prompts = tiny_prompts(3, 6, 1, 2)
    responses = tiny_prompts(12, 3, W + 1, 9)
    r = given_responses(prompts, responses, W, E / W, "cpu")
    assert rows_of(r) == list(zip(prompts, responses)) and r.n_evictions().tolist() == [4, 0, 0, 2]
    losses = []
    changes = []
    for prompt, tokens in zip(prompts, responses):
        logits = logits_by_hand(model, encoder, prompt, tokens, W, E, truncate_memory, changes)
        losses.append(F.cross_entropy(logits, torch.tensor(tokens), reduction="sum"))
    wanted, numbers = by_hand(sum(losses) / sum(map(len, responses)), encoder, changes)
    for micro_batch in (1, 1000):
        got, metrics = step(model, encoder, r, None, micro_batch=micro_batch,
                            truncate_memory=truncate_memory)
        assert_equal_gradients(got, wanted)
        assert metrics == pytest.approx(numbers | dict(skipped=False), rel=1e-9)

# ---- advantages and the clip

@pytest.mark.parametrize("use_std", [True, False])
def test_advantages_compare_within_the_group(use_std):
    """Rewards that are equal up to rounding give exactly 0: else the rest is divided by eps."""
    rewards = torch.tensor([1., 0, 0, 0, 1, 1, 0.5, 0.5])                       # two groups of 4
    wanted = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.25, -0.25])
    if use_std:                                                     # of the population
        wanted = wanted / (torch.tensor([3 / 16, 1 / 16]).sqrt() + 0.01).repeat_interleave(4)
    torch.testing.assert_close(grpo.group_advantages(rewards, 4, use_std, eps=0.01), wanted)
    for group_size in range(1, 17):
        for reward in (0.0, 1.0, 0.1, 1 / 3, -0.3125, 0.9):
            rewards = torch.full((2 * group_size,), reward)
            assert not grpo.group_advantages(rewards, group_size, use_std).any()
    neighbours = torch.tensor([0.3, 0.3 + 3e-8, 0.3 - 3e-8])        # three numbers in float32
    assert neighbours.unique().numel() == 3
    assert not grpo.group_advantages(neighbours, 3, use_std).any()

@pytest.mark.parametrize("A, ratio, loss, slope, clipped", [
    (+1, 0.5, -0.50, -0.5, False), (+1, 1.2, -1.20, -1.2, False),
    (+1, 1.5, -1.28, 0.0, True), (+2, 1.5, -2.56, 0.0, True),       # good, likely enough already
    (-1, 0.5, +0.80, 0.0, True), (-2, 0.5, +1.60, 0.0, True),       # bad, unlikely enough already
    (-1, 0.9, +0.90, +0.9, False), (-1, 1.5, +1.50, +1.5, False), (0, 1.5, 0.0, 0.0, False)])
def test_clip_truth_table(A, ratio, loss, slope, clipped):
    """Value, d loss / d log-prob, and the flag: the clip acts only where it would push further."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    got, flag = grpo.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[float(A)]]), 0.2, 0.28)
    got.sum().backward()
    assert [got.item(), logp.grad.item()] == pytest.approx([loss, slope])
    assert flag.item() is clipped

# ---- memory

def saved_bytes(model, encoder, r, truncate):
    """What autograd holds when the graph of each segment is complete, in bytes."""
    alive = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    found = []

    def measure(logps, columns):
        storages = [saved.tensor.untyped_storage() for saved in alive]
        found.append(sum({x.data_ptr(): x.nbytes() for x in storages}.values()))
        return logps.sum()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        grpo.replay_and_backward(model, encoder, r, torch.arange(4), measure, truncate)
    return found

def long_rollouts(kind, *n_segments):
    """A model, its encoder, and rollouts of 4 rows under a window of 8, with so many evictions of 4
    tokens each; and the bytes that leave in an eviction."""
    model = tiny_model(eos_token_id=[])
    encoder = tiny_encoder(model, **kind)
    rollouts = []
    for n in n_segments:
        rollouts.append(generate(model, encoder, tiny_prompts(3, 7, 1, 5), window=8,
                                 evict_ratio=0.5, max_new_tokens=1 + 8 + 4 * n))
    return model, encoder, rollouts, 2 * 4 * 16 * 4 * 2 * 4     # k and v, E, KV*D, float32, L, B

@every_kind
def test_saved_bytes_do_not_grow_with_the_response_if_the_memory_is_truncated(kind):
    """To the byte."""
    model, encoder, rollouts, _ = long_rollouts(kind, 1, 3)
    short, long = [saved_bytes(model, encoder, r, truncate=True) for r in rollouts]
    assert (len(short), len(long), max(short)) == (2, 4, max(long))

def test_the_exact_gradient_keeps_what_was_evicted_and_a_full_cache_all():
    """But an adapter that never reads what was evicted does not keep it."""
    model, encoder, rollouts, evicted = long_rollouts(dict(memory_update="paper"), 3, 12)
    exact = saved_bytes(model, encoder, rollouts[1], truncate=False)
    growth = {b - a for a, b in zip(exact[2:], exact[3:])}
    assert len(growth) == 1 and evicted <= growth.pop() <= 2 * evicted
    full = [max(saved_bytes(model, encoder, replace(r, window=0), False)) for r in rollouts]
    assert full[1] - full[0] > 10 * 9 * evicted                     # for 9 * 4 tokens more
    for kind in (LORA, GLOBAL_ONLY):
        model, encoder, rollouts, _ = long_rollouts(kind, 9)
        kept = saved_bytes(model, encoder, rollouts[0], truncate=False)
        assert all(b - a < evicted for a, b in zip(kept[2:], kept[3:]))
