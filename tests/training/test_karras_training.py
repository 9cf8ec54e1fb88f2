"""EDM2's network in the trainer: its weights stay normalised, and a resumed run is the same."""

from __future__ import annotations

import torch

from fastdiff import sde
from fastdiff.checkpoints import checkpoint
from fastdiff.cli import main
from fastdiff.nn import KarrasUNet
from fastdiff.nn.image_unet import make_karras_unet
from fastdiff.nn.magnitude_preserving import MPWeight
from fastdiff.training.trainer import Trainer, TrainingOptions

OPTIONS = TrainingOptions(
    steps=3, batch_size=4, lr=0.01, lr_schedule="rsqrt", lr_reference=1, warmup=0, ema=(0.9,),
    sample_every=0, save_every=2, seed=1,
)  # fmt: skip


def _trainer(images, out=None, **options):
    torch.manual_seed(0)
    model = make_karras_unet(8, widths=(8, 8), layers_per_block=1, attention=(), **options)
    return Trainer(model, sde.EDM(), images, OPTIONS, prediction="edm", out=out)


def _magnitudes(model):
    weights = [part.weight for part in model.modules() if isinstance(part, MPWeight)]
    return torch.cat([weight.detach().flatten(1).square().mean(1).sqrt() for weight in weights])


def test_weights_are_normalised_after_each_step(images):
    trainer = _trainer(images)
    before = trainer.network.conv_in.weight.clone()
    for _ in range(2):
        trainer.step()
    assert not torch.equal(trainer.network.conv_in.weight, before)
    found = _magnitudes(trainer.network)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=2e-4, atol=0)


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(images, tmp_path):
    whole, parts = (_trainer(images, tmp_path / name) for name in ("whole", "parts"))
    whole.run(progress=False)
    for _ in range(2):
        parts.step()
    parts.save()
    resumed = Trainer.resume(tmp_path / "parts", images)
    resumed.run(progress=False)
    for a, b in ((whole.network, resumed.network), (whole.ema, resumed.ema)):
        assert type(b) is KarrasUNet
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_the_command_line_trains_and_samples_it(tmp_path, capsys):
    out = tmp_path / "run"
    words = (
        f"train --model karras --data digits --out {out} --channels 8,8 --attention none "
        "--layers-per-block 1 --batch-size 4 --image-size 8 --steps 1 --sample-every 0 --warmup 0 "
        "--threads 1 --objective edm --label-dropout 0.5"
    )
    assert main(words.split()) == 0
    saved = checkpoint.load(out)
    assert type(saved.model) is KarrasUNet
    assert saved.null_class
    assert saved.model.config.num_class_embeds == 11
    assert main(f"train --resume --out {out} --steps 2".split()) == 0
    picture = tmp_path / "samples.png"
    words = (
        f"sample --checkpoint {out} --out {picture} --steps 2 --classes 3 --guidance 2 "
        f"--per-class 1 --autoguidance {out}"
    )
    assert main(words.split()) == 0, capsys.readouterr().err
    assert picture.is_file()


def test_a_learned_variance_is_refused(tmp_path, capsys):
    words = f"train --model karras --data digits --out {tmp_path / 'run'} --objective hybrid"
    assert main(words.split()) == 2
    assert "no learned variance, which hybrid trains" in capsys.readouterr().err
