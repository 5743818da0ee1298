"""PyTorch's files, read without PyTorch: every layout of tensors in, and nothing but tensors out."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax.core.errors import UserError
from mtl_jax.pretrained.torch_bin.pickles import open_bin

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = ("zip", "legacy")
MAGIC_NUMBER, PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001

TABLE = np.arange(12, dtype=np.float32).reshape(3, 4)
STORED = {
    "table": TABLE,
    "table.transposed": TABLE.T,
    "row": TABLE[1],
    "half": np.array([0.5, -2], np.float16),
    "brain": np.array([0.5, -2, 3], jnp.bfloat16),
    "ids": np.arange(5)[None],
    "mask": np.array([True, False, True]),
    "scalar": np.array(7, np.int32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.array([1.5], np.float32),
}


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file; what LazyTensor promises of it is checked."""
    arrays = {}
    for name, tensor in open_bin(path).items():
        arrays[name] = tensor.read()
        assert (arrays[name].shape, arrays[name].dtype) == (tensor.shape, tensor.dtype)
    return arrays


def plain(value: object) -> bytes:
    """The opcodes of a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(*, key: str = "0", elements: int = 4, offset: int = 0, shape: tuple = (4,), strides: tuple = (1,)) -> bytes:
    """The opcodes of a float32 tensor."""
    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key) + plain("cpu") + plain(elements) + b"tQ"
    view = b"(" + storage + plain(offset) + plain(shape) + plain(strides) + plain(False) + b"ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"R"


def state_dict(**tensors: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(plain(name) + opcodes + b"s" for name, opcodes in tensors.items()) + b"."


def write(path: Path, layout: str, opcodes: bytes, storages: dict[str, bytes], **zip_options: int) -> Path:
    """A file in either format with this pickle and these storages of float32."""
    if layout == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("any name/data.pkl", opcodes, **zip_options)
            for key, raw in storages.items():
                archive.writestr(f"any name/data/{key}", raw, **zip_options)
        return path
    head = [pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True})]
    body = [struct.pack("<q", len(raw) // 4) + raw for raw in storages.values()]
    path.write_bytes(b"".join([*head, opcodes, pickle.dumps(list(storages), 2), *body]))
    return path


FOUR = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize("layout", FORMATS)
def test_stored_files(layout):
    arrays = read_all(FIXTURES / f"{layout}.bin")
    assert list(arrays) == list(STORED)
    for name, expected in STORED.items():
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name], expected, err_msg=name)
        np.testing.assert_array_equal(np.ascontiguousarray(arrays[name], np.float32), expected.astype(np.float32))


def test_tensors_are_views_of_maps_of_their_own():
    """A map of the whole file would keep every page that was read in our memory until the last tensor goes."""
    tensors = open_bin(FIXTURES / "zip.bin")
    table, again = tensors["table"].read(), tensors["table"].read()
    assert not np.shares_memory(table, again)
    assert not table.flags.owndata
    assert not table.flags.writeable


@pytest.mark.parametrize("layout", FORMATS)
def test_what_torch_writes_today(layout, tmp_path):
    torch = pytest.importorskip("torch")
    floats, integers = ["float64", "float32", "float16", "bfloat16"], ["int64", "int32", "int16", "int8"]
    unsigned = ["uint64", "uint32", "uint16", "uint8", "bool"]
    grid = torch.arange(24).reshape(2, 3, 4)
    saved = OrderedDict()
    for name in (*floats, *integers, *unsigned):
        values = grid.to(getattr(torch, name))
        saved[name] = values
        saved[f"{name}.transposed"] = values.transpose(0, 2)
        saved[f"{name}.strided"] = values[:, 1:, ::2]
        saved[f"{name}.scalar"] = values[1, 2, 3]
        saved[f"{name}.empty"] = values[:0]
        saved[f"{name}.repeated"] = values[:1].expand(3, -1, -1)
        saved[f"{name}.axis of one"] = values[:, :1]
    saved["parameter"] = torch.nn.Parameter(torch.randn(3))
    saved._metadata = {"": {"version": 1}}
    torch.save(saved, tmp_path / "it.bin", _use_new_zipfile_serialization=layout == "zip")
    arrays = read_all(tmp_path / "it.bin")
    assert list(arrays) == list(saved)
    for name, values in saved.items():
        values = values.detach()
        expected = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
        assert str(arrays[name].dtype) == str(values.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.ascontiguousarray(arrays[name]).astype(expected.dtype), expected, err_msg=name)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_newer_pickle_protocols(layout, protocol, tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 3)
    path = tmp_path / "it.bin"
    torch.save(module.state_dict(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
    np.testing.assert_array_equal(read_all(path)["weight"], module.weight.detach().numpy())


@pytest.mark.parametrize("layout", FORMATS)
def test_state_dict_inside_a_training_checkpoint(layout, tmp_path):
    inner = state_dict(weight=tensor())[2:-1]
    path = write(tmp_path / "it.bin", layout, state_dict(epoch=plain(3), state_dict=inner), {"0": FOUR.tobytes()})
    np.testing.assert_array_equal(read_all(path)["weight"], FOUR)
    for other in (state_dict(weight=tensor(), epoch=plain(3)), state_dict(model=inner, state_dict=inner)):
        with pytest.raises(UserError, match=r"it\.bin: its entry '\w+' is a \w+, not a tensor; save model\.state_dict\(\)"):
            open_bin(write(path, layout, other, {"0": FOUR.tobytes()}))
    with pytest.raises(UserError, match="holds a list, not a dict of tensors"):
        open_bin(write(path, layout, b"\x80\x02].", {}))


def test_python_2_wrote_ordered_dicts_as_lists_of_pairs(tmp_path):
    opcodes = b"\x80\x02ccollections\nOrderedDict\n](](U\x06weight" + tensor() + b"ee\x85R."
    path = write(tmp_path / "it.bin", "legacy", opcodes, {"0": FOUR.tobytes()})
    np.testing.assert_array_equal(read_all(path)["weight"], FOUR)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (5,)}, "reaches beyond its storage"),
        ({"offset": 1}, "reaches beyond its storage"),
        ({"strides": (2,)}, "reaches beyond its storage"),
        ({"shape": (2, 2), "strides": (3, 1)}, "reaches beyond its storage"),
        ({"shape": (2**40,), "strides": (0,)}, "larger than the file"),
        ({"shape": (0, 2**62), "strides": (1, 1)}, "larger than the file"),
        ({"shape": (-4,)}, "makes no sense"),
        ({"offset": -1}, "makes no sense"),
        ({"strides": (-1,)}, "makes no sense"),
        ({"shape": (2, 2)}, "makes no sense"),
        ({"shape": (2.0,)}, "makes no sense"),
        ({"shape": (1,) * 33, "strides": (1,) * 33}, "makes no sense"),
        ({"elements": 5}, "'0'"),
        ({"elements": 3, "shape": (3,)}, "'0'"),
        ({"elements": 2**62}, "'0'"),
        ({"elements": -1}, "makes no sense"),
        ({"key": "1"}, "missing|list of storages"),
        ({"key": "../../0"}, "missing|list of storages"),
    ],
)
def test_tensors_must_lie_inside_their_storage(layout, change, message, tmp_path):
    path = write(tmp_path / "it.bin", layout, state_dict(weight=tensor(**change)), {"0": FOUR.tobytes()})
    with pytest.raises(UserError, match=rf"it\.bin: damaged.*({message})"):
        open_bin(path)


@pytest.mark.parametrize("layout", FORMATS)
def test_the_stride_of_an_axis_of_one_is_never_used(layout, tmp_path):
    opcodes = state_dict(weight=tensor(shape=(1, 4), strides=(2**62, 1)))
    path = write(tmp_path / "it.bin", layout, opcodes, {"0": FOUR.tobytes()})
    np.testing.assert_array_equal(read_all(path)["weight"], FOUR[None])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b")Rt", b")R}" + plain("neg") + b"\x88st", "asks for a tensor that is stored negated"),
        (b"tQ", b"(" + plain("0") + plain(0) + plain(4) + b"ttQ", "asks for a view of a storage"),
        (b"FloatStorage", b"ByteStorage", "makes no sense"),  # in one of the two
    ],
)
def test_what_has_no_counterpart_here_is_refused(layout, old, new, message, tmp_path):
    changed = tensor().replace(old, new)
    path = write(tmp_path / "it.bin", layout, state_dict(first=tensor(), second=changed), {"0": FOUR.tobytes()})
    with pytest.raises(UserError, match=rf"it\.bin: .*{message}"):
        open_bin(path)


def test_big_endian_numbers_are_refused(tmp_path):
    path = write(tmp_path / "it.bin", "zip", state_dict(weight=tensor()), {"0": FOUR.tobytes()})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("any name/byteorder", "big")
    with pytest.raises(UserError, match=r"it\.bin: .*not little-endian"):
        open_bin(path)


def test_compressed_members_are_refused(tmp_path):
    compressed = {"compress_type": zipfile.ZIP_DEFLATED}
    path = write(tmp_path / "it.bin", "zip", state_dict(weight=tensor()), {"0": FOUR.tobytes()}, **compressed)
    with pytest.raises(UserError, match=r"it\.bin: .*'any name/data\.pkl' is compressed.*safetensors"):
        open_bin(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "it.bin"
    for content in (b"", b"PK\x03\x04", b"<html>", b"\x80\x02K\x01.", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"it\.bin"):
            open_bin(path)
    with pytest.raises(UserError, match=r"nothing\.bin"):
        open_bin(tmp_path / "nothing.bin")


class Payload:
    """Pickles to a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def payloads(target: Path) -> dict[str, Payload]:
    """Calls that write this file, by name."""
    code = f"open({str(target)!r}, 'w').close()"
    return {
        "posix.system": Payload(os.system, f"touch {target}"),
        "__builtin__.eval": Payload(eval, code),
        "__builtin__.exec": Payload(exec, code),
        "__builtin__.getattr": Payload(Path(target).touch),
        "numpy.savetxt": Payload(np.savetxt, str(target), [1.0]),
    }


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", payloads(Path()))
def test_nothing_in_a_file_is_run(layout, protocol, name, tmp_path):
    target, path = tmp_path / "owned", tmp_path / "it.bin"
    payload = payloads(target)[name]
    hidden = pickle.dumps({"weight": payload}, protocol)
    pickle.loads(hidden)
    assert target.exists(), "Python's own unpickler should have run it"
    target.unlink()
    with pytest.raises(UserError, match=r"it\.bin: its pickle asks for .*; nothing of it was run.*safetensors") as error:
        open_bin(write(path, layout, hidden, {}))
    assert "\n" not in str(error.value)
    if protocol == 2:  # 0 begins with opcodes that are refused, and 4 writes builtins in place of __builtin__
        assert f"asks for {name!r}" in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("opcodes", "asks"),
    [
        (b"ctorch\nload\n(U\x01xtR.", "torch.load"),
        (b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R.", "_rebuild_device_tensor_from_numpy"),
        (b"ccollections\nOrderedDict.__init__\n)R.", "OrderedDict.__init__"),
        (b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "OrderedDict.__init__"),
        (b"\x8c\x05torch\x8c\x12_utils._rebuild_v2\x93.", "_utils._rebuild_v2"),
        (b"ccopyreg\n_reconstructor\n)R.", "copyreg._reconstructor"),
        (b"c\x1b[31m\nx\n.", r"\\x1b"),
        (b"ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
        (b"ctorch\nfloat32\n)R.", "a call of torch.float32"),
        (b"K\x01)R.", "a call of a value"),
        (b"(ios\nsystem\n.", "the opcode b'i'"),
        (b"(ccollections\nOrderedDict\no.", "the opcode b'o'"),
        (b"ccollections\nOrderedDict\n)\x81.", "the opcode"),
        (b"ccollections\nOrderedDict\n)}\x92.", "the opcode"),
        (b"\x82\x01.", "the opcode"),
        (b"Pposix.system\n.", "the opcode b'P'"),
        (b"\x97.", "the opcode"),
    ],
)
@pytest.mark.parametrize("layout", FORMATS)
def test_every_door_of_the_pickle_machine_is_closed(layout, opcodes, asks, tmp_path):
    with pytest.raises(UserError, match=rf"it\.bin: its pickle asks for .*{asks}"):
        open_bin(write(tmp_path / "it.bin", layout, b"\x80\x04" + opcodes, {}))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ccollections\nOrderedDict\n}U\x01xK\x01sb.",  # BUILD would set an attribute of the class
        b"ctorch._utils\n_rebuild_tensor_v2\nN}U\x08__code__Ns\x86b.",
        b"]}U\x01xK\x01sb.",
        b"})" + b"\x85" * 100_000 + b"K\x01s.",  # a key so deep that hashing it would overflow the stack
        b"})" + b"q\x00h\x00\x86" * 64 + b"K\x01s.",  # a key that would be hashed for centuries
        b"ccollections\nOrderedDict\nK\x01R.",
        b"ccollections\nOrderedDict\nK\x01\x85R.",
        b"ctorch._utils\n_rebuild_parameter\n(K\x01tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"K\x01Q.",
        b"(U\x07storageNU\x010U\x03cpuK\x01tQ.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"r\xff\xff\xff\xff.",
        b"K\x01r\xff\xff\xff\xff0.",  # a memo bomb for a reader whose memo is an array
        b"\x8a\xff.",
        b"(0.",
        b"K\x01(0.",
        b"K\x01(.",
        b"(",
        b"t.",
        b"h\x07.",
        b"}(K\x01u.",
        b"X\x01\x00\x00\x00\xff.",
        b".",
    ],
)
def test_nonsense_is_one_line(opcodes, tmp_path):
    with pytest.raises(UserError, match=r"it\.bin: damaged") as error:
        open_bin(write(tmp_path / "it.bin", "zip", b"\x80\x04" + opcodes, {}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", FORMATS)
def test_every_truncation_is_noticed(layout, tmp_path):
    path = tmp_path / "it.bin"
    short = write(path, layout, state_dict(weight=tensor()), {"0": FOUR.tobytes()}).read_bytes()
    for whole, step in ((short, 1), ((FIXTURES / f"{layout}.bin").read_bytes(), 5)):
        for size in range(0, len(whole), step):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match=r"it\.bin"):
                open_bin(path)


def is_refused_or_read(path: Path) -> None:
    message = f"{path}: read"
    try:
        read_all(path)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("flip", [0x01, pytest.param(0xFF, marks=pytest.mark.long)])
def test_every_flipped_byte_gives_an_error_or_tensors(layout, flip, tmp_path):
    whole, path = (FIXTURES / f"{layout}.bin").read_bytes(), tmp_path / "it.bin"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        is_refused_or_read(path)


PIECES = [
    *(bytes([code]) for code in range(256)),
    *(b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n", b"ccollections\nOrderedDict\n", b"ctorch.storage\nUntypedStorage\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._utils\n_rebuild_parameter\n"),
    *(
        plain("storage"),
        plain("0"),
        plain("cpu"),
        plain((4,)),
        plain((1,)),
        plain(4),
        plain({}),
        tensor(),
        b"(",
        b"t",
        b"R",
        b"s",
        b"b",
    ),
]


@settings(max_examples=400)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30), layout=st.sampled_from(FORMATS))
def test_random_programs_give_an_error_or_tensors(pieces, layout, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random.bin"
    is_refused_or_read(write(path, layout, b"\x80\x02" + b"".join(pieces) + b".", {"0": FOUR.tobytes()}))


@settings(max_examples=100)
@given(data=st.data(), layout=st.sampled_from(FORMATS))
def test_random_splices_give_an_error_or_tensors(data, layout, tmp_path_factory):
    whole, path = (FIXTURES / f"{layout}.bin").read_bytes(), tmp_path_factory.getbasetemp() / "spliced.bin"
    out = io.BytesIO()
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(whole)))
        out.write(whole[begin : begin + data.draw(st.integers(0, len(whole)))])
    path.write_bytes(out.getvalue())
    is_refused_or_read(path)
