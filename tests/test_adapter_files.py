"""An adapter as files that others read: a LoRA is Hugging Face PEFT's, and can be merged into a model of its own."""
import json
from shutil import copytree

import pytest
import torch

import encoder
import rollout
import train
from conftest import SMALL, call, tiny_encoder, tiny_model
from model import Transformer, read_safetensors

IDS = torch.tensor([[5, 2, 7, 1, 11, 3, 0, 9, 12, 13, 4, 4]])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA run that has learnt something, alpha / rank 2.5."""
    out = tmp_path_factory.mktemp("lora") / "run"
    assert call(train, *SMALL, "--adapter", "lora", "--rank", 4, "--global-tokens", 4, "--alpha", 10, "--loss", "dapo",
                "--overlong-buffer", 30, "--lr", 0.1, "--warmup", 0, "--test-problems", 0, "--out", out) == 0
    return out


def logits(folder, run=""):
    model, adapter, _, _ = encoder.load(folder, run, "float32", "cpu")
    return model(IDS, None, adapter.read(adapter.start()) if adapter else None)


def test_names_and_shapes_of_a_lora_are_those_of_peft(lora):
    """What PEFT 0.21 writes for this model: lora_A (rank, in), lora_B (out, rank), under the names of transformers."""
    heads, inner = {"q_proj": 96, "k_proj": 48, "v_proj": 48}, {"gate_proj": 256, "up_proj": 256}
    wanted = {}
    for layer in range(3):
        shapes = [*((f"self_attn.{k}", 96, n) for k, n in heads.items()), ("self_attn.o_proj", 96, 96),
                  *((f"mlp.{k}", 96, n) for k, n in inner.items()), ("mlp.down_proj", 256, 96)]
        for name, inputs, outputs in shapes:
            place = f"base_model.model.model.layers.{layer}.{name}"
            wanted |= {f"{place}.lora_A.weight": (4, inputs), f"{place}.lora_B.weight": (outputs, 4)}
    for name in ("adapter.safetensors", "adapter_model.safetensors"):
        assert {k: tuple(x.shape) for k, x in read_safetensors(lora / name).items()} == wanted
    assert json.loads((lora / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10.0, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True, "base_model_name_or_path": f"{lora}/base", "target_modules": [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]}


def test_each_name_holds_its_own_matrix():
    """wqkv and w13 are stacked: the update of a part is B's and A's rows of that part, and of no other."""
    model, kinds = tiny_model(), {"q_proj": "wqkv", "v_proj": "wqkv", "up_proj": "w13", "o_proj": "wo"}
    adapter = tiny_encoder(model, "lora", R=6, M=6)
    found = adapter.tensors()
    for name, kind in kinds.items():
        linear = adapter.linears[f"1_{kind}"]
        place = f"base_model.model.model.layers.1.{'mlp' if name == 'up_proj' else 'self_attn'}.{name}"
        A, B = found[f"{place}.lora_B.weight"], found[f"{place}.lora_A.weight"]
        first = {"q_proj": 0, "v_proj": 48, "up_proj": 48, "o_proj": 0}[name]   # where the part begins in the outputs
        x = torch.randn(2, 3, linear.base.in_features)
        update = linear(x, torch.eye(6)[None]) - linear(x)
        mine = update[..., first:first + len(A)]
        torch.testing.assert_close(mine, linear.scale * x @ B.T @ A.T, atol=1e-4, rtol=1e-4)


def test_peft_reads_a_lora_as_it_is(lora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(lora / "base", dtype=torch.float32)
    plain = base(IDS).logits.detach()
    theirs = peft.PeftModel.from_pretrained(base, lora)(IDS).logits.detach()
    torch.testing.assert_close(theirs, logits("", lora), atol=1e-4, rtol=1e-4)
    assert (theirs - plain).abs().max() > 0.1


def test_peft_refuses_what_is_no_lora(trained):
    assert json.loads((trained / "adapter_config.json").read_text())["peft_type"] == "PTE"
    assert not (trained / "adapter_model.safetensors").exists()
    peft = pytest.importorskip("peft")
    with pytest.raises(Exception):
        peft.PeftConfig.from_pretrained(trained)


def test_a_merged_lora_is_a_model_of_its_own(lora, tmp_path, capsys):
    assert call(train, "--merge", lora, "--out", tmp_path / "merged") == 0
    written = sorted(p.name for p in (tmp_path / "merged").iterdir())
    assert written == ["config.json", "model.safetensors", "tokenizer.json"]
    torch.testing.assert_close(logits(tmp_path / "merged"), logits("", lora), atol=1e-4, rtol=1e-4)
    assert (logits(tmp_path / "merged") - logits(lora / "base")).abs().max() > 0.1
    assert call(rollout, "--model", tmp_path / "merged", "--raw", "--prompt", "12=", "--max-new-tokens", 3) == 0


def test_a_merged_model_keeps_its_dtype(lora, tmp_path):
    copytree(lora, tmp_path / "run")
    weights = tmp_path / "run" / "base" / "model.safetensors"
    train.write_safetensors(weights, {name: x.bfloat16() for name, x in read_safetensors(weights).items()})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "fingerprint"}))
    assert call(train, "--merge", tmp_path / "run", "--out", tmp_path / "merged") == 0
    assert {x.dtype for x in read_safetensors(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    torch.testing.assert_close(logits(tmp_path / "merged"), logits("", lora), atol=0.2, rtol=0.1)


def test_what_cannot_be_merged_is_refused(lora, trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for argv, words in (((trained, "--out", tmp_path / "new"), "--adapter pte"), ((lora,), "--out DIR"),
                        ((lora, "--out", tmp_path / "full"), "already holds"),
                        ((tmp_path / "full", "--out", tmp_path / "new"), "full/config.json")):
        assert call(train, "--merge", *argv) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_every_kind_comes_back_from_its_file(tmp_path):
    for kind in encoder.KINDS:
        model = tiny_model()
        adapter = tiny_encoder(model, kind, R=4, M=4)
        train.write_safetensors(tmp_path / "x.safetensors", adapter.tensors())
        saved = read_safetensors(tmp_path / "x.safetensors")
        fresh = tiny_encoder(tiny_model(), kind, R=4, M=4, fresh=True)
        for name, tensor in fresh.tensors().items():
            tensor.copy_(saved.pop(name))
        assert not saved and all(torch.equal(p, dict(adapter.named_parameters())[name])
                                 for name, p in fresh.trainable().items())


def test_a_model_of_transformers_reads_the_merged_folder(lora, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert call(train, "--merge", lora, "--out", tmp_path / "merged") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = Transformer.from_folder(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits.detach(), ours(IDS), atol=1e-4, rtol=1e-4)
