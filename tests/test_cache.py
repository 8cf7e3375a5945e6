"""The sliding cache: a ring that never moves a key does what a list that pops its oldest does."""
import pytest
import torch

from cache import SlidingCache, eviction_size
from conftest import logits_by_hand, tiny_encoder, tiny_model, tiny_prompts
from model import UserError
from rollout import generate

LENGTHS = torch.tensor([2, 5, 3])                                               # true prompt lengths, padded to 5
B, KV, P, D = 3, 2, 5, 4
RINGS = [(8, 2), (8, 1), (4, 4), (1, 1), (6, 3)]                                # (W, E)


def filled_cache(W, E, n_layers=1):
    """A cache after its prompts, and what the prompts wrote: keys (B, KV, P, D), the values are their negatives."""
    torch.manual_seed(0)
    prompt = torch.randn(B, KV, P, D)
    cache = SlidingCache(n_layers, LENGTHS, W, E, max_thoughts=100)
    cache.begin(P)
    for layer in range(n_layers):
        cache.write(layer, prompt + layer, -prompt - layer)
    cache.spread(torch.arange(B))
    return cache, prompt


def by_age(x):
    """Puts the slots of (KV, slots, D) in one order, whatever slots they were: that of their first number."""
    return x[:, x[0, :, 0].argsort()]


@pytest.mark.parametrize("W, E", RINGS)
def test_ring_equals_a_list_that_pops_its_oldest(W, E):
    """At every step each row sees its own prompt without pads, and of its thoughts what the list still has."""
    cache, prompt = filled_cache(W, E)
    kept, n_evictions = [], 0                                                   # the list: keys (B, KV, 1, D)
    for n in range(5 * W + 3):
        assert cache.full == (len(kept) == W)
        if cache.full:
            K_e, V_e = cache.evict()                                            # (1, B, E, KV*D)
            leaving, kept, n_evictions = torch.cat(kept[:E], dim=2), kept[E:], n_evictions + 1
            assert torch.equal(K_e[0], leaving.transpose(1, 2).flatten(2))      # the oldest E, in order
            assert torch.equal(V_e, -K_e)
        positions, mask = cache.begin(1)
        k = torch.randn(B, KV, 1, D)
        kept.append(k)
        with torch.no_grad():
            keys, values = cache.write(0, k, -k)
        assert torch.equal(positions[:, 0], LENGTHS + n)                        # thought n stands at prompt_length + n
        for b in range(B):
            seen = keys[b][:, mask[b, 0, 0]]
            wanted = torch.cat([prompt[b, :, :LENGTHS[b]], *(k[b] for k in kept)], dim=1)
            assert torch.equal(by_age(seen), by_age(wanted))
            assert torch.equal(values[b], -keys[b])
    assert n_evictions >= 4


@pytest.mark.parametrize("W, E", RINGS)
def test_thoughts_written_as_a_segment_are_seen_as_if_written_one_by_one(W, E):
    """Training writes W, then E thoughts at a time, with a graph: the same slots, masks and positions as decoding."""
    one, _ = filled_cache(W, E)
    many, _ = filled_cache(W, E)
    first = 0
    for T in [W, E, E, E, E, E, E]:
        if first:
            assert all(torch.equal(a, b) for a, b in zip(one.evict(), many.evict()))
        k = torch.randn(B, KV, T, D)
        positions, mask = many.begin(T)
        keys, _ = many.write(0, k, k)
        for i in range(T):
            position, mask_i = one.begin(1)
            with torch.no_grad():
                keys_i, _ = one.write(0, k[:, :, i:i + 1], k[:, :, i:i + 1])
            assert torch.equal(position[:, 0], positions[:, i])
            for b in range(B):
                assert torch.equal(keys_i[b][:, mask_i[b, 0, 0]], keys[b][:, mask[b, 0, i]])
        first += T


@pytest.mark.parametrize("whole", [False, True])
def test_attention_reads_the_slots_in_use_or_for_a_fixed_shape_all(whole):
    cache, _ = filled_cache(W=8, E=2)
    cache.whole = whole
    for n in range(1, 20):
        if cache.full:
            cache.evict()
        _, mask = cache.begin(1)
        with torch.no_grad():
            keys, values = cache.write(0, torch.zeros(B, KV, 1, D), torch.zeros(B, KV, 1, D))
        assert keys.shape[2] == values.shape[2] == mask.shape[3] == P + (8 if whole else min(n, 8))


def test_every_thought_leaves_once_and_in_order():
    cache, _ = filled_cache(W=8, E=2, n_layers=3)
    left = []
    for n in range(50):
        if cache.full:
            left.append(cache.evict()[0])                                       # (L, B, E, KV*D)
        cache.begin(1)
        with torch.no_grad():
            for layer in range(3):
                cache.write(layer, torch.full((B, KV, 1, D), n + 100. * layer), torch.zeros(B, KV, 1, D))
    left = torch.cat(left, dim=2)                                               # 21 evictions of 2
    wanted = torch.arange(42.) + 100. * torch.arange(3)[:, None]                # (L, 42)
    assert torch.equal(left, wanted[:, None, :, None].expand_as(left))


def test_what_left_is_a_constant_and_stays_as_it_was():
    """Its slots are written over by the next thoughts; the encoder must not see that, nor send a gradient there."""
    cache, _ = filled_cache(W=4, E=2)
    k = torch.randn(B, KV, 4, D, requires_grad=True)
    cache.begin(4)
    cache.write(0, k, k)
    K_e, V_e = cache.evict()
    before = K_e.clone(), V_e.clone()
    cache.begin(2)
    cache.detach()
    with torch.no_grad():
        cache.write(0, torch.zeros(B, KV, 2, D), torch.zeros(B, KV, 2, D))
    assert torch.equal(K_e, before[0]) and torch.equal(V_e, before[1])
    assert not K_e.requires_grad and not V_e.requires_grad


def test_thoughts_stand_where_the_row_really_is(float64):
    """The model under the ring equals the model under lists, where a row has no pads and no slots to be wrong about."""
    model = tiny_model()
    encoder = tiny_encoder(model)
    prompts, W, E, T = tiny_prompts(2, 7, 4), 8, 2, 40                          # 16 evictions
    tokens = torch.randint(40, (3, T))
    cache = SlidingCache(2, torch.tensor([2, 7, 4]), W, E, T)
    ids = torch.tensor([p + [0] * (7 - len(p)) for p in prompts])               # (3, 7)
    U = encoder.start()
    with torch.no_grad():
        logits = [model(ids, cache, encoder.read(U))[[0, 1, 2], [1, 6, 3]]]     # at each row's last prompt token
        cache.spread(torch.arange(3))
        for t in range(T - 1):
            if cache.full:
                U = encoder.write(U, *cache.evict())
            logits.append(model(tokens[:, t:t + 1], cache, encoder.read(U))[:, 0])
        logits = torch.stack(logits, dim=1)                                     # (3, T, vocab)
        for b in range(3):
            wanted = logits_by_hand(model, encoder, prompts[b], tokens[b].tolist(), W, E)
            torch.testing.assert_close(logits[b], wanted, atol=1e-9, rtol=0)


def test_pads_of_short_prompts_are_never_seen():
    """Other ids behind a prompt's end: not one bit of the real tokens' states changes, before and after evictions."""
    model, lengths, states = tiny_model(), torch.tensor([2, 6]), []
    for pad in (0, 17):
        ids = torch.tensor([[5, 6] + [pad] * 4, [1, 2, 3, 4, 5, 6]])
        cache = SlidingCache(2, lengths, 4, 2, 30)
        with torch.no_grad():
            states.append([model.hidden(ids, cache)[0, :2]])
            cache.spread(torch.arange(2))
            for t in range(20):
                if cache.full:
                    cache.evict()
                states[-1].append(model.hidden(torch.full((2, 1), t), cache))
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_a_prompt_region_of_few_widths_changes_nothing():
    """Slots between the prompt and the ring, which nobody sees: one shape for prompts of all lengths."""
    model, prompts, logits = tiny_model(), torch.tensor(tiny_prompts(5, 5)), []
    for multiple in (1, 16):
        cache = SlidingCache(2, torch.tensor([5, 3]), 8, 2, 30)
        model.hidden(prompts, cache)
        cache.spread(torch.tensor([0, 1, 1]), multiple)
        assert cache.P == {1: 5, 16: 16}[multiple] and cache.keys[0].shape[2] == cache.P + 8 == cache.seen.shape[1]
        for t in range(20):
            if cache.full:
                cache.evict()
            logits.append(model(torch.full((3, 1), t), cache))
    torch.testing.assert_close(logits[:20], logits[20:], atol=1e-4, rtol=1e-4)


def test_memory_does_not_grow_with_the_thought():
    model, prompts = tiny_model(), tiny_prompts(4)
    sizes = [generate(model, None, prompts, max_new_tokens=T, window=8).cache_megabytes for T in (10, 60)]
    assert sizes[0] == sizes[1] == 2 * 2 * 2 * (4 + 8) * 8 * 4 / 1e6            # k and v, L, KV, P + W, D, bytes
    full = [generate(model, None, prompts, max_new_tokens=T, window=0).cache_megabytes for T in (10, 60)]
    assert full[0] < full[1]


def test_a_window_longer_than_the_thoughts_takes_no_more_than_they_do():
    """Nothing would ever leave: that is a full cache, not one with empty slots."""
    model, prompts = tiny_model(), tiny_prompts(3, 7)
    full, wide = (generate(model, None, prompts, max_new_tokens=12, window=window) for window in (0, 64))
    assert torch.equal(full.tokens, wide.tokens) and full.cache_megabytes == wide.cache_megabytes
    assert not wide.evictions().any()


@pytest.mark.parametrize("window, ratio, E", [(16, 0.25, 4), (12, 0.5, 6), (16, 1.0, 16), (10, 0.1, 1), (0, 0.25, 0),
                                              (0, 7.0, 0), (1000, 0.001, 1)])
def test_eviction_size(window, ratio, E):
    assert eviction_size(window, ratio) == E


@pytest.mark.parametrize("window, ratio", [(10, 0.25), (-4, 0.25), (16, 0), (12, 0.4), (16, -0.25), (16, 2.0),
                                           (10, 0.3), (16, float("nan")), (16, float("inf"))])
def test_an_eviction_that_does_not_divide_the_window_is_refused(window, ratio):
    with pytest.raises(UserError):
        eviction_size(window, ratio)
