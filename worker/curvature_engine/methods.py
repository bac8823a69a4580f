"""The verdict on the path that a part took, and each parameter's method that follows from it."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.judgement import confirm, judge, proved_strides, random_cotangent, uses_by_parameter
from curvature_engine.orders import Order
from curvature_engine.precision import all_finite
from curvature_engine.prepared_uses import Arranged, PreparedUse
from curvature_engine.probe import Verdict
from curvature_engine.products import exactly
from curvature_engine.program import Forward, Parameter
from curvature_engine.reproducible import reproducible
from curvature_engine.requests import Request
from curvature_engine.tasks import Part
from curvature_engine.verification import EVERY_COLUMN, KEPT_VERDICT, THIS_JOB, least
from curvature_engine.version import __version__
from curvature_engine.watched import Derivation


class Methods:
    """How the individual gradients of a batch's parameters come about.

    Attributes:
        by_parameter: "closed form" or "fallback"; of several parts the least.
        uses: of parameters with closed forms in the current part, by name.
        at_hand: gradients at the current part's taps under the loss's gradient, where confirming a verdict took them.
        verification: when they were made, for the parts so far the least; None before.
        verdict: on the current part's path; None where nothing had to be judged.
    """

    def __init__(self, order: Order, selected: dict[str, Parameter]) -> None:
        self._order, self._selected = order, selected
        self._fallen: set[str] = set()
        self.by_parameter: dict[str, str] = {}
        self.uses: dict[str, list[PreparedUse]] = {}
        self.at_hand: dict[int, Tensor | None] = {}
        self._verified = True
        self._outputs: list[Tensor] = []
        """Of parts whose numbers have not been looked at: that is left to the end."""
        self.verification: str | None = None
        self.verdict: Verdict | None = None

    def enter(self, part: Part, gradient: Callable[[], Tensor]) -> None:
        """Find which of a part's rows belongs to which sample, and each parameter's method.

        `gradient` gives the part's rows of the loss's gradient, where they are needed to find that.
        """
        self.at_hand = {}
        if any(r.extension.accumulator is not None for r in self._order.requests):
            self.verdict = self._verdict(part, gradient)
            self._choose(part, self.verdict)
        else:
            self._verified = False

    @property
    def verified(self) -> bool:
        """Whether the run-time checks held in every part, and its outputs are finite; waits for these."""
        self._verified = self._verified and all(all_finite(outputs) for outputs in self._outputs)
        self._outputs.clear()
        return self._verified

    def leave(self) -> None:
        """Let go of the current part."""
        self.uses.clear()
        self.at_hand = {}

    def of(self, request: Request, key: str) -> str:
        """A parameter's method, or for several together the least of theirs."""
        against = self._order.against.get(request.label)
        if against is None and key in self.by_parameter:
            return self.by_parameter[key]
        found: set[str] = set()
        for methods in (self.by_parameter, {} if against is None else against.work.methods):
            found.update([methods[key]] if key in methods else methods.values())
        return "fallback" if "fallback" in found else "closed form"

    def verification_of(self, request: Request) -> str | None:
        """When the checks of what a result is made of were made; None where there were none.

        The columns' sums are what `verify` compares: not what comes of one backward pass as it is, not the matrices
        averaged over samples, not the second derivatives of the model.
        """
        against = self._order.against.get(request.label)
        found = least([self.verification, *([] if against is None else [against.work.verification])])
        extension = request.extension
        compared = (
            extension.accumulator is not None
            and extension.columns in ("gradient", "exact", "sampled")
            and extension.residual is None
        )
        return THIS_JOB if found == EVERY_COLUMN and not compared else found

    def distrust(self) -> None:
        """Note that nothing was verified by comparing: some gradient is not finite."""
        self._verified = False
        warning = "some gradient in the model is not finite: results below it are not verified"
        if warning not in self._order.warnings:
            self._order.warnings.append(warning)

    def _choose(self, part: Part, verdict: Verdict) -> None:
        """Take each parameter's closed form where its taps have rows, and nothing speaks against it."""
        by_parameter = uses_by_parameter(part.forward.tape, verdict.taps)
        self.uses.clear()
        arranged: dict[int, Arranged] = {}
        for name in self._selected:
            uses = by_parameter.get(name, ())
            closed = all(
                tap.rule is not None and tap.intact and verdict.taps[i].attribution is not None for i, tap, _ in uses
            )
            derived = any(isinstance(use.watched.index, Derivation) for *_, use in uses)
            if name in verdict.mismatched and uses and closed and not derived:
                raise EngineError(
                    "verification_failed",
                    f"the closed form of parameter {name} disagrees with ordinary autograd; no result is given",
                    param=name,
                    remedy="please report this model",
                )
            if not closed or name in verdict.mismatched:
                self._fallen.add(name)
            self.by_parameter[name] = "fallback" if name in self._fallen else "closed form"
            if name in self._fallen:
                continue
            prepared = []
            for i, tap, use in uses:
                attribution = verdict.taps[i].attribution
                assert attribution is not None
                saved = arranged.setdefault(i, Arranged(tap, attribution))
                prepared.append(PreparedUse(tap, i, use, attribution, saved))
            self.uses[name] = prepared

    def _verdict(self, part: Part, gradient: Callable[[], Tensor]) -> Verdict:
        verdicts, forward, outputs = self._order.program.verdicts, part.forward, part.outputs
        path = self.path(part)
        verdict = None if forward.routed_by_data or self._order.verify else verdicts.get(path)
        verdict = verdict if verdict is not None and self._says_enough(verdict) else None
        found = THIS_JOB if path in self._order.judged else KEPT_VERDICT
        with exactly(outputs.device):
            confirmed = verdict is not None and self._confirm(part, gradient, verdict)
            if not confirmed:
                verdict = self._judged(part)
        assert verdict is not None
        if not confirmed:
            found = EVERY_COLUMN if self._order.verify else THIS_JOB
            if verdict.finite and verdict.confirmable and not forward.routed_by_data:
                verdicts.keep(path, verdict)
                self._order.judged.add(path)
        self.verification = found if self.verification is None else least([self.verification, found])
        self._outputs.append(outputs.detach())
        self._verified = self._verified and verdict.finite
        if not verdict.finite:
            self.distrust()
        return verdict

    def _judged(self, part: Part) -> Verdict:
        """A new verdict: on the batch's first few samples, where it is proved to hold for all; else on all."""
        forward, outputs = part.forward, part.outputs
        of_few = None if part.few is None else part.few.verdict_for(forward, outputs)
        if of_few is not None and not self._order.verify:
            return of_few
        verdict = judge(outputs, forward.tape, self._selected)
        strides = proved_strides(verdict, outputs, forward.tape, forward.samples)
        # The same as without `verify`: later plans go by it.
        probed = None if of_few is None or strides != of_few.strides else of_few.probed
        return replace(verdict, strides=strides, probed=probed)

    def _says_enough(self, verdict: Verdict) -> bool:
        """Whether a new verdict could not say more: rows that no gradient reached count in Kronecker factors, too."""
        if all(request.extension.kind != "factors" for request in self._order.requests):
            return True
        return all(tap.attribution is None or tap.attribution.determined for tap in verdict.taps)

    def path(self, part: Part) -> Hashable:
        """What a verdict on a part holds for."""
        return path_of(part.forward, part.outputs, self._selected)

    def _confirm(self, part: Part, gradient: Callable[[], Tensor], verdict: Verdict) -> bool:
        """Whether a kept verdict holds for this batch's rows."""
        proved = verdict.strides is not None and part.forward.samples.keeps_rows(part.outputs)
        if proved and verdict.strides == tuple(tap.stride for tap in part.forward.tape.taps):
            return True
        # The loss's gradient leaves rows silent that other columns reach, but those do not matter to it, except among
        # the inputs of Kronecker factors.
        extensions = [r.extension for r in self._order.requests]
        only_gradient = all(e.columns in ("outputs", "gradient") and e.kind != "factors" for e in extensions)
        outputs = part.outputs
        cotangent = gradient() if only_gradient else random_cotangent(outputs)
        known = [i for i, tap in enumerate(verdict.taps) if tap.attribution is not None]
        with reproducible(outputs.device):
            gradients = part.at_taps(known, cotangent)
            if only_gradient:
                self.at_hand = gradients
            return confirm(verdict, outputs, part.forward.tape, cotangent, gradients)


def path_of(forward: Forward, outputs: Tensor, selected: Iterable[str]) -> Hashable:
    """What a verdict holds for: the program, which keeps it, in this version, on such a device, inputs and way."""
    return (
        __version__,
        outputs.device.type,
        forward.signature,
        (tuple(outputs.shape), outputs.dtype),
        forward.decisions,
        tuple(selected),
        tuple((tap.name, tap.shapes, tap.intact, tuple(t.dtype for t in tap.saved)) for tap in forward.tape.taps),
    )
