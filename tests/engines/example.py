"""A small bundle with every field in use: its files hold bytes that no engine reads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sdrt.engines.bundle import TOKENIZER, hash_file, onnx_data_name, onnx_name, write_manifest
from sdrt.engines.manifest import (
    COMPONENT_NAMES,
    Backend,
    Component,
    DimRange,
    InputRange,
    Latent,
    Manifest,
    Model,
    Parity,
    TensorSpec,
    Text,
    utc_now,
)

if TYPE_CHECKING:
    from pathlib import Path

BATCH = DimRange("batch", 1, 8)
HEIGHT = DimRange("height", 8, 128, multiple_of=2)
WIDTH = DimRange("width", 8, 128, multiple_of=2)


def fill(
    folder: Path, content: bytes = b"weights", *, name: str = "example", created: str | None = None, **changes: Any
) -> Manifest:
    """Write a whole bundle into an empty folder; `changes` are of the manifest's fields."""
    (folder / TOKENIZER).write_bytes(b"{}")
    components = []
    for component in COMPONENT_NAMES:
        paths = onnx_name(component), onnx_data_name(component)
        for path in paths:
            (folder / path).write_bytes(path.encode() + content)
        components.append(
            Component(
                name=component,
                precision="fp32",
                files=tuple(hash_file(folder, path) for path in paths),
                inputs=(
                    TensorSpec("latents", "float32", (BATCH, 4, HEIGHT, WIDTH)),
                    TensorSpec("timestep", "float32", (1,)),
                ),
                outputs=(TensorSpec("prediction", "float32", (BATCH, 4, HEIGHT, WIDTH)),),
                parity=Parity(1e-5, 2e-6, float("inf"), "relative_l2", 1e-4, "torch 2.13.0 fp32"),
                profiles=({"latents": InputRange((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 128, 128))},),
            )
        )
    manifest = Manifest(
        name=name,
        kind="onnx",
        precision="fp32",
        created=created or utc_now(),
        command=f"sdrt build --ckpt v1-1 --name {name}",
        sdrt_version="0.1.0",
        model=Model("sd-v1", "v1-1", "diffusers", ema=False),
        backend=Backend("onnx", "1.23.0", opset=20),
        latent=Latent(),
        text=Text(embedding_width=768, layers=12),
        scheduler={
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "trained_betas": None,
            "clip_sample": False,
            "steps": (1, 2),
        },
        components=tuple(components),
        tokenizer=hash_file(folder, TOKENIZER),
        tools={"torch": "2.13.0", "onnx": "1.23.0"},
    )
    manifest = dataclasses.replace(manifest, **changes)
    write_manifest(folder, manifest)
    return manifest
