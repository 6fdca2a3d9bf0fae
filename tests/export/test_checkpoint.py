"""Reading checkpoints: the same weights out of every form, and every damage refused by its name."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bench.checkpoints import write_checkpoint
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdrt.errors import CheckpointError, InputError
from sdrt.export.checkpoint import Checkpoint, read_checkpoint
from sdrt.export.tensor_file import read_safetensors

if TYPE_CHECKING:
    from pathlib import Path

PARTS = ("text_encoder", "unet", "vae")
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for part in PARTS:
        ours, theirs = getattr(one, part), getattr(other, part)
        assert dict(ours.config) == dict(theirs.config)
        assert list(ours.weights) == list(theirs.weights)
        assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the diffusers folder that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "My Model (v2)")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_three_forms_give_the_same_networks(tiny_checkpoint: Path, tiny_ldm: Path, tiny_ckpt: Path) -> None:
    folder, ldm, ckpt = (read_checkpoint(str(path)) for path in (tiny_checkpoint, tiny_ldm, tiny_ckpt))
    assert_same(folder, ldm)
    assert_same(folder, ckpt)
    assert (folder.form, ldm.form, ckpt.form) == ("diffusers", "ldm", "ldm")
    assert (folder.name, ldm.name, ckpt.source) == ("tiny", "tiny", "tiny.ckpt")
    for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one", "prediction_type"):
        assert folder.scheduler[name] == ldm.scheduler[name]
    CLIPTextModel(CLIPTextConfig(**folder.text_encoder.config)).load_state_dict(dict(folder.text_encoder.weights))
    UNet2DConditionModel(**folder.unet.config).load_state_dict(dict(folder.unet.weights))
    AutoencoderKL(**folder.vae.config).load_state_dict(dict(folder.vae.weights))


def test_the_folder_is_what_diffusers_reads(tiny_checkpoint: Path) -> None:
    ours = read_checkpoint(str(tiny_checkpoint))
    for part, kind in zip(PARTS, (CLIPTextModel, UNet2DConditionModel, AutoencoderKL), strict=True):
        theirs = kind.from_pretrained(tiny_checkpoint / part).state_dict()
        weights = getattr(ours, part).weights
        assert set(theirs) == set(weights)
        assert all(torch.equal(theirs[name], weights[name]) for name in theirs)


def test_original_names_are_mapped_as_diffusers_maps_them(tiny_ldm: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    ours, original = read_checkpoint(str(tiny_ldm)), load_file(tiny_ldm)
    plain = {name: tensor for name, tensor in original.items() if not name.startswith("model_ema")}
    unet = convert_ldm_unet_checkpoint(dict(plain), dict(ours.unet.config))
    vae = convert_ldm_vae_checkpoint(dict(plain), dict(ours.vae.config))
    for theirs, part in ((unet, ours.unet), (vae, ours.vae)):
        assert set(theirs) == set(part.weights)
        assert all(torch.equal(theirs[name].view_as(part.weights[name]), part.weights[name]) for name in theirs)


def test_averaged_weights(tiny_ldm: Path, tiny_ckpt: Path, tiny_folder_ema: Path, tiny_checkpoint: Path) -> None:
    plain, averaged = read_checkpoint(str(tiny_ldm)), read_checkpoint(str(tiny_ldm), ema=True)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert not torch.equal(plain.unet.weights[name], averaged.unet.weights[name])
    assert torch.equal(plain.vae.weights["quant_conv.weight"], averaged.vae.weights["quant_conv.weight"])
    # As in stable-diffusion-v1-5, the folder's plain file is the averaged one.
    assert_same(averaged, read_checkpoint(str(tiny_folder_ema), ema=True))
    assert_same(averaged, read_checkpoint(str(tiny_folder_ema)))
    for path in (tiny_ckpt, tiny_checkpoint):
        with pytest.raises(CheckpointError, match=r"averaged.*leave --ema away"):
            read_checkpoint(str(path), ema=True)


def test_the_forms_that_folders_take(folder: Path, tiny_checkpoint: Path) -> None:
    """Old attention names, pieces, pickles in the place of safetensors, half precision, text without its prefix."""
    sound = read_checkpoint(str(tiny_checkpoint))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            for new, former in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{former}.")] = tensors.pop(name)

    rewrite(folder / VAE, rename)
    assert "decoder.mid_block.attentions.0.query.weight" in read_safetensors(folder / VAE)
    unet = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(unet)
    for piece in range(3):
        some = {name: unet[name] for name in names[piece::3]}
        save_file(some, folder / f"unet/diffusion_pytorch_model-0000{piece + 1}-of-00003.safetensors")
    text = load_file(folder / "text_encoder/model.safetensors") | {"text_projection.weight": torch.zeros(2, 2)}
    (folder / "text_encoder/model.safetensors").unlink()
    torch.save(
        {name.removeprefix("text_model."): text[name] for name in text}, folder / "text_encoder/pytorch_model.bin"
    )
    found = read_checkpoint(str(folder))
    assert_same(sound, found)
    assert found.name == "My-Model-v2"
    (folder / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is one of 3 pieces, found 2"):
        read_checkpoint(str(folder))


def test_half_precision_stays_as_it_is_stored(folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(folder / UNET).items()}
    (folder / UNET).unlink()
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    weights = read_checkpoint(str(folder)).unet.weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.equal(weights[name], half[name]) for name in half)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_original_files_in_half_precision(tmp_path: Path, dtype: str) -> None:
    for form, suffix in (("ldm", "safetensors"), ("lightning", "ckpt")):
        path = write_checkpoint(tmp_path / f"x.{suffix}", form, "tiny", dtype=dtype)  # type: ignore[arg-type]
        weights = read_checkpoint(str(path)).unet.weights
        assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}


def test_one_file_with_the_names_of_diffusers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = {"unet": UNET, "vae": VAE, "text_encoder": "text_encoder/model.safetensors"}
    tensors = {
        f"{part}.{name}": value for part, at in files.items() for name, value in load_file(tiny_checkpoint / at).items()
    }
    save_file(tensors, tmp_path / "one.safetensors")
    found = read_checkpoint(str(tmp_path / "one.safetensors"))
    assert found.form == "diffusers"
    assert_same(read_checkpoint(str(tiny_checkpoint)), found)


def test_original_text_encoder_without_its_prefix_and_other_leavings(tiny_ldm: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".text_model." in name]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)
        tensors["first_stage_model.loss.logvar"] = torch.zeros(1)
        tensors["cond_stage_model.logit_scale"] = torch.zeros(())
        tensors["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(2, 2)
        tensors["v_pred"] = torch.zeros(0)

    path = tmp_path / "x.safetensors"
    shutil.copy(tiny_ldm, path)
    rewrite(path, change)
    found = read_checkpoint(str(path))
    assert_same(read_checkpoint(str(tiny_ldm)), found)
    assert found.scheduler["prediction_type"] == "v_prediction"


def test_progress_counts_bytes_to_the_end(tiny_ldm: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = read_checkpoint(str(tiny_ldm), progress=lambda *step: steps.append(step))
    total = sum(tensor.nbytes for part in PARTS for tensor in getattr(found, part).weights.values())
    assert steps[-1][1:] == (total, total)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"][0, 1, 2, 0] = value

    rewrite(folder / UNET, spoil)
    with pytest.raises(CheckpointError, match=r"(NaN|infinite values) in 'mid_block\.resnets\.0\.conv1\.weight'"):
        read_checkpoint(str(folder))


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_named(folder: Path) -> None:
    sound = load_file(folder / UNET)
    save_file({name: tensor for name, tensor in sound.items() if "up_blocks.3.resnets.2" not in name}, folder / UNET)
    with pytest.raises(CheckpointError, match=r"U-Net lacks 12 tensors: 'up_blocks\.3\.resnets\.2\S+' and 11 more"):
        read_checkpoint(str(folder))
    save_file(sound | {"extra.weight": torch.zeros(3)}, folder / UNET)
    with pytest.raises(CheckpointError, match=r"1 tensors too many: 'extra\.weight'"):
        read_checkpoint(str(folder))
    save_file(sound | {"conv_out.bias": torch.zeros(5)}, folder / UNET)
    with pytest.raises(CheckpointError, match=r"'conv_out\.bias' is \[5\], expected \[4\]"):
        read_checkpoint(str(folder))
    save_file(sound | {"conv_out.bias": torch.zeros(4, dtype=torch.int8)}, folder / UNET)
    with pytest.raises(CheckpointError, match=r"'conv_out\.bias' is int8, expected float32, float16 or bfloat16"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"block_out_channels": [10**9, 64, 64, 64]}, "1000000000, expected 1 to 16384"),
        ("unet/config.json", {"block_out_channels": [64, 128, 128, 128]}, "another shape than expected"),
        ("unet/config.json", {"block_out_channels": "wide"}, "expected a list of 1 to 8"),
        ("unet/config.json", {"block_out_channels": [32] * 5}, "differ in length"),
        ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
        ("unet/config.json", {"layers_per_block": 3}, "lacks"),
        ("unet/config.json", {"layers_per_block": True}, "layers_per_block is True, expected int"),
        ("unet/config.json", {"norm_num_groups": 7}, "no U-Net can be made of this configuration"),
        ("unet/config.json", {"down_block_types": ["os.system"] * 4}, "'os.system', expected CrossAttn"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model: its U-Net takes 9 channels"),
        ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "is Stable Diffusion 2: its text width is 1024"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0.0"),
        ("vae/config.json", {"latents_mean": [1.0]}, "latents_mean"),
        ("text_encoder/config.json", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "'relu', expected gelu or quick_gelu"),
        ("text_encoder/config.json", {"num_attention_heads": 7}, "which 7 attention heads cannot share"),
        ("scheduler/scheduler_config.json", {"beta_start": 2.0}, "beta_start is 2.0"),
        ("scheduler/scheduler_config.json", {"prediction_type": "magic"}, "'magic', expected epsilon or"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas is set"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline', expected"),
        ("model_index.json", {"unet": ["evil", "Model"]}, "has the unet 'Model'"),
    ],
)
def test_configurations_that_lie(folder: Path, file: str, changes: dict[str, Any], said: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(folder))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_size_that_a_model_was_trained_for_is_kept(folder: Path, tiny_checkpoint: Path) -> None:
    assert read_checkpoint(str(tiny_checkpoint)).unet.config["sample_size"] == 64
    edit(folder / "unet/config.json", sample_size=96)
    assert read_checkpoint(str(folder)).unet.config["sample_size"] == 96
    edit(folder / "unet/config.json", sample_size=None)
    assert read_checkpoint(str(folder)).unet.config["sample_size"] == 64


def test_settings_that_change_nothing_are_passed_over(folder: Path, tiny_checkpoint: Path) -> None:
    edit(folder / "unet/config.json", upcast_attention=True, dropout=0.0, num_class_embeds=None, _x="y")
    edit(folder / "unet/config.json", transformer_layers_per_block=1, conv_in_kernel=3, only_cross_attention=False)
    edit(folder / "vae/config.json", force_upcast=False, sample_size=32)
    edit(folder / "text_encoder/config.json", eos_token_id=2, torch_dtype="float16", dropout=0.0)
    assert_same(read_checkpoint(str(tiny_checkpoint)), read_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "should be JSON"),
        (b"[1]", "should be a JSON object, found list"),
        (b"{" * 100_000, "should be JSON"),
        (b'{"a": 1, "a": 2}', "a name appears twice"),
        (b"\xff\xfe", "should be JSON"),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
    ],
)
def test_json_that_is_none(folder: Path, data: bytes, said: str) -> None:
    (folder / "unet/config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "does not exist: expected a file, a folder"),
        ("no/such/model.ckpt", "does not exist"),
        ("model.safetensors", "does not exist"),
        ("./here", "does not exist"),
        ("v1-7", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "can be neither"),
    ],
)
def test_what_names_nothing(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_checkpoint(spec)


def test_a_path_wins_over_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("v1-1")
    assert read_checkpoint("v1-1").source == "v1-1"


def test_safetensors_headers_that_are_altered_never_crash(tmp_path: Path) -> None:
    tensors = {f"weight{index}": torch.randn(index + 1, 3) for index in range(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    sound = (tmp_path / "x.safetensors").read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    dice = random.Random(0)
    outcomes, messages = set(), []
    for _ in range(600):
        data = bytearray(sound)
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        for _ in range(dice.choice((1, 1, 2, 8))):
            if data:
                data[dice.randrange(min(header, len(data)))] = dice.choice((dice.randrange(256), *b'0129[]{}",:'))
        (tmp_path / "y.safetensors").write_bytes(data)
        try:
            for stored in read_safetensors(tmp_path / "y.safetensors").values():
                stored.load()
            outcomes.add("read")
        except CheckpointError as error:
            outcomes.add("refused")
            messages.append(str(error))
    assert outcomes == {"read", "refused"}
    assert not any("\n" in message for message in messages)
