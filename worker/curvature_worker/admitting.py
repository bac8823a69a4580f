"""Admitted models and loss functions: judged by a confined process once, and stored in the form that it accepted."""

from pathlib import Path

from curvature_protocol.artefacts import SINGULAR, ArtefactKind
from curvature_protocol.names import admitted_key
from curvature_worker import admission
from curvature_worker.cache import place
from curvature_worker.channel import ChannelClosed
from curvature_worker.contact import Contact, death_of
from curvature_worker.errors import JobRefused
from curvature_worker.launcher import Confined, launch
from curvature_worker.testimony import take, text_of
from curvature_worker.tools import Tools

_ADMISSION_SECONDS = 60.0
_ADMISSION_BYTES_PER_SECOND = 10 * 2**20
_LOSS_BYTES = 64 * 2**20
_SAVE_LOSS = "save a function of (outputs, targets) with torch.jit.script(function).save(path)"


def admitted(tools: Tools, contact: Contact, kind: ArtefactKind, sha256: str) -> Path:
    """The admitted form of a model or a loss function, made now if this is its first job.

    Raises:
        JobRefused: it is not accepted, or is not there.
    """
    key = admitted_key(sha256, admission.ADMISSION_VERSION)
    found = tools.cache.fetch(key, contact.check)
    if found is not None:
        return found
    contact.tell("admitting")
    source = tools.cache.fetch_upload(kind, sha256, contact.check)
    contact.lap("fetch")
    judge = launch(
        "curvature_worker.admission", scratch=tools.scratch, options={}, limits={"AS": admission.MEMORY_BYTES}
    )
    try:
        _have_judged(contact, judge, source, kind)
        judge.end()  # nobody is left who could change the file
        tools.objects.put_file(key, take(judge, "admitted"))
    finally:
        judge.kill()
    contact.lap("admit")
    found = tools.cache.fetch(key, contact.check)
    if found is None:
        raise JobRefused("internal_error", f"the admitted {SINGULAR[kind]} was not stored")
    return found


def small_enough(loss: Path) -> Path:
    """A loss function's file, which the child reads whole.

    Raises:
        JobRefused: `unsupported_loss` if it is too large.
    """
    if (size := loss.stat().st_size) > _LOSS_BYTES:
        reason = f"the loss function has {size} bytes; {_LOSS_BYTES} are accepted"
        raise JobRefused("unsupported_loss", reason, param="loss", remedy="keep large tensors out of it")
    return loss


def _have_judged(contact: Contact, judge: Confined, source: Path, kind: ArtefactKind) -> None:
    """Have a file judged; what is accepted lies in the judge's outbox then.

    Raises:
        JobRefused: `invalid_model`, `unsupported_loss`, or what kept it from being judged.
    """
    who = f"the admission of the {SINGULAR[kind]}"
    place(source, judge.inbox / "model")
    try:
        contact.send(judge, {"judge": "model"})
    except ChannelClosed as error:
        raise death_of(judge, who) from error
    limit = _ADMISSION_SECONDS + source.stat().st_size / _ADMISSION_BYTES_PER_SECOND
    verdict = contact.listen(judge, {"admitted", "refused", "failed"}, who, limit)
    if verdict["event"] == "failed":
        raise JobRefused("unavailable", text_of(verdict, "message") or "not stored", remedy="try again later")
    if verdict["event"] == "admitted":
        return
    reason = text_of(verdict, "message") or "not admitted"
    if kind == "losses":
        raise JobRefused("unsupported_loss", f"in the loss function: {reason}", param="loss", remedy=_SAVE_LOSS)
    raise JobRefused("invalid_model", reason, param="model", remedy=text_of(verdict, "remedy"))
