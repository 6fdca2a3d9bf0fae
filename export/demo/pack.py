"""Pack the demo model for shipping: ``python -m sdrt.export.demo.pack`` after a training.

It builds the bundle of the checkpoint in ``export/demo/model`` and writes both into the archive that comes with sdrt.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import onnx

from ...engines import demo
from ...errors import ExportError
from ..build import build
from . import model_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

# A window over both, so that weights are found again; 16-bit positions, for float16.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2**25, "lc": 0, "lp": 1, "pb": 1}]


def pack(archive: Path) -> None:
    """Build the bundle of the checkpoint in the tree and pack both.

    Parameters
    ----------
    archive
        The ``.tar.xz`` to write.

    Raises
    ------
    ExportError
        The bundle has weights that are no float16 numbers.

    """
    model = model_folder()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / demo.NAME
        build(demo.NAME, output=bundle, precision="fp32", command="sdrt build --ckpt demo")
        checkpoint = {
            f"{demo.CHECKPOINT}/{path.relative_to(model).as_posix()}": path.read_bytes()
            for path in sorted(model.rglob("*"))
            if path.suffix in {".json", ".safetensors"}
        }
        members = dict(checkpoint)
        for path in sorted(bundle.iterdir()):
            name = f"{demo.BUNDLE}/{path.name}"
            if path.suffix == ".data":
                members |= _weights(name, path, b"".join(checkpoint.values()))
            else:
                members[name] = path.read_bytes()
    with lzma.open(archive, "wb", filters=_FILTERS) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in members.items():
            # An entry has nothing but name and size, so that the same files give the same archive.
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _weights(name: str, path: Path, known: bytes) -> dict[str, bytes]:
    """Bring a graph's weights as near to the checkpoint's bytes as they come, and note how to get them back."""
    whole = np.fromfile(path, "<f4")
    halves = whole.astype("<f2")
    if not np.array_equal(halves.astype("<f4").view("<u4"), whole.view("<u4")):
        raise ExportError(f"{path.name} holds numbers that are not float16: expected the weights of a float16 model")
    turned = []
    for first, rows, columns in _matrices(path.with_suffix("")):
        matrix = halves[first : first + rows * columns]
        back = matrix.reshape(rows, columns).T.ravel()
        if matrix.tobytes() not in known and back.tobytes() in known:
            matrix[:] = back
            turned.append((first, rows, columns))
    return {name + demo.HALVED: halves.tobytes(), name + demo.TURNED: json.dumps(turned).encode("ascii")}


def _matrices(graph: Path) -> Iterator[tuple[int, int, int]]:
    """Where a graph's matrices stand among its weights: first number, rows, columns."""
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external and len(tensor.dims) == 2:
            yield int(external["offset"]) // 4, *tensor.dims


@click.command()
@click.option("--archive", type=click.Path(path_type=Path), default=demo.ARCHIVE, show_default=True)
def main(archive: Path) -> None:
    """Pack the demo model for shipping."""
    pack(archive)
    click.echo(f"{archive}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()
