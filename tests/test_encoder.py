"""The thought encoder: the formulas of encoder.py against numpy, and what an adapter must leave alone."""
import copy

import numpy as np
import pytest
import torch

from conftest import tiny_encoder, tiny_model, tiny_prompts
from encoder import KINDS, UPDATES, AdaptedLinear, ThoughtEncoder
from model import Linear
from rollout import generate

L, B, KVD = 2, 3, 16                                                            # of the tiny model; R = 4, M = 6


def evictions(E, n=4):
    """n evictions of E thoughts: keys and values, each (L, B, E, KV*D)."""
    torch.manual_seed(3)
    return [(torch.randn(L, B, E, KVD), torch.randn(L, B, E, KVD)) for _ in range(n)]


def memories(encoder, leaving):
    """The memory U before any eviction and after each."""
    U = [encoder.start()]
    for K_e, V_e in leaving:
        U.append(encoder.write(U[-1], K_e, V_e))
    return U


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("E", [1, 5])
def test_states_follow_the_formulas(update, E, float64):
    """Layer by layer and row by row, in numpy: S_0, and the state after each of 4 evictions."""
    encoder, leaving = tiny_encoder(tiny_model(), update=update), evictions(E)
    got = [encoder.read(U).detach() for U in memories(encoder, leaving)]        # (L, 1 or B, M, R)
    h, W_Q, W_K, W_V = (p.detach().numpy() for p in (encoder.h_g, encoder.W_Q, encoder.W_K, encoder.W_V))

    def normalize(S):
        return S / np.sqrt((S * S).sum(axis=1, keepdims=True))                  # each row has norm 1
    for i in range(L):
        for b in range(B):
            U = normalize((h[i] @ W_Q[i]) @ (h[i] @ W_K[i]).T @ (h[i] @ W_V[i]))  # (M, R) (R, M) (M, R)
            np.testing.assert_allclose(got[0][i, 0], normalize(U), atol=1e-12)
            for j, (K_e, V_e) in enumerate(leaving):
                k, v = K_e[i, b].numpy() @ W_K[i], V_e[i, b].numpy() @ W_V[i]   # (E, R)
                U = U + (h[i] @ W_Q[i]) @ k.T @ v / np.sqrt(4 * E)              # R = 4
                if update == "paper":
                    U = normalize(U)
                np.testing.assert_allclose(got[j + 1][i, b], normalize(U), atol=1e-12)


def test_every_row_of_a_state_has_norm_1():
    """As the rows of an identity have: whatever was evicted, PTE is of the size of a LoRA."""
    encoder = tiny_encoder(tiny_model(), update="sum")
    for U in memories(encoder, evictions(8)):
        torch.testing.assert_close(encoder.read(U).norm(dim=-1), torch.ones(L, len(U[0]), 6))


def test_the_sum_weighs_evictions_alike_and_the_papers_rule_does_not():
    """In another order the same evictions leave the same sum; under the paper's rule the last one counts most."""
    leaving, states = evictions(4), {}
    for update in UPDATES:
        encoder = tiny_encoder(tiny_model(), update=update)
        states[update] = [encoder.read(memories(encoder, order)[-1]) for order in (leaving, leaving[::-1])]
    torch.testing.assert_close(*states["sum"])
    assert (states["paper"][0] - states["paper"][1]).abs().max() > 0.1


def test_rows_share_the_first_state_and_then_part():
    encoder = tiny_encoder(tiny_model())
    U_0, U_1 = memories(encoder, evictions(4, n=1))
    assert U_0.shape == (L, 1, 6, 4) and U_1.shape == (L, B, 6, 4)
    assert (U_1[:, 0] - U_1[:, 1]).abs().max() > 0.1


def test_a_rows_state_depends_on_what_left_that_row_only():
    encoder, leaving = tiny_encoder(tiny_model()), evictions(4)
    together = encoder.read(memories(encoder, leaving)[-1])
    for b in range(B):
        alone = memories(encoder, [(K_e[:, b:b + 1], V_e[:, b:b + 1]) for K_e, V_e in leaving])[-1]
        torch.testing.assert_close(together[:, b:b + 1], encoder.read(alone))


def test_no_global_starts_at_zero_and_then_remembers():
    encoder = tiny_encoder(tiny_model(), kind="no-global")
    U = memories(encoder, evictions(4))
    assert not encoder.read(U[0]).any() and encoder.read(U[1]).all()
    encoder.read(U[-1]).sum().backward()
    assert all(encoder.get_parameter(name).grad.isfinite().all() for name in ("h_g", "W_Q", "W_K", "W_V"))


@pytest.mark.parametrize("kind", ["lora", "global-only"])
def test_a_fixed_state_never_changes(kind):
    encoder = tiny_encoder(tiny_model(), kind=kind)
    states = [encoder.read(U) for U in memories(encoder, evictions(4))]
    assert all(torch.equal(S, states[0]) for S in states) and states[0].any()
    if kind == "lora":
        assert torch.equal(states[0], torch.eye(6, 4).expand(L, 1, 6, 4))
    else:
        pte = tiny_encoder(tiny_model())
        assert torch.equal(states[0], pte.read(pte.start()))                    # the same S_0 as PTE


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("parts", [(7,), (5, 2, 2)])
def test_an_adapted_linear_is_base_plus_dW(parts, rows, float64):
    """y = (W + alpha/R * A S B) x, with the dW that the code never builds; a state for each row, or one for all."""
    torch.manual_seed(0)
    linear = AdaptedLinear(Linear(10, *parts), R=4, M=6, alpha=12.0)
    torch.nn.init.normal_(linear.A)
    x, S = torch.randn(B, 5, 10), torch.randn(rows, 6, 4)
    y = linear(x, S)
    for b in range(B):
        matrices = zip(linear.A.split(parts), linear.B.split(4))                # each part has its own A and B
        dW = torch.cat([A @ S[b % rows] @ own for A, own in matrices])          # (part, M) (M, R) (R, 10) -> (out, 10)
        torch.testing.assert_close(y[b], linear.base(x[b]) + 12.0 / 4 * x[b] @ dW.T)
    assert torch.equal(linear(x), linear.base(x))                               # no state, no adapter


def test_all_linears_of_every_layer_are_adapted_and_the_base_is_frozen():
    model = tiny_model()
    encoder = tiny_encoder(model)
    names = ("wqkv", "wo", "w13", "w2")                                         # seven matrices in four
    assert set(encoder.linears) == {f"{layer}_{name}" for layer in range(L) for name in names}
    linears = {f"linears.{name}.{matrix}" for name in encoder.linears for matrix in "AB"}
    assert set(encoder.trainable()) == {"h_g", "W_Q", "W_K", "W_V"} | linears
    trained = {id(p) for p in model.parameters() if p.requires_grad} | {id(encoder.h_g)}
    assert trained <= {id(p) for p in encoder.trainable().values()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    """Bit for bit, under evictions: A = 0, so whatever the state is, no logit moves and the same tokens are drawn."""
    model = tiny_model()
    settings = dict(prompts=tiny_prompts(3, 6), group_size=2, max_new_tokens=40, window=8)  # 16 evictions
    without = generate(model, None, **settings)
    encoder = tiny_encoder(model, kind, fresh=True)
    with_fresh = generate(model, encoder, **settings)
    assert torch.equal(without.tokens, with_fresh.tokens) and torch.equal(without.logps, with_fresh.logps)
    torch.nn.init.normal_(encoder.linears["1_wo"].A)                            # and a trained one does change it
    assert not torch.equal(without.logps, generate(model, encoder, **settings).logps)


@pytest.mark.parametrize("kind", ["pte", "global-only", "no-global"])
def test_without_eviction_pte_is_the_lora_with_state_S_0(kind):
    """The same A and B around a state that stays S_0: bit for bit, as long as the window holds the whole thought."""
    model, prompts = tiny_model(), tiny_prompts(3, 6)
    twin = copy.deepcopy(model)
    pte, lora = tiny_encoder(model, kind), ThoughtEncoder(twin, "lora", R=4, M=6, alpha=4.0)
    lora.load_state_dict({name: x for name, x in pte.state_dict().items() if name.startswith("linears.")})
    lora.identity = pte.read(pte.start()).detach()
    for window in (0, 20):                                                      # 20 tokens: none leaves
        a, b = (generate(m, e, prompts, max_new_tokens=20, window=window) for m, e in ((model, pte), (twin, lora)))
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logps, b.logps)
    a, b = (generate(m, e, prompts, max_new_tokens=20, window=8) for m, e in ((model, pte), (twin, lora)))
    assert torch.equal(a.logps[:, :9], b.logps[:, :9])                          # up to the first eviction
    assert torch.equal(a.logps, b.logps) == (kind == "global-only")             # beyond it, only if PTE may not learn
