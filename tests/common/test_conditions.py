"""Arguments of the model: what belongs to the images and what they share, said or refused."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff import PerImage, Shared, losses, sample, schedules, sde
from fastdiff.generation import Guide
from fastdiff.samplers import DDIM

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastdiff. the . steps of .* begin at abar"),
]

SCHEDULE = schedules.cosine(100)
SAMPLER = DDIM(SCHEDULE, 1)
TABLE = torch.arange(32.0).view(4, 8)
ROWS = torch.arange(4.0).view(4, 1, 1, 1)
AMBIGUOUS = r"cond\['table'\] has a tensor of 4 rows, .* fastdiff.PerImage.* fastdiff.Shared"


def given(cond, images=4, **options):
    """What the model is given, call by call."""
    seen = []

    def model(x, t, **arguments):
        seen.append(arguments)
        return x / 2

    sample(model, SAMPLER, (images, 1, 2, 2), cond=cond, progress=False, **options)
    return seen


def test_what_is_shared_stays_whole():
    for call in given({"table": Shared(TABLE), "n": 3}, max_batch=2):
        assert torch.equal(call["table"], TABLE)
        assert call["n"] == 3


def test_what_is_per_image_is_cut():
    first, second = given({"table": PerImage(TABLE)}, max_batch=2)
    assert torch.equal(first["table"], TABLE[:2])
    assert torch.equal(second["table"], TABLE[2:])


@pytest.mark.parametrize("name", ["class_labels", "labels", "y", "encoder_hidden_states"])
def test_some_names_are_per_image_everywhere(name):
    labels = torch.tensor([3, 1, 4, 1])
    found = given({name: labels}, max_batch=3)
    assert [call[name].tolist() for call in found] == [[3, 1, 4], [1]]
    (whole,) = given({name: Shared(labels)}, max_batch=4)
    assert torch.equal(whole[name], labels)


def test_nothing_is_guessed_where_a_batch_is_cut():
    """The [4, 8] table of four images; SDXL's [2, 6] time_ids of two."""
    with pytest.raises(ValueError, match=AMBIGUOUS):
        given({"table": TABLE}, max_batch=2)
    added = {"time_ids": torch.zeros(2, 6)}
    with pytest.raises(ValueError, match=r"'added_cond_kwargs'.* 2 rows, .*a part of the images"):
        given({"added_cond_kwargs": added}, images=2, max_batch=1)


def test_nothing_need_be_said_of_a_whole_batch():
    (call,) = given({"table": TABLE}, max_batch=4)
    assert torch.equal(call["table"], TABLE)
    (call,) = given({"table": TABLE[:1]}, images=1, max_batch=1)
    assert torch.equal(call["table"], TABLE[:1])


def test_guidance_joins_what_is_per_image():
    cond = {"y": torch.tensor([1, 2]), "table": Shared(TABLE[:2]), "rows": PerImage(TABLE[2:])}
    uncond = {**cond, "y": torch.tensor([0, 0])}
    (call,) = given(cond, 2, uncond=uncond, guidance=2.0)
    assert call["y"].tolist() == [0, 0, 1, 2]
    assert torch.equal(call["table"], TABLE[:2])
    assert torch.equal(call["rows"], torch.cat([TABLE[2:], TABLE[2:]]))


def test_guidance_guesses_nothing_of_what_is_equal_in_both_halves():
    cond = {"y": torch.arange(4), "table": TABLE}
    uncond = {**cond, "y": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match="given all images twice"):
        given(cond, uncond=uncond, guidance=2.0)
    (call,) = given(cond, uncond=uncond)  # without guidance, which asks for one half
    assert torch.equal(call["table"], TABLE)


def test_what_differs_in_both_halves_can_only_be_joined():
    cond, uncond = {"table": TABLE}, {"table": -TABLE}
    first, second = given(cond, uncond=uncond, guidance=2.0, max_batch=2)
    assert torch.equal(first["table"], torch.cat([-TABLE[:2], TABLE[:2]]))
    assert torch.equal(second["table"], torch.cat([-TABLE[2:], TABLE[2:]]))


def test_marks_reach_into_nested_values_and_the_innermost_counts():
    cond = {"added": PerImage({"a": [TABLE, None], "b": Shared((TABLE, 7)), "c": ROWS})}
    first, _ = given(cond, max_batch=2)
    added = first["added"]
    assert torch.equal(added["a"][0], TABLE[:2])
    assert added["a"][1] is None
    assert torch.equal(added["b"][0], TABLE)
    assert added["b"][1] == 7
    assert torch.equal(added["c"], ROWS[:2])


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        pytest.param({"a": PerImage(TABLE[:3])}, None, r"must have 4 rows, .*\(3, 8\)", id="rows"),
        pytest.param(
            {"a": PerImage(TABLE)}, {"a": Shared(TABLE)}, "must be marked alike", id="two marks"
        ),
        pytest.param(
            {"a": Shared(TABLE)}, {"a": -TABLE}, r"uncond\['a'\] must be equal", id="not shared"
        ),
    ],
)
def test_marks_that_do_not_fit(cond, uncond, message):
    with pytest.raises(ValueError, match=message):
        given(cond, uncond=uncond, guidance=1.0 if uncond is None else 2.0)


class Linear:
    """A network of four Gaussians' means, one an image, that keeps what it is given."""

    def __init__(self):
        self.tables, self.labels = [], []

    def __call__(self, x, t, table, y):
        assert len(y) == len(x)
        self.tables.append(table)
        self.labels.append(y)
        return x - y.view(-1, 1)


@pytest.mark.parametrize("method", ["ode", "adaptive", "euler-maruyama", "unipc-2"])
def test_solvers_and_samplers_keep_what_is_shared(method):
    model = Linear()
    diffusion = fastdiff.Diffusion(model, sde.VP(), "eps")
    options = {} if method in ("ode", "adaptive") else {"steps": 3}
    cond = {"table": Shared(TABLE), "y": torch.tensor([0.0, 0.1, 0.2, 3.0])}
    draw = {"progress": False, "max_batch": 3}
    diffusion.generate(diffusion.sampler(method, **options), (4, 2), cond=cond, **draw)
    assert all(table is TABLE or torch.equal(table, TABLE) for table in model.tables)
    assert min(map(len, model.labels)) == 1
    with pytest.raises(ValueError, match=AMBIGUOUS):
        diffusion.generate(
            diffusion.sampler(method, **options), (4, 2), cond=cond | {"table": TABLE}, **draw
        )


def test_a_solver_that_drops_images_guesses_nothing_without_max_batch():
    diffusion = fastdiff.Diffusion(Linear(), sde.VP(), "eps")
    cond = {"table": TABLE, "y": torch.zeros(4)}
    for method in ("ode", "adaptive"):
        with pytest.raises(ValueError, match=AMBIGUOUS):
            diffusion.sample((4, 2), method=method, cond=cond, progress=False)
    diffusion.sample((4, 2), method="euler-maruyama", cond=cond, progress=False)


def test_likelihoods_and_bounds_likewise():
    model, x = Linear(), torch.rand(4, 2) - 0.5
    diffusion = fastdiff.Diffusion(model, schedules.cosine(5), "eps")
    cond = {"table": TABLE, "y": torch.zeros(4)}
    with pytest.raises(ValueError, match=AMBIGUOUS):
        diffusion.log_likelihood(x, cond=cond, progress=False)
    bits = {"discrete": False, "clip": False, "progress": False, "batch_size": 2}
    with pytest.raises(ValueError, match=AMBIGUOUS):
        losses.bits_per_dim(model, diffusion.forward, x, **bits, **cond)
    losses.bits_per_dim(model, diffusion.forward, x, **bits, **cond | {"table": Shared(TABLE)})
    assert all(torch.equal(table, TABLE) for table in model.tables)
    marked = {"table": Shared(TABLE), "y": PerImage(torch.zeros(4))}
    score = diffusion.score(marked)(x, torch.full((4,), 0.5, dtype=torch.float64))
    assert score.shape == x.shape


def test_a_classifiers_labels_are_per_image():
    seen = []

    def classifier(x, t):
        seen.append(len(x))
        return torch.stack([x.sum(1), -x.sum(1)], 1)

    diffusion = fastdiff.Diffusion(lambda x, t: x / 2, SCHEDULE, "eps")
    guide = Guide(classifier, torch.tensor([0, 1, 1]))
    sampler = diffusion.sampler("ddim", 2)
    drawn = diffusion.generate(sampler, (3, 2), guide=guide, max_batch=2, progress=False)
    assert drawn.images.shape == (3, 2)
    assert seen == [2, 2, 1, 1]
