"""Pickles, sound and hostile: what they describe is read, what they name is never run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdrt.errors import CheckpointError, UnsafeCheckpointError
from sdrt.export.checkpoint import read_tensors
from sdrt.export.pickle_machine import walk
from sdrt.export.pickles import read_pickle

if TYPE_CHECKING:
    from pathlib import Path


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class Stub:
    """Stands for what a checkpoint names and torch is to rebuild."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def archive(
    path: Path, data: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a torch archive with this pickle in it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (members or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def rebuilt(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    numel: int,
    offset: int = 0,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """Pickle ``{"weight": tensor}`` by hand, so that what it says may be false."""
    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", getattr(torch, kind), key, "cpu", numel) if obj is marker else None

    marker = object()
    call = Call(torch._utils._rebuild_tensor_v2, marker, offset, shape, strides, False, {})
    Pickler(out, protocol=2).dump({"weight": call})
    return out.getvalue()


def test_a_lightning_checkpoint_is_read_as_torch_reads_it(tiny_ckpt: Path) -> None:
    found = read_pickle(tiny_ckpt)
    names = (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
    )
    stubs: list[Any] = [(type("Stub", (Stub,), {}), name) for name in names]
    with torch.serialization.safe_globals(stubs):
        state = torch.load(tiny_ckpt, weights_only=True)["state_dict"]
    assert set(found.tensors) == set(state)
    assert all(torch.equal(found.tensors[name].load(), state[name]) for name in state)
    assert {"callbacks", "optimizer_states"} <= found.names


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_views_and_dtypes_of_every_protocol(tmp_path: Path, protocol: int, dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {
        "base": base,
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "scalar": base[2, 3],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base, requires_grad=False),
    }
    torch.save(tensors, tmp_path / "x.pt", pickle_protocol=protocol)
    found = read_pickle(tmp_path / "x.pt").tensors
    for name, tensor in tensors.items():
        assert torch.equal(found[name].load(), tensor)
        assert found[name].load().is_contiguous()


def test_tensors_that_no_one_aligned_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).half()}
    torch.save(tensors, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        new.writestr("x", b"123")
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    found = read_pickle(tmp_path / "y.pt").tensors
    assert found["a"].offset % 4
    assert all(torch.equal(found[name].load(), tensor) for name, tensor in tensors.items())


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4096)}, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    read_pickle(tmp_path / "x.pt").tensors["a"].load().fill_(7)
    assert (tmp_path / "x.pt").read_bytes() == before


HOSTILE = {
    "reduce": (pickle.dumps({"state_dict": Call(os.system, "touch pwned")}, 2), "posix.system"),
    "protocol 5": (pickle.dumps({"state_dict": Call(os.system, "touch pwned")}, 5), "posix.system"),
    "eval": (pickle.dumps(Call(eval, "open('pwned', 'w')"), 2), "__builtin__.eval"),
    "name": (b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R.", "os.system"),
    "named but not called": (b"\x80\x02}X\x01\x00\x00\x00acsubprocess\nPopen\ns.", "subprocess.Popen"),
    "inst": (b"(X\x01\x00\x00\x00xios\nsystem\n.", "os.system"),
    "text from the memo": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93X\x01\x00\x00\x00x\x85R.",
        "os.system",
    ),
    "dotted": (b"\x80\x04\x8c\x05torch\x8c\x13hub.os.system.extra\x93.", "torch.hub.os.system.extra"),
    "torch's own loader": (b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01x\x85R.", "torch.storage._load_from_bytes"),
    "numpy's runner": (b"\x80\x02cnumpy.testing._private.utils\nrunstring\n.", "runstring"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "__builtin__.getattr"),
    "harmless in front": (b"\x80\x02ccollections\nOrderedDict.system\n.", "OrderedDict.system"),
}

AUDITED = """
import sys
from pathlib import Path
from sdrt.export.checkpoint import read_tensors
from sdrt.errors import UnsafeCheckpointError
import encodings.cp437  # what zipfile itself imports at first
path = Path(sys.argv[1])
events = []
def hook(event, arguments):
    if event in {"import", "exec", "compile", "marshal.loads", "pickle.find_class"} or event.split(".")[0] in {
        "os", "subprocess", "socket", "shutil", "ctypes", "code", "builtins"
    }:
        events.append((event, arguments))
    elif event == "open" and arguments[0] != str(path):
        events.append((event, arguments))
sys.addaudithook(hook)
try:
    read_tensors(path)
except UnsafeCheckpointError as error:
    message = str(error)
seen = list(events)
assert not seen, seen
print(message)
import colorsys
assert any(event == "import" for event, _ in events), "the hook sees nothing"
"""


def run_audited(path: Path, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", AUDITED, str(path)],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    ).stdout


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, name = HOSTILE[case]
    with pytest.raises(UnsafeCheckpointError, match=name.replace(".", r"\.")):
        read_pickle(archive(tmp_path / "x.ckpt", data))
    if data[0] == 0x80:  # and outside an archive, as PyTorch before 1.6 wrote it
        (tmp_path / "raw.ckpt").write_bytes(data)
        with pytest.raises(UnsafeCheckpointError, match=name.replace(".", r"\.")):
            read_tensors(tmp_path / "raw.ckpt")


@pytest.mark.parametrize("case", ["reduce", "text from the memo"])
def test_nothing_runs_opens_or_imports_while_it_is_refused(tmp_path: Path, case: str) -> None:
    data, name = HOSTILE[case]
    assert name in run_audited(archive(tmp_path / "x.ckpt", data), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt"]


def test_the_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    data, _ = HOSTILE["reduce"]
    code = f"import pickle; pickle.loads({data!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x02X\x01\x00\x00\x00a}\x85R.", "calls something that is not a named function"),
        (b"\x80\x04K\x01K\x02\x93.", "other than text"),
        (b"\x80\x02}2.", "instruction DUP"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02P1\n.", "instruction PERSID"),
    ],
)
def test_instructions_that_torch_does_not_write_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(UnsafeCheckpointError, match=said):
        walk(data, "x")


@pytest.mark.parametrize(
    ("description", "content", "error", "said"),
    [
        (
            rebuilt((1 << 40,), (0,), 1),
            bytes(4),
            UnsafeCheckpointError,
            "1099511627776 elements, but its storage has 1",
        ),
        (rebuilt((1 << 20, 1 << 20), (0, 0), 1), bytes(4), UnsafeCheckpointError, "its storage has 1"),
        (rebuilt((2, 2), (1, 1), 3), bytes(12), UnsafeCheckpointError, "2x2 = 4 elements"),
        (rebuilt((4,), (1,), 1 << 40), bytes(16), UnsafeCheckpointError, "should have 4398046511104 bytes, found 16"),
        (rebuilt((4,), (1,), 4, offset=1), bytes(16), UnsafeCheckpointError, "its storage has 4"),
        (rebuilt((2,), (1 << 62,), 4), bytes(16), UnsafeCheckpointError, "its storage has 4"),
        (rebuilt((4,), (1,), 4, key="../x"), bytes(16), CheckpointError, "which the file does not have"),
        (rebuilt((4, 1), (1,), 4), bytes(16), CheckpointError, "2 dimensions but 1 strides"),
        (rebuilt((-4,), (1,), 4), bytes(16), CheckpointError, "not a whole number"),
        (rebuilt((4,), (-1,), 4), bytes(16), CheckpointError, "not a whole number"),
        (rebuilt((4,), (1,), 4, kind="QInt8Storage"), bytes(16), UnsafeCheckpointError, "QInt8Storage"),
    ],
)
def test_tensors_that_promise_more_than_there_is(
    tmp_path: Path, description: bytes, content: bytes, error: type[CheckpointError], said: str
) -> None:
    with pytest.raises(error, match=said):
        read_pickle(archive(tmp_path / "x.ckpt", description, {"data/0": content}))


def test_one_storage_seen_through_many_tensors_is_refused(tmp_path: Path) -> None:
    base = torch.zeros(1000)
    torch.save({f"weight{index}": base.view(1000) for index in range(100)}, tmp_path / "x.pt")
    with pytest.raises(UnsafeCheckpointError, match="promises 400000 bytes of weights"):
        read_pickle(tmp_path / "x.pt")


def test_archives_that_are_not_torchs(tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpointError, match="compressed or encrypted member"):
        read_pickle(archive(tmp_path / "a", pickle.dumps({}, 2), {"data/0": os.urandom(99)}, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "b", "w") as file:
        file.writestr("word/document.xml", "<x/>")
    with pytest.raises(CheckpointError, match=r"no single data\.pkl"):
        read_pickle(tmp_path / "b")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_pickle(archive(tmp_path / "c", pickle.dumps({}, 2), {"constants.pkl": b""}))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pickle(archive(tmp_path / "d", pickle.dumps({}, 2), {"byteorder": b"big"}))
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_pickle(archive(tmp_path / "e", pickle.dumps([1, 2], 2)))


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x", pickle.dumps({}, 2), {"data/0": b"first", "data/1": b"other"})
    data = bytearray(path.read_bytes())
    directory = data.rfind(b"PK\x01\x02")
    data[directory + 42 : directory + 46] = struct.pack("<I", 0)  # the last member, put where the first one is
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not where it should be"):
        read_pickle(path)


def test_a_file_of_pytorch_before_1_6_is_told_from_a_hostile_one(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6, which is not read; if you trust it, convert it") as caught:
        read_tensors(tmp_path / "old.ckpt")
    assert not isinstance(caught.value, UnsafeCheckpointError)
    hostile = textwrap.dedent("x").encode() + pickle.dumps(0, 2) + HOSTILE["reduce"][0]
    (tmp_path / "late.ckpt").write_bytes(hostile[1:])
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        read_tensors(tmp_path / "late.ckpt")


def test_keys_that_would_take_for_ever_to_hash_do_not() -> None:
    nested = b"\x80\x02)" + b"q\x00h\x00\x86" * 200
    assert isinstance(walk(b"\x80\x02}" + nested[2:] + b"K\x01s.", "x"), dict)


def test_bytes_that_are_altered_never_crash(tmp_path: Path) -> None:
    torch.save({"state_dict": {f"w{index}": torch.randn(2, 3) for index in range(4)}, "epoch": 3}, tmp_path / "x.ckpt")
    sound = (tmp_path / "x.ckpt").read_bytes()
    dice = random.Random(0)
    outcomes, messages = set(), []
    for _ in range(600):
        data = bytearray(sound)
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        for _ in range(dice.choice((1, 1, 2, 8))):
            if data:
                data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path / "y.ckpt").write_bytes(data)
        try:
            tensors, _names = read_tensors(tmp_path / "y.ckpt")
            for stored in tensors.values():
                stored.load()
            outcomes.add("read")
        except CheckpointError as error:
            outcomes.add(type(error).__name__)
            messages.append(str(error))
    assert outcomes >= {"read", "CheckpointError", "UnsafeCheckpointError"}
    assert not any("\n" in message for message in messages)
