"""encoder.py: the thought encoder, and the linear layer that its state bends.

What leaves the window is not lost: its keys and values K_e, V_e (B, E, KV*D) are squeezed into a state S of M x R
numbers per row and layer, whatever the length of the thought (paper, section 3). With learnable global tokens
h_g (M, KV*D) and projections W_Q, W_K, W_V: KV*D -> R,

    S'  = (W_Q h_g) (W_K K_e)^T (W_V V_e) / sqrt(R E)         what an eviction adds: linear attention, (M, R)
    U_0 = Normalize[(W_Q h_g) (W_K h_g)^T (W_V h_g)]          before anything is evicted
    U  <- Normalize(U + S'),  S = U                           --memory-update paper: the older, the fainter
    U  <- U + S',   S = Normalize(U)                          --memory-update sum (ours): all evictions weigh alike

and every linear layer y = W x of the block becomes

    y = W x + alpha / R * A S B x,     A (out, M) zero at the start, B (R, in)

so the state of the row bends the LoRA update of the row; dW = A S B itself is never built. LoRA is the case S = I.
Normalize scales each row of a state to norm 1, as the rows of an identity are: PTE with a frozen state is of the size
of a LoRA. Keys come as the cache holds them, turned by their position (README, "where the paper is silent").

Left out: softmax or gates in S', a state shared by layers, HeadKV's choice of what to evict.

Try it:  python train.py            (and, to see what it is worth: python train.py --adapter lora)
"""
import torch
import torch.nn.functional as F
from torch import nn

from model import Linear

KINDS = ("pte", "lora", "no-global", "global-only")
UPDATES = ("paper", "sum")


class AdaptedLinear(nn.Module):
    """y = W x + alpha/R * A S B x for a frozen `base` linear. A and B stay float32 whatever the dtype of the base."""

    def __init__(self, base, R, M, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / R
        self.A = nn.Parameter(torch.zeros(base.out_features, M))
        self.B = nn.Parameter(torch.randn(R, base.in_features) / base.in_features ** 0.5)

    def forward(self, x, S=None):
        """x (B, T, in), S (B or 1, M, R) float32 or None (no adapter) -> (B, T, out)"""
        y = self.base(x)
        if S is None:
            return y
        z = F.linear(x, self.B.to(x.dtype)) @ S.to(x.dtype).transpose(1, 2)     # (B, T, R) -> (B, T, M)
        return y + F.linear(z, self.A.to(x.dtype)) * self.scale


class ThoughtEncoder(nn.Module):
    """The states of all layers at once (the layer is a batch dimension), and the adapted linears they bend.

    kind: "pte", or "lora" (the state is the identity and stays it), or the paper's two ablations, "no-global" (S_0 = 0)
    and "global-only" (S_0 for ever). The memory U is (L, B, M, R); before the first eviction all rows share one, B = 1.
    """

    def __init__(self, model, kind="pte", R=32, M=32, alpha=32.0, update="paper"):
        super().__init__()
        assert kind in KINDS and update in UPDATES
        self.kind, self.update, self.R, self.M = kind, update, R, M
        L, width = model.config.n_layers, model.config.n_kv_heads * model.config.head_dim
        self.linears = nn.ModuleDict()
        for layer, block in enumerate(model.blocks):
            for name, linear in list(block.named_children()):
                if isinstance(linear, Linear):
                    adapted = AdaptedLinear(linear, R, M, alpha)
                    setattr(block, name, adapted)
                    self.linears[f"{layer}_{name}"] = adapted
        if kind != "lora":
            self.h_g = nn.Parameter(torch.randn(L, M, width))
            self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(L, width, R) / width ** 0.5) for _ in range(3))
        else:
            self.register_buffer("identity", torch.eye(M, R).expand(L, 1, M, R), persistent=False)

    def start(self):
        """U_0, the memory before anything is evicted, (L, 1, M, R)."""
        if self.kind == "lora":
            return self.identity
        U = self.normalize(self.attend(self.h_g[:, None], self.h_g[:, None]))   # (L, 1, M, R)
        return U * 0 if self.kind == "no-global" else U

    def write(self, U, K_e, V_e):
        """The memory after an eviction. U (L, B or 1, M, R), K_e and V_e (L, B, E, KV*D) -> (L, B, M, R)."""
        if self.kind in ("lora", "global-only"):
            return U
        U = U + self.attend(K_e, V_e)
        return self.normalize(U) if self.update == "paper" else U

    def read(self, U):
        """The state S that bends the linears, (L, B or 1, M, R)."""
        return U if self.kind == "lora" else self.normalize(U)

    def attend(self, K, V):
        """S' of keys and values (L, B, E, KV*D), (L, B, M, R): (W_Q h_g) (W_K K)^T (W_V V) / sqrt(R E)."""
        E = K.shape[2]
        q = (self.h_g @ self.W_Q)[:, None]                                      # (L, 1, M, R)
        k = K.to(q.dtype) @ self.W_K[:, None]                                   # (L, B, E, R)
        v = V.to(q.dtype) @ self.W_V[:, None]                                   # (L, B, E, R)
        return q @ (k.transpose(2, 3) @ v) / (self.R * E) ** 0.5                # (L, B, M, R)

    def normalize(self, S):
        """Scales each of the M rows of a state (L, B, M, R) to norm 1; zero stays zero."""
        return F.normalize(S, dim=-1)

    def trainable(self):
        """The tensors to train and save, {name: parameter}: h_g, W_Q, W_K, W_V and every A and B."""
        return {name: p for name, p in self.named_parameters() if ".base." not in name}
