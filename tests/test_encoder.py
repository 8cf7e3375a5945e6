"""The thought encoder: its equations against numpy, and what an adapter must leave alone."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import (GLOBAL_ONLY, LORA, NO_GLOBAL, ListCache, every_kind, tiny_encoder, tiny_model,
                      tiny_prompts)
from encoder import MEMORY_ORDERS, MEMORY_UPDATES, AdaptedLinear, ThoughtEncoder, attach
from rollout import generate

L = 2               # sizes of the tiny model and its encoder
B = 3
KVD = 16
R = 4

def evictions(n, E):
    """n evictions: keys and values, (L, B, E, KV*D) each, and positions (B, E)."""
    torch.manual_seed(3)
    shape = (L, B, E, KVD)
    return [(torch.randn(shape), torch.randn(shape), torch.randint(99, (B, E))) for _ in range(n)]

def states(encoder, evicted):
    """The state before any eviction, (L, 1, R, R), and after each, (L, B, R, R)."""
    memory = encoder.initial_memory()
    found = [encoder.state(memory)]
    for K_e, V_e, positions in evicted:
        memory, _ = encoder.update(memory, K_e, V_e, positions)
        found.append(encoder.state(memory))
    return found

# ---- the equations, layer by layer, row by row, token by token, in numpy

def rms_norm(x):
    return x / np.sqrt((x ** 2).mean())

def unit_rows(memory):
    return memory / np.sqrt((memory ** 2).sum(axis=1, keepdims=True))

def sigmoid(x):
    return 1 / (1 + np.exp(-x))

def update_by_hand(rule, order, weights, memory, keys, values):
    """One eviction of E tokens, keys and values (E, KV*D) -> the memory and what was written,
    (R, R) each. weights: those of the layer."""
    written = np.zeros((R, R))
    for key, value in zip(keys, values):
        key = rms_norm(key)
        value = rms_norm(value)
        match = key @ weights["W_K"]
        answer = value @ weights["W_V"]
        if order == "paper":
            match, answer = answer, match
        answer = weights["q_g"] @ weights["W_Q"] @ answer * 2 / (R * np.sqrt(len(keys)))
        if rule in ("gated", "delta"):
            gate = sigmoid(np.concatenate([key, value]) @ weights["W_gate"][:, 0])
        if rule == "gated":
            answer = 2 * gate * answer
        if rule == "delta":
            match = match / np.sqrt((match ** 2).sum())
            answer = gate * (np.sqrt(R) * answer - (memory + written) @ match)
        written = written + np.outer(answer, match)
    if rule == "paper":
        return unit_rows(memory + written), written
    if rule == "gated":
        return sigmoid(weights["decay"][0]) * memory + written, written
    return memory + written, written

@pytest.mark.parametrize("E", [1, 5])
@pytest.mark.parametrize("order", MEMORY_ORDERS)
@pytest.mark.parametrize("rule", MEMORY_UPDATES)
def test_memory_and_state_follow_the_equations(rule, order, E, float64):
    """S_0, and after each of 3 evictions: the memory, what was written, and S."""
    encoder = tiny_encoder(tiny_model(), memory_update=rule, memory_order=order)
    weights = []                                                    # of each layer
    for layer in range(L):
        own = encoder.named_parameters(recurse=False)
        weights.append({name: x[layer].detach().numpy() for name, x in own})
    memory = encoder.initial_memory()
    wanted = {}
    for layer, b in itertools.product(range(L), range(B)):
        tokens = weights[layer]["h_g"]
        S_0, _ = update_by_hand("sum", order, weights[layer], np.zeros((R, R)), tokens, tokens)
        wanted[layer, b] = unit_rows(S_0)
        np.testing.assert_allclose(memory[layer, 0].detach(), wanted[layer, b], atol=1e-12)
    for K_e, V_e, positions in evictions(3, E):
        memory, write = encoder.update(memory, K_e, V_e, positions)
        S = encoder.state(memory)
        for layer, b in wanted:
            after, written = update_by_hand(rule, order, weights[layer], wanted[layer, b],
                                            K_e[layer, b].numpy(), V_e[layer, b].numpy())
            wanted[layer, b] = after
            np.testing.assert_allclose(memory[layer, b].detach(), after, atol=1e-12)
            np.testing.assert_allclose(write[layer, b].detach(), written, atol=1e-12)
            np.testing.assert_allclose(S[layer, b].detach(), unit_rows(after), atol=1e-12)

def test_a_plain_key_is_the_key_of_position_0(float64):
    """Keys that the model itself has made, of single tokens: they see nothing but themselves."""
    model = tiny_model(rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16))
    encoder = tiny_encoder(model, memory_keys="plain")
    ids = torch.arange(9)[:, None]                                              # (9, 1)

    def cached(positions):
        cache = ListCache(L)
        model.layers(ids, positions, None, cache, None)
        keys = torch.stack([k for k, _ in cache.prompt])                        # (L, 9, KV, 1, D)
        values = torch.stack([v for _, v in cache.prompt])
        return keys.transpose(2, 3).flatten(3), values.transpose(2, 3).flatten(3), positions

    there = cached(25 * ids)
    at_0 = cached(0 * ids)
    assert (there[0] - at_0[0])[:, 1:].abs().amax(dim=(2, 3)).min() > 0.1
    torch.testing.assert_close(encoder.rotate_back(there[0], there[2]), at_0[0])
    memory = encoder.initial_memory()
    torch.testing.assert_close(encoder.update(memory, *there), encoder.update(memory, *at_0))

@pytest.mark.parametrize("rule", MEMORY_UPDATES)
def test_what_an_eviction_writes_has_the_size_of_the_memory_whatever_the_size_of_the_keys(rule):
    """Else the paper's rule forgets at once all that was there before."""
    torch.manual_seed(0)
    for R, E, size in ((4, 5, 1.0), (32, 64, 1.0), (32, 64, 30.0), (16, 4, 0.01)):
        model = SimpleNamespace(n_layers=3, n_kv_heads=3, head_dim=32, rope_theta=1e4,
                                rope_scaling=None)
        encoder = ThoughtEncoder(model, "pte", R, 8, "keys-match", rule, "rotated")
        K = size * torch.randn(3, 2, E, 96)
        V = size * torch.randn(3, 2, E, 96)
        memory = encoder.initial_memory()
        _, write = encoder.update(memory, K, V, torch.zeros(2, E, dtype=torch.long))
        assert 0.5 < (write.norm(dim=-1) / memory.norm(dim=-1)).mean() < 4

def test_ablations_have_the_states_they_are_named_for():
    evicted = evictions(3, 4)
    pte = states(tiny_encoder(tiny_model()), evicted)
    global_only = states(tiny_encoder(tiny_model(), **GLOBAL_ONLY), evicted)
    no_global = states(tiny_encoder(tiny_model(), **NO_GLOBAL), evicted)
    lora = states(tiny_encoder(tiny_model(), **LORA), evicted)
    assert pte[0].shape == (L, 1, R, R) and pte[1].shape == (L, B, R, R)
    assert all(torch.equal(S, pte[0].expand_as(S)) for S in global_only)        # S_0 for ever
    assert not no_global[0].any()                                               # S_0 = 0, then
    torch.testing.assert_close(no_global[1].norm(dim=-1), torch.ones(L, B, R))  # it remembers
    assert (no_global[1] - pte[1]).abs().max() > 1e-3
    assert all(torch.equal(S, torch.eye(R).expand_as(S)) for S in lora)

# ---- the linear layers, and what is left alone

@pytest.mark.parametrize("n_states", [1, B])
def test_an_adapted_linear_adds_A_S_B(n_states, float64):
    """y = (W + alpha/R * A S B) x, with a matrix that the code never builds."""
    torch.manual_seed(0)
    linear = AdaptedLinear(nn.Linear(10, 7), R, alpha=12.0)
    nn.init.normal_(linear.A)
    x = torch.randn(B, 5, 10)
    S = torch.randn(n_states, R, R)
    for b in range(B):
        update = 12.0 / R * linear.A @ S[b % n_states] @ linear.B               # (7, 10)
        wanted = x[b] @ (linear.base.weight + update).T + linear.base.bias
        torch.testing.assert_close(linear(x, S)[b], wanted)
    assert torch.equal(linear(x), linear.base(x))                               # no state

def test_attach_adapts_seven_linears_a_layer_freezes_the_rest_and_works_once():
    model = tiny_model().requires_grad_(True)
    encoder = tiny_encoder(model, memory_update="gated")
    names = [f"attention/w{x}" for x in "qkvo"] + ["ffn/w_gate", "ffn/w_up", "ffn/w_down"]
    assert set(encoder.linears) == {f"blocks/{i}/{name}" for i in range(L) for name in names}
    for name, linear in encoder.linears.items():
        assert model.get_submodule(name.replace("/", ".")) is linear
    own = [name for name, _ in encoder.named_parameters(recurse=False)]
    assert own == ["h_g", "q_g", "W_Q", "W_K", "W_V", "W_gate", "decay"]
    assert len(encoder.trainable_parameters()) == len(own) + 2 * 7 * L          # and A and B
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * L and all(name[-2:] in (".A", ".B") for name in trained)
    with pytest.raises(AssertionError):
        attach(model)

def test_the_adapter_is_float32_on_a_bfloat16_base():
    model = tiny_model().to(torch.bfloat16)
    encoder = tiny_encoder(model, memory_update="gated", memory_keys="plain")
    assert {p.dtype for p in encoder.trainable_parameters()} == {torch.float32}
    assert model.blocks[0].attention.wq.base.weight.dtype == torch.bfloat16
    cached = torch.randn(L, 1, 4, KVD, dtype=torch.bfloat16)
    memory, _ = encoder.update(encoder.initial_memory(), cached, cached, torch.arange(4)[None])
    S = encoder.state(memory)
    hidden = model.hidden(torch.tensor([[1, 2, 3]]), S=S)
    assert S.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    hidden.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in encoder.trainable_parameters())

@every_kind
def test_a_fresh_adapter_changes_nothing(kind):
    """Bit for bit, through 4 evictions: A = 0, whatever the state is."""
    model = tiny_model(eos_token_id=[])
    settings = dict(prompts=tiny_prompts(3, 6), group_size=2, max_new_tokens=16, window=8)
    without = generate(model, None, **settings)
    encoder = tiny_encoder(model, fresh=True, **kind)
    fresh = generate(model, encoder, **settings)
    assert torch.equal(fresh.tokens, without.tokens) and torch.equal(fresh.logps, without.logps)
    nn.init.normal_(encoder.linears["blocks/1/attention/wo"].A)
    assert not torch.equal(generate(model, encoder, **settings).logps, without.logps)

@every_kind
def test_without_eviction_pte_is_the_lora_with_state_S_0(kind):
    """The same A and B around a state that stays S_0, until something is evicted."""
    model = tiny_model(eos_token_id=[])
    pte = tiny_encoder(model, **kind)
    twin = tiny_model(eos_token_id=[])
    lora = attach(twin, "lora", rank=R, alpha=6.0)
    S_0 = pte.state(pte.initial_memory()).detach()                              # (L, 1, R, R)
    for name, linear in pte.linears.items():
        layer = int(name.split("/")[1])
        lora.linears[name].A.data = linear.A.data
        lora.linears[name].B.data = S_0[layer, 0] @ linear.B.data               # S I B = I (S B)
    settings = dict(prompts=tiny_prompts(3, 6), max_new_tokens=12)
    for window in (0, 12, 4):
        a = generate(model, pte, window=window, **settings).logps
        b = generate(twin, lora, window=window, **settings).logps
        n_same = 12 if window != 4 or kind in (GLOBAL_ONLY, LORA) else 5        # up to an eviction
        torch.testing.assert_close(a[:, :n_same], b[:, :n_same], atol=1e-4, rtol=1e-4)
        assert n_same == 12 or (a - b)[:, 5:].abs().max() > 0.1
