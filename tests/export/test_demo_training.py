"""What the demo model is trained on, and that its training resumes and repeats."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdrt.export.demo import autoencoder, denoiser, model_folder, reading
from sdrt.export.demo.autoencoder import LATENT_SCALE, reconstruction_psnr, to_tensor
from sdrt.export.demo.captions import caption, reserved, word
from sdrt.export.demo.muon import Muon
from sdrt.export.demo.networks import new_autoencoder, new_text_encoder
from sdrt.export.demo.progress import Run, trapezoid_rate
from sdrt.export.demo.scenes import COLOURS, SHAPES, Scene, SceneObject, draw, held_out, sample_scene
from sdrt.export.demo.tokens import new_tokenizer, token_ids

if TYPE_CHECKING:
    from pathlib import Path


def test_a_tenth_of_the_combinations_is_held_out_and_never_drawn_for_training() -> None:
    combinations = [(s, c, b) for s, c, b in product(SHAPES, COLOURS, COLOURS) if c != b]
    assert sum(held_out(*combination) for combination in combinations) == len(combinations) // 10
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = sample_scene(rng)
        assert not any(held_out(item.shape, item.colour, scene.background) for item in scene.objects)
        other = sample_scene(rng, held=True)
        assert any(held_out(item.shape, item.colour, other.background) for item in other.objects)


def test_reserved_captions_are_a_tenth_and_kept_apart() -> None:
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(2000):
        scene = sample_scene(rng)
        seen, unseen = caption(scene, rng), caption(scene, rng, unseen=True)
        assert not seen or not reserved(seen)
        assert not unseen or reserved(unseen)
        texts.append(seen or unseen)
    assert len(set(texts)) > 1000


def test_captions_name_what_is_drawn() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = sample_scene(rng)
        words = caption(scene, rng, partial=False).replace(",", "").split()
        if words:
            assert all(item.shape in words and item.colour in words for item in scene.objects)
            assert scene.background in words
            assert not any(a == "a" and b == "orange" for a, b in pairwise(words))


def test_a_word_names_the_shape_or_the_colour_of_an_object() -> None:
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(100):
        scene = sample_scene(rng)
        named = word(scene, rng)
        assert any(named in {item.shape, item.colour} for item in scene.objects)
        kinds.add(named in SHAPES)
    assert kinds == {True, False}


def test_edges_are_anti_aliased_and_everything_else_is_flat() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = sample_scene(rng)
        image = draw(scene)
        flat = {tuple(COLOURS[scene.background]), *(tuple(COLOURS[item.colour]) for item in scene.objects)}
        mixed = np.mean([tuple(pixel) not in flat for pixel in image.reshape(-1, 3).tolist()])
        assert 0.001 < mixed < 0.08


def test_an_untrained_autoencoder_lets_colour_through() -> None:
    torch.manual_seed(0)
    model = new_autoencoder().eval()
    flat = {name: np.full((1, 64, 64, 3), rgb, np.uint8) for name, rgb in COLOURS.items()}
    with torch.no_grad():
        means = {name: model.encode(to_tensor(x)).latent_dist.mean.mean((0, 2, 3)) for name, x in flat.items()}
    for a, b in product(COLOURS, COLOURS):
        assert a == b or float((means[a] - means[b]).norm()) > 0.02


def test_muon_steps_have_singular_values_near_one_and_lower_a_loss() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    target = torch.randn(8, 4, 3, 3)
    optimiser = Muon([weight], lr=0.1)
    losses = []
    for step in range(60):
        before = weight.detach().clone()
        loss = (weight - target).pow(2).mean()
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step == 0:
            values = torch.linalg.svdvals((weight.detach() - before).flatten(1)) / 0.1
            assert float(values.min()) > 0.6
            assert float(values.max()) < 1.3
    assert losses[-1] < 0.2 * losses[0]


def test_the_learning_rate_up_to_its_fall_does_not_depend_on_the_number_of_steps() -> None:
    assert [trapezoid_rate(i, 1000) for i in range(600)] == [trapezoid_rate(i, 4000) for i in range(600)]
    assert trapezoid_rate(999, 1000) == 0.01


class _InterruptedError(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize(("stage", "step"), [("denoiser", 1), ("settled", 3)])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    monkeypatch.setattr(denoiser, "_SAVE_EVERY", 2)
    monkeypatch.setattr(denoiser, "_GRID_PROMPTS", ("a red star on blue",))
    torch.set_num_threads(1)
    encoder = new_autoencoder().eval().requires_grad_(requires_grad=False)

    def train(name: str) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        text_encoder = new_text_encoder()
        trained = denoiser.train_denoiser(
            encoder, text_encoder, tmp_path / name, steps=2, settling_steps=4, seed=0, scenes=4, batch=2
        )
        assert (tmp_path / name / "settled-00004.png").stat().st_size > 500
        return dict(trained.state_dict())

    whole = train("whole")
    advance = Run.advance

    def cut(self: Run) -> None:
        if (self.path.stem, self.step) == (stage, step):
            raise _InterruptedError
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", cut)
        with pytest.raises(_InterruptedError):
            train("cut")
    resumed = train("cut")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_the_text_encoders_training_resumes_and_lowers_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_SAVE_EVERY", 10)
    torch.set_num_threads(1)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = reading.train_text_encoder(tmp_path / "whole", steps=30, seed=0, batch=4)
    advance = Run.advance

    def cut(self: Run) -> None:
        if self.step == 25:
            raise _InterruptedError
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", cut)
        with pytest.raises(_InterruptedError):
            reading.train_text_encoder(tmp_path / "cut", steps=30, seed=0, batch=4)
    resumed = reading.train_text_encoder(tmp_path / "cut", steps=30, seed=0, batch=4)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    rows = whole.get_input_embeddings().weight.any(1)
    assert 30 < int(rows.sum()) < 60, "rows of tokens that no caption has stay zero"


def test_thumbnails_show_the_scene() -> None:
    scene = Scene("blue", (SceneObject("square", "red", 0.25, 0.25, 0.2),))
    (thumbnail,) = reading.thumbnails([scene]).reshape(1, 16, 16, 3)
    red, blue = (torch.tensor(COLOURS[name]) / 127.5 - 1 for name in ("red", "blue"))
    torch.testing.assert_close(thumbnail[3, 3], red)
    torch.testing.assert_close(thumbnail[12, 12], blue)


def test_the_autoencoders_training_repeats_and_lowers_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "_POOL", 50)
    torch.set_num_threads(1)
    models = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        models.append(autoencoder.train_autoencoder(tmp_path / name, steps=12, seed=0, batch=2))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    images = np.stack([draw(sample_scene(np.random.default_rng(i))) for i in range(8)])
    deviation = models[0].encode(to_tensor(images)).latent_dist.mean.std() * LATENT_SCALE
    assert 0.7 < float(deviation) < 1.4


def _shipped(part: str) -> dict[str, torch.Tensor]:
    (path,) = (model_folder() / part).glob("*.safetensors")
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def test_the_shipped_autoencoder_keeps_pictures_clean() -> None:
    rng = np.random.default_rng(5)
    images = np.stack([draw(sample_scene(rng, held=True)) for _ in range(32)])
    model = new_autoencoder().eval()
    model.load_state_dict(_shipped("vae"))
    psnr, _ = reconstruction_psnr(model, images)
    assert psnr >= 32


def test_the_shipped_weights_are_float16_small_and_zero_where_nothing_was_learnt() -> None:
    files = list(model_folder().rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    for path in files:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    table = load_file(next(path for path in files if path.parent.name == "text_encoder"))
    rows = next(tensor for name, tensor in table.items() if name.endswith("token_embedding.weight"))
    assert rows.shape[0] == 49408
    assert 30 < int(rows.any(1).sum()) < 60


@torch.no_grad()
def test_the_shipped_model_heeds_captions_only_where_noise_hides_the_scene() -> None:
    model = denoiser.Denoiser(new_text_encoder())
    model.unet.load_state_dict(_shipped("unet"))
    model.text_encoder.load_state_dict(_shipped("text_encoder"), strict=False)
    rng = np.random.default_rng(6)
    scenes = [sample_scene(rng) for _ in range(16)]
    autoencoder_model = new_autoencoder().eval()
    autoencoder_model.load_state_dict(_shipped("vae"))
    clean = autoencoder_model.encode(to_tensor(np.stack([draw(scene) for scene in scenes]))).latent_dist.mean
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    ids = token_ids(new_tokenizer(), [caption(scene, rng) for scene in scenes])
    empty = token_ids(new_tokenizer(), [""]).expand(16, -1)

    def difference(timestep: int) -> float:
        alpha = denoiser.alphas_cumprod()[timestep].float()
        x = alpha.sqrt() * clean * LATENT_SCALE + (1 - alpha).sqrt() * noise
        t = torch.full((16,), timestep)
        return float((model(x, t, ids) - model(x, t, empty)).pow(2).mean().sqrt())

    assert difference(200) < 0.4 * difference(600)
