"""What a fused part goes by, and whether it still holds: one ``Guard`` per part, compared before each use.

A fused form replaces code that it knows: exact classes of transformers, torch and this package, with the forwards that
they came with, and nothing hung on them. ``check_code`` and ``check_parameters`` hold a layer to that when it is
patched; a ``Guard`` remembers what they saw. Weights have their own check (``packing``), the epsilon of a norm is read
where it is used.

A guard is a handful of comparisons of flat lists: with the look at the weights 9 us for a whole layer of Llama's, on a
server CPU where its decode step takes some thousands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from slicegpt_fast.architectures import Architecture, Sublayer, at
from slicegpt_fast.quantization import QuantizedLinear
from slicegpt_fast.slicing.heads import CutHeads, FollowProjections, PadValues
from slicegpt_fast.slicing.layers import shortcut_name, with_shortcuts

Forward = Callable[..., Tensor]
Place = tuple[str, nn.Module, str]  # a module's path in its layer, its parent, and its name there

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SLOTS = ("forward", "_old_forward")  # where a module keeps a forward of its own; accelerate's hooks move it
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(getattr(torch_module, f"_global{hooks}") for hooks in HOOKS)
# What computes x W^T + b and nothing else, beside Falcon's own of the same formula.
LINEARS = (nn.Linear, Conv1D, QuantizedLinear)
LINEAR_CODE = ("torch.nn", "transformers.pytorch_utils", "slicegpt_fast.quantization")
ACTIVATION_CODE = ("torch.nn", "transformers.activations")
OWN_CODE = ("slicegpt_fast.slicing.layers",)
REMEMBERED = ("_owns", "_unhooked", "_hooked", "_classes", "_codes")
OWN_HOOKS = (CutHeads, FollowProjections, PadValues)
# Where the code stands that a fused form may replace: torch, transformers, this package.
PACKAGES = tuple(
    str(Path(file).parents[depth]) for file, depth in ((torch.__file__, 0), (transformers.__file__, 0), (__file__, 1))
)


class NotFusable(Exception):
    """Why a part keeps its unfused forward."""


class Guard:
    """The modules that a fused part replaces or goes around, and what each was when the part was made."""

    def __init__(self, places: Iterable[Place], forwards: dict[nn.Module, Forward], others: Iterable[nn.Module] = ()):
        """
        Args:
            places: where the modules stand.
            forwards: which of them get another forward.
            others: modules of which the class alone matters.
        """
        places = list(places)
        self._slots = [(parent._modules, name) for _, parent, name in places]
        self._modules = [cast(nn.Module, slots[name]) for slots, name in self._slots]
        self._all = [*self._modules, *others]
        self._hooks = [getattr(module, hooks) for module in self._modules for hooks in HOOKS]
        own = [
            module.__dict__ | ({forward_slot(module): forwards[module]} if module in forwards else {})
            for module in self._modules
        ]
        self._forwards = [[each.get(slot) for each in own] for slot in SLOTS]
        self._dropouts = [module for module in self._modules if isinstance(module, nn.Dropout)]
        self._gone: str | None = None
        self._remember()

    @classmethod
    def joined(cls, guards: Iterable[Guard]) -> Guard:
        """Return the guard of all their parts for calls without autograd, where no backward hook runs: it costs less
        than one after the other."""
        joined, guards = cls((), {}), list(guards)
        joined._slots = [slot for guard in guards for slot in guard._slots]
        joined._modules = [module for guard in guards for module in guard._modules]
        joined._all = [module for guard in guards for module in guard._all]
        joined._hooks = [getattr(module, hooks) for module in joined._modules for hooks in HOOKS[:2]]
        joined._forwards = [
            list(chain.from_iterable(each)) for each in zip(*(g._forwards for g in guards), strict=True)
        ]
        joined._dropouts = [module for guard in guards for module in guard._dropouts]
        joined._gone = next((guard._gone for guard in guards if guard._gone is not None), None)
        joined._remember()
        return joined

    def _remember(self) -> None:
        """Take what a copy has anew: its modules' attributes, and classes that cannot be pickled."""
        self._owns = [module.__dict__ for module in self._modules]
        unknown = any(foreign(hooks) for hooks in self._hooks)
        self._unhooked = [hooks for hooks in self._hooks if unknown or not hooks]
        self._hooked = [(hooks, list(hooks.values())) for hooks in self._hooks if hooks]
        self._classes = [type(module) for module in self._all]
        self._codes = [_code(cls) for cls in dict.fromkeys(self._classes)]

    def replaced(self) -> str | None:
        """What stands where the part's modules stood, if it is not they as they were; or None."""
        if self._gone is not None:
            return self._gone
        if [slots.get(name) for slots, name in self._slots] != self._modules:
            return "one of its modules was replaced"
        if [type(module) for module in self._all] != self._classes:
            changed = next(m for m, cls in zip(self._all, self._classes, strict=True) if type(m) is not cls)
            return f"the class of one of its modules is now {described(type(changed))}"
        for cls, forward, call in self._codes:
            if cls.forward is not forward or cls.__call__ is not call:
                return f"the class {cls.__name__} got another forward"
        return None

    def changed(self) -> str | None:
        """What has happened to the part that its fused form would not honour, or None."""
        reason = self.replaced()
        if reason is not None:
            return reason
        as_before = not any(self._unhooked) and all(list(hooks.values()) == known for hooks, known in self._hooked)
        if not as_before and any(foreign(hooks) for hooks in self._hooks):
            return "a hook on one of its modules"
        if [[own.get(slot) for own in self._owns] for slot in SLOTS] != self._forwards:
            return "one of its modules got another forward"
        for dropout in self._dropouts:
            if dropout.training:
                return "a dropout in training mode"
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy takes anew; a class that was changed by then stays changed."""
        return self.__dict__ | {"_gone": self.replaced(), **dict.fromkeys(REMEMBERED)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()


def _code(cls: type[nn.Module]) -> tuple[type[nn.Module], object, object]:
    return cls, cls.forward, cls.__call__


def foreign(hooks: dict[int, Callable[..., Any]]) -> bool:
    """True where a hook is neither transformers' own, which record attention weights, nor one of narrow values.

    Those hang on an attention and its projections, which a fused sublayer calls as ever.
    """
    return any(
        type(hook) not in OWN_HOOKS and not getattr(hook, "__module__", "").startswith("transformers.")
        for hook in hooks.values()
    )


def infers(module: nn.Module, x: Tensor) -> bool:
    """True where ``module(x)`` is plain inference: no training, no derivative wanted, no autocast, no export."""
    if type(x) is not Tensor or module.training or torch.is_autocast_enabled(x.device.type) or any(GLOBAL_HOOKS):
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def forward_slot(module: nn.Module) -> str:
    """The attribute that holds what a module runs: accelerate puts its own ``forward`` before it."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


class Replicas:
    """What ``nn.DataParallel`` asks a patched module for: a replica with other weights, which runs unfused."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        self.module = module
        self.forward = forward

    def make(self) -> nn.Module:
        """``module._replicate_for_data_parallel()``."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)  # type: ignore[operator]
        del replica.__dict__["_replicate_for_data_parallel"]
        for slot in SLOTS:
            if replica.__dict__.get(slot) == self.forward:
                del replica.__dict__[slot]
        return replica


def is_plain(module: nn.Module) -> bool:
    """True where a module runs its class's forward, at most under a hook of accelerate's that moves its arguments."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None and (described(type(hook)) != "accelerate.hooks.AlignDevicesHook" or hook.offload):
        return False
    own = module.__dict__.get(forward_slot(module))
    return own is None or own == MethodType(type(module).forward, module)


def described(cls: type) -> str:
    """A class's full name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def home_of(model: nn.Module) -> str:
    """The package of ``transformers.models`` whose code a model runs: some families share another's."""
    homes = (cls.__module__.split(".") for cls in type(model).__mro__)
    return next((home[2] for home in homes if home[:2] == ["transformers", "models"]), "")


def is_known(cls: type[nn.Module], *modules: str) -> bool:
    """True where a class stands under its name in one of those Python modules, with the forward it was written with."""
    if not any(cls.__module__ == module or cls.__module__.startswith(f"{module}.") for module in modules):
        return False
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return False
    return all(_is_library_code(function) for function in (cls.forward, cls.__call__))


def _is_library_code(function: Any) -> bool:
    """True where a function and all that it decorates were read from files of PACKAGES."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(PACKAGES):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def is_linear(cls: type[nn.Module], family: str) -> bool:
    """True for a plain linear layer with the code it came with."""
    falcons = cls.__name__ == "FalconLinear" and is_known(cls, f"transformers.models.{family}")
    return falcons or (cls in LINEARS and is_known(cls, *LINEAR_CODE))


def check_layer(layer: nn.Module, architecture: Architecture, family: str) -> None:
    """Raise NotFusable unless a decoder layer is the family's own, or the one that slicing makes of it."""
    cls = type(layer)
    sliced = "architecture" in cls.__dict__
    own = cast(type[nn.Module], cls.__base__) if sliced else cls
    made = with_shortcuts(own, architecture) if sliced else own  # type: ignore[arg-type]
    if made is not cls or not is_known(own, f"transformers.models.{family}") or not _is_library_code(cls.forward):
        raise NotFusable(f"the layer is a {described(cls)}, not the family's own")
    if not is_plain(layer):
        raise NotFusable("the layer has a forward of its own")
    names = {shortcut_name(sublayer) for sublayer in architecture.sublayers}
    for branch in (branch for sublayer in architecture.sublayers for branch in sublayer.branches):
        names |= {path.partition(".")[0] for path in (branch.norm, *branch.modules, *branch.readers, *branch.writers)}
    for name, _ in layer.named_parameters():
        if name.partition(".")[0] not in names:
            raise NotFusable(f"the layer has a parameter {name}, which the family's does not have")


def check_code(layer: nn.Module, sublayer: Sublayer, family: str) -> None:
    """Raise NotFusable unless each module of a sublayer is of a class whose code is known, and runs it."""
    home = f"transformers.models.{family}"
    linears = {path for branch in sublayer.branches for path in (*branch.readers, *branch.writers)}
    activations = {branch.activation for branch in sublayer.branches}
    owners = {path for branch in sublayer.branches for path in branch.modules} - linears
    for path, parent, name in places(layer, sublayer):
        module = cast(nn.Module, parent._modules[name])
        cls = type(module)
        if path in linears:
            known = is_linear(cls, family)
        elif path in owners and next(module.children(), None) is not None:
            known = is_known(cls, home)
        else:  # any other activation is called as it is
            known = path in activations or is_known(cls, home, "torch.nn", *OWN_CODE)
        if not known:
            expected = "a plain linear layer" if path in linears else "the family's own"
            raise NotFusable(f"its {path} is a {described(cls)}, not {expected}")
        if not is_plain(module):
            raise NotFusable(f"its {path}, a {cls.__name__}, has a forward of its own")


def check_parameters(layer: nn.Module, sublayer: Sublayer, family: str) -> None:
    """Raise NotFusable where a sublayer has a parameter that the family's row does not tell of."""
    for branch in sublayer.branches:
        weights = (*branch.readers, *branch.writers)
        for path in branch.modules:
            for name, _ in at(layer, path).named_parameters(prefix=path):
                owner, _, leaf = name.rpartition(".")
                if name in weights or (owner in weights and leaf in ("weight", "bias", "scales")):
                    continue
                home = (f"transformers.models.{family}", *ACTIVATION_CODE, *OWN_CODE)
                inside = owner != path and is_known(type(at(layer, owner)), *home)
                as_ever = branch.activation in (None, owner)  # what stands inside an attention, the activation
                if not (as_ever and inside):
                    raise NotFusable(f"it has a parameter {name}, which the family's does not have")


def places(layer: nn.Module, sublayer: Sublayer) -> Iterator[Place]:
    """Every module that the fused form of a sublayer replaces or goes around."""
    paths: list[str] = []
    for branch in sublayer.branches:
        paths += [branch.norm, *branch.modules, *branch.readers, *branch.writers]
        paths += [branch.activation] if branch.activation is not None else []
        # What stands inside is gone around, or stands behind a projection that hands something else on than it did.
        paths += [f"{p}.{name}" for p in branch.modules for name, _ in at(layer, p).named_modules() if name]
    shortcut = shortcut_name(sublayer)
    if getattr(layer, shortcut, None) is not None:
        paths += [shortcut, *(f"{shortcut}.{name}" for name, _ in at(layer, shortcut).named_children())]
    for path in dict.fromkeys(paths):
        parent_path, _, name = path.rpartition(".")
        try:
            parent = at(layer, parent_path)
        except AttributeError:
            continue
        if parent._modules.get(name) is not None:
            yield path, parent, name
