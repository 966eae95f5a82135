"""Random sequences of what users do to models: after every step a patched model computes what an unpatched one does."""

import contextlib
import copy
import functools
import io
import random

import peft
import pytest
import torch
from models import tiny_model, tokens
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils import parametrizations

from slicegpt_fast import InputError, patch_model, slice_model, unpatch_model
from slicegpt_fast.patching import is_patched

SEQUENCES, STEPS = 50, 6
IDS = (tokens(2, 9, seed=1), tokens(2, 8, seed=3), tokens(1, 1, seed=2))
PLANS = {"dense": None, "shared": dict(basis="shared"), "aligned": dict(shortcut="aligned", shortcut_rank=5)}
MODELS = [
    ("llama", "dense"),
    ("llama", "aligned"),
    ("qwen2", "shared"),
    ("qwen3", "dense"),
    ("phi3", "dense"),
    ("phi", "aligned"),
    ("gpt2", "shared"),
    ("opt", "aligned"),
    ("falcon-7b", "shared"),
]


@functools.cache
def base(family, plan):
    model = tiny_model(family)
    return (
        model if plan == "dense" else slice_model(model, [tokens(4, 32)], sparsity=0.2, progress=False, **PLANS[plan])
    )


def louder(module, inputs, output):
    return output * 1.1 if isinstance(output, torch.Tensor) else (output[0] * 1.1, *output[1:])


def loud(linear, x):
    return nn.functional.linear(x, linear.weight, linear.bias) * 1.1


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.1


class Wrap(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **named):
        return louder(self, None, self.inner(*arguments, **named))


def parents(path):
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


class Pair:
    """A patched model and its twin; every method takes one step with both."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        family, plan = self.random.choice(MODELS)
        self.log = [f"{family} {plan}"]
        self.patched, self.twin = (copy.deepcopy(base(family, plan)) for _ in range(2))
        patch_model(self.patched)
        self.handles = []

    def both(self):
        return self.patched, self.twin

    def path(self, *classes):
        """A module inside a decoder layer."""
        layers = next(m for m in self.twin.modules() if isinstance(m, nn.ModuleList))
        inside = {module for layer in layers for module in layer.modules() if type(module) is not nn.ModuleDict}
        found = [n for n, m in self.twin.named_modules() if m in inside and (not classes or type(m) in classes)]
        found = [name for name in found if "lora_" not in name]
        return self.random.choice(found) if found else None

    def each(self, *classes):
        """The two modules at one random path, or none."""
        path = self.path(*classes)
        self.log[-1] += f" {path}"
        return [] if path is None else [model.get_submodule(path) for model in self.both()]

    def hook(self):
        self.handles.append([module.register_forward_hook(louder) for module in self.each()])

    def unhook(self):
        for handle in self.handles.pop() if self.handles else ():
            handle.remove()

    def wrap(self):
        path = self.path()
        for model in self.both():
            model.set_submodule(path, Wrap(model.get_submodule(path)))

    def unwrap(self):
        path = self.path(Wrap)
        for model in self.both() if path else ():
            model.set_submodule(path, model.get_submodule(path).inner)

    def cast(self):
        dtype = self.random.choice([torch.bfloat16, torch.float64])
        for model in self.both():
            model.to(dtype).float()

    def share(self):
        for model in self.both():
            model.share_memory()

    def load(self):
        assign = self.random.random() < 0.5
        state = {name: value * 0.95 for name, value in self.twin.state_dict().items()}
        for model in self.both():
            model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)

    def adapt(self):
        path = self.path(nn.Linear)
        if path is None or any("lora" in type(self.twin.get_submodule(p)).__module__ for p in parents(path)):
            return
        config = peft.LoraConfig(r=2, target_modules=[path], init_lora_weights=False)
        for model in self.both():
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, model)
            model.eval()

    def merge(self):
        for module in self.each(peft.tuners.lora.Linear):
            module.merge()

    def unload(self):
        found = [(name, module) for name, module in self.twin.named_modules() if isinstance(module, LoraLayer)]
        for name, _ in found:
            for model in self.both():
                model.get_submodule(name).merge()
                model.set_submodule(name, model.get_submodule(name).get_base_layer())

    def parametrize(self):
        for linear in self.each(nn.Linear):
            parametrizations.weight_norm(linear)

    def copy(self):
        self.handles.clear()
        self.patched, self.twin = (copy.deepcopy(model) for model in self.both())

    def pickle(self):
        if any("Parametrized" in type(module).__name__ for module in self.twin.modules()):
            return
        self.handles.clear()
        loaded = []
        for model in self.both():
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            loaded.append(torch.load(file, weights_only=False))
        self.patched, self.twin = loaded

    def patch(self):
        layers = next(m for m in self.patched.modules() if isinstance(m, nn.ModuleList))
        unknown = any(type(layer) is Wrap for layer in layers) and not is_patched(self.patched)
        with pytest.raises(InputError, match="is a Wrap") if unknown else contextlib.nullcontext():
            patch_model(self.patched)

    def unpatch(self):
        unpatch_model(self.patched)

    def swap_class(self):
        for linear in self.each(nn.Linear):
            linear.__class__ = Louder

    def swap_back(self):
        for linear in self.each(Louder):
            linear.__class__ = nn.Linear

    def bias(self):
        for linear in self.each(nn.Linear):
            with_bias = linear.bias is None
            linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.weight.shape[0])) if with_bias else None

    def eps(self):
        name = self.random.choice([n for n, m in self.twin.named_modules() if "Norm" in type(m).__name__])
        for model in self.both():
            norm = model.get_submodule(name)
            setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.1)

    @torch.no_grad()
    def write(self):
        how = self.random.choice(["data", "numpy", "parameter", "in place", "flipped"])
        self.log[-1] += f" {how}"
        for linear in self.each(nn.Linear):
            weight = linear.weight
            if how == "data":
                weight.data = weight.data * 0.9
            elif how == "numpy":
                weight.detach().numpy()[:] *= 0.9
            elif how == "parameter":
                linear.weight = nn.Parameter(weight * 0.9)
            elif how == "in place":
                weight.mul_(0.9)
            else:
                weight.data = weight.data.flip(1)

    def own_forward(self):
        for module in self.each(nn.Linear):
            module.forward = functools.partial(loud, module)

    def stream(self):
        """A layer whose forward writes into its result."""
        for model in self.both():
            layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
            layer.register_forward_hook(into)

    def check(self):
        compiled = self.random.random() < 0.02
        grad = self.random.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
        self.log[-1] += f" {'compiled ' if compiled else ''}{grad.__name__}"
        with grad():
            for ids in IDS:
                model = torch.compile(self.patched, backend="eager") if compiled else self.patched
                a, b = model(ids, use_cache=False).logits, self.twin(ids, use_cache=False).logits
                difference, scale = (a - b).abs().max(), b.max() - b.min()
                assert difference <= 1e-4 * scale, f"{float(difference / scale):.1g} after {', '.join(self.log)}"


def into(module, inputs, output):
    (output[0] if isinstance(output, tuple) else output).data[..., -1:, :] += 0.5


OPERATIONS = [name for name, f in vars(Pair).items() if callable(f) and not name.startswith("_")]
OPERATIONS = [name for name in OPERATIONS if name not in ("both", "path", "each", "check")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_random_sequences(request):
    """The same ones each time; with --thorough others each time."""
    first = random.SystemRandom().randrange(10**6) if request.config.getoption("--thorough") else 0
    print(f"seeds {first} to {first + SEQUENCES - 1}")
    for seed in range(first, first + SEQUENCES):
        torch._dynamo.reset()  # a sequence is the same alone
        pair = Pair(seed)
        pair.log.insert(0, f"seed {seed}:")
        for _ in range(STEPS):
            operation = pair.random.choice(OPERATIONS)
            pair.log.append(operation)
            getattr(pair, operation)()
            pair.check()
