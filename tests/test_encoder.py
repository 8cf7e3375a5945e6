"""The thought encoder: its equations against numpy, and what an adapter must leave alone."""
import numpy as np
import pytest
import torch
from torch import nn

from conftest import ADAPTERS, tiny_encoder, tiny_model, tiny_prompts
from encoder import AdaptedLinear, ThoughtEncoder, attach
from rollout import generate

L = 2               # sizes of the tiny model and its encoder
B = 3
KVD = 16
R = 4
M = 6

def evictions(n, E):
    """n evictions: a list of keys and values, (L, B, E, KV*D) each."""
    torch.manual_seed(3)
    return [(torch.randn(L, B, E, KVD), torch.randn(L, B, E, KVD)) for _ in range(n)]

def states(encoder, evicted):
    """The state before any eviction, (L, 1, M, R), and after each, (L, B, M, R)."""
    memory = encoder.initial_memory()
    found = [encoder.state(memory)]
    for K_e, V_e in evicted:
        memory = encoder.update(memory, K_e, V_e)
        found.append(encoder.state(memory))
    return found

@pytest.mark.parametrize("E", [1, 5])
@pytest.mark.parametrize("memory_update", ["paper", "sum"])
@pytest.mark.parametrize("memory_order", ["paper", "keys-match"])
def test_states_follow_the_equations(memory_order, memory_update, E, float64):
    """Layer by layer and row by row, in numpy: S_0, and S after each of 4 evictions."""
    encoder = tiny_encoder(tiny_model(), "pte", memory_update, memory_order)
    evicted = evictions(4, E)
    found = [S.detach().numpy() for S in states(encoder, evicted)]
    h, W_Q, W_K, W_V = [x.detach().numpy() for x in encoder.parameters(recurse=False)]

    def rms_norm(x):
        return x / np.sqrt((x ** 2).mean(axis=1, keepdims=True))

    def normalize(S):
        return S / np.sqrt((S ** 2).sum(axis=1, keepdims=True))         # each row has norm 1

    if memory_order == "keys-match":
        W_K, W_V = W_V, W_K
        evicted = [(V_e, K_e) for K_e, V_e in evicted]
    for layer in range(L):
        q = h[layer] @ W_Q[layer]                                       # (M, R)
        k = rms_norm(h[layer]) @ W_K[layer]                             # (M, R)
        v = rms_norm(h[layer]) @ W_V[layer]                             # (M, R)
        for b in range(B):
            memory = normalize(q @ k.T @ v)                             # (M, R)
            np.testing.assert_allclose(found[0][layer, 0], memory, atol=1e-12)
            for S, (K_e, V_e) in zip(found[1:], evicted):
                k_e = rms_norm(K_e[layer, b].numpy()) @ W_K[layer]      # (E, R)
                v_e = rms_norm(V_e[layer, b].numpy()) @ W_V[layer]      # (E, R)
                memory = memory + q @ k_e.T @ v_e * 2 / R / np.sqrt(E)
                if memory_update == "paper":
                    memory = normalize(memory)
                np.testing.assert_allclose(S[layer, b], normalize(memory), atol=1e-12)

def test_what_an_eviction_writes_has_the_size_of_the_memory_whatever_the_size_of_the_keys():
    """Else the paper's rule forgets at once all that was there before."""
    torch.manual_seed(0)
    for R, E, size in ((4, 5, 1.0), (32, 64, 1.0), (32, 64, 30.0), (16, 4, 0.01)):
        encoder = ThoughtEncoder(3, 96, "pte", R, R, "keys-match", "paper")
        K = size * torch.randn(3, 2, E, 96)
        V = size * torch.randn(3, 2, E, 96)
        ratio = encoder.encode(K, V).norm(dim=-1) / encoder.initial_memory().norm(dim=-1)
        assert 0.5 < ratio.mean() < 4

def test_ablations_have_the_states_they_are_named_for():
    evicted = evictions(3, 4)
    pte = states(tiny_encoder(tiny_model()), evicted)
    global_only = states(tiny_encoder(tiny_model(), "global-only"), evicted)
    no_global = states(tiny_encoder(tiny_model(), "no-global"), evicted)
    lora = states(tiny_encoder(tiny_model(), "lora"), evicted)
    assert pte[0].shape == (L, 1, M, R) and pte[1].shape == (L, B, M, R)
    assert all(torch.equal(S, pte[0]) for S in global_only)                     # S_0 for ever
    assert not no_global[0].any()                                               # S_0 = 0, then
    torch.testing.assert_close(no_global[1].norm(dim=-1), torch.ones(L, B, M))  # it remembers
    assert (no_global[1] - pte[1]).abs().max() > 1e-3
    assert all(torch.equal(S, torch.eye(R).expand_as(S)) for S in lora)

@pytest.mark.parametrize("n_states", [1, B])
def test_an_adapted_linear_adds_A_S_B(n_states, float64):
    """y = (W + alpha/R * A S B) x, with a matrix that the code never builds."""
    torch.manual_seed(0)
    linear = AdaptedLinear(nn.Linear(10, 7), R, M, alpha=12.0)
    nn.init.normal_(linear.A)
    x = torch.randn(B, 5, 10)
    S = torch.randn(n_states, M, R)
    for b in range(B):
        update = 12.0 / R * linear.A @ S[b % n_states] @ linear.B               # (7, 10)
        wanted = x[b] @ (linear.base.weight + update).T + linear.base.bias
        torch.testing.assert_close(linear(x, S)[b], wanted)
    assert torch.equal(linear(x), linear.base(x))                               # no state

def test_attach_adapts_seven_linears_a_layer_freezes_the_rest_and_works_once():
    model = tiny_model().requires_grad_(True)
    encoder = tiny_encoder(model)
    names = [f"attention/w{x}" for x in "qkvo"] + ["ffn/w_gate", "ffn/w_up", "ffn/w_down"]
    assert set(encoder.linears) == {f"blocks/{i}/{name}" for i in range(L) for name in names}
    for name, linear in encoder.linears.items():
        assert model.get_submodule(name.replace("/", ".")) is linear
    assert len(encoder.trainable_parameters()) == 4 + 2 * 7 * L                 # h_g, W_*; A and B
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * L and all(name[-2:] in (".A", ".B") for name in trained)
    with pytest.raises(AssertionError):
        attach(model)

def test_the_adapter_is_float32_on_a_bfloat16_base():
    model = tiny_model().to(torch.bfloat16)
    encoder = tiny_encoder(model)
    assert {p.dtype for p in encoder.trainable_parameters()} == {torch.float32}
    assert model.blocks[0].attention.wq.base.weight.dtype == torch.bfloat16
    memory = encoder.initial_memory()
    cached = torch.randn(L, 1, 4, KVD, dtype=torch.bfloat16)
    S = encoder.state(encoder.update(memory, cached, cached))
    hidden = model.hidden(torch.tensor([[1, 2, 3]]), S=S)
    assert S.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    hidden.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in encoder.trainable_parameters())

@pytest.mark.parametrize("adapter, memory_update", ADAPTERS)
def test_a_fresh_adapter_changes_nothing(adapter, memory_update):
    """Bit for bit, through 8 evictions: A = 0, whatever the state is."""
    model = tiny_model(eos_token_id=[])
    settings = dict(prompts=tiny_prompts(3, 6), group_size=2, max_new_tokens=24, window=8)
    without = generate(model, None, **settings)
    encoder = tiny_encoder(model, adapter, memory_update, fresh=True)
    fresh = generate(model, encoder, **settings)
    assert torch.equal(fresh.tokens, without.tokens) and torch.equal(fresh.logps, without.logps)
    nn.init.normal_(encoder.linears["blocks/1/attention/wo"].A)
    assert not torch.equal(generate(model, encoder, **settings).logps, without.logps)

@pytest.mark.parametrize("adapter", ["pte", "global-only"])
def test_without_eviction_pte_is_the_lora_with_state_S_0(adapter):
    """The same A and B around a state that stays S_0, until something is evicted."""
    model = tiny_model(eos_token_id=[])
    pte = tiny_encoder(model, adapter)
    twin = tiny_model(eos_token_id=[])
    lora = attach(twin, "lora", rank=M, global_tokens=M, alpha=1.5 * M)
    S_0 = pte.state(pte.initial_memory()).detach()                              # (L, 1, M, R)
    for name, linear in pte.linears.items():
        layer = int(name.split("/")[1])
        lora.linears[name].A.data = linear.A.data
        lora.linears[name].B.data = S_0[layer, 0] @ linear.B.data               # S I B = I (S B)
    settings = dict(prompts=tiny_prompts(3, 6), max_new_tokens=20)
    for window in (0, 20, 8):
        a = generate(model, pte, window=window, **settings).logps
        b = generate(twin, lora, window=window, **settings).logps
        n_same = 9 if window == 8 and adapter == "pte" else 20                  # up to an eviction
        torch.testing.assert_close(a[:, :n_same], b[:, :n_same], atol=1e-4, rtol=1e-4)
        assert n_same == 20 or (a - b)[:, 9:].abs().max() > 0.1
