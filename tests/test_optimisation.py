"""From gradients to weights: parameter groups, accumulation, clipping, loss scaling, EMA of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from dali_saliencymix.training.arguments import parse_arguments
from dali_saliencymix.training.optimisation import DivergenceWatch, Updater, parameter_groups
from dali_saliencymix.training.options import OptimizerOptions


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def updater_of(model: nn.Module, options: str = "") -> Updater:
    parsed = parse_arguments(["data", "--device", "cpu", *options.split()])
    return Updater(model, parsed.optimizer, parsed.model)


def step(updater: Updater, model: nn.Module, images: torch.Tensor, batches: int = 1) -> None:
    for part in images.chunk(batches):
        updater.backward(model(part).square().mean(), batches)
    updater.update()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def decays(model: nn.Module, **options: float) -> dict[str, float]:
    """Return the weight decay of each parameter by name; fail if one is in no group or in two."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], group["weight_decay"])
        for group in parameter_groups(model, OptimizerOptions(**options))
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_weight_decay_of_norms_and_biases_is_that_of_the_weights_unless_it_is_given():
    model = torchvision.models.resnet18(num_classes=3)
    assert set(decays(model, weight_decay=0.1).values()) == {0.1}
    norms = {name for name in decays(model, weight_decay=0.1) if "bn" in name or "downsample.1" in name}
    biases = {name for name in decays(model, weight_decay=0.1) if name.endswith("bias")}
    found = decays(model, weight_decay=0.1, norm_weight_decay=0.0)
    assert {name for name, decay in found.items() if decay == 0} == norms
    found = decays(model, weight_decay=0.1, bias_weight_decay=0.0)
    assert {name for name, decay in found.items() if decay == 0} == biases
    found = decays(model, weight_decay=0.1, norm_weight_decay=0.2, bias_weight_decay=0.3)
    assert {name for name, decay in found.items() if decay == 0.3} == biases
    assert {name for name, decay in found.items() if decay == 0.2} == norms - biases


def test_all_kinds_of_norms_are_norms():
    model = nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "layer": nn.LayerNorm(4), "linear": nn.Linear(4, 4)})
    found = decays(model, weight_decay=1.0, norm_weight_decay=2.0)
    expected = {"norm.weight": 2, "norm.bias": 2, "layer.weight": 2, "layer.bias": 2}
    assert found == expected | {"linear.weight": 1, "linear.bias": 1}


def test_options_reach_the_optimizer():
    updater = updater_of(small_model(), "--wd 0.5 --norm-weight-decay 0 --bias-weight-decay 0 --momentum 0.8")
    assert {group["weight_decay"] for group in updater.optimizer.param_groups} == {0.5, 0.0}
    assert {group["momentum"] for group in updater.optimizer.param_groups} == {0.8}
    assert not updater.scaler.is_enabled()
    assert updater.ema is None


@pytest.mark.parametrize("batches", [2, 4])
def test_an_update_from_several_batches_is_that_of_the_one_large_batch(batches):
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = small_model().double().eval()  # in training mode, statistics would differ between batches
    parts = copy.deepcopy(whole)
    for model, count in ((whole, 1), (parts, batches)):
        updater = updater_of(model, "--lr 0.1 --clip-grad-norm 0.05")
        for _ in range(3):
            step(updater, model, images, count)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-12, atol=1e-14)
    assert (flat(parts) - flat(small_model())).abs().max() > 1e-3


def test_adamw_with_groups_accumulation_and_ema_is_torch_s_own_on_the_mean_gradients():
    model = small_model().double().eval()
    by_hand = copy.deepcopy(model)
    options = "--opt adamw --opt-betas 0.8 0.95 --opt-eps 1e-3 --wd 0.5 --norm-weight-decay 0 --bias-weight-decay 0.1"
    updater = updater_of(model, f"{options} --lr 0.01 --model-ema --model-ema-decay 0.75")
    parameters = dict(by_hand.named_parameters())
    decayed = {0.5: ["0.weight", "4.weight"], 0.0: ["1.weight"], 0.1: ["0.bias", "1.bias", "4.bias"]}
    groups = [{"params": [parameters.pop(name) for name in names], "weight_decay": wd} for wd, names in decayed.items()]
    assert not parameters
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-3, foreach=False)
    average = torch.empty(0)
    for number in range(5):
        images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        step(updater, model, images, batches=4)
        optimizer.zero_grad()
        by_hand(images).square().mean().backward()
        optimizer.step()
        average = 0.75 * average + 0.25 * flat(by_hand) if number else flat(by_hand)
    assert updater.ema is not None
    torch.testing.assert_close(flat(model), flat(by_hand), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(flat(updater.ema.module), average, rtol=1e-10, atol=1e-13)
    assert (flat(model) - flat(small_model())).abs().min() > 1e-5


@pytest.mark.parametrize("precision", ["", "--amp --amp-dtype fp16"])
def test_gradients_are_clipped_to_a_norm_whatever_the_scale_of_the_loss(precision):
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    moved = []
    for norm in ("", "--clip-grad-norm 0.01", "--clip-grad-norm 1e6"):
        model = small_model()
        before = flat(model)
        step(updater_of(model, f"--lr 1 --momentum 0 --wd 0 {norm} {precision}"), model, images)
        moved.append((flat(model) - before).norm().item())
    free, clipped, far = moved
    assert free > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert far == pytest.approx(free, rel=1e-5)


def test_the_loss_is_scaled_for_float16_only():
    for options, enabled in (
        ("", False),
        ("--amp", False),
        ("--amp --amp-dtype fp16", True),
    ):
        assert updater_of(small_model(), options).scaler.is_enabled() is enabled


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_first_update_whose_gradients_overflow_changes_nothing_but_the_scale(device, opt):
    model, other = small_model().to(device), small_model().to(device)
    options = f"--amp --amp-dtype fp16 --lr 0.1 --opt {opt}"
    updater, other_updater = (updater_of(each, options) for each in (model, other))
    before, scale = flat(model), updater.scaler.get_scale()
    spoilt = [torch.full_like(parameter, torch.nan) for parameter in model.parameters() for _ in range(9)]
    del spoilt  # new tensors may get its memory
    updater.backward(model(torch.full((4, 3, 6, 6), 1e30, device=device)).mean() * 1e30)
    updater.update()
    assert torch.equal(flat(model), before)
    assert updater.scaler.get_scale() == scale / 2
    other_updater.scaler.scale(torch.zeros((), device=device))  # creates the scale, so that it can be set
    other_updater.scaler.update(scale / 2)
    images = torch.randn(4, 3, 6, 6, device=device)
    for _ in range(2):
        step(updater, model, images)
        step(other_updater, other, images)
    assert torch.equal(flat(model), flat(other))
    assert not torch.equal(flat(model), before)


def test_gradients_are_forgotten_after_an_update():
    model = small_model()
    step(updater_of(model), model, torch.randn(4, 3, 6, 6))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["4.bias", "1.running_mean", "1.running_var"])
def test_weights_and_statistics_that_are_no_numbers_are_found(name):
    model = small_model()
    updater = updater_of(model)
    assert updater.is_finite()
    model.state_dict()[name][3] = float("inf")
    assert not updater.is_finite()


def test_a_training_diverges_after_so_many_losses_in_a_row_that_are_no_numbers(tmp_path):
    watch = DivergenceWatch(2, torch.device("cpu"), tmp_path / "checkpoint_last.pt")
    for step, loss in enumerate([float("nan"), 1.0, float("inf")], start=1):
        watch.count(torch.tensor(loss))
        watch.check_loss(loss, 1, step)
    watch.count(torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="the loss became nan in epoch 1, step 3; a smaller --lr may help"):
        watch.check_loss(float("nan"), 1, 4)


def test_statistics_that_an_overflow_has_spoilt_are_found_though_its_update_is_left_out():
    model = small_model()
    nn.init.ones_(model[0].weight)
    updater = updater_of(model, "--amp --amp-dtype fp16 --lr 0.1")
    before = flat(model)
    with torch.autocast("cpu", torch.float16):
        updater.backward(model(torch.full((4, 3, 6, 6), 6e4)).mean())
    updater.update()
    assert torch.equal(flat(model), before)
    step(updater, model, torch.randn(4, 3, 6, 6))
    assert flat(model).isfinite().all()
    assert not updater.is_finite()


def test_the_ema_follows_its_formula_also_for_statistics():
    model = small_model().train()
    updater = updater_of(model, "--model-ema --model-ema-decay 0.75 --lr 0.5")
    expected: dict[str, torch.Tensor] = {}
    for number in range(5):
        step(updater, model, torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number)))
        for name, value in model.state_dict().items():
            if number == 0 or not value.is_floating_point():
                expected[name] = value.clone()
            else:
                expected[name] = 0.75 * expected[name] + 0.25 * value
    assert updater.ema is not None
    averaged = updater.ema.module.state_dict()
    assert averaged.keys() == model.state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)
    assert averaged["1.num_batches_tracked"] == 5
    assert not torch.allclose(averaged["1.running_mean"], model[1].running_mean, rtol=1e-3)


SCALED = "--model-ema --amp --amp-dtype fp16 --model-ema-decay 0.5"


@pytest.mark.parametrize("options", ["", SCALED, f"{SCALED} --opt adamw --norm-weight-decay 0"])
def test_an_updater_resumes_bit_identically_from_its_state(options, tmp_path):
    batches = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number)) for number in range(6)]
    model = small_model()
    updater = updater_of(model, options)
    for batch in batches[:3]:
        step(updater, model, batch)
    torch.save({"model": model.state_dict(), **updater.state()}, tmp_path / "state.pt")
    for batch in batches[3:]:
        step(updater, model, batch)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = small_model()
    again = updater_of(other, options)
    other.load_state_dict(saved["model"])
    again.restore(saved)
    for batch in batches[3:]:
        step(again, other, batch)
    assert torch.equal(flat(other), flat(model))
    assert again.scaler.state_dict() == updater.scaler.state_dict()
    if updater.ema is not None and again.ema is not None:
        assert torch.equal(flat(again.ema.module), flat(updater.ema.module))
        assert again.ema.n_averaged == updater.ema.n_averaged == 6


def test_without_an_ema_in_the_state_it_starts_from_the_current_weights():
    trained = small_model()
    updater = updater_of(trained)
    step(updater, trained, torch.randn(4, 3, 6, 6))
    model = small_model()
    again = updater_of(model, "--model-ema")
    model.load_state_dict(trained.state_dict())
    again.restore(updater.state())
    assert again.ema is not None
    averaged = again.ema.module.state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in trained.state_dict().items())


def test_options_given_when_resuming_apply_and_each_parameter_keeps_its_momentum():
    model = small_model()
    before = updater_of(model, "--wd 0.1 --norm-weight-decay 0")
    step(before, model, torch.randn(4, 3, 6, 6))
    updater = updater_of(model, "--wd 0.2 --bias-weight-decay 0.3 --momentum 0.5")
    updater.restore(before.state())
    groups = updater.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [0.2, 0.3, 0.2, 0.3]  # weights and biases, then the norm
    for parameter in model.parameters():
        momenta = (each.optimizer.state[parameter]["momentum_buffer"] for each in (before, updater))
        assert torch.equal(*momenta)


def test_the_learning_rate_is_that_of_all_groups():
    updater = updater_of(small_model(), "--norm-weight-decay 0")
    updater.set_learning_rate(0.123)
    assert [group["lr"] for group in updater.optimizer.param_groups] == [0.123] * 4
