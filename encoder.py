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

The second half of the file serves all scripts: it finds a model and the adapter of a run on disk (or a model on the
Hugging Face hub), goes on with a file of results, and reads the command line.

Left out: softmax or gates in S', a state shared by layers, HeadKV's choice of what to evict.

Try it:  python train.py            (and, to see what it is worth: python train.py --adapter lora)
"""
import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import get_args, get_origin

import torch
import torch.nn.functional as F
from torch import nn

from cache import (DTYPES, FETCHED, free_folder, make_folder, model_folder, pick_device, pick_dtype, write_json,
                   write_safetensors)
from model import (HUGGING_FACE_NAMES, Linear, ModelConfig, Tokenizer, Transformer, UserError, read_folder, read_json,
                   read_safetensors)

KINDS = ("pte", "lora", "no-global", "global-only")
UPDATES = ("paper", "sum")


class AdaptedLinear(nn.Module):
    """y = W x + alpha/R * A S B x for a frozen `base` linear. A and B stay float32 whatever the dtype of the base.

    Where the base stacks several matrices, so do A (out, M) and B (parts * R, in): each has its own, and one product
    does for all. While a rollout decodes, `ready` is what `matrices` gave when it began."""

    def __init__(self, base, R, M, alpha):
        super().__init__()
        self.base, self.scale, self.ready = base, alpha / R, None
        self.A = nn.Parameter(torch.zeros(base.out_features, M))
        self.B = nn.Parameter(torch.randn(len(base.parts) * R, base.in_features) / base.in_features ** 0.5)

    def forward(self, x, S=None):
        """x (B, T, in), S (B or 1, M, R) or None (no adapter) -> (B, T, out)"""
        y = self.base(x)
        if S is None:
            return y
        A, B = self.ready if self.ready and not torch.is_grad_enabled() else self.matrices(x.dtype)
        S = S.to(x.dtype).transpose(1, 2).expand(len(x), -1, -1)                # (B or 1, M, R) -> (B, R, M)
        z = (x.flatten(0, 1) @ B).view(len(x), -1, S.shape[1])                  # (B*T, parts*R) -> (B, T*parts, R)
        z = torch.bmm(z, S).view(-1, len(A))                                    # (B, T*parts, M) -> (B*T, parts*M)
        y.view(-1, A.shape[1]).addmm_(z, A)                                     # (B*T, out): added where y stands
        return y

    def matrices(self, dtype):
        """alpha/R * A^T, with the A of each part in a block of its own, (parts*M, out), and B^T (in, parts*R), in the
        base's dtype. Transposed as products with few rows read them fastest."""
        A = torch.block_diag(*self.A.split(self.base.parts)).T * self.scale
        return A.to(dtype), self.B.T.to(dtype)


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

    def prepare(self, dtype):
        """Before decoding: computes once what does not change from token to token. After it: None forgets that."""
        with torch.no_grad():
            for linear in self.linears.values():
                linear.ready = dtype and [x.contiguous() for x in linear.matrices(dtype)]

    def trainable(self):
        """The tensors to train and save, {name: parameter}: h_g, W_Q, W_K, W_V and every A and B."""
        return {name: p for name, p in self.named_parameters() if ".base." not in name}

    def tensors(self):
        """What a file holds of it, {name: view of a parameter}. A and B of each matrix have the names that Hugging Face
        PEFT gives them (its lora_A is our B, its lora_B our A), so that PEFT reads a LoRA's file as it is."""
        found = {name: p.detach() for name, p in self.named_parameters() if "." not in name}  # h_g, W_Q, W_K, W_V
        for key, linear in self.linears.items():
            layer, name = key.split("_")
            names = HUGGING_FACE_NAMES[name].split()
            parts = linear.A.detach().split(linear.base.parts), linear.B.detach().chunk(len(names))
            for name, A, B in zip(names, *parts):                               # (out, M), (R, in)
                start = f"base_model.model.model.layers.{layer}.{name}"
                found |= {f"{start}.lora_A.weight": B, f"{start}.lora_B.weight": A}
        return found


# ------------------------------------------------------------------------------------ a model and its adapter on disk

def fingerprint(tensors, settings=None):
    """Tells models of one shape apart: a hash of the first numbers of all {name: tensor} (and of settings, a dict)."""
    digest = hashlib.sha256(json.dumps(settings).encode() if settings else b"")
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.flatten()[:64].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def attach(model, config):
    """A ThoughtEncoder for the model as a run's config (a dict) describes it, on the model's device."""
    encoder = ThoughtEncoder(model, config["adapter"], config["rank"], config["global_tokens"], config["alpha"],
                             config["memory_update"])
    return encoder.to(model.embedding.weight.device)


def run_config(run):
    """The settings of a run, as train.py wrote them. Raises UserError."""
    config = read_json(Path(run) / "config.json")
    allowed = dict(adapter=KINDS, memory_update=UPDATES, rank=range(1, 9999), global_tokens=range(1, 9999))
    for name, kind in dict(model=str, adapter=str, memory_update=str, rank=int, global_tokens=int, window=int,
                           alpha=(int, float), evict_ratio=(int, float)).items():
        value = config.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or value not in allowed.get(name, [value]):
            raise UserError(f"{run}/config.json is not that of a run of train.py: {name} is {value!r:.99}; give the "
                            "folder that train.py wrote")
    return config


def base_of(run, config):
    """The folder of the model that a run was trained on."""
    return Path(run) / "base" if config["model"] == "tiny" else model_folder(config["model"])


def read_adapter(run, config, folder):
    """The tensors of a run's adapter. Raises UserError if they are missing, or do not belong to the model in folder."""
    path = Path(run) / "adapter.safetensors"
    saved = read_safetensors(path)
    with torch.device("meta"):                                                  # shapes without numbers
        wanted = attach(Transformer(ModelConfig(read_json(Path(folder) / "config.json"))), config).tensors()
    for name in sorted(saved.keys() | wanted.keys()):
        there, fits = (tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (saved, wanted))
        if there != fits:
            raise UserError(f"{path} does not fit {folder}: {name} is {there}, for this model it would be {fits}; give "
                            f"the model that the run was trained on ({config['model']})")
    if config.get("fingerprint", mark := fingerprint(read_folder(folder))) != mark:
        raise UserError(f"{run} was trained on another model than {folder}: of the same shape, but other weights; give "
                        f"the model that the run was trained on ({config['model']})")
    return saved


def write_adapter(run, encoder, config):
    """adapter.safetensors and adapter_config.json in a run's folder; of a LoRA also adapter_model.safetensors, the name
    that PEFT looks for. config: the run's. Raises OSError."""
    write_safetensors(Path(run) / "adapter.safetensors", encoder.tensors())
    if encoder.kind == "lora":
        write_safetensors(Path(run) / "adapter_model.safetensors", encoder.tensors())
    write_json(Path(run) / "adapter_config.json", {                             # a PTE is nothing that PEFT could read
        "peft_type": "LORA" if encoder.kind == "lora" else "PTE", "task_type": "CAUSAL_LM", "r": encoder.R,
        "lora_alpha": config["alpha"], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "base_model_name_or_path": f"{run}/base" if config["model"] == "tiny" else config["model"],
        "target_modules": sorted({name.split(".")[-3] for name in encoder.tensors() if "lora" in name})})


def merge(run, out):
    """Writes the model of a LoRA run with the update in its weights, W + alpha/R * A B, as a Hugging Face folder `out`.
    Raises UserError, also for other adapters: theirs is another update in every sequence."""
    config = run_config(run)
    folder, out = base_of(run, config), free_folder(out, f"--merge {run} wants a new folder: give --out DIR")
    if config["adapter"] != "lora":
        raise UserError(f"{run} is a run of --adapter {config['adapter']}: its update depends on each sequence's own "
                        "thoughts, no weights can hold it; use the run as it is: python rollout.py --run RUN")
    saved, tensors = read_adapter(run, config, folder), read_folder(folder)
    for name, B in saved.items():
        if name.endswith("lora_A.weight"):                                      # PEFT's name for B (R, in)
            A, name = saved[name.replace("lora_A", "lora_B")], name.removeprefix("base_model.model.")
            W = tensors[name := name.replace("lora_A.", "")]                    # (out, in)
            tensors[name] = (W.float() + config["alpha"] / config["rank"] * A @ B).to(W.dtype)
    make_folder(out)
    for path in chain(*(Path(folder).glob(name) for name in FETCHED if "safetensors" not in name)):
        shutil.copy(path, out)
    write_safetensors(out / "model.safetensors", tensors)
    print(f"{out} is a model of its own now: python rollout.py --model {out}")


def load(folder, run, dtype, device):
    """A model folder, a run folder of train.py, or both -> (model, encoder or None, tokenizer, run's config or {}).

    Raises UserError for folders that are missing, damaged or do not belong together."""
    if not folder and not run:
        raise UserError("which model? give --model DIR (a Hugging Face folder) or --run RUN (a folder train.py wrote)")
    config = run_config(run) if run else {}
    folder, device = model_folder(folder) if folder else base_of(run, config), pick_device(device)
    model, encoder = Transformer.from_folder(folder, dtype=pick_dtype(dtype, device), device=device), None
    if run:
        saved, encoder = read_adapter(run, config, folder), attach(model, config)
        for name, tensor in encoder.tensors().items():
            tensor.copy_(saved[name])
    return model, encoder, Tokenizer.from_folder(folder), config


def arms(folder, runs):
    """[(arm, model folder, run or "", fingerprint)]: the models as they were before training, then the runs; folder is
    that of their model, "" for the one that each was trained on. What differs in nothing but its seed is one arm.
    Raises UserError if a run does not fit its model."""
    configs = {str(Path(run)): run_config(run) for run in runs}
    bases = {str(model_folder(folder)): folder} if folder else {
        str(base_of(run, config)): config["model"] for run, config in configs.items()}
    if not bases:
        raise UserError("which model? give --model DIR (a Hugging Face folder), or --runs RUN (folders train.py wrote)")
    names, found = {}, {}

    def add(name, settings, base, run, mark):
        if (key := json.dumps(settings)) not in names:                          # another arm of this name: say which
            names[key] = f"{name} ({run or base})" if name in names.values() else name
        found.setdefault((run, mark), (names[key], base, run, mark))            # two runs may share one base
    for base, model in bases.items():
        add("no training", model, base, "", fingerprint(read_folder(base)))
    for run, config in configs.items():
        base = str(model_folder(folder) if folder else base_of(run, config))
        name = config["adapter"]
        name = {"pte": "PTE", "lora": "LoRA_c" if config["window"] else "LoRA"}.get(name, name)
        settings = {k: v for k, v in config.items() if k not in ("seed", "out", "fingerprint", "device", "dtype",
                                                                "compile", "save_every", "sample_every", "wandb")}
        add(name, settings, base, run, fingerprint(read_adapter(run, config, base), config))
    return list(found.values())


def resume(name, settings, per_job, unit):
    """(path, records that an earlier call with the same settings left there), for a --json name, "" for one made of the
    settings. What that call left of a batch of `unit` records is cut off. Raises UserError if it had other settings."""
    header = json.dumps(settings).encode()
    path = Path(name or f"runs/eval-{hashlib.sha256(header).hexdigest()[:8]}.json")
    if path.suffix != ".json" or path.parent != Path("runs") and not path.parent.is_dir():
        raise UserError(f"--json {path}: give a name that ends in .json, in a folder that exists")
    lines_path = path.with_suffix(".jsonl")
    torn = lines_path.exists() and header.startswith(lines_path.read_bytes())   # killed before it wrote anything
    if torn or not lines_path.exists():
        if path.exists() or path.with_suffix(".md").exists():
            raise UserError(f"--json {path} exists, or its .md does, and is not of this evaluation; give another")
        lines_path.unlink(missing_ok=True)
        return path, []
    first, *lines = lines_path.read_bytes().split(b"\n")[:-1] or [b""]          # the last piece is not a whole line
    try:
        there, wanted = json.loads(first), json.loads(header)
        changed = [name for name in wanted if wanted[name] != there[name]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{lines_path} exists and is not of an evaluation; give another --json, or remove it") from None
    if changed:
        old, new = there[changed[0]], wanted[changed[0]]
        raise UserError(f"{lines_path} holds results with other {changed[0]} ({old}, not {new}); give another --json, "
                        "or remove it")
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:                                                      # a machine that went down left noise
            break
    del records[len(records) // per_job * per_job + len(records) % per_job // unit * unit:]
    with open(lines_path, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in [first, *lines[:len(records)]]))
    return path, records


# ------------------------------------------------------------------------------------ the command line of every script


def flag(default, help, choices=None, least=None):
    """A dataclass field that is a command-line flag; choices or a least value bound what it may be. A tuple as default
    makes a flag of several values, between spaces or commas."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and the default of every flag."""


def several(kind):
    """Reads `a,b` as [a, b], each a `kind`; argparse says "invalid int value" for what it cannot read."""
    def read(text):
        return [kind(part) for part in text.split(",") if part] or kind("")     # int("") raises ValueError
    read.__name__ = kind.__name__
    return read


def command_line(options, doc, presets=None, argv=None):
    """Fills the dataclass `options` from the command line: a flag for every field, with dashes or underscores.

    presets {name: {field: default}} are picked by the field `preset`. Raises UserError for an unknown flag or value."""
    def refuse(message):
        raise UserError(f"{message}; --help lists every flag")
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=Help)
    parser.error = refuse
    for f in fields(options):
        names = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name])  # in order, without repeats
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        if get_origin(f.type):
            kind = {"type": several(get_args(f.type)[0]), "nargs": "+", "metavar": "A"}
        elif f.type is not bool and not f.metadata["choices"]:
            kind["metavar"] = {int: "N", float: "F", str: "S"}[f.type]
        parser.add_argument(*names, default=f.default, help=f.metadata["help"], **kind)
    if presets:
        parser.set_defaults(**presets[parser.parse_args(argv).preset])
    values = vars(parser.parse_args(argv))
    for f in fields(options):
        least, value, choices = f.metadata["least"], values[f.name], f.metadata["choices"]
        if choices and value not in choices:                                    # a default of presets, from a file
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be one of {', '.join(choices)}")
        if get_origin(f.type) and value is not f.default:
            value = values[f.name] = tuple(chain(*value))
        for number in value if get_origin(f.type) else [value]:
            if least is not None and not number >= least:                       # not: nan is below everything
                raise UserError(f"--{f.name.replace('_', '-')} {number} is too small; give {least} or more")
    return options(**values)


def run_script(main):
    """Runs a script's main(); what a person can mend is one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            error = UserError(f"{error.filename}: {error.strerror or error}; make room, or pick another folder")
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class ModelOptions:
    """The flags that a chat and an evaluation share."""
    model: str = flag("", "model folder, or id on the Hugging Face hub (owner/name)")
    evict_ratio: float = flag(-1.0, "share of the window that leaves at once, -1: as the run was trained, else 0.25")
    seed: int = flag(0, "makes the draw repeatable", least=0)
    dtype: str = flag("auto", "of the weights; auto: bfloat16 on a GPU, else float32", ("auto", *DTYPES))
    device: str = flag("auto", "auto: cuda, mps or cpu", ("auto", "cuda", "mps", "cpu"))
    compile: str = flag("auto", "one compiled function a token; auto: on a GPU only", ("auto", "on", "off"))
