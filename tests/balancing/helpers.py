# Copyright (c) The mokd_det authors.
"""Random gradients, weights in one call, and small networks whose gradients can be made by hand."""

import importlib.util

import torch
from torch import nn
from torch.func import functional_call

from mokd_det.balancing import Balancer, Parameters, Rule, build_rule
from mokd_det.balancing.rules import TORCHJD_PREFIX

RULE_NAMES = ["cosine_gate", "famo", "fixed", "loss_ratio", "min_norm"]
if importlib.util.find_spec("torchjd"):  # an optional extra
    RULE_NAMES.append(f"{TORCHJD_PREFIX}UPGrad")
# A vanishing gradient is nothing special for them.
BLIND = ["cosine_gate", "famo", "fixed"]
SEEING = [name for name in RULE_NAMES if name not in BLIND]
MEASURED_AT = ["features", "parameters"]
# With these, `loss_ratio` gives both objectives of Net positive weights from its first step on.
UNSMOOTHED = {"smoothing": 0, "schedule": (1.0, 1.0), "interval": 1}


class EqualLengths(Rule):
    """Every gradient as long as the task's: positive weights that differ from batch to batch."""

    name = "equal_lengths"

    def weights(self, gram, losses):
        norms = gram.diagonal().sqrt()
        return norms[0] / norms


def random_gradients(seed, count=2, size=6):
    """(K, size) gradients whose norms spread over four decades, and positive losses (K,)."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, size, generator=generator, dtype=torch.float64)
    gradients *= 10 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 2)
    losses = 0.1 + torch.rand(count, generator=generator, dtype=torch.float64)
    return gradients, losses


def agreeing_gradients(seed, count=3):
    """As ``random_gradients``, with cosines of 0.5 and more with the task's."""
    gradients, losses = random_gradients(seed, count, size=40)
    units = gradients / gradients.norm(dim=1, keepdim=True)
    sizes = gradients.norm(dim=1, keepdim=True).clamp(0.3, 3)
    agreeing = units + units[0]
    return agreeing / agreeing.norm(dim=1, keepdim=True) * sizes, losses


def decide(rule, gram, losses, rescale="none"):
    """What the rule says of one batch: no running means, no schedule."""
    return Balancer(rule, rescale, smoothing=0, schedule=(1.0, 1.0)).weigh(gram[None], losses)


def weights_of(name, gradients, losses, rescale="none", **options):
    return decide(build_rule(name, **options), gradients @ gradients.T, losses, rescale).weights


def weigh(balancer, gradients, losses, agree=None):
    return balancer.weigh((gradients @ gradients.T)[None], losses, agree)


def with_weights(name, weights):
    """Options of the rule: these weights, if it takes any."""
    return {"weights": weights} if name in ("fixed", "cosine_gate") else {}


class Net(nn.Module):
    """Two shared feature maps, three heads on them, and a projector."""

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
        return {"stem": first, "down": self.down(first)}

    def task(self, features):
        return (
            self.head_a(features["stem"]).square().mean()
            + self.head_b(features["down"]).abs().mean()
            + self.head_c(features["stem"]).exp().mean()
        )

    def distill(self, features, target):
        # The second map is not distilled: its gradient from this objective is absent.
        return (self.projector(features["stem"]) - target).square().mean()


class Shared(nn.Module):
    """The shared part of ``Net`` as a module of its own, as a detector's backbone is."""

    def __init__(self, net):
        super().__init__()
        self.stem, self.down = net.stem, net.down


def net_and_data(size=4):
    torch.manual_seed(0)
    return Net(), torch.randn(size, 3, 8, 8), torch.randn(size, 6, 8, 8)


def features_of(boundary, features, objectives=("task", "distill")):
    """Each objective's copies of the features; none uses further parameters."""
    branches = boundary.split(features, {name: Parameters() for name in objectives})
    return [branch.features for branch in branches.values()]


def losses_of(net, boundary, x, target):
    task, distill = features_of(boundary, net.features(x))
    return {"task": net.task(task), "distill": net.distill(distill, target)}


def step(boundary, net, x, target, count=1, scale=None):
    """One step over ``count`` micro-batches, from gradients of None."""
    net.zero_grad()
    boundary.start(count, scale)
    for part, part_target in zip(x.chunk(count), target.chunk(count)):
        boundary.accumulate(losses_of(net, boundary, part, part_target))
    return boundary.finish(net.parameters())


class NetWithUses(nn.Module):
    """
    Three objectives: the task; projected features; and another loss of the task's head, whose
    outputs are adapted first, so that one objective has parameters for itself and borrows others.
    """

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 3))
        self.head = nn.Sequential(nn.Conv2d(5, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1))
        self.projector = nn.Conv2d(5, 3, 1)
        self.adapter = nn.Conv2d(2, 2, 1)
        self.boundary = None

    def uses(self):
        projector, adapter, head = (
            list(module.parameters()) for module in (self.projector, self.adapter, self.head)
        )
        return {
            "task": Parameters(),
            "features": Parameters(own=projector),
            "outputs": Parameters(own=adapter, borrowed=head),
        }

    def forward(self, x):
        maps = {"map": self.backbone(x)}
        if self.boundary is None:
            task = features = outputs = maps["map"]
            of_features = of_outputs = {}
        else:
            branches = self.boundary.split(maps, self.uses())
            task, features, outputs = (branch.features["map"] for branch in branches.values())
            of_features = branches["features"].parameters
            of_outputs = branches["outputs"].parameters
        # In this order: autograd then adds their gradients as a plain sum does, the last one first.
        scores = called(self.adapter, of_outputs, called(self.head, of_outputs, outputs))
        projected = called(self.projector, of_features, features)
        return {
            "task": self.head(task).square().mean(),
            "features": (projected - 1).abs().mean(),
            "outputs": 1 - scores.cos().mean(),
        }


def called(module, copies, x):
    """The module's output with copies in place of its parameters, where there are any."""
    return functional_call(module, {n: copies.get(p, p) for n, p in module.named_parameters()}, x)


def net_with_uses_and_data():
    torch.manual_seed(0)
    return NetWithUses(), torch.randn(4, 3, 8, 8)


def gradients_of(net):
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
