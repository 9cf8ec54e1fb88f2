"""The comparison with other programs' own networks, with a checkout that the test writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# improved-diffusion's class and the names of its arguments, around the tests' module tree.
UNET = """
from openai_model import OpenAIUNet

class UNetModel(OpenAIUNet):
    def __init__(
        self, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
        channel_mult, num_heads=1, use_scale_shift_norm=False, num_classes=None,
    ):
        super().__init__(
            model_channels, channel_mult, layers=num_res_blocks,
            attention=[i for i in range(len(channel_mult)) if 2**i in attention_resolutions],
            num_heads=num_heads + {more}, scale_shift=use_scale_shift_norm, classes=num_classes,
            channels=in_channels, out_channels=out_channels,
        )
"""


@pytest.mark.parametrize(("more", "code"), [(0, 0), ("(num_heads > 1) * 4", 1)], ids=["ok", "off"])
def test_compares(more: object, code: int, tmp_path: Path) -> None:
    """Agreement is exit code 0; heads that the facts do not name are found."""
    (tmp_path / "improved_diffusion").mkdir()
    text = UNET.replace("{more}", str(more))
    (tmp_path / "improved_diffusion" / "unet.py").write_text(text)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "checkpoints")])
    ran = subprocess.run(
        [sys.executable, "-m", "tools.original_models", "improved-diffusion", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.startswith("improved-diffusion: plain: ")
    assert len(ran.stdout.splitlines()) == 3
