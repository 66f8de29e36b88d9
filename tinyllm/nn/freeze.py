"""Which weights are learned. A frozen one gets no gradient, and an optimizer that is made afterwards keeps nothing for it."""
from collections.abc import Iterator

from tinyllm.config import suggestion
from tinyllm.nn.module import Module, Parameter


def freeze(module: Module, *parts: str) -> None:
    """Keep these parts as they are: names of parameters or of what holds them, such as "embedding" or "blocks.0"; all without names.

    What lies below the lowest part that is learned then costs no backward either: no gradient has to come through it.
    Raises ValueError for a part that the module has not.
    """
    for parameter in _of(module, parts):
        parameter.requires_grad, parameter.grad = False, None


def unfreeze(module: Module, *parts: str) -> None:
    """Learn these parts (again); all without names. Raises ValueError for a part that the module has not."""
    for parameter in _of(module, parts):
        parameter.requires_grad = True


def _of(module: Module, parts: tuple[str, ...]) -> Iterator[Parameter]:
    named = dict(module.named_parameters())
    known = {name[:end] for name in named for end in (*(i for i, c in enumerate(name) if c == "."), len(name))}
    for part in parts:
        if part not in known:
            top = ", ".join(dict.fromkeys(name.partition(".")[0] for name in named))
            raise ValueError(f"the model has no part {part!r}{suggestion(part, sorted(known))} (at the top it has {top})")
    for name, parameter in named.items():
        if not parts or any(name == part or name.startswith(f"{part}.") for part in parts):
            yield parameter
