# Copyright (c) The mokd_det authors.
"""The boundary: one backward pass equals the hand-made weighted one; (1, 1) the plain sum."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mokd_det.balancing import balance, build_boundary, gram_matrix


class Net(nn.Module):
    """Two shared feature maps, two heads that both use them, and a projector."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 5, 3, stride=2)
        self.head_a = nn.Conv2d(4, 2, 1)
        self.head_b = nn.Conv2d(5, 2, 1)
        self.head_c = nn.Conv2d(4, 1, 3)
        self.projector = nn.Conv2d(4, 6, 1)

    def features(self, x):
        first = torch.relu(self.stem(x))
        return [first, self.down(first)]

    def task(self, features):
        first, second = features
        return (
            self.head_a(first).square().mean()
            + self.head_b(second).abs().mean()
            + self.head_c(first).exp().mean()
        )

    def distill(self, features, target):
        # The second map is not distilled: its gradient from this objective is absent.
        return (self.projector(features[0]) - target).square().mean()


def run(net, x, target, boundary):
    net.zero_grad()
    features = net.features(x)
    task, shared = boundary.split(features, 2) if boundary else (features, features)
    distill = net.distill(shared, target)
    losses = [net.task(task), distill]
    if boundary:
        boundary.backward(losses)
    else:
        sum(losses).backward()
    return losses, {n: p.grad.clone() for n, p in net.named_parameters()}


@pytest.fixture
def setting():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)


def test_weights_one_equal_the_plain_sum_bit_for_bit(setting):
    boundary = build_boundary("fixed", weights=[1.0, 1.0])
    _, plain = run(*setting, None)
    _, balanced = run(*setting, boundary)
    for name in plain:
        assert torch.equal(plain[name], balanced[name]), name


@pytest.mark.parametrize(
    "name",
    [
        *("constant_dominance", "loss_ratio", "aligned"),
        *("fixed", "min_norm", "protected_min_norm", "anchored"),
    ],
)
def test_shared_part_gets_the_weighted_sum_and_heads_stay_unmixed(setting, name):
    net, x, target = setting
    boundary = build_boundary(name, smoothing=0, schedule=(1.0, 1.0), weights=[0.7, 2.0])
    rule = boundary.balancer.rule
    losses, gradients = run(net, x, target, boundary)

    # The second map is made from the first, but the Gram matrix is that of what leaves the shared
    # part: leaves without a history.
    leaves = [f.detach().requires_grad_() for f in net.features(x)]
    at_features = [
        torch.autograd.grad(loss, leaves, allow_unused=True)
        for loss in (net.task(leaves), net.distill(leaves, target))
    ]
    features = net.features(x)
    reference = [net.task(features), net.distill(features, target)]
    expected = balance(rule, gram_matrix(at_features), torch.stack(reference).detach())
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


def test_weight_zero_keeps_a_non_finite_gradient_out(setting):
    net, x, target = setting
    boundary = build_boundary("fixed", weights=[1.0, 0.0])
    features = net.features(x)
    task, shared = boundary.split(features, 2)
    boundary.backward([net.task(task), (shared[0] * float("inf")).sum()])
    assert boundary.last.fallback == "non_finite"  # and is reported, not hidden


def test_losses_that_miss_the_boundary_are_an_error(setting):
    net, x, target = setting
    boundary = build_boundary("min_norm")
    features = net.features(x)
    boundary.split(features, 2)
    with pytest.raises(RuntimeError, match="do not depend on the features"):
        boundary.backward([net.task(features), net.distill(features, target)])


def test_changing_a_copy_in_place_is_an_error(setting):
    net, x, _ = setting
    boundary = build_boundary("min_norm")
    task, _ = boundary.split(net.features(x), 2)
    with pytest.raises(RuntimeError, match="in-?place"):
        task[0].relu_()


WITHOUT_DETECTRON2 = """
import sys
for name in ("detectron2", "fvcore", "torchvision"):
    sys.modules[name] = None  # importing it fails
import mokd_det.balancing, mokd_det.subspace
loaded = {name.split(".")[0] for name in sys.modules if sys.modules[name] is not None}
assert "torch" in loaded and not loaded & {"PIL", "cv2", "yacs", "pycocotools"}, loaded
"""


def test_balancing_and_subspace_need_torch_only():
    subprocess.run([sys.executable, "-c", WITHOUT_DETECTRON2], check=True)


def test_weight_zero_still_gives_every_parameter_a_gradient(setting):
    """Min-norm may leave the task nothing; the map that is not distilled then gets zeros."""
    net, x, target = setting
    boundary = build_boundary("fixed", weights=[0.0, 1.0])
    _, gradients = run(net, x, target, boundary)
    assert torch.equal(gradients["down.weight"], torch.zeros_like(net.down.weight))
    assert gradients["stem.weight"].any()


def test_nested_places_count_with_the_gradient_that_reaches_them_directly(setting):
    """Several layers of a classifier: the task's features are the last layer's only."""
    net, x, target = setting
    boundary = build_boundary("anchored", cap=0.5)
    first, second = net.features(x)
    (_, task), (shared, other) = boundary.split([first, second], 2, ["stem", "down"])
    losses = [task.square().mean(), net.distill([shared], target) + other.abs().mean()]
    boundary.backward(losses)
    leaves = [f.detach().requires_grad_() for f in (first, second)]
    own = [
        [torch.zeros_like(leaves[0]), *torch.autograd.grad(leaves[1].square().mean(), leaves[1])],
        torch.autograd.grad(net.distill([leaves[0]], target) + leaves[1].abs().mean(), leaves),
    ]
    assert torch.allclose(boundary.last.gram.float(), gram_matrix(own), rtol=1e-5)
    assert boundary.last.parts.shape == (2, 2, 2) and boundary.names == ["stem", "down"]
    weights = boundary.last.weights.tolist()
    first, second = net.features(x)
    total = weights[0] * second.square().mean()
    total = total + weights[1] * (net.distill([first], target) + second.abs().mean())
    wanted = torch.autograd.grad(total, net.stem.weight)[0]
    assert torch.allclose(net.stem.weight.grad, wanted, rtol=1e-4, atol=1e-7)
