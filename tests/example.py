"""One eviction with numbers that fit on a slide: W = 4, E = 2, R = M = 2, one layer, one head of
two channels. Uses the code of cache.py and encoder.py; README, "One eviction, by hand".

    python tests/example.py
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from cache import SlidingCache                              # noqa: E402
from encoder import AdaptedLinear, ThoughtEncoder           # noqa: E402

PROMPT = 1                                                  # P, a prompt of one token
KEYS = [[1, 0], [0, 1], [1, 1], [0, 1]]                     # of the four tokens in the window
VALUES = [[1, 1], [1, -1], [0, 1], [1, 0]]

def show(name, matrix):
    rows = ["[" + " ".join(f"{x:6.2f}" for x in row) + "]" for row in matrix.tolist()]
    print(f"{name:12}" + f"\n{'':12}".join(rows))

def as_heads(rows):
    return torch.tensor(rows, dtype=torch.float32)[None, None]              # (B, KV, T, D)

def main():
    # The cache: one prompt token, then four response tokens fill the window.
    cache = SlidingCache(n_layers=1, prompt_lengths=torch.tensor([PROMPT]), P=PROMPT, window=4,
                         evict_size=2, max_new_tokens=9)
    cache.reserve(PROMPT)
    cache.write(0, as_heads([[0, 0]]), as_heads([[0, 0]]))
    cache.expand_prompts(torch.tensor([0]))
    cache.reserve(4)
    cache.write(0, as_heads(KEYS), as_heads(VALUES))
    print("slots hold tokens", cache.token_at.tolist(), "and the window is full:", cache.is_full)
    K_e, V_e, positions = cache.evict()                     # (L, B, E, KV*D) twice, (B, E)
    print("after the eviction", cache.token_at.tolist(), "(-1 is free); left: tokens 1 and 2")
    show("K_e", K_e[0, 0])
    show("V_e", V_e[0, 0])

    # The encoder, with identities for all that is learned.
    config = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=2, rope_theta=100.0,
                             rope_scaling=None)
    encoder = ThoughtEncoder(config, "pte", R=2, M=2, memory_order="keys-match",
                             memory_update="paper", memory_keys="rotated")
    for name in ("h_g", "q_g", "W_Q", "W_K", "W_V"):
        nn.init.eye_(getattr(encoder, name).data[0])
    S_0 = encoder.initial_memory()
    S_1, write = encoder.update(S_0, K_e, V_e, positions)
    show("S_0", S_0[0, 0])
    show("S'", write[0, 0])
    show("S_0 + S'", (S_0 + write)[0, 0])
    show("S_1", S_1[0, 0])

    # One adapted product, for an input like the key of the first token that left.
    linear = AdaptedLinear(nn.Linear(2, 2, bias=False), R=2, alpha=2.0)
    for weight in (linear.A, linear.B, linear.base.weight):
        nn.init.eye_(weight.data)
    x = torch.tensor([[[1.0, 0.0]]])                        # (B, T, in)
    show("x", x[0])
    show("W x", linear(x)[0])
    show("with S_0", linear(x, S_0[0])[0])
    show("with S_1", linear(x, S_1[0])[0])

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
