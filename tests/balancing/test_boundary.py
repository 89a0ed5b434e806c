# Copyright (c) The mokd_det authors.
"""At features: one backward pass equals the hand-made weighted one; (1, 1) the plain sum."""

import subprocess
import sys

import pytest
import torch

from mokd_det.balancing import build_boundary, gram_matrix

from .helpers import (
    RULE_NAMES,
    UNSMOOTHED,
    decide,
    features_of,
    gradients_of,
    losses_of,
    net_and_data,
    step,
    with_weights,
)


@pytest.fixture
def setting():
    return net_and_data(2)


def test_weights_one_equal_the_plain_sum_bit_for_bit(setting):
    net, x, target = setting
    features = net.features(x)
    # In this order: autograd adds their gradients at the features the last one first.
    distill = net.distill(features, target)
    (net.task(features) + distill).backward()
    plain = gradients_of(net)
    for options in ({"weights": [1.0, 1.0]}, {}):
        step(build_boundary("fixed", options, objectives=2), *setting)
        for name, gradient in gradients_of(net).items():
            assert torch.equal(plain[name], gradient), name


@pytest.mark.parametrize("name", RULE_NAMES)
def test_shared_part_gets_the_weighted_sum_and_heads_stay_unmixed(setting, name):
    net, x, target = setting
    options = with_weights(name, [0.7, 2.0])
    boundary = build_boundary(name, options, objectives=2, **UNSMOOTHED)
    step(boundary, net, x, target)
    gradients = gradients_of(net)

    # The second map is made from the first, but the Gram matrix is that of what leaves the shared
    # part: leaves without a history.
    leaves = {n: f.detach().requires_grad_() for n, f in net.features(x).items()}
    at_features = [
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for loss in (net.task(leaves), net.distill(leaves, target))
    ]
    features = net.features(x)
    reference = [net.task(features), net.distill(features, target)]
    gram, losses = gram_matrix(at_features), torch.stack(reference).detach()
    expected = decide(boundary.balancer.rule, gram, losses)
    assert torch.allclose(boundary.last.weights, expected.weights, rtol=1e-5)
    assert torch.allclose(boundary.last.gram, expected.gram, rtol=1e-5)

    for key, parameter in net.named_parameters():
        parts = [
            torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)[0]
            for loss in reference
        ]
        if key.startswith(("stem", "down")):
            weights = boundary.last.weights.tolist()
            wanted = sum(w * g for w, g in zip(weights, parts) if g is not None)
        else:
            wanted = next(g for g in parts if g is not None)
        assert torch.allclose(gradients[key], wanted, rtol=1e-4, atol=1e-6), key


def test_a_non_finite_gradient_of_weight_zero_is_reported_not_hidden(setting):
    net, x, target = setting
    boundary = build_boundary("fixed", {"weights": [1.0, 0.0]}, objectives=2)
    task, distill = features_of(boundary, net.features(x))
    infinite = (distill["stem"] * float("inf")).sum()
    boundary.backward({"task": net.task(task), "distill": infinite})
    assert boundary.last.fallback == "non_finite"


def test_changing_a_copy_in_place_is_an_error(setting):
    net, x, _ = setting
    boundary = build_boundary("min_norm", objectives=2)
    task, _ = features_of(boundary, net.features(x))
    with pytest.raises(RuntimeError, match="in-?place"):
        task["stem"].relu_()


def test_weight_zero_still_gives_every_parameter_a_gradient(setting):
    """Min-norm may leave the task nothing; the map that is not distilled then gets zeros."""
    net, x, target = setting
    step(build_boundary("fixed", {"weights": [0.0, 1.0]}, objectives=2), net, x, target)
    assert torch.equal(net.down.weight.grad, torch.zeros_like(net.down.weight))
    assert net.stem.weight.grad.any()


def test_nested_features_count_with_the_gradient_that_reaches_them_directly(setting):
    """Several layers of a classifier: the task's features are the last layer's only."""
    net, x, target = setting

    def losses(task, distill):
        return {
            "task": task["down"].square().mean(),
            "distill": net.distill(distill, target) + distill["down"].abs().mean(),
        }

    boundary = build_boundary("min_norm", objectives=2)
    boundary.backward(losses(*features_of(boundary, net.features(x))))
    gradient = net.stem.weight.grad.clone()
    leaves = {n: f.detach().requires_grad_() for n, f in net.features(x).items()}
    own = [
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for loss in losses(leaves, leaves).values()
    ]
    assert own[0][0] is None
    assert torch.allclose(boundary.last.gram.float(), gram_matrix(own), rtol=1e-5)
    assert boundary.last.parts.shape == (2, 2, 2) and boundary.names == ["stem", "down"]
    weights = boundary.last.weights.tolist()
    features = net.features(x)
    total = sum(w * loss for w, loss in zip(weights, losses(features, features).values()))
    wanted = torch.autograd.grad(total, net.stem.weight)[0]
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_accumulation_balances_each_micro_batch():
    """The documented difference: the mean of the micro-batches' own balanced gradients."""
    net, x, target = net_and_data()
    boundary = build_boundary("min_norm", objectives=2)
    total, weights = 0, []
    for part, part_target in zip(x.chunk(2), target.chunk(2)):
        net.zero_grad()
        boundary.backward(losses_of(net, boundary, part, part_target))
        total = total + net.stem.weight.grad / 2
        weights.append(boundary.last.weights)
    assert not torch.allclose(*weights, rtol=1e-2)
    found = step(boundary, net, x, target, 2)
    assert torch.allclose(net.stem.weight.grad, total, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.weights, torch.stack(weights).mean(0))


TORCH_ONLY = """
import sys
import torch  # it imports NumPy, where there is one
numpy = sys.modules.get("numpy")
before = dict(vars(numpy)) if numpy else {}
import mokd_det.balancing
assert (vars(numpy) if numpy else {}) == before, "NumPy has changed"
# torchjd is imported when one of its rules is asked for.
others = {"detectron2", "fvcore", "torchvision", "PIL", "cv2", "yacs", "pycocotools", "torchjd"}
loaded = {name for name in sys.modules if name.split(".")[0] in others}
loaded |= sys.modules.keys() & {"mokd_det.compat"}
assert not loaded, loaded
"""


def test_balancing_needs_torch_only_and_leaves_the_rest_alone():
    subprocess.run([sys.executable, "-c", TORCH_ONLY], check=True)
