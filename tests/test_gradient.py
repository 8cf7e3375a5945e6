"""The gradient of the replay, segment by segment, is that of one graph; what it costs in memory does not grow."""
import gc
import weakref
from dataclasses import replace

import pytest
import torch

import grpo
from conftest import (ALL, E, W, assert_same, gradients, logits_by_hand, off_policy, rows_of, tiny_encoder, tiny_model,
                      tiny_prompts)
from rollout import generate


def gradients_by_hand(model, encoder, r, advantages, kl_coef=0.0, truncate=0):
    """Every row alone, token by token, all losses in one graph and one backward; only cached keys, values are cut."""
    encoder.zero_grad()
    losses = []
    for b, (prompt, tokens) in enumerate(rows_of(r)):
        ids, A = torch.tensor(tokens)[:, None], advantages[b]
        logits = logits_by_hand(model, encoder, prompt, tokens, W, E, truncate)  # (T, vocab)
        logps = logits.log_softmax(-1).gather(1, ids)[:, 0]
        base = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1].log_softmax(-1).gather(1, ids)[:, 0]
        ratio = (logps - r.logps[b, :len(tokens)]).exp()
        losses.append(-torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A).sum())
        losses.append(kl_coef * ((base - logps).exp() - (base - logps) - 1).sum())
    loss = sum(losses) / 100
    loss.backward()
    return {name: p.grad.clone() for name, p in encoder.trainable().items()}, loss.item()


@pytest.mark.parametrize("update", ["paper", "sum"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_segments_give_the_gradient_of_one_graph(update, kl_coef, roll, float64):
    model, encoder, r = roll("pte", update)
    r, advantages = off_policy(r), torch.randn(8)
    got, [sums] = gradients(model, encoder, r, advantages, kl_coef=kl_coef)
    wanted, loss = gradients_by_hand(model, encoder, r, advantages, kl_coef)
    assert_same(got, wanted)
    assert sums["loss"] == pytest.approx(loss, rel=1e-9)
    assert 0 < sums["clipped"] < r.lengths.sum()


def test_gradient_does_not_depend_on_the_micro_batches(roll, float64):
    model, encoder, r = roll()
    r, advantages = off_policy(r), torch.randn(8)
    wanted, [whole] = gradients(model, encoder, r, advantages, kl_coef=0.1)
    for sizes in ([4, 4], [1, 2, 5], [1] * 8):
        got, sums = gradients(model, encoder, r, advantages, torch.randperm(8).split(sizes), kl_coef=0.1)
        assert_same(got, wanted)
        for name in ("loss", "clipped", "kl"):
            assert sum(s[name] for s in sums) == pytest.approx(whole[name], rel=1e-9)
        assert max(s["gap"] for s in sums) == pytest.approx(whole["gap"], rel=1e-9)


@pytest.mark.parametrize("update", ["paper", "sum"])
def test_truncate_cuts_the_memory_before_the_last_k_evictions(update, roll, float64):
    model, encoder, r = roll("pte", update)
    r, advantages = off_policy(r), torch.randn(8)
    exact, _ = gradients(model, encoder, r, advantages)
    for k in (1, 3):
        got, _ = gradients(model, encoder, r, advantages, truncate=k)
        assert_same(got, gradients_by_hand(model, encoder, r, advantages, truncate=k)[0])
        assert (got["W_K"] - exact["W_K"]).abs().max() > 1e-3 * exact["W_K"].abs().max()  # so it did cut something
    for k in (8, 99):                                                           # the rollout has 8 evictions
        assert_same(gradients(model, encoder, r, advantages, truncate=k)[0], exact)


def test_log_probs_and_gradient_do_not_depend_on_the_chunks_of_the_head(float64):
    model = tiny_model()
    hidden, tokens = torch.randn(3, 5, 32), torch.randint(30, (3, 5))
    for chunk in (1, 4, 15, 2048):                                              # of 15 tokens
        h = hidden.clone().requires_grad_()
        logps = grpo.token_logps(model, h, tokens, n_ids=30, chunk=chunk)
        wanted = model.head(h)[..., :30].log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        torch.testing.assert_close(logps, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), h)[0] for x in (logps, wanted)))


def test_logits_exist_for_256_megabytes_of_tokens_at_a_time(monkeypatch):
    model, sizes, real = tiny_model(), [], grpo.next_logits
    monkeypatch.setattr(grpo, "next_logits", lambda model, h, n_ids: sizes.append(len(h)) or real(model, h, n_ids))
    hidden, tokens = torch.randn(3, 5, 32), torch.randint(30, (3, 5))
    grpo.token_logps(model, hidden, tokens, n_ids=40)
    grpo.token_logps(model, hidden, tokens, n_ids=(1 << 26) // 4)               # as if there were so many ids
    assert sizes == [15, 4, 4, 4, 3]


# ---- memory ----------------------------------------------------------------------------------------------------------
def saved_bytes(model, encoder, r, truncate=0):
    """What autograd holds when each segment's graph is complete, in bytes of distinct storages, one number each."""
    alive, found = weakref.WeakSet(), []

    class Saved:
        def __init__(self, x):
            self.x = x
            alive.add(self)

    def held():
        return sum({x.data_ptr(): x.nbytes() for x in (s.x.untyped_storage() for s in alive)}.values())
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.x):
        for logps, *_ in grpo.replay(model, encoder, r, torch.arange(4), truncate):
            found.append(held())
            logps.sum().backward()
            assert held() == 0                                                  # and nothing outlives its segment
    return found


@pytest.fixture
def thoughts():
    """A model, its encoder, and rollouts of 3 and of 12 segments: W = 16, then E = 4 thoughts each."""
    model = tiny_model()
    encoder = tiny_encoder(model, R=2, M=3)                                     # a state is small beside 4 thoughts
    return model, encoder, *(generate(model, encoder, tiny_prompts(3, 7, 1, 5), max_new_tokens=n, window=16)
                             for n in (1 + 16 + 2 * 4, 1 + 16 + 11 * 4))


EVICTED = 2 * 4 * 16 * 4 * 2 * 4                                                # bytes: k and v, E, KV*D, float32, L, B


def test_saved_bytes_do_not_grow_with_the_thought_if_the_chain_is_truncated(thoughts):
    """To the byte. The exact chain grows by what was evicted and little more, a full cache far more."""
    model, encoder, short, long = thoughts
    a, b = saved_bytes(model, encoder, short, truncate=1), saved_bytes(model, encoder, long, truncate=1)
    assert len(a) == 3 and len(b) == 12 and max(a) == max(b)
    assert set(b[2:]) == {a[2]}
    exact = saved_bytes(model, encoder, long)
    growth = {later - sooner for sooner, later in zip(exact[2:], exact[3:])}
    assert len(growth) == 1 and EVICTED <= growth.pop() <= 1.5 * EVICTED
    full = [max(saved_bytes(model, encoder, replace(r, window=0, evict_size=0))) for r in (short, long)]
    assert full[1] - full[0] > 10 * 9 * EVICTED                                 # for the same 9 * 4 tokens more


@pytest.mark.parametrize("truncate, growth", [(0, EVICTED), (1, 0), (3, 0)])
def test_between_segments_only_evicted_keys_and_values_are_kept(truncate, growth, thoughts):
    """All tensors that are alive, saved by autograd or not, once a segment's graph is gone."""
    model, encoder, _, long = thoughts
    sizes = []
    for logps, *_ in grpo.replay(model, encoder, long, torch.arange(4), truncate):
        logps.sum().backward()
        gc.collect()
        storages = [x.untyped_storage() for x in gc.get_objects()
                    if type(x) is torch.Tensor and x.layout == torch.strided]   # not oneDNN's: they are the weights
        sizes.append(sum({x.data_ptr(): x.nbytes() for x in storages}.values()))
    assert {later - sooner for sooner, later in zip(sizes[4:], sizes[5:])} == {growth}
