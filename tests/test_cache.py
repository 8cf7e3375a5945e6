"""The sliding cache: a ring of slots does what a list that pops its oldest does."""
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache import SlidingCache, eviction_size
from model import UserError

LENGTHS = torch.tensor([2, 5, 3])                   # of the prompts, padded to P = 5
L = 3
B = 3
KV = 2
P = 5
D = 4

def write(cache, k):
    """Writes the keys (b, KV, T, D) of the next T tokens, plus 100 times the number of the layer;
    values are the negatives of keys. Returns the keys that attention reads in layer 0."""
    cache.reserve(k.shape[2])
    for layer in range(L):
        keys, values = cache.write(layer, k + 100 * layer, -k - 100 * layer)    # (b, KV, slots, D)
        assert torch.equal(values, -keys)
    return cache.keys[0][:, :, :keys.shape[2]]

def filled_cache(window, evict_size):
    """A cache after its prompts, and the keys (B, KV, P, D) of the prompts."""
    torch.manual_seed(0)
    prompt = torch.randn(B, KV, P, D)
    cache = SlidingCache(L, LENGTHS, P, window, evict_size, max_new_tokens=12)
    write(cache, prompt)
    cache.expand_prompts(torch.arange(B))
    return cache, prompt

@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("W, E", [(8, 2), (8, 1), (4, 4), (1, 1), (6, 3)])
def test_ring_equals_a_list_that_pops_its_oldest(W, E, by_segment):
    """Tokens come one at a time, as in a rollout, or a segment at a time, as in a replay. Every
    token sees the prompt of its row without pads, what the list still has, and itself."""
    cache, prompt = filled_cache(W, E)
    kept = []                                                   # the list: keys (B, KV, 1, D)
    n = 0
    for size in [W] + [E] * 8:
        if n > 0:
            assert cache.is_full
            K_e, V_e, positions = cache.evict()                                 # (L, B, E, KV*D)
            leaving = torch.cat(kept[:E], dim=2).transpose(1, 2).flatten(2)     # (B, E, KV*D)
            assert torch.equal(V_e, -K_e)
            left = torch.arange(n - len(kept), n - len(kept) + E)               # response tokens
            assert torch.equal(positions, LENGTHS[:, None] + left)
            for layer in range(L):
                assert torch.equal(K_e[layer], leaving + 100 * layer)
            kept = kept[E:]
        for T in [size] if by_segment else [1] * size:
            assert not cache.is_full
            k = torch.randn(B, KV, T, D)
            keys = write(cache, k)
            for i in range(T):
                kept.append(k[:, :, i:i + 1])
                assert torch.equal(cache.positions()[:, i], LENGTHS + n)
                n += 1
                for b in range(B):
                    seen = keys[b][:, cache.mask()[b, 0, i]]                    # (KV, n_seen, D)
                    wanted = torch.cat([prompt[b, :, :LENGTHS[b]], *[k[b] for k in kept]], dim=1)
                    assert torch.equal(seen.sort(dim=1).values, wanted.sort(dim=1).values)

def test_what_has_left_is_a_constant():
    """Its slots are written over; the encoder must not see that, nor send a gradient there."""
    cache, _ = filled_cache(4, 2)
    write(cache, torch.randn(B, KV, 4, D, requires_grad=True))
    K_e, V_e, _ = cache.evict()
    before = K_e.clone()
    assert all(x.requires_grad for x in cache.keys + cache.values)
    cache.detach()
    assert not any(x.requires_grad for x in cache.keys + cache.values)
    write(cache, torch.zeros(B, KV, 2, D))
    assert torch.equal(K_e, before) and torch.equal(V_e, -before)
    assert not K_e.requires_grad and not V_e.requires_grad

@pytest.mark.parametrize("read_all", [False, True])
def test_attention_reads_the_slots_in_use_or_all_of_them(read_all):
    cache, _ = filled_cache(8, 2)
    cache.read_all_slots = read_all
    for n in range(1, 20):
        if cache.is_full:
            cache.evict()
        keys = write(cache, torch.zeros(B, KV, 1, D))
        assert keys.shape[2] == cache.mask().shape[3] == P + (8 if read_all else min(n, 8))
        n_seen = n if n <= 8 else 8 - n % 2
        assert cache.mask().sum(dim=3).flatten().tolist() == (LENGTHS + n_seen).tolist()

class CountBuffers(TorchDispatchMode):
    """At every operation: how many of the old buffers are alive, plus the new ones made so far."""

    def __init__(self, cache, shape):
        super().__init__()
        self.old = [weakref.ref(x) for x in cache.keys + cache.values]
        self.shape = shape
        self.n_new = 0
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.n_new += result.shape == self.shape
        n_old = sum(ref() is not None for ref in self.old)
        self.most = max(self.most, n_old + self.n_new)
        return result

@pytest.mark.parametrize("change, n_rows, n_slots", [
    (SlidingCache.select_rows, 2, P + 8), (SlidingCache.expand_prompts, 7, P + 8 + 8)])
def test_new_rows_keep_one_old_buffer_alive_at_a_time(change, n_rows, n_slots):
    """With all of them the peak of a rollout's memory would be twice its cache."""
    cache, _ = filled_cache(8, 2)
    with CountBuffers(cache, (n_rows, KV, n_slots, D)) as count:
        change(cache, torch.arange(n_rows) % B)
    assert count.n_new == 2 * L and count.most == 2 * L + 1

def test_a_window_that_never_fills_takes_no_more_than_a_full_cache():
    keys_and_values = 2 * L * B * KV * (P + 12) * D * 4                             # bytes, float32
    for window in (0, 12, 64):
        assert filled_cache(window, window // 4)[0].megabytes == keys_and_values / 1e6

def test_the_size_of_an_eviction_divides_the_window():
    for window, ratio, size in [(16, 0.25, 4), (12, 0.5, 6), (16, 1.0, 16), (10, 0.1, 1),
                                (0, 0.25, 0), (1000, 0.001, 1)]:
        assert eviction_size(window, ratio) == size
    for window, ratio in [(10, 0.25), (-4, 0.25), (16, 0), (12, 0.4), (16, -0.25), (16, 2.0),
                          (10, 0.3), (4, 0.01), (16, float("nan")), (16, float("inf"))]:
        with pytest.raises(UserError):
            eviction_size(window, ratio)
