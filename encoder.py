"""encoder.py: the thought encoder, and the linear layers that its state changes.

Before the oldest tokens leave the window, their keys and values K_e, V_e (E, KV*D) are encoded into
a state S of R x R numbers per row and layer, however long the response is (paper, section 3). With
learnable queries q_g (R, KV*D) and projections W_Q, W_K, W_V: KV*D -> R (written as in the paper;
in the code q = q_g @ W_Q, k = K_e @ W_K, v = V_e @ W_V),

    S' = 2 / (R sqrt(E)) (W_Q q_g) (W_K K_e)^T (W_V V_e)     --memory-order paper
    S' = 2 / (R sqrt(E)) (W_Q q_g) (W_V V_e)^T (W_K K_e)     --memory-order keys-match (ours)

is made of the E tokens that leave at once. Keys and values are divided by their RMS first, token by
token, so in every model S' is about twice the size of S_0. (Ours: with 1 / sqrt(R E) and no RMS it
was 15 times the size on SmolLM2, and each eviction erased what was there.) M learnable global
tokens h_g (M, KV*D) in the place of K_e and V_e give S_0, normalized, which the memory starts as.
--memory-update says how an eviction joins the memory (one function each, below):

    paper    memory <- Normalize(memory + S')           what is old fades at every eviction
    sum      memory <- memory + S'                      all evictions weigh alike
    gated    memory <- decay * memory + S' of (2 gate V_e)
    delta    for each token:  memory <- memory + gate (a - memory m) m^T
             m: its key W_K K_e, with norm 1; a = 2 / sqrt(R E) (W_Q q_g)(W_V V_e): what the memory
             should answer to m. So the new answer replaces the old one, as far as gate goes

The last three are ours. gate = sigmoid(w [K_e, V_e]), 1/2 at the start, decides for each token
whether it is worth remembering; decay, one number per row of the memory, starts at 0.98. delta is
the rule of DeltaNet (Schlag et al. 2021) and the default: the memory does not fill up, because what
is written replaces what was answered to similar keys before.

The linear layers read S = Normalize(memory): each of its R rows scaled to norm 1. Every linear
layer y = W x of a block becomes

    y = W x + alpha/R * A S B x          A (out, R), zero at the start; B (R, in)

In S B x, the input B x is compared with what stands on the right in S': in the paper's order with
the evicted values, in ours with the keys, and the values make the answer, as in attention. The rows
of an identity have norm 1 as well, so a LoRA is the case S = I. A and B have the paper's names;
PEFT calls our B lora_A and our A lora_B.

The second half of the file saves, loads and merges the adapter of a run.

Left out: softmax in S', a state shared by layers.

Try it:  python train.py     and, to see what the state is worth:  python train.py --adapter lora
"""
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import (UserError, apply_rope, hf_name, load_model, model_folder, read_folder, read_json,
                   read_safetensors, rope_frequencies, set_chat_format, weights_hash, write_json,
                   write_safetensors)

ADAPTERS = ("pte", "lora", "global-only")
MEMORY_ORDERS = ("keys-match", "paper")
MEMORY_KEYS = ("rotated", "plain")

class AdaptedLinear(nn.Module):
    """y = W x + alpha/R * A S B x. The base W is frozen. A and B are float32 whatever its dtype: a
    step of AdamW is often less than the spacing of bfloat16 numbers, and would be lost."""

    def __init__(self, base, R, alpha):
        super().__init__()
        self.base = base
        self.scale = alpha / R
        self.A = nn.Parameter(torch.zeros(base.out_features, R))
        self.B = nn.Parameter(torch.randn(R, base.in_features) / base.in_features ** 0.5)

    def forward(self, x, S=None):
        """x (B, T, in), S (B or 1, R, R) or None for W x alone -> (B, T, out)"""
        if S is None:
            return self.base(x)
        z = x @ self.B.to(x.dtype).T                                # (B, T, R)
        z = z @ S.to(x.dtype).mT                                    # (B, T, R)
        return self.base(x) + self.scale * (z @ self.A.to(x.dtype).T)   # (B, T, out)

def normalize(memory):
    """Scales each of the R rows of a memory (L, B, R, R) to norm 1. A row of zeros stays zero."""
    return F.normalize(memory, dim=-1)

# The rules of --memory-update. Each returns the new memory, and what it has written to it.
#   memory (L, B or 1, R, R), q (L, 1, R, R), gate (L, B, E, 1)
#   match, answer (L, B, E, R): what inputs are compared with, and what is then answered

def paper_update(memory, q, match, answer, gate, decay):
    write = q @ (answer.mT @ match)                                 # S', (L, B, R, R)
    return normalize(memory + write), write

def sum_update(memory, q, match, answer, gate, decay):
    write = q @ (answer.mT @ match)                                 # S', (L, B, R, R)
    return memory + write, write

def gated_update(memory, q, match, answer, gate, decay):
    """decay (L, 1, R, 1) is learned per row of the memory, the gate computed per evicted token."""
    write = q @ ((2 * gate * answer).mT @ match)                    # (L, B, R, R)
    return decay * memory + write, write

def delta_update(memory, q, match, answer, gate, decay):
    """Token by token: what the memory answers to this match is replaced by the new answer, as far
    as the gate is open. match has norm 1 here, so what is written is the share `gate` of it."""
    R = q.shape[-1]
    before = memory
    answer = R ** 0.5 * answer @ q.mT                               # (L, B, E, R)
    match = F.normalize(match, dim=-1)                              # (L, B, E, R)
    for e in range(match.shape[2]):
        m = match[:, :, e, :, None]                                 # (L, B, R, 1)
        wrong = answer[:, :, e, :, None] - memory @ m               # (L, B, R, 1)
        memory = memory + gate[:, :, e, None] * wrong @ m.mT        # (L, B, R, R)
    return memory, memory - before

MEMORY_UPDATES = {"paper": paper_update, "sum": sum_update, "gated": gated_update,
                  "delta": delta_update}

class ThoughtEncoder(nn.Module):
    """The learned parameters, and functions of the memory. The layer is a batch dimension L.

    adapter: "pte"; "lora", with S = I, fixed; or "global-only", with S = S_0, fixed. With M = 0
    there are no global tokens, and S_0 = 0. Made by `attach`."""

    def __init__(self, config, adapter, R, M, memory_order, memory_update, memory_keys):
        """config: the model's."""
        super().__init__()
        assert adapter in ADAPTERS
        assert memory_order in MEMORY_ORDERS and memory_update in MEMORY_UPDATES
        assert memory_keys in MEMORY_KEYS
        L = config.n_layers
        width = config.n_kv_heads * config.head_dim     # KV*D, a token's keys in one layer
        self.adapter = adapter
        self.memory_order = memory_order
        self.memory_update = memory_update
        self.memory_keys = memory_keys
        self.R = R
        self.head_dim = config.head_dim
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.register_buffer("identity", torch.eye(R).expand(L, 1, R, R), persistent=False)
        self.linears = nn.ModuleDict()      # filled by `attach`; they hold the frozen base as well
        if adapter == "lora":
            return
        self.h_g = nn.Parameter(torch.randn(L, M, width))
        self.q_g = nn.Parameter(torch.randn(L, R, width))
        self.W_Q = nn.Parameter(torch.randn(L, width, R) / width ** 0.5)
        self.W_K = nn.Parameter(torch.randn(L, width, R) / width ** 0.5)
        self.W_V = nn.Parameter(torch.randn(L, width, R) / width ** 0.5)
        if memory_update in ("gated", "delta"):
            self.W_gate = nn.Parameter(torch.zeros(L, 2 * width, 1))        # gate = 1/2
        if memory_update == "gated":
            self.decay = nn.Parameter(torch.full((L, 1, R, 1), 4.0))        # sigmoid: 0.98

    def initial_memory(self):
        """The memory before the first eviction, S_0, shared by all rows, (L, 1, R, R)."""
        if self.adapter == "lora":
            return self.identity
        if self.h_g.shape[1] == 0:
            return torch.zeros_like(self.identity)
        global_tokens = self.h_g[:, None]                           # (L, 1, M, KV*D)
        q, match, answer, _ = self.project(global_tokens, global_tokens)
        return normalize(q @ (answer.mT @ match))                   # (L, 1, R, R)

    def update(self, memory, K_e, V_e, positions):
        """One eviction. memory (L, B or 1, R, R); K_e, V_e (L, B, E, KV*D) as they were cached, at
        positions (B, E) -> the new memory, and what was written to it, (L, B, R, R) each"""
        if self.adapter == "lora":
            return memory, torch.zeros_like(memory)
        if self.adapter == "global-only":                           # S_0 again, with its gradient
            return self.initial_memory().expand_as(memory), torch.zeros_like(memory)
        decay = self.decay.sigmoid() if self.memory_update == "gated" else None
        rule = MEMORY_UPDATES[self.memory_update]
        return rule(memory, *self.project(K_e, V_e, positions), decay)

    def state(self, memory):
        """The state S that the linears read, (L, B or 1, R, R). The paper's rule has normalized the
        memory already; then this changes nothing."""
        return memory if self.adapter == "lora" else normalize(memory)

    def project(self, K, V, positions=None):
        """Keys K and values V, (L, B, E, KV*D) each -> q (L, 1, R, R) with the scale of S' in it;
        match and answer (L, B, E, R); gate (L, B, E, 1) between 0 and 1, if the rule has one"""
        scale = 2 / (self.R * K.shape[2] ** 0.5)                    # 2 / (R sqrt(E))
        if self.memory_keys == "plain" and positions is not None:
            K = self.rotate_back(K, positions)
        K = F.rms_norm(K.to(self.h_g.dtype), K.shape[-1:])
        V = F.rms_norm(V.to(self.h_g.dtype), V.shape[-1:])
        q = scale * (self.q_g @ self.W_Q)[:, None]                  # (L, 1, R, R)
        k = K @ self.W_K[:, None]                                   # (L, B, E, R)
        v = V @ self.W_V[:, None]                                   # (L, B, E, R)
        gate = None
        if self.memory_update in ("gated", "delta"):
            both = torch.cat([K, V], dim=-1)                        # (L, B, E, 2*KV*D)
            gate = (both @ self.W_gate[:, None]).sigmoid()          # (L, B, E, 1)
        if self.memory_order == "keys-match":
            return q, k, v, gate
        return q, v, k, gate

    def rotate_back(self, K, positions):
        """Undoes the rotation of keys K (L, B, E, KV*D) by their positions (B, E)."""
        angles = positions[:, :, None, None] * self.frequencies     # (B, E, 1, D/2)
        heads = K.unflatten(-1, (-1, self.head_dim))                # (L, B, E, KV, D)
        return apply_rope(heads, angles.cos(), -angles.sin()).flatten(-2)   # (L, B, E, KV*D)

    def trainable_parameters(self):
        """Everything that is learned, as a list."""
        return [p for p in self.parameters() if p.requires_grad]

    def tensors(self):
        """{name in a file: tensor}, views: copying into one loads it. A and B have the names that
        PEFT gives them, so that PEFT reads the file of a LoRA as it is."""
        found = {}
        for name, parameter in self.named_parameters(recurse=False):            # h_g, q_g, W_Q ...
            found[name] = parameter.detach()
        for name, linear in self.linears.items():
            peft_name = "base_model.model." + hf_name(name.replace("/", "."))
            found[f"{peft_name}.lora_A.weight"] = linear.B.detach()
            found[f"{peft_name}.lora_B.weight"] = linear.A.detach()
        return found

def attach(model, adapter="pte", rank=32, global_tokens=32, alpha=32.0, memory_order="keys-match",
           memory_update="delta", memory_keys="rotated"):
    """Freezes the model and puts an AdaptedLinear in the place of every linear of its blocks.

    Returns the ThoughtEncoder that holds everything to be trained, on the model's device."""
    encoder = ThoughtEncoder(model.config, adapter, rank, global_tokens, memory_order,
                             memory_update, memory_keys)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        assert not isinstance(module, AdaptedLinear), "this model has an adapter already"
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            adapted = AdaptedLinear(module, rank, alpha)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, adapted)
            encoder.linears[name.replace(".", "/")] = adapted       # a ModuleDict takes no dots
    return encoder.to(model.embedding.weight.device)

# -------------------------------------------------------------------- the adapter of a run, on disk

def read_config(run):
    """The settings of a run as train.py wrote them, a dict. Raises UserError."""
    config = read_json(Path(run) / "config.json")
    expected = {"model": str, "rank": int, "alpha": float, "global_tokens": int, "window": int,
                "evict_ratio": float, "max_new_tokens": int, "sft_steps": int, "steps": int}
    choices = {"adapter": ADAPTERS, "memory_order": MEMORY_ORDERS, "memory_keys": MEMORY_KEYS,
               "memory_update": MEMORY_UPDATES}
    fits = {name: type(config.get(name)) for name in expected} == expected
    fits = fits and all(config.get(name) in values for name, values in choices.items())
    if not fits or not 0 < config["rank"] < 10_000 or not 0 <= config["global_tokens"] < 10_000:
        raise UserError(f"{run}/config.json is damaged, or not of a run of train.py; give the "
                        "folder that train.py wrote, or train again")
    return config

def base_folder(run, config, model=""):
    """The folder of the model that a run was trained on. model: its new place. Raises UserError if
    it is gone, or another model."""
    if not model and config["model"] == "tiny":
        return Path(run) / "base"
    name = model or config["model"]
    if Path(name).is_absolute() and not Path(name).exists():
        raise UserError(f"the model {name} of {run} is gone; give its new place with --model DIR")
    folder = model_folder(name)
    if config.get("base_hash", "") not in ("", weights_hash(folder)):
        raise UserError(f"{folder} is not the model that {run} was trained on; give that one with "
                        "--model DIR")
    return folder

def attach_by_config(model, config):
    """`attach` with the settings of a run's config (a dict)."""
    names = ("adapter", "rank", "global_tokens", "alpha", "memory_order", "memory_update",
             "memory_keys")
    return attach(model, **{name: config[name] for name in names})

def save_adapter(run, encoder, config):
    """Writes adapter.safetensors and adapter_config.json into a run's folder; a LoRA also as
    adapter_model.safetensors, the name that PEFT looks for. Raises UserError."""
    base = Path(run) / "base" if config["model"] == "tiny" else config["model"]
    tensors = encoder.tensors()
    kind = "PTE"
    write_safetensors(Path(run) / "adapter.safetensors", tensors)
    if encoder.adapter == "lora":
        kind = "LORA"
        write_safetensors(Path(run) / "adapter_model.safetensors", tensors)
    targets = {name.split(".")[-3] for name in tensors if "lora_A" in name}    # q_proj, k_proj, ...
    write_json(Path(run) / "adapter_config.json", {
        "peft_type": kind, "task_type": "CAUSAL_LM", "target_modules": sorted(targets),
        "base_model_name_or_path": str(base), "r": config["rank"],
        "lora_alpha": config["alpha"], "lora_dropout": 0.0, "bias": "none", "inference_mode": True})

def load_adapter(run, encoder):
    """Reads a run's adapter.safetensors into the encoder. Raises UserError if it does not fit."""
    path = Path(run) / "adapter.safetensors"
    saved = read_safetensors(path)
    for name, tensor in encoder.tensors().items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise UserError(f"{path} does not fit this model: {name} should have the shape "
                            f"{tuple(tensor.shape)}; give the model that the run was trained on")
        tensor.copy_(saved[name])

def load_run(run, model="", device="auto", dtype="auto"):
    """A run folder of train.py -> (model, encoder, tokenizer, config of the run as a dict).

    model: another place of the model that it was trained on. Raises UserError."""
    config = read_config(run)
    loaded, tokenizer = load_model(base_folder(run, config, model), device, dtype)
    set_chat_format(tokenizer, config)
    encoder = attach_by_config(loaded, config)
    load_adapter(run, encoder)
    return loaded, encoder, tokenizer, config

def merge_adapter(run, out, model=""):
    """Writes the model of a LoRA run with the update added to its weights, W + alpha/R * A B, as a
    model folder `out`. model: as in load_run. Raises UserError, also for a PTE: its update differs
    from sequence to sequence, so no fixed weights can hold it."""
    config = read_config(run)
    if config["adapter"] != "lora":
        raise UserError(f"{run} was trained with --adapter {config['adapter']}: its update depends "
                        "on the sequence and cannot be merged; use python rollout.py --run RUN")
    if not out or Path(out).exists():
        raise UserError(f"--merge {run} writes a new folder; give one that does not exist yet "
                        "with --out DIR")
    folder = base_folder(run, config, model)
    weights = read_folder(folder)
    saved = read_safetensors(Path(run) / "adapter.safetensors")
    for name, B in saved.items():
        if name.endswith("lora_A.weight"):                          # PEFT's name for B
            A = saved[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            W = weights[target]                                     # (out, in)
            weights[target] = (W.float() + config["alpha"] / config["rank"] * A @ B).to(W.dtype)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.pth"))
    write_safetensors(Path(out) / "model.safetensors", weights)
