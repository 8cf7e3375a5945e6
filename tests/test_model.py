"""The transformer against Hugging Face's on small random folders; damaged folders and files. GOLD
was computed with transformers 5.24.0 (float32); where it is installed, all logits are compared."""
import functools
import io
import json
import sys

import numpy as np
import pytest
import torch

from model import (
    ArgumentParser, ModelConfig, Transformer, UserError, atomic_write, model_folder, pick_device,
    pick_dtype, read_folder, read_json, read_safetensors, run_script, write_json, write_safetensors)

BASE = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256, rms_norm_eps=1e-5,
    eos_token_id=3)
SCALED = dict(      # the 48 tokens below go well beyond these 16
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16)
LLAMA = BASE | dict(model_type="llama", head_dim=12, rope_theta=5e3, rope_scaling=SCALED)
BIASED = dict(model_type="llama", attention_bias=True, rms_norm_eps=0.1, tie_word_embeddings=True)
TIED = BASE | dict(model_type="qwen2", rope_theta=1e6, tie_word_embeddings=True)
FOLDERS = {         # name: (config.json, number of weight files, GOLD)
    "qwen2, biases, tied": (
        TIED, 1, [-0.38638, 5.17079, -1.12111, -7.22704, 0.99286, 0.97492, 2.76591]),
    "qwen2 of transformers 5, sharded": (
        BASE | dict(model_type="qwen2", rope_parameters={"rope_theta": 1e6}),
        3, [1.49101, -4.24604, 14.4583, 2.27934, 0.1489, -5.13846, 2.81445]),
    "llama 3, scaled rope, untied, wide heads": (
        LLAMA, 1, [-0.14795, -0.10143, -5.35455, 3.64977, -1.87387, 2.42777, 2.80332]),
    "llama, tied, biases, large eps": (
        BASE | BIASED, 1, [-3.07721, -1.15782, -5.9165, 0.5227, 1.48967, 5.45339, 2.20262]),
    "qwen3, q and k norm": (
        BASE | dict(model_type="qwen3", head_dim=16, rope_theta=1e6),
        1, [-2.86573, 1.29073, -1.78839, -2.13868, 2.02065, 1.84111, 2.4843]),
}
LAYER = (           # names in Hugging Face's files
    "input_layernorm post_attention_layernorm mlp.down_proj mlp.gate_proj mlp.up_proj "
    "self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj")
WHERE = ([0, 0, 0, 1, 1, 1], [0, 20, 47, 5, 30, 47], [0, 39, 7, 11, 23, 2])     # row, position, id
IDS = torch.from_numpy(np.random.default_rng(7).integers(0, 40, (2, 48)))       # (B, T)

def random_weights(config):
    """{Hugging Face name: tensor}, large enough for every part of the model to matter."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, tensor in sorted(Transformer(ModelConfig(config)).tensors().items()):
        scale = 1.5 * tensor.shape[-1] ** -0.5 if name.endswith("proj.weight") else 0.5
        weight = rng.standard_normal(tensor.shape) * scale + ("norm" in name)
        weights[name] = torch.from_numpy(weight).float()
    return weights

def write_folder(folder, config, weights, shards=1, dtype=torch.float32):
    """A folder without a tokenizer. Tensors are dealt out to the shards in turn."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [5, 3]})
    for k in range(shards):
        part = {name: weights[name].to(dtype) for name in list(weights)[k::shards]}
        name = f"model-{k + 1:05d}-of-{shards:05d}" if shards > 1 else "model"
        write_safetensors(folder / f"{name}.safetensors", part)
    return folder

@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_hugging_face(tmp_path, name):
    config, shards, gold = FOLDERS[name]
    folder = write_folder(tmp_path / "model", config, random_weights(config), shards)
    model = Transformer.from_folder(folder)
    with torch.no_grad():
        logits = model(IDS)                                     # (B, T, vocab)
    assert [*logits[WHERE].tolist(), logits.abs().mean().item()] == pytest.approx(gold, abs=1e-4)
    assert model.config.eos_ids == [5, 3] and not any(p.requires_grad for p in model.parameters())
    saved = random_weights(config)
    names = {f"model.layers.1.{name}.weight" for name in LAYER.split()}
    assert {*names, "model.embed_tokens.weight", "model.norm.weight"} <= saved.keys()
    assert ("lm_head.weight" in saved) != model.config.tied
    assert_same(model.tensors(), saved)
    transformers = pytest.importorskip("transformers")
    write_safetensors(folder / "model.safetensors", saved)      # theirs reads shards by an index
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (logits - theirs(IDS).logits).abs().max() < 1e-4

def test_weights_take_the_wanted_dtype(tmp_path):
    folder = write_folder(tmp_path / "model", LLAMA, random_weights(LLAMA), dtype=torch.bfloat16)
    exact = Transformer.from_folder(folder)
    rough = Transformer.from_folder(folder, torch.bfloat16)
    assert exact.norm.weight.dtype == torch.float32 and rough.norm.weight.dtype == torch.bfloat16
    assert rough.frequencies.dtype == torch.float32 and rough(IDS).dtype == torch.float32
    assert (rough(IDS) - exact(IDS)).abs().mean() < 0.03 * exact(IDS).abs().mean()
    assert pick_dtype("auto", "cuda") == torch.bfloat16

def test_tensors_that_a_file_may_hold_besides(tmp_path):
    weights = random_weights(TIED)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)     # in older files
    model = Transformer.from_folder(write_folder(tmp_path / "model", TIED, weights))
    assert model.head.weight is model.embedding.weight
    weights["lm_head.weight"][39, 31] += 1
    assert "differs" in refusal(write_folder(tmp_path / "other", TIED, weights))

UP = "model.layers.1.mlp.up_proj.weight"
SPOILT_CONFIG = [   # (changes to config.json, words of the message)
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented, only ('llama', 'qwen2', "),
    ({"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' is not implemented, only ('default', "),
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "yarn"}}, "'yarn' is"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
    ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not implemented"),
    ({"use_sliding_window": True}, "window True is not"), ({"mlp_bias": True}, "bias True is not"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "damaged (KeyError('original_max_position"),
    ({"hidden_size": "32"}, "config.json is damaged"), ({"num_hidden_layers": 10**9}, "sizes"),
    ({"num_key_value_heads": 3}, "size mismatch"), ({"head_dim": 10**12}, "sizes")]
SPOILT_WEIGHTS = [  # (changes to the tensors, words of the message)
    ({UP: None}, "Missing key(s) in state_dict: \"blocks.1.ffn.w_up.weight"),
    ({"lm_head.weight": None}, "Missing key(s) in state_dict: \"head.weight"),
    ({"model.extra.weight": torch.ones(3)}, "tensor 'model.extra.weight' is not implemented"),
    ({"model.norm.weight": torch.ones(31)}, "size mismatch for norm.weight"),
    ({UP: torch.zeros(32, 48)}, "size mismatch for blocks.1.ffn.w_up.weight")]

def refusal(folder):
    """What from_folder says: one line, with the cure that fits."""
    with pytest.raises(UserError) as error:
        Transformer.from_folder(folder)
    said = str(error.value)
    assert "\n" not in said and str(folder) in said
    assert ("download it again (or `git lfs pull`)" in said) == ("is damaged" in said)
    assert ("is damaged" in said) + ("not implemented" in said) + ("check the path" in said) <= 1
    return said

@pytest.mark.parametrize("changes, word", SPOILT_CONFIG, ids=str)
def test_a_model_that_is_not_implemented(tmp_path, changes, word):
    folder = write_folder(tmp_path / "model", LLAMA | changes, random_weights(LLAMA))
    assert word in refusal(folder)

@pytest.mark.parametrize("changes, word", SPOILT_WEIGHTS, ids=lambda x: " ".join(x))
def test_weights_that_do_not_fit(tmp_path, changes, word):
    weights = random_weights(LLAMA) | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    assert word in refusal(write_folder(tmp_path / "model", LLAMA, weights, shards=2))

@pytest.mark.parametrize("file", [
    "config.json", "generation_config.json", "model-00002-of-00002.safetensors"])
def test_files_missing_or_cut_short(tmp_path, file):
    folder = write_folder(tmp_path / "model", LLAMA, random_weights(LLAMA), shards=2)
    whole = (folder / file).read_bytes()
    for length in (0, 1, 8, 9, len(whole) // 2, len(whole) - 3):
        (folder / file).write_bytes(whole[:length])
        assert file in refusal(folder)
    (folder / file).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert file in refusal(folder)
    (folder / file).unlink()
    if file == "config.json":
        assert "config.json: No such file or directory; check the path" in refusal(folder)

SAMPLES = {
    "bf16": torch.randn(3, 5).bfloat16(), "f16": torch.randn(7).half(), "f32": torch.randn(2, 3, 4),
    "f64": torch.randn(2).double(), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4),
    "strided": torch.randn(4, 6).t(), "broadcast": torch.ones(1).expand(3), '"\n': torch.zeros(1)}

assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)

def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SAMPLES)
    tensors = read_safetensors(path)
    assert_same(tensors, SAMPLES)
    tensors["f32"].add_(1)                                      # a view of the file, private to us
    assert_same(read_safetensors(path), SAMPLES)
    write_safetensors(path, tensors)                            # over the very file that is mapped
    assert torch.equal(read_safetensors(path)["f32"], SAMPLES["f32"] + 1)
    library = pytest.importorskip("safetensors.torch")
    write_safetensors(path, SAMPLES)
    assert_same(library.load_file(path), SAMPLES)
    library.save_file({name: tensor.contiguous() for name, tensor in SAMPLES.items()}, path)
    assert_same(read_safetensors(path), SAMPLES)

def pack(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)

def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}

HOSTILE = [
    (2**63).to_bytes(8, "little"), (2**40).to_bytes(8, "little") + b"{", pack(b'{"a": '),
    pack(b'{"\xff": 1}'), pack(b'{"a":' * 100_000), pack({"a": 5}), pack([1]),
    pack(entry("I64", (1,))), pack(entry(["F32"])), pack(entry(shape=(-1, -2))),
    pack(entry(offsets=(0, 8.0))), pack(entry(offsets=(0, 4, 8))), pack(entry(shape=(3,))),
    pack(entry(shape=(2**62, 2, 2**31, 2))), pack(entry(shape=(2**40,), offsets=(0, 2**42)))]

@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_safetensors(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged") as error:
        read_safetensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)

def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(UserError, match="x.json: No space"), atomic_write(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert read_json(path) == {"a": 1} and read_json(tmp_path / "y.json", {}) == {}
    assert not (tmp_path / "x.json.tmp").exists()
    with pytest.raises(UserError, match="no model.safetensors"):
        read_folder(tmp_path)

def full_disk():
    raise OSError(28, "No space left on device")    # print(), where stdout is /dev/full

def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "--stepz", "3"])
    parser = ArgumentParser()
    parser.add_argument("--stepz-long")             # no abbreviations
    for main, words in ((parser.parse_args, "--stepz"), (lambda: open("/no/such"), "/no/such"),
                        (lambda: pick_device("tpu"), "--device tpu"), (full_disk, "stdout")):
        with pytest.raises(SystemExit) as end:
            run_script(main)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("train.py: ") and words in said
        assert said.count("\n") == 1
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    run_script(lambda: print("é 中"))
    assert sys.stdout.buffer.getvalue().decode("cp1252").strip() == "é ?"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        model_folder("Qwen/Qwen2.5-3B")
    assert model_folder("some/where/else") == "some/where/else"
