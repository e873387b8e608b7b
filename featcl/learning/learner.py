"""The online learner: one bounded update per trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.learning.acting import act_now
from featcl.learning.denoising import Denoising
from featcl.learning.guard import Guard, Stopped
from featcl.learning.ledger import Ledger
from featcl.learning.live import Live, acting_alone
from featcl.learning.methods import Methods
from featcl.learning.microbatch import SMALLEST, halving
from featcl.learning.optimizers import build_optimizer, load_moments_, moments
from featcl.learning.pending import Pending
from featcl.learning.randomness import derived_generator
from featcl.learning.remembering import Remembering, whole_ids
from featcl.learning.revert import Reverted, Reverts, subtract_
from featcl.learning.running import Usual
from featcl.learning.settings import Settings
from featcl.learning.stats import UpdateStats
from featcl.learning.talking import Talking
from featcl.learning.tasks import Tasks, Told, begun_
from featcl.learning.timings import Timings
from featcl.learning.update import check_finite, learn_, learn_from_pending_
from featcl.learning.versions import Snapshot, Versions, load_snapshot, load_versions, save_snapshot
from featcl.learning.weighing import Weigher, Weight, as_weigher
from featcl.methods.method import Method
from featcl.models import max_context
from featcl.objectives.build import Spec, build_terms
from featcl.objectives.experience import Experience, Student
from featcl.objectives.rewards import Reward
from featcl.objectives.scoring import Scorer, pack
from featcl.objectives.teachers import model_teacher
from featcl.streams.chat import Chat, Mask
from featcl.streams.environments import Environment
from featcl.streams.trajectory import Trajectory
from featcl.streams.windows import encode_trajectory

LONGEST = 4096  # tokens of a window where the model's context is longer
KEPT_VERSIONS = 8
KEPT_REWARDS = 100  # whose mean is the baseline of `policy`


class Learner(Talking, Tasks):
    """Learns from one trajectory at a time; only the adapter's coordinates change.

    Args:
        model: The base model, as given to `constrain`.
        tokenizer: Its tokenizer.
        adapter: What is trained, a `ConstrainedAdapter`.
        objective: A name, `{"name": …, "weight": …, …options}`, or a list of these.
        methods: Continual-learning methods, which act in this order; see `featcl.methods.method`.
        optimizer: `adamw`, `sgd`, `momentum` or `titans`.
        lr: Learning rate in coordinates.
        weight_decay: Decoupled; acts on the coordinates.
        steps: Gradient steps per trajectory; on-policy objectives sample anew for each.
        teacher: Another model with the same tokenizer, or (model, tokenizer), for `distillation`.
        weigher: Says how far an experience is trusted; or a function from a trajectory to its weight.
        max_kl_per_update: Trust region: limit of KL(before ‖ after) per token on what was learned from, in nats.
        max_windows: At most so many windows of a trajectory longer than the model's context.
        mask: What is learned from in a conversation: `assistant`, `environment` (user and tool) or `all` turns.
        micro_batch: Padded tokens that go through the model at once, or one sequence; halved when memory runs out.
        accumulate: Experiences whose mean gradient makes one step; `flush` takes the step of those that wait.
        denoising: Measures every few updates what the span does to the gradient.
        guard: Looks at what is forgotten, and acts.
        ledger: Keeps what was learned from what.
        memory: What `featcl.attach_memory` returned, with trained slow weights, which are frozen here. All that the
            learner does reads its state; each experience that was learned from is written to it once, by the updated
            model. The state is a part of every version (`revert` takes back weights only).
        canaries: Scored by whoever runs the learner; kept as an attribute.
        background: Texts for the objective `recover`; without any, the base model writes them.
        reward: Judges the replies that the objective `policy` samples: from an `Attempt` to a number.
        seed: With a trajectory's id, decides all that is random.

    Raises:
        FeatclError: For an unknown name, an option out of range, a teacher with another vocabulary, or methods that
            make no sense together or with this adapter.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapter: Any,
        *,
        objective: Spec = "sft",
        methods: Sequence[Method] = (),
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        steps: int = 1,
        teacher: Any = None,
        weigher: Weigher | Callable[[Trajectory], float] | None = None,
        max_kl_per_update: float | None = None,
        max_windows: int = 8,
        mask: Mask = "assistant",
        micro_batch: int = 8192,
        accumulate: int = 1,
        denoising: Denoising | None = None,
        guard: Guard | None = None,
        ledger: Ledger | None = None,
        memory: Any = None,
        canaries: Any = None,
        background: Sequence[str] = (),
        reward: Reward | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = Settings(
            objective, optimizer, lr, weight_decay, steps, max_kl_per_update, max_windows, mask, micro_batch, accumulate
        )
        self.adapter = adapter
        self.canaries = canaries
        self.weigher, self.denoising, self.guard, self.ledger = as_weigher(weigher), denoising, guard, ledger
        self.background, self.reward = tuple(background), reward
        self.memory, self.seed = memory, seed
        self._remembering = None if memory is None else Remembering(memory, adapter)
        scorer = Scorer(adapter.model)
        length = min(max_context(model), LONGEST)
        other = model_teacher(teacher, scorer, tokenizer, max_length=length)
        self.student = Student(scorer, adapter, Chat(tokenizer), length, other)
        self.version = self.tokens = self._halvings = 0
        self.rewards, self.pending, self._versions = Usual(KEPT_REWARDS), Pending(), Versions(KEPT_VERSIONS)
        self.reverts = Reverts()
        self.methods, self.told = Methods(methods, self.view), Told()
        self._configure_(new_optimizer=True)
        self.methods.refuse()
        if denoising is not None:
            denoising.refuse(adapter)
        self._versions.add_(self._snapshot())
        self._live = Live(self)

    # --- learning ---------------------------------------------------------------------------------------------

    @acting_alone
    @halving
    def observe(self, trajectory: Trajectory) -> UpdateStats:
        """Learn from one trajectory: one bounded update, which becomes a version.

        In order: tokenise, weigh (and maybe quarantine), gradient in coordinates, optimizer step (as often as `steps`
        says, or one for several experiences), trust region, version, ledger, guard; methods act in between. Whatever
        fails on the way, the learner is left as it was before; where it is memory that fails, it tries again in smaller
        batches.

        Args:
            trajectory: Of text, all tokens are learned from; of a conversation, the turns that `mask` says.

        Returns:
            What was measured; where nothing was learned, `quarantined` or `postponed` says why.

        Raises:
            FeatclError: If there is nothing to learn from, or loss, gradient or updated model is not finite.
            Stopped: If the guard stops; the update is a version then.
        """
        begun_(self, trajectory.task)
        timings = Timings()
        experience, left_out = self._experience(trajectory)
        with self._whole() as before:
            with self.student.scorer.trunks_kept():
                weight = self._weigh(experience, timings)
                experience = replace(experience, weight=weight.value)
                stats = self._unlearned(trajectory.id, trajectory.source, trajectory.task)
                stats = replace(stats, tokens_left_out=left_out, weight=weight.value, quarantined=weight.reason)
                stats = replace(stats, postponed=self._postponed_(experience, weight, timings))
                stats = stats.with_measures({**weight.signals, **self._denoised(experience, stats, timings)})
                if stats.learned:
                    stats = learn_(self, experience, stats, before=before, timings=timings)
            return self._accepted_(stats, experience, before=before, timings=timings)

    @acting_alone
    @halving
    def flush(self) -> UpdateStats | None:
        """Take the step of the experiences that wait for more (`accumulate`); None where none waits.

        Raises:
            FeatclError: As `observe`; they go on waiting then.
        """
        if not self.pending:
            return None
        timings, waiting = Timings(), self.pending.entries
        stats = self._unlearned(*(waiting[-1][key] for key in ("id", "source", "task")))
        stats = replace(stats, loss=sum(entry["loss"] for entry in waiting) / len(waiting))
        with self._whole() as before:
            with self.student.scorer.trunks_kept():
                stats = learn_from_pending_(self, stats, before=before, timings=timings)
            return self._accepted_(stats, None, before=before, timings=timings)

    @contextmanager
    def _whole(self) -> Iterator[Snapshot]:
        """A block that changes the learner as a whole or, where it fails, not at all; the version it starts from."""
        versions = self._versions.copy()
        try:
            yield versions.last
        except Stopped:  # after the change
            raise
        except BaseException:
            self._return_to_(versions)
            raise

    def _experience(self, trajectory: Trajectory) -> tuple[Experience, int]:
        """The trajectory in windows, none where no objective reads them, and how many of its tokens are left out."""
        try:
            windows, left_out = encode_trajectory(
                trajectory,
                self.student.chat,
                max_length=self.student.max_length,
                mask=self.settings.mask,
                max_windows=self.settings.max_windows,
            )
        except FeatclError:
            if any(term.on_own_tokens for term in self.terms):
                raise
            windows, left_out = [], 0
        batches = pack(windows, device=self.student.scorer.device, max_tokens=self.micro_batch)
        generator = partial(derived_generator, self.seed, trajectory.id)
        return Experience(trajectory, batches, generator, baseline=self.rewards.mean), left_out

    @torch.no_grad()
    def _weigh(self, experience: Experience, timings: Timings) -> Weight:
        if self.weigher is None:
            return Weight()
        with timings.part("weighing"):
            weight = self.weigher.weigh(experience, self.student, self.terms)
        check_finite("its weight", weight.value, experience.trajectory.id, experience.trajectory.task)
        return weight

    def _postponed_(self, experience: Experience, weight: Weight, timings: Timings) -> str | None:
        """Why methods keep an experience and nothing is learned from it now, or None."""
        if weight.reason is not None or not self.methods:
            return None
        with timings.part("methods"):
            return self.methods.postpones_(experience)

    def _denoised(self, experience: Experience, stats: UpdateStats, timings: Timings) -> dict[str, float]:
        """What the span does to the gradient, if it is time to look."""
        new = stats.learned and not self.pending
        if self.denoising is None or not new or not self.denoising.due(self.version):
            return {}
        with timings.part("denoising"):
            return self.denoising.measure(
                experience, self.student, self.terms, encode=lambda trajectory: self._experience(trajectory)[0]
            )

    def _unlearned(self, trajectory: str, source: str, task: str) -> UpdateStats:
        """What there is to say before anything was learned."""
        return UpdateStats(
            trajectory=trajectory, source=source, task=task, version=self.version,
            objective="+".join(term.name for term in self.terms), loss=math.nan, losses={}, lr=self.settings.lr,
            grad_norm=0.0, kl=0.0, step_scale=0.0, delta_norm=0.0, tokens=0, tokens_left_out=0, seconds=0.0,
        )  # fmt: skip

    def _accepted_(
        self, stats: UpdateStats, experience: Experience | None, *, before: Snapshot, timings: Timings
    ) -> UpdateStats:
        """What was observed becomes part of the state: a new version if there was a step; then ledger and guard."""
        stepped = stats.version > self.version
        self.version, self.tokens = stats.version, self.tokens + stats.tokens
        if experience is not None:
            stats = self._remember_(experience, stats, timings)
            if stats.learned and self.methods:
                with timings.part("methods"):
                    self.methods.after_update_(experience)
        if stepped:
            self.student.teachers.after_update_(self.version)
            if self.denoising is not None:
                stats = stats.with_measures(self.denoising.successive_(before.coordinates, self.adapter.coordinates()))
        snapshot = self._snapshot() if stepped else replace(before, **self._changing())
        self._versions.add_(snapshot)
        stats = replace(
            stats, delta_norm=float(self.adapter.delta_norm()), seconds=timings.total, timings=timings.parts
        )
        if not stepped:
            return stats
        if self.ledger is not None:
            ids = stats.trajectories or (stats.trajectory,)
            self.ledger.append(stats, before.coordinates, snapshot.coordinates, trajectories=ids)
        return self._guarded_(stats, before, timings)

    def _remember_(self, experience: Experience, stats: UpdateStats, timings: Timings) -> UpdateStats:
        """What the next experiences are compared with, and what the memory holds of this one."""
        if self.weigher is not None:
            self.weigher.after_update_(experience, stats)
        if stats.quarantined is None and experience.trajectory.reward is not None:
            self.rewards.update_(experience.trajectory.reward)
        if not stats.learned or self._remembering is None:
            return stats
        with timings.part("memory"):
            ids = whole_ids(experience.trajectory, self.student.chat)
            return stats.with_measures(
                self._remembering.write_(ids, self.student.scorer, longest=self.student.max_length)
            )

    def _guarded_(self, stats: UpdateStats, before: Snapshot, timings: Timings) -> UpdateStats:
        """Looked at by the guard, which may take the update back."""
        if self.guard is None:
            return stats
        seen = self.guard.state()
        try:
            with timings.part("guard"):
                reading = self.guard.after_update(self, stats)
        except Stopped as stop:
            stop.stats = stop.reading.added_to(stats)
            raise
        except BaseException:
            self.guard.load_state_(seen)
            if self.ledger is not None:
                self.ledger.rolled_back(before.version)
            raise
        stats = replace(stats, seconds=timings.total, timings=timings.parts)
        return stats if reading is None else reading.added_to(stats)

    def max_kl(self) -> float | None:
        """The trust region in nats per token: the setting's, or the guard's where that is smaller."""
        limits = (self.settings.max_kl_per_update, None if self.guard is None else self.guard.max_kl)
        return min((limit for limit in limits if limit is not None), default=None)

    # --- batches ----------------------------------------------------------------------------------------------

    @property
    def micro_batch(self) -> int:
        """Padded tokens that go through the model at once, after all halvings."""
        return max(SMALLEST, self.settings.micro_batch >> self._halvings)

    def halve_micro_batch_(self) -> None:
        """From here on, half as many tokens at once."""
        self._halvings += 1
        self.student = replace(self.student, batch_tokens=self.micro_batch)

    # --- settings ---------------------------------------------------------------------------------------------

    def reconfigure(self, **changes: Any) -> None:
        """Change settings from here on, as a phase does: objective, lr, weight_decay, steps, max_kl_per_update,
        max_windows, mask, micro_batch, accumulate, optimizer. Moments are kept unless the optimizer changes.

        Raises:
            FeatclError: For an unknown setting or a value out of range; nothing is changed then.
        """
        known = [field.name for field in fields(Settings)]
        if unknown := sorted(set(changes) - set(known)):
            raise FeatclError(f"no setting {unknown[0]!r} to reconfigure; there is {', '.join(known)}")
        before = self.settings
        self.settings = replace(before, **changes)
        try:
            self._configure_(new_optimizer=self.settings.optimizer != before.optimizer)
        except FeatclError:
            self.settings = before
            raise

    def _configure_(self, *, new_optimizer: bool) -> None:
        settings = self.settings
        terms = build_terms(
            settings.objective,
            has_teacher=self.student.teacher is not None,
            background=self.background,
            reward=self.reward,
        )
        optimizer = self._new_optimizer()
        if not new_optimizer:
            load_moments_(optimizer, moments(self.optimizer))
        self.student.teachers.serve_([term.objective for term in terms], self._kept)
        self.student = replace(self.student, batch_tokens=self.micro_batch)
        self.terms, self.optimizer = terms, optimizer

    def _new_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        return build_optimizer(
            settings.optimizer, self.adapter.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )

    def _kept(self, version: int) -> dict[str, torch.Tensor] | None:
        """The coordinates of an earlier version, if it is kept."""
        return self._versions[version].coordinates if version in self._versions.numbers else None

    def change_directions(self, directions: Any, *, remainder: Any = None) -> Any:
        """Go on in the span of other directions: what they hold is carried over, with the optimizer's mean gradient.

        Earlier versions have other coordinates, so they are forgotten; the change itself is a version.

        Args:
            directions: One set, or one per layer.
            remainder: `keep` or `drop` what the new span cannot hold; None is what the adapter was made with.

        Returns:
            What was carried over and what was not.

        Raises:
            FeatclError: If the directions do not fit; nothing is changed then.
        """
        self.flush()
        return self._changed_(self.adapter.change_directions(directions, remainder=remainder, optimizer=self.optimizer))

    def consolidate(self, directions: Any = None) -> Any:
        """Freeze all that was learned and go on from zero on top of it, along other directions if given."""
        self.flush()
        return self._changed_(self.adapter.consolidate(directions, optimizer=self.optimizer))

    def _changed_(self, change: Any) -> Any:
        self.version += 1
        self.student.teachers.restart_(self.version)
        self._versions = Versions(KEPT_VERSIONS)
        self._versions.add_(self._snapshot())
        return change

    # --- versions ---------------------------------------------------------------------------------------------

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions that `rollback` can restore, oldest first; the last is the present one."""
        return self._versions.numbers

    def hold(self, *versions: int) -> None:
        """Keep these versions, and no others, beyond the last few; `rollback` can then restore them."""
        self._versions.hold_(*versions)

    @property
    def present(self) -> Snapshot:
        """All that the present version is, as `rollback` takes it."""
        return self._versions.last

    def rollback(self, version: int | Snapshot) -> None:
        """Restore coordinates, moments and counters of a version exactly; later versions are forgotten.

        What the guard has seen stays seen: its wealth, alarms and draws go on.

        Args:
            version: One of `versions`, or a snapshot of an earlier one that was made again.
        """
        versions = self._versions.copy()
        if isinstance(version, Snapshot):
            versions.insert_(version)
            version = version.version
        snapshot = versions.cut_(version)
        if self.ledger is not None:
            self.ledger.rolled_back(version)  # first: where the disk is full, nothing was changed
        self._versions = versions
        self._restore_(snapshot)
        self.pending.clear_()
        self._versions.add_(replace(snapshot, **self._changing()))

    def revert(self, version: int) -> Reverted:
        """Take one update back: C ← C − (C_v − C_{v−1}), with the moments as they are; the result is a new version.

        Exact in the weights, but what was learned since was learned by a model that had seen it. A memory cannot forget
        one experience out of many: it stays as it is, and `rollback` is what takes it back too.

        Raises:
            FeatclError: If the version is neither kept nor in a ledger, its update was taken back already (a revert can
                be taken back too), or the directions were changed since.
        """
        self.reverts.refuse(version)
        self.methods.refuse_revert(version)
        numbers, latest = self.versions, self.version
        if version in numbers and version - 1 in numbers:
            before, after = (self._versions[number].coordinates for number in (version - 1, version))
        elif self.ledger is not None:
            before, after = self.ledger.delta(version)
        else:
            raise FeatclError(f"v{version} is not kept, and there is no ledger that knows what it changed")
        held = self.adapter.coordinates()
        with self._whole():
            how, removed = subtract_(self.adapter, before, after)
            self.version += 1
            self.reverts.add_(self.version, of=version)
            self.student.teachers.after_update_(self.version)
            self._versions.add_(self._snapshot())
            if self.ledger is not None:
                now = self._versions.last.coordinates
                self.ledger.reverted(self.version, of=version, before=held, after=now, how=how)
        return Reverted(version, self.version, how, removed, self.adapter.delta_norm(), latest - version)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            self.version,
            {name: tensor.detach().clone() for name, tensor in self.adapter.coordinates().items()},
            moments(self.optimizer),
            self.settings.optimizer,
            **self._changing(),
        )

    def _changing(self) -> dict[str, Any]:
        """What an experience changes besides coordinates and moments, also where no step is taken."""
        tensors = {name: part.tensors() for name, part in self._parts().items() if hasattr(part, "tensors")}
        return {
            "counters": {"tokens": self.tokens, "halvings": self._halvings},
            "parts": {name: part.state() for name, part in self._parts().items()},
            "tensors": {f"{part}/{name}": value for part, own in tensors.items() for name, value in own.items()},
        }

    def _parts(self) -> dict[str, Any]:
        """What remembers something of its own, by name: `state` and `load_state_`, and maybe `tensors` likewise."""
        parts = {
            "weigher": self.weigher,
            "denoising": self.denoising,
            "pending": self.pending,
            "rewards": self.rewards,
            "reverts": self.reverts,
            "teachers": self.student.teachers,
            "memory": self._remembering,
            "methods": self.methods if self.methods else None,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _lasting(self) -> dict[str, Any]:
        """What a rollback does not take back, since what was said and seen stays so: saved, in no version."""
        lasting = {"conversations": self._live, "guard": self.guard, "told": self.told if self.methods else None}
        return {name: part for name, part in lasting.items() if part is not None}

    def _return_to_(self, versions: Versions) -> None:
        """The state before an experience, with the versions that were kept then, after something failed in it."""
        self._versions = versions
        self._restore_with_own_optimizer_(versions.last)

    def _restore_with_own_optimizer_(self, snapshot: Snapshot) -> None:
        """Restore it; an optimizer that was chosen since, and has made no step, stays chosen."""
        chosen = self.settings.optimizer
        self._restore_(snapshot)
        if chosen != snapshot.optimizer:
            self.reconfigure(optimizer=chosen)

    def _restore_(self, snapshot: Snapshot) -> None:
        if snapshot.optimizer != self.settings.optimizer:
            self.reconfigure(optimizer=snapshot.optimizer)
        self.adapter.load_coordinates_(snapshot.coordinates)
        load_moments_(self.optimizer, snapshot.moments)
        self.optimizer.zero_grad()
        self.version, self.tokens = snapshot.version, snapshot.counters["tokens"]
        device = self.student.scorer.device
        for name, part in self._parts().items():
            if name not in snapshot.parts:
                continue
            part.load_state_(snapshot.parts[name])
            if hasattr(part, "load_tensors_"):
                lead = f"{name}/"
                own = {key: value for key, value in snapshot.tensors.items() if key.startswith(lead)}
                part.load_tensors_({key.removeprefix(lead): value.to(device) for key, value in own.items()})

    # --- on disk ----------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write everything that the next update depends on: one file, replaced atomically."""
        settings = {**self.settings.to_json(), "seed": self.seed, "changes": self.adapter.changes}
        settings["memory"] = None if self._remembering is None else self._remembering.weights_digest()
        last = self._versions.last
        last = replace(last, parts={**last.parts, **{name: part.state() for name, part in self._lasting().items()}})
        save_snapshot(directory, last, settings, versions=self._versions)

    def restore_(self, directory: str | Path) -> None:
        """Go on exactly where `save` left off; the settings stay this learner's own.

        Raises:
            FeatclError: If there is no saved learner, or it belongs to another adapter.
        """
        snapshot, saved = load_snapshot(directory)
        if (changes := saved.get("changes", 0)) != self.adapter.changes:
            raise FeatclError(
                f"{directory}: saved after {changes} changes of directions, this adapter has had "
                f"{self.adapter.changes}: its coordinates mean other directions; make the same changes first"
            )
        self._check_memory(saved.get("memory"), directory)
        self.methods.check(snapshot.parts.get("methods", {"methods": {}}), directory)
        self._restore_with_own_optimizer_(snapshot)
        self._halvings = snapshot.counters["halvings"]  # the same batch shapes, so the same sums
        self.student = replace(self.student, batch_tokens=self.micro_batch)
        for name, part in self._lasting().items():
            if name in snapshot.parts:
                part.load_state_(snapshot.parts[name])
        self._versions, _ = load_versions(directory, keep=KEPT_VERSIONS)

    def _check_memory(self, digest: str | None, directory: str | Path) -> None:
        """Refuse a state without its memory, or with one of other slow weights, to which it means nothing."""
        own = None if self._remembering is None else self._remembering.weights_digest()
        if digest is not None and digest != own:
            found = "there is none" if own is None else "this one has other slow weights"
            raise FeatclError(
                f"{directory}: saved with a memory, and {found}; give `memory=` the one it was saved with"
            )

    @classmethod
    def load(cls, directory: str | Path, model: Any, tokenizer: Any, adapter: Any, **settings: Any) -> Learner:
        """A learner with the settings it was saved with, going on exactly where it left off.

        Args:
            directory: Where `save` wrote.
            model, tokenizer, adapter: As for a new learner, the adapter constrained in the same way.
            settings: What replaces or adds to the saved settings (teacher, background texts, memory and
                methods are not saved: of methods, what they remember is).
        """
        _, saved = load_snapshot(directory)
        for key in ("changes", "memory"):
            saved.pop(key, None)
        learner = cls(model, tokenizer, adapter, **{**saved, **settings})
        learner.restore_(directory)
        return learner

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter alone, as a plain PEFT folder."""
        self.adapter.save(directory)

    # --- acting -----------------------------------------------------------------------------------------------

    @acting_alone
    def act(self, environments: Sequence[Environment], seeds: Sequence[int], **settings: Any) -> list[Trajectory]:
        """Episodes that the present version plays, one per seed; see `featcl.learning.acting.act_now`."""
        return act_now(self, environments, seeds, **settings)
