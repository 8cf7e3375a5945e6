"""The safetensors reader and writer: round trips, the library's opinion, and files that are not what they claim."""
import json
import random

import pytest
import torch

from model import UserError, read_folder, read_json, read_safetensors
from train import write_safetensors


def pack(header, data=b"", length=None):
    """The bytes of a file with this header (a dict or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def samples():
    torch.manual_seed(0)
    return {
        "bf16": torch.randn(3, 5).bfloat16(), "f16": torch.randn(7).half(), "f32": torch.randn(2, 3, 4),
        "f64": torch.randn(2).double(), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4),
        "strided": torch.randn(4, 6).t(), "broadcast": torch.ones(1).expand(3),
        'na"me\n☃': torch.tensor([float("nan")]),
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        assert torch.equal(got[name].nan_to_num(7), want[name].nan_to_num(7)), name


def test_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, samples())
    assert_same(read_safetensors(path), samples())
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]  # no temporary file is left
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % samples()[name].itemsize == 0 for name, entry in header.items())  # aligned
    write_safetensors(path, {})
    assert read_safetensors(path) == {}


def test_the_library_reads_and_writes_the_same(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    write_safetensors(tmp_path / "ours.safetensors", samples())
    assert_same(library.load_file(tmp_path / "ours.safetensors"), samples())
    theirs = tmp_path / "theirs.safetensors"
    library.save_file({name: tensor.contiguous() for name, tensor in samples().items()}, theirs)
    assert_same(read_safetensors(theirs), samples())


def test_tensors_are_views_of_the_file_but_never_write_to_it(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.arange(4.0), "b": torch.zeros(4)})
    before, tensors = path.read_bytes(), read_safetensors(path)
    assert tensors["b"].data_ptr() - tensors["a"].data_ptr() == 16  # one mapping, not two copies
    tensors["a"].add_(1)
    assert path.read_bytes() == before
    write_safetensors(path, tensors)  # over the very file that is mapped
    assert read_safetensors(path)["a"].tolist() == [1, 2, 3, 4]


def test_unaligned_data(tmp_path):
    path = tmp_path / "x.safetensors"
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    header = json.dumps({"h": entry("F16", (1,), (0, 2)), "none": entry("F32", (0, 9), (2, 2)),
                         "f": entry("F32", (2,), (2, 10))}).encode()
    for pad in range(4):
        path.write_bytes(pack(header + b" " * pad, b"\0\x3c" + data))
        tensors = read_safetensors(path)
        assert tensors["h"].item() == 1 and tensors["f"].tolist() == [1, 2] and tensors["none"].shape == (0, 9)
        assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors.values())


GOOD = pack({"a": entry()}, bytes(8))
BROKEN = {  # what is wrong: (bytes, a word of the message)
    "empty": (b"", "empty"),
    "five bytes": (b"12345", "cut short"),
    "header longer than the file": (GOOD[:20], "cut short"),
    "huge header": (pack({}, length=2**63), "cut short"),
    "data cut short": (GOOD[:-1], f"has {len(GOOD) - 1} bytes, its header promises {len(GOOD)}"),
    "data too long": (GOOD + b"!", "overlong"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "not json": (pack(b'{"a": '), "Expecting value"),
    "not utf-8": (pack(b'{"\xff": 1}'), "utf-8"),
    "not an object": (pack([entry()]), "no safetensors file"),
    "deep": (pack(b'{"a":' * 100_000), "recursion"),
    "entry no object": (pack({"a": 5}), "unexpected"),
    "no dtype": (pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "'a'"),
    "int64": (pack({"a": entry("I64", (1,))}, bytes(8)), "'I64' is not one of"),
    "dtype a list": (pack({"a": entry(["F32"])}, bytes(8)), "'a'"),
    "true in a shape": (pack({"a": entry(shape=(2, True))}, bytes(8)), "'a': a malformed"),
    "negative shape": (pack({"a": entry(shape=(-1, -2))}, bytes(8)), "'a': a malformed"),
    "float offset": (pack({"a": entry(offsets=(0, 8.0))}, bytes(8)), "'a': a malformed"),
    "three offsets": (pack({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "'a'"),
    "shape too big": (pack({"a": entry(shape=(3,))}, bytes(8)), "'a': its data_offsets do not fit"),
    "shape overflows to 2": (pack({"a": entry(shape=(2**62, 2, 2**31, 2))}, bytes(8)), "'a': its data_offsets"),
    "backwards": (pack({"a": entry(shape=(0,), offsets=(8, 0)), "b": entry()}, bytes(8)), "promises"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b': its data_offsets"),
    "hole": (pack({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "'b': its data_offsets"),
    "hole at the start": (pack({"a": entry(offsets=(4, 12))}, bytes(12)), "'a': its data_offsets"),
    "name twice": (pack(b'{"a":%b,"a":%b}' % (json.dumps(entry(shape=[0], offsets=(0, 0))).encode(),
                                              json.dumps(entry()).encode()), bytes(8)), "there twice"),
    "impossible empty": (pack({"a": entry(shape=(0, 2**63), offsets=(0, 0))}), "'a'"),
    "100 axes": (pack({"a": entry(shape=[1] * 99 + [2])}, bytes(8)), "'a': a malformed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_file_is_one_line_that_names_it(tmp_path, what):
    data, words = BROKEN[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    assert str(path) in str(error.value) and words in str(error.value) and "download it again" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_mutated_headers_load_or_are_refused(tmp_path):
    random.seed(0)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, samples())
    whole, outcomes = path.read_bytes(), {"loaded": 0, "refused": 0}
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(header_end)
            data[at:at + random.randint(0, 3)] = random.choice([b"", b"9", b"-1", b"[", b"}", b'"', b"null", b"\xff"])
        path.write_bytes(data)
        try:
            for tensor in read_safetensors(path).values():
                tensor.double().sum()  # reads every byte: a bad view would crash here
            outcomes["loaded"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_write_refused_leaves_the_old_file(tmp_path):
    with pytest.raises(OSError) as caught:
        write_safetensors(tmp_path / "missing" / "x.safetensors", samples())
    assert caught.value.filename == str(tmp_path / "missing" / "x.safetensors")
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(1)})
    with pytest.raises(Exception):  # no safetensors name for complex numbers: a programmer's error
        write_safetensors(path, {"a": torch.ones(1, dtype=torch.complex64)})
    assert read_safetensors(path)["a"].item() == 1


def sharded(folder, weight_map):
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": torch.ones(2)})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": torch.zeros(3)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_folder_sharded_and_single(tmp_path):
    sharded(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert_same(read_folder(tmp_path), {"a": torch.ones(2), "b": torch.zeros(3)})
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: No such file"):
        read_folder(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"c": torch.ones(1)})
    assert_same(read_folder(tmp_path), {"c": torch.ones(1)})


@pytest.mark.parametrize("place", ["../x.safetensors", "/x", "a\\b.safetensors", "", "..", "x.bin", 5, None])
def test_a_shard_is_a_file_of_the_folder(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    sharded(folder, {"a": place})
    with pytest.raises(UserError, match=r"places tensor 'a'|unexpected"):
        read_folder(folder)


def test_incomplete_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="pytorch_model.bin is not read"):
        read_folder(tmp_path)
    sharded(tmp_path, {"b": "model-00001-of-00002.safetensors"})
    assert read_folder(tmp_path) == {}  # what the shard lacks is missed by name where the model is built
    for text in ("", "[1]", '{"a": ', "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="config.json: .*download it again"):
            read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="No such file"):
        read_json(tmp_path / "absent.json")
