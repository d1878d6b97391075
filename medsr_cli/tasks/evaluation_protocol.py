"""By which protocol models are measured, and at which scales, where nobody says."""

from __future__ import annotations

from collections.abc import Sequence

from medsr_cli.errors import ArgumentsError
from medsr_cli.evaluation.protocols import PROTOCOLS, Protocol
from medsr_cli.tasks.evaluation_models import Contender

PAPER_SCALES = {"miassr": (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)}
"""What a protocol averages over where no scale is asked for and every model takes all of them."""
DEFAULT_SCALE = 4.0
LARGEST_SCALE = 8.0


def protocol_for(contenders: Sequence[Contender], asked: str | None) -> tuple[str, str]:
    """The protocol by which all are measured, and a remark where their papers differ.

    Raises:
        ArgumentsError: there is none of that name.
    """
    if asked is not None:
        if asked not in PROTOCOLS:
            msg = f"There is no protocol called {asked!r}."
            raise ArgumentsError(msg, f"Give one of {', '.join(PROTOCOLS)}.")
        return asked, ""
    own = [_own_protocol(contender) for contender in contenders if contender.learned]
    if not own:
        return "rdst", ""
    if len(set(own)) > 1:
        papers = ", ".join(dict.fromkeys(own))
        return own[0], (
            f"The models' papers measure differently ({papers}); all are measured by that of the first, {own[0]}. "
            "--protocol names another."
        )
    return own[0], ""


def _own_protocol(contender: Contender) -> str:
    """That of the method's paper; methods without one of their own are measured as RDST is."""
    arch = contender.arch
    if arch is None:
        # A checkpoint's id: it begins with the name of its method.
        named = [name for name in PROTOCOLS if contender.request.model.startswith(name)]
        return max(named, key=len, default="rdst")
    return next((name for name in (arch.id, arch.family) if name in PROTOCOLS), "rdst")


def scales_for(
    contenders: Sequence[Contender], protocol: Protocol, asked: Sequence[float], *, fit: bool = False
) -> tuple[float, ...]:
    """The scales that are measured, ascending.

    Raises:
        ArgumentsError: one of them does not enlarge, or the protocol does not have it.
    """
    if not asked:
        learned = [contender for contender in contenders if contender.learned]
        any_scale = all(fit or (c.arch is not None and c.arch.scale_range is not None) for c in learned)
        return PAPER_SCALES[protocol.name] if protocol.name in PAPER_SCALES and any_scale else (DEFAULT_SCALE,)
    for scale in asked:
        if not 1 < scale <= LARGEST_SCALE:
            msg = f"--scale {scale:g} does not enlarge by a factor above 1 and up to {LARGEST_SCALE:g}."
            raise ArgumentsError(msg, "Give a factor such as 4, or several with commas: 1.5,2,4.")
        if protocol.whole_scales and not scale.is_integer():
            msg = f"The protocol {protocol.name} has whole scales only, not {scale:g}."
            raise ArgumentsError(msg, "Use --protocol miassr for scales between.")
    return tuple(sorted(set(asked)))
