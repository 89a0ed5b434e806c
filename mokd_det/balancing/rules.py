# Copyright (c) The mokd_det authors.
"""
Rules: from the Gram matrix of the objectives' gradients and the objectives' values to weights.

Every rule obeys one contract, ``weights(gram, losses) -> weights``: pure functions of a (K, K)
float64 CPU tensor and a (K,) one, where index 0 is the task. The update of the shared part is
``sum_i weights[i] * gradient_i``. :func:`balance` handles what is degenerate for every rule, so a
rule sees finite, non-vanishing gradients and positive finite losses. Rules with a state (``famo``,
``look_ahead``) live in modules of their own and say how it changes.

What else a rule may have, if it wants it:

* ``smoothing``, ``schedule``: the defaults of MOKD.BALANCING.SMOOTHING and SCHEDULE for it;
* ``smooths_losses = True``: where there is smoothing, its ``losses`` are :class:`RunningLosses`;
* ``own_weights(gram) -> (K,)``: factors of the objectives' gradients for parameters that one
  objective has for itself (projectors), of the matrix that ``weights`` saw (with GRAM "signal" the
  batch's); neither rescaled nor scheduled. Without it they are the weights;
* ``check_objectives(count)``: raises ValueError for a number of objectives that it has no answer
  for, before training;
* ``reads_gradients = False``: vanishing gradients are no special case for it;
* ``needs_positive_losses = True``: it weighs losses by their values; one below zero is an error;
* ``needs_gradients = True`` and ``observe(gradients)``: called before ``weights`` with the
  gradients themselves (K lists of tensors; place "parameters" only);
* ``needs_second_forward = True`` and ``update(before, after)``: called after the model's step with
  the (K,) losses of the batch before and after it;
* ``state_dict()``, ``load_state_dict(state)``: what is resumed, and undone if mixed precision skips
  the step.

Sources: MoKD (arXiv 2505.08170, withdrawn by its authors), DTO-KD (ICLR 2026), MGDA (Sener &
Koltun 2018), CAGrad (Liu et al. 2021), IMTL (Liu et al., ICLR 2021), gradient cosine (Du et al.
2018, arXiv 1812.02224), uncertainty weighting (Kendall et al., CVPR 2018, arXiv 1705.07115).
"""

import dataclasses
import inspect

import torch

from ..registry import Registry
from .gram import vanishing
from .min_norm import min_norm_simplex, min_norm_two
from .running import LOSS_FLOOR

__all__ = ["BALANCERS", "RESCALES", "Balance", "balance", "build_rule"]

BALANCERS = Registry("BALANCERS", "MOKD.BALANCING.RULE")
"""Classes of rules, built as ``cls(**options)`` with the options of MOKD.BALANCING they take."""

TORCHJD_PREFIX = "torchjd."


@BALANCERS.register("fixed")
class FixedWeights:
    """The same weights at every step: what every other toolkit does."""

    # Nothing is degenerate for weights that do not depend on gradients.
    reads_gradients = False

    def __init__(self, weights=(1.0, 1.0)):
        """
        Args:
            weights (sequence[float]): of the task and of each distillation objective, >= 0.
        """
        if any(not (w >= 0 and w < float("inf")) for w in weights) or not any(weights):
            raise ValueError(
                f"MOKD.BALANCING.WEIGHTS is {list(weights)}: expected finite weights >= 0, "
                "not all zero."
            )
        self.fixed = torch.tensor(weights, dtype=torch.float64)

    def check_objectives(self, count):
        """Raise ValueError unless there is a weight for each of ``count`` objectives."""
        if count != len(self.fixed):
            raise ValueError(
                f"MOKD.BALANCING.WEIGHTS has {len(self.fixed)} entries for {count} objectives: "
                "give one for each that is enabled, in the order task, features, outputs."
            )

    def weights(self, gram, losses):
        self.check_objectives(len(gram))
        return self.fixed.clone()


@BALANCERS.register("min_norm")
class MinNorm:
    """
    Min-norm on the gradients of the log-losses, as published (DTO-KD, Theorem 3.1, Eq. 10-15).

    With ``h_i = g_i / L_i``, ``pi`` minimises ``|sum_i pi_i h_i|`` over the simplex, and the
    update is ``sum_i pi_i h_i``, so ``weights_i = pi_i / L_i``. No objective gets worse to first
    order. The rule follows the *smaller* gradient, so a small distillation gradient can take
    nearly all the weight and starve the task.
    """

    needs_positive_losses = True

    def __init__(self, clip=True, log_losses=True):
        """
        Args:
            clip (bool): False for the literal formula without the bounds of the simplex (K = 2).
            log_losses (bool): False for the gradients of the losses themselves, which is MGDA:
                the scale of a loss then matters.
        """
        self.clip = clip
        self.log_losses = self.needs_positive_losses = log_losses

    def check_objectives(self, count):
        """Raise ValueError if the formula is not defined for ``count`` objectives."""
        if not self.clip and count != 2:
            raise ValueError(f"MOKD.BALANCING.CLIP False is defined for 2 objectives, not {count}.")

    def weights(self, gram, losses):
        self.check_objectives(len(gram))
        if not self.log_losses:
            losses = torch.ones_like(losses)
        logs = log_gram(gram, losses)
        if self.clip:
            return min_norm_simplex(logs) / losses
        return min_norm_two(logs, clip=False) / losses


@BALANCERS.register("protected_min_norm")
class ProtectedMinNorm:
    """
    Min-norm on log-losses that cannot starve the task (ours).

    The point of minimal norm is taken on the part of the simplex where the task's share is at
    least one half. The task then has weight 1, so that the recipe's learning rate keeps its
    meaning, and the distillation has the same ratio to it, at most ``cap * |g_task|`` in norm:
    with ``cap < 1`` the task descends to first order in every step.
    """

    needs_positive_losses = True

    def __init__(self, cap=1.0):
        """
        Args:
            cap (float): largest norm of the weighted distillation gradient, in units of the
                task gradient's norm; > 0.
        """
        self.cap = _positive("MOKD.BALANCING.CAP", cap)

    def weights(self, gram, losses):
        logs = log_gram(gram, losses)
        shares = min_norm_simplex(logs)
        if shares[0] < 0.5:
            # The minimum then has a share of exactly one half: among the midpoints between the
            # task's gradient and each other one.
            mix = torch.cat([torch.ones(len(gram) - 1, 1), torch.eye(len(gram) - 1)], 1).to(logs)
            mix = mix / 2
            rest = min_norm_simplex(mix @ logs @ mix.T) if len(gram) > 2 else mix.new_ones(1)
            shares = rest @ mix
        weights = shares / losses
        return _capped(weights / weights[0], gram, self.cap)


@BALANCERS.register("anchored")
class Anchored:
    """
    The update that improves the worse of all normalised objectives most, inside a ball of radius
    ``cap * |g_task|`` around the task gradient (ours; CAGrad's problem with the task gradient as
    centre and unit gradients).

    For two objectives and ``cap <= 1`` its solution is simple: starting from ``g_task`` the
    distillation is the worse off, and stays so up to the border of the ball, so the update is
    ``g_task + cap |g_task| g_distill / |g_distill|``: the distillation gradient at a fixed share
    of the task gradient's norm. With several distillation gradients their mean direction is used.
    The task descends to first order for ``cap < 1``, and the scale of the losses is irrelevant.
    """

    def __init__(self, cap=1.0):
        """
        Args:
            cap (float): radius of the ball in units of the task gradient's norm, in (0, 1].
        """
        self.cap = _positive("MOKD.BALANCING.CAP", cap)
        if self.cap > 1:
            raise ValueError(f"MOKD.BALANCING.CAP is {cap}: rule 'anchored' expects 0 < cap <= 1.")

    def weights(self, gram, losses):
        unit = gram.diagonal()[0].sqrt() / gram.diagonal().sqrt()
        weights = torch.cat([unit.new_ones(1), unit[1:]])
        return _scaled_to(weights, gram, self.cap)


@BALANCERS.register("constant_dominance")
class ConstantDominance:
    """
    The task's gradient and a distillation whose dominance is set, not left to the batch (ours).

    With unit gradients ``u_i``, ``cos_k = <u_k, u_task>`` and the trust ``t_k = 2 cos_k / agreement
    - 1``, clipped to [0, 1], the distillation's direction is that of ``sum_k t_k u_k``: equal
    shares for gradients that agree with the task, none for those that conflict or whose cosine is
    less than half of ``agreement``, since gradients that have nothing to do with the task agree
    with it, too, a little and by chance. With the unit vector ``d`` of that direction, the update
    is

        ``g_task + dominance max_k(t_k) |g_task| d``

    Since ``<d, g_task> >= 0``, it improves the task to first order at least as much as the task's
    gradient alone, however dominant the teacher is. Min-norm rules prefer the gradient that
    agrees *least*, since that makes the norm small. The scale of the losses is irrelevant.

    All this is said of running means of the norms' ratios and of the cosines
    (:class:`RunningGram`), not of each batch: in a batch that the student happens to have right
    already the task's gradient is short, and the teacher's is as good as in any other.

    A parameter that an objective has for itself learns at the task's pace, trusted or not: its
    gradient is multiplied by ``|g_task| / |g_k|``, of the running means, and not by the weight. A
    projector that learned with the weight would stay random where that is zero, and randomly
    projected features agree with nothing, so the weight would stay zero. (While an objective's
    gradient vanishes at the features, its own parameters rest, too.)

    Its ``schedule`` lets the dominance rise in a straight line from a fifth of ``dominance`` to
    nine fifths: a step as long as ``1 + dominance`` task gradients can be too long for a learning
    rate that was tuned for the task's gradient alone, until that has fallen.
    """

    smoothing = 0.98
    schedule = (0.2, 1.8)

    def __init__(self, dominance=3.0, agreement=0.1):
        """
        Args:
            dominance (float): norm of the distillation's part in units of the task gradient's,
                on average over the training; > 0.
            agreement (float): cosine from which on a gradient is trusted in full, and of whose half
                not at all; in (0, 1].
        """
        self.dominance = _positive("MOKD.BALANCING.DOMINANCE", dominance)
        self.agreement = _agreement(agreement)

    def weights(self, gram, losses):
        trust = _trust(gram, self.agreement)
        return _scaled_to(_of_units(trust, gram), gram, self.dominance * trust.max())

    def own_weights(self, gram):
        return _task_pace(gram)


@BALANCERS.register("loss_ratio")
class LossRatio:
    """
    The task's loss, and each distillation loss that is trusted, at a set multiple of it (ours,
    after uncertainty weighting, Kendall et al., CVPR 2018, arXiv 1705.07115).

    ``weight_k = ratio t_k L_task / L_k``, with the trust ``t_k`` of ``constant_dominance``, so that
    the update is ``L_task (grad log L_task + ratio sum_k t_k grad log L_k)``. Uncertainty weighting
    is the sum of these logarithms: a loss is an error in units of a noise of its own, the likeliest
    noise is the loss, and what stays noisy counts less. The task's loss stays high where its labels
    are few, wrong or ambiguous, while the student comes close to its teacher, who then gets more of
    the update than the gradients' lengths would give. The scale of the losses is irrelevant.

    All this is said of running means (:class:`RunningGram`, :class:`RunningLosses`). Losses are to
    be positive. Parameters that an objective has for itself learn at the task's pace, and the
    schedule rises, both as with ``constant_dominance``.
    """

    smoothing = 0.98
    schedule = (0.2, 1.8)
    smooths_losses = True
    needs_positive_losses = True

    def __init__(self, ratio=4.0, cap=10.0, agreement=0.1):
        """
        Args:
            ratio (float): each weighted distillation loss in units of the task's loss, in the
                middle of the schedule; > 0.
            cap (float): largest norm of the weighted distillation gradients in units of the task
                gradient's, both as the rule sees them, before the schedule; > 0. The weight of a
                loss of next to nothing has no other bound.
            agreement (float): cosine from which on a gradient is trusted in full, and of whose half
                not at all; in (0, 1].
        """
        self.ratio = _positive("MOKD.BALANCING.LOSS_RATIO.RATIO", ratio)
        self.cap = _positive("MOKD.BALANCING.LOSS_RATIO.CAP", cap)
        self.agreement = _agreement(agreement)

    def weights(self, gram, losses):
        distillation = self.ratio * _trust(gram, self.agreement) * losses[0] / losses[1:]
        return _capped(torch.cat([losses.new_ones(1), distillation]), gram, self.cap)

    def own_weights(self, gram):
        return _task_pace(gram)


@BALANCERS.register("aligned")
class Aligned:
    """
    The task's gradient, turned towards what the distillation knows beyond it (ours).

    Of the distillation's direction ``d``, that of ``sum_k cos_k u_k`` with unit gradients ``u_k``
    and ``cos_k = max(<u_k, u_task>, 0)``, the part orthogonal to the task's gradient is added, and
    the sum gets the length of the task's gradient:

        ``update = |g_task| (u_task + a) / |u_task + a|``, ``a = cap (d - <d, u_task> u_task)``

    A longer update is a higher learning rate; with this length the recipe's keeps its meaning. The
    better both agree, the smaller is the turn, and the larger the teacher's share of the update;
    the tangent of its angle is ``|a| <= cap``, so ``<update, g_task>`` is at least
    ``|g_task|^2 / sqrt(1 + cap^2)`` whatever the teacher says. ``cap`` is less in proportion if
    even the best gradient agrees less than ``agreement``. The scale of the losses is irrelevant.
    """

    def __init__(self, cap=1.0, agreement=0.1):
        """
        Args:
            cap (float): length of the distillation's direction in units of the task gradient's,
                in (0, 1].
            agreement (float): cosine from which on ``cap`` is used in full; in (0, 1].
        """
        self.cap = _positive("MOKD.BALANCING.CAP", cap)
        if self.cap > 1:
            raise ValueError(f"MOKD.BALANCING.CAP is {cap}: rule 'aligned' expects 0 < cap <= 1.")
        self.agreement = _agreement(agreement)

    def weights(self, gram, losses):
        cosines = _agreement_of(gram)
        full = (cosines.max() / self.agreement).clamp_max(1)
        weights = _scaled_to(_of_units(cosines, gram), gram, self.cap * full)
        # Without what the distillation adds along the task's gradient.
        weights[0] -= (weights[1:] @ gram[1:, 0] / gram[0, 0]).clamp_max(1)
        return _rescale_task_norm(weights, gram)


@BALANCERS.register("cosine_gate")
class CosineGate(FixedWeights):
    """
    Fixed weights, but a distillation objective whose gradient conflicts with the task's (negative
    cosine) gets none in that step (Du et al. 2018).
    """

    def weights(self, gram, losses):
        weights = super().weights(gram, losses)
        weights[1:] *= (gram[0, 1:] >= 0).to(weights)
        return weights


@BALANCERS.register("imtl_g")
class ImtlG:
    """
    The update has the same projection onto every objective's gradient direction (IMTL-G, Liu et
    al., ICLR 2021, Eq. 6). Its weights sum to one and may be negative: an objective then gets
    worse, which the equal projections demand. For two gradients they are those that make both
    equally long.
    """

    def weights(self, gram, losses):
        norms = gram.diagonal().sqrt()
        # <update, g_i> = c |g_i| for all i, in units in which the gradients have length one.
        cosines = gram / torch.outer(norms, norms)
        weights = torch.linalg.pinv(cosines, hermitian=True, rtol=1e-10).sum(1) / norms
        return _rescale_convex(weights, gram)


def log_gram(gram, losses):
    """Return the Gram matrix of ``grad log L_i = g_i / L_i`` from that of ``g_i``."""
    return gram / torch.outer(losses, losses)


def _positive(option, value):
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} is {value}: expected a finite number > 0.")
    return float(value)


def _agreement(agreement):
    if not 0 < agreement <= 1:
        raise ValueError(f"MOKD.BALANCING.AGREEMENT is {agreement}: expected 0 < agreement <= 1.")
    return agreement


def _agreement_of(gram):
    """Cosines of the distillation gradients with the task's, (K - 1,); 0 for conflict."""
    norms = gram.diagonal().sqrt()
    return (gram[0, 1:] / norms[1:] / norms[0]).clamp(0, 1)


def _trust(gram, agreement):
    """(K - 1,): 1 for distillation gradients with a cosine of ``agreement``, 0 at half of it."""
    return (2 * _agreement_of(gram) / agreement - 1).clamp(0, 1)


def _task_pace(gram):
    """(K,) factors that make every gradient as long as the task's."""
    norms = gram.diagonal().sqrt()
    return norms[0] / norms


def _of_units(parts, gram):
    """Weights of the sum ``g_task + |g_task| sum_k parts_k u_k``, with unit gradients ``u_k``."""
    norms = gram.diagonal().sqrt()
    return torch.cat([gram.new_ones(1), parts * norms[0] / norms[1:]])


def _distillation_norm(weights, gram):
    """Norm of the weighted sum of all gradients but the task's, in units of the task's norm."""
    rest = weights[1:]
    return torch.sqrt((rest @ gram[1:, 1:] @ rest).clamp_min(0) / gram[0, 0])


def _capped(weights, gram, cap):
    norm = _distillation_norm(weights, gram)
    return _scaled_to(weights, gram, cap) if norm > cap else weights


def _scaled_to(weights, gram, size):
    norm = _distillation_norm(weights, gram)
    scale = size / norm if norm > 0 else torch.zeros_like(norm)
    return torch.cat([weights[:1], weights[1:] * scale])


def _rescale_convex(weights, gram):
    # Rules with negative weights may have a sum below zero, and dividing by it would turn the
    # update round: NaN is "undefined".
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, torch.nan)


def _rescale_sum(weights, gram):
    return len(weights) * _rescale_convex(weights, gram)


def _rescale_task_norm(weights, gram):
    return weights * torch.sqrt(gram[0, 0] / (weights @ gram @ weights))


def _rescale_task_progress(weights, gram):
    # An update against the task's gradient would be turned round: NaN is "undefined".
    progress = (gram[0] @ weights) / gram[0, 0]
    return weights / progress if progress > 0 else torch.full_like(weights, torch.nan)


RESCALES = {
    "none": lambda weights, gram: weights,
    "convex": _rescale_convex,
    "sum": _rescale_sum,
    "task_norm": _rescale_task_norm,
    "task_progress": _rescale_task_progress,
}


@dataclasses.dataclass(frozen=True)
class Balance:
    """
    What one balancing step decided.

    Attributes:
        weights (Tensor): (K,) float64 on the CPU, the task first.
        gram (Tensor or None): (K, K) float64 on the CPU, of this batch's unweighted gradients;
            None where nothing was measured because the weights were reused.
        losses (Tensor): (K,) float64 on the CPU.
        fallback (str): "" or why the rule was not asked: "non_finite", "vanished", "undefined".
        seen (Tensor or None): the Gram matrix that the rule saw, where it is not ``gram``:
            smoothed, or the signal's.
        parts (Tensor or None): (P, K, K), ``gram`` before it was summed over levels.
        own (Tensor or None): (K,), factors for parameters that one objective has for itself; None
            if those are ``weights``.
    """

    weights: torch.Tensor
    gram: torch.Tensor | None
    losses: torch.Tensor
    fallback: str = ""
    seen: torch.Tensor | None = None
    parts: torch.Tensor | None = None
    own: torch.Tensor | None = None

    @property
    def own_weights(self):
        """(K,) ``own``, or ``weights`` if there is none."""
        return self.weights if self.own is None else self.own


def balance(rule, gram, losses, rescale="none"):
    """
    Ask a rule for its weights, unless the step is degenerate:

    * a non-finite gradient or loss: the plain sum; the trainer's check of the loss speaks;
    * a gradient that vanishes beside the others (the student matches its teacher already): the
      min-norm point is zero and training would stall, so the rule decides among the others; if
      only one is left, or the task has vanished, the others get weight one each;
    * a rule or a rescaling without a finite answer (an update of zero has no norm to rescale,
      and weights that sum to zero no scale): the plain sum.

    Args:
        rule: with ``weights(gram, losses)``.
        gram (Tensor): (K, K) Gram matrix of the gradients, the task first, on any device.
        losses (Tensor): (K,) values of the objectives.
        rescale (str): a key of ``RESCALES``.

    Returns:
        Balance: the weights and why.

    Raises:
        ValueError: a loss below zero, and a rule that needs positive ones.
    """
    # Small and double on the CPU: rules stay readable, and 1e-6 differences of norms survive.
    gram = gram.detach().to("cpu", torch.float64)
    losses = losses.detach().to("cpu", torch.float64)
    ones = torch.ones(len(gram), dtype=torch.float64)
    if not (gram.isfinite().all() and losses.isfinite().all()):
        return Balance(ones, gram, losses, "non_finite")
    # Not by less than rounding: a divergence of two equal distributions may end below zero.
    negative = losses < -1e-4 * losses.abs().max()
    if negative.any() and getattr(rule, "needs_positive_losses", False):
        raise ValueError(
            f"MOKD.BALANCING.RULE '{getattr(rule, 'name', type(rule).__name__)}' weighs losses by "
            f"their values, but those of the objectives are {losses.tolist()}: give the negative "
            "one a form that is zero at best (1 - cosine), or choose 'constant_dominance'."
        )
    vanished = vanishing(gram)
    fallback, kept = "", torch.arange(len(gram))
    if vanished.any() and getattr(rule, "reads_gradients", True):
        kept = (~vanished).nonzero().flatten()
        if vanished[0] or len(kept) < 2:
            weights = ones if vanished.all() else (~vanished).double()
            return Balance(weights, gram, losses, "vanished")
        fallback = "vanished"
    among = gram[kept][:, kept]
    decided = rule.weights(among, losses[kept].clamp_min(LOSS_FLOOR))
    decided = RESCALES[rescale](decided, among)
    own = rule.own_weights(among) if hasattr(rule, "own_weights") else None
    if not all(factors.isfinite().all() for factors in (decided, own) if factors is not None):
        return Balance(ones, gram, losses, "undefined")

    def among_all(factors):
        return torch.zeros_like(ones).index_copy(0, kept, factors)

    own = None if own is None else among_all(own)
    return Balance(among_all(decided), gram, losses, fallback, own=own)


def build_rule(name, **options):
    """
    Args:
        name (str): of a rule in ``BALANCERS``, or ``torchjd.X`` for TorchJD's ``XWeighting``.
        options: every option of MOKD.BALANCING by lower-case name; the rule takes what it knows.
            An option with the name of a rule holds a dict of further options for it alone.

    Returns:
        the rule.

    Raises:
        ValueError: unknown name, or a bad option.
        ImportError: TorchJD is not installed.
    """
    if name.startswith(TORCHJD_PREFIX):
        from .torchjd_rule import TorchjdRule  # its module needs TorchJD only when asked for

        return TorchjdRule(name[len(TORCHJD_PREFIX) :], **options.get("torchjd", {}))
    cls = BALANCERS.get(name)
    options = {**options, **{k.lower(): v for k, v in options.get(name, {}).items()}}
    parameters = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in options.items() if key in parameters})
