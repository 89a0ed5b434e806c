# Copyright (c) The mokd_det authors.
"""The balanced training step."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..balancing import Decision
from ..data import ResumableLoader
from ..modeling import RestoredState, module_numbers, shortened, uncompiled_focal_loss
from .average import WeightAverage
from .diagnostics import BalanceDiagnostics
from .finite import REMEDY, SkippedSteps, describe, gradient_norm
from .finite import non_finite_gradients, origin_of
from .identity import NEW_RUN
from .replay import Replay

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LEAST_SCALE = 2.0**-32  # of losses in float16; a scaler begins with 2**16


class BalancedTrainer(SimpleTrainer):
    """
    Detectron2's training step for a model that returns its objectives apart and has a
    ``boundary``, at which their gradients are weighed. Otherwise as :class:`SimpleTrainer`, with
    mixed precision, gradient accumulation and a running mean of the weights as options.

    The random state of a step is a function of seed, rank and iteration. So neither evaluation
    nor a stop between two steps changes what follows: a resumed run is the uninterrupted one.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: ResumableLoader,
        optimizer: torch.optim.Optimizer,
        seed: int,
        micro_batches: int = 1,
        precision: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        average: WeightAverage | None = None,
        skipped: SkippedSteps | None = None,
    ):
        """
        Args:
            model: a :class:`DistillationModel` or :class:`SupervisedModel`, maybe in
                DistributedDataParallel.
            seed: of loader and steps, equal on all ranks.
            micro_batches: M; a batch of the loader (a list) is processed in M equal parts.
            precision: a key of ``PRECISIONS`` for autocast; None: float32.
            grad_scaler: default one for "float16".
            skipped: what becomes of a step whose gradients are not finite; None: an error.
        """
        super().__init__(model, data_loader, optimizer)
        # A DistillationModel, a SupervisedModel, or one's own in META_ARCH_REGISTRY.
        self.inner: Any = getattr(model, "module", model)
        self.boundary = self.inner.boundary
        self.seed = seed
        self.micro_batches = micro_batches
        self.average = average
        self.skipped = SkippedSteps() if skipped is None else skipped
        device = self.inner.device.type
        self.autocast = functools.partial(
            torch.autocast, device, PRECISIONS.get(precision or ""), enabled=precision is not None
        )
        if grad_scaler is None and precision == "float16":
            grad_scaler = torch.amp.GradScaler(device)
        self.grad_scaler = grad_scaler
        self.diagnostics = BalanceDiagnostics(self.boundary.measured_at)
        self._built_numbers = module_numbers(self.inner.student)

    def run_step(self) -> None:
        assert self.model.training, "[BalancedTrainer] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        torch.manual_seed(hash((self.seed, comm.get_rank(), self.iter)) % 2**63)
        balancer = self.boundary.balancer
        replay = Replay(self.inner) if balancer and balancer.needs_second_forward else None
        undo = self._remembered()
        passes = self._gradients(data, replay)
        decision = self.boundary.finish(self.model.parameters())

        # Before anything is updated; all ranks have the same gradients. Scaled ones may overflow.
        norm = gradient_norm(self.optimizer) if self.grad_scaler is None else torch.zeros(())
        losses, norm = _on_cpu(_mean_losses(passes), norm)
        names = [] if norm.isfinite() else non_finite_gradients(self.inner)
        if names:
            self.skipped.add(self._describe(names, losses, decision))
            undo()
        else:
            # Raises if the plain sum of the losses is not finite.
            self._write_metrics(losses, data_time)
            if decision is not None:
                self._write_balance(list(passes[0]), decision)
            if self._optimizer_step():
                self._after_optimizer(replay, decision)
            else:
                undo()
        if comm.is_main_process() and (self.skipped.skips or self.grad_scaler):
            get_event_storage().put_scalar("skipped_steps", self.skipped.total, False)

    def _gradients(self, data: Any, replay: Replay | None) -> list[dict[str, dict[str, Tensor]]]:
        """Run forward and backward passes; return the losses by objective of each micro-batch."""
        self.optimizer.zero_grad()
        self.boundary.start(self.micro_batches, self._loss_scale())
        passes = []
        for batch, synchronised in self._micro_batches_of(data):
            with synchronised:
                if replay:
                    replay.before(batch)
                with self.forward_context():
                    objectives = self.model(batch)
                    losses = {name: sum(parts.values()) for name, parts in objectives.items()}
                if replay:
                    replay.after()
                self.boundary.accumulate(losses)
            passes.append(objectives)
        return passes

    def _after_optimizer(self, replay: Replay | None, decision: Decision | None) -> None:
        self.skipped.taken()
        if replay and decision is not None:
            after = _mean_over_ranks(replay.losses(self.forward_context))
            self.boundary.balancer.rule.update(decision.losses, after.to("cpu", torch.float64))
        if self.average is not None:
            self.average.update(self.inner.student)

    def _remembered(self) -> Callable[[], Any]:
        """Return what takes this step back, if it turns out that its gradients are not finite."""
        balancer = self.boundary.balancer
        undo: list[Callable[[], None]] = []
        if balancer and (self.skipped.skips or self.grad_scaler):
            undo.append(functools.partial(balancer.load_state_dict, balancer.state_dict()))
        # Batch statistics of a step that only the loss scale has made overflow are as good as any.
        if self.skipped.skips and not self.grad_scaler:
            state = RestoredState(self.inner)
            state.remember()
            undo.append(state.restore)
        return lambda: [function() for function in undo]

    def _describe(
        self, names: list[str], losses: dict[str, Tensor], decision: Decision | None
    ) -> str:
        values = {name: loss.item() for name, loss in losses.items()}
        levels = self.boundary.names if self.boundary.measured_at == "features" else []
        return describe(names, values, self.iter, origin_of(decision, self.inner.names, levels))

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Mixed precision, and a focal loss whose bits do not depend on the calls before."""
        with self.autocast(), uncompiled_focal_loss():
            yield

    def _micro_batches_of(self, data: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (part of the batch, context in which its gradients are averaged over ranks)."""
        size, rest = divmod(len(data), self.micro_batches)
        if rest:
            raise ValueError(
                f"SOLVER.MICRO_BATCHES is {self.micro_batches}, which a batch of {len(data)} "
                "images cannot be divided by."
            )
        for i in range(self.micro_batches):
            wait = i < self.micro_batches - 1 or self.boundary.reduces_gradients
            waits = wait and isinstance(self.model, DistributedDataParallel)
            context = self.model.no_sync() if waits else contextlib.nullcontext()
            yield data[i * size : (i + 1) * size], context

    def _loss_scale(self) -> Tensor | None:
        if self.grad_scaler is None:
            return None
        return self.grad_scaler.scale(torch.ones((), device=self.inner.device))

    def _optimizer_step(self) -> bool:
        """Return False if the loss scaling skipped the step because a gradient overflowed."""
        if self.grad_scaler is None:
            self.optimizer.step()
            return True
        self.grad_scaler.step(self.optimizer)
        before = self.grad_scaler.get_scale()
        self.grad_scaler.update()
        scale = self.grad_scaler.get_scale()
        if scale < LEAST_SCALE:
            raise FloatingPointError(
                f"The gradient is not finite in iteration {self.iter}, at a loss scale of {scale}: "
                f"it does so at any. {REMEDY} Or use SOLVER.AMP.PRECISION 'bfloat16'."
            )
        self.skipped.total += scale < before
        return scale >= before

    def _write_balance(self, names: Sequence[str], decision: Decision) -> None:
        """Diagnostics go to the event storage: Detectron2 adds up all that is in the losses."""
        scalars = self.diagnostics.scalars(names, decision, self.boundary.names)
        if comm.is_main_process():
            get_event_storage().put_scalars(**scalars)

    @property
    def _parts(self) -> dict[str, Any]:
        """What a step may have besides, with a state of its own."""
        parts = {
            "balancer": self.boundary.balancer,
            "grad_scaler": self.grad_scaler,
            "average": self.average,
            "skipped": self.skipped,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "seed": self.seed,
            "diagnostics": self.diagnostics.state_dict(),
            "numbers": self._changed_numbers(),
            "objectives": list(self.inner.names),
            "trained_by_objectives": _shapes(self.inner),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }

    def _changed_numbers(self) -> dict[str, dict[str, float]]:
        """What training has changed; the rest is the config's, which a resumed run may change."""
        changed = {}
        for name, numbers in module_numbers(self.inner.student).items():
            built = self._built_numbers[name]
            if new := {k: v for k, v in numbers.items() if built.get(k) != v}:
                changed[name] = new
        return changed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a checkpoint of another kind of step, or of other objectives."""
        self._check_state(state)
        super().load_state_dict(state)
        self.seed = self.data_loader.seed = state["seed"]
        self.diagnostics.load_state_dict(state["diagnostics"])
        modules: dict[str, nn.Module] = dict(self.inner.student.named_modules())
        for name, numbers in state["numbers"].items():
            vars(modules[name]).update(numbers)
        for name, part in self._parts.items():
            if name in state:
                part.load_state_dict(state[name])

    def _check_state(self, state: dict[str, Any]) -> None:
        if "seed" not in state:
            raise ValueError(
                "The checkpoint is of Detectron2's own training step (MOKD.ENABLED False, without "
                "DATALOADER.RESUMABLE, MICRO_BATCHES and EMA_DECAY), which this run cannot go on "
                f"with. {NEW_RUN}"
            )
        if "objectives" not in state:
            raise ValueError(f"The checkpoint is of a run of mokd_det 0.1. {NEW_RUN}")
        has_teacher = self.boundary.balancer is not None
        if has_teacher != ("balancer" in state):
            raise ValueError(
                f"The checkpoint is of a run {'without' if has_teacher else 'with'} a teacher, and "
                f"MOKD.ENABLED is {has_teacher} now. {NEW_RUN}"
            )
        before, now = state["objectives"], list(self.inner.names)
        if before != now:
            raise ValueError(
                f"The checkpoint is of the objectives {', '.join(before)}, and MOKD.OBJECTIVES has "
                f"{', '.join(now[1:])} besides the task now. {NEW_RUN}"
            )
        shapes, given = _shapes(self.inner), state.get("trained_by_objectives")
        if given is not None and given != shapes:
            changed = sorted(
                n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n)
            )
            raise ValueError(
                f"The checkpoint has other projectors ({shortened(changed)}): resume with the same "
                "PROJECTOR, levels and widths (MOKD.FEATURES, MOKD.TEACHER_HEAD). " + NEW_RUN
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what objectives train for themselves, by name."""
    named = getattr(model, "objectives", nn.ModuleDict()).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def _mean_losses(passes):
    """Dict of all losses by name, each the mean over the micro-batches."""
    flat = [
        {name: loss for parts in objectives.values() for name, loss in parts.items()}
        for objectives in passes
    ]
    if len(flat) == 1:
        return flat[0]
    return {name: sum(losses[name].detach() for losses in flat) / len(flat) for name in flat[0]}


def _on_cpu(losses: dict[str, Tensor], norm: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Both on the CPU, in one copy: each makes it wait for a GPU."""
    given = [*losses.values(), norm]
    *values, norm = torch.stack([x.detach().float().to(given[0].device) for x in given]).cpu()
    return dict(zip(losses, values)), norm


def _mean_over_ranks(values: Tensor) -> Tensor:
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
        values = values / comm.get_world_size()
    return values
